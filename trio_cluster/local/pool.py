"""The slots of a process, and one task for each call that it answers itself.

Every call has one task, in the pool's nursery, from the moment it is opened until its work has really stopped. The
task waits until the request's body is there, then for a slot, and does the work inside the call's cancel scope. What
the work is, an :class:`CallTask` knows: a user's handler, or a relay to another server.

Time. The scope's deadline is the request's real deadline: the earlier of "nothing may be silent for longer than
this" and "the whole answer must be there by then". Each piece of output moves the first one on. While the body is
still coming, or the client is slow to read, the silence is the client's, and does not count.

Slots are a ``trio.CapacityLimiter``: fair, resizable while calls run, and freed in the task's ``finally``, when the
work has stopped. Not when somebody asked it to.
"""

from __future__ import annotations

import abc
import logging
import math
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import trio

from ..core.answer import Failed
from ..core.call import Call
from ..core.log_context import current_principal, current_request
from ..core.request import Request
from ..errors import ApiError, HandlerFailed, Overloaded, ShuttingDown, TooSlow
from ..options import ClusterServerOptions
from ..routing.backend import LOCAL

__all__ = ["MAX_OUTPUTS_PER_TURN", "MAX_WAITING", "CallTask", "HandlerPool", "is_failure"]

logger = logging.getLogger("trio_cluster.handlers")

#: How many calls may wait for a slot; one more is refused at once, since it would only wait to be refused.
MAX_WAITING: Final = 1024

#: How many pieces of output a call may put, and for how many seconds, before the other tasks of its node run.
MAX_OUTPUTS_PER_TURN: Final = 4
TURN: Final = 0.0002


def is_failure(error: BaseException) -> bool:
    """Tell a handler that failed from one that was only cancelled, or interrupted from the keyboard.

    A group may hold this call's Cancelled beside what the handler's own tasks raised. It may then be swallowed: it
    has done what it is for, and nothing is awaited any more until the end of the call's task.
    """
    if not isinstance(error, BaseExceptionGroup):
        return True
    return error.subgroup(KeyboardInterrupt) is None and error.split(trio.Cancelled)[1] is not None


def _api_error_in(error: BaseException) -> ApiError | None:
    """Find the one ``ApiError`` in what a handler's own nursery raised, if that is all there is in it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, ApiError) else None


class CallTask(abc.ABC):
    """One call's answer in the making: its time, and the work that makes it.

    Attributes:
        call: whose answer it is.
        slots: what the work needs one of; ``None``: nothing.
    """

    slots: trio.CapacityLimiter | None

    def __init__(self, call: Call, scope: trio.CancelScope, options: ClusterServerOptions) -> None:
        self.call = call
        self._scope = scope
        self._idle_timeout = min(call.request.idle_timeout, options.server.default_timeout)
        # Half as much as to look for the clock each time.
        self._now = trio.lowlevel.current_clock().current_time
        self._deadline = self._now() + call.request.total_timeout
        self._turn_ends = -math.inf
        self._left_in_turn = 0
        self.restart_idle_timer()

    @abc.abstractmethod
    async def prepare(self) -> None:
        """Do what needs no slot. Raises nothing but ``trio.Cancelled``."""

    @abc.abstractmethod
    async def work(self) -> None:
        """Answer the call, in the slot that the caller holds. Raises nothing but ``trio.Cancelled``."""

    def restart_idle_timer(self) -> None:
        """Let the silence begin now: the work is late if nothing comes of it from now on."""
        self._scope.deadline = min(self._now() + self._idle_timeout, self._deadline)

    def pause_idle_timer(self) -> None:
        """Let there be silence, until :meth:`restart_idle_timer`: it is not the work that is waited for."""
        self._scope.deadline = self._deadline

    async def apply_backpressure(self) -> None:
        """Wait while the client is slow to take what has been put; its time does not count.

        Looks for a cancellation in any case. Lets others run when the work has not done so itself for a while: one that
        waits for each piece of its output need not be scheduled twice for it, and of one that never waits a few pieces
        leave together, which costs everybody on their way a fraction of what each alone would.
        """
        if self.call.body.waiting_bytes >= self.call.body.window:
            self.pause_idle_timer()
            await self.call.body.wait_room()
            return
        task = trio.lowlevel.current_task()
        # Trio makes this None whenever it schedules the task.
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
        """Return what to tell the client when the scope's deadline has passed."""
        if trio.current_time() >= self._deadline:
            # Not the number: of what the client has given, other nodes may have used up a part.
            return TooSlow("The answer was not complete within the time that its client gives it")
        return TooSlow(f"The model gave nothing for {self._idle_timeout:g} s")

    def fail(self, error: ApiError, *, retryable: bool = False, timed_out: bool = False) -> None:
        """End the answer with an error; without effect after its end. The flags are those of ``Failed``."""
        if not self.call.ended:
            self.call.put(Failed(error, retryable, timed_out))

    def to_api_error(self, error: BaseException) -> ApiError:
        """Return what the client is told of something that a handler raised; the rest is for the log."""
        call_task = _api_error_in(error)
        if call_task is None:
            logger.error(
                "the handler of '%s' failed", self.call.request.model, exc_info=error, extra=self.log_fields()
            )
            return HandlerFailed()
        return call_task

    def log_fields(self) -> dict[str, Any]:
        """Return what a log line about the call should carry."""
        request = self.call.request
        return {"fields": {"model": request.model, "request_id": request.request_id}}


