"""The whole way from a client to a server behind the engine ``openai``, and back: the same bytes, and the same ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import patience
import pytest
import trio
from nodes import Nodes, Stream
from raw_server import RawServer, Received, Script, Visit, open_raw_server, reply
from scripted import Trace
from served import PLACEMENTS, Placement, Served, chat, until

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.core.answer import Done as DoneEvent, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.observer import Observer
from trio_cluster.core.outcome import Outcome
from trio_cluster.engines import parse_serve, serve_engine

LISTING = reply(
    b'{"object":"list","data":[{"id":"m","object":"model","max_model_len":4096,"owned_by":"vllm"}]}'
)
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
CHUNKED = EVENTS + b"Transfer-Encoding: chunked\r\n\r\n"
ENVELOPE = b'{"error": {"message": "no", "type": "x", "param": null, "code": null}}'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Behind:
    """What stands behind the cluster: one call is answered as the test says, the list of models always."""

    def __init__(self) -> None:
        self.answer: Script = Visit.request  # type: ignore[assignment]
        self.listing = LISTING

    async def script(self, visit: Visit) -> None:
        while True:
            received = await visit.head()
            if received.method == "GET":
                await visit.send(self.listing)
                continue
            visit.unread(received)
            await self.answer(visit)


@asynccontextmanager
async def open_upstream(
    placement: Placement, options: str = "", **server: Any
) -> AsyncIterator[tuple[Served, RawServer, Behind]]:
    """Have a server behind an engine behind the API."""

    def new_server(**more: Any) -> ClusterServer:
        fields = ServerOptions(host="127.0.0.1", **server, **more)
        return ClusterServer(ClusterServerOptions(server=fields, drain_timeout=5))

    front = new_server()
    back = front if placement == "local" else new_server(worker_id="w1")
    behind = Behind()
    async with open_raw_server(behind.script) as raw, trio.open_nursery() as nursery:
        await nursery.start(serve_engine, parse_serve(f"openai:{raw.url}{options}"), back)
        if placement == "local":
            await nursery.start(front.run_as_standalone, 0)
        else:
            await nursery.start(front.run_as_master, 0)
            await nursery.start(back.run_as_worker, "127.0.0.1", front.internal_port)
        served = Served(placement, front, back, Trace())
        yield served, raw, behind
        await served.check_is_idle()
        nursery.cancel_scope.cancel()


@pytest.fixture(params=PLACEMENTS)
async def upstream(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Served, RawServer, Behind]]:
    async with open_upstream(request.param) as opened:
        yield opened


def posts(raw: RawServer) -> list[Received]:
    return [received for received in raw.received if received.method == "POST"]


def answer_with(answer: bytes, *more: bytes, close: bool = False) -> Script:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(answer, *more)
        if close:
            await visit.stream.aclose()

    return script


# The same bytes


ODD_CHAT = (
    b'{ "model" : "m", "temperature": 1.0e-1, "messages":[{"role":"user","content":"h\\u00e9\xc3\xa9"}], '
    b'"chat_template_kwargs":{"thinking" : true}, "top_k":40, "big":123456789012345678901234567890 }'
)
ODD_ANSWER = (
    b'{ "choices" : [{"message":{"content":null,"reasoning_content":"h\\u00e4\xc3\xa4","tool_calls":[{"x": 1.0}]},'
    b'"logprobs":{"content":[]}}],\n"usage":{"prompt_tokens" :1}, "vendor":{"a":1e5}}\n'
)
FORM_TYPE = "multipart/form-data; boundary=----x"
FORM = (
    b'------x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    + bytes(range(256)) * 20
    + b'\r\n------x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n------x--\r\n'
)


@pytest.mark.parametrize(
    ("path", "target", "content_type", "body"),
    [
        ("/v1/chat/completions", "/v1/chat/completions", "application/json", ODD_CHAT),
        ("/chat/completions", "/v1/chat/completions", "application/json; charset=utf-8", ODD_CHAT),
        (
            "/v1/completions",
            "/v1/completions",
            "application/json",
            b'{"model":"m","prompt":[[1,2]],"best_of":3}',
        ),
        ("/v1/embeddings", "/v1/embeddings", "application/json", b'{"model":"m","input":"a" , "truncate":1}'),
        (
            "/v1/responses",
            "/v1/responses",
            "application/json",
            b'{"model":"m","input":"a","store":false,"x":null}',
        ),
        ("/v1/rerank", "/v1/rerank", "application/json", b'{"model":"m","query":"q","documents":[{"x":1}]}'),
        (
            "/v1/moderations",
            "/v1/moderations",
            "application/json",
            b'{"model":"m","input":[{"type":"text"}]}',
        ),
        ("/v1/audio/speech", "/v1/audio/speech", "application/json", b'{"model":"m","input":"a","lang":"x"}'),
        ("/v1/audio/transcriptions", "/v1/audio/transcriptions", FORM_TYPE, FORM),
        ("/v1/audio/translations", "/v1/audio/translations", FORM_TYPE, FORM),
        ("/v1/images/generations", "/v1/images/generations", "application/json", b'{"model":"m","steps":4}'),
        ("/v1/images/edits", "/v1/images/edits", FORM_TYPE, FORM),
        ("/v1/tokenize", "/v1/tokenize", "application/json", b'{"model":"m","prompt":"a"}'),
        ("/v1/messages", "/v1/messages", "application/json", b'{"max_tokens":1,"messages":[],"model":"m"}'),
        ("/v1/some/other", "/v1/some/other", FORM_TYPE, FORM),
    ],
)
async def test_bytes_are_the_same_both_ways_on_every_route(
    upstream: tuple[Served, RawServer, Behind], path: str, target: str, content_type: str, body: bytes
) -> None:
    served, raw, behind = upstream
    behind.answer = answer_with(reply(ODD_ANSWER, "200 OK", "application/json", "X-Vendor: 1"))
    headers = {"content-type": content_type, "authorization": "Bearer theirs", "x-request-id": "mine"}
    response = await served.post(path, content=body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.content == ODD_ANSWER
    assert response.headers["x-vendor"] == "1"
    assert response.headers["x-request-id"] == "mine"
    (received,) = posts(raw)
    assert (received.target, received.body) == (target, body)
    assert received.headers["content-type"] == content_type
    assert received.headers["x-request-id"] == "mine"
    assert "authorization" not in received.headers


STREAM = [
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","reasoning_content":"h\xc3\xa4"}}]}\r\n\r\n',
    b": keep-alive\n\n",
    b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\\"a"}}]}}]}\n\n',
    b'event: vendor\ndata: {"choices" : [{"index":0,"delta":{"content":"x"},"logprobs":{"content":[1.0e3]}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
]


@pytest.mark.parametrize("how", ["events", "bytes", "at once", "close-delimited"])
async def test_a_stream_is_the_same_to_the_byte(upstream: tuple[Served, RawServer, Behind], how: str) -> None:
    served, _, behind = upstream
    whole = b"".join(STREAM)
    if how == "close-delimited":
        behind.answer = answer_with(EVENTS + b"\r\n", *STREAM, close=True)
    elif how == "at once":
        behind.answer = answer_with(CHUNKED + b"".join(map(chunk, STREAM)) + b"0\r\n\r\n")
    else:
        pieces = STREAM if how == "events" else [bytes([byte]) for byte in whole]
        behind.answer = answer_with(CHUNKED, *map(chunk, pieces), b"0\r\n\r\n")
    stream = await served.stream(chat("m", stream=True))
    assert stream.body == whole
    assert (stream.status, stream.whole) == (200, True)


@pytest.mark.parametrize("separator", [b"\n\n", b"\r\n\r\n"], ids=repr)
async def test_each_event_is_there_before_the_next_one_is_made(
    upstream: tuple[Served, RawServer, Behind], separator: bytes
) -> None:
    served, _, behind = upstream
    taken = trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED)
        for number in range(4):
            await visit.send(chunk(b"data: %d" % number + separator))
            await taken.wait()
        await visit.send(chunk(b"data: [DONE]" + separator), b"0\r\n\r\n")

    behind.answer = script
    received = b""
    async with served.http() as client:
        asked = client.stream("POST", "/v1/chat/completions", json=chat("m", stream=True))
        with trio.fail_after(5):
            async with asked as response:
                async for piece in response.aiter_raw():
                    received += piece
                    number = received.count(b"data: ")
                    if received.endswith(separator) and number < 5:
                        earlier, taken = taken, trio.Event()
                        earlier.set()
    assert received == b"".join(b"data: %d" % n + separator for n in range(4)) + b"data: [DONE]" + separator


async def test_a_compressed_answer_passes_as_it_is(upstream: tuple[Served, RawServer, Behind]) -> None:
    served, _, behind = upstream
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(ODD_ANSWER) + packer.flush()
    behind.answer = answer_with(reply(packed, "200 OK", "application/json", "Content-Encoding: gzip"))
    response = await served.post(json=chat("m"))
    assert response.headers["content-encoding"] == "gzip"
    assert response.content == ODD_ANSWER


async def test_an_answer_of_any_size_passes(upstream: tuple[Served, RawServer, Behind]) -> None:
    served, _, behind = upstream
    body = bytes(range(256)) * 20_000
    behind.answer = answer_with(reply(body, "200 OK", "audio/wav"))
    response = await served.post("/v1/audio/speech", json={"model": "m", "input": "a", "voice": "v"})
    assert response.content == body


async def test_huge_headers_do_no_harm(upstream: tuple[Served, RawServer, Behind]) -> None:
    served, _, behind = upstream
    behind.answer = answer_with(
        reply(b"{}", "200 OK", "application/json", *[f"X-{n}: {'v' * 500}" for n in range(100)])
    )
    response = await served.post(json=chat("m"))
    assert (response.status_code, response.content) == (200, b"{}")
    behind.answer = answer_with(reply(b"{}", "200 OK", "application/json", "X-A: " + "v" * 300_000))
    response = await served.post(json=chat("m"))
    assert response.status_code == 502


async def test_the_list_tells_what_the_server_tells(upstream: tuple[Served, RawServer, Behind]) -> None:
    served, _, _ = upstream
    async with served.http() as client:
        (entry,) = (await client.get("/v1/models")).json()["data"]
    assert (entry["id"], entry["kind"], entry["context_window"]) == ("m", "any", 4096)
    assert entry["max_model_len"] == 4096


@pytest.mark.parametrize("placement", PLACEMENTS)
async def test_an_upload_streams_through_under_another_name(placement: Placement) -> None:
    audio = bytes(range(256)) * 16_000
    body = FORM.replace(bytes(range(256)) * 20, audio).replace(b"\r\nm\r\n", b"\r\ngpu/m\r\n")
    async with open_upstream(placement, ",prefix=gpu/") as (served, raw, behind):
        behind.answer = answer_with(reply(b'{"text":"hi"}'))
        response = await served.post(
            "/v1/audio/transcriptions", content=body, headers={"content-type": FORM_TYPE}
        )
        assert response.json() == {"text": "hi"}
        (received,) = posts(raw)
        assert received.body == body.replace(b"gpu/m", b"m")


async def test_requests_share_a_connection_one_after_the_other(
    upstream: tuple[Served, RawServer, Behind],
) -> None:
    served, raw, behind = upstream
    behind.answer = answer_with(reply(b"{}"))
    for _ in range(5):
        assert (await served.post(json=chat("m"))).status_code == 200
    # One of them may have been for the list of models.
    assert len(raw.visits) <= 2


# Usage


class Ends(Observer):
    """Keeps how calls ended on a node."""

    def __init__(self) -> None:
        self.usages: list[Usage | None] = []

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        assert isinstance(call.end, DoneEvent)
        self.usages.append(call.end.usage)


def events(*values: str) -> bytes:
    return b"".join(b"data: %b\n\n" % value.encode() for value in values)


TOKEN = '{"choices":[{"index":0,"delta":{"content":"x"}}]}'
EXTRA = '{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":6}}}'
NEWER = '"usage":{"input_tokens":7,"output_tokens":3,"input_tokens_details":{"cached_tokens":6}}'
APART = '"usage":{"input_tokens":1,"cache_read_input_tokens":6,"output_tokens":%d}'


@pytest.mark.parametrize(
    ("path", "fields", "answer", "kept"),
    [
        ("chat/completions", {}, EXTRA, ""),
        ("chat/completions", {"stream": True}, (TOKEN, EXTRA, "[DONE]"), EXTRA),
        (
            "chat/completions",
            {"stream": True, "stream_options": {"include_usage": True}},
            (TOKEN, EXTRA, "[DONE]"),
            "",
        ),
        ("completions", {"prompt": "x"}, EXTRA, ""),
        ("completions", {"prompt": "x", "stream": True}, (EXTRA, "[DONE]"), EXTRA),
        ("responses", {"input": "x"}, "{" + NEWER + "}", ""),
        (
            "responses",
            {"input": "x", "stream": True},
            ('{"type":"response.completed","response":{' + NEWER + "}}",),
            "",
        ),
        ("messages", {}, "{%s}" % (APART % 3), ""),
        (
            "messages",
            {"stream": True},
            (
                '{"type":"message_start","message":{%s}}' % (APART % 1),
                '{"type":"message_delta","usage":{"output_tokens":3}}',
                '{"type":"message_stop"}',
            ),
            "",
        ),
        ("images/generations", {"prompt": "x"}, '{"data":[],' + NEWER + "}", ""),
    ],
)
async def test_the_usage_of_an_answer_is_known_on_the_node_that_was_asked(
    upstream: tuple[Served, RawServer, Behind],
    path: str,
    fields: dict[str, Any],
    answer: str | tuple[str, ...],
    kept: str,
) -> None:
    served, _, behind = upstream
    ends = Ends()
    served.front.router.observers.add(ends)
    if isinstance(answer, str):
        content = answer.encode()
        behind.answer = answer_with(reply(content, "200 OK", "application/json"))
    else:
        content = events(*answer)
        behind.answer = answer_with(CHUNKED, *map(chunk, (content[:40], content[40:])), b"0\r\n\r\n")
    response = await served.post(f"/v1/{path}", json={"model": "m", "messages": []} | fields)
    assert response.content == content.replace(events(kept), b"") if kept else response.content == content
    await until(lambda: ends.usages != [])
    assert ends.usages == [Usage(7, 3, 6)]


async def test_usage_that_the_server_does_not_report_is_unknown(
    upstream: tuple[Served, RawServer, Behind],
) -> None:
    served, _, behind = upstream
    ends = Ends()
    served.front.router.observers.add(ends)
    behind.answer = answer_with(CHUNKED, chunk(events(TOKEN, "[DONE]")), b"0\r\n\r\n")
    await served.stream(chat("m", stream=True))
    await until(lambda: ends.usages != [])
    assert ends.usages == [None]


# What the server says is what the client hears


@pytest.mark.parametrize(
    "status", ["400 Bad Request", "422 Odd", "429 Too Many Requests", "500 Oops", "503 Busy"]
)
async def test_an_error_of_the_server_is_passed_on_and_not_held_against_it(
    upstream: tuple[Served, RawServer, Behind], status: str
) -> None:
    served, raw, behind = upstream
    behind.answer = answer_with(
        reply(ENVELOPE, status, "application/json", "Retry-After: 7", "Set-Cookie: a=b")
    )
    for _ in range(5):
        response = await served.post(json=chat("m", stream=True))
        assert response.status_code == int(status[:3])
        assert response.content == ENVELOPE
        assert response.headers["retry-after"] == "7"
        assert "set-cookie" not in response.headers
    assert len(posts(raw)) == 5
    behind.answer = answer_with(reply(b"{}"))
    assert (await served.post(json=chat("m"))).status_code == 200


async def test_a_server_that_refuses_an_upload_early_is_heard(
    upstream: tuple[Served, RawServer, Behind],
) -> None:
    served, _, behind = upstream

    async def script(visit: Visit) -> None:
        await visit.head()
        await visit.send(reply(ENVELOPE, "413 Content Too Large"))
        await visit.closed(5)

    behind.answer = script
    body = FORM.replace(b"\x00", b"\x00" * 2_000_000)
    headers = {"content-type": FORM_TYPE}
    response = await served.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert (response.status_code, response.content) == (413, ENVELOPE)


# Ends


HALF_AN_EVENT = b'data: {"choices":[{"ind'


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + chunk(STREAM[2]),
        CHUNKED + chunk(STREAM[2] + HALF_AN_EVENT),
        CHUNKED + b"fff\r\n" + STREAM[2],
        EVENTS + b"Content-Length: 5000\r\n\r\n" + STREAM[2],
        EVENTS + b"\r\n" + STREAM[2],
        CHUNKED + chunk(STREAM[2] + events(EXTRA)),
    ],
    ids=["between chunks", "inside an event", "inside a chunk", "short", "close-delimited", "before [DONE]"],
)
async def test_a_stream_that_breaks_off_is_an_error_event_and_a_proper_end(
    upstream: tuple[Served, RawServer, Behind], answer: bytes
) -> None:
    served, _, behind = upstream
    behind.answer = answer_with(answer, close=True)
    stream = await served.stream(chat("m", stream=True))
    assert stream.whole
    report = stream.report
    assert report.ending == "failed"
    assert report.error is not None
    assert report.error["code"] == "upstream_lost"
    assert len(report.events) == 1


BLOCK = b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n'
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
OVERLOADED = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"x"}}\n\n'
TEXT = (
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":3}\n\n'
)
COMPLETED = (
    b'event: response.completed\ndata: {"type":"response.completed","sequence_number":4,"response":'
    b'{"output":["%s"]}}\n\n' % (b"x" * 100_000)
)


@pytest.mark.parametrize(
    ("path", "sent", "added"),
    [
        ("/v1/messages", BLOCK, b'event: error\ndata: {"type":"error","error":{"type":"api_error",'),
        ("/v1/messages", BLOCK + STOP, None),
        ("/v1/messages", BLOCK + OVERLOADED, None),
        (
            "/v1/responses",
            TEXT,
            b'event: response.failed\ndata: {"type":"response.failed","sequence_number":4,',
        ),
        ("/v1/responses", TEXT + COMPLETED, None),
    ],
    ids=["message", "whole message", "failed message", "response", "whole response"],
)
@pytest.mark.parametrize("framing", [b"", b"Transfer-Encoding: chunked\r\n"], ids=["close", "chunks"])
async def test_a_stream_of_another_api_that_breaks_off_fails_in_its_own_grammar(
    upstream: tuple[Served, RawServer, Behind],
    framing: bytes,
    path: str,
    sent: bytes,
    added: bytes | None,
) -> None:
    served, _, behind = upstream
    body = chunk(sent) if framing else sent
    behind.answer = answer_with(EVENTS + framing + b"\r\n" + body, close=True)
    stream = await served.stream({"model": "m", "input": "x", "stream": True}, path)
    assert stream.whole
    assert stream.body.startswith(sent)
    rest = stream.body.removeprefix(sent)
    assert rest.startswith(added) and rest.count(b"event: ") == 1 if added else not rest


async def test_a_plain_answer_that_breaks_off_is_a_502(upstream: tuple[Served, RawServer, Behind]) -> None:
    served, raw, behind = upstream
    for answer in (b"", b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"):
        behind.answer = answer_with(answer, close=True)
        response = await served.post(json=chat("m"))
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_lost"
        assert str(raw.port) not in response.text


@pytest.mark.parametrize("begun", [True, False])
async def test_a_server_that_freezes_is_a_deadline(begun: bool) -> None:
    closed = trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        if begun:
            await visit.send(CHUNKED + chunk(STREAM[2]))
        await visit.closed(5)
        closed.set()

    async with open_upstream("forwarded", default_timeout=0.5) as (served, _, behind):
        behind.answer = script
        stream = await served.stream(chat("m", stream=True))
        with patience.fail_after(1):
            await closed.wait()
        if begun:
            assert stream.whole
            assert stream.report.error is not None
            assert stream.report.error["code"] == "timeout"
        else:
            assert stream.status == 504


@pytest.mark.parametrize("begun", [True, False])
async def test_a_client_that_leaves_closes_the_servers_connection(
    upstream: tuple[Served, RawServer, Behind], begun: bool
) -> None:
    served, _, behind = upstream
    asked, closed = trio.Event(), trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        if begun:
            await visit.send(CHUNKED + chunk(STREAM[2]))
        asked.set()
        await visit.closed(5)
        closed.set()

    behind.answer = script
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(served.stream, chat("m", stream=True)))
        with trio.fail_after(5):
            await asked.wait()
        nursery.cancel_scope.cancel()
    with patience.fail_after(0.5):
        await closed.wait()


async def test_models_leave_the_master_and_come_back(caplog: pytest.LogCaptureFixture) -> None:
    async with open_upstream("forwarded", ",poll=0.1") as (served, _, behind):

        async def listed() -> list[str]:
            async with served.http() as client:
                return [entry["id"] for entry in (await client.get("/v1/models")).json()["data"]]

        async def become(*names: str) -> None:
            async def are() -> bool:
                return await listed() == list(names)

            await until(are, 5)

        await become("m")
        behind.listing = reply(b"", "503 Loading")
        await become()
        response = await served.post(json=chat("m"))
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_unavailable")
        behind.listing = reply(b'{"data":[{"id":"m"},{"id":"n"}]}')
        await become("m", "n")
        behind.answer = answer_with(reply(b"{}"))
        assert (await served.post(json=chat("n"))).status_code == 200


async def test_a_server_that_is_gone_is_noticed_by_the_call_that_finds_out() -> None:
    async with open_upstream("forwarded", ",poll=3600") as (served, raw, _):
        raw.stop()
        response = await served.post(json=chat("m"))
        assert response.status_code == 502
        await until(lambda: served.front.list_models() == [], 2)


# Real processes


UPSTREAM = """\
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def do_GET(self):
        self.answer(b'{"data":[{"id":"m"}]}')

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not asked.get("stream"):
            return self.answer(b'{"choices":[]}')
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number in range(1000):
                event = b'data: {"choices":[{"index":0,"delta":{"content":"%d "}}]}\\n\\n' % number
                self.wfile.write(b"%x\\r\\n%b\\r\\n" % (len(event), event))
                time.sleep(0.02)
        except OSError:
            print("client left", flush=True)

