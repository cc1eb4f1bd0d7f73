"""A user's function made into a backend: slots, time, errors, and the encoding of what it gives.

Every call has one task, in the pool's nursery, from the moment it is opened until its work has really stopped. The
task waits for a slot, runs the handler inside the call's cancel scope, and encodes each piece of output where the
model runs, so that whoever relays the answer need not look inside it.

Time. The scope's deadline is the request's real deadline: the earlier of "nothing may be silent for longer than
this" and "the whole answer must be there by then". Each piece of output moves the first one on. While the client is
slow the silence is the client's, and does not count.

A plain answer goes out in one piece at its end. So that nobody mistakes a long one for a dead one, its head is put
with the first output, and output that has nothing to show yet becomes an empty ``Data``, once a second at most: a
sign of life that costs the relay nothing and commits it to nothing.

Slots are a ``trio.CapacityLimiter``: fair, resizable while calls run, and freed in the task's ``finally``, when the
handler has returned. Not when somebody asked it to.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any, Final

import trio

from . import _chance
from ._calls import Call, Data, Done, Failed, Request
from ._errors import ApiError, HandlerFailed, Overloaded, ShuttingDown, TooSlow
from ._models import ModelInfo
from ._options import ClusterServerOptions
from ._shapes import Handler, driver_for
from .openai import ENDPOINTS, Encoder

__all__ = ["MAX_WAITING", "HandlerBackend", "HandlerPool"]

logger = logging.getLogger("trio_cluster.handlers")

#: How many calls may wait for a slot; one more is refused at once, since it would only wait to be refused.
MAX_WAITING: Final = 1024

#: Seconds between the signs of life of a plain answer.
_SIGN_OF_LIFE: Final = 1.0

#: Bytes of a request body from which parsing it in the event loop would be felt by the other calls.
_PARSE_IN_THREAD: Final = 1 << 20


class HandlerPool:
    """The slots of this process and the nursery in which its handlers run.

    Args:
        options: read at the time of use, so that a change acts at once on calls that come after it.

    Attributes:
        waiting: how many calls wait for a slot.
    """

    def __init__(self, options: ClusterServerOptions) -> None:
        self.options = options
        self._slots = trio.CapacityLimiter(options.server.max_concurrency)
        self._nursery: trio.Nursery | None = None
        self.waiting = 0

    @property
    def running(self) -> int:
        """How many handlers hold a slot."""
        return int(self._slots.borrowed_tokens)

    @property
    def capacity(self) -> int:
        """How many handlers may run at once."""
        return int(self._slots.total_tokens)

    @property
    def tasks(self) -> int:
        """How many calls have a task here: those that wait, those that run, and those that wind down."""
        return 0 if self._nursery is None else len(self._nursery.child_tasks)

    def resize(self) -> None:
        """Make the number of slots what the options say; handlers over a smaller one run on, but no new one starts."""
        self._slots.total_tokens = self.options.server.max_concurrency

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run handlers until cancelled; then cancel those that run and wait until they have stopped."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def start(self, backend: HandlerBackend, request: Request) -> Call:
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
        call = Call(request, on_cancel=lambda reason: scope.cancel(reason=reason))
        self._nursery.start_soon(self._answer, backend, call, scope, name=f"answer {request.model}")
        return call

    async def _answer(self, backend: HandlerBackend, call: Call, scope: trio.CancelScope) -> None:
        """Be the task of one call. Whatever happens inside, the call is ended and released, and nothing leaks out."""
        output = _Output(call, scope, self.options)
        # The scope's deadline cannot tell a handler that it is late once it shields itself; the relay's own deadline
        # answers the client then, and the slot stays taken until the handler is really done.
        scope.deadline = output.next_deadline()
        try:
            with scope:
                await self._in_slot(backend, output)
            if scope.cancelled_caught:
                output.fail(output.too_slow())
        except (trio.Cancelled, RuntimeError) as error:  # noqa: ASYNC103
            if isinstance(error, trio.Cancelled) and trio.current_effective_deadline() == -math.inf:
                raise
            # A scope that the handler opened around a `yield` expired, or was left, while the handler was parked
            # there: its Cancelled belongs to nobody any more. Only this call is wrong.
            logger.exception("a cancel scope of the handler leaked", extra=backend.log_fields(call))
            output.fail(HandlerFailed())
        finally:
            call.release()

    async def _in_slot(self, backend: HandlerBackend, output: _Output) -> None:
        call = output.call
        try:
            self._slots.acquire_on_behalf_of_nowait(call)
        except trio.WouldBlock:
            self.waiting += 1
            call.queued = True
            try:
                with trio.move_on_after(self.options.server.queue_timeout) as wait:
                    await self._slots.acquire_on_behalf_of(call)
            finally:
                self.waiting -= 1
                call.queued = False
            if wait.cancelled_caught:
                call.put(Failed(self._over_capacity()))
                return
        try:
            await backend.run(output)
        finally:
            self._slots.release_on_behalf_of(call)

    def _over_capacity(self) -> Overloaded:
        return Overloaded(
            f"All {self.capacity} slots stayed busy for {self.options.server.queue_timeout:g} s",
            retry_after=self._retry_after(),
        )

    def _retry_after(self) -> float:
        # Nobody knows how long handlers take; the wait that was just in vain is the best guess there is.
        return max(1.0, min(self.options.server.queue_timeout, 60.0))


class HandlerBackend:
    """One model that a function of this process answers for.

    Args:
        info: what the model is.
        handler: the function.
        pool: where its calls run.

    Raises:
        TypeError: the function has none of the shapes that a handler may have.
    """

    name = "local"

    def __init__(self, info: ModelInfo, handler: Handler, pool: HandlerPool) -> None:
        self.info = info
        self._drive = driver_for(handler)
        self._pool = pool

    @property
    def load(self) -> float:
        """See ``Backend``."""
        return (self._pool.running + self._pool.waiting) / self._pool.capacity

    @property
    def available(self) -> bool:
        """See ``Backend``."""
        return True

    def open(self, request: Request) -> Call:
        """See ``Backend``."""
        return self._pool.start(self, request)

    async def run(self, output: _Output) -> None:
        """Run the handler once, in the slot that the caller holds. Raises nothing but ``trio.Cancelled``."""
        # Read by whoever wants to know what the event loop is busy with; see `blamed_code`.
        __traceback_info__ = f"handler of '{self.info.name}'"
        call = output.call
        try:
            await output.prepare()
            await self._drive(output.request, output)
            output.end()
        except (Exception, BaseExceptionGroup, SystemExit) as error:
            if isinstance(error, BaseExceptionGroup) and not _is_failure(error):
                raise
            answer = _meant_for_client(error)
            if answer is None:
                logger.exception("the handler of '%s' failed", self.info.name, extra=self.log_fields(call))
                answer = HandlerFailed()
            output.fail(answer)

    def log_fields(self, call: Call) -> dict[str, Any]:
        """Return what a log line about ``call`` should carry."""
        return {"fields": {"model": self.info.name, "request_id": call.request.request_id}}


def _is_failure(group: BaseExceptionGroup[BaseException]) -> bool:
    """Tell a handler that failed from one that was only cancelled, or interrupted from the keyboard.

    A group may hold this call's Cancelled beside what the handler's own tasks raised. It may then be swallowed: it
    has done what it is for, and nothing is awaited any more until the end of the call's task.
    """
    return group.subgroup(KeyboardInterrupt) is None and group.split(trio.Cancelled)[1] is not None


def _meant_for_client(error: BaseException) -> ApiError | None:
    """Find the one ``ApiError`` in what a handler's own nursery raised, if that is all there is in it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, ApiError) else None


