"""The web application: Quart-trio, set up so that the framework does nothing on its own.

Time limits, size limits and redirects are all off: deadlines belong to the relay and the gate, and a
redirected POST costs the client a second upload. Every error leaves as an envelope.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import cast

from quart import request
from quart.wrappers import Request, Response
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import BadHost, HTTPException, MethodNotAllowed
from werkzeug.wrappers import Response as WerkzeugResponse

from ..errors import ApiError, HandlerFailed, InvalidRequest
from ..gateway.context import request_context
from ..gateway.node_context import NodeContext
from ..gateway.pipeline import Gateway
from ..gateway.response import error_reply
from ..gateway.routes import own_route
from ..http1.asgi import App
from .operator import add_operator_routes
from .routes import add_routes, respond

__all__ = ["create_app", "gate"]

logger = logging.getLogger("trio_cluster.http")


class _App(QuartTrio):
    """Quart-trio, with an answer for requests that it cannot even make a context for."""

    async def handle_request(self, request: Request) -> Response | WerkzeugResponse:
        try:
            return await super().handle_request(request)
        except BadHost:
            return respond(error_reply(InvalidRequest("The Host header is not the name of a host")))


def create_app(node_context: NodeContext) -> QuartTrio:
    """Return the node's web application; it needs the :func:`gate` in front of it.

    More routes may be added to it. They are behind the gate as well: they need the key, their bodies are read
    before they run, an :class:`~trio_cluster.ApiError` that they raise is answered as such, and websockets do
    not get to them.
    """
    app = _App("trio_cluster.http", static_folder=None, template_folder=None)
    app.config["BODY_TIMEOUT"] = None
    app.config["RESPONSE_TIMEOUT"] = None
    app.config["MAX_CONTENT_LENGTH"] = None
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.register_error_handler(ApiError, _on_api_error)
    app.register_error_handler(HTTPException, partial(_on_http_exception, node_context))
    app.register_error_handler(Exception, _on_exception)
    add_routes(app, node_context)
    add_operator_routes(app, node_context)
    return app


def gate(app: QuartTrio, node_context: NodeContext) -> QuartTrio:
    """Put the gate in front of an application, and return the application.

    In front of the application itself, and not around it: whoever gets hold of the application, a test client
    or another server, then has to pass the gate as well.
    """
    paths = app.url_map.bind("localhost")

    def has_route(path: str) -> bool:
        return bool(paths.allowed_methods(path or "/"))

    app.asgi_app = Gateway(cast(App, app.asgi_app), node_context, has_route)  # type: ignore[method-assign, assignment]
    return app


async def _on_api_error(error: ApiError) -> TrioResponse:
    return respond(error_reply(error))


async def _on_http_exception(node_context: NodeContext, error: HTTPException) -> TrioResponse:
    """Answer what the framework has to say: unknown path, wrong method, or a route that aborts."""
    if error.code == 404 and node_context.registry.catalog.answers(own_route(request.path)):
        # A route that the framework does not know, since models come and go.
        error = MethodNotAllowed(["POST"])
    status = error.code or 500
    messages = {
        404: f"Unknown URL: {request.method} {request.path}",
        405: f"{request.path} does not take {request.method}",
    }
    message = messages.get(status) or error.description or error.name
    reply = error_reply(ApiError(status, message))
    # `Allow`, `Retry-After`, `WWW-Authenticate`: what the exception knows besides its own page.
    reply.headers.extend(
        (name.lower(), value) for name, value in error.get_headers() if name.lower() != "content-type"
    )
    return respond(reply)


async def _on_exception(error: Exception) -> TrioResponse:
    logger.error(
        "the route of %s %s failed", request.method, request.path, exc_info=error,
        extra={"fields": {"request_id": request_context(request.scope).request_id}},
    )  # fmt: skip
    return respond(error_reply(HandlerFailed("The server failed to answer this request")))
