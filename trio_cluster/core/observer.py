"""Observers: objects whose methods are called at every step of a call, in the order in which the steps happen.

Whatever is derived from the steps of calls, such as counters, traces or records of usage, is an observer. An observer
overrides the methods that it needs. A step that no observer overrides costs only the iteration over an empty tuple.

All methods are called synchronously, in the task where the step happens. They must not wait and must not raise: an
exception would make the observed call fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from .call import Call
from .outcome import Outcome
from .request import Request

__all__ = ["Observer", "Observers"]


class Observer:
    """The base class of observers of a node's calls. On a worker these are the calls that its master forwards."""

    def on_admitted(self, request: Request) -> None:
        """A request passed all stages of the gateway and is about to be routed."""

    def on_routed(self, call: Call, why: str) -> None:
        """A replica was chosen, and the call was opened there.

        Args:
            call: ``call.served_by`` is the replica.
            why: the policy's reason, for display.
        """

    def on_queued(self, call: Call) -> None:
        """The call waits for a slot, on this node or on the worker that serves it."""

    def on_forwarded(self, call: Call) -> None:
        """The request was handed to the link to the worker that serves the call."""

    def on_first_byte(self, call: Call) -> None:
        """The answer has begun: its head was put; the first output comes with it or directly after it."""

    def on_overdue(self, call: Call) -> None:
        """A time limit of the call has passed, and the replica has not ended it: this node has cancelled it."""

    def on_retried(self, lost: Call, again: Call) -> None:
        """A call was replaced before anything of its answer was sent, by one on another replica or of another model.

        Args:
            lost: the call that failed; ``lost.end`` has the reason. If that is ``Done``, a server behind an engine has
                answered that it cannot take the request now; ``lost.status`` is the reason then.
            again: the call that replaces it.
        """

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        """The work of the call has really stopped.

        Args:
            call: ``call.end`` is the last event of the answer. If the answer is complete, it has the usage.
            outcome: how the call ended.
        """


Listeners: TypeAlias = tuple[Callable[..., None], ...]


class Observers:
    """The observers of one node.

    Attributes:
        admitted, routed, queued, forwarded, first_byte, overdue, retried, ended: for each step, the methods to call.
    """

    __slots__ = (
        "_all",
        "admitted",
        "ended",
        "first_byte",
        "forwarded",
        "overdue",
        "queued",
        "retried",
        "routed",
    )

    def __init__(self) -> None:
        self._all: list[Observer] = []
        self._collect()

    def add(self, observer: Observer) -> None:
        """Call the methods of ``observer`` from now on."""
        self._all.append(observer)
        self._collect()

    def remove(self, observer: Observer) -> None:
        """Call the methods of ``observer`` no longer.

        Raises:
            ValueError: it was not added.
        """
        self._all.remove(observer)
        self._collect()

    def _collect(self) -> None:
        def listeners(name: str) -> Listeners:
            overridden: Any = getattr(Observer, name)
            return tuple(
                getattr(each, name) for each in self._all if getattr(type(each), name) is not overridden
            )

        self.admitted = listeners("on_admitted")
        self.routed = listeners("on_routed")
        self.queued = listeners("on_queued")
        self.forwarded = listeners("on_forwarded")
        self.first_byte = listeners("on_first_byte")
        self.overdue = listeners("on_overdue")
        self.retried = listeners("on_retried")
        self.ended = listeners("on_ended")
