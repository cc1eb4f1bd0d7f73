"""Passthrough models: the handler gets the bytes of a request and gives the bytes of the answer.

Most of them relay requests to another server. Neither the request nor the answer is parsed here; both are HTTP content.
The server behind the handler has a queue of its own, so a call takes none of the slots of this process.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import trio

from ..core.answer import Done, Head, Usage
from ..core.call import Call
from ..core.model import ModelInfo
from ..core.request import Request
from ..errors import Overloaded, UpstreamBusy, UpstreamLost
from ..options import ClusterServerOptions
from ..routing.backend import LOCAL
from ..routing.health import Health
from .pool import HandlerPool
from .slots import slots_of_model
from .task import CallTask, is_failure

__all__ = ["RawBackend", "RawCall", "RawHandler"]


class RawCall(CallTask):
    """One request and its answer, as a raw handler sees them.

    The idle timeout counts while the handler is the one that is waited for: it is paused while the request's body is
    still arriving, and while the client is slow to read.
    """

    def __init__(
        self,
        call: Call,
        scope: trio.CancelScope,
        options: ClusterServerOptions,
        handler: RawHandler,
        worker: str = "",
    ) -> None:
        super().__init__(call, scope, options)
        self._worker = worker
        self._handler = handler
        self._usage: Usage | None = None
        self._body = call.request.body
        if call.request.upload is not None:
            self._update_idle_timer()
            call.request.upload.on_complete(self.restart_idle_timer)

    @property
    def request(self) -> Request:
        """The request: endpoint, model, headers, query, and the size of the body if it is known."""
        return self.call.request

    @property
    def worker(self) -> str:
        """The name of the node on which the handler runs: a worker, or a server that serves the model itself."""
        return self._worker

    @property
    def key_name(self) -> str:
        """The name of the API key that the request has; empty where no key is required."""
        return self.call.request.key_name

    @property
    def ended(self) -> bool:
        """Whether the answer is over: the client has left, or the call was cancelled. What is sent is dropped."""
        return self.call.ended

    @property
    def time_left(self) -> float:
        """Seconds that are left for the whole answer; infinite if the client has set no limit."""
        return self.deadline - trio.current_time()

    async def receive(self) -> bytes:
        """Return the bytes of the request's body that arrived since the last time, waiting for some; empty at its end.

        A checkpoint. The idle timeout is paused until the body is complete.
        """
        upload = self.call.request.upload
        if upload is None:
            data, self._body = self._body, b""
            await trio.lowlevel.checkpoint()
            return data
        data = await upload.receive()
        self._update_idle_timer()
        return data

    def begin(self, status: int, content_type: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """Begin the answer. To be called once, before the first :meth:`send`. Synchronous.

        Args:
            status: 200 to 599. An error of the other server is passed on like any other answer.
            content_type: may be empty.
            headers: further headers for the client. The gateway leaves out those that describe the connection.

        Raises:
            RuntimeError: the answer has begun already.
        """
        self.call.put(Head(status, content_type, headers))
        self._update_idle_timer()

    async def send(self, data: bytes) -> None:
        """Send a piece of the answer's body to the client, as it is, and wait while the client is slow to read.

        It checks for cancellation in every case, and lets other tasks run after a few pieces; see ``Provider.push``.

        Raises:
            RuntimeError: the answer has not begun.
            trio.Cancelled: the client has left, the call was cancelled, or it timed out.
        """
        self.call.body.put(data)
        await self.apply_backpressure()
        self._update_idle_timer()

    def report_usage(
        self,
        prompt_tokens: int,
        completion_tokens: int = 0,
        *,
        cached_tokens: int = 0,
        reasoning_tokens: int = 0,
    ) -> None:
        """Report the tokens of the answer, for metering. Synchronous. The last report counts.

        They are not sent to the client, whose answer is what :meth:`send` was given. Without a report they are unknown,
        and nothing is estimated.

        Args:
            prompt_tokens: tokens read, those from a cache included.
            completion_tokens: tokens written, reasoning included.
            cached_tokens: those of ``prompt_tokens`` that were read from a prompt cache.
            reasoning_tokens: those of ``completion_tokens`` that were spent on reasoning.

        Raises:
            TypeError: a count is not an integer.
            ValueError: a count is negative, or 2**53 or more.
        """
        for count in (prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens):
            if not isinstance(count, int) or isinstance(count, bool):
                raise TypeError(f"a number of tokens must be an integer, not {count!r}")
            if count < 0:
                raise ValueError(f"a number of tokens must not be negative: {count}")
            # Refused here, where the handler learns of it: no message to a master can carry it.
            if count >= 1 << 53:
                raise ValueError(f"a number of tokens must be less than 2**53: {count}")
        self._usage = Usage(prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens)

    async def prepare(self) -> None:
        """See ``CallTask``."""

    async def work(self) -> None:
        """See ``CallTask``."""
        try:
            await self._handler(self)
            if not self.call.ended:
                self.call.put(Done(self._usage))
        except (Exception, BaseExceptionGroup, SystemExit) as error:
            if not is_failure(error):
                raise
            api_error = self.to_api_error(error)
            # Decided by the class, since a handler may choose any code: this class is raised only by code that has seen
            # the server behind the model fail.
            self.fail(
                api_error,
                retryable=isinstance(api_error, UpstreamLost),
                over_capacity=isinstance(api_error, Overloaded | UpstreamBusy),
            )
        finally:
            if self.call.satisfied:
                # It was reported before the client left, or while the handler stopped.
                self.call.put(Done(self._usage))

    def _update_idle_timer(self) -> None:
        """Restart the idle timer; pause it instead while the request's body is still arriving."""
        upload = self.call.request.upload
        if upload is None or upload.complete:
            self.restart_idle_timer()
        else:
            self.pause_idle_timer()


