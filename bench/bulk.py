"""What large bodies cost, both ways, and what everybody else notices of them.

Each case is measured in one process alone (local), and through a master and a worker (forwarded); the client is always
a process of its own, on the same machine. Told are the rate; CPU time for each megabyte; how far memory rises at its
peak, for each byte of the body; and three measures of being held up while it passes:

- the longest turn of an event loop, in CPU time: so long nobody else in that process is served;
- the same in real time, which on a busy machine has other processes in it;
- the longest pause in a stream of tokens that somebody else is getting, beyond the time between two of them.

    python bench/bulk.py [--megabytes 25] [--vectors 2048] [--rounds 1] [--quick] [--save FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio
from running import (
    HOST,
    MB,
    cpu_seconds,
    forget_peak,
    free_port,
    group,
    memory,
    percentile,
    save,
    start,
    wait_for_port,
    weather,
)

from trio_cluster import (
    ASRRequest,
    ChatRequest,
    ClusterServer,
    ClusterServerOptions,
    EmbeddingRequest,
    RawCall,
    ServerOptions,
    TTSRequest,
)
from trio_cluster.cli.process import tune_garbage_collector

#: Seconds between the tokens of the stream beside.
INTERVAL = 0.002
#: What is written at a time.
PIECE = 64 * 1024
BOUNDARY = "between-the-parts"
DIMENSIONS = 1536


# The nodes


def vectors(count: int) -> list[Any]:
    """Return vectors as a model has them: arrays, if there is a library for that."""
    numbers = array("f", (random.gauss(0, 0.02) for _ in range(DIMENSIONS)))
    try:
        import numpy
    except ImportError:
        return [numbers.tolist()] * count
    return list(numpy.tile(numpy.frombuffer(numbers, dtype="f4"), (count, 1)))


def node() -> ClusterServer:
    """Return a node with the models that are asked."""
    server = ClusterServer(
        ClusterServerOptions(server=ServerOptions(host=HOST, default_timeout=120.0, worker_id="w"))
    )

    async def raw(call: RawCall) -> None:
        size = 0
        while piece := await call.receive():
            size += len(piece)
        wanted = int(call.request.headers.get("x-size", "0"))
        call.begin(200, "application/octet-stream")
        for _ in range(wanted // PIECE):
            await call.send(bytes(PIECE))
        await call.send(str(size).encode())

    @server.asr("asr")
    async def asr(request: ASRRequest) -> str:
        return str(len(request.audio))

    @server.chat("chat")
    async def chat(request: ChatRequest) -> str:
        return str(len(request.last_text))

    @server.tts("whole")
    async def whole(request: TTSRequest) -> bytes:
        return bytes(int(request.input))

    @server.tts("pieces")
    async def pieces(request: TTSRequest) -> AsyncIterator[bytes]:
        for _ in range(int(request.input) // PIECE):
            yield bytes(PIECE)

    cached: dict[int, list[Any]] = {}

    @server.embedding("arrays")
    async def arrays(request: EmbeddingRequest) -> list[Any]:
        return cached.setdefault(len(request.inputs), vectors(len(request.inputs)))

    @server.embedding("lists")
    async def lists(request: EmbeddingRequest) -> list[Any]:
        return [list(map(float, (await arrays(request))[0]))] * len(request.inputs)

    @server.chat("tokens")
    async def tokens(request: ChatRequest) -> AsyncIterator[str]:
        while True:
            yield "token "
            await trio.sleep(INTERVAL)

    server.register_raw("raw", raw)
    return server


class Turns(trio.abc.Instrument):
    """Notes how long the turns of an event loop are: in one, each task that is ready runs once."""

    def __init__(self) -> None:
        self.forget()
        self._began: tuple[float, float] | None = None

    def forget(self) -> None:
        """Begin anew."""
        self.cpu: list[float] = [0.0]
        self.real: list[float] = [0.0]

    def after_io_wait(self, timeout: float) -> None:
        """See trio."""
        self._began = time.thread_time(), time.perf_counter()

    def before_io_wait(self, timeout: float) -> None:
        """See trio."""
        if self._began is not None:
            cpu, real = time.thread_time() - self._began[0], time.perf_counter() - self._began[1]
            self.cpu.append(cpu)
            self.real.append(real)


async def serve(part: str, port: int) -> None:
    """Be a node; tells about its turns for each line that comes in, and ends when no more can."""
    # That the master ends before its workers is how every measurement ends.
    logging.getLogger("trio_cluster").addHandler(logging.NullHandler())
    turns = Turns()
    trio.lowlevel.add_instrument(turns)
    server = (
        node() if part != "master" else ClusterServer(ClusterServerOptions(server=ServerOptions(host=HOST)))
    )
    run: Callable[..., Any] = {
        "master": lambda **status: server.run_as_master(port, **status),
        "worker": lambda **status: server.run_as_worker(HOST, port + 1000, **status),
        "alone": lambda **status: server.run_as_standalone(port, **status),
    }[part]
    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        # As the command line does for a node that it runs.
        tune_garbage_collector(rare=part == "master")
        print("port", port, flush=True)
        while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            print(max(turns.cpu), max(turns.real), flush=True)
            turns.forget()
        nursery.cancel_scope.cancel()


# The client


@attrs.frozen
class Body:
    """A request's body, which is made while it is sent."""

    path: str
    content_type: str
    before: bytes
    size: int = 0
    after: bytes = b""
    answer: int = 0
    """Bytes of the answer that are asked for in a header."""

    @property
    def length(self) -> int:
        """How many bytes it has altogether."""
        return len(self.before) + self.size + len(self.after)


