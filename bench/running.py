"""What every benchmark needs: programs that are started and ended with it, and what they have cost so far.

CPU time is user and system time of a process, from its CPU clock; memory is its resident set. Both are Linux's to tell.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from trio_cluster import check_is_cluster_server

HERE = Path(__file__).parent
HOST = "127.0.0.1"
MB = 1_000_000

#: Seconds that anything may take that takes much less.
_PATIENCE = 30.0


@attrs.frozen
class Running:
    """A program that was started, and what it prints."""

    port: int
    process: trio.Process
    lines: trio.MemoryReceiveChannel[str]

    @property
    def pid(self) -> int:
        """The process."""
        return int(self.process.pid)


async def read_lines(stream: trio.abc.ReceiveStream, send: trio.MemorySendChannel[str]) -> None:
    """Give each line that a program prints to ``send``."""
    buffer = b""
    async with send:
        async for data in stream:
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                await send.send(line.decode())


async def drop(lines: trio.MemoryReceiveChannel[str]) -> None:
    """Forget what else a program prints."""
    async for _ in lines:
        pass


async def run(
    nursery: trio.Nursery, command: list[str], env: Mapping[str, str] | None = None, *, quiet: bool = False
) -> trio.Process:
    """Start a program that ends with the nursery."""
    environment = {name: value for name, value in (os.environ | (env or {})).items() if name[:7] != "PYTHONW"}
    out = subprocess.DEVNULL if quiet else subprocess.PIPE
    options = {"stdin": subprocess.PIPE, "stdout": out, "env": environment, "check": False}
    if quiet:
        options["stderr"] = out
    process: trio.Process = await nursery.start(partial(trio.run_process, command, **options))
    return process


async def start(
    nursery: trio.Nursery, program: str, *arguments: object, within: Sequence[str] = ()
) -> Running:
    """Start one of the programs beside this one; it prints first on which port it serves.

    Args:
        nursery: ends it.
        program: its file.
        arguments: of its command line.
        within: a command that runs another one, as ``ip netns exec`` does.
    """
    process = await run(nursery, [*within, sys.executable, str(HERE / program), *map(str, arguments)])
    send, lines = trio.open_memory_channel[str](100_000)
    nursery.start_soon(read_lines, process.stdout, send)
    with trio.fail_after(_PATIENCE):
        _, port = (await lines.receive()).split()
    return Running(int(port), process, lines)


async def start_master(nursery: trio.Nursery, *flags: str) -> tuple[int, trio.Process]:
    """Start a master, and return the port of its API, and the process."""
    port = free_port()
    process = await start_node(nursery, "master", str(port), "--host", HOST, *flags)
    with trio.fail_after(_PATIENCE):
        # Another process cannot set an event of ours.
        while not await check_is_cluster_server(HOST, port + 1000):  # noqa: ASYNC110
            await trio.sleep(0.05)
    return port, process


async def start_node(nursery: trio.Nursery, *arguments: str, within: Sequence[str] = ()) -> trio.Process:
    """Start a node of a cluster; ``within`` is as for :func:`start`."""
    command = [*within, sys.executable, str(HERE / "node.py"), *arguments, "--log-level", "error"]
    process = await run(nursery, command)
    nursery.start_soon(swallow, process.stdout)
    return process


async def wait_for_model(port: int, model: str = "bench") -> None:
    """Wait until a node has a model."""
    with trio.fail_after(_PATIENCE):
        while True:
            async with await connect(port) as stream:
                head = f"GET /v1/models/{model} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(head.encode())
                    if (await stream.receive_some()).startswith(b"HTTP/1.1 200"):
                        return
            await trio.sleep(0.05)


async def swallow(stream: trio.abc.ReceiveStream) -> None:
    """Read what a program prints, and drop it."""
    async for _ in stream:
        pass


@asynccontextmanager
async def group() -> AsyncIterator[trio.Nursery]:
    """Give a nursery for programs, which all end with the block."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


