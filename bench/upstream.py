"""What it costs to have another server behind a worker: CPU for each token, time to the first, time until it is left.

Client, master, worker and backend are processes of their own on one machine (Linux: they share a clock). CPU is that
of one process (user and system). For comparison there is a pipe: a process that copies bytes from socket to socket on
trio, in the place of master and worker together, and the backend asked directly.

    [BENCH_INTERVAL=0.02] python bench/upstream.py [--streams 64] [--seconds 5] [--questions 100] [--cancels 100]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio
from cancellation import open_stream, read_lines, swallow
from relay import count_tokens, cpu_seconds
from worker import HOST, free_port

from trio_cluster import check_is_cluster_server

HERE = Path(__file__).parent


@attrs.frozen
class Running:
    """A process that was started, and what it prints."""

    port: int
    process: trio.Process
    lines: trio.MemoryReceiveChannel[str]


async def start(nursery: trio.Nursery, program: str, *arguments: str) -> Running:
    """Start one of the programs beside this one; it ends when its standard input does."""
    command = [sys.executable, str(HERE / program), *arguments]
    process: trio.Process = await nursery.start(
        partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )
    send, lines = trio.open_memory_channel[str](10_000)
    nursery.start_soon(read_lines, process.stdout, send)
    with trio.fail_after(20):
        _, port = (await lines.receive()).split()
    return Running(int(port), process, lines)


async def start_node(nursery: trio.Nursery, *arguments: str) -> trio.Process:
    """Start a node of a cluster."""
    command = [sys.executable, "-m", "trio_cluster", *arguments, "--log-level", "warning"]
    process: trio.Process = await nursery.start(
        partial(trio.run_process, command, stdin=subprocess.DEVNULL, check=False)
    )
    return process


@attrs.frozen
class Setting:
    """Everything that runs."""

    backend: Running
    pipe: Running
    master: trio.Process
    worker: trio.Process
    port: int


@asynccontextmanager
async def setting() -> AsyncIterator[Setting]:
    """Run a backend, a pipe to it, and a cluster before it."""
    port = free_port()
    async with trio.open_nursery() as nursery:
        backend = await start(nursery, "backend.py")
        pipe = await start(nursery, "pipe.py", str(backend.port))
        master = await start_node(nursery, "master", str(port), "--host", HOST)
        with trio.fail_after(20):
            # Another process cannot set an event of ours.
            while not await check_is_cluster_server(HOST, port + 1000):  # noqa: ASYNC110
                await trio.sleep(0.05)
        serve = f"openai:http://{HOST}:{backend.port}/v1"
        worker = await start_node(nursery, "worker", HOST, str(port), "--serve", serve)
        with trio.fail_after(20):
            while not await answers(port):  # noqa: ASYNC110
                await trio.sleep(0.05)
        yield Setting(backend, pipe, master, worker, port)
        for process in (worker, master):
            process.terminate()
        for running in (pipe, backend):
            assert running.process.stdin is not None
            await running.process.stdin.aclose()


async def answers(port: int) -> bool:
    """Tell whether the model is there."""
    async with await trio.open_tcp_stream(HOST, port) as stream:
        await stream.send_all(b"GET /v1/models/bench HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
        return (await stream.receive_some()).startswith(b"HTTP/1.1 200")


async def cpu_per_token(
    port: int, processes: dict[str, trio.Process], streams: int, seconds: float
) -> dict[str, float]:
    """Return microseconds of CPU for each token, for each process."""
    opened = [await open_stream(port, number) for number in range(streams)]
    async with trio.open_nursery() as nursery:
        done = [0]
        for stream in opened:
            nursery.start_soon(count_tokens, stream, done)
        await trio.sleep(0.5)
        before, done[0] = {name: cpu_seconds(process.pid) for name, process in processes.items()}, 0
        await trio.sleep(seconds)
        spent = {name: cpu_seconds(process.pid) - before[name] for name, process in processes.items()}
        nursery.cancel_scope.cancel()
    for stream in opened:
        await trio.aclose_forcefully(stream)
    return {name: 1e6 * value / done[0] for name, value in spent.items()}


async def first_token(port: int) -> float:
    """Return milliseconds from a request to its first token, the connection included."""
    began = time.perf_counter()
    stream = await open_stream(port, 0)
    took = time.perf_counter() - began
    await trio.aclose_forcefully(stream)
    return 1e3 * took


async def drain(lines: trio.MemoryReceiveChannel[str]) -> None:
    """Forget what was printed so far, when nothing has been for a while."""
    while True:
        with trio.move_on_after(0.3) as scope:
            await lines.receive()
        if scope.cancelled_caught:
            return


async def leaving(port: int, backend: Running, streams: int, count: int) -> list[float]:
    """Return milliseconds from a client's FIN to the end of the backend's connection, with other streams going on."""
    opened = [await open_stream(port, number) for number in range(streams)]
    times = []
    async with trio.open_nursery() as nursery:
        for stream in opened:
            nursery.start_soon(swallow, stream)
        for number in range(count):
            stream = await open_stream(port, number)
            await trio.sleep(0.02)
            left = time.monotonic_ns()
            await trio.aclose_forcefully(stream)
            with trio.fail_after(10):
                _, closed = (await backend.lines.receive()).split()
            times.append((int(closed) - left) / 1e6)
        nursery.cancel_scope.cancel()
    for stream in opened:
        await trio.aclose_forcefully(stream)
    return times


async def measure(streams: int, seconds: float, questions: int, cancels: int) -> None:
    """Measure and print."""
    async with setting() as all_of_it:
        backend, pipe = all_of_it.backend, all_of_it.pipe
        nodes = {"worker": all_of_it.worker, "master": all_of_it.master}
        costs = await cpu_per_token(all_of_it.port, nodes, streams, seconds)
        costs |= await cpu_per_token(pipe.port, {"pipe": pipe.process}, streams, seconds)
        print(f"CPU for each token, {streams} streams:")
        for name, cost in costs.items():
            print(f"  {name:8} {cost:6.1f} us   {cost / costs['pipe']:5.2f} x pipe")

        ways = {"direct": backend.port, "pipe": pipe.port, "cluster": all_of_it.port}
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(questions):
            for name, port in ways.items():
                took[name].append(await first_token(port))
        medians = {name: statistics.median(times) for name, times in took.items()}
        print(f"time to the first token, one stream, median of {questions}:")
        for name, median in medians.items():
            print(f"  {name:8} {median:6.2f} ms   {median - medians['direct']:+6.2f} ms")

        await drain(backend.lines)
        times = await leaving(all_of_it.port, backend, streams, cancels)
        print(f"from a client's leaving to the end of the backend's connection, {streams} streams beside it:")
        print(f"  median {statistics.median(times):.2f} ms   max {max(times):.2f} ms   n={len(times)}")


def main() -> None:
    """Read the arguments and measure."""
    parser: Any = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--cancels", type=int, default=100)
    arguments = parser.parse_args()
    trio.run(measure, arguments.streams, arguments.seconds, arguments.questions, arguments.cancels)


if __name__ == "__main__":
    main()
