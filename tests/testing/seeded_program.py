"""A program that runs a cluster, prints everything that happens in it, and is the same for the same seed.

python seeded_program.py SEED BALLAST
"""

from __future__ import annotations

import logging
import random
import sys

import trio
from trio.testing import MockClock

from trio_cluster.testing import FakeModel, SimulatedCluster, open_cluster, seeded, settle, worker


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print a record of a node, with the virtual time."""
        fields = getattr(record, "fields", {})
        print(f"{trio.current_time():.9f} {record.name} {record.getMessage()} {sorted(fields.items())}")


async def _ask(cluster: SimulatedCluster, number: int, draw: random.Random) -> None:
    await trio.sleep(draw.choice([0.0, 0.0, 1.0, 2.0]))
    try:
        async with cluster.client(f"client{number}").open_chat("m", f"question {number}") as response:
            print(f"{trio.current_time():.9f} {number} {response.status} {response.headers['x-request-id']}")
            while True:
                print(f"{trio.current_time():.9f} {number} {len(await response.receive())}")
                if draw.random() < 0.05:
                    return
    except (trio.EndOfChannel, OSError) as error:
        print(f"{trio.current_time():.9f} {number} {type(error).__name__}")


async def _wait(number: int) -> None:
    try:
        await trio.sleep_forever()
    finally:
        print("stopped", number)


async def main(draw: random.Random) -> None:
    """Let a dozen clients send requests to three replicas, of which one is killed and one partitioned."""
    logger = logging.getLogger("trio_cluster")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(_Log())
    async with open_cluster(on_conflict="replicate", latency=0.001) as cluster:
        models = [FakeModel(tokens=8, interval=0.5, marked=True) for _ in range(3)]
        for name, model in zip("abc", models, strict=True):
            server = worker(name, on_conflict="replicate", max_concurrency=3)
            server.register_chat("m", model)
            await cluster.start_worker(server)
        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(_ask, cluster, number, draw)
            await trio.sleep(2)
            cluster.workers["a"].kill()
            cluster.workers["b"].link.reset()
            await trio.sleep(1)
            cluster.workers["c"].link.partition()
            await trio.sleep(40)
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(_wait, number)
            await trio.sleep(60)
            nursery.cancel_scope.cancel()
        await settle(cluster)
        print(models, random.random())


if __name__ == "__main__":
    # Sets of tasks are ordered by address. These objects shift the addresses, in each run by another amount.
    ballast = [bytearray(size % 600) for size in range(int(sys.argv[2]))]
    with seeded(int(sys.argv[1])) as generator:
        trio.run(main, generator, clock=MockClock(autojump_threshold=0))