def free_port() -> int:
    """Return a port that was free a moment ago, and whose second one was too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind((HOST, 0))
            port: int = first.getsockname()[1]
            try:
                second.bind((HOST, port + 1000))
            except (OSError, OverflowError):
                continue
            return port


async def wait_for_port(port: int) -> None:
    """Wait until somebody listens."""
    with trio.fail_after(_PATIENCE):
        while True:
            try:
                await (await trio.open_tcp_stream(HOST, port)).aclose()
                return
            except OSError:
                await trio.sleep(0.05)


def cpu_seconds(*pids: int) -> float:
    """Return the CPU time of processes."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def memory(pid: int, what: str = "VmRSS") -> float:
    """Return a line of the process's account of its memory, in bytes: VmRSS is what it has, VmHWM the most it had."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{what}:\s+(\d+) kB", text, re.M)
    assert found is not None
    return 1024.0 * int(found[1])


def forget_peak(pid: int) -> None:
    """Let the peak begin anew with what is there now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def family(pid: int) -> list[int]:
    """Return a process and all that came from it."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(after[1]), []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def raise_descriptor_limit() -> int:
    """Let this process, and all that it starts, have as many connections as the machine allows; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value that so large a share of all is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def weather() -> str:
    """Return a line about the machine, since that is a part of every figure."""
    busy = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, load {busy:.1f} before, Python {sys.version.split()[0]}"


def interval(streams: int) -> float:
    """Return the seconds between the tokens of a stream, when there are so many: more of them, and each slower."""
    return {16: 0.02, 64: 0.02, 256: 0.05, 1000: 0.1}.get(streams, 0.05)


@asynccontextmanager
async def crowd(
    port: int, streams: int, every: float, models: Iterable[str] = ("bench",), *flags: str
) -> AsyncIterator[Crowd]:
    """Open streams, all at once, each with a token every so many seconds; they are left when the block is."""
    async with group() as nursery:
        command = [
            sys.executable,
            str(HERE / "crowd.py"),
            str(port),
            str(streams),
            str(every),
            ",".join(models),
            *(["--tls"] if port in TLS_PORTS else []),
            *flags,
        ]
        process = await run(nursery, command)
        send, lines = trio.open_memory_channel[str](10)
        nursery.start_soon(read_lines, process.stdout, send)
        with trio.fail_after(120):
            word, *first = (await lines.receive()).split()
            failed = int((await lines.receive()).split()[1])
        assert word == "opened"
        yield Crowd([float(each) for each in first], failed, process, lines)


@attrs.frozen
class Crowd:
    """Clients of streams that have been opened."""

    first: list[float]
    """For each that has got its first token, the seconds from connecting until then."""
    failed: int
    process: Any
    lines: trio.MemoryReceiveChannel[str]

    async def tokens(self) -> int:
        """Return how many tokens have come until now."""
        await self.process.stdin.send_all(b"count\n")
        return int((await self.lines.receive()).split()[1])

    async def delays(self) -> tuple[int, float, float]:
        """Return what the tokens took that have come since the last time: their number, and p50 and p99 in seconds."""
        await self.process.stdin.send_all(b"delays\n")
        _, *delays = (await self.lines.receive()).split()
        p50, p99 = (percentile(map(float, delays or ["nan"]), share) for share in (0.5, 0.99))
        return len(delays), p50, p99

    async def cost(self, seconds: float, *pids: int) -> tuple[float, float]:
        """Return the CPU time of processes for each token that comes from now on, and how many come in a second."""
        before, began, spent = await self.tokens(), time.perf_counter(), cpu_seconds(*pids)
        await trio.sleep(seconds)
        spent = cpu_seconds(*pids) - spent
        took, count = time.perf_counter() - began, await self.tokens() - before
        return spent / max(1, count), count / took


#: The ports that speak TLS.
TLS_PORTS: set[int] = set()


async def connect(port: int) -> trio.abc.HalfCloseableStream:
    """Return a new connection, with TLS if the port speaks that."""
    plain = await trio.open_tcp_stream(HOST, port)
    if port not in TLS_PORTS:
        return plain
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stream: Any = trio.SSLStream(plain, context, https_compatible=True)
    await stream.do_handshake()
    return stream  # type: ignore[no-any-return]


