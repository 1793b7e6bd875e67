"""Publishes one event: publish.py SUBJECT DATA"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
import uuid

URL = os.environ.get("TIDEGATE_URL", "http://127.0.0.1:8080")


def publish(subject: str, data: str, attempts: int = 5) -> str:
    """Returns the event's id. Retries with one idempotency key, so that the event is stored once."""
    key = str(uuid.uuid4())
    for attempt in range(attempts):
        request = urllib.request.Request(
            f"{URL}/events/{subject}", data=data.encode(), headers={"Idempotency-Key": key}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return json.load(response)["id"]
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise SystemExit(f"{error.code}: {error.read().decode()}")
        except OSError:
            pass
        time.sleep(0.2 * 2**attempt)
    raise SystemExit("the event may or may not be stored")


print(publish(sys.argv[1], sys.argv[2]))
