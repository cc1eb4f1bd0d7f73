"""HTTP on sockets: hypercorn's connections under a roof of our own.

hypercorn brings the protocol, one ``TCPServer`` per connection. The loop around it is ours, for three
reasons. A connection that fails for whatever reason is its own trouble and ends nobody else's. The end can be
forced: hypercorn shields its socket writes, so a client that stops reading would hold up a cancelled server
for as long as it likes; here the sockets are closed, which no shield withstands. And an answer that can only
be ended by breaking its connection can have that.

A client that stops reading while nobody wants to stop is dropped by the kernel, where there is such a limit.
"""

from __future__ import annotations

import logging
import math
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from .._ports import Listeners, close_all
from ._gate import CONNECTION_KEY, App

__all__ = ["KEEP_ALIVE", "UNREAD_TIME", "prepare_socket", "serve_http"]

logger = logging.getLogger("trio_cluster.http")

#: Seconds that a connection may be idle between requests; longer than the usual load balancer's 60, which
#: then is the one that closes, and never in the instant in which it sends. Also bounds how long a request's
#: head may take.
KEEP_ALIVE: Final = 75.0

#: Requests on one connection before it is closed.
_REQUESTS_PER_CONNECTION: Final = 100_000

#: Seconds that bytes may stay unread by the client before the connection is dropped.
UNREAD_TIME = 30.0


def prepare_socket(sock: Any) -> None:
    """Set on a listening socket what the connections that it accepts are to inherit."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNREAD_TIME * 1000))


async def serve_http(
    app: App,
    listeners: Listeners,
    *,
    shutdown_trigger: Callable[[], Awaitable[object]] = trio.sleep_forever,
    grace: float = 3.0,
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
        task_status: started when connections are served.

    Raises:
        hypercorn.utils.LifespanFailureError: one of the application's ``before_serving`` functions failed.
    """
    config = _config()
    wrapped = ASGIWrapper(app)  # type: ignore[arg-type]
    state: dict[str, Any] = {}
    try:
        async with trio.open_nursery() as nursery:
            lifespan = Lifespan(wrapped, config, state)
            await nursery.start(lifespan.handle_lifespan)
            await lifespan.wait_for_startup()
            if lifespan.supported and lifespan.shutdown.is_set():
                # It has failed, and its error is on the way to this nursery.
                await trio.sleep_forever()
            for listener in listeners:
                prepare_socket(listener.socket)  # type: ignore[attr-defined]
            connections = _Connections(wrapped, config, state)
            await connections.serve(listeners, shutdown_trigger, grace, task_status)
            await lifespan.wait_for_shutdown()
            nursery.cancel_scope.cancel(reason="the server has stopped")
    finally:
        close_all(listeners)


def _config() -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = logger
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE
    config.keep_alive_max_requests = _REQUESTS_PER_CONNECTION
    # Never for a stream: hypercorn counts the silence of a client that only listens.
    config.read_timeout = None
    return config


class _Connection:
    """One accepted connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket

    def close(self) -> None:
        """Close it now. What has been written is still delivered; whoever waits for it gets an error."""
        self._socket.close()

    def reset(self) -> None:
        """Break it, so that the peer sees an error and not an end."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


class _Connections:
    """All connections of one server."""

    def __init__(self, app: ASGIWrapper, config: Config, state: dict[str, Any]) -> None:
        self._app = app
        self._config = config
        self._state = state
        self._context = WorkerContext(None)
        self._open: set[_Connection] = set()
        self._empty = trio.Event()

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
            async with trio.open_nursery() as acceptors:
                for listener in listeners:
                    acceptors.start_soon(self._accept, listener, handlers)
                task_status.started()
                await shutdown_trigger()
                acceptors.cancel_scope.cancel(reason="the server takes no more connections")
            # Idle connections wait for this.
            await self._context.terminated.set()
            with trio.move_on_after(grace) if math.isfinite(grace) else trio.CancelScope():
                while self._open:
                    self._empty = trio.Event()
                    await self._empty.wait()
            handlers.cancel_scope.cancel(reason="the server has stopped")

    async def _accept(self, listener: trio.abc.Listener[Any], handlers: trio.Nursery) -> None:
        await trio.serve_listeners(self._serve_one, [listener], handler_nursery=handlers)

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        connection = _Connection(stream)
        self._open.add(connection)
        state = ConnectionState({**self._state, CONNECTION_KEY: connection})
        try:
            await TCPServer(self._app, self._config, self._context, state, stream)  # type: ignore[arg-type]
        except* Exception as group:
            logger.error("a connection failed", exc_info=group)
        finally:
            # A cancelled TCPServer leaves its socket open.
            connection.close()
            self._open.discard(connection)
            if not self._open:
                self._empty.set()

    async def _close_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            for connection in list(self._open):
                connection.close()
