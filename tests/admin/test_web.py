"""What ``admin/web.py`` assumes of Quart and Werkzeug beyond their documentation, held to the installed versions."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import trio
from quart import Quart
from quart.routing import QuartRule
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import BadHost

from trio_cluster.admin.web import deferred_routes, make_app, path_lookup, replace_asgi_app, respond
from trio_cluster.gateway.response import Reply

INSTALLED = ", ".join(f"{name} {version(name)}" for name in ("quart", "quart-trio", "werkzeug"))


def broken(what: str) -> str:
    return f"{INSTALLED}: {what}; mend trio_cluster/admin/web.py"


def test_requests_pass_a_method_that_can_be_overridden() -> None:
    assert hasattr(Quart, "handle_request"), broken("Quart.handle_request is gone")


async def ask(app: QuartTrio, path: str, host: bytes = b"h") -> tuple[int, bytes]:
    """Ask an application as a server does."""
    sent: list[Any] = []

    given = False

    async def receive() -> Any:
        nonlocal given
        if given:
            await trio.sleep_forever()
        given = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", host)],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "extensions": {},
    }
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture
def app() -> QuartTrio:
    made = make_app("test")

    @made.route("/a/<anything:name>/b")
    async def view(name: str) -> TrioResponse:
        return respond(Reply(200, [("content-type", "text/x-name")], name.encode()))

    @made.route("/plain")
    async def plain() -> TrioResponse:
        return respond(Reply(200, [("content-type", "text/plain")], b""))

    return made


async def test_a_host_that_is_none_is_answered_and_not_raised(app: QuartTrio) -> None:
    status, body = await ask(app, "/a/x/b", host=b"h" * 64)
    assert status == 400, broken(f"{BadHost.__name__} is not what a bad host raises any more")
    assert b"The Host header is not a valid host name" in body, broken(
        "a bad host is answered by the framework"
    )


async def test_what_replaces_the_asgi_application_is_called_for_every_request(app: QuartTrio) -> None:
    seen: list[str] = []

    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        async def outer(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["path"])
            await inner(scope, receive, send)

        return outer

    replace_asgi_app(app, wrap)
    assert (await ask(app, "/a/x/b"))[0] == 200
    assert seen == ["/a/x/b"], broken("app.asgi_app is not what a server calls")


async def test_a_part_of_a_path_may_hold_slashes_and_slashes_are_not_merged(app: QuartTrio) -> None:
    assert await ask(app, "/a/x//y/z/b") == (200, b"x//y/z"), broken(
        "the map's converters or slashes changed"
    )
    assert (await ask(app, "/plain/"))[0] == 200, broken("strict_slashes has no effect")


def test_a_path_is_found_whatever_the_method(app: QuartTrio) -> None:
    has_route = path_lookup(app)
    assert has_route("/a/x/b"), broken("the map does not tell allowed methods")
    assert has_route("/a/x/b", "GET"), broken("the map does not tell allowed methods")
    assert not has_route("/a/x/b", "PATCH")
    assert not has_route("/a/x/c")
    assert not has_route("")


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Return the list of rules for which a method of Werkzeug's rules is called."""
    called: list[str] = []
    method = getattr(QuartRule, name)

    def count(self: QuartRule, *args: Any, **kwargs: Any) -> Any:
        called.append(self.rule)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(QuartRule, name, count)
    return called


async def test_url_builders_are_compiled_when_they_are_used_and_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasattr(QuartRule, "_compile_builder"), broken("a rule's URL builders are compiled elsewhere")
    compiled = counted(monkeypatch, "_compile_builder")
    app = make_app("test")
    for path in ("/plain", "/a/<anything:name>/b"):
        app.add_url_rule(path, path, lambda: "")
    paths = app.url_map.bind("h")
    assert paths.match("/plain")
    assert paths.match("/a/x/b")
    assert compiled == [], broken("matching needs URL builders")
    for _ in range(2):
        assert paths.build("/plain") == "/plain"
        assert paths.build("/a/<anything:name>/b", {"name": "x y"}) == "/a/x%20y/b"
        assert paths.build("/plain", {"q": "1"}) == "/plain?q=1"
    assert set(compiled) == {"/plain", "/a/<anything:name>/b"}
    assert len(compiled) <= 4, "they are compiled again and again"


async def test_deferred_routes_are_compiled_when_the_first_request_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = counted(monkeypatch, "compile")

    async def view() -> TrioResponse:
        return respond(Reply(200, [("content-type", "text/plain")], b"here"))

    app = make_app("test")
    has_route = path_lookup(app)
    with deferred_routes(app):
        app.add_url_rule("/late", "late", view)
    assert compiled == [], broken("routes are not deferred")
    assert await ask(app, "/late") == (200, b"here"), broken("the map does not call its own update")
    assert has_route("/late", "GET")
    assert not has_route("/later")
    assert compiled == ["/late"]


def test_deferred_routes_are_found_by_a_lookup_and_listed() -> None:
    for use in (lambda app: path_lookup(app)("/late"), lambda app: [*app.url_map.iter_rules()]):
        app = make_app("test")
        with deferred_routes(app):
            app.add_url_rule("/late", "late", lambda: "")
        assert use(app), broken("the map does not call its own update")


async def test_a_route_that_is_added_after_deferred_ones_is_compiled_at_once_and_comes_after_them() -> None:
    async def first() -> TrioResponse:
        return respond(Reply(200, [("content-type", "text/plain")], b"first"))

    app = make_app("test")
    with deferred_routes(app):
        app.add_url_rule("/twice", "first", first)
    with pytest.raises(ValueError, match="malformed"):
        app.add_url_rule("/<broken", "broken", first)
    app.add_url_rule("/twice", "second", lambda: "second")
    assert await ask(app, "/twice") == (200, b"first")


async def test_a_response_has_only_the_content_type_that_it_is_given() -> None:
    response = respond(Reply(201, [("content-type", "text/x")], b"b"))
    assert response.headers.getlist("content-type") == ["text/x"], broken(
        "a response has another content type"
    )