MakeTask: TypeAlias = Callable[[Call, trio.CancelScope, ClusterServerOptions], CallTask]


class HandlerPool:
    """The slots of this process and the nursery in which its calls are answered.

    Args:
        options: read at the time of use, so that a change acts at once on calls that come after it.

    Attributes:
        slots: what handlers run in.
        waiting: how many calls wait for a slot.
    """

    def __init__(self, options: ClusterServerOptions) -> None:
        self.options = options
        self.slots = trio.CapacityLimiter(options.server.max_concurrency)
        self._nursery: trio.Nursery | None = None
        self.waiting = 0

    @property
    def running(self) -> int:
        """How many handlers hold a slot."""
        return int(self.slots.borrowed_tokens)

    @property
    def capacity(self) -> int:
        """How many handlers may run at once."""
        return int(self.slots.total_tokens)

    @property
    def tasks(self) -> int:
        """How many calls have a task here: those that wait, those that run, and those that wind down."""
        return 0 if self._nursery is None else len(self._nursery.child_tasks)

    def resize(self) -> None:
        """Make the number of slots what the options say; handlers over a smaller one run on, but no new one starts."""
        self.slots.total_tokens = self.options.server.max_concurrency

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run handlers until cancelled; then cancel those that run and wait until they have stopped."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def start(self, request: Request, make_task: MakeTask) -> Call:
        """Begin to answer ``request``.

        Raises:
            ShuttingDown: the pool is not being served.
            Overloaded: too many calls wait already.
        """
        if self._nursery is None:
            raise ShuttingDown
        if self.capacity != self.options.server.max_concurrency:
            self.resize()
        if self.waiting >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} requests are waiting already", retry_after=self._retry_after())
        scope = trio.CancelScope()
        call = Call(request, served_by=LOCAL, on_cancel=lambda reason: scope.cancel(reason=reason))
        call_task = make_task(call, scope, self.options)
        self._nursery.start_soon(self._run, call_task, scope, name=f"answer {request.model}")
        return call

    async def _run(self, call_task: CallTask, scope: trio.CancelScope) -> None:
        """Be the task of one call. Whatever happens inside, the call is ended and released, and nothing leaks out."""
        request = call_task.call.request
        current_request.set(request.request_id)
        current_principal.set(request.principal.name)
        # The scope's deadline cannot tell a handler that it is late once it shields itself; the relay's own deadline
        # answers the client then, and the slot stays taken until the handler is really done.
        try:
            with scope:
                await call_task.prepare()
                await self._in_slot(call_task)
            if scope.cancelled_caught:
                error = call_task.timeout_error()
                if not call_task.call.ended:
                    logger.warning("no answer in time: %s", error.message, extra=call_task.log_fields())
                call_task.fail(error, timed_out=True)
        except (trio.Cancelled, Exception) as error:  # noqa: ASYNC103
            if isinstance(error, trio.Cancelled) and trio.current_effective_deadline() == -math.inf:
                raise
            if isinstance(error, trio.Cancelled | RuntimeError):
                # A scope that the handler opened around a `yield` expired, or was left, while the handler was parked
                # there: its Cancelled belongs to nobody any more.
                text = "a cancel scope of the handler leaked"
            else:
                text = "a call failed unexpectedly"
            # Only this call is wrong; the others share its nursery.
            logger.exception(text, extra=call_task.log_fields())
            self._fail_after_error(call_task)
        finally:
            call_task.call.release()

    def _fail_after_error(self, call_task: CallTask) -> None:
        try:
            call_task.fail(HandlerFailed())
        except Exception:
            # The consumer of the call is what fails. The call ends by its release.
            logger.exception("a call could not be failed", extra=call_task.log_fields())

    async def _in_slot(self, call_task: CallTask) -> None:
        call, slots = call_task.call, call_task.slots
        if call.end is not None:
            return
        if slots is None:
            await call_task.work()
            return
        try:
            slots.acquire_on_behalf_of_nowait(call)
        except trio.WouldBlock:
            self.waiting += 1
            call.set_queued(True)
            try:
                with trio.move_on_after(self.options.server.queue_timeout) as wait:
                    await slots.acquire_on_behalf_of(call)
            finally:
                self.waiting -= 1
                call.set_queued(False)
            if wait.cancelled_caught:
                call_task.fail(self._over_capacity(slots))
                return
        try:
            await call_task.work()
        finally:
            slots.release_on_behalf_of(call)

    def _over_capacity(self, slots: trio.CapacityLimiter) -> Overloaded:
        return Overloaded(
            f"All {int(slots.total_tokens)} slots stayed busy for {self.options.server.queue_timeout:g} s",
            retry_after=self._retry_after(),
        )

    def _retry_after(self) -> float:
        # Nobody knows how long handlers take; the wait that was just in vain is the best guess there is.
        return max(1.0, min(self.options.server.queue_timeout, 60.0))
