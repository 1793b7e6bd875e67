"""Prints the data of each event of a filter: subscribe.py FILTER"""

import http.client
import os
import sys
import time
import urllib.parse

URL = urllib.parse.urlsplit(os.environ.get("TIDEGATE_URL", "http://127.0.0.1:8080"))


def lines(response):
    """Lines as they arrive, without their ends."""
    while line := response.readline():
        yield line.decode().rstrip("\r\n")


def subscribe(target: str):
    """Yields (type, data) for ever. A connection that ends is opened again after the last event."""
    last_id, retry = None, 2.0
    while True:
        # Heartbeats come every 15 s: a connection that is silent for longer is dead.
        connection = http.client.HTTPConnection(URL.hostname, URL.port or 80, timeout=45)
        try:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"{response.status}: {response.read().decode()}")
            kind, data = "message", []
            for line in lines(response):
                field, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if field == "event":
                    kind = value
                elif field == "data":
                    data.append(value)
                elif field == "id":
                    last_id = value
                elif field == "retry":
                    retry = int(value) / 1000
                elif line == "":
                    if data:
                        yield kind, "\n".join(data)
                    kind, data = "message", []
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(retry)


for kind, data in subscribe(f"/events/{urllib.parse.quote(sys.argv[1])}?from=first"):
    if kind == "tidegate.gap":
        print(f"missed events: {data}", file=sys.stderr, flush=True)
    elif not kind.startswith("tidegate.") or kind == "tidegate.binary":
        print(data, flush=True)
