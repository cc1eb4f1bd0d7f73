"""The parts of Quart, Quart-Trio and Werkzeug that are used beyond their documentation. No other module uses any.

``tests/admin/test_web.py`` holds the installed Quart, Quart-Trio and Werkzeug to what is assumed here:

- ``Quart.handle_request`` may be overridden, and a request whose Host header is malformed raises ``BadHost``: up to
  Quart 0.22 in ``handle_request``, where no error handler catches it, and since 0.23 where error handlers do;
- ``app.asgi_app`` may be replaced, and is what every server and test client calls;
- ``app.url_map`` is a Werkzeug map: ``strict_slashes``, ``merge_slashes`` and ``converters`` may be set before routes
  are added, and ``bind(...).allowed_methods(path)`` tells which methods a path takes;
- the map calls its own ``update`` before each of its rules is used, and its ``add`` for each rule that is added;
- a rule has its URL builders compiled by ``_compile_builder``, and nothing calls them but ``url_for``;
- a response made without a content type has one, which may be deleted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from quart.routing import QuartMap, QuartRule
from quart.wrappers import Request, Response
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import BadHost
from werkzeug.routing import BaseConverter, RuleFactory
from werkzeug.wrappers import Response as WerkzeugResponse

from ..errors import InvalidRequest
from ..gateway.response import Reply, error_reply
from ..gateway.stage import HasRoute
from ..http1.asgi import App

__all__ = [
    "deferred_routes",
    "make_app",
    "path_lookup",
    "replace_asgi_app",
    "respond",
    "stream",
]


class _Rule(QuartRule):
    """A rule whose URL builders are compiled when ``url_for`` first needs them.

    They take most of the time in which a rule is added, 20 ms for all routes of a node, and no node uses any.
    """

    def _compile_builder(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        compile_builder = super()._compile_builder
        compiled: Callable[..., Any] | None = None

        def build(*values: Any, **more: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                compiled = compile_builder(*args, **kwargs)
            return compiled(*values, **more)

        return build


class _Map(QuartMap):
    """A map of rules, some of which may be compiled later than they are added.

    Attributes:
        defers: rules that are added wait for the first use of the map, or for the first rule that does not wait.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.defers = False
        self._deferred: list[RuleFactory] = []

    def add(self, rulefactory: RuleFactory) -> None:
        if self.defers:
            self._deferred.append(rulefactory)
            return
        # Of two rules for one path, the first one counts.
        self._add_deferred()
        super().add(rulefactory)

    def update(self) -> None:
        self._add_deferred()
        super().update()

    def _add_deferred(self) -> None:
        deferred, self._deferred = self._deferred, []
        for each in deferred:
            super().add(each)


class _App(QuartTrio):
    """Quart-Trio, with an answer for requests for which it cannot make a request context."""

    url_map_class = _Map
    url_rule_class = _Rule  # type: ignore[assignment]

    async def handle_request(self, request: Request) -> Response | WerkzeugResponse:
        try:
            return await super().handle_request(request)
        except BadHost:
            return _bad_host()


def _bad_host(_error: BadHost | None = None) -> TrioResponse:
    return respond(error_reply(InvalidRequest("The Host header is not a valid host name")))


class _Anything(BaseConverter):
    """A URL converter for ids and names: any characters, including slashes."""

    regex = "(?s:.+?)"
    part_isolating = False


def make_app(name: str) -> QuartTrio:
    """Return a Quart-Trio application without routes.

    Its time limits, size limits and redirects are off: the gateway has limits of its own, and a redirected POST costs
    the client a second upload. Routes may use the converter ``anything``.
    """
    app = _App(name, static_folder=None, template_folder=None)
    app.config["BODY_TIMEOUT"] = None
    app.config["RESPONSE_TIMEOUT"] = None
    app.config["MAX_CONTENT_LENGTH"] = None
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.url_map.converters["anything"] = _Anything
    app.register_error_handler(BadHost, _bad_host)
    return app


@contextmanager
def deferred_routes(app: QuartTrio) -> Iterator[None]:
    """Have the routes that are added in this block compiled when a request first needs a route of the application.

    Most nodes that are opened in tests never do, nor does a worker whose own API is not asked. Only for routes that are
    known to be well formed: what is wrong with one is an error when it is compiled.

    Args:
        app: an application that :func:`make_app` has made.
    """
    assert isinstance(app.url_map, _Map)
    app.url_map.defers = True
    try:
        yield
    finally:
        app.url_map.defers = False


def path_lookup(app: QuartTrio) -> HasRoute:
    """Return a function that tells whether the application has a path, for any method or for one."""
    paths = app.url_map.bind("localhost")

    def has_route(path: str, method: str | None = None) -> bool:
        methods = paths.allowed_methods(path or "/")
        return bool(methods) if method is None else method in methods

    return has_route


def replace_asgi_app(app: QuartTrio, wrap: Callable[[App], App]) -> None:
    """Replace the ASGI entry of an application by ``wrap(entry)``. Every server and test client calls the new one."""
    app.asgi_app = wrap(cast(App, app.asgi_app))  # type: ignore[method-assign, assignment]


def stream(body: AsyncIterator[bytes], headers: Sequence[tuple[str, str]]) -> TrioResponse:
    """Return a response whose body is an async generator. It is closed, or cancelled, when the client has left."""
    response = TrioResponse(body, 200)
    del response.headers["content-type"]
    for name, value in headers:
        response.headers.add(name, value)
    return response


def respond(reply: Reply) -> TrioResponse:
    """Return a reply whose body is complete as a response of the framework."""
    assert isinstance(reply.body, bytes)
    response = TrioResponse(reply.body, reply.status)
    # Set below, since the constructor would add a charset.
    del response.headers["content-type"]
    for name, value in reply.headers:
        response.headers.add(name, value)
    return response
