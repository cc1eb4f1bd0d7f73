"""The gateway: the ASGI application that every request passes, in front of the admin application.

What a request meets, in this order; each is a module here:

1. ``cycle.py`` judges the request line, and answers a browser's preflight (``cors.py``).
2. ``auth.py``, ``origin.py`` and ``limits.py``, the *admission*: every request passes these stages by its head alone.
3. For a request for a model (``routes.py``) the *dispatch*: ``parse.py`` reads and checks the body (``body.py``), and
   ``route.py`` opens the call.
4. ``relay.py`` makes a reply (``response.py``) of the call, whose tokens take the fast path (``direct.py``) where they can.

What is not for a model goes to the application behind the gateway, which is not fast and need not be.
"""

from __future__ import annotations

from typing import Protocol

from ..core.log_context import current_principal, current_request
from ..errors import InvalidRequest
from ..http1.asgi import App, Receive, Scope, Send
from .auth import Authenticate, Authenticator, SingleKey
from .context import RequestContext
from .cycle import RequestCycle
from .limits import LimitSize
from .node_context import NodeContext
from .origin import CheckOrigin
from .parse import Parse
from .response import error_reply, reply_head
from .route import Route
from .stage import Stage

__all__ = ["Gateway"]


class HasRoute(Protocol):
    """Tells whether an application has a path."""

    def __call__(self, path: str, method: str | None = None, /) -> bool:
        """Return whether it has ``path`` for ``method``; without that, for any method."""
        ...


class Gateway:
    """See the top of this module. Called as an ASGI application.

    Args:
        app: the ASGI application behind the gateway.
        node_context: the node; its options are read for each request.
        has_route: tells whether the application has a path; with a method, whether it has it for that one.
        authenticator: finds out who sends a request; without it, the node's one key is required.

    Attributes:
        app, node_context, has_route: as given.
        admission: the stages that every request passes before its body is read.
        dispatch: the stages that a request for a model passes after that. The last one opens the call.
    """

    def __init__(
        self,
        app: App,
        node_context: NodeContext,
        has_route: HasRoute = lambda path, method=None: True,
        authenticator: Authenticator | None = None,
    ) -> None:
        self.app = app
        self.node_context = node_context
        self.has_route = has_route
        self.admission: tuple[Stage, ...] = (
            Authenticate(authenticator or SingleKey(node_context.options)),
            CheckOrigin(node_context),
            LimitSize(node_context),
        )
        self.dispatch: tuple[Stage, ...] = (Parse(node_context), Route(node_context))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "http":
            cycle = RequestCycle(self, scope, receive, send)
            # A connection's task serves one request after the other.
            token = current_request.set(cycle.context.request_id)
            try:
                await cycle.run()
            finally:
                current_request.reset(token)
                current_principal.set("")
        elif scope["type"] == "websocket":
            await _refuse_websocket(scope, send)
        else:
            await self.app(scope, receive, send)


async def _refuse_websocket(scope: Scope, send: Send) -> None:
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1000})
        return
    reply = error_reply(InvalidRequest("There are no websockets here", status=404))
    head = reply_head(reply, RequestContext(scope["headers"]).request_id)
    head["headers"].append((b"connection", b"close"))
    await send({**head, "type": "websocket.http.response.start"})
    await send({"type": "websocket.http.response.body", "body": reply.body, "more_body": False})
