"""Masters and workers that are there at once, since they are forks of a process that has imported everything.

For each line ``master PORT WINDOW`` or ``worker PORT WINDOW MODELS CAPACITY``, it forks one, and prints ``pid N``. A
worker prints ``ready N`` when its models are registered, and ``cancelled NANOSECONDS`` whenever a handler is cancelled.
All end with this program, which ends with its standard input.

    python bench/forks.py
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys

import trio
from worker import HOST, bench

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions


async def serve(what: str, port: int, window: float, models: str = "", capacity: int = 1000) -> None:
    """Be a node."""
    options = ServerOptions(host=HOST, port=port, worker_id=f"w-{models}", max_concurrency=capacity)
    server = ClusterServer(
        ClusterServerOptions(options, resume_window=window, on_conflict="replicate", guardian=True)
    )
    if what == "master":
        await server.run_as_master()
        return
    for model in models.split(","):
        server.register_chat(model, bench)

    async def run(*, task_status: trio.TaskStatus[object]) -> None:
        await server.run_as_worker(HOST, port + 1000, task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        print("ready", os.getpid(), flush=True)


def main() -> None:
    """Fork for each line."""
    logging.getLogger("trio_cluster").setLevel(logging.CRITICAL)
    # Whoever ends is forgotten at once.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    children = []
    print("port 0", flush=True)
    for line in sys.stdin:
        what, port, window, *more = line.split()
        if child := os.fork():
            children.append(child)
            print("pid", child, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.stdin.close()
        with contextlib.suppress(KeyboardInterrupt):
            trio.run(serve, what, int(port), float(window), *more[:1], *map(int, more[1:2]))
        os._exit(0)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
