"""One call's task: its time limits, its turns on the event loop, and the errors that end its answer.

A :class:`CallTask` is what the pool (``pool.py``) runs for a call that is answered in this process. The subclasses know
what the work is: a user's handler (``handler.py``), or a relay to another server (``passthrough.py``).

Time limits. The deadline of the task's cancel scope is the request's real deadline: the earlier one of the idle timeout
(how long the work may produce nothing) and the total timeout (when the whole answer must be complete). Each piece of
output restarts the idle timer. The timer is paused while the request's body is still arriving, and while the client is
slow to read, since the work cannot do anything about either.

Turns. A task that puts output without ever waiting would keep the event loop from all other tasks. So it is rescheduled
after a few pieces, or after a fraction of a millisecond, whichever comes first; see
:meth:`CallTask.apply_backpressure`.
"""

from __future__ import annotations

import abc
import logging
import math
from typing import Any, Final

import trio

from ..core.answer import Failed
from ..core.call import Call
from ..core.exhaustion import exhausted_resource
from ..core.threads import thread_shortage
from ..errors import ApiError, HandlerFailed, Overloaded, TooSlow
from ..options import ClusterServerOptions

__all__ = ["MAX_OUTPUTS_PER_TURN", "TURN", "CallTask", "is_failure"]

logger = logging.getLogger("trio_cluster.handlers")

#: One turn of a call on the event loop: how many pieces of output it may put, and for how many seconds, before the
#: other tasks of its node run.
MAX_OUTPUTS_PER_TURN: Final = 4
TURN: Final = 0.0002


def is_failure(error: BaseException) -> bool:
    """Return whether a handler failed, as opposed to being cancelled or interrupted from the keyboard.

    A group may hold this call's ``Cancelled`` beside the errors of tasks that the handler started. Such a group is a
    failure, and it may be swallowed together with the ``Cancelled`` in it: the work has stopped, which is all that the
    cancellation was for, and nothing is awaited between here and the end of the call's task.

    Args:
        error: what the handler raised: an ``Exception``, a group, or ``SystemExit``.
    """
    if not isinstance(error, BaseExceptionGroup):
        return True
    return error.subgroup(KeyboardInterrupt) is None and error.split(trio.Cancelled)[1] is not None


