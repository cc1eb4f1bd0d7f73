"""Whether a model that runs on demand is there, and what a call waits for that has asked for it."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import attrs
import trio

__all__ = ["CONTROL", "LOAD", "MODEL_STATES", "UNLOAD", "ModelState", "ModelWait", "ShownState"]

#: The kind of the calls that load and unload a model, and their endpoints; see ``local/control.py``.
CONTROL: Final[str] = "control"
LOAD: Final[str] = "/load"
UNLOAD: Final[str] = "/unload"

#: What clients are shown of a model that runs on demand, from the one that answers first.
ShownState: TypeAlias = Literal["ready", "starting", "cold"]
MODEL_STATES: Final[tuple[ShownState, ...]] = ("ready", "starting", "cold")


@attrs.frozen
class ModelState:
    """The state of a model on a node that runs it on demand."""

    state: ShownState
    ready_at: float = 0.0
    """If it starts: the trio time at which it is expected to be ready."""
    start_seconds: float = 0.0
    """If it is cold: the seconds that its start is expected to take."""
    why: str = ""
    """Why it has failed; empty if it has not."""

    def ready_in(self, now: float) -> float:
        """Return the seconds until it can answer, if it is asked now, as far as its start decides that.

        Args:
            now: the trio time.
        """
        if self.state == "ready":
            return 0.0
        if self.state == "cold":
            return self.start_seconds
        return max(0.0, self.ready_at - now)


@attrs.frozen
class ModelWait:
    """What a call waits for before its model can answer."""

    what: str
    """What happens, for people: ``starting qwen3-32b``."""
    ready_at: float | None = None
    """The trio time at which it is expected to be over; ``None``: not known."""

    @property
    def seconds(self) -> float | None:
        """The seconds until then; ``None``: not known. Synchronous."""
        return None if self.ready_at is None else max(0.0, self.ready_at - trio.current_time())

    def __str__(self) -> str:
        seconds = self.seconds
        if seconds is None:
            return self.what
        return f"{self.what}, about {max(1, round(seconds))} s"
