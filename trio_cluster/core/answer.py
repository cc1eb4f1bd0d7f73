"""The events of an answer: ``Head Data* (Done | Failed)``, or ``Failed`` alone.

They are the same for a stream and for a plain answer, and for a handler in this process and one on a worker.
"""

from __future__ import annotations

from typing import TypeAlias

import attrs

from ..errors import ApiError

__all__ = ["Data", "Done", "Event", "Failed", "Head", "Usage"]


@attrs.frozen
class Usage:
    """The tokens of one answer, as the handler or the server behind it reported them; 0 without a report."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Those of ``prompt_tokens`` that were read from a prompt cache."""
    reasoning_tokens: int = 0
    """Those of ``completion_tokens`` that were spent on reasoning."""


@attrs.frozen
class Head:
    """The beginning of an answer: no failure so far, and this is what the answer will be."""

    status: int = 200
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@attrs.frozen
class Data:
    """A piece of the answer's body, ready to be sent to the client as it is.

    An empty piece is a sign of life: the handler works, and has nothing to show yet.
    """

    data: bytes | memoryview


@attrs.frozen
class Done:
    """The answer is complete."""

    usage: Usage | None = None
    """``None``: nothing was reported."""


@attrs.frozen
class Failed:
    """The answer ends here, and is not complete.

    What is decided about a failure is decided by these fields, and never by the code or the status of ``error``, which
    a handler may choose freely.
    """

    error: ApiError
    retryable: bool = False
    """The node that had the call is at fault, and not the request: another replica may be asked, if nothing of the
    answer was delivered."""
    timed_out: bool = False
    """A deadline of the request passed."""


Event: TypeAlias = Head | Data | Done | Failed
