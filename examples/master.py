"""A master: it serves the OpenAI API on PORT, and accepts workers on PORT + 1000.

    python master.py [PORT] [HOST]

A master needs no model of its own; this one has one to show that it can. Start ``worker.py``, on this machine or on
another one, and its model appears in ``/v1/models`` beside this one.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator

import trio

from trio_cluster import ChatRequest, ClusterServer

server = ClusterServer()


@server.chat("master-echo")
async def echo(request: ChatRequest) -> AsyncIterator[str]:
    """Yield the last message, word by word."""
    for word in request.last_text.split():
        yield word + " "


async def main(port: int, host: str) -> None:
    """Serve until a signal arrives, and then let running requests finish."""
    server.options.server.host = host
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            # `start` returns when the server serves; from then on, `url` and `internal_port` are known.
            await nursery.start(server.run_as_master, port)
            print(f"serving {server.url}/v1, workers join at port {server.internal_port}", flush=True)
            await anext(signals)
            server.stop()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    trio.run(
        main, int(arguments[0]) if arguments else 8080, arguments[1] if len(arguments) > 1 else "127.0.0.1"
    )