def _api_error_in(error: BaseException) -> ApiError | None:
    """Return the ``ApiError`` that a handler raised, also out of nurseries of its own; ``None`` if it raised others."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, ApiError) else None


#: What libraries raise that meet the wrong event loop, and what to do about it.
_WRONG_LOOP: Final = {
    "no running event loop": "it uses asyncio, and handlers run on trio; register from_asyncio(handler)",
    "There is no current event loop": "it uses asyncio, and handlers run on trio; register from_asyncio(handler)",
    "unrecognized yield message": "it awaits something of asyncio, and handlers run on trio; register "
    "from_asyncio(handler)",
    "must be called from async context": "it uses trio outside of trio; a handler of from_asyncio(handler) runs on "
    "asyncio",
}


def _hint(error: BaseException | None) -> str:
    """Return what to do about an error by which a handler has met the wrong event loop; empty for all others."""
    for _ in range(10):
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, (RuntimeError, TypeError)):
            text = str(error)
            for words, hint in _WRONG_LOOP.items():
                if words in text:
                    return hint
        if error is None:
            break
        error = error.__cause__ or error.__context__
    return ""


class CallTask(abc.ABC):
    """The work for one call. See the top of this module.

    Args:
        call: the call that is answered.
        scope: the cancel scope in which the pool runs the work; its deadline is kept here.
        options: the node's; ``default_timeout`` is read once.

    Attributes:
        deadline: the trio time at which the whole answer must be there.
        call: as given.
    """

    def __init__(self, call: Call, scope: trio.CancelScope, options: ClusterServerOptions) -> None:
        self.call = call
        self._scope = scope
        self._idle_timeout = min(call.request.idle_timeout, options.server.default_timeout)
        # The bound method costs half of what trio.current_time() does, and is called for each piece of output.
        self._now = trio.lowlevel.current_clock().current_time
        self.deadline = self._now() + call.request.total_timeout
        self._turn_ends = -math.inf
        self._left_in_turn = 0
        self.restart_idle_timer()

    @abc.abstractmethod
    async def prepare(self) -> None:
        """Do the part of the work that needs no slot. Raises nothing but ``trio.Cancelled``."""

    @abc.abstractmethod
    async def work(self) -> None:
        """Answer the call, in the slot that the pool holds. Raises nothing but ``trio.Cancelled``."""

    def restart_idle_timer(self) -> None:
        """Count the idle timeout from now on: the work is late if it produces nothing until then. Synchronous."""
        self._scope.deadline = min(self._now() + self._idle_timeout, self.deadline)

    def pause_idle_timer(self) -> None:
        """Suspend the idle timeout until :meth:`restart_idle_timer`; the total timeout goes on. Synchronous."""
        self._scope.deadline = self.deadline

    # Trio sets `Task.custom_sleep_data` to None whenever it schedules the task, and leaves it alone while the task
    # runs. The attribute is for code that is about to sleep and keeps a note for its own abort function, as ParkingLot
    # does. Such code writes it directly before it yields, so between two yields the value is ours. Hence the test
    # below: while our mark is still there, the scheduler has not run this task since the last piece, and the turn goes
    # on. If the mark is gone, the task has slept or passed a checkpoint, the other tasks have had their chance, and a
    # new turn begins.
    #
    # This saves a checkpoint for each token, which is one more pass through the scheduler (about 5 µs). The usual
    # handler waits for each token, for instance for a thread or another server. It has been rescheduled by that
    # already, and need not be a second time for putting what it got. A handler that never waits is rescheduled after
    # MAX_OUTPUTS_PER_TURN pieces, which then leave together, so that the path behind them is paid for once.
    #
    # What would break it: a trio that no longer resets the attribute (the answers stay right, but each piece then costs
    # a checkpoint), or one that objects to a value which it finds when a task yields (each push would fail).
    # `tests/local/test_task.py` holds the installed trio to both.
    async def apply_backpressure(self) -> None:
        """Wait while the client is slow to take what was put; the idle timer is paused meanwhile.

        To be called after each piece of output. It always raises ``trio.Cancelled`` if the call was cancelled. It lets
        other tasks run only if this one has had its turn without waiting for anything, so it is a full checkpoint only
        for some of the calls. The caller restarts the idle timer afterwards.
        """
        if self.call.body.waiting_bytes >= self.call.body.window:
            self.pause_idle_timer()
            await self.call.body.wait_room()
            return
        task = trio.lowlevel.current_task()
        if task.custom_sleep_data is not self:
            task.custom_sleep_data = self
            self._left_in_turn = MAX_OUTPUTS_PER_TURN
            self._turn_ends = self._now() + TURN
        elif self._left_in_turn == 1 or self._now() >= self._turn_ends:
            await trio.lowlevel.checkpoint()
            return
        self._left_in_turn -= 1
        await trio.lowlevel.checkpoint_if_cancelled()

    def timeout_error(self) -> TooSlow:
        """Return the error for the client when the scope's deadline has passed."""
        if trio.current_time() >= self.deadline:
            # Without the number of seconds: a part of the client's total timeout may have been spent on other nodes.
            return TooSlow("The answer was not complete within the total timeout of the request")
        return TooSlow(f"The model produced nothing for {self._idle_timeout:g} s")

    def fail(
        self,
        error: ApiError,
        *,
        retryable: bool = False,
        timed_out: bool = False,
        over_capacity: bool = False,
    ) -> None:
        """End the answer with an error; without effect if it has ended. The flags are those of ``Failed``."""
        if not self.call.ended:
            self.call.put(Failed(error, retryable, timed_out, over_capacity))

    def to_api_error(self, error: BaseException) -> ApiError:
        """Return the error for the client, given what a handler raised.

        An ``ApiError`` goes to the client as it is. Anything else is logged with its traceback, and becomes a
        ``HandlerFailed`` that shows nothing of it. What says that this machine has run out of something is no failure
        of the model: it becomes an ``Overloaded``.
        """
        api_error = _api_error_in(error) or thread_shortage(error)
        if api_error is not None:
            return api_error
        text = "the handler of '%s' failed"
        if hint := _hint(error):
            text = f"{text}: {hint}"
        logger.error(text, self.call.request.model, exc_info=error, extra=self.log_fields())
        if self.call.request.trace is not None:
            self.call.request.trace.failed(error)
        if resource := exhausted_resource(error):
            return Overloaded(f"This server is out of resources: {resource}; try again shortly")
        return HandlerFailed()

    def log_fields(self) -> dict[str, Any]:
        """Return what a log line about the call should carry, as the ``extra`` argument of a logging call."""
        request = self.call.request
        return {"fields": {"model": request.model, "request_id": request.request_id}}
