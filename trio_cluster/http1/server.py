"""HTTP/1.1 on the connections that come in.

The application's lifespan is in ``lifespan.py``, one connection in ``connection.py``, what all servers do with their
connections in ``net/connections.py``, and what reads them in ``net/readers.py``.

A client that stops reading is dropped by the kernel after :data:`UNREAD_TIME`, where the kernel has such a limit.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from ..net.connections import OpenConnection, Retirement, serve_connections
from ..net.idle import IdleTimeout
from ..net.readers import Reader, SharedReader, TaskReader, has_epoll
from ..net.sockets import Listeners, close_all
from ..net.streams import ByteStream
from .asgi import App
from .connection import Http1Connection
from .lifespan import open_lifespan
from .refusal import RenderRefusal, render_as_text

__all__ = ["KEEP_ALIVE", "UNREAD_TIME", "serve_http"]

#: Seconds that a connection may be idle between requests, and that the head of a request may take. It is longer than
#: the 60 of the usual load balancer, so that the load balancer closes the connection, and never in the moment in which
#: it sends a request.
KEEP_ALIVE: Final = 75.0

#: Seconds that bytes may stay unread by the client before the connection is dropped.
UNREAD_TIME = 30.0


async def serve_http(
    app: App,
    listeners: Listeners,
    *,
    shutdown_trigger: Callable[[], Awaitable[object]] = trio.sleep_forever,
    grace: float = 3.0,
    retirement: Retirement | None = None,
    render_refusal: RenderRefusal = render_as_text,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application until ``shutdown_trigger`` returns, and then until its connections have ended.

    When ``shutdown_trigger`` has returned, no new connection is taken, idle ones are closed, and running requests have
    ``grace`` seconds to finish. What is left after that is cancelled, and its connections are closed. Cancelling this
    function does the same without grace; the application's lifespan is then cancelled, too, and not shut down.

    Args:
        app: the ASGI application.
        listeners: where connections come in; they are closed in any case.
        shutdown_trigger: returns when it is time to stop.
        grace: seconds that requests have to finish; may be infinite.
        retirement: lets connections end with their next answers; ``None``: they are never asked to.
        render_refusal: makes the answer to what is not a request.
        task_status: started when connections are served.

    Raises:
        LifespanError: the application could not start, or could not shut down; in an exception group.
    """
    state: dict[str, Any] = {}

    def prepare(nursery: trio.Nursery) -> OpenConnection:
        reader, idle = _reader(listeners, nursery), IdleTimeout(KEEP_ALIVE)
        nursery.start_soon(reader.run)
        nursery.start_soon(idle.run)

        def open_connection(stream: ByteStream) -> Http1Connection:
            return Http1Connection(stream, app, state, reader, idle, render_refusal)

        return open_connection

    try:
        async with open_lifespan(app, state):
            for listener in listeners:
                listener.limit_unread_time(UNREAD_TIME)
            await serve_connections(
                listeners,
                prepare,
                shutdown_trigger=shutdown_trigger,
                grace=grace,
                retirement=retirement,
                task_status=task_status,
            )
    finally:
        close_all(listeners)


def _reader(listeners: Listeners, nursery: trio.Nursery) -> Reader:
    """Return what reads the connections that come in there."""
    if has_epoll() and all(listener.shares_descriptors for listener in listeners):
        return SharedReader()
    return TaskReader(nursery)
