"""The worker's end: dials the master, registers this node's models, serves what is forwarded, and comes back.

Each link to the master is one :class:`_Service`. When the link ends, every call that came over it is cancelled at
once, since there is nobody left to answer; then the worker waits and dials again. The wait is exponential with full
jitter (uniform between nothing and a bound that doubles), so that a hundred workers whose master was restarted do
not come back as one.

An answer flows without a task of its own: the call hands its events to the session (``Call.redirect``), and the
link's writer, having sent a batch, tells each call how many of its bytes have gone. That is what lets a handler go
on when its answer moves, and holds it back when it does not.

A cancelled call is reported to the master when its work has really stopped. Only then is its slot free, and only
then may the master believe it.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

import trio

from ._calls import Call, Data, Done, Event, Failed, Head, Request
from ._errors import ApiError, CallCancelled, HandlerFailed, HandshakeRefused, InvalidRequest
from ._handlers import HandlerPool
from ._link import PROBE_PATH, Link, LinkClosed, dial
from ._models import ModelInfo
from ._options import ClusterServerOptions
from ._ports import Network, Sockets
from ._registry import Registry
from ._version import __version__
from .wire import (
    Cancel,
    Data as DataMessage,
    Drain,
    ForwardRequest,
    Handshake,
    ModelRegistered,
    ModelRejected,
    WorkerEvent,
    WorkerSession,
)

__all__ = ["WorkerClient", "check_is_cluster_server", "is_master"]

logger = logging.getLogger("trio_cluster.client")

#: The first bound of the wait before dialling again, and the last, in seconds.
_BACKOFF_FIRST: Final = 0.5
_BACKOFF_LAST: Final = 30.0
#: HTTP statuses with which a master, and nothing on the way to one, refuses for good.
_FINAL: Final = (400, 401, 403, 404, 405, 426)


class WorkerClient:
    """A worker's side of the cluster.

    Args:
        registry: this node's own models.
        pool: where their handlers run; its load is told to the master.
        options: read at the time of use.
        node_id: this worker's name.

    Attributes:
        rejected_models: the models that the master would not take, with its reasons.
        connected: whether there is a link to the master, with all models registered.
    """

    def __init__(
        self, registry: Registry, pool: HandlerPool, options: ClusterServerOptions, node_id: str
    ) -> None:
        self.rejected_models: dict[str, str] = {}
        self.connected = False
        self._registry = registry
        self._pool = pool
        self._options = options
        self._node_id = node_id
        # Tells this process from another one that uses the same name; see `_workers`.
        self._instance = f"{random.getrandbits(64):016x}"
        self._service: _Service | None = None
        self._leaving: str | None = None

    async def run(
        self,
        connect: Callable[[], Awaitable[trio.abc.Stream]],
        host: str,
        on_registered: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve the master for as long as this runs, through any number of links.

        Args:
            connect: makes a new connection to the master's internal port; may raise ``OSError``.
            host: what to call the master, in the handshake and in logs.
            on_registered: called when all models are registered for the first time.

        Returns:
            After :meth:`leave`, when everything that was queued has been sent.

        Raises:
            HandshakeRefused: the master will not have this worker, or there is no master there.
        """
        first, bound = True, _BACKOFF_FIRST

        def registered() -> None:
            nonlocal bound, first
            bound = _BACKOFF_FIRST
            self.connected = True
            if first:
                first = False
                on_registered()

        while not self._is_leaving():
            try:
                why = await self._serve_once(connect, host, registered)
            finally:
                was_connected, self.connected = self.connected, False
            if self._is_leaving():
                return
            delay = random.uniform(0, bound)
            bound = min(2 * bound, _BACKOFF_LAST)
            fields = {"master": host, "retry_in": round(delay, 2)}
            text = "lost the master: %s" if was_connected else "no link to the master: %s"
            logger.warning(text, why, extra={"fields": fields})
            await trio.sleep(delay)

    def announce(self, info: ModelInfo) -> None:
        """Tell the master of a new model, if there is a link; otherwise it is told with the others."""
        if self._service is not None:
            self._service.announce(info)

    def withdraw(self, name: str) -> None:
        """Tell the master that a model is gone. Calls for it that run go on."""
        self.rejected_models.pop(name, None)
        if self._service is not None:
            self._service.withdraw(name)

    def drain(self, reason: str) -> None:
        """Ask the master for no more calls; those that run go on."""
        if self._service is not None:
            self._service.drain(reason)

    def leave(self, reason: str) -> None:
        """Make :meth:`run` return, after everything that is queued has been sent."""
        self._leaving = reason
        if self._service is not None:
            self._service.link.hang_up(reason)

    def _is_leaving(self) -> bool:
        return self._leaving is not None

    async def _serve_once(
        self, connect: Callable[[], Awaitable[trio.abc.Stream]], host: str, on_registered: Callable[[], None]
    ) -> str:
        try:
            with trio.fail_after(self._options.worker_timeout):
                stream = await connect()
        except (OSError, trio.TooSlowError) as error:
            return _plain(error)
        service = _Service(self, stream, on_registered)
        self._service = service
        try:
            await service.link.run(dial(stream, host, token=self._options.cluster_token))
        except LinkClosed as closed:
            if closed.status in _FINAL:
                raise HandshakeRefused(_refusal(host, closed)) from None
            if closed.strangers:
                raise HandshakeRefused(f"{host}: {closed.why}") from None
            return closed.why
        finally:
            self._service = None
            service.abandon()


