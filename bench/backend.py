"""A backend for the benchmarks: an OpenAI-compatible server of one model, which streams for ever.

It is not what is measured, so it does as little as it can. Prints ``port N`` when it is there, and
``closed NANOSECONDS`` whenever a client closes the connection of a stream, on the clock that all processes share.

    python bench/backend.py
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
import time

INTERVAL = float(os.environ.get("BENCH_INTERVAL", "0.05"))
EVERY = re.compile(rb"every ([0-9.]+)")
STREAM = re.compile(rb'"stream": ?true')

#: One token as servers send it.
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"bench","choices":'
    b'[{"index":0,"delta":{"content":"%b "},"finish_reason":null}]}\n\n'
)
PLAIN = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"bench","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"' + b"x" * 40 + b'"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":10,"completion_tokens":10,"total_tokens":20}}'
)


def chunk(data: bytes) -> bytes:
    """Frame a piece of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(body: bytes) -> bytes:
    """Return a whole answer."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST = HEAD + chunk(EVENT % b"begun")
TOKEN = chunk(EVENT % b"token")
LISTING = answer(b'{"object":"list","data":[{"id":"bench","object":"model"}]}')
WHOLE = answer(PLAIN)


class Connection(asyncio.Protocol):
    """One connection; the requests of the benchmarks come in one piece or two."""

    def __init__(self) -> None:
        self._received = b""
        self._streaming = False
        self._interval = INTERVAL

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = [
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length:" in line
        ]
        chunks = b"transfer-encoding" in head.lower()
        if not end or len(body) < sum(length) or (chunks and not body.endswith(b"0\r\n\r\n")):
            return
        self._received = b""
        if not head.startswith(b"POST"):
            self._transport.write(LISTING)
            return
        if not STREAM.search(body):
            self._transport.write(WHOLE)
            return
        said = EVERY.search(body)
        if said:
            self._interval = float(said[1])
        self._streaming = True
        self._transport.write(FIRST)
        self._next(asyncio.get_running_loop().time())

    def _next(self, now: float) -> None:
        if not self._transport.is_closing():
            asyncio.get_running_loop().call_at(now + self._interval, self._token, now + self._interval)

    def _token(self, now: float) -> None:
        if not self._transport.is_closing():
            self._transport.write(TOKEN)
            self._next(now)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if self._streaming:
            print("closed", time.monotonic_ns(), flush=True)


async def main() -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=4096)
    print("port", server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
