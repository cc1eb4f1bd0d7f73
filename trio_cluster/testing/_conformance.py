"""Conformance checks: whether a handler keeps the contract of handlers (see ``_handler_contract``).

Theory of operation
===================

The handler runs in the same pool that serves it in a cluster, with slots, deadlines and an encoder. Only the client is
simulated, and it behaves as real clients do: it leaves before the first output, it leaves in the middle of a stream, it
does not read, it sends two requests at once.

A client that does not read is simulated by a window of one byte, so that the first piece of output blocks the handler,
however small it is. Real windows are 256 KiB, and a bug that appears only when they are full is rarely found in tests.
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
from ._samples import CHAT_ENDPOINTS, ENDPOINT_OF, comparable, encode, sample, supports_streaming

__all__ = ["check_handler"]

logger = logging.getLogger("trio_cluster.testing")

_BEFORE_OUTPUT: Final = "before the first output"
_MID_STREAM: Final = "in the middle of a stream"
_BLOCKED: Final = "held up by a slow client"

#: The total timeout, in seconds, of the request that checks whether the handler stops at its deadline.
_SHORT_TIMEOUT: Final = 0.05
#: Seconds between two checks of what has no event to wait for.
_POLL_INTERVAL: Final = 0.005


async def check_handler(
    handler: Handler,
    *,
    kind: Kind = "chat",
    endpoint: str = "",
    request: Mapping[str, Any] | None = None,
    other: Mapping[str, Any] | None = None,
    failing: Mapping[str, Any] | None = None,
    bound: float = 1.0,
    patience: float = 60.0,
) -> HandlerReport:
    """Check that a handler keeps its promises, whatever its clients do. A checkpoint.

    It answers, and its response fits the kind of model; it stops within ``bound`` when it is cancelled before its first
    output, in the middle of a stream, and while it is blocked by a client that does not read; it stops within ``bound``
    of its deadline; when it has stopped, no slot, task or thread is left; two concurrent calls do not mix up their
    responses; and, if ``failing`` is given, an error ends the response as an error.

    The handler is called about ten times, with the same one or two requests. This works in real time and with a mock
    clock. Under a mock clock, what a thread computes takes no time, so handlers in threads are better checked in real
    time. The test must not start or end tasks or threads meanwhile. If the handler cannot be stopped at all, neither
    can this function: it logs the promise that was broken, and waits. Cancelling it cancels the handler's calls.

    Args:
        handler: as it would be registered.
        kind: the kind of model that it is for; ``custom`` for a route that the OpenAI API does not have.
        endpoint: the endpoint that is asked: ``messages`` or ``chat.completions`` for a chat model; empty: the main one
            of its kind.
        request: the fields of a request, without ``model`` and ``stream``; ``bytes`` are an uploaded file. By default,
            a short request of this kind.
        other: the fields of another request, whose response should be different.
        failing: the fields of a request that the handler cannot answer.
        bound: seconds within which it must have stopped.
        patience: seconds within which it must have answered.

    Returns:
        What was measured of the handler.

    Raises:
        BrokenPromise: a promise was broken. The subclass is named for the promise, the message says how.
        ApiError: one of the requests is not valid for this kind.
        TypeError: the handler has none of the signatures that a handler may have.
        ValueError: raw handlers (kind ``any``) are not checked here, nor is this endpoint.
    """
    if kind not in ENDPOINT_OF:
        raise ValueError(f"handlers of kind {kind} are not checked here")
    if endpoint not in ("", ENDPOINT_OF[kind]) and not (kind == "chat" and endpoint in CHAT_ENDPOINTS):
        raise ValueError(f"handlers of kind {kind} are not checked on the endpoint '{endpoint}' here")
    options = ClusterServerOptions(server=ServerOptions(max_concurrency=2, default_timeout=patience))
    pool = HandlerPool(options)
    backend = HandlerBackend(ModelInfo("model", kind), handler, pool)
    if request is None:
        request, other = sample(kind, 0), sample(kind, 1) if other is None else other
    needed = CHAT_ENDPOINTS.get(endpoint, {})
    one, two = ({**needed, **fields} for fields in (request, request if other is None else other))
    failing = None if failing is None else {**needed, **failing}
    suite = _Suite(pool, backend, endpoint or ENDPOINT_OF[kind], one, two, bound, patience)
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
        endpoint: str,
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
        self._endpoint = endpoint
        self._bound = bound
        self._patience = patience
        # When the response is late, the pool fails the call with the reason. This timeout is for a pool that does not.
        self._receive_timeout = patience + bound
        self._stopped: dict[str, float] = {}
        self._not_reached: list[str] = []
        self._work_at_rest = (0, frozenset[int]())

    def request(self, fields: Mapping[str, Any], *, stream: bool, total_timeout: float = math.inf) -> Request:
        """Return a request for the handler, with these fields.

        Raises:
            ApiError: they are not valid for this kind.
        """
        endpoint = endpoint_named(self._endpoint)
        body, content_type = encode(fields, stream=stream)
        parsed = endpoint.parse(body, content_type, {})
        return Request(
            endpoint.name,
            self._kind,
            "model",
            body,
            content_type,
            idle_timeout=self._patience,
            total_timeout=total_timeout,
            parsed=parsed,
        )

    async def run(self, failing: Mapping[str, Any] | None) -> HandlerReport:
        began = trio.current_time()
        first_output, body = await self._response(self.one)
        duration = trio.current_time() - began
        if supports_streaming(self._kind):
            await self._response(self.one, stream=True)
        # What a handler keeps between calls, such as a thread pool, exists by now.
        self._work_at_rest = _work()
        await self._check_stop_before_output()
        await self._check_stop_mid_stream()
        await self._check_stop_when_blocked()
        await self._check_deadline()
        replayable = await self._check_concurrent_calls(body)
        if failing is not None:
            await self._check_failing(failing)
        return HandlerReport(
            self._kind,
            body,
            first_output,
            duration,
            self._stopped,
            tuple(self._not_reached),
            replayable,
        )

    # One call

    @asynccontextmanager
    async def _call(self, request: Request, *, blocked: bool = False) -> AsyncIterator[Call]:
        call = self._backend.open(request)
        if blocked:
            call.body.window = 1
        try:
            yield call
        finally:
            call.cancel("the check is over")

    async def _response(
        self, fields: Mapping[str, Any], *, stream: bool = False, concurrent: bool = False
    ) -> tuple[float, bytes]:
        """Return the seconds until the first output, and the body of the response.

        Args:
            fields: of the request.
            stream: ask for a stream.
            concurrent: there is another call at the same time, which may still run when this one has ended.
        """
        began = trio.current_time()
        first: float | None = None
        body = b""
        async with self._call(self.request(fields, stream=stream)) as call:
            with trio.move_on_after(self._receive_timeout):
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
                raise DoesNotAnswer(f"there was no response within {self._patience:g} s")
        what = "stream" if stream else "response"
        try:
            content = comparable(self._kind, body, stream=stream)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise DoesNotAnswer(f"its {what} is not valid: {error!r}") from error
        if not content:
            raise DoesNotAnswer(f"its {what} is empty")
        if not concurrent:
            await self._check_nothing_left("its response is complete")
        return first or 0.0, body

    # The promises

    async def _check_stop_before_output(self) -> None:
        async with self._call(self.request(self.one, stream=supports_streaming(self._kind))) as call:
            await self._wait_until_blocked()
            await self._check_stop(call, _BEFORE_OUTPUT, reached=not call.begun)

    async def _check_stop_mid_stream(self) -> None:
        if not supports_streaming(self._kind) and self._kind != "tts":
            self._not_reached += [_MID_STREAM, _BLOCKED]
            return
        async with self._call(
            self.request(self.one, stream=supports_streaming(self._kind)), blocked=True
        ) as call:
            with trio.move_on_after(self._receive_timeout):
                while not call.ended:
                    event = await call.receive()
                    if isinstance(event, Data) and event.data:
                        break
            await self._check_stop(call, _MID_STREAM, reached=True)

    async def _check_stop_when_blocked(self) -> None:
        if _BLOCKED in self._not_reached:
            return
        async with self._call(
            self.request(self.one, stream=supports_streaming(self._kind)), blocked=True
        ) as call:
            output = trio.Event()

            def notice(event: Event) -> None:
                if not isinstance(event, Head):
                    output.set()

            def notice_piece(data: bytes | memoryview, last: bool) -> bool:
                if data:
                    output.set()
                return False

            # Pieces are taken here, and never reported as consumed: a client that reads nothing.
            call.redirect(notice, notice_piece)
            with trio.move_on_after(self._receive_timeout):
                await output.wait()
            await self._wait_until_blocked()
            await self._check_stop(call, _BLOCKED, reached=call.body.waiting_bytes > 0)

    async def _check_stop(self, call: Call, phase: str, *, reached: bool) -> None:
        reached = reached and not call.ended
        began = trio.current_time()
        call.cancel("the client of the check has left")
        if not await self._released(call):
            raise DoesNotStop(f"cancelled {phase}, it still runs {self._bound:g} s later")
        if reached:
            self._stopped[phase] = trio.current_time() - began
        else:
            self._not_reached.append(phase)
        await self._check_nothing_left(f"it was cancelled {phase}")

    async def _check_deadline(self) -> None:
        request = self.request(self.one, stream=supports_streaming(self._kind), total_timeout=_SHORT_TIMEOUT)
        async with self._call(request, blocked=True) as call:
            await trio.sleep(_SHORT_TIMEOUT)
            if not await self._released(call):
                raise MissesDeadline(f"it still runs {self._bound:g} s after its deadline")
            await self._check_nothing_left("its deadline has passed")

    async def _check_concurrent_calls(self, alone: bytes) -> bool:
        content = partial(comparable, self._kind, stream=False)
        _, again = await self._response(self.one)
        _, other = await self._response(self.two)
        together: dict[int, bytes] = {}
        broken: list[BrokenPromise] = []

        async def ask(number: int, fields: Mapping[str, Any]) -> None:
            try:
                _, together[number] = await self._response(fields, concurrent=True)
            except BrokenPromise as error:
                broken.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 0, self.one)
            nursery.start_soon(ask, 1, self.two)
        if broken:
            raise MixesAnswers(f"of two concurrent calls, one had no response: {broken[0]}") from broken[0]
        if content(again) != content(alone):
            return False
        for number, expected in enumerate((alone, other)):
            if content(together[number]) != content(expected):
                raise MixesAnswers(
                    f"beside another call it answered {content(together[number])!r}, alone {content(expected)!r}"
                )
        return True

    async def _check_failing(self, fields: Mapping[str, Any]) -> None:
        async with self._call(self.request(fields, stream=False)) as call:
            with trio.move_on_after(self._receive_timeout):
                while not call.ended:
                    await call.receive()
            if isinstance(call.end, Done):
                raise HidesErrors("a request that it cannot answer got a response that looks complete")
            if not call.ended:
                raise HidesErrors(f"a request that it cannot answer had no end within {self._patience:g} s")
            await self._check_nothing_left("it has failed")

    # Waiting

    async def _wait_until_blocked(self) -> None:
        """Wait until no task has anything to do: the handler waits, or is blocked."""
        with trio.move_on_after(self._bound):
            await wait_all_tasks_blocked()

    async def _released(self, call: Call) -> bool:
        released = trio.Event()
        call.on_release(released.set)
        with trio.move_on_after(self._bound):
            await released.wait()
        return released.is_set()

    async def _check_nothing_left(self, when: str) -> None:
        with trio.move_on_after(self._bound):
            # Threads and tasks of any origin: there is no event to wait for.
            while self._left_behind():  # noqa: ASYNC110
                await trio.sleep(_POLL_INTERVAL)
        left = self._left_behind()
        if left:
            raise LeavesWorkBehind(f"{left} {self._bound:g} s after {when}")

    def _left_behind(self) -> str:
        if self._pool.tasks:
            return "its slot is still taken, and it still runs,"
        tasks, threads = _work()
        if self._work_at_rest[0] and tasks > self._work_at_rest[0]:
            return f"there are {tasks - self._work_at_rest[0]} tasks more than before,"
        new = threads - self._work_at_rest[1]
        if self._work_at_rest[0] and new:
            return f"there are {len(new)} threads more than before,"
        return ""


def _work() -> tuple[int, frozenset[int]]:
    """Return how many tasks there are, and the threads that do not belong to trio's thread cache."""
    threads = (each.ident or 0 for each in threading.enumerate() if not each.name.startswith("Trio thread "))
    return trio.lowlevel.current_statistics().tasks_living, frozenset(threads)
