"""A worker: it offers its models to a master, and handles the requests that the master forwards.

    python worker.py [MASTER_HOST] [MASTER_INTERNAL_PORT]

The worker opens the connection, so it can be behind NAT or a firewall. The port is the master's internal one, which is
the port of its API plus 1000. The worker reconnects by itself, so it can also be started before the master.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import AsyncIterator

import trio

from trio_cluster import ChatRequest, ClusterServer

server = ClusterServer()


@server.chat("worker-upper", context_window=4096)
async def upper(request: ChatRequest) -> AsyncIterator[str]:
    """Yield the last message in capitals, slowly enough to watch it stream."""
    for word in request.last_text.split():
        yield word.upper() + " "
        await trio.sleep(0.05)


async def stop_on_signal() -> None:
    """Stop the server: it tells the master, finishes its requests, and disconnects."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        await anext(signals)
        server.stop()


async def main(host: str, port: int) -> None:
    """Serve the master at ``host`` until a signal arrives."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signal)
        await server.run_as_worker(host, port)
        nursery.cancel_scope.cancel(reason="the worker has stopped")


if __name__ == "__main__":
    # The library logs what happens: connected, connection lost, models refused.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:]
    trio.run(
        main, arguments[0] if arguments else "127.0.0.1", int(arguments[1]) if len(arguments) > 1 else 9080
    )
