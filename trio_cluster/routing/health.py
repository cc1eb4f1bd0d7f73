"""The health of a backend: whether it may be given new calls. How its calls end: see ``ejection.py``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ..core.model_state import ModelState

__all__ = ["Health"]

_NONE: Final[Mapping[str, ModelState]] = MappingProxyType({})


class Health:
    """The health of one backend. The owner of the backend updates it, and the router reads it.

    Attributes:
        available: new calls may be opened. An attribute and not a property, since it is read for each replica of each
            request.
        draining: the backend takes no new calls, finishes those that it has, and stops.
        stalled: why the backend cannot do anything at the moment, although it is connected; empty if it can.
        suspended: the connection to the backend was cut, and may be resumed.
        lost: why the connection to the backend was lost, for good; ``None`` while it was not.
        model_states: the states of those of its models that run on demand; all others are ready.
    """

    __slots__ = ("available", "draining", "lost", "model_states", "stalled", "suspended")

    def __init__(self) -> None:
        self.available = True
        self.draining = False
        self.stalled = ""
        self.suspended = False
        self.lost: str | None = None
        self.model_states: Mapping[str, ModelState] = _NONE

    def drain(self) -> None:
        """Record that the backend is about to stop."""
        self.draining = True
        self._update()

    def stall(self, reason: str) -> None:
        """Record why the backend cannot do anything at the moment; empty: it can again."""
        self.stalled = reason
        self._update()

    def suspend(self, suspended: bool) -> None:
        """Record that the connection was cut, or resumed."""
        self.suspended = suspended
        self._update()

    def lose(self, reason: str) -> None:
        """Record that the connection to the backend was lost."""
        self.lost = reason
        self._update()

    def _update(self) -> None:
        self.available = not (self.draining or self.stalled or self.suspended) and self.lost is None
