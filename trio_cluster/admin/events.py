"""``GET /cluster/events``: the requests that run, the workers and the models of a node, as server-sent events.

Theory of operation
===================

A subscriber gets one ``snapshot`` of everything, and from then on what has changed: ``upsert`` (items that are new or
different, whole) and ``remove`` (the ids of those that are gone). Between two updates there is at least
:data:`INTERVAL`.

Nothing tells this module of changes, since requests would pay for that. Instead the state is looked at, as often as
updates may be sent, and compared with what the subscriber has. So nothing is done while there is no subscriber, and
what happens twice between two looks costs nothing. All subscribers share the looks of a :class:`Sampler`. A look takes
a few microseconds for each request that runs; with many of them, looks become rarer, so that they take no more than
:data:`_SHARE` of the time.

A slow subscriber gets fewer updates: the next one is made when it has taken the one before, of the state at that time.
So there is never more than one update in memory for each.

A subscription ends with its client, like every request for the application. When the node drains, it ends as soon as
no request is left, so that it does not hold up the end of the node.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, TypeAlias

import attrs
import msgspec
import trio
from msgspec import UNSET

from ..core import clock
from ..core.principal import Principal
from ..gateway.context import RequestContext
from ..gateway.node_context import NodeContext
from .views import status_view

__all__ = ["INTERVAL", "KEEPALIVE", "LiveRequest", "Sampler", "event_stream"]

#: Seconds between two updates, at least.
INTERVAL: Final = 0.25
#: Seconds of silence after which a comment is sent.
KEEPALIVE: Final = 10.0
#: The share of the time that looks may take.
_SHARE: Final = 0.05

#: Everything that is shown: for each kind of item the encoded items, by their ids.
State: TypeAlias = Mapping[str, Mapping[str, bytes]]
KINDS: Final = ("requests", "workers", "models")

#: Only operators may subscribe, and they may see everything.
_OPERATOR: Final = Principal(role="operator")
_encode: Final = msgspec.json.encode


class LiveRequest(msgspec.Struct, frozen=True):
    """A request that runs."""

    id: str
    """Unique among the requests of this node: clients may use one ``x-request-id`` repeatedly."""
    request_id: str
    endpoint: str
    model: str
    """The name that the client asked for; empty until its body has been read."""
    key: str
    client: str
    began: float
    """When it arrived, in seconds since the epoch."""
    phase: str
    """``admitting``, or that of the call that answers it; see ``/cluster/calls``."""
    waits_for: str
    """What it waits for, if its model is not running; otherwise empty."""
    node: str
    """The worker that is asked, or ``local``; empty if none is yet."""
    attempts: int
    delivered: int
    """Bytes of the answer that the client has taken."""
    deadline: float | None
    """When its client's total timeout is over, in seconds since the epoch; ``null``: there is none."""


class Sampler:
    """Looks at the state of a node, for all subscribers.

    Args:
        node_context: the node.

    Attributes:
        looks: how often the state was looked at.
    """

    def __init__(self, node_context: NodeContext) -> None:
        self._node_context = node_context
        self._numbers: dict[RequestContext, tuple[str, float]] = {}
        self._last_number = 0
        self._state: dict[str, dict[str, bytes]] = {kind: {} for kind in KINDS}
        self._next = -1.0
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
        """The trio time of the next look."""
        return self._next

    def state(self) -> State:
        """Return the state, which is no older than the time between two looks. Synchronous."""
        now = trio.current_time()
        if now >= self._next:
            began = time.perf_counter()
            self._look()
            self._next = now + max(INTERVAL, (time.perf_counter() - began) / _SHARE)
        return self._state

    def _look(self) -> None:
        self.looks += 1
        status = status_view(self._node_context, _OPERATOR)
        found: dict[str, dict[str, bytes]] = {
            "requests": self._requests(),
            "workers": {each.id: _encode(attrs.asdict(each, filter=_is_shown)) for each in status.workers},
            "models": {str(each["id"]): _encode(each) for each in status.models},
        }
        for kind, items in found.items():
            before = self._state[kind]
            # What has not changed stays the same object, which is quick to compare for each subscriber.
            for key, item in items.items():
                if before.get(key) == item:
                    items[key] = before[key]
        self._state = found

    def _requests(self) -> dict[str, bytes]:
        now, epoch = clock.now(), time.time()
        numbers: dict[RequestContext, tuple[str, float]] = {}
        items = {}
        for context in self._node_context.stories.live:
            known = self._numbers.get(context)
            if known is None:
                self._last_number += 1
                known = str(self._last_number), round(epoch - (now - context.began), 3)
            numbers[context] = known
            items[known[0]] = _encode(_live_request(context, *known))
        self._numbers = numbers
        return items


def _is_shown(field: attrs.Attribute[Any], value: object) -> bool:
    """Return whether an event has a field. The time since a worker has connected would be a change in each look."""
    return field.name != "connected_for" and value is not UNSET


def _live_request(context: RequestContext, number: str, began: float) -> LiveRequest:
    request, call = getattr(context, "request", None), getattr(context, "call", None)
    wait = None if call is None else call.model_wait
    deadline = None
    if request is not None and call is not None and request.total_timeout < float("inf"):
        deadline = round(began + context.calls[0].opened_at - context.began + request.total_timeout, 3)
    return LiveRequest(
        number,
        context.request_id,
        "" if context.endpoint is None else context.endpoint.name,
        "" if request is None else request.alias or request.model,
        context.principal.name,
        context.client,
        began,
        "admitting" if call is None else call.phase,
        "" if wait is None else wait.what,
        "" if call is None else call.served_by,
        len(context.calls),
        0 if call is None else call.body.delivered,
        deadline,
    )


async def event_stream(sampler: Sampler) -> AsyncIterator[bytes]:  # noqa: ASYNC900  (Quart closes it)
    """Yield the events for one subscriber, until the node ends. Each step is a checkpoint."""
    had = sampler.state()
    yield _event("snapshot", {kind: list(map(msgspec.Raw, had[kind].values())) for kind in KINDS})
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
            yield events


def _changes(before: State, after: State) -> tuple[dict[str, list[msgspec.Raw]], dict[str, list[str]]]:
    """Return the items of each kind that are new or different, and the ids of those that are gone."""
    upserts, removed = {}, {}
    for kind in KINDS:
        had, has = before[kind], after[kind]
        if changed := [msgspec.Raw(item) for key, item in has.items() if had.get(key) is not item]:
            upserts[kind] = changed
        if gone := [key for key in had if key not in has]:
            removed[kind] = gone
    return upserts, removed


def _event(name: str, data: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _encode(data))
