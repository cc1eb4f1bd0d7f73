"""A master and a worker for the benchmarks: the worker here, the master as a process of its own.

Prints ``port N`` when both are there and ``cancelled NANOSECONDS`` whenever a handler is cancelled; ends when its
standard input does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from functools import partial

import trio

from trio_cluster import (
    ChatRequest,
    ClusterServer,
    ClusterServerOptions,
    ServerOptions,
    check_is_cluster_server,
)

HOST = "127.0.0.1"
INTERVAL = float(os.environ.get("BENCH_INTERVAL", "0.05"))

server = ClusterServer(
    ClusterServerOptions(server=ServerOptions(host=HOST, max_concurrency=100_000, default_timeout=600.0))
)


@server.chat("bench")
async def bench(request: ChatRequest) -> AsyncIterator[str]:
    """Stream for ever, or answer at once."""
    if not request.stream:
        yield "x" * 40
        return
    try:
        yield "begun "
        while True:
            await trio.sleep(INTERVAL)
            yield "token "
    finally:
        print("cancelled", time.monotonic_ns(), flush=True)


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


async def main() -> None:
    """Run until standard input ends."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "trio_cluster",
        "master",
        str(port),
        "--host",
        HOST,
        "--log-level",
        "warning",
    ]
    async with trio.open_nursery() as nursery:
        master = await nursery.start(partial(trio.run_process, command, stdin=subprocess.DEVNULL))
        with trio.fail_after(20):
            # Another process cannot set an event of ours.
            while not await check_is_cluster_server(HOST, port + 1000):  # noqa: ASYNC110
                await trio.sleep(0.05)
        await nursery.start(server.run_as_worker, HOST, port + 1000)
        print("port", port, "master", master.pid, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