def form(model: str, size: int, *, model_first: bool) -> Body:
    """Return a form with a file of so many bytes."""
    field = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'
    file = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    )
    before, after = (field + file, "") if model_first else (file, field)
    return Body(
        "/v1/audio/transcriptions",
        f"multipart/form-data; boundary={BOUNDARY}",
        before.encode(),
        size,
        f"\r\n{after}--{BOUNDARY}--\r\n".encode(),
    )


def text(model: str, size: int) -> Body:
    """Return a JSON object with a string of so many characters."""
    return Body(
        "/v1/chat/completions",
        "application/json",
        b'{"model": "%s", "messages": [{"role": "user", "content": "' % model.encode(),
        size,
        b'"}]}',
    )


def question(path: str, *, answer: int = 0, **fields: object) -> Body:
    """Return a small JSON object."""
    return Body(path, "application/json", json.dumps(fields).encode(), answer=answer)


async def context(port: int, body: Body) -> int:
    """Send it, and return how many bytes are answered."""
    async with await trio.open_tcp_stream(HOST, port) as stream:
        head = (
            f"POST {body.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {body.content_type}\r\n"
            f"Content-Length: {body.length}\r\nx-size: {body.answer}\r\nConnection: close\r\n\r\n"
        )
        await stream.send_all(head.encode() + body.before)
        piece, left = b"x" * PIECE, body.size
        while left > 0:
            await stream.send_all(piece[: min(left, PIECE)])
            left -= PIECE
        if body.after:
            await stream.send_all(body.after)
        first, size = b"", 0
        async for data in stream:
            first = first or bytes(data)
            size += len(data)
    if b" 200 " not in first.split(b"\r\n")[0]:
        raise SystemExit(f"{first!r}")
    return size


