"""Which requests the gateway refuses, and how a request ends, between the HTTP server and the web framework."""

from __future__ import annotations

import functools
import json
import logging
import tracemalloc
from typing import Any

import h2.config
import h2.connection
import h2.events
import patience
import pytest
import trio
from http_node import CHAT, PLAIN, HttpNode, open_http_node, raw_request
from trio.testing import wait_all_tasks_blocked

from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError
from trio_cluster.gateway import body, cycle, pipeline
from trio_cluster.gateway.context import request_context
from trio_cluster.http1 import server

BODY = json.dumps(CHAT).encode()
CHAT_PATH = "/v1/chat/completions"


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


# The key


@pytest.mark.parametrize(
    "header",
    [None, "Authorization: Bearer wrong", "Authorization: Basic c2VjcmV0", "Authorization: secret",
     "Authorization: Bearer", "Authorization: Bearer secret2", "Authorization: Bearer s\xe9cret"],
)  # fmt: skip
async def test_a_request_without_the_right_key_is_refused_and_the_connection_stays_usable(
    header: str | None,
) -> None:
    async with open_http_node(api_key="secret") as node, node.connect() as wire:
        await wire.send(raw_request("POST", CHAT_PATH, BODY, *([header] if header else [])))
        answer = await wire.answer()
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.error["code"] == "invalid_api_key"
        assert answer.error["type"] == "authentication_error"
        assert "connection" not in answer.headers
        await wire.request("POST", CHAT_PATH, BODY, bearer("secret"))
        assert (await wire.answer()).body == PLAIN
        assert node.backend.opened() == 1


@pytest.mark.parametrize("header", ["Authorization: Bearer secret", "authorization: bearer   secret"])
async def test_the_right_key_is_let_in(header: str) -> None:
    async with open_http_node(api_key="secret") as node, node.connect() as wire:
        await wire.request("POST", CHAT_PATH, BODY, header)
        assert (await wire.answer()).status == 200


async def test_a_key_that_is_set_while_the_node_runs_acts_at_once(node: HttpNode) -> None:
    async with node.connect() as wire:
        await wire.request("GET", "/v1/models")
        assert (await wire.answer()).status == 200
        node.node_context.options.server.api_key = "secret"
        await wire.request("GET", "/v1/models")
        assert (await wire.answer()).status == 401


async def test_health_metrics_and_the_index_need_no_key_and_everything_else_does() -> None:
    async with open_http_node(api_key="secret") as node, node.client() as client:
        for path in ("/", "/health", "/health/", "/v1/health", "/metrics", "/ready"):
            assert (await client.get(path)).status_code == 200, path
        for path in ("/v1/models", "/models", "/cluster/status", "/nowhere", "/health/x", "/v1/nowhere"):
            assert (await client.get(path)).status_code == 401, path


async def test_a_large_upload_without_a_key_is_answered_before_it_is_read_and_the_client_sees_it() -> None:
    size = 25_000_000
    async with open_http_node(api_key="secret") as node, node.connect() as wire:
        await wire.request("POST", CHAT_PATH, None, f"Content-Length: {size}")
        answer = await wire.answer()
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        # A client that sends all of it before it reads must not run into a reset.
        for _ in range(25):
            await wire.send(bytes(1_000_000))
        assert await wire.closed()
        assert (await node.post(headers={"Authorization": "Bearer secret"})).status_code == 200


# Sizes and times of bodies


async def test_a_body_declared_too_large_is_refused_by_its_length_and_the_rest_is_dropped() -> None:
    async with open_http_node(max_body_size=100) as node, node.connect() as wire:
        await wire.request("POST", CHAT_PATH, bytes(101))
        answer = await wire.answer()
        assert answer.status == 413
        assert "100 bytes" in answer.error["message"]
        await wire.request("POST", CHAT_PATH, BODY)
        assert (await wire.answer()).status == 200


