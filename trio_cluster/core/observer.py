"""Observers: told of every step of a call, in the order in which the steps happen.

Counters, the story of a request, traces and records of usage are made from this, and from nothing else. An observer
overrides the methods it needs. A step that no observer overrides costs the iteration over an empty tuple, so that what
is not used is not paid for.

All methods are called synchronously, in the task where the step happens. They must not wait and must not raise; an
exception would be the failure of the call that is observed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from .call import Call
    from .outcome import Outcome
    from .request import Request

__all__ = ["Observer", "Observers"]


class Observer:
    """Is told of the steps of every call of a node. On a worker these are the calls that its master forwards."""

    def on_admitted(self, request: Request) -> None:
        """A request passed all stages of the gateway and is about to be routed."""

    def on_routed(self, call: Call, why: str) -> None:
        """A replica was chosen, and the call was opened there.

        Args:
            call: ``call.served_by`` is the replica.
            why: the policy's reason, for people.
        """

    def on_queued(self, call: Call) -> None:
        """The call waits for a slot, here or on the worker that has it."""

    def on_forwarded(self, call: Call) -> None:
        """The request was handed to the link to the worker that serves the call."""

    def on_first_byte(self, call: Call) -> None:
        """The answer has begun: its head is there, and the first output with it or behind it."""

    def on_retried(self, lost: Call, again: Call) -> None:
        """A call that failed before its answer began was opened once more, on another replica.

        Args:
            lost: the call that failed; ``lost.end`` says why.
            again: the call that takes its place.
        """

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        """The work of the call has really stopped.

        ``call.end`` is the last event of the answer, with the usage in it if the answer is complete.
        """


Listeners: TypeAlias = tuple[Callable[..., None], ...]


class Observers:
    """The observers of one node.

    Attributes:
        admitted, routed, queued, forwarded, first_byte, retried, ended: for each step, the methods to call.
    """

    __slots__ = ("_all", "admitted", "ended", "first_byte", "forwarded", "queued", "retried", "routed")

    def __init__(self) -> None:
        self._all: list[Observer] = []
        self._collect()

    def add(self, observer: Observer) -> None:
        """Tell ``observer`` of the steps that come from now on."""
        self._all.append(observer)
        self._collect()

    def remove(self, observer: Observer) -> None:
        """Tell ``observer`` nothing more.

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
        self.retried = listeners("on_retried")
        self.ended = listeners("on_ended")
