"""What it costs and what it saves that tokens linger on a busy link.

Two clusters are up at the same time, one whose worker sends each token as soon as it can, and one with the default wait
(``batch_wait``). They get the same load in turn, in several rounds. Told are the time that a token takes from the
handler's ``yield`` to its client, and the CPU time that it costs each end; both ends read the same monotonic clock, so
this is Linux, on one machine.

There are two sorts of load. Tokens that are made *together* wait for the event loop's timers, which come in whole
milliseconds, as those of one decoding step come together. Those that are made *by chance* are told to the loop by a
thread, each at a moment of its own, as if each came from another machine.

    python bench/linger.py [--streams 16,64,256,1000] [--rounds 3] [--seconds 4] [--wait 0.001] [--quick] [--save FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import attrs
import trio
from running import (
    cpu_seconds,
    crowd,
    drop,
    group,
    interval,
    raise_descriptor_limit,
    save,
    start,
    start_master,
    weather,
)

#: How tokens are made, and what the crowd is told of it.
MADE: dict[str, tuple[str, ...]] = {"together": (), "by chance": ("--by-chance",)}


@attrs.frozen
class Cluster:
    """A master with one worker."""

    wait: float
    port: int
    master: int
    worker: int
    figures: dict[tuple[str, str, int], list[float]] = attrs.field(factory=dict)

    def note(self, name: str, made: str, streams: int, value: float) -> None:
        """Take down a figure of one round."""
        self.figures.setdefault((name, made, streams), []).append(value)

    def median(self, name: str, made: str, streams: int) -> float:
        """Return a figure of all rounds."""
        return statistics.median(self.figures[name, made, streams])

    @contextmanager
    def cost(self, made: str, streams: int) -> Iterator[list[int]]:
        """Take down what the tokens cost whose number the block puts into the list."""
        before = cpu_seconds(self.master), cpu_seconds(self.worker)
        tokens: list[int] = []
        yield tokens
        for name, pid, spent in zip(("master", "worker"), (self.master, self.worker), before, strict=True):
            self.note(name, made, streams, 1e6 * (cpu_seconds(pid) - spent) / tokens[0])


async def start_cluster(nursery: trio.Nursery, wait: float) -> Cluster:
    """Start one."""
    port, master = await start_master(nursery)
    worker = await start(nursery, "worker.py", port, "--batch-wait", wait)
    nursery.start_soon(drop, worker.lines)
    return Cluster(wait, port, master.pid, worker.pid)


async def measure(waits: list[float], counts: list[int], rounds: int, seconds: float) -> list[Cluster]:
    """Return the clusters with what they have shown."""
    async with group() as nursery:
        clusters = [await start_cluster(nursery, wait) for wait in waits]
        for _ in range(rounds):
            for streams, made, cluster in product(counts, MADE, clusters):
                every = interval(streams)
                async with crowd(cluster.port, streams, every, ("bench",), "--stamped", *MADE[made]) as busy:
                    await trio.sleep(min(1.0, seconds))
                    await busy.delays()
                    with cluster.cost(made, streams) as tokens:
                        await trio.sleep(seconds)
                        count, p50, p99 = await busy.delays()
                        tokens.append(count)
                    cluster.note("p50", made, streams, 1e3 * p50)
                    cluster.note("p99", made, streams, 1e3 * p99)
        return clusters


def main() -> None:
    """Measure and print."""
    parser: Any = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="16,64,256,1000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--wait", type=float, default=0.001, help="seconds that the second one waits")
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.rounds, arguments.seconds = "16", 1, 0.5
    raise_descriptor_limit()
    before = weather()
    counts = [int(each) for each in arguments.streams.split(",")]
    clusters = trio.run(measure, [0.0, arguments.wait], counts, arguments.rounds, arguments.seconds)
    print(f"tokens that linger, or not ({before}):")
    rows = []
    for streams, made in product(counts, MADE):
        for cluster in clusters:
            row = {name: cluster.median(name, made, streams) for name in ("p50", "p99", "master", "worker")}
            rows.append({"streams": streams, "made": made, "wait ms": 1e3 * cluster.wait, **row})
            print(
                f"{streams:5} streams, made {made}, {1e3 * cluster.wait:g} ms of waiting: to the client p50 "
                f"{row['p50']:.2f} ms, p99 {row['p99']:.2f} ms; master {row['master']:.1f} us a token, worker "
                f"{row['worker']:.1f}"
            )
        without, waiting = rows[-2:]
        print(
            f"{'':14}it adds {waiting['p50'] - without['p50']:+.2f} ms in the median, and the master takes "
            f"{waiting['master'] / without['master']:.2f} of the time, the worker "
            f"{waiting['worker'] / without['worker']:.2f}"
        )
    save(arguments.save, "linger", rows)


if __name__ == "__main__":
    main()
