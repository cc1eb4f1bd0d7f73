"""Makes a backend of a user's function: reads its requests, encodes its output, and reports its errors.

A handler's output is encoded on the node where the model runs, piece by piece, so that the nodes that relay the answer
need not look inside it.

A plain answer is sent in one piece at its end. So that the gateway does not take a long one for a stalled one, its head
is put with the first output, and output that has nothing to show yet becomes an empty ``Data``, once a second at most.
The gateway takes that as a sign of life. It sends nothing to the client for it, and can still choose another status.
"""

from __future__ import annotations

import copy
import math
import time
from functools import partial
from typing import Any, Final

import attrs
import trio

from ..core import randomness
from ..core.answer import Done
from ..core.call import Call
from ..core.limits import PARSE_IN_THREAD
from ..core.model import ModelInfo
from ..core.request import Request
from ..core.threads import NoThread, run_in_thread
from ..errors import Overloaded
from ..openai import (
    COUNT_TOKENS,
    CustomRequest,
    Encoder,
    Endpoint,
    FormReader,
    OutputCheck,
    endpoint_named,
    require_jsonschema,
)
from ..options import ClusterServerOptions
from ..routing.backend import LOCAL
from ..routing.health import Health
from .adapters import Adapter, Handler, adapt
from .asyncio_handler import AsyncioHandler
from .pool import HandlerPool
from .slots import slots_of_model
from .task import CallTask, is_failure

__all__ = ["HandlerBackend"]

#: Seconds between the signs of life of a plain answer.
_SIGN_OF_LIFE: Final = 1.0


class HandlerBackend:
    """A model whose requests are answered by functions of this process. See ``Backend``.

    Args:
        info: what the model is.
        handler: the function.
        pool: where its calls run.
        capability: what the function answers: a kind, for the endpoints of that kind, or the path of a custom route.
            Without it, the model's own kind.
        max_concurrency: how many of the model's calls run at once, within the slots of the process; ``None``: as many
            as there are.
        validate: answers that do not fit the ``response_format`` of a chat are errors.

    Raises:
        TypeError: the function has none of the shapes that a handler may have, or ``max_concurrency`` is no number.
        ValueError: ``max_concurrency`` is less than 1.
        ClusterError: the package that validates is not installed.

    Attributes:
        info: what the model is, with the endpoints that were added.
        health: see ``Backend``; available unless the node is starting.
    """

    name = LOCAL

    def __init__(
        self,
        info: ModelInfo,
        handler: Handler,
        pool: HandlerPool,
        capability: str = "",
        *,
        max_concurrency: int | None = None,
        validate: bool = False,
    ) -> None:
        if validate:
            require_jsonschema()
        self._validates = validate
        self._slots = None if max_concurrency is None else slots_of_model(max_concurrency)
        self.info = info
        self._adapters: dict[str, Adapter] = {capability or info.kind: adapt(handler)}
        self.health = Health()
        self._pool = pool
        self._run_loop_of(handler)

    def add_endpoint(self, capability: str, handler: Handler) -> None:
        """Let another function answer the endpoints of one more kind, or one more route. ``info`` is updated.

        Args:
            capability: a kind, or the path of a custom route.
            handler: the function.

        Raises:
            TypeError: the function has none of the shapes that a handler may have.
            ValueError: the model answers that already.
        """
        if capability in self._adapters:
            raise ValueError(f"the model '{self.info.name}' answers {capability} already")
        self._adapters[capability] = adapt(handler)
        self._run_loop_of(handler)
        self.info = attrs.evolve(self.info, extra_endpoints=(*self.info.extra_endpoints, capability))

    def _run_loop_of(self, handler: Handler) -> None:
        """Let the loop of a handler that was written for asyncio run while the server runs."""
        if isinstance(handler, AsyncioHandler):
            self._pool.loops.add(handler.loop)

    @property
    def elsewhere(self) -> int:
        """See ``Backend``."""
        return 0

    @property
    def load(self) -> float:
        """See ``Backend``."""
        load = (self._pool.running + self._pool.waiting) / self._pool.capacity
        if self._slots is None:
            return load
        return max(load, (self._slots.running + self._slots.waiting) / self._slots.capacity)

    def open(self, request: Request) -> Call:
        """See ``Backend``."""
        adapter = self._adapters.get(request.kind) or self._adapters[request.endpoint]

        def make_task(call: Call, scope: trio.CancelScope, options: ClusterServerOptions) -> CallTask:
            return HandlerTask(call, scope, options, adapter, self._pool.node_name, validates=self._validates)

        if request.endpoint == COUNT_TOKENS:
            # A prompt is counted in a short time, and should not wait for answers that take long.
            return self._pool.start(request, make_task, None)
        return self._pool.start(request, make_task, self._pool.slots, self._slots)


