"""A model that answers with bytes of its own making: a relay to another server, most of all.

Nothing of the request is looked at here, and nothing of the answer: what a handler of this kind is given and gives is
HTTP content. It stands where a worker's far end would: whatever is behind it has its own queue, so a call of it
takes none of the process's slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import trio

from ..core.answer import Done, Head
from ..core.call import Call
from ..core.model import ModelInfo
from ..core.request import Request
from ..errors import UpstreamLost
from ..options import ClusterServerOptions
from ..routing.backend import LOCAL
from ..routing.health import Health
from .pool import CallTask, HandlerPool, is_failure

__all__ = ["RawBackend", "RawCall", "RawHandler"]


class RawCall(CallTask):
    """One request and its answer, as a raw handler sees them."""

    def __init__(
        self,
        call: Call,
        scope: trio.CancelScope,
        options: ClusterServerOptions,
        handler: RawHandler,
        slots: trio.CapacityLimiter | None,
    ) -> None:
        super().__init__(call, scope, options)
        self.slots = slots
        self._handler = handler
        self._body = call.request.body
        if call.request.upload is not None:
            self._update_idle_timer()
            call.request.upload.on_complete(self.restart_idle_timer)

    @property
    def request(self) -> Request:
        """What is asked: endpoint, model, headers, and what is known of the body."""
        return self.call.request

    @property
    def time_left(self) -> float:
        """Seconds that are left for the whole answer; infinite if the client has set no limit."""
        return self.deadline - trio.current_time()

    async def receive(self) -> bytes:
        """Return what has come of the request's body since the last time, waiting for it; empty at its end.

        While the body is coming, it is not the handler that is waited for.
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
        """Begin the answer; once, and before anything of its body.

        Args:
            status: 200 to 599. An error of the other server is an answer like any other.
            content_type: may be empty.
            headers: what the client should see beside it. What belongs to the connection is left out by the relay.

        Raises:
            RuntimeError: it has begun already.
        """
        self.call.put(Head(status, content_type, headers))
        self._update_idle_timer()

    async def send(self, data: bytes) -> None:
        """Give a piece of the answer's body to the client, as it is, waiting while it is slow.

        A checkpoint as ``Provider.push`` is one.

        Raises:
            RuntimeError: the answer has not begun.
            trio.Cancelled: nobody wants it any more, or it took too long.
        """
        self.call.body.put(data)
        await self.apply_backpressure()
        self._update_idle_timer()

    async def prepare(self) -> None:
        """See ``CallTask``."""

    async def work(self) -> None:
        """See ``CallTask``."""
        try:
            await self._handler(self)
            if not self.call.ended:
                self.call.put(Done())
        except (Exception, BaseExceptionGroup, SystemExit) as error:
            if not is_failure(error):
                raise
            answer = self.to_api_error(error)
            # The class and not the code: only who knows that the server behind is gone raises this one.
            self.fail(answer, retryable=isinstance(answer, UpstreamLost))

    def _update_idle_timer(self) -> None:
        """Let the silence begin now, if it is the handler that is waited for."""
        upload = self.call.request.upload
        if upload is None or upload.complete:
            self.restart_idle_timer()
        else:
            self.pause_idle_timer()


RawHandler: TypeAlias = Callable[[RawCall], Awaitable[None]]


class RawBackend:
    """A model that a raw handler answers for.

    Args:
        info: what the model is.
        handler: a coroutine function; its return is the end of the answer, which it must have begun.
        pool: where its calls run.
        max_concurrency: how many of them at once; ``None``: any number.

    Raises:
        TypeError: the handler is no coroutine function.
        ValueError: a concurrency of less than 1.
    """

    name = LOCAL

    def __init__(
        self, info: ModelInfo, handler: RawHandler, pool: HandlerPool, max_concurrency: int | None = None
    ) -> None:
        if not inspect.iscoroutinefunction(handler) and not inspect.iscoroutinefunction(
            getattr(handler, "__call__", None)  # noqa: B004
        ):
            raise TypeError(f"a raw handler is a coroutine function, not {handler!r}")
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, not {max_concurrency}")
        self.info = info
        self._handler = handler
        self.health = Health()
        self._pool = pool
        self._slots = None if max_concurrency is None else trio.CapacityLimiter(max_concurrency)
        self._open = 0

    def add_endpoint(self, capability: str, handler: object) -> None:
        """Refuse: whatever it is asked, the raw handler answers."""
        raise ValueError(f"the model '{self.info.name}' answers every route already")

    @property
    def load(self) -> float:
        """See ``Backend``."""
        # Without a limit nobody knows what is much; it is compared with others by the number of its calls.
        return self._open / (100 if self._slots is None else self._slots.total_tokens)

    def open(self, request: Request) -> Call:
        """See ``Backend``."""

        def answer(call: Call, scope: trio.CancelScope, options: ClusterServerOptions) -> CallTask:
            return RawCall(call, scope, options, self._handler, self._slots)

        call = self._pool.start(request, answer)
        self._open += 1
        call.on_release(self._closed)
        return call

    def _closed(self) -> None:
        self._open -= 1
