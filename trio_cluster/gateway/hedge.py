"""The hedge of a request: its second attempt, and the race between the two.

The first attempt whose answer begins is the one that the client gets. The other one is cancelled like any other call:
its slot is free when its work has stopped, and until then it counts. Both belong to the request context, which cancels
them at the end of the request in any case. There are never more than two attempts: neither of them is retried.
"""

from __future__ import annotations

from typing import Final

import trio

from ..core.answer import Event, Failed, Head
from ..core.call import Call
from .context import RequestContext
from .node_context import NodeContext

__all__ = ["HEDGED_KINDS", "first_event", "is_hedged"]

#: Kinds of models whose requests may be asked twice: they change nothing, and are answered as a whole.
HEDGED_KINDS: Final = frozenset({"embedding", "rerank", "moderation", "asr"})


def is_hedged(node_context: NodeContext, context: RequestContext) -> bool:
    """Tell whether a request may have a second attempt: its model says so, and it can be sent a second time."""
    request = context.call.request
    if request.kind not in HEDGED_KINDS or not request.replayable or getattr(request.parsed, "stream", False):
        return False
    info = node_context.router.catalog.info(request.model)
    return info is not None and info.hedge


async def first_event(node_context: NodeContext, context: RequestContext, until: float) -> Event | None:
    """Return the first event of the answer to a request that is hedged. A checkpoint.

    Args:
        node_context: the node, for its router.
        context: of the request; its call is replaced if the second attempt answers.
        until: the trio time at which the request times out.

    Returns:
        ``None``: there was no event until then.

    Raises:
        ApiError: both attempts have failed, or one of them in a way that is an answer.
    """
    router, first = node_context.router, context.call
    model, began = first.request.model, trio.current_time()
    late = router.hedging.late_after(model)
    event = await _receive(first, until if late is None else min(until, began + late))
    if event is None and late is not None and trio.current_time() < until:
        second = router.open_hedge(first, context.deadlines.time_left)
        if second is None:
            event = await _receive(first, until)
        else:
            first.hedged = second.hedged = True
            context.add_call(second)
            context.call = first
            event = await _race(context, first, second, until)
            if context.call is second:
                if isinstance(event, Head):
                    router.hedging.won += 1
                if first.end is not None and not _decides(first.end):
                    router.tell_replaced(first, second)
            if isinstance(event, Failed):
                raise event.error
    if isinstance(event, Head):
        router.hedging.record(model, trio.current_time() - began)
    return event


async def _receive(call: Call, until: float) -> Event | None:
    with trio.move_on_at(until):
        return await call.receive()
    return None


def _decides(event: Event) -> bool:
    """Tell whether an attempt has answered: an error of the handler is an answer, the loss of its node is none."""
    return not (isinstance(event, Failed) and event.movable)


async def _race(context: RequestContext, first: Call, second: Call, until: float) -> Event | None:
    """Return the first event of the attempt that answers first, and cancel the other one. A checkpoint."""
    # Until it has answered, the second attempt is not the one that counts.
    second.superseded = True
    found: dict[Call, Event] = {}
    with trio.move_on_at(until):
        async with trio.open_nursery() as nursery:

            async def receive(call: Call) -> None:
                found[call] = event = await call.receive()
                if _decides(event) or len(found) == 2:
                    nursery.cancel_scope.cancel(reason="one of two attempts has answered")

            nursery.start_soon(receive, first)
            nursery.start_soon(receive, second)
    # If neither has answered in time, the request has waited for the one that is not lost; if both are lost, the first
    # one tells why.
    waiting = next((call for call in (first, second) if call not in found), first)
    winner = next((call for call, event in found.items() if _decides(event)), waiting)
    loser = second if winner is first else first
    loser.superseded, winner.superseded = True, False
    context.call = winner
    loser.cancel("the other attempt has answered first" if winner in found else "the request has timed out")
    return found.get(winner)