class HandlerTask(CallTask):
    """One call that a handler answers, and the provider into which it pushes its output.

    Args:
        call, scope, options: see ``CallTask``.
        adapter: runs the handler.
        worker: the name of this node, for the handler.
        validates: check whether the answer fits the ``response_format`` of the request.

    Attributes:
        request: the request as the handler gets it; set when the work begins.
    """

    request: Any
    _encoder: Encoder

    def __init__(
        self,
        call: Call,
        scope: trio.CancelScope,
        options: ClusterServerOptions,
        adapter: Adapter,
        worker: str = "",
        *,
        validates: bool = False,
    ) -> None:
        super().__init__(call, scope, options)
        self._adapter = adapter
        self._worker = worker
        self._body = call.request.body
        self._parsed = call.request.parsed
        self._endpoint: Endpoint | None = None
        self._next_sign = -math.inf
        self._validates = validates
        self._check: OutputCheck | None = None
        # The handler has ended an output that is still to be checked.
        self._is_held = False

    async def prepare(self) -> None:
        """Wait for the body of the request. The handler cannot begin before that, so it takes no slot."""
        upload = self.call.request.upload
        if upload is None:
            return
        if not upload.complete:
            self.pause_idle_timer()
        request = self.call.request
        try:
            self._endpoint = endpoint_named(request.endpoint)
            parse_form = self._endpoint.parse_form
            if parse_form is None:
                # A small body has arrived with its head; upload.read() would cost two passes through the scheduler.
                self._body = upload.receive_nowait() if upload.complete else await upload.read()
            else:
                # Piece by piece, since parsing a large form at once would block the event loop while it is copied.
                form = FormReader(request.content_type)
                while piece := await upload.receive():
                    form.feed(piece)
                self._parsed = parse_form(form.finish(), request.headers, checked=request.checked)
        except Exception as error:
            self.fail(self.to_api_error(error))
        self.restart_idle_timer()

    async def work(self) -> None:
        """Run the handler once."""
        # The watchdog names it in the log if this handler blocks the event loop; see `blocking_frame`.
        __traceback_info__ = f"handler of '{self.call.request.model}'"
        try:
            await self._read_request()
            if getattr(self.request, "prompts", None) is not None:
                await self._answer_parts()
            else:
                await self._adapter(self.request, self)
            await self._put_early_parts()
            if self._check is not None:
                check, self._check = self._check, None
                if self.call.end is None:
                    await run_in_thread(check.verify)
            self.end()
        except (Exception, BaseExceptionGroup, SystemExit) as error:
            if not is_failure(error):
                raise
            # Without a thread the handler has not been called. Another node may have one.
            api_error = self.to_api_error(error)
            self.fail(
                api_error,
                retryable=isinstance(error, NoThread) and not self.call.begun,
                over_capacity=isinstance(api_error, Overloaded),
            )

    async def _answer_parts(self) -> None:
        """Run the handler for each of several prompts, one after the other in this slot."""
        *parts, last = self.request.parts()
        for part in parts:
            await self._adapter(part, _PartProvider(self))
            self._encoder.next_part()
        await self._adapter(last, self)

    async def _read_request(self) -> None:
        """Parse the request, unless that has been done, and make the encoder of its answer."""
        request = self.call.request
        endpoint = self._endpoint or endpoint_named(request.endpoint)
        parsed = self._parsed
        if parsed is None:
            arguments = (self._body, request.content_type, request.headers)
            parse = partial(endpoint.parse, *arguments, checked=request.checked)
            parsed = parse() if len(self._body) < PARSE_IN_THREAD else await run_in_thread(parse)
        self._body, self._parsed = b"", None
        if request.query and isinstance(parsed, CustomRequest):
            parsed = attrs.evolve(parsed, query=request.query)
        # Nothing else has the request yet, so it is completed in place: a copy of all its fields would cost more than
        # everything else that is done here.
        object.__setattr__(parsed, "worker", self._worker)
        object.__setattr__(parsed, "key_name", request.principal.name)
        if request.trace is not None:
            # It may have been parsed before the trace was opened, whose context is in the headers.
            object.__setattr__(parsed, "headers", request.headers)
        self.request = parsed
        is_checked = self._validates and request.endpoint != COUNT_TOKENS
        if is_checked and (check := OutputCheck.of(parsed)) is not None:
            await run_in_thread(check.check_schema)
            self._check = check
        if request.alias:
            # Answers have the name that the client knows.
            parsed = copy.copy(parsed)
            object.__setattr__(parsed, "model", request.alias)
        self._encoder = endpoint.encoder(parsed, response_id=randomness.token(12), created=int(time.time()))

    async def push(self, chunk: object) -> None:
        """See ``Provider``."""
        call = self.call
        if self._is_held or (call.end is not None and call.cancelled is None and not call.satisfied):
            raise trio.ClosedResourceError("the output has been ended")
        if self._encoder.divisible:
            *most, chunk = self._encoder.divide(chunk)
            for part in most:
                self._put(self._encoder.encode(part))
                await trio.lowlevel.checkpoint()
        self._put(self._encoder.encode(chunk))
        if self._check is not None:
            self._check.take(chunk)
        await self.apply_backpressure()
        if self.call.begun:
            self.restart_idle_timer()

    async def _put_early_parts(self) -> None:
        """Put those parts of a large answer that the encoder gives before its end, one by one."""
        if self.call.end is None:
            for data in self._encoder.early():
                self._put(data)
                await self.apply_backpressure()
                self.restart_idle_timer()

    def end(self) -> None:
        """See ``Provider``."""
        if self.call.end is not None:
            return
        if self._check is not None:
            # Checking takes a thread, and this must not wait. The answer ends when the handler returns.
            self._is_held = True
            return
        self._put(self._encoder.finish())
        self.call.put(Done(self._encoder.reported_usage, self._encoder.finish_reasons))

    def _put(self, data: bytes) -> None:
        """Put what the encoder made of a piece of output; if that is empty, put a sign of life.

        A stream begins with the first piece that is not empty, since its head commits the answer to a success. Output
        before that does not restart the idle timer.
        """
        if not self.call.begun:
            if self._encoder.streaming and not data:
                return
            self.call.put(self._encoder.head)
        if not data:
            now = trio.current_time()
            if now < self._next_sign:
                return
            self._next_sign = now + _SIGN_OF_LIFE
        self.call.body.put(data)


class _PartProvider:
    """The provider of one prompt of several, where it is not the last. Its end is not that of the answer. See
    ``Provider``.
    """

    def __init__(self, task: HandlerTask) -> None:
        self._task = task
        self._ended = False

    async def push(self, chunk: object) -> None:
        if self._ended:
            raise trio.ClosedResourceError("the output has been ended")
        await self._task.push(chunk)

    def end(self) -> None:
        self._ended = True
