"""Runs Python's SSE clients, each as its README has it, as many streams at once as it is told to, each on a thread of its
own. Reads and writes one JSON object a line, as tests/clients/drivers.rs has it; ends with its standard input."""

import asyncio, json, os, platform, sys, threading, time, traceback

import aiohttp, httpx, requests, requests_sse, sseclient, urllib3
from aiohttp_sse_client2.client import EventSource
from httpx_sse import SSEError, connect_sse

writing = threading.Lock()


def write(**line):
    with writing:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


class Stream:
    """What one stream's thread tells."""

    def __init__(self, order):
        self.of, self.url = order["open"], order["url"]
        certificate = order.get("certificate")
        self.tls = {"verify": certificate, "http2": True} if certificate else {}
        self.ends = threading.Event()

    def event(self, kind, id, data):
        if self.ends.is_set():
            raise SystemExit  # of this thread
        write(of=self.of, event={"type": kind, "id": id, "data": data})

    def error(self, error):
        if self.ends.is_set():
            raise SystemExit
        write(of=self.of, error=f"{type(error).__name__}: {error}")

    def end(self, text):
        if not self.ends.is_set():
            write(of=self.of, end=text)


def httpx_sse(stream):
    url, tls = stream.url, stream.tls

    def show(event):
        stream.event(event.event, event.id, event.data)

    def note(error):
        stream.error(error)

    # docs: httpx-sse
    last_event_id, retry = "", 2.0
    timeout = httpx.Timeout(10, read=45)  # three heartbeats; the default of 5 s is less than one
    with httpx.Client(timeout=timeout, **tls) as client:
        while True:
            headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
            try:
                with connect_sse(client, "GET", url, headers=headers) as source:
                    source.response.raise_for_status()
                    for event in source.iter_sse():
                        last_event_id = event.id
                        retry = event.retry / 1000 if event.retry is not None else retry
                        show(event)
            except (httpx.TransportError, SSEError) as error:
                note(error)
            time.sleep(retry)
    # docs end


def sseclient_py_httpx(stream):
    url, tls = stream.url, stream.tls

    def show(event):
        stream.event(event.event, event.id, event.data)

    def note(error):
        stream.error(error)

    # docs: sseclient-py over httpx
    last_event_id, retry = None, 2.0
    timeout = httpx.Timeout(10, read=45)
    with httpx.Client(timeout=timeout, **tls) as client:
        while True:
            headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_event_id} if last_event_id else {})}
            try:
                with client.stream("GET", url, headers=headers) as response:
                    response.raise_for_status()
                    for event in sseclient.SSEClient(response.iter_bytes()).events():
                        last_event_id = event.id or last_event_id
                        retry = int(event.retry) / 1000 if event.retry else retry
                        show(event)
            except httpx.TransportError as error:
                note(error)
            time.sleep(retry)
    # docs end


def sseclient_py_requests(stream):
    url = stream.url

    def show(event):
        stream.event(event.event, event.id, event.data)

    def note(error):
        stream.error(error)

    # docs: sseclient-py over requests
    last_event_id, retry = None, 2.0
    while True:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_event_id} if last_event_id else {})}
        try:
            with requests.get(url, stream=True, headers=headers, timeout=(10, 45)) as response:
                response.raise_for_status()
                for event in sseclient.SSEClient(response).events():
                    last_event_id = event.id or last_event_id
                    retry = int(event.retry) / 1000 if event.retry else retry
                    show(event)
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            note(error)
        time.sleep(retry)
    # docs end


def sseclient_py_urllib3(stream):
    url = stream.url

    def show(event):
        stream.event(event.event, event.id, event.data)

    def note(error):
        stream.error(error)

    # docs: sseclient-py over urllib3
    last_event_id, retry = None, 2.0
    http = urllib3.PoolManager(timeout=urllib3.Timeout(connect=10, read=45), retries=False)
    while True:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_event_id} if last_event_id else {})}
        try:
            with http.request("GET", url, headers=headers, preload_content=False) as response:
                if response.status != 200:
                    raise RuntimeError(f"status {response.status}")
                for event in sseclient.SSEClient(response).events():
                    last_event_id = event.id or last_event_id
                    retry = int(event.retry) / 1000 if event.retry else retry
                    show(event)
        except urllib3.exceptions.HTTPError as error:
            note(error)
        time.sleep(retry)
    # docs end


def plain_requests(stream):
    url = stream.url

    def show(kind, id, data):
        stream.event(kind, id, data)

    def note(error):
        stream.error(error)

    # docs: requests alone
    last_event_id, retry = None, 2.0
    while True:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_event_id} if last_event_id else {})}
        kind, data, id = "message", [], last_event_id
        try:
            with requests.get(url, stream=True, headers=headers, timeout=(10, 45)) as response:
                response.raise_for_status()
                for line in response.iter_lines(chunk_size=None):  # bytes, as they come
                    line = line.decode("utf-8")
                    name, _, value = line.partition(":")
                    value = value.removeprefix(" ")
                    if name == "data":
                        data.append(value)
                    elif name == "event":
                        kind = value
                    elif name == "id":
                        id = value
                    elif name == "retry":
                        retry = int(value) / 1000
                    elif line == "":
                        last_event_id = id
                        if data:
                            show(kind, id, "\n".join(data))
                        kind, data = "message", []
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            note(error)
        time.sleep(retry)
    # docs end


def requests_sse_(stream):
    url = stream.url

    def show(event):
        stream.event(event.type, event.last_event_id, event.data)

    # docs: requests-sse
    with requests_sse.EventSource(url, timeout=(10, 45), max_connect_retry=10**6) as source:
        for event in source:
            show(event)
    # docs end


def aiohttp_sse_client2_once(stream):
    async def read():
        async with EventSource(stream.url) as source:
            async for event in source:
                stream.event(event.type or "message", event.last_event_id, event.data)

    asyncio.run(read())


def aiohttp_sse_client2_loop(stream):
    url = stream.url

    def show(event):
        stream.event(event.type or "message", event.last_event_id, event.data)

    def note(error):
        stream.error(error)

    async def read():
        # docs: aiohttp-sse-client2
        last_event_id = ""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=45)  # the default ends a stream after 5 minutes
        async with aiohttp.ClientSession(timeout=timeout, read_bufsize=2**22) as session:
            while True:
                headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
                try:
                    async with EventSource(url, session=session, headers=headers) as source:
                        async for event in source:
                            last_event_id = event.last_event_id
                            show(event)
                except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
                    note(error)  # the stream broke off
                await asyncio.sleep(2)
        # docs end

    asyncio.run(read())


CLIENTS = {
    "httpx-sse": httpx_sse,
    "sseclient-py over httpx": sseclient_py_httpx,
    "sseclient-py over requests": sseclient_py_requests,
    "sseclient-py over urllib3": sseclient_py_urllib3,
    "requests": plain_requests,
    "requests-sse": requests_sse_,
    "aiohttp-sse-client2 once": aiohttp_sse_client2_once,
    "aiohttp-sse-client2": aiohttp_sse_client2_loop,
}


def run(client, stream):
    try:
        CLIENTS[client](stream)
        stream.end("the iteration ended")
    except Exception as error:
        stream.end("".join(traceback.format_exception_only(error)).strip())


streams = {}
write(ready=f"Python {platform.python_version()}")
for line in sys.stdin:
    order = json.loads(line)
    if "close" in order:
        streams.pop(order["close"]).ends.set()
    else:
        stream = streams[order["open"]] = Stream(order)
        threading.Thread(target=run, args=(order["client"], stream), daemon=True).start()
os._exit(0)