class _Service:
    """One link to the master, from dialling to its end."""

    def __init__(
        self, client: WorkerClient, stream: trio.abc.Stream, on_registered: Callable[[], None]
    ) -> None:
        self.client = client
        self._registry = client._registry
        self._on_registered = on_registered
        self._unanswered: set[str] | None = None
        self._calls: dict[int, Call] = {}
        self._bodies: dict[int, _Upload] = {}
        self.session = WorkerSession(
            client._node_id,
            __version__,
            trio.current_time(),
            instance=client._instance,
            heartbeat_interval=client._options.heartbeat_interval,
            silence_timeout=client._options.worker_timeout,
        )
        self.link = Link(
            stream,
            self.session,
            on_events=self._handle_all,
            on_sent=self._sent,
            on_end=lambda _: self.abandon(),
            before_tick=self._tell_load,
            timeout=client._options.worker_timeout,
        )

    def announce(self, info: ModelInfo) -> None:
        if self._unanswered is None:
            # The handshake is still to come, and all models are announced after it.
            return
        try:
            self.session.register(info)
        except ValueError as error:
            self._rejected(info.name, str(error))
            return
        self._unanswered.add(info.name)
        self.link.wake()

    def withdraw(self, name: str) -> None:
        if self._unanswered is None:
            return
        self._answered(name)
        self.session.unregister(name)
        self.link.wake()

    def drain(self, reason: str) -> None:
        if self._unanswered is not None:
            self.session.drain(reason)
            self.link.wake()

    def abandon(self) -> None:
        """Cancel everything that came over the link: it is over, and nobody is left to answer."""
        self._bodies.clear()
        for call in list(self._calls.values()):
            call.cancel("the link to the master is lost")

    def _tell_load(self) -> None:
        pool = self.client._pool
        self.session.load = (pool.running, pool.waiting, pool.capacity)

    def _handle_all(self, events: Sequence[WorkerEvent]) -> None:
        for event in events:
            self._handle(event)

    def _handle(self, event: WorkerEvent) -> None:
        match event:
            case ForwardRequest():
                self._bodies[event.call] = _Upload(event)
            case DataMessage():
                self._body_piece(event)
            case Cancel():
                self._cancel(event.call, event.reason)
            case Handshake():
                self._welcome(event)
            case ModelRegistered():
                self.client.rejected_models.pop(event.name, None)
                self._answered(event.name)
            case ModelRejected():
                self._rejected(event.name, event.reason)
                self._answered(event.name)
            case Drain():
                logger.info("the master is about to stop: %s", event.reason)

    def _welcome(self, handshake: Handshake) -> None:
        fields = {"master": handshake.node_id, "version": handshake.version}
        logger.info("connected to the master", extra={"fields": fields})
        self._tell_load()
        self.session.beat()
        self._unanswered = set()
        for info in self._registry.infos():
            self.announce(info)
        self._answered("")

    def _rejected(self, name: str, reason: str) -> None:
        self.client.rejected_models[name] = reason
        logger.warning("the master refused a model: %s", reason, extra={"fields": {"model": name}})

    def _answered(self, name: str) -> None:
        assert self._unanswered is not None
        self._unanswered.discard(name)
        if not self._unanswered and not self.client.connected:
            self._on_registered()

    def _body_piece(self, event: DataMessage) -> None:
        upload = self._bodies.get(event.call)
        if upload is None:
            return
        upload.pieces.append(bytes(event.data))
        upload.size += len(event.data)
        limit = self.client._options.server.max_body_size
        if upload.size > limit:
            del self._bodies[event.call]
            error = InvalidRequest(f"The request body is larger than {limit} bytes", status=413)
            self.session.fail(event.call, error)
        elif event.last:
            del self._bodies[event.call]
            self._open(event.call, upload.request())
        else:
            self.session.grant(event.call, len(event.data))
        self.link.wake()

    def _open(self, call_id: int, request: Request) -> None:
        try:
            call = self._registry.open(request)
        except ApiError as error:
            self.session.fail(call_id, error)
            return
        self._calls[call_id] = call
        call.on_release(partial(self._released, call_id, call))
        call.redirect(partial(self._send, call_id, call))

    def _send(self, call_id: int, call: Call, event: Event) -> None:
        """Be the sink of a call: its events go to the session as they are put."""
        if call_id not in self._calls:
            return
        match event:
            case Data():
                self.session.send(call_id, event.data)
            case Head():
                try:
                    self.session.respond(call_id, event.status, event.content_type, event.headers)
                except ValueError as error:
                    fields = {"model": call.request.model, "request_id": call.request.request_id}
                    logger.error("an answer that HTTP cannot carry: %s", error, extra={"fields": fields})
                    del self._calls[call_id]
                    self.session.fail(call_id, HandlerFailed())
                    call.cancel("its head cannot be sent")
            case Done():
                self.session.done(call_id)
                del self._calls[call_id]
            case Failed():
                if call.cancelled is not None:
                    # The answer is over, the work is not: the end is reported when it is released.
                    return
                self.session.fail(call_id, event.error)
                del self._calls[call_id]
        self.link.wake()

    def _released(self, call_id: int, call: Call) -> None:
        if self._calls.pop(call_id, None) is not None:
            self.session.fail(call_id, CallCancelled(call.cancelled or "cancelled"))
            self.link.wake()

    def _sent(self, sent: Sequence[tuple[int, int]]) -> None:
        for call_id, count in sent:
            call = self._calls.get(call_id)
            if call is not None:
                call.taken(count)

    def _cancel(self, call_id: int, reason: str) -> None:
        if self._bodies.pop(call_id, None) is not None:
            self.session.fail(call_id, CallCancelled(reason))
            self.link.wake()
            return
        call = self._calls.get(call_id)
        if call is not None:
            call.cancel(reason)


