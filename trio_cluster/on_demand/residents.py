"""The residents of a node: runs what the schedule decides to start, and lets requests wait for it.

Theory of operation
===================

The owner of a resident, an engine, brings an asynchronous context manager: entering it is the start, leaving it the
stop. :meth:`OnDemand.run` is a task of the owner. It enters and leaves the context each time that the schedule
(``schedule.py``) decides so, so that nothing of a resident outlives its owner.

Everything that happens is reported to the schedule where it happens, synchronously, and :meth:`OnDemand.update` then
carries out what follows: it wakes tasks, and nothing in it waits. There is no task of its own for that. What follows
from the time alone is noticed by the tasks of the residents, which sleep until the next such time of their own.

A start is bounded by ``start_timeout``, and so is the wait for memory before it. The context is left inside of a
cancelled scope if its start is given up or has taken too long; it shields what it needs for a proper end.

*Requests.* Whoever answers a request asks for a resident (:meth:`OnDemand.ask`), waits until it is ready
(:meth:`Use.wait`), and says when the work is over (:meth:`Use.leave`). The handlers of a node are spared that: the pool
does it for every model that a resident serves (``local/pool.py``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final, TypeAlias

import attrs
import trio

from ..core.model_state import ModelState, ModelWait
from ..errors import ApiError, ClusterError, ModelStartFailed, Overloaded, ShuttingDown
from .schedule import Resident, Schedule, Waiter

__all__ = ["OnDemand", "Open", "Run", "Tenancy", "Use"]

logger = logging.getLogger("trio_cluster.on_demand")

#: Seconds that a start may take, and the wait for memory before it, unless the owner says something else.
START_TIMEOUT: Final = 300.0


class Run:
    """One run of a resident, for its owner: what the owner reports of it. All methods are synchronous.

    Attributes:
        output: returns what a person should see if the start fails, such as the last lines of a program; may be
            replaced by the owner.
    """

    def __init__(self, on_takes: Callable[[int], None], on_lost: Callable[[str], None]) -> None:
        self.output: Callable[[], str] = str
        self._on_takes = on_takes
        self._on_lost = on_lost

    def takes(self, size: int) -> None:
        """Report how many bytes of memory it takes, any number of times; the largest number counts."""
        self._on_takes(size)

    def lost(self, why: str) -> None:
        """Report that it has died after it was ready: it gets no further requests, and its context is left."""
        self._on_lost(f"{why}: {output}" if (output := self.output()) else why)


#: Opens one run of a resident: entering the context starts it, and gives what :attr:`Tenancy.value` is then; leaving it
#: stops it, and frees its memory.
Open: TypeAlias = Callable[[Run], AbstractAsyncContextManager[Any]]


class Tenancy:
    """A resident, how it is run, and the models that it serves. Made by :meth:`OnDemand.add`.

    Attributes:
        resident: what the schedule knows of it.
        models: the names of the models that it serves.
        start_timeout: seconds that its start may take.
        value: what its context has given, while it is ready or stopping; otherwise ``None``.
    """

    def __init__(
        self, resident: Resident, models: tuple[str, ...], open_: Open, start_timeout: float
    ) -> None:
        self.resident = resident
        self.models = models
        self.start_timeout = start_timeout
        self.value: Any = None
        self.open = open_
        # Wakes the task that runs it.
        self.changed = trio.lowlevel.ParkingLot()
        # While it starts, so that the start can be given up.
        self.start_scope: trio.CancelScope | None = None
        # While it is ready: wakes the task when a decision may follow from the time.
        self.timer: trio.CancelScope | None = None


@attrs.define(eq=False)
class Use:
    """One request for a resident, from :meth:`OnDemand.ask`.

    Attributes:
        waiter: what the schedule knows of it.
        on_wait: called with what it waits for whenever that changes, and with ``None`` when it waits no more.
            Synchronous; must not raise.
    """

    _on_demand: OnDemand
    _tenancy: Tenancy
    waiter: Waiter
    on_wait: Callable[[ModelWait | None], None] = attrs.field(default=lambda wait: None)
    _event: trio.Event = attrs.field(factory=trio.Event)
    _error: ApiError | None = None
    _wait: ModelWait | None = None
    _patience: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    @property
    def is_over(self) -> bool:
        """Whether it waits no more: the resident is ready, or there is an error."""
        return self._event.is_set()

    @property
    def is_ready(self) -> bool:
        """Whether it need not wait: the resident is ready."""
        return self._event.is_set() and self._error is None

    async def wait(self) -> None:
        """Wait until the resident is ready. A checkpoint. When cancelled, :meth:`leave` is still to be called.

        Raises:
            ModelStartFailed: its start has failed, or failed a short while ago.
            Overloaded: there was no memory for it within its ``start_timeout``.
            ShuttingDown: its owner has ended.
        """
        with self._patience:
            await self._event.wait()
        if self._error is not None:
            # Each has its own traceback.
            raise self._error
        if not self._event.is_set():
            raise Overloaded(
                f"The model is not running, and no memory became free for it within "
                f"{self._tenancy.start_timeout:g} s"
            )

    def leave(self, *, completed: bool = False) -> None:
        """Report that the request is over, or waits no more. Synchronous, idempotent.

        Args:
            completed: it has got a complete answer.
        """
        self._on_demand.leave(self, completed=completed)

    def finish(self, error: ApiError | None = None) -> None:
        """Let it wait no more. Synchronous."""
        self._error = error
        self._event.set()
        self.show(None)

    def show(self, wait: ModelWait | None) -> bool:
        """Tell ``on_wait`` what it waits for, if that has changed; return whether it has. Synchronous."""
        if wait is None or self._tenancy.resident.state == "starting":
            # From here on, the start's own limit counts.
            self._patience.deadline = math.inf
        elif self._patience.deadline == math.inf:
            # Also while the model is ready, but is to make room: it will have to be started again.
            self._patience.deadline = trio.current_time() + self._tenancy.start_timeout
        if wait == self._wait:
            return False
        self._wait = wait
        self.on_wait(wait)
        return True


class _LiveStates(Mapping[str, ModelState]):
    """The states of the models that run on demand, as they are when they are looked at."""

    def __init__(self, by_model: Mapping[str, Tenancy]) -> None:
        self._by_model = by_model

    def __getitem__(self, model: str) -> ModelState:
        resident, now = self._by_model[model].resident, trio.current_time()
        if resident.state == "ready":
            return ModelState("ready")
        if resident.state == "starting":
            return ModelState("starting", now + resident.ready_in(now))
        why = resident.why if resident.state == "failed" else ""
        return ModelState("cold", 0.0, resident.ready_in(now), why)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_model)

    def __len__(self) -> int:
        return len(self._by_model)


class OnDemand:
    """The residents of a node. See the top of this module. All methods that are no coroutines are synchronous.

    Args:
        budget: the bytes for all residents together, or a function that returns them, which is called when the first
            resident is added.

    Attributes:
        schedule: decides.
        by_model: the resident that serves each model.
        live_states: the states of these models, as they are when they are looked at.
        on_changed: called when the state of a resident has changed, or what a request waits for. They must not raise.
    """

    def __init__(self, budget: float | Callable[[], float] = math.inf) -> None:
        self.schedule = Schedule()
        self._budget = budget
        self.by_model: dict[str, Tenancy] = {}
        self.live_states: Mapping[str, ModelState] = _LiveStates(self.by_model)
        self.on_changed: list[Callable[[], None]] = []
        self._tenancies: dict[Resident, Tenancy] = {}
        self._uses: dict[Waiter, Use] = {}

    def add(
        self,
        name: str,
        models: Iterable[str],
        open_: Open,
        *,
        memory: int | None = None,
        idle: float = 0.0,
        start_timeout: float = START_TIMEOUT,
    ) -> Tenancy:
        """Add a resident, which is cold. Its owner then lets :meth:`run` run.

        Args:
            name: for people.
            models: the names under which its models are registered.
            open_: opens one run of it.
            memory: the bytes that it needs; ``None``: it is measured.
            idle: seconds without a request after which it is stopped; 0: never for that reason.
            start_timeout: seconds that its start may take.

        Raises:
            ClusterError: it needs more memory than there is, or a model is served by another resident.
        """
        if not self._tenancies:
            self.schedule.budget = self._budget() if callable(self._budget) else self._budget
        models = tuple(models)
        for model in models:
            if model in self.by_model:
                raise ClusterError(f"a model named '{model}' runs on demand already")
        resident = Resident(name, memory, idle)
        try:
            self.schedule.add(resident)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        tenancy = Tenancy(resident, models, open_, start_timeout)
        self._tenancies[resident] = tenancy
        self.by_model |= dict.fromkeys(models, tenancy)
        return tenancy

    def remove(self, tenancy: Tenancy) -> None:
        """Remove a resident that does not run. Those that wait for it get an error. Idempotent."""
        if self._tenancies.pop(tenancy.resident, None) is None:
            return
        for model in tenancy.models:
            del self.by_model[model]
        for waiter in self.schedule.remove(tenancy.resident):
            self._uses.pop(waiter).finish(ShuttingDown())
        tenancy.changed.unpark_all()
        self.update()

    def ask(
        self,
        tenancy: Tenancy,
        on_wait: Callable[[ModelWait | None], None] | None = None,
        *,
        uses: bool = True,
    ) -> Use:
        """Ask for a resident. :meth:`Use.leave` is to be called in any case, later.

        Args:
            tenancy: the resident.
            on_wait: see :class:`Use`.
            uses: the request uses it; otherwise it only waits until the resident is ready.
        """
        waiter = self.schedule.want(tenancy.resident, uses=uses)
        use = Use(self, tenancy, waiter)
        if on_wait is not None:
            use.on_wait = on_wait
        self._uses[waiter] = use
        self.update()
        return use

    def leave(self, use: Use, *, completed: bool = False) -> None:
        """See :meth:`Use.leave`."""
        self._uses.pop(use.waiter, None)
        self.schedule.leave(use.waiter, trio.current_time(), completed=completed)
        use.show(None)
        self.update()

    async def load(self, tenancy: Tenancy, on_wait: Callable[[ModelWait | None], None] | None = None) -> None:
        """Start a resident, if it is not ready, and wait until it is. A checkpoint.

        Cancellation gives the start up, unless others wait for it.

        Args:
            tenancy: the resident.
            on_wait: see :class:`Use`.

        Raises:
            ApiError: see :meth:`Use.wait`.
        """
        use = self.ask(tenancy, on_wait, uses=False)
        try:
            await use.wait()
        finally:
            use.leave()

    async def unload(self, tenancy: Tenancy) -> None:
        """Stop a resident when the requests that it has are done, and wait until it has stopped. A checkpoint.

        Requests that come later start it again. Cancelled, it is stopped nevertheless.
        """
        resident = tenancy.resident
        # It may end, and be started again, before this task runs again: that is another run.
        runs, is_stopped = resident.runs, resident.state in ("cold", "failed")
        self.schedule.unload(resident)
        self.update()
        await trio.lowlevel.checkpoint()
        while not is_stopped and resident.runs == runs and resident.state not in ("cold", "failed"):
            await tenancy.changed.park()

    def states(self) -> dict[str, ModelState]:
        """Return the states of the models that run on demand, by name."""
        return dict(self.live_states)

    def update(self) -> None:
        """Carry out what follows from what has happened, and from the time."""
        now = trio.current_time()
        decisions = self.schedule.decide(now)
        for waiter in decisions.admit:
            self._uses[waiter].finish()
        for waiter, seconds in decisions.fail:
            resident = waiter.resident
            self._uses.pop(waiter).finish(ModelStartFailed(resident.name, resident.why, max(1.0, seconds)))
        for resident in decisions.start:
            self._tenancies[resident].changed.unpark_all()
        for resident in decisions.stop:
            tenancy = self._tenancies[resident]
            if tenancy.start_scope is not None:
                tenancy.start_scope.cancel(reason="no request waits for it any more")
            tenancy.changed.unpark_all()
        for resident, tenancy in self._tenancies.items():
            if tenancy.timer is not None:
                tenancy.timer.deadline = self.schedule.wakes_at(resident, now)
        news = bool(decisions.start or decisions.stop or decisions.fail)
        for use in self._uses.values():
            if not use.is_over:
                news = use.show(self._wait_of(use.waiter.resident, now)) or news
        if news:
            self._report()

    def _report(self) -> None:
        for callback in self.on_changed:
            callback()

    def _wait_of(self, resident: Resident, now: float) -> ModelWait:
        """Return what a request that wants a resident waits for."""
        if resident.state == "starting":
            known = resident.start_seconds is not None
            at = resident.since + resident.expected_start
            return ModelWait(f"starting {resident.name}", at if known else None)
        return ModelWait(f"waiting for memory to start {resident.name}")

    # The task of a resident

    async def run(
        self, tenancy: Tenancy, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run a resident whenever that is decided, until cancelled; then stop it, and remove it.

        Args:
            tenancy: from :meth:`add`.
            task_status: ``started()`` is called at once.
        """
        resident = tenancy.resident
        task_status.started()
        try:
            while True:
                while resident.state not in ("starting", "stopping"):
                    await tenancy.changed.park()
                # A start that was given up before this task has run is not begun.
                why = await self._run_once(tenancy) if resident.state == "starting" else ""
                self.schedule.ended(resident, trio.current_time(), why)
                if resident.runs_failed:
                    logger.warning("%s has failed: %s", resident.name, resident.why)
                else:
                    logger.info("%s has stopped", resident.name)
                tenancy.changed.unpark_all()
                self.update()
                self._report()
        finally:
            self.remove(tenancy)

    async def _run_once(self, tenancy: Tenancy) -> str:
        """Run a resident once; return why it has failed, or an empty text if it was stopped."""
        resident = tenancy.resident
        run = Run(partial(self._takes, resident), partial(self._lost, tenancy))
        why = ""
        began = trio.current_time()
        logger.info("starting %s", resident.name)
        with trio.CancelScope(deadline=began + tenancy.start_timeout) as scope:
            tenancy.start_scope = scope
            try:
                async with tenancy.open(run) as tenancy.value:
                    # It may have become ready in the moment in which it was given up, or its time was over.
                    await trio.lowlevel.checkpoint_if_cancelled()
                    scope.deadline = math.inf
                    tenancy.start_scope = None
                    self.schedule.is_ready(resident, trio.current_time())
                    took = round(trio.current_time() - began, 3)
                    logger.info("%s is ready", resident.name, extra={"fields": {"seconds": took}})
                    self.update()
                    self._report()
                    while resident.state == "ready":
                        wakes_at = self.schedule.wakes_at(resident, trio.current_time())
                        with trio.CancelScope(deadline=wakes_at) as tenancy.timer:
                            await tenancy.changed.park()
                        tenancy.timer = None
                        self.update()
            except (Exception, BaseExceptionGroup) as error:  # noqa: ASYNC103
                if not _is_failure(error):
                    raise
                why = _describe(error, resident.name)
            finally:
                tenancy.start_scope = tenancy.timer = tenancy.value = None
        if scope.cancelled_caught and resident.state == "starting":
            why = f"it was not ready within {tenancy.start_timeout:g} s"
        if why and (output := run.output()):
            why = f"{why}: {output}"
        return why

    def _takes(self, resident: Resident, size: int) -> None:
        self.schedule.takes(resident, size)
        self.update()

    def _lost(self, tenancy: Tenancy, why: str) -> None:
        self.schedule.dies(tenancy.resident, trio.current_time(), why)
        tenancy.changed.unpark_all()
        self.update()
        self._report()


def _is_failure(error: BaseException) -> bool:
    """Return whether a context has failed, as opposed to being cancelled or interrupted from the keyboard."""
    if not isinstance(error, BaseExceptionGroup):
        return True
    return error.subgroup(KeyboardInterrupt) is None and error.split(trio.Cancelled)[1] is not None


def _describe(error: BaseException, name: str) -> str:
    """Return why a start has failed, in one line; what is no :class:`ClusterError` is logged with its traceback."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, ClusterError | ApiError):
        return str(error)
    logger.error("%s has failed", name, exc_info=error)
    return f"{type(error).__name__}: {error}"