async def ask(port: int, until: float, done: list[int], model: str = "bench") -> None:
    """Ask for plain answers on one connection, one after the other."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    async with await connect(port) as stream:
        while trio.current_time() < until:
            await stream.send_all(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            await read_answer(stream)
            done[0] += 1


async def open_stream(port: int, number: int = 0) -> trio.abc.HalfCloseableStream:
    """Ask for a stream, and return the connection when its first token has come."""
    message = {"role": "user", "content": str(number)}
    body = json.dumps({"model": "bench", "stream": True, "messages": [message]}).encode()
    stream = await connect(port)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    await stream.send_all(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    await receive_until(stream, b"begun")
    return stream


async def receive_until(stream: trio.abc.HalfCloseableStream, mark: bytes) -> bytes:
    """Return what comes until ``mark`` has come."""
    received = b""
    while mark not in received:
        piece = await stream.receive_some()
        if not piece:
            raise SystemExit(f"the connection ended after {received!r}")
        received += piece
    return received


async def first_token(port: int) -> float:
    """Return the seconds from connecting to the first token of a stream."""
    began = time.perf_counter()
    stream = await open_stream(port)
    took = time.perf_counter() - began
    await trio.aclose_forcefully(stream)
    return took


async def read_answer(stream: trio.abc.HalfCloseableStream) -> bytes:
    """Return the body of an answer that tells its length, or comes in chunks."""
    received = await receive_until(stream, b"\r\n\r\n")
    head, _, body = received.partition(b"\r\n\r\n")
    if b" 200 " not in head[:20]:
        raise SystemExit(f"refused: {received.decode(errors='replace')}")
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.I)
    pieces, size = [body], len(body)
    while size < int(length[1]) if length else not pieces[-1].endswith(b"0\r\n\r\n"):
        piece = await stream.receive_some(1 << 18)
        if not piece:
            raise SystemExit("the answer was cut")
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


async def ask_on_connections(port: int, seconds: float, connections: int = 16) -> int:
    """Ask for plain answers on several connections for some time, and return how many came."""
    until, done = trio.current_time() + seconds, [0]
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(ask, port, until, done)
    return done[0]


async def cost_of_requests(port: int, seconds: float, pids: Iterable[int], connections: int = 16) -> float:
    """Return the CPU time of processes for each plain request."""
    pids = list(pids)
    before = cpu_seconds(*pids)
    done = await ask_on_connections(port, seconds, connections)
    return (cpu_seconds(*pids) - before) / max(1, done)


async def cost_of_get(port: int, path: str, pid: int, times: int = 20) -> float:
    """Return the CPU time of a process for each GET request."""
    async with await trio.open_tcp_stream(HOST, port) as stream:
        before = cpu_seconds(pid)
        for _ in range(times):
            await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            await read_answer(stream)
        return (cpu_seconds(pid) - before) / times


def table(title: str, columns: Mapping[str, str], rows: Iterable[Mapping[str, float]]) -> str:
    """Return rows of figures as text, each figure with its ratio to the first row's, in brackets.

    Args:
        title: of the first column.
        columns: for each further one its heading, and the format of its numbers; with a ``!`` in front of that, no
            ratio is told.
        rows: by heading; that of the first column is the title.
    """
    rows = list(rows)
    cells = [[title, *columns]]
    for row in rows:
        cells.append([f"{row[title]:g}"])
        for name, form in columns.items():
            value, first = row.get(name, math.nan), rows[0].get(name, math.nan)
            text = "-" if math.isnan(value) else f"{value:{form.lstrip('!')}}"
            if not form.startswith("!") and row is not rows[0] and first and not math.isnan(value / first):
                text += f" ({value / first:.2f}x)"
            cells[-1].append(text)
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
    )


def save(path: str | None, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Keep figures in a JSON file, for ``plot.py``."""
    if path is not None:
        file = Path(path)
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept[name] = list(rows)
        file.write_text(json.dumps(kept, indent=1) + "\n")
