"""The six shapes of a handler, each as a chat model that counts the words of a message.

    python handler_shapes.py [PORT]

The shape of a function is determined when it is registered; other functions are refused with a ``TypeError``.
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
    """Yield the pieces of the output. The usual shape for streamed text."""
    for number, _ in enumerate(request.last_text.split(), start=1):
        yield f"{number} "


@server.chat("async-return")
async def async_return(request: ChatRequest) -> str:
    """Return the whole output. A client that streams gets it as one piece."""
    return f"{len(request.last_text.split())} words"


@server.chat("async-push")
async def async_push(request: ChatRequest, provider: Provider) -> None:
    """Push the pieces. For output from several places, or for work that goes on after the end of the output."""
    words = request.last_text.split()
    for number, _ in enumerate(words, start=1):
        await provider.push(f"{number} ")
    await provider.push(OutputChunk.usage(prompt_tokens=len(words), completion_tokens=len(words)))
    provider.end()


# The same three as plain functions. Each call runs in a thread, so they may compute and block.


@server.chat("plain-yield")
def plain_yield(request: ChatRequest) -> Iterator[str]:
    """Yield the pieces of the output. A cancellation takes effect at the next ``yield``."""
    for number, _ in enumerate(request.last_text.split(), start=1):
        yield f"{number} "


@server.chat("plain-return")
def plain_return(request: ChatRequest) -> str:
    """Return the whole output. A cancellation takes effect at the next ``check_cancelled``, between long steps."""
    count = 0
    for _ in request.last_text.split():
        trio.from_thread.check_cancelled()
        count += 1
    return f"{count} words"


@server.chat("plain-push")
def plain_push(request: ChatRequest, provider: Any) -> None:
    """Push the pieces, without ``await``. A cancellation takes effect at the next ``push``."""
    for number, _ in enumerate(request.last_text.split(), start=1):
        provider.push(f"{number} ")


async def main(port: int) -> None:
    """Serve all six models in one process until a signal arrives."""
    server.options.server.host = "127.0.0.1"
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run_as_standalone, port)
            print(f"serving {', '.join(server.list_models())} at {server.url}/v1", flush=True)
            await anext(signals)
            server.stop()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8080)
