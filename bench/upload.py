"""What a large upload costs: memory and CPU of master and worker, its rate, and what others notice of it.

Client, master and worker are processes of their own on one machine (Linux). Memory is how far the resident set of a
process rises above what it was before, at its peak; CPU is user and system time. While a body goes up, somebody else
has a stream of tokens, and the longest pause between two of them is told, for comparison also without any upload.

    python bench/upload.py [--megabytes 200] [--json 40] [--rounds 1]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import trio
from cancellation import read_lines
from relay import cpu_seconds, drop
from worker import HOST, free_port

from trio_cluster import (
    ASRRequest,
    ChatRequest,
    ClusterServer,
    ClusterServerOptions,
    RawCall,
    ServerOptions,
    check_is_cluster_server,
)

MB = 1_000_000
#: Seconds between the tokens of the stream beside the upload.
INTERVAL = 0.002
#: What the client writes at a time.
PIECE = 64 * 1024
BOUNDARY = "between-the-parts"

server = ClusterServer(ClusterServerOptions(server=ServerOptions(host=HOST, default_timeout=120.0)))


async def count(call: RawCall) -> None:
    """Count what comes."""
    size = 0
    while piece := await call.receive():
        size += len(piece)
    call.begin(200, "text/plain")
    await call.send(str(size).encode())


server.register_raw("raw", count)


@server.asr("asr")
async def measure_audio(request: ASRRequest) -> str:
    """Say how large the file is."""
    return str(len(request.audio))


@server.chat("tokens")
async def tokens(request: ChatRequest) -> AsyncIterator[str]:
    """Stream for ever."""
    while True:
        yield "token "
        await trio.sleep(INTERVAL)


async def serve() -> None:
    """Be the worker, until standard input ends; the master is a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "trio_cluster", "master", str(port), "--host", HOST]
    async with trio.open_nursery() as nursery:
        master = await nursery.start(
            partial(trio.run_process, [*command, "--log-level", "warning"], stdin=subprocess.DEVNULL)
        )
        with trio.fail_after(20):
            # Another process cannot set an event of ours.
            while not await check_is_cluster_server(HOST, port + 1000):  # noqa: ASYNC110
                await trio.sleep(0.05)
        await nursery.start(server.run_as_worker, HOST, port + 1000)
        print("port", port, "master", master.pid, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


# The client


@attrs.frozen
class Body:
    """A request's body, which is made while it is sent."""

    path: str
    content_type: str
    before: bytes
    size: int
    after: bytes

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
    end = f"--{BOUNDARY}--\r\n"
    return Body(
        "/v1/audio/transcriptions",
        f"multipart/form-data; boundary={BOUNDARY}",
        before.encode(),
        size,
        f"\r\n{after}{end}".encode(),
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


async def upload(port: int, body: Body) -> str:
    """Send it, and return what is answered."""
    stream = await trio.open_tcp_stream(HOST, port)
    async with stream:
        head = (
            f"POST {body.path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {body.content_type}\r\n"
            f"Content-Length: {body.length}\r\nConnection: close\r\n\r\n"
        )
        await stream.send_all(head.encode() + body.before)
        piece, left = b"x" * PIECE, body.size
        while left > 0:
            await stream.send_all(piece[: min(left, PIECE)])
            left -= PIECE
        await stream.send_all(body.after)
        received = b""
        async for data in stream:
            received += data
    head_, _, answer = received.partition(b"\r\n\r\n")
    if b" 200 " not in head_.split(b"\r\n")[0]:
        raise SystemExit(f"{head_!r} {answer!r}")
    return answer.decode()


@attrs.define
class Pauses:
    """The times between the pieces of a stream."""

    longest: float = 0.0
    late: int = 0

    async def watch(self, port: int, *, task_status: trio.TaskStatus[None]) -> None:
        """Take a stream of tokens, and note how evenly it comes."""
        body = json.dumps(
            {"model": "tokens", "stream": True, "messages": [{"role": "user", "content": "go"}]}
        ).encode()
        stream = await trio.open_tcp_stream(HOST, port)
        async with stream:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            await stream.send_all(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            for _ in range(20):
                await stream.receive_some()
            last = time.perf_counter()
            task_status.started()
            async for _ in stream:
                now = time.perf_counter()
                self.longest = max(self.longest, now - last - INTERVAL)
                self.late += now - last - INTERVAL > 0.010
                last = now


def memory(pid: int, name: str) -> int:
    """Return a figure of a process's memory, in bytes: ``VmRSS`` now, or ``VmHWM``, its peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def forget_peak(pid: int) -> None:
    """Let the peak of a process's memory be what it is now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@attrs.frozen
class Figures:
    """What one upload took."""

    seconds: float
    master_cpu: float
    worker_cpu: float
    master_memory: int
    worker_memory: int
    longest_pause: float
    late: int


async def measure(port: int, master: int, worker: int, body: Body | None, seconds: float = 1.0) -> Figures:
    """Return what an upload takes; without one, what the same time is like."""
    pauses = Pauses()
    async with trio.open_nursery() as nursery:
        await nursery.start(pauses.watch, port)
        for pid in (master, worker):
            forget_peak(pid)
        before = [memory(pid, "VmRSS") for pid in (master, worker)]
        cpu = [cpu_seconds(pid) for pid in (master, worker)]
        began = time.perf_counter()
        if body is None:
            await trio.sleep(seconds)
        else:
            await upload(port, body)
        took = time.perf_counter() - began
        cpu = [cpu_seconds(pid) - start for pid, start in zip((master, worker), cpu, strict=True)]
        rise = [memory(pid, "VmHWM") - start for pid, start in zip((master, worker), before, strict=True)]
        nursery.cancel_scope.cancel()
    return Figures(took, *cpu, *rise, pauses.longest, pauses.late)


@asynccontextmanager
async def cluster() -> AsyncIterator[tuple[int, int, int]]:
    """Run a master and a worker; give the port, and the pids of both."""
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, __file__, "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        send, lines = trio.open_memory_channel[str](1000)
        nursery.start_soon(read_lines, process.stdout, send)
        _, port, _, pid = (await lines.receive()).split()
        nursery.start_soon(drop, lines)
        yield int(port), int(pid), process.pid
        await process.stdin.aclose()


async def compare(megabytes: float, json_megabytes: float, rounds: int) -> None:
    """Measure and print."""
    size, json_size = round(megabytes * MB), round(json_megabytes * MB)
    cases: dict[str, Body | None] = {
        "no upload": None,
        "raw, form, model first": form("raw", size, model_first=True),
        "raw, form, model last": form("raw", size, model_first=False),
        "raw, JSON": text("raw", json_size),
        "asr, form, model first": form("asr", size, model_first=True),
        "asr, form, model last": form("asr", size, model_first=False),
    }
    print(
        f"{'':<24}{'MB':>6}{'MB/s':>7}{'CPU ms/MB':>16}{'memory/body':>18}{'MB':>14}{'pause ms':>10}{'>10':>5}"
    )
    print(f"{'':<37}{'master':>8}{'worker':>8}{'master':>9}{'worker':>9}{'master':>7}{'worker':>7}")
    async with cluster() as (port, master, worker):
        for model in ("raw", "asr"):
            await upload(port, form(model, 2 * MB, model_first=True))
        for name, body in cases.items():
            for _ in range(rounds):
                figures = await measure(port, master, worker, body)
                print(row(name, body, figures), flush=True)


def row(name: str, body: Body | None, figures: Figures) -> str:
    """Return a line of the table."""
    size = math.nan if body is None else body.length / MB
    return (
        f"{name:<24}{size:>6.0f}{size / figures.seconds:>7.0f}"
        f"{1000 * figures.master_cpu / size:>8.2f}{1000 * figures.worker_cpu / size:>8.2f}"
        f"{figures.master_memory / MB / size:>9.2f}{figures.worker_memory / MB / size:>9.2f}"
        f"{figures.master_memory / MB:>7.1f}{figures.worker_memory / MB:>7.1f}"
        f"{1000 * figures.longest_pause:>10.1f}{figures.late:>5}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200, help="of the file in a form")
    parser.add_argument("--json", type=float, default=40, help="megabytes of a JSON object")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(serve)
    else:
        trio.run(compare, arguments.megabytes, arguments.json, arguments.rounds)


if __name__ == "__main__":
    main()