class _Upload:
    """A request whose body is still coming in."""

    def __init__(self, opened: ForwardRequest) -> None:
        self.opened = opened
        self.pieces: list[bytes] = []
        self.size = 0

    def request(self) -> Request:
        opened = self.opened
        return Request(
            endpoint=opened.endpoint,
            kind=opened.kind,  # type: ignore[arg-type]  # an unknown kind matches no model
            model=opened.model,
            body=b"".join(self.pieces),
            content_type=opened.content_type,
            headers=opened.headers,
            request_id=opened.request_id,
            timeout=math.inf if opened.timeout is None else opened.timeout,
            budget=math.inf if opened.budget is None else opened.budget,
        )


# The name of the last argument is part of the public contract.
async def check_is_cluster_server(host: str, internal_port: int, timeout: float = 2.0) -> bool:  # noqa: ASYNC109
    """Find out whether a trio_cluster master takes workers at this address.

    Args:
        host: a name or a numeric address.
        internal_port: the port for workers, which is the external one plus 1000 unless somebody chose otherwise.
        timeout: seconds that finding out may take; past it the answer is no.

    Returns:
        True if something there gave the cluster's magic number. No token is needed for that.
    """
    return await is_master(Sockets(), host, internal_port, timeout)


async def is_master(network: Network, host: str, internal_port: int, patience: float) -> bool:
    """Be :func:`check_is_cluster_server` on any network."""
    found = False

    def look(events: Sequence[WorkerEvent]) -> None:
        nonlocal found
        if any(isinstance(event, Handshake) for event in events):
            found = True
            link.end("probed")

    with trio.move_on_after(patience):
        try:
            stream = await network.connect(host, internal_port)
            session = WorkerSession("probe", __version__, trio.current_time())
            link = Link(stream, session, on_events=look, timeout=patience)
            await link.run(dial(stream, host, path=PROBE_PATH))
        except (OSError, LinkClosed):
            pass
    return found


def _plain(error: Exception) -> str:
    if isinstance(error, trio.TooSlowError):
        return "it does not answer"
    causes: list[Any] = [error]
    while isinstance(causes[0], BaseExceptionGroup):
        causes = list(causes[0].exceptions)
    cause = causes[0]
    if isinstance(cause, OSError) and cause.__cause__ is not None:
        inner = cause.__cause__
        while isinstance(inner, BaseExceptionGroup):
            inner = inner.exceptions[0]
        cause = inner
    return (cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)) or type(
        cause
    ).__name__


def _refusal(host: str, closed: LinkClosed) -> str:
    if closed.status == 401:
        return f"{host}: {closed.why}"
    return (
        f"{host}: this is not the port on which a trio_cluster master takes workers ({closed.why}); "
        "that is the port of its API plus 1000"
    )
