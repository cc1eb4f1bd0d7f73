"""What every handler promises, and how a test is told which promise it broke."""

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
    """The handler does not do what every handler has to do; the subclass says what that is."""


class DoesNotAnswer(BrokenPromise):
    """It answers a request with something that a model of its kind can answer with."""


class DoesNotStop(BrokenPromise):
    """It stops soon after its call was cancelled."""


class LeavesWorkBehind(BrokenPromise):
    """When it has stopped, no slot, task or thread of its call is left."""


class MissesDeadline(BrokenPromise):
    """It stops soon after its deadline."""


class MixesAnswers(BrokenPromise):
    """Two calls at once get the answers that each would have got alone."""


class HidesErrors(BrokenPromise):
    """A request that it cannot answer ends in an error, and not in an answer that looks complete."""


@attrs.frozen
class HandlerReport:
    """What was found out about a handler that kept its promises. Durations are seconds."""

    kind: Kind
    answer: bytes
    """The body of its plain answer."""
    first_output: float
    """How long the first output took."""
    duration: float
    """How long the whole answer took."""
    stopped: Mapping[str, float]
    """How long it took to stop when it was cancelled, by what it was doing then."""
    not_reached: tuple[str, ...]
    """At what else it could not be cancelled, because it had finished before, or because its answers come in one
    piece."""
    replayable: bool
    """It gave the same answer to the same request. Whether two calls at once are mixed up can only be seen then."""
