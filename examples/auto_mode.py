"""One program for every machine: a master if the port is free, a worker of the master that holds it if not.

    python auto_mode.py [PORT] [NAME]

Start it twice on one machine. The first process becomes the master, the second one its worker, and both models are
served on the same port.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator

import trio

from trio_cluster import ChatRequest, ClusterMode, ClusterServer

server = ClusterServer()


async def stop_on_signal() -> None:
    """Stop the server, whichever mode it runs in."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        await anext(signals)
        server.stop()


async def main(port: int, name: str) -> None:
    """Serve a model called ``name`` until a signal arrives."""
    server.options.server.host = "127.0.0.1"

    @server.chat(name)
    async def answer(request: ChatRequest) -> AsyncIterator[str]:
        yield f"{name} heard: {request.last_text}"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signal)
        mode: ClusterMode = await nursery.start(server.run, port)
        where = f" at {server.url}/v1" if mode is ClusterMode.MASTER else ""
        print(f"{name} runs as {mode}{where}", flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    trio.run(main, int(arguments[0]) if arguments else 8080, arguments[1] if len(arguments) > 1 else "first")
