"""What a request and a token cost the master, in CPU time, beside what the bare stack under it costs.

CPU is that of the serving process alone (user and system), so a busy machine blurs it less than it blurs rates. Both
systems run one after the other in the same run; compare the ratios. The bare stack has no worker behind it, no routing
and no limits.

    python bench/relay.py [--seconds 5] [--streams 64] [--connections 16]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from cancellation import open_stream, read_lines
from running import free_port

HERE = Path(__file__).parent
BODY = json.dumps({"model": "bench", "messages": [{"role": "user", "content": "hello"}]}).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, from its CPU clock."""
    return time.clock_gettime((~pid << 3) | 2)


@asynccontextmanager
async def cluster() -> AsyncIterator[tuple[int, int]]:
    """Run a master and a worker; give the port and the master's pid."""
    async with trio.open_nursery() as nursery:
        command = [sys.executable, str(HERE / "worker.py")]
        process = await nursery.start(
            partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        send, lines = trio.open_memory_channel[str](1000)
        nursery.start_soon(read_lines, process.stdout, send)
        _, port, _, pid = (await lines.receive()).split()
        nursery.start_soon(drop, lines)
        yield int(port), int(pid)
        await process.stdin.aclose()


async def drop(lines: trio.MemoryReceiveChannel[str]) -> None:
    """Forget what else the worker prints."""
    async for _ in lines:
        pass


@asynccontextmanager
async def bare_stack() -> AsyncIterator[tuple[int, int]]:
    """Run hypercorn with a plain application; give the port and its pid."""
    port = free_port()
    async with trio.open_nursery() as nursery:
        command = [sys.executable, str(HERE / "floor.py"), str(port)]
        process = await nursery.start(
            partial(trio.run_process, command, stderr=subprocess.DEVNULL, check=False)
        )
        with trio.fail_after(20):
            while True:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.05)
        yield port, process.pid
        process.terminate()


async def ask(port: int, until: float, done: list[int]) -> None:
    """Ask for plain answers on one connection, one after the other."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        while trio.current_time() < until:
            await stream.send_all(REQUEST)
            received = b""
            while b"\r\n\r\n" not in received:
                received += await stream.receive_some()
            head, _, body = received.partition(b"\r\n\r\n")
            (length,) = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            left = int(length.split(b":")[1]) - len(body)
            while left > 0:
                left -= len(await stream.receive_some())
            done[0] += 1


async def count_tokens(stream: trio.SocketStream, done: list[int]) -> None:
    """Count the tokens that come."""
    async for data in stream:
        done[0] += data.count(b"token ")


async def measure(system: object, seconds: float, streams: int, connections: int) -> tuple[float, float]:
    """Return microseconds of CPU per plain request and per streamed token."""
    async with system() as (port, pid):  # type: ignore[operator]
        done = [0]
        before = cpu_seconds(pid)
        async with trio.open_nursery() as nursery:
            for _ in range(connections):
                nursery.start_soon(ask, port, trio.current_time() + seconds, done)
        per_request = (cpu_seconds(pid) - before) / done[0]
        opened = [await open_stream(port, number) for number in range(streams)]
        async with trio.open_nursery() as nursery:
            done = [0]
            for stream in opened:
                nursery.start_soon(count_tokens, stream, done)
            await trio.sleep(0.5)
            before, done[0] = cpu_seconds(pid), 0
            await trio.sleep(seconds)
            per_token = (cpu_seconds(pid) - before) / done[0]
            nursery.cancel_scope.cancel()
        for stream in opened:
            await trio.aclose_forcefully(stream)
    return 1e6 * per_request, 1e6 * per_token


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--connections", type=int, default=16)
    arguments = parser.parse_args()
    limits = (arguments.seconds, arguments.streams, arguments.connections)
    rows = {
        "master, worker behind it": trio.run(measure, cluster, *limits),
        "hypercorn, bare ASGI": trio.run(measure, bare_stack, *limits),
    }
    floor = rows["hypercorn, bare ASGI"]
    print(f"{'':26} {'us/request':>11} {'ratio':>6} {'us/token':>9} {'ratio':>6}")
    for name, (request, token) in rows.items():
        print(f"{name:26} {request:11.0f} {request / floor[0]:6.2f} {token:9.1f} {token / floor[1]:6.2f}")


if __name__ == "__main__":
    main()