async def test_a_body_that_grows_too_large_is_refused_when_it_does() -> None:
    async with open_http_node(max_body_size=100) as node, node.connect() as wire:
        await wire.request(
            "POST", CHAT_PATH, None, "Transfer-Encoding: chunked", "Content-Type: application/json"
        )
        await wire.send(b"3c\r\n" + bytes(60) + b"\r\n" + b"3c\r\n" + bytes(60) + b"\r\n0\r\n\r\n")
        assert (await wire.answer()).status == 413
        await wire.request("POST", CHAT_PATH, BODY)
        assert (await wire.answer()).status == 200


async def test_a_body_of_exactly_the_limit_is_taken() -> None:
    async with open_http_node(max_body_size=len(BODY)) as node, node.connect() as wire:
        await wire.request("POST", CHAT_PATH, BODY)
        assert (await wire.answer()).status == 200


async def test_a_much_too_large_body_is_refused_at_once_and_the_connection_closes_cleanly() -> None:
    async with open_http_node(max_body_size=100) as node, node.connect() as wire:
        await wire.request("POST", CHAT_PATH, None, "Content-Length: 3000000")
        answer = await wire.answer()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        await wire.send(bytes(3_000_000))
        assert await wire.closed()


@pytest.mark.parametrize("size", [1, 0x10000])
async def test_a_client_that_never_stops_sending_is_let_go_in_the_end(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycle, "DRAIN_BYTES", 10 * size)
    monkeypatch.setattr(cycle, "LINGER_BYTES", 10 * size)
    async with open_http_node(max_body_size=1) as node, node.connect() as wire:
        await wire.request("POST", CHAT_PATH, None, "Transfer-Encoding: chunked")
        chunk = b"%x\r\n%b\r\n" % (size, bytes(size))
        with pytest.raises(trio.BrokenResourceError):
            await wire.send(chunk * (32_000_000 // len(chunk)))


async def test_the_end_of_a_refusal_does_not_wait_for_room_in_the_queue_of_the_body(
    node: HttpNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DRAIN_BYTES", "LINGER_BYTES"):
        monkeypatch.setattr(cycle, name, 0)
    node.node_context.options.server.max_body_size = 1
    # As the server does it: the body and the news that all is over go through one queue, and the end of the
    # answer is over when that news is in the queue.
    to_gate, receive = trio.open_memory_channel[Any](0)
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/x"}
    scope["headers"] = [(b"transfer-encoding", b"chunked")]
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)
        if not message.get("more_body", True):
            with patience.fail_after(1):  # inside the shield around it
                await to_gate.send({"type": "http.request", "body": b"x", "more_body": True})
                await to_gate.send({"type": "http.disconnect"})

    async def feed() -> None:
        for _ in range(4):
            await to_gate.send({"type": "http.request", "body": b"xx", "more_body": True})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed)
        await pipeline.Gateway(_nothing, node.node_context)(scope, receive.receive, send)
        nursery.cancel_scope.cancel()
    assert [message.get("status") for message in sent] == [413, None, None]


async def test_a_body_that_stops_coming_gets_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_IDLE_TIMEOUT", 0.05)
    for name in ("DRAIN_TIME", "LINGER_TIME"):
        monkeypatch.setattr(cycle, name, 0.05)
    async with open_http_node() as node, node.connect() as wire:
        await wire.send(raw_request("POST", CHAT_PATH, BODY)[:-1])
        answer = await wire.answer()
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert await wire.closed()


async def test_a_body_that_drips_has_a_time_limit_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT", 0.1)
    monkeypatch.setattr(cycle, "DRAIN_TIME", 0.05)
    async with open_http_node() as node, node.connect() as wire, trio.open_nursery() as nursery:
        await wire.request(
            "POST", CHAT_PATH, None, "Content-Length: 100000", "Content-Type: application/json"
        )

        async def drip() -> None:
            while True:
                await wire.send(b"x")

        nursery.start_soon(drip)
        assert (await wire.answer()).status == 408
        nursery.cancel_scope.cancel()


async def test_a_client_that_leaves_while_it_uploads_starts_nothing(
    node: HttpNode, caplog: pytest.LogCaptureFixture
) -> None:
    async with node.connect() as wire:
        await wire.send(raw_request("POST", CHAT_PATH, BODY)[:-1])
    assert (await node.post()).status_code == 200
    assert node.backend.opened() == 1
    assert not caplog.records


# Protocols and paths


async def test_cleartext_http2_is_refused_in_words_that_every_tool_shows(node: HttpNode) -> None:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    connection.initiate_connection()
    async with node.connect() as wire:
        await wire.send(connection.data_to_send())
        answer = await wire.answer()
        assert answer.status == 505
        assert "HTTP/1.1" in answer.error["message"]
        assert await wire.closed()
    assert node.backend.opened() == 0


async def test_websockets_are_refused_with_an_envelope(node: HttpNode) -> None:
    async with node.connect() as wire:
        await wire.request(
            "GET", "/v1/realtime", None, "Upgrade: websocket", "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "X-Request-Id: ws-1",
        )  # fmt: skip
        answer = await wire.answer()
        assert (answer.status, answer.headers["x-request-id"]) == (404, "ws-1")
        assert "websocket" in answer.error["message"]
        assert await wire.closed()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/health", 200), ("http://localhost", 200), ("?x=1", 400), ("*", 404),
        ("//v1/models", 200), ("/v1//models", 404), ("/v1/models/", 200), ("/%2e%2e/health", 404),
    ],
)  # fmt: skip
async def test_no_form_of_target_is_redirected_or_upsets_the_server(
    node: HttpNode, target: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with node.connect() as wire:
        await wire.request("GET", target)
        answer = await wire.answer()
        assert answer.status == status
        assert answer.headers["x-request-id"]
    assert not caplog.records


@pytest.mark.parametrize("host", ["", "a b", "\xff", "localhost:99999999", "[::1", "x" * 5000, "a,b"])
async def test_no_host_header_upsets_the_server(
    node: HttpNode, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with node.connect() as wire:
        await wire.send(f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
        answer = await wire.answer()
        assert answer.status in (200, 400)
        if answer.status == 400:
            assert answer.error["type"] == "invalid_request_error"
    assert not caplog.records


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: x", "Content-Length: -1", "Content-Length: 1, 2",
        "Content-Length: 1\r\nContent-Length: 2", "Transfer-Encoding: gzip", "Bad Header: 1",
    ],
)  # fmt: skip
async def test_a_malformed_head_costs_only_its_own_connection(node: HttpNode, head: str) -> None:
    async with node.connect() as wire:
        await wire.send(f"POST {CHAT_PATH} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        assert (await wire.answer()).status in (400, 501)
        await wire.closed()
    assert (await node.post()).status_code == 200


async def test_two_requests_sent_at_once_are_answered_in_turn(node: HttpNode) -> None:
    async with node.connect() as wire:
        await wire.send(
            raw_request("POST", CHAT_PATH, BODY, "X-Request-Id: one") + raw_request("GET", "/v1/models")
        )
        first, second = await wire.answer(), await wire.answer()
        assert (first.status, first.headers["x-request-id"], first.body) == (200, "one", PLAIN)
        assert json.loads(second.body)["data"][0]["id"] == "m"


async def test_http_1_0_is_served(node: HttpNode) -> None:
    async with node.connect() as wire:
        await wire.send(raw_request("POST", CHAT_PATH, BODY).replace(b"HTTP/1.1", b"HTTP/1.0"))
        answer = await wire.answer()
        assert (answer.status, answer.body) == (200, PLAIN)
        assert await wire.closed()


# Request ids


@pytest.mark.parametrize("sent", ["abc", "x" * 128, "a b/c;d~"])
async def test_a_sane_request_id_is_echoed_and_reaches_the_call(node: HttpNode, sent: str) -> None:
    response = await node.post(headers={"X-Request-Id": sent})
    assert response.headers.get_list("x-request-id") == [sent]
    assert (await node.backend.next()).request.request_id == sent


async def test_of_several_the_first_one_counts(node: HttpNode) -> None:
    async with node.connect() as wire:
        await wire.request("POST", CHAT_PATH, BODY, "X-Request-Id: one", "X-Request-Id: two")
        assert (await wire.answer()).headers["x-request-id"] == "one"


@pytest.mark.parametrize("sent", ["", "x" * 129, "\xe9", "a\tb"])
async def test_another_one_is_replaced(node: HttpNode, sent: str) -> None:
    async with node.connect() as wire:
        await wire.send(
            raw_request("POST", CHAT_PATH, BODY, "X-Request-Id: ID").replace(b"ID", sent.encode("latin-1"))
        )
        given = (await wire.answer()).headers["x-request-id"]
    assert given.startswith("req_")
    assert (await node.backend.next()).request.request_id == given


async def test_every_refusal_carries_a_request_id() -> None:
    async with open_http_node(api_key="secret", max_body_size=10) as node, node.client() as client:
        ids = set()
        for path, headers in (
            ("/v1/models", {}), (CHAT_PATH, {"Authorization": "Bearer secret"}), ("/health/x", {}),
        ):  # fmt: skip
            response = await client.request("POST", path, json=CHAT, headers=headers)
            assert response.status_code in (401, 413)
            ids.add(response.headers["x-request-id"])
        assert len(ids) == 3


# The last byte


async def test_an_idle_connection_is_closed_after_an_answer_from_the_framework(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It is the shielded last send that lets the server start its idle timer again.
    monkeypatch.setattr(server, "KEEP_ALIVE", 0.1)
    async with open_http_node() as node, node.connect() as wire:
        for _ in range(2):
            await wire.request("POST", CHAT_PATH, BODY)
            assert (await wire.answer()).status == 200
        with patience.fail_after(2):
            assert await wire.closed()


async def test_a_thousand_requests_on_one_connection_leave_nothing_behind(node: HttpNode) -> None:
    request = raw_request("POST", CHAT_PATH, BODY)
    async with node.connect() as wire:
        for _ in range(1000):
            await wire.send(request)
            assert (await wire.answer()).body == PLAIN
    assert node.router.stats.completed == 1000
    assert not node.router.live


# Routes that users add


def _add(node: HttpNode, path: str, view: Any) -> None:
    node.app.add_url_rule(path, path, view, methods=["GET", "POST"])


async def test_a_users_route_is_behind_the_gate() -> None:
    async with open_http_node(api_key="secret") as node, node.connect() as wire:

        async def view() -> bytes:
            from quart import request

            return await request.get_data()

        _add(node, "/mine", view)
        await wire.request("POST", "/mine", b"hello")
        assert (await wire.answer()).status == 401
        await wire.request("POST", "/mine", b"hello", bearer("secret"))
        answer = await wire.answer()
        assert (answer.status, answer.body) == (200, b"hello")
        assert answer.headers["x-request-id"]


async def test_a_users_route_that_fails_is_a_500_without_internals_logged_once(
    node: HttpNode, caplog: pytest.LogCaptureFixture
) -> None:
    async def view() -> None:
        raise ValueError("secret internals")

    async def view_with_nursery() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view)

    for path, function in (("/one", view), ("/two", view_with_nursery)):
        caplog.clear()
        _add(node, path, function)
        async with node.connect() as wire:
            await wire.request("GET", path)
            answer = await wire.answer()
            assert answer.status == 500
            assert answer.error["type"] == "server_error"
            assert b"internals" not in answer.body
            assert [record.levelno for record in caplog.records] == [logging.ERROR]
            assert "secret internals" in caplog.text
            await wire.request("GET", "/health")
            assert (await wire.answer()).status == 200


async def test_what_a_users_route_raises_or_aborts_with_is_an_envelope(node: HttpNode) -> None:
    async def raises() -> None:
        raise ApiError(429, "slow down", code="mine", retry_after=0.2)

    async def aborts() -> None:
        from quart import abort

        abort(403)

    _add(node, "/raises", raises)
    _add(node, "/aborts", aborts)
    async with node.client() as client:
        response = await client.get("/raises")
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["code"] == "mine"
        response = await client.get("/aborts")
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"


async def test_a_failure_of_the_framework_itself_is_a_500_logged_once(
    node: HttpNode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret internals")

    monkeypatch.setattr(node.app, "handle_request", broken)
    async with node.connect() as wire:
        for _ in range(2):
            caplog.clear()
            await wire.request("GET", "/health")
            answer = await wire.answer()
            assert answer.status == 500
            assert b"internals" not in answer.body
            assert answer.headers["x-request-id"]
            assert len(caplog.records) == 1


async def test_a_users_stream_that_fails_ends_its_connection(
    node: HttpNode, caplog: pytest.LogCaptureFixture
) -> None:
    async def view() -> Any:
        async def pieces() -> Any:
            yield b"one"
            raise ValueError("broken")

        return pieces()

    _add(node, "/stream", view)
    async with node.connect() as wire:
        await wire.request("GET", "/stream")
        answer = await wire.answer()
        assert (answer.body, answer.whole) == (b"one", False)
    assert len(caplog.records) == 1


async def test_the_test_client_of_the_application_passes_the_gate_too() -> None:
    async with open_http_node(api_key="secret") as node:
        client = node.app.test_client()
        response = await client.get("/v1/models")
        assert response.status_code == 401
        assert "x-request-id" in response.headers
        response = await client.post(CHAT_PATH, json=CHAT, headers={"Authorization": "Bearer secret"})
        assert (await response.get_data()) == PLAIN


async def test_a_call_ends_with_its_request_even_if_no_code_of_its_route_runs_any_more() -> None:
    # A route that has opened a call and returned, and whose body is never read.
    async with open_http_node(None) as node:
        left = trio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            context = request_context(scope)
            context.add_call(node.backend.open(_request()))
            left.set()
            await receive()
            assert (await receive())["type"] == "http.disconnect"

        async with trio.open_nursery() as nursery:
            send, receive = trio.open_memory_channel[Any](2)
            scope = {
                "type": "http", "http_version": "1.1", "method": "POST", "path": "/x", "headers": [],
            }  # fmt: skip
            send.send_nowait({"type": "http.request", "body": b""})
            gateway = pipeline.Gateway(app, node.node_context)
            nursery.start_soon(functools.partial(gateway, scope, receive.receive, _nothing))
            await left.wait()
            served = await node.backend.next()
            send.send_nowait({"type": "http.disconnect"})
            assert await served.wait_cancelled() == "client left"


def _request() -> Request:
    return Request("chat.completions", "chat", "m", b"")


async def _nothing(_: object) -> None:
    raise AssertionError("nothing was to be sent")


# Bodies that are not read


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 405), ("POST", "/health", 405), ("PUT", "/metrics", 405), ("POST", "/openapi.json/", 405),
        ("GET", "/health", 200), ("GET", "/v1/models", 200), ("POST", "/v1/models", 405), ("POST", "/nothing", 404),
        ("OPTIONS", "/v1/chat/completions", 204),
    ],
)  # fmt: skip
async def test_nothing_is_kept_of_a_body_that_is_not_read(method: str, path: str, status: int) -> None:
    size = 8 << 20
    async with open_http_node(cors_origins="*") as node, node.connect() as wire:
        await wire.request(
            method,
            path,
            None,
            f"Content-Length: {size}",
            "Access-Control-Request-Method: POST",
            "Origin: https://a.example",
        )
        tracemalloc.start()
        try:
            await wire.send(bytes(size - 1))
            await wait_all_tasks_blocked(0.05)
            kept = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        await wire.send(b"x")
        assert (await wire.answer(bodiless=status == 204)).status == status
    assert kept < 1 << 20


@pytest.mark.parametrize("key", ["wrong", None])
async def test_a_client_without_the_key_is_not_told_to_send_its_body(key: str | None) -> None:
    async with open_http_node(api_key="secret") as node, node.connect() as wire:
        headers = ["Expect: 100-continue", f"Content-Length: {len(BODY)}", "Content-Type: application/json"]
        if key is not None:
            headers.append(f"Authorization: Bearer {key}")
        await wire.request("POST", CHAT_PATH, None, *headers)
        answer = await wire.answer()
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        await wire.stream.send_eof()
        assert await wire.closed()


async def test_a_client_with_the_key_is_told_to_send_its_body() -> None:
    async with open_http_node(api_key="secret") as node, node.connect() as wire:
        await wire.request(
            "POST", CHAT_PATH, None, "Expect: 100-continue", f"Content-Length: {len(BODY)}",
            "Content-Type: application/json", "Authorization: Bearer secret",
        )  # fmt: skip
        assert (await wire.head())[0] == 100
        await wire.send(BODY)
        assert (await wire.answer()).status == 200