RawHandler: TypeAlias = Callable[[RawCall], Awaitable[None]]


class RawBackend:
    """A model whose requests are answered by a raw handler. See ``Backend``.

    Args:
        info: what the model is.
        handler: a coroutine function. It must begin the answer, and the answer is complete when it returns.
        pool: where its calls run.
        max_concurrency: how many calls run at once; ``None``: any number.

    Raises:
        TypeError: the handler is not a coroutine function, or ``max_concurrency`` is no number.
        ValueError: ``max_concurrency`` is less than 1.
    """

    name = LOCAL

    def __init__(
        self, info: ModelInfo, handler: RawHandler, pool: HandlerPool, max_concurrency: int | None = None
    ) -> None:
        if not inspect.iscoroutinefunction(handler) and not inspect.iscoroutinefunction(
            getattr(handler, "__call__", None)  # noqa: B004
        ):
            raise TypeError(f"a raw handler must be a coroutine function (async def), not {handler!r}")
        self.info = info
        self._handler = handler
        self.health = Health()
        self._pool = pool
        self._slots = None if max_concurrency is None else slots_of_model(max_concurrency)
        self._open = 0

    def add_endpoint(self, capability: str, handler: object) -> None:
        """Refuse: the raw handler answers every route already.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"the model '{self.info.name}' answers every route already")

    @property
    def elsewhere(self) -> int:
        """See ``Backend``."""
        return 0

    @property
    def load(self) -> float:
        """See ``Backend``."""
        # Without a limit there is no share of it; calls in hundredths compare such replicas by their number of calls.
        return self._open / (100 if self._slots is None else self._slots.capacity)

    def open(self, request: Request) -> Call:
        """See ``Backend``."""

        def make_task(call: Call, scope: trio.CancelScope, options: ClusterServerOptions) -> CallTask:
            return RawCall(call, scope, options, self._handler, self._pool.node_name)

        call = self._pool.start(request, make_task, self._slots)
        self._open += 1
        call.on_release(self._closed)
        return call

    def _closed(self) -> None:
        self._open -= 1
