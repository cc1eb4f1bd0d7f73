"""The events of an answer: ``Head Data* (Done | Failed)``, or ``Failed`` alone.

They are the same for streams and for plain answers, and for handlers in this process and on workers.
"""

from __future__ import annotations

from typing import TypeAlias

import attrs

from ..errors import ApiError

__all__ = ["Data", "Done", "Event", "Failed", "Head", "Usage"]


@attrs.frozen
class Usage:
    """The tokens of one answer, as the handler or the server behind it reported them; 0: not reported."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Those of ``prompt_tokens`` that were read from a prompt cache."""
    reasoning_tokens: int = 0
    """Those of ``completion_tokens`` that were spent on reasoning."""


@attrs.frozen
class Head:
    """The beginning of an answer. Until it is put, a failure can still become an HTTP error of its own."""

    status: int = 200
    """The HTTP status: 200 unless a passthrough model relays another one."""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@attrs.frozen
class Data:
    """A piece of the answer's body, encoded as it is sent to the client.

    An empty piece is a sign of life: the handler is working, and has nothing to send yet.
    """

    data: bytes | memoryview


@attrs.frozen
class Done:
    """The answer is complete."""

    usage: Usage | None = None
    """``None``: the handler reported none."""
    finish: str = ""
    """Why the choices of a text ended, in their order, with commas: ``stop``, ``length``, ``tool_calls``; empty: it is
    not known, or the answer is no text. For display only."""


@attrs.frozen
class Failed:
    """The answer ends here, and is not complete.

    Whether a call is retried, and under which outcome it is counted, is decided by these fields, never by the status or
    the code of ``error``, which a handler may choose freely.
    """

    error: ApiError
    retryable: bool = False
    """The call failed because of the node that had it, not because of the request: it may be retried on another replica
    if nothing of the answer was delivered."""
    timed_out: bool = False
    """A deadline of the request passed."""
    over_capacity: bool = False
    """The node had no room for the call, and did not begin it: another model may answer instead, if the client has
    asked for an alias that names one."""

    @property
    def movable(self) -> bool:
        """Whether the request may be opened elsewhere: on another replica, or for the next model of an alias."""
        return self.retryable or self.over_capacity


Event: TypeAlias = Head | Data | Done | Failed
