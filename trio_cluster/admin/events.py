"""``GET /cluster/events``: the requests that run, the workers and the models of a node, as server-sent events.

Theory of operation
===================

A subscriber gets one ``snapshot`` of everything, and from then on what has changed: ``upsert`` (items that are new or
different, whole) and ``remove`` (the ids of those that are gone). Between two updates there is at least
:data:`INTERVAL`. What is in an item is decided by ``live.py``.

Nothing tells this module of changes, since requests would pay for that. Instead the state is looked at, as often as
updates may be sent, and compared with what the subscriber has. So nothing is done while there is no subscriber, and
what happens twice between two looks costs nothing. All subscribers share the looks of a :class:`Sampler`. A look takes
a few microseconds for each request that runs, and what is sent of it takes about as long. With many requests, looks
become rarer: they take no more than :data:`_SHARE` of the processor time that this process uses for all that it does,
or :data:`_FREE` of one processor, if that is more. So the tokens of a busy node cost a few percent more at most while
it is watched, and a quiet one shows everything as soon as it happens.

A process of a group shows what all of them have. The others are asked while there are subscribers, and answer with the
looks of their own samplers (``group/live.py``).

A slow subscriber gets fewer updates: the next one is made when it has taken the one before, of the state at that time.
So there is never more than one update in memory for each.

A subscription ends with its client, like every request for the application. When the node drains, it ends as soon as
no request is left, so that it does not hold up the end of the node.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import msgspec
import trio

from ..core import clock
from ..core.live_state import LIVE_KINDS, LiveState
from ..core.principal import Principal
from ..gateway.node_context import NodeContext
from .live import ConnectionTimes, live_models, live_request, live_workers
from .views import status_view

__all__ = ["CLOCK_HEADER", "INTERVAL", "KEEPALIVE", "Sampler", "event_stream"]

#: The header with the time at which the response was made, in seconds since the epoch.
CLOCK_HEADER: Final = "x-trio-cluster-time"
#: Seconds between two updates, at least.
INTERVAL: Final = 0.25
#: Seconds of silence after which a comment is sent.
KEEPALIVE: Final = 10.0
#: Seconds between two looks, at most.
_LONGEST: Final = 2.5
#: The share of the processor time of this process that looks may take.
_SHARE: Final = 0.03
#: The share of one processor that they may take in any case.
_FREE: Final = 0.003

#: Only operators may subscribe, and they may see everything.
_OPERATOR: Final = Principal(role="operator")
_encode: Final = msgspec.json.encode


class Pace:
    """How often something may be done that costs processor time."""

    def __init__(self) -> None:
        self._used, self._at = time.process_time(), time.perf_counter()

    def pause(self, cost: float) -> float:
        """Return the seconds until it may be done again. Synchronous.

        Args:
            cost: the seconds of processor time that it has taken just now.
        """
        used, at = time.process_time(), time.perf_counter()
        busy = min(1.0, (used - self._used) / max(at - self._at, 1e-6))
        self._used, self._at = used, at
        return min(_LONGEST, max(INTERVAL, cost / max(_FREE, _SHARE * busy)))


class Sampler:
    """Looks at the state of a node, for all subscribers.

    Args:
        node_context: the node.

    Attributes:
        looks: how often the state was looked at.
    """

    def __init__(self, node_context: NodeContext) -> None:
        self._node_context = node_context
        self._last_number = 0
        self._times = ConnectionTimes()
        self._own: LiveState = {kind: {} for kind in LIVE_KINDS}
        self._shown: LiveState = self._own
        self._next = self._next_shown = -1.0
        self._pace, self._shown_pace = Pace(), Pace()
        self._siblings = node_context.siblings
        # Ids are those of no other process of the group, nor of one before that had the same number.
        self._prefix = ""
        if self._siblings is not None:
            self._siblings.own = self.own_state
            self._prefix = f"{os.getpid()}-"
        self.looks = 0

    @property
    def over(self) -> bool:
        """Whether the node drains, and no request is left."""
        context = self._node_context
        return context.router.draining_reason is not None and not (
            context.stories.live or context.router.live
        )

    @property
    def next_look(self) -> float:
        """The trio time at which :meth:`state` returns another state."""
        return self._next if self._siblings is None else self._next_shown

    def state(self) -> LiveState:
        """Return what is shown, which is no older than the time between two looks. Synchronous."""
        if self._siblings is None:
            return self.own_state()
        now = trio.current_time()
        if now >= self._next_shown:
            own = self.own_state()
            began = time.thread_time()
            self._shown = _unchanged(self._shown, self._siblings.merged(own))
            self._next_shown = now + self._shown_pace.pause(time.thread_time() - began)
        return self._shown

    def own_state(self) -> LiveState:
        """Return what this process has to show, which is no older than the time between two looks. Synchronous."""
        now = trio.current_time()
        if now >= self._next:
            began = time.thread_time()
            self._look()
            self._next = now + self._pace.pause(time.thread_time() - began)
        return self._own

    def subscribed(self) -> AbstractContextManager[None]:
        """Return a context during which there is a subscriber."""
        return nullcontext() if self._siblings is None else self._siblings.watching()

    async def wait_known(self) -> None:
        """Wait until the other processes of the group have answered once, for a moment at most."""
        if self._siblings is not None:
            await self._siblings.wait_known()

    def _look(self) -> None:
        self.looks += 1
        context = self._node_context
        status = status_view(context, _OPERATOR)
        found = {
            "requests": self._requests(),
            "workers": live_workers(status.workers, context.status().sleeping, self._times),
            "models": live_models(status, context.router, context.request_stats),
        }
        self._own = _unchanged(self._own, found)

    def _requests(self) -> dict[str, bytes]:
        now, epoch = clock.now(), time.time()
        items = {}
        for context in self._node_context.stories.live:
            # It is in the context: a sampler that kept contexts would keep their bodies until the next look, which may
            # never come.
            known = getattr(context, "live_id", None)
            if known is None:
                self._last_number += 1
                known = f"{self._prefix}{self._last_number}", round(epoch - (now - context.began), 3)
                context.live_id = known
            items[known[0]] = _encode(live_request(context, *known))
        return items


def _unchanged(before: LiveState, after: dict[str, dict[str, bytes]] | LiveState) -> LiveState:
    """Return a state in which what has not changed is the same object, which is quick to compare."""
    kept: dict[str, dict[str, bytes]] = {}
    for kind, items in after.items():
        had = before[kind]
        kept[kind] = {key: had[key] if had.get(key) == item else item for key, item in items.items()}
    return kept


async def event_stream(sampler: Sampler) -> AsyncIterator[bytes]:  # noqa: ASYNC900  (Quart closes it)
    """Yield the events for one subscriber, until the node ends. Each step is a checkpoint."""
    with sampler.subscribed():
        await sampler.wait_known()
        had = sampler.state()
        snapshot = {kind: list(map(msgspec.Raw, had[kind].values())) for kind in LIVE_KINDS}
        yield _event("snapshot", snapshot)  # noqa: ASYNC119  (Quart closes it)
        sent_at = trio.current_time()
        while not sampler.over:
            await trio.sleep_until(max(sampler.next_look, sent_at + INTERVAL))
            state = sampler.state()
            upserts, removed = _changes(had, state)
            had = state
            events = b""
            if upserts:
                events += _event("upsert", upserts)
            if removed:
                events += _event("remove", removed)
            if not events and trio.current_time() - sent_at >= KEEPALIVE:
                events = b": keepalive\n\n"
            if events:
                sent_at = trio.current_time()
                yield events  # noqa: ASYNC119  (Quart closes it)


def _changes(
    before: LiveState, after: LiveState
) -> tuple[dict[str, list[msgspec.Raw]], dict[str, list[str]]]:
    """Return the items of each kind that are new or different, and the ids of those that are gone."""
    upserts, removed = {}, {}
    for kind in LIVE_KINDS:
        had, has = before[kind], after[kind]
        if changed := [msgspec.Raw(item) for key, item in has.items() if had.get(key) is not item]:
            upserts[kind] = changed
        if gone := [key for key in had if key not in has]:
            removed[kind] = gone
    return upserts, removed


def _event(name: str, data: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _encode(data))
