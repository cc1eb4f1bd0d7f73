"""A reservation: what one request holds of its key's limits, from its admission until its work has really stopped.

A request may have several calls: a call that fails through no fault of the request is opened once more on another
replica. All of them share the request's one reservation. It is settled, exactly once, when the last of the following
has happened:

- the work of every call has really stopped (``Call.release``), which may be long after the answer has ended;
- no further call can come: the last call did not fail in a way that is retried, or the request is over.

What is settled, for each call:

===========================================================  ========================================================
the call                                                     counts as
===========================================================  ========================================================
is complete, and its usage is known                          that usage
is complete, and its usage is not known                      all that was reserved: nothing is guessed
is complete, and is an error of the server behind the model  nothing, unless its usage is known
has failed, or was cancelled, before its answer began        nothing
has failed, or was cancelled, after that                     the estimate for the prompt, and a token for every two
                                                             bytes of the answer so far; at most what was reserved
===========================================================  ========================================================

A request for which no call was opened frees everything, and does not count as a request.

All of that is synchronous, and hangs on the release of calls, which the law of lifetimes guarantees. So a reservation
cannot leak, however a request ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from ..core.answer import Done, Failed, Usage
from ..core.call import Call
from .account import MOST_TOKENS, Demand, LimitState
from .estimate import BYTES_PER_TOKEN

__all__ = ["Reservation", "Settle"]

#: ``settle(tokens, counts)``: called once, when a reservation is over. ``tokens``: that were used; ``None``: those that
#: were reserved. ``counts``: whether it counts as a request. Synchronous; must not raise.
Settle: TypeAlias = Callable[[int | None, bool], None]


#: A passthrough model relays answers of this status, and of higher ones, which are errors.
_FIRST_ERROR: Final = 400


def _no_lesson(_: Call, usage: Usage) -> None:
    pass


class Reservation:
    """See the top of this module. All methods are synchronous.

    Args:
        demand: that it was made for.
        tokens: that are reserved.
        state: what is left of the limits after it.
        settle: books the end.
        learn: called with each call whose usage is known.

    Attributes:
        tokens, state: as given.
        settled: it is over.
    """

    __slots__ = (
        "_calls",
        "_demand",
        "_had_calls",
        "_learn",
        "_request_over",
        "_settle",
        "_used",
        "settled",
        "state",
        "tokens",
    )

    def __init__(
        self,
        demand: Demand,
        tokens: int,
        state: LimitState,
        settle: Settle,
        learn: Callable[[Call, Usage], None] = _no_lesson,
    ) -> None:
        self.tokens = tokens
        self.state = state
        self.settled = False
        self._demand = demand
        self._settle = settle
        self._learn = learn
        self._calls = 0  # whose work has not stopped
        self._had_calls = False
        self._request_over = False
        self._used: int | None = 0

    def follow(self, call: Call) -> None:
        """Hold the reservation until the work of this call has stopped, too."""
        self._calls += 1
        self._had_calls = True
        call.on_release(partial(self._released, call))

    def end_request(self) -> None:
        """Say that no further call will be opened for the request. Idempotent."""
        if not self._request_over:
            self._request_over = True
            self._settle_if_over()

    def _released(self, call: Call) -> None:
        self._calls -= 1
        if self._used is not None:
            used = self._used_by(call)
            self._used = None if used is None else self._used + used
        if not _may_be_retried(call):
            self._settle_if_over(last=True)
        else:
            self._settle_if_over()

    def _settle_if_over(self, *, last: bool = False) -> None:
        if self._calls or self.settled or not (last or self._request_over):
            return
        self.settled = True
        self._settle(self._used, self._had_calls)

    def _used_by(self, call: Call) -> int | None:
        end = call.end
        if isinstance(end, Done):
            if end.usage is None:
                return None if call.status < _FIRST_ERROR else 0
            self._learn(call, end.usage)
            return min(end.usage.prompt_tokens + end.usage.completion_tokens, MOST_TOKENS)
        if not call.begun:
            return 0
        return min(self.tokens, self._demand.prompt + call.produced // BYTES_PER_TOKEN)


def _may_be_retried(call: Call) -> bool:
    end = call.end
    return isinstance(end, Failed) and end.movable and not call.begun and call.cancelled is None
