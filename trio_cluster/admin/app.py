"""The admin application: all routes that need not be fast, served by Quart-Trio behind the gateway.

Every error is sent in the form of its route: nearly always, that is the OpenAI API's error object.
"""

from __future__ import annotations

import logging
from functools import partial

from quart import request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from ..accounts.errors import StoreError
from ..core.threads import thread_shortage
from ..errors import ApiError, HandlerFailed
from ..gateway.context import request_context
from ..gateway.node_context import NodeContext
from ..gateway.pipeline import Gateway
from ..gateway.response import Reply, error_reply
from ..gateway.routes import custom_route
from .accounts import add_account_routes
from .membership import Membership, add_membership_routes
from .operator import add_operator_routes
from .pages import add_page_routes
from .routes import add_routes
from .stored import add_stored_routes
from .web import deferred_routes, make_app, path_lookup, replace_asgi_app, respond

__all__ = ["create_app", "put_gateway_in_front"]

logger = logging.getLogger("trio_cluster.http")


def create_app(node_context: NodeContext, membership: Membership | None = None) -> QuartTrio:
    """Return the node's web application; :func:`put_gateway_in_front` must be called before it is served.

    More routes may be added to it. They are behind the gateway, too: they require the API key, their bodies are read
    before they run, an :class:`~trio_cluster.ApiError` that they raise is sent to the client, and websockets do not
    reach them.

    Args:
        node_context: the node.
        membership: what a master needs to invite workers; ``None``: this is no master.
    """
    app = make_app("trio_cluster.http")
    app.register_error_handler(ApiError, _on_api_error)
    app.register_error_handler(StoreError, _on_store_error)
    app.register_error_handler(HTTPException, partial(_on_http_exception, node_context))
    app.register_error_handler(Exception, _on_exception)
    with deferred_routes(app):
        add_routes(app, node_context)
        add_operator_routes(app, node_context)
        add_account_routes(app, node_context)
        add_stored_routes(app, node_context)
        add_page_routes(app, node_context)
        if membership is not None:
            add_membership_routes(app, membership, node_context.audit)
    return app


def put_gateway_in_front(app: QuartTrio, node_context: NodeContext) -> QuartTrio:
    """Put the gateway in front of an application, and return the application.

    The gateway replaces the application's own ASGI entry, so that everything that serves the application passes it,
    also a test client or another server.
    """
    has_route = path_lookup(app)
    replace_asgi_app(app, lambda inner: Gateway(inner, node_context, has_route, node_context.authenticator))
    return app


def _error_reply(error: ApiError) -> Reply:
    context = request_context(request.scope)
    return error_reply(error, context.errors, context.request_id)


def _respond_with(error: ApiError) -> TrioResponse:
    return respond(_error_reply(error))


async def _on_api_error(error: ApiError) -> TrioResponse:
    return _respond_with(error)


async def _on_store_error(error: StoreError) -> TrioResponse:
    # The message may name files and machines, which is for the log.
    logger.warning("%s %s failed: %s", request.method, request.path, error)
    unavailable = ApiError(
        503, "The database cannot be reached; try again shortly", code="database_unavailable", retry_after=5.0
    )
    return _respond_with(unavailable)


async def _on_http_exception(node_context: NodeContext, error: HTTPException) -> TrioResponse:
    """Answer an error that the framework raises: an unknown path, a wrong method, or a route that calls ``abort``."""
    if error.code == 404 and node_context.router.catalog.declares(custom_route(request.path)):
        # A custom route. The framework does not know these, since models may be added and removed at any time.
        error = MethodNotAllowed(["POST"])
    status = error.code or 500
    messages = {
        404: f"Unknown URL: {request.method} {request.path}",
        405: f"{request.path} does not allow {request.method}",
    }
    message = messages.get(status) or error.description or error.name
    reply = _error_reply(ApiError(status, message))
    # `Allow`, `Retry-After`, `WWW-Authenticate`: the headers of the exception, without that of its HTML page.
    reply.headers.extend(
        (name.lower(), value) for name, value in error.get_headers() if name.lower() != "content-type"
    )
    return respond(reply)


async def _on_exception(error: Exception) -> TrioResponse:
    # The framework runs a plain function in a thread.
    if (shortage := thread_shortage(error)) is not None:
        return _respond_with(shortage)
    logger.error(
        "the route of %s %s failed", request.method, request.path, exc_info=error,
        extra={"fields": {"request_id": request_context(request.scope).request_id}},
    )  # fmt: skip
    return _respond_with(HandlerFailed("The server failed to answer this request"))
