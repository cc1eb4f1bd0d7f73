"""How far a request and a token travel through the code: calls of our functions, files, and moves between files.

    python bench/walk.py [--files]

A master and a worker run in this process, on real sockets; a client asks for a plain and for a streamed chat answer on
a kept connection. What is counted depends on nothing but the code: every call of a function of the package (a coroutine
that is resumed is called again), how many files these functions are in, and how often one call is in another file than
the call before it. The event loop's instrument, which runs once for each turn of the loop, is counted apart.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

import trio_cluster
from trio_cluster import ChatRequest, ClusterServer, ClusterServerOptions, ServerOptions

PACKAGE = os.path.dirname(trio_cluster.__file__) + os.sep
HOST = "127.0.0.1"
#: Methods of instruments, called for each turn of the loop whatever is done in it.
INSTRUMENT = {"before_io_wait", "after_io_wait"}


class Walk:
    """Counts while it is entered."""

    def __init__(self) -> None:
        self.calls = self.instrument = self.moves = 0
        self.functions: Counter[str] = Counter()
        self.files: Counter[str] = Counter()
        self._last = ""

    def __enter__(self) -> Walk:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if code.co_name in INSTRUMENT:
            self.instrument += 1
            return
        file = code.co_filename[len(PACKAGE) :]
        self.calls += 1
        self.functions[f"{file}:{code.co_qualname}"] += 1
        self.files[file] += 1
        self.moves += file != self._last
        self._last = file

    def describe(self) -> str:
        """Return the figures in one line."""
        return (
            f"{self.calls} calls (+{self.instrument} of the instrument), {len(self.functions)} functions, "
            f"{len(self.files)} files, {self.moves} moves"
        )


class Client:
    """A client with one connection."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection((HOST, port))
        self.sock.setblocking(False)

    async def ask(self, *, stream: bool) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": stream}
        data = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.sock.send(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    async def receive_until(self, mark: bytes) -> None:
        received = b""
        while mark not in received:
            await trio.lowlevel.wait_readable(self.sock)
            received += self.sock.recv(1 << 20)


async def walk() -> tuple[Walk, Walk]:
    """Return the walks of a plain request and of a streamed token."""
    go = trio.Event()

    async def answer(request: ChatRequest) -> AsyncIterator[str]:
        if not request.stream:
            yield "answer"
            return
        yield "begun "
        await go.wait()
        yield "token "
        await trio.sleep_forever()

    def options() -> ClusterServerOptions:
        return ClusterServerOptions(ServerOptions(host=HOST), heartbeat_interval=900.0, worker_timeout=1000.0)

    request, token = Walk(), Walk()
    master, worker = ClusterServer(options()), ClusterServer(options())
    worker.register_chat("m", answer)
    async with trio.open_nursery() as nursery:
        await nursery.start(master.run_as_master, 0)
        assert master.internal_port is not None
        assert master.port is not None
        await nursery.start(worker.run_as_worker, HOST, master.internal_port)
        client = Client(master.port)
        for _ in range(3):
            await client.ask(stream=False)
            await client.receive_until(b"answer")
        await wait_all_tasks_blocked()
        with request:
            await client.ask(stream=False)
            await client.receive_until(b"answer")
            await wait_all_tasks_blocked()
        await client.ask(stream=True)
        await client.receive_until(b"begun ")
        await wait_all_tasks_blocked(0.05)
        with token:
            go.set()
            await client.receive_until(b"token ")
        client.sock.close()
        nursery.cancel_scope.cancel()
    return request, token


def main() -> None:
    walks = trio.run(walk)
    for what, done in zip(("a plain request, to a worker and back", "a streamed token"), walks, strict=True):
        print(f"{what}: {done.describe()}")
        for file, count in done.files.most_common() if "--files" in sys.argv else ():
            print(f"    {count:4d} {file}")


if __name__ == "__main__":
    main()
