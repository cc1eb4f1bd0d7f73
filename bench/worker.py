"""Workers for the benchmarks, one or many in a process, each with a connection of its own.

Prints ``port N`` (that of the master's API) when all are there, and ``cancelled NANOSECONDS`` whenever a handler is
cancelled.

The first worker of all serves the model ``bench``. Number N serves ``bench-N-0``, ``bench-N-1`` and so on beside it,
and with ``--replicas`` also ``bench``.

    python bench/worker.py PORT [--workers 1] [--first 0] [--models 1] [--replicas] [--batch-wait 0.001]
"""

from __future__ import annotations

import argparse
import functools
import heapq
import logging
import os
import random
import re
import threading
import time
from collections.abc import AsyncIterator
from typing import ClassVar

import trio
from node import end_with_standard_input

from trio_cluster import ChatRequest, ClusterServer, ClusterServerOptions, ServerOptions

HOST = "127.0.0.1"
INTERVAL = float(os.environ.get("BENCH_INTERVAL", "0.05"))
_EVERY = re.compile(r"every ([0-9.]+)")


async def bench(request: ChatRequest) -> AsyncIterator[str]:
    """Answer at once, or stream for ever.

    The question may say how many seconds lie between two tokens, that each is to tell when it was made, and that they
    are made by chance at any moment. Otherwise a stream's token is made when a timer of the event loop says so, which
    knows whole milliseconds only, and so together with those of others.
    """
    if not request.stream:
        yield "x" * 40
        return
    said = _EVERY.search(request.last_text)
    every = float(said[1]) if said else INTERVAL
    stamped = "stamped" in request.last_text
    due = trio.current_time()
    chance = Chance(every) if "by chance" in request.last_text else None
    try:
        yield "begun "
        while True:
            due += every
            await (trio.sleep_until(due) if chance is None else chance.wait())
            yield f"token@{time.monotonic_ns()} " if stamped else "token "
    finally:
        if chance is not None:
            chance.end()
        print("cancelled", time.monotonic_ns(), flush=True)


class Chance:
    """Lets a task run at regular moments that begin anywhere, as if something came in from somebody else.

    Args:
        every: seconds between them.
    """

    _due: ClassVar[list[tuple[float, int, Chance]]] = []
    _lock: ClassVar = threading.Lock()

    def __init__(self, every: float) -> None:
        self._every = every
        self._waiting = trio.Semaphore(0)
        self._token = trio.lowlevel.current_trio_token()
        self._ended = False
        with self._lock:
            heapq.heappush(self._due, (time.monotonic() + every * random.random(), id(self), self))
            first = len(self._due) == 1
        if first:
            threading.Thread(target=self._run, daemon=True).start()

    async def wait(self) -> None:
        """Wait for the next one."""
        await self._waiting.acquire()

    def end(self) -> None:
        """Have no more of them."""
        self._ended = True

    @classmethod
    def _run(cls) -> None:
        while True:
            with cls._lock:
                if not cls._due:
                    return
                due, number, chance = heapq.heappop(cls._due)
                if chance._ended:
                    continue
                heapq.heappush(cls._due, (due + chance._every, number, chance))
            time.sleep(max(0.0, due - time.monotonic()))
            chance._token.run_sync_soon(chance._waiting.release)


def worker(
    number: int, models: int, batch_wait: float, heartbeat_interval: float, *, replicas: bool
) -> ClusterServer:
    """Return a worker with so many models."""
    server = ClusterServer(
        ClusterServerOptions(
            server=ServerOptions(
                worker_id=f"w{number}", max_concurrency=100_000, default_timeout=86_400.0, queue_timeout=60.0
            ),
            batch_wait=batch_wait,
            heartbeat_interval=heartbeat_interval,
        )
    )
    if replicas or number == 0:
        server.register_chat("bench", bench)
    for each in range(models):
        server.register_chat(f"bench-{number}-{each}", bench)
    return server


async def main() -> None:
    """Work until the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--models", type=int, default=0)
    parser.add_argument("--replicas", action="store_true")
    parser.add_argument("--tls", metavar="CA_FILE", help="connect with TLS, and trust this authority")
    parser.add_argument("--batch-wait", type=float, default=ClusterServerOptions().batch_wait)
    parser.add_argument("--heartbeat-interval", type=float, default=ClusterServerOptions().heartbeat_interval)
    arguments = parser.parse_args()
    # That the master ends before its workers is how every measurement ends.
    logging.getLogger("trio_cluster").addHandler(logging.NullHandler())
    async with trio.open_nursery() as nursery:
        for number in range(arguments.first, arguments.first + arguments.workers):
            one = worker(
                number,
                arguments.models,
                arguments.batch_wait,
                arguments.heartbeat_interval,
                replicas=arguments.replicas,
            )
            one.options.ca_file = arguments.tls
            run = functools.partial(one.run_as_worker, tls=arguments.tls is not None)
            await nursery.start(run, HOST, arguments.port + 1000)
        print("port", arguments.port, flush=True)


if __name__ == "__main__":
    end_with_standard_input()
    trio.run(main)