@attrs.define
class Pauses:
    """The times between the pieces of a stream."""

    longest: float = 0.0

    async def watch(self, port: int, *, task_status: trio.TaskStatus[None]) -> None:
        """Take a stream of tokens, and note how evenly it comes."""
        message = {"role": "user", "content": "go"}
        body = json.dumps({"model": "tokens", "stream": True, "messages": [message]}).encode()
        async with await trio.open_tcp_stream(HOST, port) as stream:
            head = (
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            )
            await stream.send_all(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            for _ in range(20):
                await stream.receive_some()
            last = time.perf_counter()
            task_status.started()
            async for _ in stream:
                now = time.perf_counter()
                self.longest = max(self.longest, now - last - INTERVAL)
                last = now


class Node:
    """A node in a process of its own."""

    def __init__(self, running: Any) -> None:
        self._running = running
        self.pid: int = running.pid
        self._cpu = self._memory = 0.0

    async def begin(self) -> None:
        """Begin to measure."""
        await self._turns()
        forget_peak(self.pid)
        self._cpu, self._memory = cpu_seconds(self.pid), memory(self.pid)

    async def end(self) -> dict[str, float]:
        """Return what has been measured."""
        cpu, real = await self._turns()
        return {
            "cpu": cpu_seconds(self.pid) - self._cpu,
            "memory": memory(self.pid, "VmHWM") - self._memory,
            "turn": cpu,
            "real turn": real,
        }

    async def _turns(self) -> list[float]:
        await self._running.process.stdin.send_all(b"\n")
        return [float(each) for each in (await self._running.lines.receive()).split()]


@asynccontextmanager
async def cluster(local: bool) -> AsyncIterator[tuple[int, list[Node]]]:
    """Run one process, or a master and a worker; give the port and the nodes."""
    async with group() as nursery:
        port = free_port()
        if local:
            nodes = [await start(nursery, "bulk.py", "--serve", "alone", port)]
        else:
            master = await start(nursery, "bulk.py", "--serve", "master", port)
            await wait_for_port(port)
            nodes = [master, await start(nursery, "bulk.py", "--serve", "worker", port)]
        yield port, [Node(each) for each in nodes]


async def measure(port: int, nodes: Iterable[Node], body: Body | None) -> dict[str, Any]:
    """Return what a body takes; without one, what a second is like in which nothing happens."""
    pauses, size = Pauses(), 0
    async with trio.open_nursery() as nursery:
        await nursery.start(pauses.watch, port)
        for each in nodes:
            await each.begin()
        began = time.perf_counter()
        if body is None:
            await trio.sleep(1)
        else:
            size = max(body.length, await context(port, body))
        seconds = time.perf_counter() - began
        found = [await each.end() for each in nodes]
        nursery.cancel_scope.cancel()
    return {"size": size, "seconds": seconds, "pause": pauses.longest, "nodes": found}


def cases(megabytes: float, count: int) -> dict[str, Body | None]:
    """Return what is measured."""
    size = round(megabytes * MB)
    inputs = ["word"] * count
    return {
        "nothing": None,
        "up: form, untouched": form("raw", size, model_first=True),
        "up: form, model last": form("raw", size, model_first=False),
        "up: form, to a handler": form("asr", size, model_first=True),
        "up: JSON, untouched": text("raw", size),
        "up: JSON, to a handler": text("chat", size),
        "down: untouched": question("/v1/chat/completions", model="raw", answer=size),
        "down: speech, in pieces": question("/v1/audio/speech", model="pieces", input=str(size), voice="v"),
        "down: speech, whole": question("/v1/audio/speech", model="whole", input=str(size), voice="v"),
        "down: vectors, base64": question(
            "/v1/embeddings", model="arrays", input=inputs, encoding_format="base64"
        ),
        "down: vectors, numbers": question("/v1/embeddings", model="arrays", input=inputs),
        "down: vectors, from lists": question("/v1/embeddings", model="lists", input=inputs),
    }


HEADINGS = (
    f"{'':<38}{'MB':>6}{'MB/s':>7}{'CPU ms/MB':>16}{'memory/byte':>16}{'turn ms, CPU':>16}{'real':>14}{'pause':>8}",
    f"{'':<51}{'front':>8}{'worker':>8}"
    + f"{'front':>8}{'worker':>8}" * 2
    + f"{'front':>7}{'worker':>7}{'ms':>8}",
)


def row(name: str, figures: dict[str, Any]) -> str:
    """Return a line of the table."""
    size = figures["size"] / MB
    columns = []
    for key, scale, width, form_ in (
        ("cpu", 1e3 / size if size else 0, 8, ".1f"),
        ("memory", 1 / MB / size if size else 0, 8, ".2f"),
        ("turn", 1e3, 8, ".1f"),
        ("real turn", 1e3, 7, ".1f"),
    ):
        values = [f"{each[key] * scale:{form_}}" for each in figures["nodes"]] + ["-"]
        columns += [f"{value:>{width}}" for value in values[:2]]
    rate = size / figures["seconds"]
    return f"{name:<38}{size:>6.0f}{rate:>7.0f}{''.join(columns)}{1e3 * figures['pause']:>8.1f}"


async def compare(arguments: Any) -> None:
    """Measure and print."""
    kept: list[dict[str, Any]] = []
    print(f"large bodies ({weather()}):")
    print(*HEADINGS, sep="\n")
    for local in (True, False):
        where = "local" if local else "forwarded"
        async with cluster(local) as (port, nodes):
            for body in cases(0.2, 2).values():
                if body is not None:
                    await context(port, body)
            for name, body in cases(arguments.megabytes, arguments.vectors).items():
                rounds = [await measure(port, nodes, body) for _ in range(arguments.rounds)]
                # The one in the middle by what it held up, so that its figures belong together.
                held = percentile((max(node["turn"] for node in each["nodes"]) for each in rounds), 0.5)
                figures = next(each for each in rounds if max(node["turn"] for node in each["nodes"]) == held)
                print(row(f"{where}, {name}", figures), flush=True)
                kept.append({"where": where, "case": name} | figures)
    save(arguments.save, "bulk", kept)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=25)
    parser.add_argument("--vectors", type=int, default=2048, help=f"in an answer; {DIMENSIONS} numbers each")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    parser.add_argument("--serve", nargs=2, metavar=("PART", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(serve, arguments.serve[0], int(arguments.serve[1]))
        return
    if arguments.quick:
        arguments.megabytes, arguments.vectors = 1.0, 16
    trio.run(compare, arguments)


if __name__ == "__main__":
    main()