server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
"""


class UpstreamProcess:
    """A real server in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self._program = directory / "upstream.py"
        self._program.write_text(UPSTREAM)
        self.port = 0
        self.process: trio.Process

    async def start(self) -> None:
        command = [sys.executable, str(self._program), str(self.port)]
        self.process = await trio.lowlevel.open_process(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        with trio.fail_after(10):
            self.port = int(await self.process.stdout.receive_some(100))

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        assert self.process.stdout is not None
        await self.process.stdout.aclose()


@pytest.mark.processes
async def test_a_server_that_is_killed_fails_its_streams_and_is_back_when_it_is_back(
    nodes: Nodes, nursery: trio.Nursery, tmp_path: Path
) -> None:
    upstream = UpstreamProcess(tmp_path)
    await upstream.start()
    try:
        master = await nodes.master()
        serve = f"openai:http://127.0.0.1:{upstream.port}/v1,poll=0.2"
        worker = await nodes.worker(master, "w", "--serve", serve, models="")
        stream: Stream = await nursery.start(Stream().read, master.url, chat("m", stream=True))
        upstream.process.send_signal(signal.SIGKILL)
        failed = await stream.end(within=1)
        assert failed.whole
        assert failed.report.ending == "failed"
        assert failed.report.error is not None
        assert failed.report.error["code"] == "upstream_lost"
        await worker.log("no models from")
        await upstream.end()

        async def status_of_a_request() -> int:
            async with httpx.AsyncClient(base_url=master.url, trust_env=False, verify=False) as client:
                return (await client.post("/v1/chat/completions", json=chat("m"))).status_code

        assert await status_of_a_request() == 503
        await upstream.start()

        async def answers() -> bool:
            return await status_of_a_request() == 200

        await until(answers, 5)
        # Said once, and not each time it was asked: first perhaps that it broke off, and then that nobody listens.
        said = [entry["message"] for entry in worker.logged("no models from")]
        assert 1 <= len(said) == len(set(said)) <= 2, said
    finally:
        with trio.CancelScope(shield=True):
            await upstream.end()
