"""Comments in silent streams, before the answer and within it: when they are sent, and what follows from the first."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import patience
import pytest
import trio
from http_node import EVENTS, STREAM, Backend, HttpNode, Served, Wire, open_http_node, raw_request

from trio_cluster.core.answer import Head
from trio_cluster.core.limits import PARSE_IN_THREAD
from trio_cluster.core.observer import Observer
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.errors import ApiError, HandlerFailed, ModelNotFound, WorkerLost
from trio_cluster.gateway import deadlines
from trio_cluster.gateway.auth import Authenticate
from trio_cluster.openai import DONE, KEEPALIVE, asks_for_events
from trio_cluster.openai.failures import MESSAGE_ERROR
from trio_cluster.testing import read_stream

PATH: Final = "/v1/chat/completions"
BODY: Final = json.dumps(STREAM).encode()
PLAIN_BODY: Final = json.dumps(STREAM | {"stream": False}).encode()

#: Of the tests, in seconds.
INTERVAL: Final = 0.03

SERVERS: Final = pytest.mark.parametrize("http", ["lean", "hypercorn"])


async def ask(node: HttpNode, wire: Wire, body: bytes = BODY, path: str = PATH) -> Served:
    await wire.request("POST", path, body)
    return await node.backend.next()


async def comments(wire: Wire, count: int = 2, comment: bytes = KEEPALIVE) -> dict[str, str]:
    """Receive the head of a stream, and its first comments."""
    status, headers = await wire.head()
    assert (status, headers["content-type"]) == (200, EVENTS)
    for _ in range(count):
        assert await wire.chunk() == comment
    return headers


async def rest_of(wire: Wire, comment: bytes = KEEPALIVE) -> tuple[bytes, bool]:
    """Receive the rest of a stream, without comments; and whether it has a proper end."""
    body = b""
    while chunk := await wire.chunk():
        body += b"" if chunk == comment else chunk
    return body, chunk is not None


@asynccontextmanager
async def waiting(http: str = "lean", **options: Any) -> AsyncIterator[tuple[HttpNode, Wire]]:
    async with (
        open_http_node(None, http=http, **({"keepalive": INTERVAL} | options)) as node,
        node.connect() as wire,
    ):
        yield node, wire


@SERVERS
async def test_a_stream_that_waits_for_its_answer_gets_comments(http: str) -> None:
    async with waiting(http) as (node, wire):
        served = await ask(node, wire)
        headers = await comments(wire, 3)
        assert headers["cache-control"] == "no-cache"
        assert headers["x-accel-buffering"] == "no"
        assert headers["x-request-id"].startswith("req_")
        # Nothing of the answer is known yet.
        assert "openai-processing-ms" not in headers
        assert not {"content-length", "retry-after", "x-should-retry"} & set(headers)
        served.head(EVENTS).event("one")
        while (chunk := await wire.chunk()) == KEEPALIVE:
            pass
        assert chunk is not None
        assert read_stream(chunk).text == "one"
        served.event("two").data(DONE).done()
        body, whole = await rest_of(wire)
        assert whole
        assert body.endswith(DONE)


@SERVERS
async def test_a_failure_after_a_comment_is_an_error_event(http: str) -> None:
    async with waiting(http) as (node, wire):
        served = await ask(node, wire)
        await comments(wire)
        served.fail(ApiError(429, "not now", code="slow_down", retry_after=3))
        body, whole = await rest_of(wire)
        report = read_stream(body)
        assert (report.ending, report.text) == ("failed", "")
        assert report.error is not None
        assert (report.error["code"], report.error["type"]) == ("slow_down", "rate_limit_error")
        assert whole


@SERVERS
async def test_a_failure_after_a_comment_ends_as_the_option_says(http: str) -> None:
    async with waiting(http, stream_failure="abort") as (node, wire):
        served = await ask(node, wire)
        await comments(wire)
        served.fail(HandlerFailed())
        body, whole = await rest_of(wire)
        assert read_stream(body).ending == "failed"
        assert not whole


@pytest.mark.parametrize("keepalive", [0.0, 30.0])
@SERVERS
async def test_a_failure_before_the_first_comment_is_a_real_status(http: str, keepalive: float) -> None:
    async with waiting(http, keepalive=keepalive) as (node, wire):
        served = await ask(node, wire)
        await trio.sleep(3 * INTERVAL)
        served.fail(ApiError(429, "not now", retry_after=3))
        answer = await wire.answer()
        assert (answer.status, answer.headers["retry-after"]) == (429, "3")
        assert "openai-processing-ms" in answer.headers


@SERVERS
async def test_a_plain_request_gets_no_comments(http: str) -> None:
    async with waiting(http) as (node, wire):
        served = await ask(node, wire, PLAIN_BODY)
        await trio.sleep(4 * INTERVAL)
        served.fail(ApiError(429, "not now"))
        assert (await wire.answer()).status == 429


async def test_a_late_head_without_output_does_not_restart_the_interval() -> None:
    async with waiting(keepalive=0.4) as (node, wire):
        watch = patience.Stopwatch()
        served = await ask(node, wire)
        await trio.sleep(0.3)
        served.head(EVENTS)
        await comments(wire, 1)
        assert watch.counted < 0.6
        served.done()


async def test_comments_come_at_the_interval_after_the_last_output_and_signs_of_life_do_not_count() -> None:
    async with waiting(keepalive=0.3) as (node, wire), trio.open_nursery() as nursery:
        served = await ask(node, wire)
        served.head(EVENTS).event("one")
        await wire.head()
        await wire.chunk()
        await trio.sleep(0.2)
        # On the fast path.
        served.event("two")
        await wire.chunk()
        watch = patience.Stopwatch()

        async def live() -> None:
            while True:
                await trio.sleep(0.05)
                served.data(b"")

        nursery.start_soon(live)
        assert await wire.chunk() == KEEPALIVE
        assert watch.total > 0.25
        assert watch.counted < 0.45
        assert await wire.chunk() == KEEPALIVE
        assert watch.counted < 0.8
        nursery.cancel_scope.cancel()


@SERVERS
async def test_output_puts_the_next_comment_off(http: str) -> None:
    async with waiting(http, keepalive=1.0) as (node, wire):
        served = await ask(node, wire)
        served.head(EVENTS).event("one")
        await wire.head()
        for _ in range(3):
            chunk = await wire.chunk()
            assert chunk not in (KEEPALIVE, None)
            await trio.sleep(0.25)
            served.event("more")
        await wire.chunk()
        watch = patience.Stopwatch()
        assert await wire.chunk() == KEEPALIVE
        assert watch.total > 0.9
        assert watch.counted < 1.5


async def test_comments_of_a_server_behind_pass_and_none_are_added_while_they_come() -> None:
    theirs = b": theirs\n\n"
    async with waiting(keepalive=1.0) as (node, wire):
        served = await ask(node, wire)
        served.head(EVENTS).data(theirs)
        await wire.head()
        assert await wire.chunk() == theirs
        for _ in range(4):
            await trio.sleep(0.3)
            served.data(theirs)
            assert await wire.chunk() == theirs
        assert await wire.chunk() == KEEPALIVE


async def test_the_time_to_the_first_byte_is_that_of_the_answer() -> None:
    begun: list[float] = []

    class Watch(Observer):
        def on_first_byte(self, call: Any) -> None:
            begun.append(trio.current_time())

    async with waiting() as (node, wire):
        node.router.observers.add(Watch())
        served = await ask(node, wire)
        await comments(wire)
        assert (begun, served.call.phase) == ([], "waiting")
        served.head(EVENTS).event("one").data(DONE).done()
        await rest_of(wire)
        assert len(begun) == 1


async def test_comments_before_the_answer_do_not_stop_the_idle_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deadlines, "GRACE", 0.05)
    async with waiting(keepalive=0.02, default_timeout=0.1) as (node, wire):
        served = await ask(node, wire)
        watch = patience.Stopwatch()
        await comments(wire)
        body, whole = await rest_of(wire)
        assert watch.counted < 1
        error = read_stream(body).error
        assert error is not None
        assert error["code"] == "timeout"
        assert whole
        assert await served.wait_cancelled() is not None


@SERVERS
async def test_a_client_that_leaves_after_a_comment_cancels_its_call(http: str) -> None:
    async with waiting(http, keepalive=0.1) as (node, wire):
        served = await ask(node, wire)
        await comments(wire, 1)
        wire.stream.socket.close()
        assert await served.wait_cancelled() == "client left"


async def test_a_call_is_retried_after_a_comment_and_its_client_gets_one_answer() -> None:
    async with waiting() as (node, wire):
        other = Backend(name="other")
        node.add("m", backend=other)
        await wire.request("POST", PATH, BODY)
        await comments(wire)
        first, second = (node.backend, other) if node.backend.opened() else (other, node.backend)
        (await first.next()).fail(WorkerLost("a", "killed"), retryable=True)
        served = await second.next()
        assert await wire.chunk() == KEEPALIVE
        assert node.router.stats.retried == 1
        served.head(EVENTS).event("one").data(DONE).done()
        body, whole = await rest_of(wire)
        assert whole
        assert read_stream(body.removesuffix(DONE)).text == "one"


async def test_a_call_is_retried_once_in_all_and_the_second_failure_is_told() -> None:
    async with waiting() as (node, wire):
        other = Backend(lambda served: served.fail(WorkerLost("b", "killed"), retryable=True), "other")
        served = await ask(node, wire)
        node.add("m", backend=other)
        await comments(wire)
        served.fail(WorkerLost("a", "killed"), retryable=True)
        error = read_stream((await rest_of(wire))[0]).error
        assert error is not None
        assert error["code"] == "worker_lost"
        assert (other.opened(), node.backend.opened(), node.router.stats.retried) == (1, 0, 1)


async def test_no_comment_is_queued_behind_a_client_that_does_not_read() -> None:
    async with (
        open_http_node(None, keepalive=INTERVAL) as node,
        node.connect(receive_buffer=4096) as wire,
    ):
        served = await ask(node, wire)
        served.head(EVENTS)
        event = b"data: " + b"x" * 60_000 + b"\n\n"
        # More than fits into the buffers of the kernel; the rest waits in the task, which sends no comments then.
        for _ in range(100):
            served.data(event)
        await trio.sleep(5 * INTERVAL)
        await wire.head()
        body = b""
        while len(body) < 100 * len(event):
            body += await wire.chunk() or b""
        assert body == event * 100
        # Nothing waits any more.
        assert await wire.chunk() == KEEPALIVE
        served.done()


@pytest.mark.parametrize(
    ("status", "content_type", "body", "code", "message"),
    [
        (429, "application/json", b'{"error": {"message": "full", "code": "busy"}}', "busy", "full"),
        (400, "application/json", b'{"error": "too long"}', None, "too long"),
        (404, "application/json", b'{"message": "no such model", "object": "error"}', None, "no such model"),
        (503, "text/html", b"<html>", None, "The server behind the model answered with status 503"),
        (200, "application/json", b'{"choices": []}', "not_a_stream", None),
        (204, "", b"", "not_a_stream", None),
        (700, "application/json", b"{}", "handler_failed", None),
    ],
)
async def test_an_answer_after_a_comment_that_is_no_stream_is_an_error_event(
    status: int, content_type: str, body: bytes, code: str | None, message: str | None
) -> None:
    async with waiting() as (node, wire):
        served = await ask(node, wire)
        await comments(wire)
        served.head(content_type, status).data(body[:5]).data(body[5:])
        if not served.cancelled.is_set():
            served.done()
        rest, whole = await rest_of(wire)
        error = read_stream(rest).error
        assert error is not None
        assert error["code"] == code
        assert message in (None, error["message"])
        assert whole
        assert not node.router.live


async def test_a_compressed_stream_after_a_comment_is_an_error_event() -> None:
    async with waiting() as (node, wire):
        served = await ask(node, wire)
        await comments(wire)
        served.call.put(Head(200, EVENTS, (("content-encoding", "gzip"),)))
        error = read_stream((await rest_of(wire))[0]).error
        assert error is not None
        assert error["code"] == "not_a_stream"
        await served.wait_cancelled()


class Fixed:
    """An authenticator that knows one client."""

    def __init__(self, principal: Principal) -> None:
        self._principal = principal

    async def authenticate(self, context: Any) -> Principal:
        return self._principal


def let_in(node: HttpNode, principal: Principal) -> None:
    node.app.asgi_app.pipeline.admission = (
        Authenticate(Fixed(principal)),
        *node.app.asgi_app.pipeline.admission[1:],
    )


async def test_the_error_event_names_no_model_that_the_key_may_not_use() -> None:
    async with waiting() as (node, wire):
        let_in(node, Principal("k", models=("m",)))
        served = await ask(node, wire)
        await comments(wire)
        served.fail(ModelNotFound("m", ["m", "secret"]))
        body, _ = await rest_of(wire)
        assert b"model_not_found" in body
        assert b"secret" not in body


async def test_what_is_left_of_limits_is_said_with_the_first_comment() -> None:
    async with waiting() as (node, wire):
        let_in(node, Principal("k", limits=Limits(100, 1_000_000, 10, 1_000_000_000, "day")))
        served = await ask(node, wire)
        headers = await comments(wire)
        assert headers["x-ratelimit-limit-requests"] == "100"
        assert headers["x-ratelimit-remaining-requests"] == "99"
        served.head(EVENTS).data(DONE).done()
        await rest_of(wire)


async def receive_all(wire: Wire) -> None:
    with trio.fail_after(5):
        while await wire.stream.receive_some():
            pass


async def test_an_http_1_0_client_gets_comments_and_does_not_take_a_failure_for_an_end() -> None:
    async with waiting(stream_failure="abort") as (node, wire):
        await wire.send(raw_request("POST", PATH, BODY).replace(b"HTTP/1.1", b"HTTP/1.0"))
        served = await node.backend.next()
        await wire.head()
        await wire.until(KEEPALIVE + KEEPALIVE)
        served.fail(HandlerFailed())
        with pytest.raises(trio.BrokenResourceError):
            await receive_all(wire)


# Which requests


MESSAGES: Final = "/v1/messages"


async def test_messages_get_the_ping_of_their_api() -> None:
    ping = MESSAGE_ERROR.keepalive
    assert ping == b'event: ping\ndata: {"type": "ping"}\n\n'
    async with waiting() as (node, wire):
        node.add("*", "any")
        served = await ask(node, wire, json.dumps({"model": "*", "stream": True}).encode(), MESSAGES)
        await comments(wire, 2, ping)
        served.fail(ApiError(503, "full", code="busy"))
        body, whole = await rest_of(wire, ping)
        assert body.startswith(b"event: error\ndata: ")
        assert b'"overloaded_error"' in body
        assert whole


async def test_a_route_of_the_users_own_keeps_its_status_until_its_answer() -> None:
    async with waiting() as (node, wire):
        node.add("*", "any")
        served = await ask(node, wire, json.dumps({"model": "*", "stream": True}).encode(), "/v1/mine")
        await trio.sleep(4 * INTERVAL)
        served.fail(ApiError(429, "not now"))
        assert (await wire.answer()).status == 429


async def test_a_large_request_to_a_passthrough_model_is_looked_at_when_it_is_late() -> None:
    async with waiting() as (node, wire):
        node.add("*", "any")
        body = json.dumps({"model": "*", "messages": "x" * PARSE_IN_THREAD, "stream": True}).encode()
        served = await ask(node, wire, body)
        await comments(wire)
        served.head(EVENTS).data(DONE).done()
        await rest_of(wire)


FORM: Final = "multipart/form-data; boundary=B"


def form(**fields: str) -> bytes:
    part = '--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    texts = "".join(part % (name, "", value) for name, value in fields.items())
    return (texts + part % ("file", '; filename="a.wav"', "samples") + "--B--\r\n").encode()


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b'{"stream": true}', "application/json", True),
        (b'{"stream": false}', "application/json", False),
        (b'{"stream": "yes"}', "application/json", False),
        (b'{"input": "x", "stream_format": "sse"}', "application/json", True),
        (b'{"input": "x", "stream_format": "audio"}', "application/json", False),
        (b"{}", "application/json", False),
        (b'{"stream": true', "application/json", False),
        (b"[" * 100_000, "application/json", False),
        (form(model="m", stream="true"), FORM, True),
        (form(stream="1", model="m"), FORM, True),
        (form(stream="True"), FORM, True),
        (form(model="m", stream="false"), FORM, False),
        (form(model="m", stream="x" * 5000), FORM, False),
        (form(model="m"), FORM, False),
        (b"--", FORM, False),
        (form(stream="true"), "multipart/form-data", False),
    ],
)
def test_whether_a_request_asks_for_events(body: bytes, content_type: str, expected: bool) -> None:
    assert asks_for_events(body, content_type) is expected
