"""Slots: how many calls run at once, and which of those that wait is next.

A slot that becomes free is handed to the next call in the step in which it becomes free. The task of that call is
scheduled then, and has the slot already. Trio cancels a waiting task only as long as it has not been scheduled, so no
slot is handed to a task that has been cancelled; see ``Slots.wait``.

Which call is next, a :class:`~trio_cluster.core.fair_queue.FairQueue` knows: the principals that wait are served by
their weights, in what their requests will probably cost.

The fast path, a slot that is free, costs no call of a function: a caller that finds ``running < capacity`` adds one to
``running``. No call waits then.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

import attrs
import trio

from ..core.answer import Usage
from ..core.fair_queue import FairQueue, QueueFull, estimated_cost, share_of
from ..core.principal import Principal
from ..core.request import Request

__all__ = ["MAX_WAITING", "Slots", "answered_request", "slots_of_model"]

#: How many calls may wait for a slot. Further ones are refused at once: most of them would only wait to be refused.
MAX_WAITING: Final = 1024

#: The request that the current task answers, for those who wait for further slots on its behalf; ``None`` outside of a
#: call.
answered_request: Final[ContextVar[Request | None]] = ContextVar("answered_request", default=None)


@attrs.define(eq=False)
class _Waiter:
    """A task that waits.

    Attributes:
        task: the task.
        has_slot: it was given one.
    """

    task: trio.lowlevel.Task
    has_slot: bool = False


class Slots:
    """A number of slots, and the calls that wait for one. See the top of this module.

    Args:
        capacity: how many there are.

    Attributes:
        capacity: as given; changed with :meth:`resize` only.
        running: how many are taken. Not more than ``capacity``, unless there are fewer now than there were.
    """

    __slots__ = ("_queue", "capacity", "running")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.running = 0
        self._queue: FairQueue[_Waiter] = FairQueue(MAX_WAITING)

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return len(self._queue)

    def has_room(self, principal: Principal) -> bool:
        """Return whether a call of a principal may wait. Synchronous."""
        return self._queue.has_room(principal.name, share_of(principal))

    async def wait(self, request: Request) -> bool:
        """Wait for a slot. A checkpoint. To be called if none is free.

        A cancelled task has no slot. One that was given a slot is not cancelled here any more.

        Args:
            request: what the slot is for: its principal and its cost decide when it is served.

        Returns:
            Whether the task has a slot now, which it frees with :meth:`release`. ``False``: too many wait.
        """
        waiter = _Waiter(trio.lowlevel.current_task())
        principal = request.principal
        try:
            waiting, dropped = self._queue.push(
                waiter, principal.name, share_of(principal), estimated_cost(request)
            )
        except QueueFull:
            await trio.lowlevel.checkpoint()
            return False
        if dropped is not None:
            trio.lowlevel.reschedule(dropped.task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._queue.discard(waiting)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        return waiter.has_slot

    async def acquire(self, request: Request) -> bool:
        """Take a slot, and wait for it if none is free. A checkpoint. See :meth:`wait`."""
        if self.running >= self.capacity:
            return await self.wait(request)
        await trio.lowlevel.checkpoint_if_cancelled()
        self.running += 1
        await trio.lowlevel.cancel_shielded_checkpoint()
        return True

    def release(self) -> None:
        """Free a slot, and hand it to the next call that waits. Synchronous."""
        self.running -= 1
        self.hand_over()

    def settle(self, request: Request, usage: Usage) -> None:
        """Take note of what a call that has waited did cost. Synchronous.

        Args:
            request: what the call was for.
            usage: the tokens of its answer. Those from a prompt cache cost nothing.
        """
        cost = usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens
        self._queue.settle(request.principal.name, cost - estimated_cost(request))

    def hand_over(self) -> None:
        """Hand the slots that are free to the calls that wait. Synchronous."""
        while self.running < self.capacity and len(self._queue):
            waiter = self._queue.pop()
            self.running += 1
            waiter.has_slot = True
            trio.lowlevel.reschedule(waiter.task)

    def resize(self, capacity: int) -> None:
        """Change how many slots there are. Synchronous.

        If there are fewer now, those that are taken stay taken, and no further one is until enough of them are free.
        """
        self.capacity = capacity
        self.hand_over()


def slots_of_model(max_concurrency: int) -> Slots:
    """Return the slots of one model, which a user has asked for.

    Raises:
        TypeError: ``max_concurrency`` is not an integer.
        ValueError: it is less than 1.
    """
    if not isinstance(max_concurrency, int) or isinstance(max_concurrency, bool):
        raise TypeError(f"max_concurrency must be an integer, not {max_concurrency!r}")
    if max_concurrency < 1:
        raise ValueError(f"max_concurrency must be at least 1, not {max_concurrency}")
    return Slots(max_concurrency)
