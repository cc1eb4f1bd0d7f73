"""Quart, as far as this project uses it beyond its documentation; no other module does.

``tests/admin/test_web.py`` holds the installed Quart, Quart-Trio and Werkzeug to what is assumed here:

- ``Quart.handle_request`` may be overridden, and a request whose Host header is malformed raises ``BadHost`` in it, before
  there is any error handler;
- ``app.asgi_app`` may be replaced, and is what every server and test client calls;
- ``app.url_map`` is a Werkzeug map: ``strict_slashes``, ``merge_slashes`` and ``converters`` may be set before routes are
  added, and ``bind(...).allowed_methods(path)`` tells which methods a path takes;
- a response made without a content type has one, which may be deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from quart.wrappers import Request, Response
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import BadHost
from werkzeug.routing import BaseConverter
from werkzeug.wrappers import Response as WerkzeugResponse

from ..errors import InvalidRequest
from ..gateway.pipeline import HasRoute
from ..gateway.response import Reply, error_reply
from ..http1.asgi import App

__all__ = ["make_app", "path_lookup", "replace_asgi_app", "respond"]


class _App(QuartTrio):
    """Quart-Trio, with an answer for requests that it cannot even make a context for."""

    async def handle_request(self, request: Request) -> Response | WerkzeugResponse:
        try:
            return await super().handle_request(request)
        except BadHost:
            return respond(error_reply(InvalidRequest("The Host header is not the name of a host")))


class _Anything(BaseConverter):
    """A part of a path that may hold whatever is an id or a name, slashes included."""

    regex = "(?s:.+?)"
    part_isolating = False


def make_app(name: str) -> QuartTrio:
    """Return a Quart-Trio application without routes, which does nothing of its own accord.

    Time limits, size limits and redirects are off: deadlines belong to the gateway, and a redirected POST costs the client
    a second upload. Routes may use the converter ``anything``.
    """
    app = _App(name, static_folder=None, template_folder=None)
    app.config["BODY_TIMEOUT"] = None
    app.config["RESPONSE_TIMEOUT"] = None
    app.config["MAX_CONTENT_LENGTH"] = None
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.url_map.converters["anything"] = _Anything
    return app


def path_lookup(app: QuartTrio) -> HasRoute:
    """Return a function that tells whether the application has a path, and with a method, whether it has it for that."""
    paths = app.url_map.bind("localhost")

    def has_route(path: str, method: str | None = None) -> bool:
        methods = paths.allowed_methods(path or "/")
        return bool(methods) if method is None else method in methods

    return has_route


def replace_asgi_app(app: QuartTrio, wrap: Callable[[App], App]) -> None:
    """Put something in front of an application, inside of it: every server and test client has to pass it."""
    app.asgi_app = wrap(cast(App, app.asgi_app))  # type: ignore[method-assign, assignment]


def respond(reply: Reply) -> TrioResponse:
    """Return ``reply``, whose body is complete, as a response of the framework."""
    assert isinstance(reply.body, bytes)
    response = TrioResponse(reply.body, reply.status)
    # Not passed to the constructor, which would add a charset.
    del response.headers["content-type"]
    for name, value in reply.headers:
        response.headers.add(name, value)
    return response
