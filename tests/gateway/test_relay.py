"""The reply of a call: its status, when it begins, and what becomes of the call when the client or the node is gone."""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from http_node import (
    CHAT,
    EVENTS,
    PLAIN,
    STREAM,
    Answer,
    Backend,
    HttpNode,
    Served,
    Wire,
    open_http_node,
    plain,
    raw_request,
)

from trio_cluster.core.answer import Head
from trio_cluster.core.limits import WINDOW
from trio_cluster.errors import ApiError, HandlerFailed, Overloaded, ShuttingDown, TooSlow, WorkerLost
from trio_cluster.gateway import deadlines, relay, sse_buffer
from trio_cluster.openai import DONE, KEEPALIVE
from trio_cluster.testing import read_stream

BODY = json.dumps(CHAT).encode()
STREAM_BODY = json.dumps(STREAM).encode()
PATH = "/v1/chat/completions"
SPEECH = json.dumps({"model": "voice", "input": "hi", "voice": "v"}).encode()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Make the gateway time out after 0.1 s without output."""
    monkeypatch.setattr(deadlines, "GRACE", 0.05)
    return {"default_timeout": 0.05}


async def ask(wire: Wire, body: bytes = BODY, *headers: str) -> Answer:
    await wire.request("POST", PATH, body, *headers)
    return await wire.answer()


# Plain answers


async def test_a_complete_answer_is_one_response_with_its_length(node: HttpNode) -> None:
    response = await node.post()
    assert (response.status_code, response.content) == (200, PLAIN)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["content-length"] == str(len(PLAIN))


async def test_a_plain_answer_that_comes_in_pieces_is_sent_when_it_is_complete() -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        await wire.request("POST", PATH, BODY)
        served = await node.backend.next()
        served.head().data(b"").data(b'{"a"')
        while served.taken < 4:
            await trio.lowlevel.checkpoint()
        served.data(b"").data(b":1}").done()
        answer = await wire.answer()
        assert (answer.headers["content-length"], answer.body) == ("7", b'{"a":1}')


async def test_a_plain_answer_that_fails_half_way_is_still_a_real_status() -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        await wire.request("POST", PATH, BODY)
        served = await node.backend.next()
        served.head().data(b'{"a"')
        while not served.taken:
            await trio.lowlevel.checkpoint()
        served.fail(HandlerFailed())
        answer = await wire.answer()
        assert (answer.status, answer.error["code"]) == (500, "handler_failed")
        assert (await ask_again(node, wire)).body == PLAIN


async def ask_again(node: HttpNode, wire: Wire) -> Answer:
    await wire.request("POST", PATH, BODY)
    (await node.backend.next()).head().data(PLAIN).done()
    return await wire.answer()


async def test_a_large_plain_answer_is_sent_as_it_comes() -> None:
    piece = b"x" * 200_000
    async with open_http_node(None) as node, node.connect() as wire:
        await wire.request("POST", PATH, BODY)
        served = await node.backend.next()
        served.head()
        for count in range(1, 7):
            served.data(piece)
            while served.taken < count * len(piece):
                await trio.lowlevel.checkpoint()
        status, headers = await wire.head()
        assert (status, headers["transfer-encoding"]) == (200, "chunked")
        served.data(b"end").done()
        body = b""
        while chunk := await wire.chunk():
            body += chunk
        assert chunk == b""
        assert body == piece * 6 + b"end"


async def test_a_large_plain_answer_that_fails_after_it_began_is_cut() -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        await wire.request("POST", PATH, BODY)
        served = await node.backend.next()
        served.head().data(b"x" * (relay.BUFFER_LIMIT + 1))
        await wire.head()
        served.fail(HandlerFailed())
        while chunk := await wire.chunk():
            assert set(chunk) == {ord("x")}
        assert chunk is None


async def test_the_status_and_headers_of_an_answer_are_the_handlers() -> None:
    def script(served: Served) -> None:
        served.call.put(
            Head(
                201,
                "text/plain; charset=utf-8",
                (("X-Mine", "1"), ("Connection", "close"), ("Content-Length", "999"), ("bad\r\nname", "x"),
                 ("x-bad", "a\r\nx-injected: 1"), ("X-Request-Id", "theirs")),
            )
        )  # fmt: skip
        served.data(b"text").done()

    async with open_http_node(script) as node, node.connect() as wire:
        answer = await ask(wire)
        assert (answer.status, answer.body) == (201, b"text")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["x-mine"] == "1"
        assert answer.headers["content-length"] == "4"
        assert answer.headers["x-request-id"].startswith("req_")
        assert not {"connection", "x-bad", "x-injected"} & set(answer.headers)
        assert (await ask(wire)).status == 201


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Access-Control-Allow-Origin", "*"), ("access-control-allow-private-network", "true"),
        ("Set-Cookie", "a=b"), ("Server", "theirs"), ("Strict-Transport-Security", "max-age=1"),
        ("Alt-Svc", 'h3=":443"'), ("Clear-Site-Data", "*"), ("openai-processing-ms", "1e308"),
        ("Retry-After", "-1"), ("Retry-After", "1e308"), ("retry-after-ms", "9" * 400),
    ],
)  # fmt: skip
async def test_a_handler_does_not_speak_for_the_whole_origin(name: str, value: str) -> None:
    def script(served: Served) -> None:
        served.call.put(Head(200, "text/plain", ((name, value), ("x-mine", "1"))))
        served.data(b"text").done()

    async with open_http_node(script) as node, node.connect() as wire:
        answer = await ask(wire)
    assert answer.headers["x-mine"] == "1"
    assert answer.headers.get(name.lower()) != value


async def test_a_processing_time_that_makes_no_sense_is_replaced() -> None:
    def script(served: Served) -> None:
        served.call.put(Head(200, "text/plain", (("openai-processing-ms", "-1"), ("retry-after", "7"))))
        served.data(b"text").done()

    async with open_http_node(script) as node, node.connect() as wire:
        answer = await ask(wire)
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("seconds", "header"),
    [(1e308, "86400"), (float("inf"), "86400"), (float("nan"), "1"), (-5.0, "1"), (1.5, "2")],
)
async def test_how_long_a_client_is_told_to_wait_is_bounded(seconds: float, header: str) -> None:
    error = ApiError(503, "busy", retry_after=seconds)
    async with open_http_node(lambda served: served.fail(error)) as node:
        response = await node.post()
    assert (response.status_code, response.headers["retry-after"]) == (503, header)


@pytest.mark.parametrize(
    ("status", "content_type"), [(101, "a/b"), (99, "a/b"), (1000, "a/b"), (200, "a\r\nb")]
)
async def test_an_impossible_head_is_a_500_and_the_call_is_given_up(status: int, content_type: str) -> None:
    async with open_http_node(lambda served: served.head(content_type, status)) as node:
        response = await node.post()
        assert response.status_code == 500
        await (await node.backend.next()).wait_cancelled()
        assert not node.router.live


# Streams


async def test_a_stream_is_relayed_piece_by_piece_and_ends_well() -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS).event("one")
        status, headers = await wire.head()
        assert status == 200
        assert headers["content-type"] == EVENTS
        assert headers["cache-control"] == "no-cache"
        assert headers["x-accel-buffering"] == "no"
        assert "content-length" not in headers
        assert b"one" in (await wire.chunk() or b"")
        served.event("two")
        assert b"two" in (await wire.chunk() or b"")
        served.data(DONE).done()
        assert await wire.chunk() == DONE
        assert await wire.chunk() == b""
        assert (await ask_again(node, wire)).body == PLAIN


async def test_everything_that_waits_is_one_write() -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS).data(b"a\n\n").data(b"").data(b"b\n\n")
        await wire.head()
        assert await wire.chunk() == b"a\n\nb\n\n"
        # The client keeps up, so nothing waits from here on.
        for number in range(50):
            served.data(b"%d\n\n" % number)
        for number in range(50):
            assert await wire.chunk() == b"%d\n\n" % number
        served.data(DONE).done()
        assert await wire.chunk() == DONE
        assert await wire.chunk() == b""


async def test_an_event_is_sent_when_it_is_whole() -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS).data(b"data: 1\n\ndata: ")
        await wire.head()
        assert await wire.chunk() == b"data: 1\n\n"
        served.data(b"2")
        while served.taken < len(b"data: 1\n\ndata: 2"):
            await trio.lowlevel.checkpoint()
        served.data(b"\n\ndata: 3\n\n").data(DONE).done()
        assert await wire.chunk() == b"data: 2\n\ndata: 3\n\n" + DONE
        assert await wire.chunk() == b""


async def test_a_stream_that_fails_in_the_middle_of_an_event_ends_with_whole_events_only() -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS).event("one").data(b'data: {"choices": [{"ind')
        await wire.head()
        body = await wire.chunk() or b""
        served.fail(WorkerLost("w1", "killed"))
        while chunk := await wire.chunk():
            body += chunk
        assert chunk == b""
        report = read_stream(body)
        assert (report.ending, report.text) == ("failed", "one")


async def test_an_event_that_is_too_large_to_be_kept_is_sent_as_it_comes_and_cut_without_a_word_when_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse_buffer, "EVENT_LIMIT", 4)
    async with open_http_node(None, keepalive=0.01) as node, node.connect() as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS).data(b"data: 12")
        await wire.head()
        assert await wire.chunk() == b"data: 12"
        served.data(b"3")
        assert await wire.chunk() == b"3"
        served.data(b"\n\n")
        assert await wire.chunk() == b"\n\n"
        # Between events there may be comments again.
        assert await wire.chunk() == KEEPALIVE
        served.data(b"data: 45").fail(WorkerLost("w1", "killed"))
        while (chunk := await wire.chunk()) == KEEPALIVE:
            pass
        assert chunk == b"data: 45"
        assert await wire.chunk() is None


async def test_a_stream_that_is_complete_at_once_is_one_response_with_its_length() -> None:
    async with (
        open_http_node(lambda served: served.head(EVENTS).event("one").data(DONE).done()) as node,
        node.connect() as wire,
    ):
        answer = await ask(wire, STREAM_BODY)
        assert answer.headers["content-length"] == str(len(answer.body))
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.body.endswith(DONE)


async def test_the_last_piece_of_a_stream_and_its_end_are_one_message() -> None:
    sent: list[Any] = []
    opened: list[Served] = []

    def begin(served: Served) -> None:
        opened.append(served.head(EVENTS).event("one"))

    async def receive() -> Any:
        return {"type": "http.request", "body": STREAM_BODY}

    async def send(message: Any) -> None:
        sent.append(message)
        if b"one" in message.get("body", b""):
            opened[0].event("two").data(DONE).done()

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": PATH}
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(STREAM_BODY))]
    async with open_http_node(begin) as node:
        await node.app.asgi_app({**scope, "headers": headers}, receive, send)
    head, first, last = sent
    assert head["status"] == 200
    assert (first["body"].count(b"one"), first["more_body"]) == (1, True)
    assert (last["body"].count(b"two"), last["body"].endswith(DONE), last["more_body"]) == (1, True, False)


@pytest.mark.parametrize("stream_failure", ["end", "abort"])
@pytest.mark.parametrize("when", ["at once", "later"])
async def test_a_stream_that_fails_ends_with_one_error_event_and_as_the_option_says(
    when: str, stream_failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = ApiError(500, "it broke", code="broken")
    async with open_http_node(None, stream_failure=stream_failure) as node, node.connect() as wire:
        if when == "at once":
            node.backend.script = lambda served: served.head(EVENTS).event("one").fail(error)
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        body = b""
        if when == "later":
            served.head(EVENTS).event("one")
            await wire.head()
            body = await wire.chunk() or b""
            served.event("two").fail(error)
            while chunk := await wire.chunk():
                body += chunk
            whole = chunk == b""
        else:
            answer = await wire.answer()
            body, whole = answer.body, answer.whole
        assert whole == (stream_failure == "end")
        events = body.split(b"\n\n")
        assert b"one" in events[0]
        assert json.loads(events[-2].removeprefix(b"data: ")) == error.envelope()
        assert b"[DONE]" not in body
        assert body.count(b'"error"') == 1
        if stream_failure == "end":
            # The connection can be used again.
            node.backend.script = plain
            assert (await ask(wire)).status == 200
    assert not caplog.records


def numbered(number: int, kind: str, **members: object) -> bytes:
    data = {"type": kind, "sequence_number": number} | members
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), json.dumps(data).encode())


def typed(kind: str, **members: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), json.dumps({"type": kind} | members).encode())


CREATED = numbered(0, "response.created", response={"id": "resp_1", "model": "m", "status": "in_progress"})
ERROR = ApiError(429, "it broke", code="broken")
ENVELOPE = ERROR.envelope()["error"]
RESPONSE = json.dumps({"model": "m", "input": "hi", "stream": True}).encode()
MESSAGE = json.dumps(STREAM | {"max_tokens": 5}).encode()
IMAGE = json.dumps({"model": "m", "prompt": "hi", "stream": True}).encode()
SPEECH_EVENTS = json.dumps({"model": "m", "input": "hi", "voice": "v", "stream_format": "sse"}).encode()

#: Routes, requests, what has been sent, the name of the event that a failure is, and its members.
GRAMMARS = {
    "chat": (PATH, STREAM_BODY, b'data: {"choices":[]}\n\n', None, {"error": ENVELOPE}),
    "responses": (
        "/v1/responses",
        RESPONSE,
        CREATED + numbered(1, "response.output_text.delta", delta='"sequence_number": 9'),
        "response.failed",
        {
            "type": "response.failed",
            "sequence_number": 2,
            "response": {
                "id": "resp_1",
                "model": "m",
                "status": "failed",
                "error": {"code": "broken", "message": "it broke"},
            },
            "error": ENVELOPE,
        },
    ),
    "messages": (
        "/v1/messages",
        MESSAGE,
        typed("content_block_delta"),
        "error",
        {
            "type": "error",
            "error": {"type": "rate_limit_error", "message": "it broke", "code": "broken"},
        },
    ),
    "images": (
        "/v1/images/generations",
        IMAGE,
        typed("image_generation.partial_image"),
        "error",
        {"type": "error", "error": ENVELOPE},
    ),
    "speech": (
        "/v1/audio/speech",
        SPEECH_EVENTS,
        b'data: {"type":"speech.audio.delta"}\n\n',
        None,
        {"type": "error", "error": ENVELOPE},
    ),
}
#: How servers behind an engine say that they have failed, where that is not the event that is written here.
OWN_FAILURES = {
    "chat": b'data: {"id":"c","choices":[],"error":{"message":"mine"}}\r\n\r\n',
    "responses": numbered(2, "error", message="mine"),
    "messages": typed("error", error={"type": "overloaded_error", "message": "mine"}),
    "images": typed("error", error={"message": "mine"}),
    "speech": b'data: {"type":"error","message":"mine"}\n\n',
}
ENDS = {
    "chat": DONE,
    "responses": numbered(2, "response.completed", response={"output": ["x" * 100_000]}),
    "messages": typed("message_stop"),
    "images": typed("image_generation.completed", b64_json="x" * 100_000),
    "speech": b'data: {"type":"speech.audio.done"}\n\n',
}


async def failed_stream(route: str, *sent: bytes, **options: object) -> Answer:
    """Let a stream of a route fail when the client has received all of ``sent``."""
    path, body, *_ = GRAMMARS[route]
    async with open_http_node(None, **options) as node:
        node.router.catalog.remove("m", node.backend)
        node.add("m", "any")
        async with node.connect() as wire:
            await wire.request("POST", path, body)
            served = await node.backend.next()
            served.head(EVENTS)
            received = b""
            await trio.testing.wait_all_tasks_blocked()
            for piece in sent:
                served.data(piece)
                if not received:
                    await wire.head()
                while not received.endswith(piece):
                    received += await wire.chunk() or b""
            served.fail(ERROR)
            while chunk := await wire.chunk():
                received += chunk
            return Answer(200, {}, received, whole=chunk == b"")


@pytest.mark.parametrize("ping", [b"", KEEPALIVE])
@pytest.mark.parametrize("route", GRAMMARS)
async def test_a_stream_fails_in_the_grammar_of_its_route(route: str, ping: bytes) -> None:
    *_, before, name, members = GRAMMARS[route]
    pieces = [event + b"\n\n" for event in before.split(b"\n\n")[:-1]]
    answer = await failed_stream(route, *pieces, *([ping] if ping else []))
    assert answer.whole
    event = answer.body.removeprefix(before + ping)
    if name is not None:
        assert event.startswith(b"event: %s\n" % name.encode())
        event = event.partition(b"\n")[2]
    assert json.loads(event.removeprefix(b"data: ")) == members


@pytest.mark.parametrize("end", ["failed", "complete"])
@pytest.mark.parametrize("route", GRAMMARS)
async def test_what_has_ended_in_its_own_grammar_is_not_ended_again(route: str, end: str) -> None:
    sent = GRAMMARS[route][2] + (OWN_FAILURES if end == "failed" else ENDS)[route]
    for pieces in ([sent], [sent, KEEPALIVE], [KEEPALIVE + sent]):
        answer = await failed_stream(route, *pieces)
        assert (answer.body, answer.whole) == (b"".join(pieces), True)


async def test_the_failure_of_a_stream_of_no_known_grammar_is_a_broken_connection() -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        node.add("behind", "any")
        await wire.request("POST", "/v1/threads", json.dumps({"model": "behind"}).encode())
        served = await node.backend.next()
        served.head(EVENTS).event("one").fail(ERROR)
        assert not (await wire.answer()).whole


async def test_a_stream_that_fails_before_its_first_event_is_a_real_status() -> None:
    error = ApiError(429, "not now", retry_after=3.2)
    async with (
        open_http_node(lambda served: served.head(EVENTS).data(b"").fail(error)) as node,
        node.connect() as wire,
    ):
        answer = await ask(wire, STREAM_BODY)
        assert (answer.status, answer.headers["retry-after"]) == (429, "4")
        assert answer.error["type"] == "rate_limit_error"


async def test_a_silent_stream_gets_comments() -> None:
    async with open_http_node(None, keepalive=0.02) as node, node.connect() as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS).event("one")
        await wire.head()
        await wire.chunk()
        assert [await wire.chunk() for _ in range(3)] == [KEEPALIVE] * 3
        served.data(DONE).done()
        while (chunk := await wire.chunk()) == KEEPALIVE:
            pass
        assert chunk == DONE


async def test_signs_of_life_are_not_sent_but_count(
    impatient: dict[str, float], autojump_clock: trio.testing.MockClock
) -> None:
    async with (
        open_http_node(None, **impatient) as node,
        node.connect() as wire,
        trio.open_nursery() as nursery,
    ):
        await wire.request("POST", PATH, BODY)
        served = await node.backend.next()
        served.head()

        async def live() -> None:
            for _ in range(6):
                await trio.sleep(0.04)
                served.data(b"")
            served.data(PLAIN).done()

        nursery.start_soon(live)
        assert (await wire.answer()).body == PLAIN


async def test_audio_is_sent_as_it_comes_and_cut_when_it_fails() -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        node.add("voice", "tts")
        await wire.request("POST", "/v1/audio/speech", SPEECH)
        served = await node.backend.next()
        served.head("audio/mpeg").data(b"one")
        status, headers = await wire.head()
        assert (status, headers["content-type"]) == (200, "audio/mpeg")
        assert await wire.chunk() == b"one"
        served.data(b"two").fail(HandlerFailed())
        assert await wire.chunk() == b"two"
        assert await wire.chunk() is None


async def test_audio_that_fails_before_its_first_byte_is_a_real_status() -> None:
    async with open_http_node(lambda served: served.head("audio/mpeg").fail(HandlerFailed())) as node:
        node.add("voice", "tts")
        async with node.connect() as wire:
            await wire.request("POST", "/v1/audio/speech", SPEECH)
            assert (await wire.answer()).status == 500


async def test_an_http_1_0_client_does_not_take_a_cut_answer_for_a_whole_one() -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        node.add("voice", "tts")
        request = raw_request("POST", "/v1/audio/speech", SPEECH)
        await wire.send(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
        served = await node.backend.next()
        served.head("audio/mpeg").data(b"one")
        status, headers = await wire.head()
        assert (status, headers["connection"]) == (200, "close")
        await wire.until(b"one")
        served.fail(HandlerFailed())
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await wire.stream.receive_some()


# Errors


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (ApiError(400, "no", code="context_length_exceeded", param="messages"), 400,
         "context_length_exceeded", None),
        (ApiError(429, "slower", retry_after=0.1), 429, None, "1"),
        (HandlerFailed(), 500, "handler_failed", None),
        (WorkerLost("w", "gone"), 502, "worker_lost", None),
        (Overloaded("full", retry_after=1.5), 503, "over_capacity", "2"),
        (ShuttingDown(), 503, "shutting_down", "5"),
        (TooSlow("late"), 504, "timeout", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("body", [BODY, STREAM_BODY])
async def test_a_failure_before_the_answer_began_is_a_real_status(
    error: ApiError, status: int, code: str | None, retry_after: str | None, body: bytes
) -> None:
    async with open_http_node(lambda served: served.fail(error)) as node, node.connect() as wire:
        answer = await ask(wire, body)
        assert (answer.status, answer.error["code"]) == (status, code)
        assert answer.error["param"] == error.param
        assert answer.headers.get("retry-after") == retry_after
        assert (await ask(wire, body)).status == status


async def test_a_call_that_cannot_be_opened_is_a_real_status(node: HttpNode) -> None:
    def refuse(served: Served) -> None:
        served.call.release()
        raise Overloaded("full")

    node.backend.script = refuse
    assert (await node.post()).status_code == 503


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None), (b"{", None), (b"[]", None), (b"\xff", None),
        (json.dumps(CHAT | {"messages": []}).encode(), "messages"),
        (json.dumps({"model": "m"}).encode(), "messages"),
        (json.dumps({"messages": CHAT["messages"]}).encode(), "model"),
        (json.dumps(CHAT | {"temperature": "hot"}).encode(), "temperature"),
    ],
)  # fmt: skip
async def test_a_bad_request_is_refused_before_anything_is_opened(
    node: HttpNode, body: bytes, param: str | None
) -> None:
    async with node.connect() as wire:
        answer = await ask(wire, body)
        assert answer.status == 400
        if param is not None:
            assert answer.error["param"] == param
        assert (await ask(wire)).status == 200
    assert node.router.stats.admitted == 1


async def test_another_media_type_is_415(node: HttpNode) -> None:
    async with node.client() as client:
        response = await client.post(PATH, data={"model": "m"})
    assert response.status_code == 415


async def test_an_unknown_model_is_404_and_one_of_another_kind_400(node: HttpNode) -> None:
    node.add("vectors", "embedding")
    response = await node.post(CHAT | {"model": "nobody"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "m, vectors" in error["message"]
    response = await node.post(CHAT | {"model": "vectors"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("path", "body", "endpoint"),
    [
        ("/v1/v1/chat/completions", CHAT, "chat.completions"),
        ("/openai/v1/chat/completions", CHAT, "chat.completions"),
        (
            "/openai/deployments/m/chat/completions?api-version=2024-10-21",
            {"messages": CHAT["messages"]},
            "chat.completions",
        ),
        ("/openai/deployments/m/chat/completions/", CHAT | {"model": "gpt-4o"}, "chat.completions"),
        ("/openai/deployments/org/m/completions", {"model": "x", "prompt": "x"}, "completions"),
        ("/v2/rerank", {"model": "m", "query": "x", "documents": ["y"]}, "rerank"),
    ],
)
async def test_paths_that_clients_of_other_servers_know(
    node: HttpNode, path: str, body: dict[str, Any], endpoint: str
) -> None:
    node.router.catalog.remove("m", node.backend)
    kind: Any = "rerank" if endpoint == "rerank" else "chat"
    for name in ("m", "org/m"):
        node.add(name, kind)
    async with node.client() as client:
        assert (await client.post(path, json=body)).status_code == 200
    request = (await node.backend.next()).request
    assert (request.endpoint, request.model) == (endpoint, "org/m" if "/org/" in path else "m")
    # What the handler reads is what was routed by.
    assert json.loads(request.body)["model"] == request.model


async def test_the_model_of_a_form_must_be_that_of_its_path(node: HttpNode) -> None:
    node.add("a", "asr")
    node.add("b", "asr")
    async with node.client() as client:
        for size in (9, 3_000_000):
            for model, status in (("a", 200), ("b", 400)):
                response = await client.post(
                    "/openai/deployments/a/audio/transcriptions",
                    data={"model": model},
                    files={"file": b"x" * size},
                )
                assert response.status_code == status
                if status == 400:
                    assert response.json()["error"]["param"] == "model"


async def test_the_health_of_a_node_and_its_models_have_other_paths_too(node: HttpNode) -> None:
    async with node.client() as client:
        assert (await client.get("/v1/health")).json() == (await client.get("/health")).json()
        for path in ("/openai/models?api-version=1", "/v1/v1/models", "/openai/v1/models"):
            assert (await client.get(path)).json() == (await client.get("/v1/models")).json()
        assert (await client.get("/openai/deployments/m/nothing")).status_code == 404


async def test_the_key_of_an_azure_client_is_taken() -> None:
    async with open_http_node(api_key="secret") as node, node.client() as client:
        for key, status in (("secret", 200), ("wrong", 401)):
            response = await client.post(PATH, json=CHAT, headers={"api-key": key})
            assert response.status_code == status


async def test_models_for_a_chat_are_listed_first(node: HttpNode) -> None:
    node.add("a-voice", "tts")
    node.add("z-chat")
    async with node.client() as client:
        models = (await client.get("/v1/models")).json()["data"]
    assert [each["id"] for each in models] == ["m", "z-chat", "a-voice"]


async def test_token_ids_need_a_model_that_asks_for_them(node: HttpNode) -> None:
    body = {"prompt": [[1, 2], [3]], "max_tokens": 0}
    async with node.client() as client:
        response = await client.post("/v1/completions", json={"model": "m"} | body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "token_ids_not_supported")
        assert error["param"] == "prompt"
        node.add("tokens", accepts_token_ids=True)
        response = await client.post("/v1/completions", json={"model": "tokens"} | body)
        assert response.status_code == 200
        response = await client.post("/v1/completions", json={"model": "tokens", "echo": True} | body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "echo")


async def test_images_need_a_model_that_sees(node: HttpNode) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "what?"}, part]}]
    response = await node.post(CHAT | {"messages": messages})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "vision_not_supported")
    assert error["param"] == "messages"
    node.add("eyes", supports_vision=True)
    assert (await node.post({"model": "eyes", "messages": messages})).status_code == 200


async def test_a_node_that_drains_takes_no_calls(node: HttpNode) -> None:
    node.router.drain("closing")
    response = await node.post()
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")


# What the call is given


async def test_the_request_reaches_the_backend_as_it_was_sent(node: HttpNode) -> None:
    headers = {
        "User-Agent": "ua", "Accept": "a/b", "X-Mine": "1", "OpenAI-Organization": "org",
        "Authorization": "Bearer k", "Cookie": "c=1", "X-Api-Key": "k", "X-Auth-Token": "t",
        "Connection": "keep-alive", "Content-Type": "application/json; charset=utf-8", "Host": "localhost",
    }  # fmt: skip
    body = b' {"model": "m",  "messages": [{"role": "user", "content": "hi"}], "mine": [1]} '
    async with node.client() as client:
        assert (await client.post("/chat/completions", content=body, headers=headers)).status_code == 200
    request = (await node.backend.next()).request
    assert request.body == body
    assert request.content_type == "application/json; charset=utf-8"
    assert (request.endpoint, request.kind, request.model) == ("chat.completions", "chat", "m")
    assert request.headers == {
        "user-agent": "ua", "accept": "a/b", "x-mine": "1", "openai-organization": "org",
    }  # fmt: skip
    assert request.parsed.raw["mine"] == [1]
    assert (request.idle_timeout, request.total_timeout) == (60.0, math.inf)


async def test_headers_of_the_same_name_are_joined(node: HttpNode) -> None:
    async with node.connect() as wire:
        await ask(wire, BODY, "X-Mine: 1", "x-mine: 2")
    assert (await node.backend.next()).request.headers["x-mine"] == "1, 2"


@pytest.mark.parametrize(
    ("headers", "idle_timeout", "total_timeout"),
    [
        ({"x-request-timeout": "2.5"}, 2.5, 2.5),
        ({"x-request-timeout": "600"}, 60.0, 600.0),
        ({"x-stainless-read-timeout": "7"}, 7.0, math.inf),
        ({"x-stainless-read-timeout": "600"}, 60.0, math.inf),
        ({"x-stainless-read-timeout": "7", "x-request-timeout": "3"}, 3.0, 3.0),
        ({"x-stainless-read-timeout": "never"}, 60.0, math.inf),
        ({"x-stainless-read-timeout": "0"}, 60.0, math.inf),
    ],
)
async def test_clients_can_shorten_the_silence_and_limit_the_whole(
    node: HttpNode, headers: dict[str, str], idle_timeout: float, total_timeout: float
) -> None:
    assert (await node.post(headers=headers)).status_code == 200
    request = (await node.backend.next()).request
    assert (request.idle_timeout, request.total_timeout) == (idle_timeout, total_timeout)


@pytest.mark.parametrize("value", ["", "x", "-1", "0", "0.0", "nan", "inf", "1e3", "1_0", "9" * 400])
async def test_a_malformed_time_limit_is_refused(node: HttpNode, value: str) -> None:
    response = await node.post(headers={"X-Request-Timeout": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout"
    assert node.router.stats.admitted == 0


async def test_the_limit_that_is_set_while_the_node_runs_acts_at_once(node: HttpNode) -> None:
    node.node_context.options.server.default_timeout = 9.0
    await node.post()
    assert (await node.backend.next()).request.idle_timeout == 9.0


async def test_a_large_body_is_read_as_well(node: HttpNode) -> None:
    text = "x" * (2 << 20)
    response = await node.post(CHAT | {"messages": [{"role": "user", "content": text}]})
    assert response.status_code == 200
    assert (await node.backend.next()).request.parsed.last_text == text
    response = await node.post({"model": "m", "messages": text})
    assert response.status_code == 400


# A second try elsewhere


def two_nodes(node: HttpNode, first: Callable[[Served], Any], second: Callable[[Served], Any]) -> None:
    node.backend.script = first
    node.add("m", backend=Backend(second, "other"))


async def test_a_call_whose_worker_is_lost_before_it_answers_is_made_once_more_elsewhere(
    node: HttpNode,
) -> None:
    two_nodes(
        node,
        lambda s: s.fail(WorkerLost("local", "gone"), retryable=True),
        lambda s: s.head().data(PLAIN).done(),
    )
    response = await node.post()
    assert (response.status_code, response.content) == (200, PLAIN)
    assert node.router.stats.retried == 1


async def test_it_is_made_only_once_more(node: HttpNode) -> None:
    lost = WorkerLost("w", "gone")
    two_nodes(node, lambda s: s.fail(lost, retryable=True), lambda s: s.fail(lost, retryable=True))
    assert (await node.post()).status_code == 502
    assert node.router.stats.admitted == 2


async def test_the_second_call_is_cancelled_when_the_client_leaves(node: HttpNode) -> None:
    two_nodes(node, lambda s: s.fail(WorkerLost("local", "gone"), retryable=True), lambda s: None)
    second = node.router.catalog.replicas("m")[1]
    assert isinstance(second, Backend)
    async with node.connect() as wire:
        await wire.request("POST", PATH, BODY)
        served = await second.next()
    assert await served.wait_cancelled() == "client left"


# Silence


async def test_a_call_that_stays_silent_is_given_up_with_504(impatient: dict[str, float]) -> None:
    async with open_http_node(None, **impatient) as node, node.connect() as wire:
        answer = await ask(wire)
        assert (answer.status, answer.error["code"]) == (504, "timeout")
        assert "silent" in (await (await node.backend.next()).wait_cancelled() or "")


async def test_a_plain_answer_that_goes_silent_half_way_is_given_up_with_504(
    impatient: dict[str, float],
) -> None:
    async with (
        open_http_node(lambda served: served.head().data(b"{"), **impatient) as node,
        node.connect() as wire,
    ):
        assert (await ask(wire)).status == 504
        await (await node.backend.next()).wait_cancelled()


async def test_a_stream_that_goes_silent_gets_an_error_event_and_a_proper_end(
    impatient: dict[str, float],
) -> None:
    async with (
        open_http_node(lambda served: served.head(EVENTS).event("one"), **impatient) as node,
        node.connect() as wire,
    ):
        answer = await ask(wire, STREAM_BODY)
        assert answer.whole
        assert b'"timeout"' in answer.body.split(b"\n\n")[-2]
        await (await node.backend.next()).wait_cancelled()


async def test_comments_do_not_make_a_silent_stream_live_longer(impatient: dict[str, float]) -> None:
    async with (
        open_http_node(lambda served: served.head(EVENTS).event("one"), keepalive=0.01, **impatient) as node,
        node.connect() as wire,
    ):
        with trio.fail_after(5):
            answer = await ask(wire, STREAM_BODY)
        assert answer.whole
        assert b'"timeout"' in answer.body
        assert 1 <= answer.body.count(KEEPALIVE) <= 20


# Clients that leave


@pytest.mark.parametrize("leave", ["close", "reset", "half"])
@pytest.mark.parametrize("body", [BODY, STREAM_BODY])
async def test_a_client_that_leaves_before_the_first_output_cancels_the_call(leave: str, body: bytes) -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        await wire.request("POST", PATH, body)
        served = await node.backend.next()
        await _leave(wire, leave)
        assert await served.wait_cancelled() == "client left"


@pytest.mark.parametrize("leave", ["close", "reset", "half"])
async def test_a_client_that_leaves_an_idle_stream_cancels_the_call(leave: str) -> None:
    async with open_http_node(None) as node, node.connect() as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS).event("one")
        await wire.head()
        await wire.chunk()
        await _leave(wire, leave)
        assert await served.wait_cancelled() == "client left"


async def test_a_client_that_leaves_a_plain_answer_half_way_cancels_the_call() -> None:
    async with open_http_node(lambda served: served.head().data(b"{")) as node, node.connect() as wire:
        await wire.request("POST", PATH, BODY)
        served = await node.backend.next()
        await _leave(wire, "close")
        assert await served.wait_cancelled() == "client left"


@pytest.mark.parametrize("leave", ["close", "reset", "half"])
async def test_a_client_that_leaves_while_a_write_to_it_is_stuck_cancels_the_call(leave: str) -> None:
    async with open_http_node(None) as node, node.connect(receive_buffer=4096) as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS)
        with trio.fail_after(5):
            # Full means that a window's worth waits, since no more is taken.
            while served.call.body.waiting_bytes < WINDOW:
                served.data(b"x" * 65536 + b"\n\n")
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
        await _leave(wire, leave)
        assert await served.wait_cancelled() == "client left"


async def test_a_client_that_leaves_a_busy_stream_cancels_the_call() -> None:
    async with open_http_node(None) as node, node.connect() as wire, trio.open_nursery() as nursery:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS)

        async def produce() -> None:
            while not served.cancelled.is_set():
                served.event("x")
                await served.call.body.wait_room()

        nursery.start_soon(produce)
        await wire.head()
        await wire.chunk()
        await _leave(wire, "close")
        assert await served.wait_cancelled() == "client left"


async def test_a_client_that_sent_a_stray_byte_is_found_gone_by_the_comments() -> None:
    # The byte looks like the beginning of a second request, and the server does not read until its turn.
    async with open_http_node(None, keepalive=0.02) as node, node.connect() as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        await wire.send(b"\r\n")
        served = await node.backend.next()
        served.head(EVENTS).event("one")
        await wire.head()
        await _leave(wire, "close")
        assert await served.wait_cancelled() == "client left"


async def _leave(wire: Wire, how: str) -> None:
    if how == "half":
        await wire.stream.send_eof()
        return
    if how == "reset":
        wire.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.stream.socket.close()


async def test_the_counters_add_up_whatever_clients_do() -> None:
    async with open_http_node(None) as node:
        for number in range(20):
            async with node.connect() as wire:
                await wire.request("POST", PATH, STREAM_BODY)
                served = await node.backend.next()
                served.head(EVENTS).event("one")
                if number % 2:
                    served.data(DONE).done()
                    await wire.answer()
                else:
                    await wire.head()
            if not number % 2:
                await served.wait_cancelled()
        stats = node.router.stats
        assert (stats.admitted, stats.completed, stats.cancelled) == (20, 10, 10)
        assert not node.router.live
