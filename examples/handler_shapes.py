"""The six shapes in which a handler can be written, each as a chat model that counts the words it was sent.

    python handler_shapes.py [PORT]

Which shape a function has is found out when it is registered; one that has none is refused there and then.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import trio

from trio_cluster import ChatRequest, ClusterServer, OutputChunk, Provider

server = ClusterServer()


@server.chat("async-yield")
async def async_yield(request: ChatRequest) -> AsyncIterator[str]:
    """Yield each piece of output. The usual shape for text that is to be streamed."""
    for number, _ in enumerate(request.last_text.split(), start=1):
        yield f"{number} "


@server.chat("async-return")
async def async_return(request: ChatRequest) -> str:
    """Return the whole output. A client that asked for a stream gets it as one piece."""
    return f"{len(request.last_text.split())} words"


@server.chat("async-push")
async def async_push(request: ChatRequest, provider: Provider) -> None:
    """Push pieces. Good where output comes from several places, or where work goes on after the end."""
    words = request.last_text.split()
    for number, _ in enumerate(words, start=1):
        await provider.push(f"{number} ")
    await provider.push(OutputChunk.usage(prompt_tokens=len(words), completion_tokens=len(words)))
    provider.end()


# The same three as plain functions. Each call runs in a thread, so they may compute and block as they like.


@server.chat("plain-yield")
def plain_yield(request: ChatRequest) -> Iterator[str]:
    """Yield each piece of output; a client that left is noticed at the next ``yield``."""
    for number, _ in enumerate(request.last_text.split(), start=1):
        yield f"{number} "


@server.chat("plain-return")
def plain_return(request: ChatRequest) -> str:
    """Return the whole output; between long steps, ask whether anybody still waits for it."""
    count = 0
    for _ in request.last_text.split():
        trio.from_thread.check_cancelled()
        count += 1
    return f"{count} words"


@server.chat("plain-push")
def plain_push(request: ChatRequest, provider: Any) -> None:
    """Push pieces, without ``await``."""
    for number, _ in enumerate(request.last_text.split(), start=1):
        provider.push(f"{number} ")


async def main(port: int) -> None:
    """Serve all six in one process until a signal asks for the end."""
    server.options.server.host = "127.0.0.1"
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run_as_standalone, port)
            print(f"serving {', '.join(server.list_models())} at {server.url}/v1", flush=True)
            await anext(signals)
            server.stop()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8080)
