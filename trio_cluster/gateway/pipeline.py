"""The gateway: the ASGI application that every request passes, in front of the admin application.

A request passes these steps, in this order; each is a module here:

1. ``cycle.py`` checks the request line, and answers a browser's preflight (``cors.py``).
2. *Admission*: ``auth.py``, ``origin.py`` and ``limits.py``. Every request passes these stages before its body is read.
3. *Dispatch*, for a request for a model (``routes.py``): ``parse.py`` reads and validates the body (``body.py``),
   ``key_limits.py`` admits the request if its key has limits, and ``route.py`` opens the call. What a request refers to
   is put in by ``stored_responses.py``.
4. ``relay.py`` makes a reply (``response.py``) of the call, whose tokens take the fast path (``direct.py``) if
   possible. An answer that is stored passes ``capture.py``.

A request that is not for a model goes to the application behind the gateway, which is slower and may be.
"""

from __future__ import annotations

from ..core.log_context import current_principal, current_request
from ..errors import InvalidRequest
from ..http1.asgi import App, Receive, Scope, Send
from .access_log import AccessLog
from .auth import ApiKeys, Authenticate, Authenticator
from .context import RequestContext
from .cycle import RequestCycle
from .key_limits import ReserveLimits
from .limits import LimitSize
from .node_context import NodeContext
from .origin import CheckOrigin
from .parse import Parse
from .response import error_reply, reply_head
from .route import Route
from .stage import HasRoute, Pipeline

__all__ = ["Gateway"]


class Gateway:
    """See the top of this module. Called as an ASGI application.

    Args:
        app: the ASGI application behind the gateway.
        node_context: the node; its options are read for each request.
        has_route: tells whether the application has a path; with a method, whether it has it for that one.
        authenticator: determines who sends a request; ``None``: the keys of the options and of the node's accounts.

    Attributes:
        pipeline: the stages, and what is behind them.
    """

    def __init__(
        self,
        app: App,
        node_context: NodeContext,
        has_route: HasRoute = lambda path, method=None: True,
        authenticator: Authenticator | None = None,
    ) -> None:
        if authenticator is None:
            accounts = node_context.accounts
            authenticator = ApiKeys(node_context.options, None if accounts is None else accounts.table)
        parse, route = Parse(node_context), Route(node_context)
        self.pipeline = Pipeline(
            node_context,
            admission=(
                Authenticate(authenticator),
                CheckOrigin(node_context),
                LimitSize(node_context),
            ),
            dispatch=(parse, route),
            limited_dispatch=(parse, ReserveLimits(node_context), route),
            app=app,
            has_route=has_route,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "http":
            access_log = None
            if self.pipeline.node_context.options.server.access_log:
                access_log = AccessLog(send)
                send = access_log.send
            cycle = RequestCycle(self.pipeline, scope, receive, send)
            # Reset at the end, since the task of a connection serves one request after the other.
            token = current_request.set(cycle.context.request_id)
            try:
                await cycle.run()
            finally:
                if access_log is not None:
                    access_log.write(scope["method"], cycle.context, client_left=cycle.client_left)
                current_request.reset(token)
                current_principal.set("")
        elif scope["type"] == "websocket":
            await _refuse_websocket(scope, send)
        else:
            await self.pipeline.app(scope, receive, send)


async def _refuse_websocket(scope: Scope, send: Send) -> None:
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1000})
        return
    reply = error_reply(InvalidRequest("This server has no websocket endpoints", status=404))
    head = reply_head(reply, RequestContext(scope["headers"]).request_id)
    head["headers"].append((b"connection", b"close"))
    await send({**head, "type": "websocket.http.response.start"})
    await send({"type": "websocket.http.response.body", "body": reply.body, "more_body": False})
