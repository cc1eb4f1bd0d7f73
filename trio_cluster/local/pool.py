"""The slots of a process, and one task for each call that the process answers itself.

Every call has one task, in the pool's nursery, from the moment it is opened until its work has really stopped. The task
waits until the request's body has arrived, then for a slot, and does the work inside the call's cancel scope. What the
work is, a :class:`~trio_cluster.local.task.CallTask` knows.

A model may have slots of its own, which bound how many of its calls run at once. A call waits for one of these first,
and takes no slot of the process meanwhile; so a model with few slots does not keep the others waiting. Both waits
together last ``queue_timeout`` at most.

Slots are given to those that wait by fair queueing between principals (``slots.py``), and their number can be changed
while calls run. A slot is freed in the task's ``finally``, when the work has stopped, and not when it was asked to
stop.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

import trio

from ..core import clock
from ..core.answer import Done
from ..core.call import Call
from ..core.log_context import current_principal, current_request
from ..core.model_state import CONTROL
from ..core.request import Request
from ..errors import ApiError, HandlerFailed, Overloaded, ShuttingDown
from ..on_demand.memory import available_memory
from ..on_demand.residents import OnDemand, Tenancy
from ..options import ClusterServerOptions
from ..routing.backend import LOCAL
from .asyncio_loop import AsyncioLoops
from .slots import MAX_WAITING, Slots, answered_request
from .task import CallTask

__all__ = ["HandlerPool"]

logger = logging.getLogger("trio_cluster.handlers")


def _is_interrupt(error: BaseException) -> bool:
    return isinstance(error, BaseExceptionGroup) and error.subgroup(KeyboardInterrupt) is not None


def _settle(call: Call, slots: Slots) -> None:
    """Correct what a call was charged for its slot by what it has reported."""
    if isinstance(call.end, Done) and call.end.usage is not None:
        slots.settle(call.request, call.end.usage)


MakeTask: TypeAlias = Callable[[Call, trio.CancelScope, ClusterServerOptions], CallTask]


class HandlerPool:
    """The slots of this process, and the nursery in which its calls are answered.

    Args:
        options: read at the time of use, so that a change applies to the calls that come after it.

    Attributes:
        options: as given; replaced as a whole only while nothing runs.
        slots: the slots for handlers.
        loops: the asyncio loops that handlers run on; the node runs them for as long as it serves the pool.
        on_demand: the models that run only while they are asked for; a call for one waits until it runs.
        node_name: the name of the node that runs, which handlers see; empty while none runs.
        waiting: how many calls wait for a slot, those of models with slots of their own included.
        waiting_by: how many of these each principal has, by name.
    """

    def __init__(self, options: ClusterServerOptions) -> None:
        self.options = options
        self.slots = Slots(options.server.max_concurrency)
        self.loops = AsyncioLoops()
        self.on_demand = OnDemand(self._memory)
        self.node_name = ""
        self._nursery: trio.Nursery | None = None
        self.waiting = 0
        self.waiting_by: Counter[str] = Counter()

    @property
    def running(self) -> int:
        """How many handlers hold a slot."""
        return self.slots.running

    @property
    def capacity(self) -> int:
        """How many handlers may run at once."""
        return self.slots.capacity

    @property
    def tasks(self) -> int:
        """How many calls have a task here: those that wait, those that run, and those that are stopping."""
        return 0 if self._nursery is None else len(self._nursery.child_tasks)

    def resize(self) -> None:
        """Set the number of slots to ``max_concurrency``. Synchronous.

        If there are fewer now, handlers that run over the new number go on, and no further one starts until they are
        done.
        """
        self.slots.resize(self.options.server.max_concurrency)

    def _memory(self) -> float:
        """Return the bytes that there are for models."""
        said = self.options.memory_size
        return available_memory()[0] if said is None else said

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run calls until cancelled; then cancel those that run, and wait until their work has stopped."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def start(
        self, request: Request, make_task: MakeTask, slots: Slots | None, model_slots: Slots | None = None
    ) -> Call:
        """Open a call for ``request``, and start its task. Synchronous.

        Args:
            request: what is to be answered.
            make_task: called with the call, its cancel scope and the options.
            slots: the work needs one of these; ``None``: it needs none.
            model_slots: the work needs one of these as well, and before; ``None``: it needs none.

        Raises:
            ShuttingDown: the pool is not being served.
            Overloaded: too many calls wait already, and the principal has its share of them.
        """
        if self._nursery is None:
            raise ShuttingDown
        if self.slots.capacity != self.options.server.max_concurrency:
            self.resize()
        if self.waiting >= MAX_WAITING:
            first = slots if model_slots is None else model_slots
            if first is not None and not first.has_room(request.principal):
                raise self._queue_full()
        scope = trio.CancelScope()
        call = Call(request, served_by=LOCAL, on_cancel=lambda reason: scope.cancel(reason=reason))
        call_task = make_task(call, scope, self.options)
        self._nursery.start_soon(
            self._run, call_task, scope, slots, model_slots, name=f"answer {request.model}"
        )
        return call

    async def _run(
        self, call_task: CallTask, scope: trio.CancelScope, slots: Slots | None, model_slots: Slots | None
    ) -> None:
        """Run the task of one call. However it ends, the call is ended and released, and the nursery sees no error."""
        request = call_task.call.request
        current_request.set(request.request_id)
        current_principal.set(request.principal.name)
        answered_request.set(request)
        # The scope's deadline does not stop a handler that shields itself. The gateway's own deadline then answers the
        # client, and the slot stays taken until the handler is really done.
        try:
            with scope:
                on_demand = self.on_demand.by_model
                if (
                    on_demand
                    and request.model in on_demand
                    and request.kind != CONTROL
                    and not await self._model_runs(call_task, on_demand[request.model])
                ):
                    # A call that has failed gets no more of its body: preparing it could wait for the rest forever.
                    return
                await call_task.prepare()
                if model_slots is None:
                    await self._in_slot(call_task, slots)
                else:
                    until = trio.current_time() + self.options.server.queue_timeout
                    await self._in_slot(call_task, model_slots, until, slots)
            if scope.cancelled_caught:
                error = call_task.timeout_error()
                if not call_task.call.ended:
                    logger.warning("no answer in time: %s", error.message, extra=call_task.log_fields())
                call_task.fail(error, timed_out=True)
        except (trio.Cancelled, Exception, BaseExceptionGroup) as error:  # noqa: ASYNC103
            if not isinstance(error, Exception) and (
                trio.current_effective_deadline() == -math.inf or _is_interrupt(error)
            ):
                raise
            if isinstance(error, RuntimeError) or not isinstance(error, Exception):
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

    async def _model_runs(self, call_task: CallTask, tenancy: Tenancy) -> bool:
        """Wait until the model of a call runs, and let it run until the call is released; or fail the call.

        Returns whether it runs.

        No slot is held meanwhile, and the idle timeout is paused: the model is not silent, it is not there yet.
        """
        call = call_task.call
        use = self.on_demand.ask(tenancy, call.set_model_wait)
        call.on_release(lambda: use.leave(completed=isinstance(call.end, Done)))
        if use.is_ready:
            return True
        call_task.pause_idle_timer()
        try:
            await use.wait()
        except ApiError as error:
            # Another replica may have it, or have room for it.
            call_task.fail(error, retryable=True, over_capacity=isinstance(error, Overloaded))
            return False
        call_task.restart_idle_timer()
        return True

    def _fail_after_error(self, call_task: CallTask) -> None:
        try:
            call_task.fail(HandlerFailed())
        except Exception:
            # The consumer of the call is what fails. The call ends by its release.
            logger.exception("a call could not be failed", extra=call_task.log_fields())

    async def _in_slot(
        self,
        call_task: CallTask,
        slots: Slots | None,
        until: float = math.inf,
        then: Slots | None = None,
    ) -> None:
        """Wait for a slot if the work needs one, do the work, and free the slot.

        Args:
            call_task: what is to be done.
            slots: the work needs one of these; ``None``: it needs none.
            until: the trio time at which waiting is over, if that is before ``queue_timeout``.
            then: the work needs one of these as well, and after.
        """
        call = call_task.call
        if call.end is not None:
            return
        if slots is None:
            call.started_at = clock.now()
            if call.request.trace is not None:
                call.request.trace.enter()
            await call_task.work()
            return
        has_waited = slots.running >= slots.capacity
        if not has_waited:
            slots.running += 1
        elif not await self._wait(call_task, slots, until):
            return
        try:
            # It may have ended between being given the slot and running again.
            if call.end is None:
                if then is None:
                    call.started_at = clock.now()
                    if call.request.trace is not None:
                        call.request.trace.enter()
                    await call_task.work()
                else:
                    await self._in_slot(call_task, then, until)
        finally:
            slots.running -= 1
            if self.waiting:
                if has_waited:
                    _settle(call, slots)
                slots.hand_over()

    async def _wait(self, call_task: CallTask, slots: Slots, until: float) -> bool:
        """Wait for a slot, and return whether the call has one. Otherwise it has failed."""
        call = call_task.call
        name = call.request.principal.name
        has_slot = False
        self.waiting += 1
        self.waiting_by[name] += 1
        call.set_queued(True)
        since = clock.now()
        if call.queued_at < 0:
            call.queued_at = since
        try:
            until = min(until, trio.current_time() + self.options.server.queue_timeout)
            with trio.move_on_at(until) as timeout:
                has_slot = await slots.wait(call.request)
        finally:
            self.waiting -= 1
            self.waiting_by[name] -= 1
            if not self.waiting_by[name]:
                del self.waiting_by[name]
            call.set_queued(False)
            if slots is self.slots:
                call.queued_for += clock.now() - since
            else:
                call.queued_for_model += clock.now() - since
        if not has_slot:
            error = self._over_capacity(slots) if timeout.cancelled_caught else self._queue_full()
            call_task.fail(error, over_capacity=True)
        return has_slot

    def _queue_full(self) -> Overloaded:
        return Overloaded(f"{MAX_WAITING} requests are waiting already", retry_after=self._retry_after())

    def _over_capacity(self, slots: Slots) -> Overloaded:
        return Overloaded(
            f"All {slots.capacity} slots stayed busy for {self.options.server.queue_timeout:g} s",
            retry_after=self._retry_after(),
        )

    def _retry_after(self) -> float:
        """Return the seconds after which a client should try again.

        It is a guess, since it is unknown how long handlers take: as long as the wait that was just in vain.
        """
        return max(1.0, min(self.options.server.queue_timeout, 60.0))
