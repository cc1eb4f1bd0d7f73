"""Serves an ASGI application with hypercorn, under the same contract as the lean server.

Connections are accepted, counted, drained and closed by this package (``net/connections.py``), with the same limits as
those of the lean server; hypercorn speaks HTTP on them. Which version a client speaks is decided by what it sends:
HTTP/2 in cleartext begins with the preface of a client that knows beforehand, or with an upgrade from HTTP/1.1.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from ..http1.asgi import App
from ..http1.lifespan import open_lifespan
from ..http1.parser import HEAD_LIMIT
from ..http1.server import KEEP_ALIVE, UNREAD_TIME
from ..net.connections import OpenConnection, Retirement, serve_connections
from ..net.sockets import Listeners, close_all
from ..net.streams import ByteStream
from .connection import HypercornConnection
from .library import Config, WorkerContext

__all__ = ["serve_http"]

#: Requests that one HTTP/2 connection may have at once: a load balancer may keep one connection for all its clients.
_STREAMS: Final = 1000


async def serve_http(
    app: App,
    listeners: Listeners,
    *,
    shutdown_trigger: Callable[[], Awaitable[object]] = trio.sleep_forever,
    grace: float = 3.0,
    retirement: Retirement | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application until ``shutdown_trigger`` returns, and then until its connections have ended.

    The same as :func:`trio_cluster.http1.server.serve_http`, except that hypercorn answers what is not a request, with
    a status and no body.

    Args:
        app: what to serve.
        listeners: where connections come in; they are closed in any case.
        shutdown_trigger: returns when it is time to stop.
        grace: seconds that requests have to finish then; may be infinite.
        retirement: lets connections end with their next answers; ``None``: they are never asked to.
        task_status: started when connections are served.

    Raises:
        LifespanError: the application could not start, or could not shut down; in an exception group.
    """
    config, context = _config(), WorkerContext(None)
    state: dict[str, Any] = {}

    def prepare(nursery: trio.Nursery) -> OpenConnection:
        def open_connection(stream: ByteStream) -> HypercornConnection:
            return HypercornConnection(stream, app, state, config, context)

        return open_connection

    async def stop() -> None:
        await shutdown_trigger()
        # Connections close as soon as they are idle from now on.
        await context.terminated.set()

    try:
        async with open_lifespan(app, state):
            for listener in listeners:
                listener.limit_unread_time(UNREAD_TIME)
            await serve_connections(
                listeners,
                prepare,
                shutdown_trigger=stop,
                grace=grace,
                retirement=retirement,
                task_status=task_status,
            )
    finally:
        close_all(listeners)


def _config() -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("trio_cluster.http")
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE
    config.keep_alive_max_requests = sys.maxsize
    config.h11_max_incomplete_size = HEAD_LIMIT
    config.h2_max_concurrent_streams = _STREAMS
    config.h2_max_header_list_size = HEAD_LIMIT
    return config
