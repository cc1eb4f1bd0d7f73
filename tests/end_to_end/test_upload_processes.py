"""Large uploads with real processes and real sockets: what arrives, what it takes, and what is left."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from nodes import NOT_RESUMED, Node, Nodes
from served import until

pytestmark = pytest.mark.processes

MB: Final = 1_000_000
PIECE: Final = 256 * 1024
#: Bytes by which a process may grow, whatever goes through it: windows, buffers, and what an allocator keeps.
ROOM: Final = 24 * MB


def sound(index: int) -> bytes:
    """Return a piece of a file in which every piece is another one."""
    return index.to_bytes(8, "big") * (PIECE // 8)


class Upload:
    """A form on its way to a node."""

    def __init__(self, model: str, *, pieces: int, first: bool) -> None:
        self._pieces = pieces
        part = '--B\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
        field = part.format("model", "") + f"{model}\r\n"
        file = part.format("file", '; filename="a.wav"')
        before, after = (field + file, "") if first else (file, field)
        self._before, self._after = before.encode(), f"\r\n{after}--B--\r\n".encode()
        self._stream: trio.SocketStream

    async def begin(self, stream: trio.SocketStream, pieces: int) -> None:
        """Send the head and so many pieces of the file."""
        self._stream = stream
        length = len(self._before) + self._pieces * PIECE + len(self._after)
        head = (
            "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: the-one\r\n"
            f"Content-Type: multipart/form-data; boundary=B\r\nContent-Length: {length}\r\n\r\n"
        )
        await self._stream.send_all(head.encode() + self._before)
        for index in range(pieces):
            await self._stream.send_all(sound(index))
        self._sent = pieces

    async def finish(self) -> None:
        """Send the rest."""
        for index in range(self._sent, self._pieces):
            await self._stream.send_all(sound(index))
        await self._stream.send_all(self._after)

    async def answer(self) -> tuple[int, Any]:
        """Return the status and the JSON of the answer."""
        received = b""
        while b"\r\n\r\n" not in received:
            received += await self._stream.receive_some()
        head, _, body = received.partition(b"\r\n\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        while len(body) < int(headers[b"content-length"]):
            body += await self._stream.receive_some()
        assert headers[b"x-request-id"] == b"the-one"
        return int(head.split()[1]), json.loads(body)

    def reset(self) -> None:
        self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._stream.socket.close()

    @property
    def digest(self) -> str:
        whole = hashlib.sha256()
        for index in range(self._pieces):
            whole.update(sound(index))
        return whole.hexdigest()


@asynccontextmanager
async def upload_to(
    node: Node, model: str, *, pieces: int, begin: int | None = None, first: bool = True
) -> AsyncIterator[Upload]:
    """Begin an upload with so many of its pieces, or with all."""
    upload = Upload(model, pieces=pieces, first=first)
    async with await trio.open_tcp_stream("127.0.0.1", node.port) as stream:
        with trio.fail_after(60):
            await upload.begin(stream, pieces if begin is None else begin)
            yield upload


def memory(node: Node, name: str) -> int:
    lines = Path(f"/proc/{node.process.pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def open_files(node: Node) -> int:
    """Return how many files a process has open that have no name any more."""
    directory = f"/proc/{node.process.pid}/fd"
    targets = []
    for name in os.listdir(directory):
        with suppress(FileNotFoundError):
            targets.append(os.readlink(f"{directory}/{name}"))
    return sum("(deleted)" in target for target in targets)


async def cluster(nodes: Nodes) -> tuple[Node, Node, str]:
    """Start a master and a worker; return them, and the name of the model that hears."""
    master = await nodes.master(*NOT_RESUMED)
    worker = await nodes.worker(master, "w1", models="chat")
    return master, worker, f"digest-{worker.process.pid}"


@pytest.mark.parametrize("first", [True, False], ids=["model first", "model last"])
async def test_a_large_file_goes_through_a_master_whose_memory_stays_as_it_is(
    first: bool, nodes: Nodes
) -> None:
    master, worker, model = await cluster(nodes)
    files, before = open_files(master), {}
    for pieces in (8, 400):
        before = {node.command: memory(node, "VmHWM") for node in (master, worker)}
        async with upload_to(master, model, pieces=pieces, first=first) as upload:
            await upload.finish()
            assert await upload.answer() == (200, {"text": upload.digest})
    assert memory(master, "VmHWM") - before["master"] < ROOM
    # The handler wants it as a whole; it is there once.
    assert memory(worker, "VmHWM") - before["worker"] < 400 * PIECE + ROOM
    await until(lambda: open_files(master) == files)


@pytest.mark.parametrize("first", [True, False], ids=["model first", "model last"])
async def test_a_client_that_resets_in_the_middle_leaves_nothing_behind(first: bool, nodes: Nodes) -> None:
    master, _, model = await cluster(nodes)
    files = open_files(master)
    async with upload_to(master, model, pieces=100, begin=40, first=first) as upload:
        if not first:
            await until(lambda: open_files(master) == files + 1)
        upload.reset()
    await until(lambda: open_files(master) == files)
    async with upload_to(master, model, pieces=10, first=first) as upload:
        await upload.finish()
        assert await upload.answer() == (200, {"text": upload.digest})


async def test_a_worker_that_is_killed_in_the_middle_is_502_and_its_request_is_named_in_the_log(
    nodes: Nodes,
) -> None:
    master, worker, model = await cluster(nodes)
    async with upload_to(master, model, pieces=100, begin=40) as upload:
        worker.send(signal.SIGKILL)
        await upload.finish()
        status, body = await upload.answer()
        assert (status, body["error"]["code"]) == (502, "worker_lost")
    line = await master.log("worker left", worker="w1")
    assert (line["calls_lost"], line["request_ids"]) == (1, ["the-one"])


async def test_a_worker_that_is_stopped_in_the_middle_answers_first(nodes: Nodes) -> None:
    master, worker, model = await cluster(nodes)
    async with upload_to(master, model, pieces=100, begin=40) as upload:
        worker.send(signal.SIGTERM)
        await master.log("worker drains", worker="w1")
        await upload.finish()
        assert await upload.answer() == (200, {"text": upload.digest})
    assert await worker.exit_code() == 0
