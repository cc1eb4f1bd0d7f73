"""The models of the cluster whose links are cut: an application for ``--app counting:server``.

``counting`` streams the answer to ``NUMBER COUNT SECONDS``, which is the same each time: so many tokens, so many
seconds apart. No two tokens of all answers are the same, so one that is missing, or comes twice, or in another order or
answer, makes another text. ``probe`` is asked with a number of seconds, and streams for ever, a token in every so many,
each with the moment at which it was made.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import trio

from trio_cluster import ChatRequest, ClusterServer, ClusterServerOptions, ServerOptions

server = ClusterServer(ClusterServerOptions(server=ServerOptions(max_concurrency=100_000)))


def token(number: int, place: int) -> str:
    """Return a token of an answer of ``counting``."""
    return f"{number}.{place} "


@server.chat("counting")
async def counting(request: ChatRequest) -> AsyncIterator[str]:
    """Count."""
    number, count, every = request.last_text.split()
    due = trio.current_time()
    for place in range(int(count)):
        yield token(int(number), place)
        due += float(every)
        await trio.sleep_until(due)


@server.chat("probe")
async def probe(request: ChatRequest) -> AsyncIterator[str]:
    """Tell the time."""
    yield "begun "
    while True:
        yield f"token@{time.monotonic_ns()} "
        await trio.sleep(float(request.last_text))
