"""The slots of a process, and one task for each call that the process answers itself.

Every call has one task, in the pool's nursery, from the moment it is opened until its work has really stopped. The task
waits until the request's body has arrived, then for a slot, and does the work inside the call's cancel scope. What the
work is, a :class:`~trio_cluster.local.task.CallTask` knows.

Slots are a ``trio.CapacityLimiter``: fair, and resizable while calls run. A slot is freed in the task's ``finally``,
when the work has stopped, and not when it was asked to stop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final, TypeAlias

import trio

from ..core.call import Call
from ..core.log_context import current_principal, current_request
from ..core.request import Request
from ..errors import HandlerFailed, Overloaded, ShuttingDown
from ..options import ClusterServerOptions
from ..routing.backend import LOCAL
from .task import CallTask

__all__ = ["MAX_WAITING", "HandlerPool"]

logger = logging.getLogger("trio_cluster.handlers")

#: How many calls may wait for a slot. Further ones are refused at once: most of them would only wait to be refused.
MAX_WAITING: Final = 1024

MakeTask: TypeAlias = Callable[[Call, trio.CancelScope, ClusterServerOptions], CallTask]


class HandlerPool:
    """The slots of this process, and the nursery in which its calls are answered.

    Args:
        options: read at the time of use, so that a change applies to the calls that come after it.

    Attributes:
        options: as given; replaced as a whole only while nothing runs.
        slots: the slots for handlers.
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
        """How many calls have a task here: those that wait, those that run, and those that are stopping."""
        return 0 if self._nursery is None else len(self._nursery.child_tasks)

    def resize(self) -> None:
        """Set the number of slots to ``max_concurrency``. Synchronous.

        If there are fewer now, handlers that run over the new number go on, and no further one starts until they are
        done.
        """
        self.slots.total_tokens = self.options.server.max_concurrency

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run calls until cancelled; then cancel those that run, and wait until their work has stopped."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def start(self, request: Request, make_task: MakeTask) -> Call:
        """Open a call for ``request``, and start its task. Synchronous.

        Args:
            request: what is to be answered.
            make_task: called with the call, its cancel scope and the options.

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
        """Run the task of one call. However it ends, the call is ended and released, and the nursery sees no error."""
        request = call_task.call.request
        current_request.set(request.request_id)
        current_principal.set(request.principal.name)
        # The scope's deadline does not stop a handler that shields itself. The gateway's own deadline then answers the
        # client, and the slot stays taken until the handler is really done.
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
                # The handler opened a cancel scope around a `yield`, and the scope expired or was left while the
                # handler was parked there. No scope that is still open catches its Cancelled.
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
        """Wait for a slot if the work needs one, do the work, and free the slot."""
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
        """Return the seconds after which a client should try again.

        It is a guess, since it is unknown how long handlers take: as long as the wait that was just in vain.
        """
        return max(1.0, min(self.options.server.queue_timeout, 60.0))
