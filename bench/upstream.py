"""What it costs to have another server behind a worker: CPU for each token, time to the first, time until it is left.

Client, master, worker and backend are processes of their own on one machine (Linux: they share a clock). CPU is that
of one process (user and system). For comparison there is a pipe: a process that copies bytes from socket to socket on
trio, in the place of master and worker together, and the backend asked directly.

    python bench/upstream.py [--streams 64] [--seconds 5] [--questions 100] [--cancels 100] [--quick] [--save FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio
from cancellation import leave
from running import (
    HOST,
    Running,
    crowd,
    first_token,
    group,
    raise_descriptor_limit,
    save,
    start,
    start_master,
    start_node,
    wait_for_model,
    weather,
)

#: Seconds between the tokens of a stream.
INTERVAL = 0.02


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
    async with group() as nursery:
        backend = await start(nursery, "backend.py")
        pipe = await start(nursery, "pipe.py", backend.port)
        port, master = await start_master(nursery)
        serve = f"openai:http://{HOST}:{backend.port}/v1"
        worker = await start_node(nursery, "worker", HOST, str(port), "--serve", serve)
        await wait_for_model(port)
        yield Setting(backend, pipe, master, worker, port)


async def drain(lines: trio.MemoryReceiveChannel[str]) -> None:
    """Forget what was printed so far, when nothing has been for a while."""
    while True:
        with trio.move_on_after(0.3) as scope:
            await lines.receive()
        if scope.cancelled_caught:
            return


async def measure(arguments: Any) -> None:
    """Measure and print."""
    streams, seconds, questions = arguments.streams, arguments.seconds, arguments.questions
    before = weather()
    async with setting() as running:
        costs: dict[str, float] = {}
        places = {
            "worker": (running.port, running.worker.pid),
            "master": (running.port, running.master.pid),
            "pipe": (running.pipe.port, running.pipe.pid),
        }
        for name, (port, pid) in places.items():
            async with crowd(port, streams, INTERVAL) as clients:
                await trio.sleep(min(0.5, seconds))
                costs[name] = 1e6 * (await clients.cost(seconds, pid))[0]
        print(f"an upstream behind a worker: CPU for each token, {streams} streams ({before}):")
        for name, cost in costs.items():
            print(f"  {name:8} {cost:6.1f} us   {cost / costs['pipe']:5.2f} x pipe")

        ways = {"direct": running.backend.port, "pipe": running.pipe.port, "cluster": running.port}
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(questions):
            for name, port in ways.items():
                took[name].append(1e3 * await first_token(port))
        medians = {name: statistics.median(times) for name, times in took.items()}
        print(f"time to the first token, one stream, median of {questions}:")
        for name, median in medians.items():
            print(f"  {name:8} {median:6.2f} ms   {median - medians['direct']:+6.2f} ms")

        await drain(running.backend.lines)
        leaving = {}
        for name, port in ways.items():
            times = await leave(port, running.backend, "closed", streams, arguments.cancel_durations)
            leaving[name] = [1e3 * each for each in times]
            await drain(running.backend.lines)
        print(f"from a client's leaving to the end of the backend's connection, {streams} streams beside it:")
        for name, times in leaving.items():
            print(
                f"  {name:8} median {statistics.median(times):.2f} ms   max {max(times):.2f} ms   n={len(times)}"
            )
    save(arguments.save, "upstream", [{"cpu": costs, "first": medians, "leaving": leaving}])


def main() -> None:
    """Read the arguments and measure."""
    parser: Any = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--cancels", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.seconds, arguments.questions, arguments.cancel_durations = 5, 0.3, 3, 5
    raise_descriptor_limit()
    trio.run(measure, arguments)


if __name__ == "__main__":
    main()
