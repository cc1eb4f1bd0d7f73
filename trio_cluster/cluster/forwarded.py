"""The calls that come over a worker's link: opened here, answered by this node's models.

An answer needs no task of its own: the call hands its events to the session (``Call.redirect``), and the link's writer,
after each batch, tells each call how many of its bytes have been written. That is the backpressure: a handler goes on
while its answer moves, and is held back while it does not. A request body flows the other way in the same manner:
pieces are put into the call's upload as they come in, and the master may send more when the handler has taken them.

The end of a cancelled call is reported to the master when its work has really stopped. Only then is its slot free, and
only then may the master count on it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from ..core.answer import Done, Event, Failed, Head
from ..core.call import Call
from ..core.channel import ByteChannel
from ..core.model_state import CONTROL
from ..core.principal import Principal
from ..core.request import Request
from ..core.story import WorkerTimes
from ..errors import (
    ApiError,
    CallCancelled,
    EndpointNotFound,
    HandlerFailed,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    ShuttingDown,
)
from ..openai import ENDPOINTS
from ..options import ClusterServerOptions
from ..protocol import Data as DataMessage, ForwardRequest, State, WorkerSession
from ..routing.router import Router

__all__ = ["ForwardedCalls"]

logger = logging.getLogger("trio_cluster.client")

#: In a second.
_MICROSECONDS: Final = 1_000_000


class ForwardedCalls:
    """The calls of one link.

    Args:
        session: the worker's half of the protocol.
        wake: called when the session has something to send. Synchronous.
        router: this node's models, and the calls for them.
        options: read at the time of use.
        open_control: opens a call that loads or unloads a model; see ``local/control.py``.

    Attributes:
        live: the calls whose end has not been sent to the master, by number.
        unfinished: how many calls there are whose work has not stopped.
        on_changed: called when that changes; ``None``: nothing is. Synchronous.
    """

    def __init__(
        self,
        session: WorkerSession,
        wake: Callable[[], None],
        router: Router,
        options: ClusterServerOptions,
        open_control: Callable[[Request], Call],
    ) -> None:
        self.live: dict[int, Call] = {}
        self.unfinished = 0
        self.on_changed: Callable[[], None] | None = None
        # The calls whose body the master cannot send a second time.
        self._non_replayable: set[int] = set()
        self._session = session
        self._wake = wake
        self._router = router
        self._options = options
        self._open_control = open_control

    def cancel_all(self) -> None:
        """Cancel all calls: the link is over, and there is no one left to answer."""
        for call in list(self.live.values()):
            call.cancel("the link to the master is lost")

    def model_waits(self) -> Iterator[tuple[int, str, float]]:
        """Yield each call that waits for its model to run: its number, what for, and for how many seconds, or -1."""
        for call_id, call in self.live.items():
            wait = call.model_wait
            if wait is not None:
                seconds = wait.seconds
                yield call_id, wait.what, -1.0 if seconds is None else round(seconds, 3)

    def requeue_uploading(self) -> None:
        """Fail, as retryable, the calls whose body is still being received: they may still run on another replica.

        Except those whose body the master cannot send a second time.
        """
        for call_id, call in list(self.live.items()):
            if call.phase == "uploading" and call_id not in self._non_replayable:
                del self.live[call_id]
                self._session.fail(call_id, ShuttingDown(), retryable=True)
                call.cancel("the worker is being stopped")

    def open(self, opened: ForwardRequest) -> None:
        """Open a call; its body follows in :meth:`on_data`. A call that cannot be opened fails at once."""
        call_id = opened.call
        try:
            if opened.endpoint not in ENDPOINTS and not opened.endpoint.startswith("/"):
                raise EndpointNotFound(opened.endpoint)
            if opened.size > self._options.server.max_body_size:
                raise self._too_large()
            open_call = self._open_control if opened.kind == CONTROL else self._router.open
            call = open_call(
                Request(
                    endpoint=opened.endpoint,
                    kind=opened.kind,  # type: ignore[arg-type]  # an unknown kind matches no model
                    model=opened.model,
                    body=b"",
                    content_type=opened.content_type,
                    headers=opened.headers,
                    request_id=opened.request_id,
                    idle_timeout=math.inf if opened.timeout is None else opened.timeout,
                    checked=opened.checked,
                    principal=Principal(
                        opened.principal,
                        weight=opened.weight,
                        priority="normal"
                        if not opened.priority
                        else "high"
                        if opened.priority > 0
                        else "low",
                    ),
                    max_tokens=opened.max_tokens,
                    query=opened.query,
                    alias=opened.alias if type(opened.alias) is str else "",
                    total_timeout=math.inf if opened.budget is None else opened.budget,
                    upload=ByteChannel(opened.size, on_consumed=partial(self._consumed, call_id)),
                )
            )
        except ApiError as error:
            # Nothing was started here, and another replica need not refuse for any of these reasons.
            retryable = isinstance(error, ShuttingDown | ModelNotFound | ModelUnavailable | EndpointNotFound)
            over_capacity = isinstance(error, Overloaded)
            self._session.fail(call_id, error, retryable=retryable, over_capacity=over_capacity)
            self._wake()
            return
        self.live[call_id] = call
        self.unfinished += 1
        if self.on_changed is not None:
            self.on_changed()
        if opened.once:
            self._non_replayable.add(call_id)
            call.on_release(partial(self._non_replayable.discard, call_id))
        call.on_release(partial(self._released, call_id, call))
        call.redirect(partial(self._send, call_id, call), partial(self._send_piece, call_id))

    def fail_after_error(self, call_id: int) -> None:
        """End a call with 500, since what belongs to it raised an exception. The other calls go on.

        Raises:
            Exception: even that fails. The session is not to be trusted any more.
        """
        call = self.live.pop(call_id, None)
        if self._session.state(call_id) is not State.ENDED:
            self._session.fail(call_id, HandlerFailed())
            self._wake()
        if call is not None:
            call.cancel("an internal error")

    def on_data(self, event: DataMessage) -> None:
        """Put the next piece of a request body into its call; the call fails if the body becomes too large."""
        call = self.live.get(event.call)
        if call is None or call.request.upload is None:
            return
        upload = call.request.upload
        upload.put(bytes(event.data), last=event.last)
        if upload.received > self._options.server.max_body_size:
            del self.live[event.call]
            self._session.fail(event.call, self._too_large())
            call.cancel("its body is too large")
            self._wake()

    def _consumed(self, call_id: int, count: int) -> None:
        """Let the master send more of a body: the handler has taken ``count`` bytes."""
        if self._session.grant(call_id, count):
            self._wake()

    def _too_large(self) -> ApiError:
        limit = self._options.server.max_body_size
        return InvalidRequest(f"The request body is larger than {limit} bytes", status=413)

    def _send_piece(self, call_id: int, data: bytes | memoryview, last: bool) -> bool:
        """Send a piece of a call's answer. It counts as consumed when :meth:`on_sent` reports that it was written."""
        if call_id in self.live:
            self._session.send(call_id, data)
            self._wake()
        return False

    def _send(self, call_id: int, call: Call, event: Event) -> None:
        """Send the beginning or the end of a call's answer."""
        if call_id not in self.live:
            return
        match event:
            case Head():
                try:
                    self._session.respond(call_id, event.status, event.content_type, event.headers)
                except ValueError as error:
                    fields = {"model": call.request.model, "request_id": call.request.request_id}
                    logger.error("an answer that HTTP cannot carry: %s", error, extra={"fields": fields})
                    del self.live[call_id]
                    self._session.fail(call_id, HandlerFailed())
                    call.cancel("its head cannot be sent")
            case Done():
                if call.satisfied:
                    # As for a cancelled call; its usage may not be known before.
                    return
                self._session.done(call_id, event.usage, _times(call), event.finish)
                del self.live[call_id]
            case Failed():
                if call.cancelled is not None:
                    # The answer is over, the work is not: its end is reported when the call is released.
                    return
                self._session.fail(
                    call_id,
                    event.error,
                    retryable=event.retryable,
                    timed_out=event.timed_out,
                    over_capacity=event.over_capacity,
                    times=_times(call),
                )
                del self.live[call_id]
        self._wake()

    def _released(self, call_id: int, call: Call) -> None:
        self.unfinished -= 1
        if self.on_changed is not None:
            self.on_changed()
        if self.live.pop(call_id, None) is None:
            return
        if isinstance(call.end, Done):
            self._session.done(call_id, call.end.usage, _times(call), call.end.finish)
            self._wake()
            return
        draining_reason = self._router.draining_reason
        if draining_reason is not None and not call.begun:
            # Cancelled by the end of the drain timeout before it had begun: given back for another replica to run.
            self._session.fail(call_id, ShuttingDown(draining_reason), retryable=True, times=_times(call))
        else:
            self._session.fail(call_id, CallCancelled(call.cancelled or "cancelled"), times=_times(call))
        self._wake()

    def on_sent(self, counts: Sequence[tuple[int, int]]) -> None:
        """Record, for each call, how many bytes of its answer have been written to the master."""
        for call_id, count in counts:
            call = self.live.get(call_id)
            if call is not None:
                call.body.consumed(count)

    def cancel(self, call_id: int, reason: str, *, complete: bool) -> None:
        """Cancel a call, if it has not ended; it is completed if its client has the whole answer.

        Its end is sent when its work has stopped.
        """
        call = self.live.get(call_id)
        if call is None:
            return
        if complete:
            call.satisfy(reason)
        else:
            call.cancel(reason)


def _times(call: Call) -> WorkerTimes:
    """Return what was measured of a call, for the story that the master has of its request; see ``core/story.py``."""
    opened, times = call.opened_at, {}
    for name, at in (
        ("started", call.started_at),
        ("first_output", call.begun_at),
        ("ended", call.ended_at),
        ("stopped", call.released_at),
    ):
        if at >= 0.0:
            times[name] = int((at - opened) * _MICROSECONDS)
    for name, seconds in (
        ("queued", call.queued_for),
        ("queued_model", call.queued_for_model),
        ("cold", call.cold_for),
        ("held_back", call.body.held_back),
    ):
        if seconds:
            times[name] = int(seconds * _MICROSECONDS)
    trace = call.request.trace
    if trace is not None and trace.is_exported:
        times["traced"] = 1
    return times
