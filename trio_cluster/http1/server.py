"""HTTP on sockets: connections come in, are served, and end with the server.

A connection that fails for whatever reason is its own trouble and ends nobody else's. The application's lifespan is in
``lifespan.py``, the connections are in ``connection.py``, and who reads them in ``net/readers.py``.

A client that stops reading while nobody wants to stop is dropped by the kernel, where there is such a limit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio

from ..net.acceptor import accept_all
from ..net.idle import IdleTimeout
from ..net.readers import Reader, SharedReader, TaskReader, has_epoll
from ..net.sockets import Listeners, close_all
from ..net.streams import ByteStream
from .asgi import App
from .connection import Http1Connection
from .lifespan import open_lifespan
from .refusal import RenderRefusal, render_as_text

__all__ = ["KEEP_ALIVE", "UNREAD_TIME", "serve_http"]

logger = logging.getLogger("trio_cluster.http")

#: Seconds that a connection may be idle between requests; longer than the usual load balancer's 60, which
#: then is the one that closes, and never in the instant in which it sends. Also bounds how long a request's
#: head may take.
KEEP_ALIVE: Final = 75.0

#: Seconds that bytes may stay unread by the client before the connection is dropped.
UNREAD_TIME = 30.0


async def serve_http(
    app: App,
    listeners: Listeners,
    *,
    shutdown_trigger: Callable[[], Awaitable[object]] = trio.sleep_forever,
    grace: float = 3.0,
    render_refusal: RenderRefusal = render_as_text,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application until ``shutdown_trigger`` returns, and then until its connections have
    ended.

    From then on no new connection is taken, idle ones are closed, and requests that run have ``grace``
    seconds to finish. What is left after that is cancelled, and its connections are closed. Cancelling this
    function does the same without grace; the application's ``after_serving`` functions are then not run.

    Args:
        app: what to serve.
        listeners: where connections come in; they are closed in any case.
        shutdown_trigger: returns when it is time to stop.
        grace: seconds that requests have to finish; may be infinite.
        render_refusal: makes the answer to what is not a request.
        task_status: started when connections are served.

    Raises:
        LifespanError: the application could not start, or could not shut down; in an exception group.
    """
    state: dict[str, Any] = {}
    try:
        async with open_lifespan(app, state):
            for listener in listeners:
                listener.limit_unread_time(UNREAD_TIME)
            connections = _Connections(app, state, render_refusal)
            await connections.serve(listeners, shutdown_trigger, grace, task_status)
    finally:
        close_all(listeners)


class _Connections:
    """All connections of one server."""

    def __init__(self, app: App, state: dict[str, Any], render_refusal: RenderRefusal) -> None:
        self._app = app
        self._state = state
        self._render_refusal = render_refusal
        # A dict and not a set: connections end in the order in which they came, and not in one of addresses.
        self._open: dict[Http1Connection, None] = {}
        self._empty = trio.Event()
        self._idle = IdleTimeout(KEEP_ALIVE)
        self._reader: Reader

    async def serve(
        self,
        listeners: Listeners,
        shutdown_trigger: Callable[[], Awaitable[object]],
        grace: float,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Accept until ``shutdown_trigger`` returns, then drain, then close what is left."""
        async with trio.open_nursery() as handlers:
            handlers.start_soon(self._close_when_cancelled)
            self._reader = _reader(listeners, handlers)
            handlers.start_soon(self._reader.run)
            handlers.start_soon(self._idle.run)
            async with trio.open_nursery() as acceptors:
                admit = partial(self._admit, handlers)
                for listener in listeners:
                    acceptors.start_soon(accept_all, listener, admit)
                task_status.started()
                await shutdown_trigger()
                acceptors.cancel_scope.cancel(reason="the server takes no more connections")
            for connection in list(self._open):
                connection.close_when_idle()
            with trio.move_on_after(grace) if math.isfinite(grace) else trio.CancelScope():
                while self._open:
                    self._empty = trio.Event()
                    await self._empty.wait()
            handlers.cancel_scope.cancel(reason="the server has stopped")

    def _admit(self, handlers: trio.Nursery, stream: ByteStream) -> None:
        try:
            connection = Http1Connection(
                stream, self._app, self._state, self._reader, self._idle, self._render_refusal
            )
        except OSError:
            # The client has left before its address could be read.
            stream.close()
            return
        self._open[connection] = None
        handlers.start_soon(self._serve_one, connection)

    async def _serve_one(self, connection: Http1Connection) -> None:
        try:
            await connection.serve()
        except Exception:
            logger.exception("a connection failed")
        finally:
            del self._open[connection]
            if not self._open:
                self._empty.set()

    async def _close_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            for connection in list(self._open):
                connection.close()


def _reader(listeners: Listeners, nursery: trio.Nursery) -> Reader:
    """Return who reads the connections that come in there."""
    if has_epoll() and all(listener.shares_descriptors for listener in listeners):
        return SharedReader()
    return TaskReader(nursery)
