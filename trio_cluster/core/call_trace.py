"""The interface of a call's trace, for what sends the call on or runs its handler; see ``tracer.py``."""

from __future__ import annotations

from typing import Protocol

__all__ = ["CallTrace"]


class CallTrace(Protocol):
    """The trace of one call."""

    @property
    def is_exported(self) -> bool:
        """Whether this node exports the span of the call's handler."""

    def enter(self) -> None:
        """The handler begins, in the current task: what it does there belongs to the trace. Synchronous."""

    def failed(self, error: BaseException) -> None:
        """The handler has raised an error that its client is not shown. Synchronous."""
