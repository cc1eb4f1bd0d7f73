"""How the cost of everything grows: with the streams of one master, and with its workers and their models.

Each row is a cluster of its own. Memory is how far the resident set of a process grows, divided by what it grows for.
In brackets is the ratio to the row above all others: where nothing grows with the number, it stays near 1.

    python bench/scale.py [--streams 1,64,256,1000,5000] [--workers 1,10,50,200] [--quick] [--save FILE]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import trio
from running import (
    Running,
    cost_of_get,
    cost_of_requests,
    cpu_seconds,
    crowd,
    drop,
    group,
    memory,
    percentile,
    raise_descriptor_limit,
    save,
    start,
    start_master,
    table,
    weather,
)

#: No token comes of such a stream while it is looked at.
NEVER = 3600.0
#: Models of each worker.
MODELS = 5
#: Workers that share a process.
SHARE = 50

Row = dict[str, float]

STREAMS = {
    "first token p50 ms": "!.1f",
    "p99 ms": "!.1f",
    "open us": ".0f",
    "token us": ".1f",
    "worker's us": ".1f",
    "request us": ".0f",
    "KB/stream": ".1f",
    "worker's KB": ".1f",
    "MB": "!.0f",
}
WORKERS = {
    "KB/worker": ".0f",
    "worker's KB": ".0f",
    "idle % of a core": "!.2f",
    "request us": ".0f",
    "with replicas us": ".0f",
    "token us": ".1f",
    "workers' us": ".1f",
    "/v1/models ms": "!.1f",
    "/metrics ms": "!.1f",
}


def interval(streams: int) -> float:
    """Return the seconds between a stream's tokens, so that all streams together have 3200 in a second at most.

    What grows with the streams is not to be confused with what grows with the tokens, and the worker is to keep up.
    """
    return max(0.02, streams / 3200)


async def measure_streams(streams: int, seconds: float) -> Row:
    """Return the costs of so many streams on one master, with one worker behind it."""
    async with group() as nursery:
        port, master = await start_master(nursery)
        worker = await start(nursery, "worker.py", port)
        nursery.start_soon(drop, worker.lines)
        pids = (master.pid, worker.pid)
        await cost_of_requests(port, 0.5, pids)
        before, opening = [memory(pid) for pid in pids], cpu_seconds(master.pid)
        async with crowd(port, streams, NEVER) as idle:
            opening = cpu_seconds(master.pid) - opening
            grown = [memory(pid) - was for pid, was in zip(pids, before, strict=True)]
            megabytes = memory(master.pid) / 1e6
            per_request = await cost_of_requests(port, seconds, [master.pid])
        _complain(idle.failed)
        async with crowd(port, streams, interval(streams)) as busy:
            await trio.sleep(min(1.0, seconds))
            per_token, _ = await busy.cost(seconds, master.pid)
            workers, _ = await busy.cost(seconds, worker.pid)
        _complain(busy.failed)
    return {
        "streams": streams,
        "first token p50 ms": 1e3 * percentile(idle.first, 0.5),
        "p99 ms": 1e3 * percentile(idle.first, 0.99),
        "open us": 1e6 * opening / streams,
        "token us": 1e6 * per_token,
        "worker's us": 1e6 * workers,
        "request us": 1e6 * per_request,
        # One stream does not move the resident set by more than chance does.
        "KB/stream": grown[0] / 1e3 / streams if streams > 1 else math.nan,
        "worker's KB": grown[1] / 1e3 / streams if streams > 1 else math.nan,
        "MB": megabytes,
    }


async def measure_workers(workers: int, streams: int, seconds: float) -> Row:
    """Return the costs of so many workers, and of streams that are spread over all of them."""
    async with group() as nursery:
        port, master = await start_master(nursery)
        await cost_of_get(port, "/v1/models", master.pid)
        before = memory(master.pid)
        processes = await start_workers(nursery, port, workers, "--models", str(MODELS))
        await trio.sleep(0.5)
        grown = memory(master.pid) - before
        idle = cpu_seconds(master.pid)
        beats = 10.0 if seconds > 1 else 0.5
        await trio.sleep(beats)
        idle = (cpu_seconds(master.pid) - idle) / beats
        models = [f"bench-{worker}-{model}" for worker in range(workers) for model in range(MODELS)]
        per_request = await cost_of_requests(port, seconds, [master.pid])
        lists = await cost_of_get(port, "/v1/models", master.pid)
        metrics = await cost_of_get(port, "/metrics", master.pid)
        async with crowd(port, streams, interval(streams), models) as busy:
            await trio.sleep(min(1.0, seconds))
            per_token, _ = await busy.cost(seconds, master.pid)
            theirs, _ = await busy.cost(seconds, *(each.pid for each in processes))
        _complain(busy.failed)
        each = sum(memory(each.pid) for each in processes) / workers
    async with group() as nursery:
        port, master = await start_master(nursery, "--on-conflict", "replicate")
        await start_workers(nursery, port, workers, "--replicas")
        replicas = await cost_of_requests(port, seconds, [master.pid])
    return {
        "workers": workers,
        "KB/worker": grown / 1e3 / workers if workers > 1 else math.nan,
        "worker's KB": each / 1e3,
        "idle % of a core": 100 * idle,
        "request us": 1e6 * per_request,
        "with replicas us": 1e6 * replicas,
        "token us": 1e6 * per_token,
        "workers' us": 1e6 * theirs,
        "/v1/models ms": 1e3 * lists,
        "/metrics ms": 1e3 * metrics,
    }


async def start_workers(nursery: trio.Nursery, port: int, workers: int, *flags: str) -> list[Running]:
    """Start workers, many to a process."""
    processes = []
    for first in range(0, workers, SHARE):
        share = min(SHARE, workers - first)
        process = await start(nursery, "worker.py", port, "--first", first, "--workers", share, *flags)
        nursery.start_soon(drop, process.lines)
        processes.append(process)
    return processes


def _complain(failed: int) -> None:
    if failed:
        print(f"{failed} streams did not begin")


async def measure(arguments: Any) -> None:
    """Measure and print."""
    rows: list[Mapping[str, float]] = []
    print(f"streams on one master, all opened at once ({weather()}):")
    for streams in arguments.streams:
        rows.append(await measure_streams(streams, arguments.seconds))
    print(table("streams", STREAMS, rows), flush=True)
    save(arguments.save, "streams", rows)
    rows = []
    print(
        f"\nworkers of one master, {MODELS} models each, {arguments.fan_in} streams spread over them ({weather()}):"
    )
    for workers in arguments.workers:
        rows.append(await measure_workers(workers, arguments.fan_in, arguments.seconds))
    print(table("workers", WORKERS, rows), flush=True)
    save(arguments.save, "workers", rows)


def numbers(text: str) -> list[int]:
    """Read numbers with commas between them."""
    return [int(each) for each in text.split(",")]


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=numbers, default=[1, 64, 256, 1000, 5000])
    parser.add_argument("--workers", type=numbers, default=[1, 10, 50, 200])
    parser.add_argument("--fan-in", type=int, default=1000, help="streams that are spread over the workers")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.workers, arguments.fan_in, arguments.seconds = [20], [3], 20, 0.2
    limit = raise_descriptor_limit()
    most = max(arguments.streams)
    if most > limit - 100:
        arguments.streams = [each for each in arguments.streams if each <= limit - 100]
        print(f"this machine allows {limit} descriptors, so there are no {most} streams")
    trio.run(measure, arguments)


if __name__ == "__main__":
    main()