class _Output:
    """The provider of one call: encodes what the handler gives, and keeps the time."""

    request: Any
    _encoder: Encoder

    def __init__(self, call: Call, scope: trio.CancelScope, options: ClusterServerOptions) -> None:
        self.call = call
        self._scope = scope
        self._silence = min(call.request.timeout, options.server.default_timeout)
        self._last = trio.current_time() + call.request.budget
        self._next_sign = -math.inf

    def next_deadline(self) -> float:
        """Return when the handler is late if it gives nothing from now on."""
        return min(trio.current_time() + self._silence, self._last)

    def too_slow(self) -> TooSlow:
        """Return what to tell the client when the scope's deadline has passed."""
        if trio.current_time() >= self._last:
            # Not the number: of what the client has given, other nodes may have used up a part.
            return TooSlow("The answer was not complete within the time that its client gives it")
        return TooSlow(f"The model gave nothing for {self._silence:g} s")

    async def prepare(self) -> None:
        """Read the request, unless that has been done, and get ready to encode its answer."""
        request = self.call.request
        endpoint = ENDPOINTS[request.endpoint]
        parsed = request.parsed
        if parsed is None:
            arguments = (request.body, request.content_type, request.headers)
            if len(request.body) < _PARSE_IN_THREAD:
                parsed = endpoint.parse(*arguments)
            else:
                parsed = await trio.to_thread.run_sync(endpoint.parse, *arguments)
        self.request = parsed
        self._encoder = endpoint.encoder(parsed, response_id=_chance.token(12), created=int(time.time()))

    async def push(self, chunk: object) -> None:
        """See ``Provider``."""
        if self.call.ended and self.call.cancelled is None:
            raise trio.ClosedResourceError("the output has been ended")
        self._put(self._encoder.encode(chunk))
        if self.call.waiting_bytes >= self.call.window:
            self._scope.deadline = self._last
        await self.call.wait_room()
        if self.call.begun:
            self._scope.deadline = self.next_deadline()

    def end(self) -> None:
        """See ``Provider``."""
        if self.call.ended:
            return
        self._put(self._encoder.finish())
        self.call.put(Done())

    def fail(self, error: ApiError) -> None:
        """End the answer with an error; after its end, there is nobody to tell."""
        if not self.call.ended:
            self.call.put(Failed(error))

    def _put(self, data: bytes) -> None:
        """Put what the encoder made of a piece of output; of nothing, a sign of life.

        A stream begins with something to show, since its head is what commits the client to a success. Until then
        nothing that the handler does counts as output.
        """
        now = trio.current_time()
        if not self.call.begun:
            if self._encoder.streaming and not data:
                return
            self.call.put(self._encoder.head)
        elif not data and now < self._next_sign:
            return
        self.call.put(Data(data))
        self._next_sign = now + _SIGN_OF_LIFE
