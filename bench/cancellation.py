"""How long it takes from a client's FIN until the handler on a worker is cancelled, with many live streams.

Client, master and worker are processes of their own. Clients hold streams open; then some of them close their
connection, one after the other, and the worker says when its handler was cancelled. Both ends read the same monotonic
clock, so this is Linux, on one machine. For comparison there is a backend without anything in front of it, which says
when it sees the end of the connection.

    python bench/cancellation.py [--streams 256] [--cancels 200] [--interval 0.05] [--quick] [--save FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import trio
from running import (
    Running,
    drop,
    group,
    open_stream,
    percentile,
    raise_descriptor_limit,
    save,
    start,
    start_master,
    weather,
)

BUCKETS_MS = (0.5, 1, 2, 5, 10, 20, 50, 100)


async def swallow(stream: trio.SocketStream) -> None:
    """Read and forget, as a client that keeps up does."""
    try:
        async for _ in stream:
            pass
    except (trio.ClosedResourceError, trio.BrokenResourceError):
        pass


async def leave(port: int, told_by: Running, word: str, streams: int, cancel_durations: int) -> list[float]:
    """Return the seconds from a client's leaving until a program prints a line that begins with ``word``."""
    times = []
    async with group() as nursery:
        opened = [await open_stream(port, number) for number in range(streams)]
        for stream in opened:
            nursery.start_soon(swallow, stream)
        for number in range(cancel_durations):
            stream = (
                opened[number % streams] if streams and number < streams else await open_stream(port, number)
            )
            await trio.sleep(0.01)
            left = time.monotonic_ns()
            stream.socket.close()
            with trio.fail_after(10):
                while not (line := await told_by.lines.receive()).startswith(word):
                    pass
            times.append((int(line.split()[1]) - left) / 1e9)
        for stream in opened:
            stream.socket.close()
    return times


async def measure(streams: int, cancel_durations: int) -> tuple[list[float], list[float]]:
    """Return the times through a cluster, and those to a backend that is asked directly."""
    async with group() as nursery:
        port, _ = await start_master(nursery)
        worker = await start(nursery, "worker.py", port)
        through = await leave(port, worker, "cancelled", streams, cancel_durations)
        nursery.start_soon(drop, worker.lines)
    async with group() as nursery:
        backend = await start(nursery, "backend.py")
        direct = await leave(backend.port, backend, "closed", streams, cancel_durations)
    return through, direct


def report(times: list[float]) -> str:
    """Return the histogram and the percentiles as text."""
    p50, p99 = (1000 * percentile(times, share) for share in (0.5, 0.99))
    rows = [f"n={len(times)}  p50 {p50:.2f} ms  p99 {p99:.2f} ms  max {1000 * max(times):.2f} ms"]
    below = 0
    for bucket in BUCKETS_MS:
        count = sum(1 for each in times if 1000 * each <= bucket)
        bar = "#" * round(60 * (count - below) / len(times))
        rows.append(f"<= {bucket:>5} ms  {count - below:>5}  {bar}")
        below = count
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    parser: Any = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between a stream's tokens")
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.cancel_durations = 10, 20
    raise_descriptor_limit()
    os.environ["BENCH_INTERVAL"] = str(arguments.interval)
    before = weather()
    through, direct = trio.run(measure, arguments.streams, arguments.cancel_durations)
    print(f"from FIN to the handler's cancellation, {arguments.streams} live streams ({before}):")
    print(report(through))
    ratio = statistics.median(through) / statistics.median(direct)
    print(
        f"asked directly, a backend of this kind sees it after {1000 * statistics.median(direct):.2f} ms ",
        end="",
    )
    print(f"(median), so the cluster takes {ratio:.1f} times as long")
    save(
        arguments.save, "cancellation", [{"streams": arguments.streams, "through": through, "direct": direct}]
    )


if __name__ == "__main__":
    main()
