"""What the processes of a group show live, together: ``GET /cluster/events`` of any of them shows all of them.

Theory of operation
===================

A process that has subscribers asks each other process for what has changed there, again and again, with one question
under way for each (:class:`~trio_cluster.group.messages.Look`). So a process that is stuck holds up nothing but its own
items, and nothing piles up for it. Without subscribers, nothing is asked.

The one that is asked remembers what each asking process has been sent, and answers with the difference. An answer has
at most :data:`ANSWER_BYTES`, since it shares the sockets of the supervisor with what must not wait, such as the limits
of keys; the rest is asked for soon, before what has changed meanwhile. An answer that was lost makes the numbers of
both sides differ, and the next one is whole again.

The items of a process are dropped as soon as it has ended. Those of one that does not answer stay: it still has its
requests.

Requests are those of their processes, with ids that no other process uses. A worker is linked to all processes, and a
model is served by all of them: their items are merged (``status.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NoReturn, Protocol

import attrs
import msgspec
import trio

from ..core.live_state import LIVE_KINDS, LiveState
from .messages import Look, Process, Response
from .status import merge_models, merge_workers

__all__ = ["ANSWER_BYTES", "Asking", "LiveGroup"]

#: Seconds between two questions to a process, at least.
_INTERVAL: Final = 0.25
#: Seconds between two questions to a process that has more to send.
_SHORT_INTERVAL: Final = 0.02
#: Bytes of the items of one answer, about.
ANSWER_BYTES: Final = 256 * 1024
#: Seconds for which a new subscriber waits for the first answers.
_FIRST_WAIT: Final = 0.5


class Asking(Protocol):
    """Reaches the other processes; see :class:`~trio_cluster.group.member.Member`."""

    @property
    def process(self) -> int:
        """The number of this process."""
        ...

    @property
    def processes(self) -> int:
        """How many there are."""
        ...

    async def ask_one(self, process: int, what: Look) -> Process | None:
        """See ``Member``."""
        ...

    def tell_one(self, process: int, what: Look) -> None:
        """See ``Member``."""
        ...


class _Changes(msgspec.Struct):
    """An answer to a look."""

    number: int
    """Of this answer; the next question names it."""
    whole: bool
    """It is not the difference to an answer before."""
    more: bool
    """There is more to ask for."""
    changed: dict[str, dict[str, msgspec.Raw]]
    gone: dict[str, list[str]]


_decoder = msgspec.json.Decoder(_Changes)


def _nothing() -> LiveState:
    return {kind: {} for kind in LIVE_KINDS}


@attrs.define
class _Sent:
    """What an asking process has been sent."""

    number: int = 0
    state: LiveState = attrs.field(factory=_nothing)
    """What it has, or will have when it has asked for the rest."""
    rest: list[tuple[str, str, bytes]] = attrs.field(factory=list)
    """What is still to be sent: the kind, the id and the item, the first one last."""

    def compare(self, state: LiveState) -> dict[str, list[str]]:
        """Note what is to be sent of a new state, and return the ids of what is gone."""
        gone: dict[str, list[str]] = {}
        for kind in LIVE_KINDS:
            had, has = self.state[kind], state[kind]
            if missing := [key for key in had if key not in has]:
                gone[kind] = missing
            self.rest += [(kind, key, item) for key, item in has.items() if had.get(key) is not item]
        self.rest.reverse()
        self.state = state
        return gone


@attrs.define
class _Sibling:
    """What is known of another process."""

    pid: int = 0
    number: int = 0
    items: dict[str, dict[str, bytes]] = attrs.field(factory=lambda: {kind: {} for kind in LIVE_KINDS})


class LiveGroup:
    """One process of a group, on both sides: it answers looks of others, and looks at them. See the top of this module.

    Args:
        member: this process.

    Attributes:
        own: returns what this process has to show. Synchronous.
    """

    def __init__(self, member: Asking) -> None:
        self.own: Callable[[], LiveState] = _nothing
        self._member = member
        self._sent: dict[int, _Sent] = {}
        self._siblings: dict[int, _Sibling] = {}
        # Those that have not answered since the first subscriber came.
        self._unknown: set[int] = set()
        self._watchers = 0
        self._changed = trio.lowlevel.ParkingLot()

    # As the one that is asked

    def answer(self, look: Look) -> Response:
        """Return what has changed here since the last answer to the same process. Synchronous."""
        if look.over:
            self._sent.pop(look.process, None)
            return Response(200)
        sent = self._sent.get(look.process)
        whole = sent is None or not look.seen or sent.number != look.seen
        if sent is None or whole:
            # Not a number that was used: an answer that was lost may have had it.
            sent = self._sent[look.process] = _Sent(
                look.seen if sent is None else max(sent.number, look.seen)
            )
        gone: dict[str, list[str]] = {}
        if not sent.rest:
            gone = sent.compare(self.own())
        room = ANSWER_BYTES
        changed: dict[str, dict[str, msgspec.Raw]] = {kind: {} for kind in LIVE_KINDS}
        while sent.rest and room > 0:
            kind, key, item = sent.rest.pop()
            room -= len(item)
            changed[kind][key] = msgspec.Raw(item)
        sent.number += 1
        answer = _Changes(sent.number, whole, bool(sent.rest), changed, gone)
        return Response(200, body=msgspec.json.encode(answer))

    # As the one that asks

    async def run(self) -> NoReturn:
        """Look at the other processes while there are subscribers, until cancelled."""
        others = [number for number in range(self._member.processes) if number != self._member.process]
        while True:
            while not self._watchers:
                await self._changed.park()
            async with trio.open_nursery() as nursery:
                for process in others:
                    nursery.start_soon(self._follow, process)
                while self._watchers:
                    await self._changed.park()
                nursery.cancel_scope.cancel(reason="there are no subscribers any more")
            self._siblings.clear()
            for process in others:
                self._member.tell_one(process, Look(self._member.process, over=True))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See :class:`~trio_cluster.core.live_state.LiveSiblings`."""
        if not self._watchers:
            self._unknown = set(range(self._member.processes)) - {self._member.process}
        self._watchers += 1
        self._changed.unpark_all()
        try:
            yield
        finally:
            self._watchers -= 1
            self._changed.unpark_all()

    async def wait_known(self) -> None:
        """See :class:`~trio_cluster.core.live_state.LiveSiblings`."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(_FIRST_WAIT):
            while self._unknown:
                await self._changed.park()

    def merged(self, own: LiveState) -> LiveState:
        """See :class:`~trio_cluster.core.live_state.LiveSiblings`."""
        states: dict[int, LiveState] = {number: each.items for number, each in self._siblings.items()}
        states[self._member.process] = own
        requests: dict[str, bytes] = {}
        for _, state in sorted(states.items()):
            requests |= state["requests"]
        workers = {
            number: [msgspec.json.decode(item) for item in state["workers"].values()]
            for number, state in sorted(states.items())
        }
        models = [
            [msgspec.json.decode(item) for item in state["models"].values()]
            for _, state in sorted(states.items())
        ]
        return {
            "requests": requests,
            "workers": _encoded(merge_workers(workers)),
            "models": _encoded(merge_models(models, live=True)),
        }

    async def _follow(self, process: int) -> None:
        """Keep what is known of another process up to date, until cancelled."""
        while True:
            # Counted from the answer: a process that is slow to answer is not asked more often.
            more = await self._look(process)
            await trio.sleep(_SHORT_INTERVAL if more else _INTERVAL)

    async def _look(self, process: int) -> bool:
        """Ask a process once, and return whether it has more. A checkpoint."""
        known = self._siblings.get(process)
        found = await self._member.ask_one(
            process, Look(self._member.process, 0 if known is None else known.number)
        )
        more = False
        if found is None or not found.serves or (known is not None and found.pid != known.pid):
            self._siblings.pop(process, None)
        elif found.response is not None:
            if known is None:
                known = self._siblings[process] = _Sibling(found.pid)
            more = _apply(known, _decoder.decode(found.response.body))
        if not more:
            self._unknown.discard(process)
            self._changed.unpark_all()
        return more


def _apply(known: _Sibling, changes: _Changes) -> bool:
    if changes.whole:
        known.items = {kind: {} for kind in LIVE_KINDS}
    known.number = changes.number
    for kind, keys in changes.gone.items():
        for key in keys:
            known.items[kind].pop(key, None)
    for kind, items in changes.changed.items():
        known.items[kind] |= {key: bytes(item) for key, item in items.items()}
    return changes.more


def _encoded(items: list[dict[str, Any]]) -> Mapping[str, bytes]:
    return {str(item["id"]): msgspec.json.encode(item) for item in items}
