"""The contract of handlers: what every handler promises, and the exceptions that name a broken promise."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from ..core.model import Kind

__all__ = [
    "BrokenPromise",
    "DoesNotAnswer",
    "DoesNotStop",
    "HandlerReport",
    "HidesErrors",
    "LeavesWorkBehind",
    "MissesDeadline",
    "MixesAnswers",
]


class BrokenPromise(AssertionError):
    """The handler breaks the contract of handlers. The subclass is named for the promise, the message says how."""


class DoesNotAnswer(BrokenPromise):
    """Promise: it answers a request with output that a model of its kind can give."""


class DoesNotStop(BrokenPromise):
    """Promise: it stops soon after its call was cancelled."""


class LeavesWorkBehind(BrokenPromise):
    """Promise: when it has stopped, no slot, task or thread of its call is left."""


class MissesDeadline(BrokenPromise):
    """Promise: it stops soon after its deadline."""


class MixesAnswers(BrokenPromise):
    """Promise: two concurrent calls get the responses that each would have got alone."""


class HidesErrors(BrokenPromise):
    """Promise: a request that it cannot answer ends in an error, not in a response that looks complete."""


@attrs.frozen
class HandlerReport:
    """What was measured of a handler that kept its promises. Durations are seconds."""

    kind: Kind
    answer: bytes
    """The body of its response without streaming."""
    first_output: float
    """How long the first output took."""
    duration: float
    """How long the whole response took."""
    stopped: Mapping[str, float]
    """How long it took to stop when it was cancelled, by the phase in which it was."""
    not_reached: tuple[str, ...]
    """The phases in which it could not be cancelled, because it had finished before, or because its responses come in
    one piece."""
    replayable: bool
    """It gave the same response to the same request. Only then can it be seen whether concurrent calls are mixed up."""
