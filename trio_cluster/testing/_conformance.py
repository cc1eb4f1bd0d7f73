"""A suite of checks that any handler can be put through, before it meets a client that does the same to it.

The handler runs where it always runs: in a pool, with slots, deadlines and an encoder, by the code that serves it in a
cluster. Only the client is the suite's own, and it is of the kind that real clients are: it leaves before there is
anything, it leaves in the middle, it does not read, it comes twice at a time.

A slow client is played by a window of one byte, so that the handler is held up by its first piece of output however
small that is. Real windows are 256 KiB, and a bug that needs them to be full is rarely seen before there are users.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import trio
from trio.testing import wait_all_tasks_blocked

from ..core.answer import Data, Done, Event, Failed, Head
from ..core.call import Call
from ..core.model import Kind, ModelInfo
from ..core.request import Request
from ..local.adapters import Handler
from ..local.handler import HandlerBackend
from ..local.pool import HandlerPool
from ..openai import endpoint_named
from ..options import ClusterServerOptions, ServerOptions
from ._clock import threads_hold_clock
from ._handler_contract import (
    BrokenPromise,
    DoesNotAnswer,
    DoesNotStop,
    HandlerReport,
    HidesErrors,
    LeavesWorkBehind,
    MissesDeadline,
    MixesAnswers,
)
from ._samples import ENDPOINT_OF, comparable, encode, sample, supports_streaming

__all__ = ["check_handler"]

logger = logging.getLogger("trio_cluster.testing")

_BEFORE_OUTPUT: Final = "before the first output"
_MID_STREAM: Final = "in the middle of a stream"
_SLOW_CLIENT: Final = "held up by a slow client"

#: Seconds that a request has for its answer when it is found out whether the handler minds its deadline.
_SHORT: Final = 0.05
#: Seconds between two looks at what nobody tells.
_LOOK_EVERY: Final = 0.005


async def check_handler(
    handler: Handler,
    *,
    kind: Kind = "chat",
    request: Mapping[str, Any] | None = None,
    other: Mapping[str, Any] | None = None,
    failing: Mapping[str, Any] | None = None,
    bound: float = 1.0,
    patience: float = 60.0,
) -> HandlerReport:
    """Put a handler through everything that clients do, and see whether it keeps its promises.

    It answers, and its answer fits the kind of model; it stops within ``bound`` when it is cancelled before its first
    output, in the middle of a stream, and while a slow client holds it up; it stops within ``bound`` of its deadline;
    when it has stopped, no slot, task or thread is left; two calls at once do not mix up their answers; and, if
    ``failing`` is given, an error comes out as an error.

    It is called about ten times, each time with the same request or two. Works in real time and with a mock clock,
    where what a thread computes takes no time: handlers in threads are better checked in real time. Meanwhile the test
    should not start or end any tasks or threads of its own. If the handler cannot be stopped at all, neither can this
    function: it logs what it has found, and waits.

    Args:
        handler: as it would be registered.
        kind: the kind of model that it answers for; ``custom`` for a route of its own.
        request: the fields of a request, without ``model`` and ``stream``; ``bytes`` are an uploaded file. Without it,
            a short one that makes sense for the kind.
        other: another one, to which the answer should be another.
        failing: one that the handler cannot answer.
        bound: seconds within which it must have stopped.
        patience: seconds in which it must have answered.

    Raises:
        BrokenPromise: the subclass tells which promise was broken, the message how.
        ApiError: one of the requests is not one of this kind.
        TypeError: the handler has none of the shapes that a handler may have.
        ValueError: raw handlers (kind ``any``) are not checked here.
    """
    if kind not in ENDPOINT_OF:
        raise ValueError(f"handlers of kind {kind} are not checked here")
    options = ClusterServerOptions(server=ServerOptions(max_concurrency=2, default_timeout=patience))
    pool = HandlerPool(options)
    backend = HandlerBackend(ModelInfo("model", kind), handler, pool)
    if request is None:
        request, other = sample(kind, 0), sample(kind, 1) if other is None else other
    suite = _Suite(pool, backend, request, request if other is None else other, bound, patience)
    for fields in (suite.one, suite.two, *([] if failing is None else [failing])):
        suite.request(fields, stream=False)
    broken: BrokenPromise | None = None
    report: HandlerReport | None = None
    with threads_hold_clock():
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.serve)
            try:
                report = await suite.run(failing)
            except BrokenPromise as error:
                if pool.tasks:
                    logger.error("%s; waiting until it has stopped", error)
                broken = error
            nursery.cancel_scope.cancel(reason="the checks are over")
    if report is None:
        assert broken is not None
        raise broken
    return report


class _Suite:
    """The checks of one handler."""

    def __init__(
        self,
        pool: HandlerPool,
        backend: HandlerBackend,
        one: Mapping[str, Any],
        two: Mapping[str, Any],
        bound: float,
        patience: float,
    ) -> None:
        self.one = one
        self.two = two
        self._pool = pool
        self._backend = backend
        self._kind: Kind = backend.info.kind
        self._bound = bound
        self._patience = patience
        # The pool says what is wrong when an answer is late; only if it does not, it is found out here.
        self._long_enough = patience + bound
        self._stopped: dict[str, float] = {}
        self._not_reached: list[str] = []
        self._at_rest = (0, frozenset[int]())

    def request(self, fields: Mapping[str, Any], *, stream: bool, budget: float = math.inf) -> Request:
        """Return a request for the handler.

        Raises:
            ApiError: it is not one.
        """
        endpoint = endpoint_named(ENDPOINT_OF[self._kind])
        body, content_type = encode(fields, stream=stream)
        parsed = endpoint.parse(body, content_type, {})
        return Request(
            endpoint.name,
            self._kind,
            "model",
            body,
            content_type,
            idle_timeout=self._patience,
            total_timeout=budget,
            parsed=parsed,
        )

    async def run(self, failing: Mapping[str, Any] | None) -> HandlerReport:
        began = trio.current_time()
        first, answer = await self._answer(self.one)
        duration = trio.current_time() - began
        if supports_streaming(self._kind):
            await self._answer(self.one, stream=True)
        # What a handler keeps between calls, such as a pool of threads, is there by now.
        self._at_rest = _work()
        await self._stops_before_output()
        await self._stops_mid_stream()
        await self._stops_with_a_slow_client()
        await self._minds_its_deadline()
        replayable = await self._keeps_apart(answer)
        if failing is not None:
            await self._fails(failing)
        return HandlerReport(
            self._kind, answer, first, duration, self._stopped, tuple(self._not_reached), replayable
        )

    # One call

    @asynccontextmanager
    async def _call(self, request: Request, *, held_up: bool = False) -> AsyncIterator[Call]:
        call = self._backend.open(request)
        if held_up:
            call.body.window = 1
        try:
            yield call
        finally:
            call.cancel("the check is over")

    async def _answer(
        self, fields: Mapping[str, Any], *, stream: bool = False, beside: bool = False
    ) -> tuple[float, bytes]:
        """Return when the first output came, and the answer.

        Args:
            fields: of the request.
            stream: ask for a stream.
            beside: there is another call at the same time, which may go on.
        """
        began = trio.current_time()
        first: float | None = None
        body = b""
        async with self._call(self.request(fields, stream=stream)) as call:
            with trio.move_on_after(self._long_enough):
                while True:
                    event = await call.receive()
                    if first is None:
                        first = trio.current_time() - began
                    if isinstance(event, Data):
                        body += event.data
                    elif isinstance(event, Failed):
                        error = event.error
                        raise DoesNotAnswer(
                            f"it failed with {error.status}: {error}; if it raised, its traceback is logged"
                        )
                    elif isinstance(event, Done):
                        break
            if not call.ended:
                raise DoesNotAnswer(f"there was no answer within {self._patience:g} s")
        what = "stream" if stream else "answer"
        try:
            said = comparable(self._kind, body, stream=stream)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise DoesNotAnswer(f"its {what} is none: {error!r}") from error
        if not said:
            raise DoesNotAnswer(f"its {what} is empty")
        if not beside:
            await self._is_at_rest("its answer is complete")
        return first or 0.0, body

    # Promises

    async def _stops_before_output(self) -> None:
        async with self._call(self.request(self.one, stream=supports_streaming(self._kind))) as call:
            await self._blocked()
            await self._stops(call, _BEFORE_OUTPUT, reached=not call.begun)

    async def _stops_mid_stream(self) -> None:
        if not supports_streaming(self._kind) and self._kind != "tts":
            self._not_reached += [_MID_STREAM, _SLOW_CLIENT]
            return
        async with self._call(
            self.request(self.one, stream=supports_streaming(self._kind)), held_up=True
        ) as call:
            with trio.move_on_after(self._long_enough):
                while not call.ended:
                    event = await call.receive()
                    if isinstance(event, Data) and event.data:
                        break
            await self._stops(call, _MID_STREAM, reached=True)

    async def _stops_with_a_slow_client(self) -> None:
        if _SLOW_CLIENT in self._not_reached:
            return
        async with self._call(
            self.request(self.one, stream=supports_streaming(self._kind)), held_up=True
        ) as call:
            output = trio.Event()

            def notice(event: Event) -> None:
                if not isinstance(event, Head):
                    output.set()

            def notice_piece(data: bytes | memoryview, last: bool) -> bool:
                if data:
                    output.set()
                return False

            # Whoever has pieces sent somewhere and never says that they have gone on reads nothing.
            call.redirect(notice, notice_piece)
            with trio.move_on_after(self._long_enough):
                await output.wait()
            await self._blocked()
            await self._stops(call, _SLOW_CLIENT, reached=call.body.waiting_bytes > 0)

    async def _stops(self, call: Call, phase: str, *, reached: bool) -> None:
        reached = reached and not call.ended
        began = trio.current_time()
        call.cancel("the client of the check has left")
        if not await self._released(call):
            raise DoesNotStop(f"cancelled {phase}, it still runs {self._bound:g} s later")
        if reached:
            self._stopped[phase] = trio.current_time() - began
        else:
            self._not_reached.append(phase)
        await self._is_at_rest(f"it was cancelled {phase}")

    async def _minds_its_deadline(self) -> None:
        request = self.request(self.one, stream=supports_streaming(self._kind), budget=_SHORT)
        async with self._call(request, held_up=True) as call:
            await trio.sleep(_SHORT)
            if not await self._released(call):
                raise MissesDeadline(f"it still runs {self._bound:g} s after its deadline")
            await self._is_at_rest("its deadline has passed")

    async def _keeps_apart(self, alone: bytes) -> bool:
        know = partial(comparable, self._kind, stream=False)
        _, again = await self._answer(self.one)
        _, other = await self._answer(self.two)
        together: dict[int, bytes] = {}
        broken: list[BrokenPromise] = []

        async def ask(number: int, fields: Mapping[str, Any]) -> None:
            try:
                _, together[number] = await self._answer(fields, beside=True)
            except BrokenPromise as error:
                broken.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 0, self.one)
            nursery.start_soon(ask, 1, self.two)
        if broken:
            raise MixesAnswers(f"of two calls at once, one had no answer: {broken[0]}") from broken[0]
        if know(again) != know(alone):
            return False
        for number, expected in enumerate((alone, other)):
            if know(together[number]) != know(expected):
                raise MixesAnswers(
                    f"beside another call it answered {know(together[number])!r}, and alone {know(expected)!r}"
                )
        return True

    async def _fails(self, fields: Mapping[str, Any]) -> None:
        async with self._call(self.request(fields, stream=False)) as call:
            with trio.move_on_after(self._long_enough):
                while not call.ended:
                    await call.receive()
            if isinstance(call.end, Done):
                raise HidesErrors("a request that it cannot answer got an answer that looks complete")
            if not call.ended:
                raise HidesErrors(f"a request that it cannot answer had no end within {self._patience:g} s")
            await self._is_at_rest("it has failed")

    # Waiting

    async def _blocked(self) -> None:
        """Wait until the handler has got as far as it gets by itself."""
        with trio.move_on_after(self._bound):
            await wait_all_tasks_blocked()

    async def _released(self, call: Call) -> bool:
        released = trio.Event()
        call.on_release(released.set)
        with trio.move_on_after(self._bound):
            await released.wait()
        return released.is_set()

    async def _is_at_rest(self, when: str) -> None:
        with trio.move_on_after(self._bound):
            # Threads and tasks of anybody at all: there is no event to wait for.
            while self._left_behind():  # noqa: ASYNC110
                await trio.sleep(_LOOK_EVERY)
        left = self._left_behind()
        if left:
            raise LeavesWorkBehind(f"{left} {self._bound:g} s after {when}")

    def _left_behind(self) -> str:
        if self._pool.tasks:
            return "its slot is still taken, and it still runs,"
        tasks, threads = _work()
        if self._at_rest[0] and tasks > self._at_rest[0]:
            return f"there are {tasks - self._at_rest[0]} tasks more than before,"
        new = threads - self._at_rest[1]
        if self._at_rest[0] and new:
            return f"there are {len(new)} threads more than before,"
        return ""


def _work() -> tuple[int, frozenset[int]]:
    """Return how many tasks there are, and the threads that are not trio's idle ones."""
    threads = (each.ident or 0 for each in threading.enumerate() if not each.name.startswith("Trio thread "))
    return trio.lowlevel.current_statistics().tasks_living, frozenset(threads)
