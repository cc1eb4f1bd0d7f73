"""The law of lifetimes, and what a server owes besides, where hypercorn serves: over HTTP/1.1 and HTTP/2."""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol

import patience
import pytest
import trio
from http2_client import Http2Answer, Http2Client, connect_http2
from http_node import (
    CHAT,
    EVENTS,
    PLAIN,
    STREAM,
    HttpNode,
    Served,
    Wire,
    listener,
    listening_socket,
    open_http_node,
    plain,
    raw_request,
)

from trio_cluster import ChatRequest, ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.errors import WorkerLost
from trio_cluster.hypercorn_server import http2, server
from trio_cluster.hypercorn_server.server import serve_http
from trio_cluster.net.connections import Retirement

PATH = "/v1/chat/completions"
INTERNAL_ERROR, NO_ERROR = 2, 0


class Asked(Protocol):
    """A request that was sent, whatever version of HTTP it was sent in."""

    async def until(self, mark: bytes) -> None:
        """Receive its answer up to a mark."""

    async def over(self) -> tuple[bytes, bool]:
        """Receive the rest; return the body, and whether it ended as HTTP says that an answer ends."""

    async def leave(self, how: str) -> None:
        """Let the client leave."""


class Http1Asked:
    """A request on a connection of its own."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.begun = False
        self.body = b""

    async def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            assert (await self.wire.head())[0] == 200

    async def until(self, mark: bytes) -> None:
        await self._begin()
        while mark not in self.body:
            chunk = await self.wire.chunk()
            assert chunk
            self.body += chunk

    async def over(self) -> tuple[bytes, bool]:
        await self._begin()
        while chunk := await self.wire.chunk():
            self.body += chunk
        return self.body, chunk is not None

    async def leave(self, how: str) -> None:
        stream = self.wire.stream
        if how == "reset":
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "half":
            await stream.send_eof()
        else:
            stream.socket.close()


class Http2Asked:
    """A request on a stream."""

    def __init__(self, client: Http2Client, number: int) -> None:
        self.client = client
        self.number = number

    async def until(self, mark: bytes) -> None:
        await self.client.until(self.number, mark)

    async def over(self) -> tuple[bytes, bool]:
        answer = await self.client.answer(self.number)
        if not answer.ended and not self.client.closed:
            assert answer.reset == INTERNAL_ERROR
        return answer.body, answer.ended

    async def leave(self, how: str) -> None:
        if how == "stream":
            await self.client.reset(self.number)
            return
        await Http1Asked(Wire(self.client.stream)).leave(how)


@asynccontextmanager
async def ask_http1(port: int, value: Any, *, slow: bool = False) -> AsyncIterator[Http1Asked]:
    node = HttpNode(None, port, None, None)  # type: ignore[arg-type]
    async with node.connect(receive_buffer=4096 if slow else None) as wire:
        await wire.request("POST", PATH, json.dumps(value).encode())
        yield Http1Asked(wire)


@asynccontextmanager
async def ask_http2(port: int, value: Any, *, slow: bool = False) -> AsyncIterator[Http2Asked]:
    async with connect_http2(port) as client:
        client.grants = not slow
        yield Http2Asked(client, await client.post(value))


VERSIONS: dict[str, Callable[..., Any]] = {"1.1": ask_http1, "2": ask_http2}


@pytest.fixture(params=list(VERSIONS))
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return VERSIONS[request.param]


@pytest.fixture
async def node() -> AsyncIterator[HttpNode]:
    """A node whose calls wait for the test."""
    async with open_http_node(None, http="hypercorn") as opened:
        yield opened
    assert not opened.router.live, "a call has outlived its request"


async def begin(node: HttpNode, asked: Asked) -> Served:
    """Let an answer begin."""
    served = await node.backend.next()
    served.head(EVENTS).event("one")
    await asked.until(b"one")
    return served


async def fill(node: HttpNode) -> Served:
    """Answer with a stream until its client holds it back; fail if it does not."""
    served = await node.backend.next()
    served.head(EVENTS)
    given = 0
    with trio.fail_after(10):
        while served.call.body.waiting_bytes < 1 << 18:
            served.data(b"x" * 65536 + b"\n\n")
            given += 1
            assert given < 500, "nothing holds the handler back"
            for _ in range(20):
                await trio.lowlevel.checkpoint()
    return served


# The law of lifetimes

LEAVES = [
    *(("1.1", how) for how in ("close", "reset", "half")),
    *(("2", how) for how in ("stream", "close", "reset", "half")),
]


@pytest.mark.parametrize(("version", "how"), LEAVES)
async def test_a_client_that_leaves_before_the_first_byte_cancels_its_handler(
    node: HttpNode, version: str, how: str
) -> None:
    async with VERSIONS[version](node.port, STREAM) as asked:
        served = await node.backend.next()
        await asked.leave(how)
        assert await served.wait_cancelled() == "client left"


@pytest.mark.parametrize(("version", "how"), LEAVES)
async def test_a_client_that_leaves_in_the_middle_cancels_its_handler(
    node: HttpNode, version: str, how: str
) -> None:
    async with VERSIONS[version](node.port, STREAM) as asked:
        served = await begin(node, asked)
        await asked.leave(how)
        assert await served.wait_cancelled() == "client left"


@pytest.mark.parametrize(("version", "how"), LEAVES)
async def test_a_client_that_leaves_without_having_read_cancels_its_handler(
    node: HttpNode, version: str, how: str
) -> None:
    async with VERSIONS[version](node.port, STREAM, slow=True) as asked:
        served = await fill(node)
        await asked.leave(how)
        assert await served.wait_cancelled() == "client left"


async def test_a_client_that_leaves_before_a_plain_answer_cancels_its_handler(
    node: HttpNode, ask: Callable[..., Any]
) -> None:
    async with ask(node.port, CHAT) as asked:
        served = await node.backend.next()
        await asked.leave("close")
        assert await served.wait_cancelled() == "client left"


async def test_a_client_that_sent_a_stray_byte_is_found_gone_at_once(node: HttpNode) -> None:
    # It looks like the beginning of a second request, and hypercorn does not read until its turn.
    async with ask_http1(node.port, STREAM) as asked:
        served = await begin(node, asked)
        await asked.wire.send(b"\r\n")
        await asked.leave("close")
        assert await served.wait_cancelled() == "client left"


@pytest.mark.parametrize("stream_failure", ["end", "abort"])
async def test_a_worker_that_is_lost_in_the_middle_is_told_and_the_answer_does_not_look_finished(
    node: HttpNode, ask: Callable[..., Any], stream_failure: Any
) -> None:
    node.node_context.options.server.stream_failure = stream_failure
    async with ask(node.port, STREAM) as asked:
        served = await begin(node, asked)
        served.fail(WorkerLost("w1", "the connection broke"))
        body, ended = await asked.over()
    assert b'"worker_lost"' in body
    assert b"[DONE]" not in body
    assert ended == (stream_failure == "end")


async def test_an_answer_that_is_broken_off_leaves_the_others_of_its_connection_alone(node: HttpNode) -> None:
    node.node_context.options.server.stream_failure = "abort"
    async with connect_http2(node.port) as client:
        broken = Http2Asked(client, await client.post(STREAM))
        first = await begin(node, broken)
        whole = Http2Asked(client, await client.post(STREAM))
        second = await begin(node, whole)
        first.fail(WorkerLost("w1", "the connection broke"))
        assert (await broken.over())[1] is False
        second.event("two").done()
        body, ended = await whole.over()
        assert b"two" in body
        assert ended
        # And the connection is as good as before.
        node.backend.script = plain
        assert (await client.answer(await client.post(CHAT))).body == PLAIN


async def test_an_answer_that_is_finished_looks_so(node: HttpNode, ask: Callable[..., Any]) -> None:
    async with ask(node.port, STREAM) as asked:
        (await begin(node, asked)).event("two").done()
        body, ended = await asked.over()
    assert b"two" in body
    assert ended


async def test_a_client_that_does_not_read_holds_its_handler_back_and_gets_all_when_it_does(
    node: HttpNode, ask: Callable[..., Any]
) -> None:
    async with ask(node.port, STREAM, slow=True) as asked:
        served = await fill(node)
        given = served.taken + served.call.body.waiting_bytes
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert served.taken + served.call.body.waiting_bytes == given
        served.done()
        if isinstance(asked, Http2Asked):
            client = asked.client
            client.grants = True
            for number in (0, asked.number):
                client.protocol.increment_flow_control_window(1 << 24, number or None)
            await client.send()
        body, ended = await asked.over()
    assert len(body) == given
    assert ended


async def test_a_client_that_does_not_read_one_answer_gets_the_others_on_its_connection(
    node: HttpNode,
) -> None:
    async with connect_http2(node.port, window=1000) as client:
        client.grants = False
        await client.post(STREAM)
        held = await fill(node)
        node.backend.script = plain
        number = await client.post(CHAT)
        assert (await client.answer(number)).body == PLAIN
        assert not held.cancelled.is_set()


async def test_a_client_that_takes_nothing_is_dropped_after_a_while(
    node: HttpNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Over HTTP/1.1 the kernel does that, see tests/http1; it knows nothing of the flow control of HTTP/2.
    monkeypatch.setattr(http2, "UNREAD_TIME", 0.3)
    async with connect_http2(node.port, window=1000) as client:
        client.grants = False
        number = await client.post(STREAM)
        served = await fill(node)
        assert await served.wait_cancelled() == "client left"
        answer = await client.answer(number)
        assert (answer.ended, answer.reset) == (False, INTERNAL_ERROR)
        node.backend.script = plain
        assert (await client.answer(await client.post(CHAT))).body == PLAIN


async def test_a_client_that_takes_a_little_now_and_then_is_not_dropped(
    node: HttpNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "UNREAD_TIME", 0.5)
    async with connect_http2(node.port, window=1000) as client:
        client.grants = False
        number = await client.post(STREAM)
        served = await fill(node)
        for _ in range(6):
            await trio.sleep(0.2)
            client.protocol.increment_flow_control_window(1000, number)
            await client.send()
        assert not served.cancelled.is_set()


# Uploads and refusals


async def test_a_refusal_of_a_request_whose_body_is_still_coming_is_received_and_harms_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trio_cluster.gateway.cycle.DRAIN_TIME", 0.05)
    monkeypatch.setattr("trio_cluster.gateway.cycle.LINGER_TIME", 0.05)
    async with open_http_node(http="hypercorn", api_key="right") as node, connect_http2(node.port) as client:
        upload = await client.ask("POST", PATH, b"x" * 10_000, ends=False, authorization="Bearer wrong")
        answer = await client.answer(upload)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        # The answer is whole, and then the client is told to stop sending.
        while answer.reset is None:
            await client.receive()
        assert (answer.ended, answer.reset) == (True, NO_ERROR)
        other = await client.answer(await client.post(CHAT, authorization="Bearer right"))
        assert (other.status, other.body) == (200, PLAIN)


async def test_what_still_comes_for_a_request_that_was_refused_is_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trio_cluster.gateway.cycle.DRAIN_TIME", 0.05)
    monkeypatch.setattr("trio_cluster.gateway.cycle.LINGER_TIME", 0.05)
    async with open_http_node(http="hypercorn", api_key="right") as node, connect_http2(node.port) as client:
        upload = await client.ask("POST", PATH, b"x" * 10_000, ends=False, authorization="Bearer wrong")
        await trio.sleep(0.3)
        # It was on its way when the stream was reset.
        client.protocol.send_data(upload, b"y" * 10_000)
        await client.send()
        assert (await client.answer(upload)).status == 401
        assert (await client.answer(await client.post(CHAT, authorization="Bearer right"))).status == 200
    assert {record.getMessage() for record in caplog.records} == {
        "a request was refused: The API key is not valid"
    }


async def test_an_upload_that_does_not_say_how_long_it_is_streams_to_its_model() -> None:
    form = (
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nhears\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%b\r\n--x--\r\n'
    ) % bytes(3_000_000)
    taken = b""

    async def take(served: Served) -> None:
        nonlocal taken
        upload = served.request.upload
        assert upload is not None
        assert upload.size == -1
        while len(taken) < len(form):
            while not upload.pieces:
                await upload.reader.park()
            data = upload.receive_nowait()
            upload.consumed(len(data))
            taken += data
        served.head().data(b'{"text": "x"}').done()

    async with open_http_node(None, http="hypercorn") as node, connect_http2(node.port) as client:
        node.add("hears", "asr")
        path, kind = "/v1/audio/transcriptions", "multipart/form-data; boundary=x"
        number = await client.ask("POST", path, form[:10_000], ends=False, content_type=kind)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.upload, number, form[10_000:])
            nursery.start_soon(take, await node.backend.next())
        answer = await client.answer(number)
    assert (answer.status, answer.body) == (200, b'{"text": "x"}')
    assert taken == form


async def test_a_client_may_upgrade_to_http2() -> None:
    async with open_http_node(http="hypercorn") as node, connect_http2(node.port, upgrade=True) as client:
        settings = client.protocol.initiate_upgrade_connection()
        assert settings is not None
        upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
        head = raw_request("GET", "/health", None, *upgrade, f"HTTP2-Settings: {settings.decode()}")
        await client.stream.send_all(head)
        received = b""
        while b"\r\n\r\n" not in received:
            received += await client.stream.receive_some(1)
        assert received.startswith(b"HTTP/1.1 101")
        client.answers[1] = Http2Answer()
        await client.send()
        assert (await client.answer(1)).status == 200
        assert (await client.answer(await client.post(CHAT))).body == PLAIN


async def test_a_large_body_is_not_read_faster_than_it_is_taken() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        await taking.wait()
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    taking, sock = trio.Event(), listening_socket()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_http, app, [listener(sock)])
        async with HttpNode(None, sock.getsockname()[1], None, None).connect() as wire:  # type: ignore[arg-type]
            with trio.move_on_after(0.3) as sending:
                await wire.request("POST", "/", bytes(50_000_000))
            assert sending.cancelled_caught
        nursery.cancel_scope.cancel()


# What a server owes besides


async def test_an_answer_is_the_same_over_both_versions(ask: Callable[..., Any]) -> None:
    async with open_http_node(http="hypercorn") as node:
        async with connect_http2(node.port) as client:
            answer = await client.answer(await client.post(CHAT, x_request_id="mine"))
        assert (answer.status, answer.body) == (200, PLAIN)
        over1 = await node.post(headers={"x-request-id": "mine"})
        assert over1.content == PLAIN
        varying = {":status", "date", "openai-processing-ms"}
        assert {k: v for k, v in answer.headers.items() if k not in varying} == {
            k: v for k, v in over1.headers.items() if k not in varying
        }
        assert "server" not in over1.headers


async def test_routes_of_the_framework_are_served_too() -> None:
    async with open_http_node(http="hypercorn") as node, connect_http2(node.port) as client:
        for _ in range(3):
            answer = await client.answer(await client.ask("GET", "/health"))
            assert (answer.status, json.loads(answer.body)["status"]) == (200, "ok")
        missing = await client.answer(await client.ask("GET", "/nowhere"))
        assert (missing.status, missing.error["type"]) == (404, "invalid_request_error")


async def test_http2_is_refused_unless_the_options_allow_it() -> None:
    async with open_http_node(http="hypercorn") as node:
        node.node_context.options.server.http = "lean"
        async with connect_http2(node.port) as client:
            answer = await client.answer(await client.post(CHAT))
    assert (answer.status, answer.ended) == (505, True)


async def test_an_idle_connection_is_closed_after_an_answer_from_the_framework(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE", 0.2)
    async with open_http_node(http="hypercorn") as node, node.connect() as wire:
        await wire.request("GET", "/health")
        assert (await wire.answer()).status == 200
        assert await wire.closed()


async def test_requests_on_one_connection_are_not_counted(ask: Callable[..., Any]) -> None:
    async with open_http_node(http="hypercorn") as node:
        if ask is ask_http2:
            async with connect_http2(node.port) as client:
                for _ in range(1100):
                    assert (await client.answer(await client.ask("GET", "/x", x="y"))).status == 404
            return
        async with node.connect() as wire:
            for _ in range(1100):
                await wire.request("GET", "/x")
                assert (await wire.answer()).status == 404


async def test_a_websocket_is_refused() -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    async with open_http_node(http="hypercorn") as node, node.connect() as wire:
        await wire.request("GET", "/v1/models", None, *upgrade, "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==")
        assert (await wire.answer()).status == 404


async def test_an_application_that_fails_is_logged_and_its_answer_does_not_look_finished(
    ask: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ZeroDivisionError

    sock = listening_socket()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_http, app, [listener(sock)])
        async with ask(sock.getsockname()[1], CHAT) as asked:
            assert await asked.over() == (b"half", False)
        nursery.cancel_scope.cancel()
    assert any(record.exc_info and "ZeroDivision" in str(record.exc_info) for record in caplog.records)


async def test_headers_of_a_connection_are_left_out_where_http2_forbids_them() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        headers = [(b"Connection", b"close"), (b"Keep-Alive", b"timeout=5"), (b"X-Mine", b"kept")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x"})

    sock = listening_socket()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_http, app, [listener(sock)])
        async with connect_http2(sock.getsockname()[1]) as client:
            answer = await client.answer(await client.ask("GET", "/"))
        assert answer.headers.keys() == {":status", "x-mine", "date"}
        assert answer.ended
        nursery.cancel_scope.cancel()


async def test_what_is_over_is_forgotten_whatever_way_it_ended(
    node: HttpNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocols: set[Any] = set()
    make = http2.Http2Stream.__init__

    def note(self: http2.Http2Stream, *args: Any) -> None:
        make(self, *args)
        protocols.add(self._protocol)

    monkeypatch.setattr(http2.Http2Stream, "__init__", note)
    async with connect_http2(node.port, window=1000) as client:
        for end in ("done", "failed", "reset", "reset while held back"):
            client.grants = end != "reset while held back"
            asked = Http2Asked(client, await client.post(STREAM))
            if not client.grants:
                await fill(node)
                await asked.leave("stream")
                continue
            served = await begin(node, asked)
            if end == "reset":
                await asked.leave("stream")
                await served.wait_cancelled()
                continue
            served.done() if end == "done" else served.fail(WorkerLost("w1", "the connection broke"))
            await asked.over()
        client.grants = True
        node.backend.script = plain
        await client.answer(await client.post(CHAT))
        (protocol,) = protocols
        with patience.fail_after(2):
            while protocol.stream_buffers or protocol.streams:
                await trio.lowlevel.checkpoint()


async def test_a_send_that_the_application_cancels_does_not_harm_its_connection() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with trio.CancelScope() as scope:
            scope.cancel()
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    sock = listening_socket()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_http, app, [listener(sock)])
        async with connect_http2(sock.getsockname()[1]) as client:
            for _ in range(3):
                assert (await client.answer(await client.ask("GET", "/"))).body == b"onetwo"
        nursery.cancel_scope.cancel()


async def test_a_node_serves_http2_if_its_options_say_so(nursery: trio.Nursery) -> None:
    async def echo(request: ChatRequest) -> AsyncIterator[str]:
        yield request.last_text

    options = ServerOptions(host="127.0.0.1", http="hypercorn")
    cluster_server = ClusterServer(ClusterServerOptions(server=options, drain_timeout=1.0))
    cluster_server.register_chat("m", echo)
    await nursery.start(cluster_server.run_as_master, 0)
    assert cluster_server.port is not None
    async with connect_http2(cluster_server.port) as client:
        plain_answer, stream = [await client.answer(await client.post(body)) for body in (CHAT, STREAM)]
    assert (plain_answer.status, stream.status) == (200, 200)
    assert json.loads(plain_answer.body)["choices"][0]["message"]["content"] == "hi"
    assert stream.body.endswith(b"data: [DONE]\n\n")
    assert stream.ended
    cluster_server.stop()


# How it ends


async def test_a_connection_is_forgotten_when_its_client_has_left(ask: Callable[..., Any]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    def tasks() -> list[str]:
        found, left = [], [trio.lowlevel.current_root_task()]
        while left:
            task = left.pop()
            assert task is not None
            left += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
            found.append(task.name)
        return [name for name in found if "hypercorn" in name]

    sock = listening_socket()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_http, app, [listener(sock)])
        before = tasks()
        for _ in range(3):
            async with ask(sock.getsockname()[1], CHAT) as asked:
                if isinstance(asked, Http2Asked):
                    await asked.over()
                else:
                    await asked.wire.answer()
        # hypercorn itself would wait for as long as a connection may be idle.
        with patience.fail_after(2):
            while tasks() != before:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


class Stoppable:
    """The application of a node, served once more, so that it can be stopped."""

    def __init__(self, node: HttpNode) -> None:
        self.app = node.app
        self.sock = listening_socket()
        self.port: int = self.sock.getsockname()[1]
        self.stop = trio.Event()
        self.retirement = Retirement()
        self.ended = trio.Event()

    async def serve(self, grace: float, *, task_status: trio.TaskStatus[None]) -> None:
        await serve_http(
            self.app,
            [listener(self.sock)],
            shutdown_trigger=self.stop.wait,
            grace=grace,
            retirement=self.retirement,
            task_status=task_status,
        )
        self.ended.set()


async def test_a_graceful_stop_lets_requests_finish_and_takes_no_new_connections(
    node: HttpNode, ask: Callable[..., Any], nursery: trio.Nursery
) -> None:
    stoppable = Stoppable(node)
    await nursery.start(stoppable.serve, math.inf)
    idle = HttpNode(None, stoppable.port, None, None)  # type: ignore[arg-type]
    async with ask(stoppable.port, STREAM) as asked, idle.connect() as idle_wire:
        await idle_wire.request("GET", "/health")
        await idle_wire.answer()
        served = await begin(node, asked)
        stoppable.stop.set()
        assert await idle_wire.closed()
        with pytest.raises(OSError, match="failed"):
            await trio.open_tcp_stream("127.0.0.1", stoppable.port)
        served.event("two").done()
        body, ended = await asked.over()
        assert b"two" in body
        assert ended
        with patience.fail_after(2):
            await stoppable.ended.wait()
    assert not served.cancelled.is_set()


async def test_what_does_not_finish_in_its_grace_is_cancelled_and_cut(
    node: HttpNode, ask: Callable[..., Any], nursery: trio.Nursery
) -> None:
    stoppable = Stoppable(node)
    await nursery.start(stoppable.serve, 0.05)
    async with ask(stoppable.port, STREAM) as asked:
        served = await begin(node, asked)
        stoppable.stop.set()
        with patience.fail_after(2):
            await stoppable.ended.wait()
        await served.wait_cancelled()
        assert not (await asked.over())[1]


async def test_a_connection_that_is_idle_ends_with_the_number_of_its_last_request(
    node: HttpNode, nursery: trio.Nursery
) -> None:
    stoppable = Stoppable(node)
    await nursery.start(stoppable.serve, math.inf)
    async with connect_http2(stoppable.port) as client:
        assert (await client.answer(await client.ask("GET", "/health"))).status == 200
        stoppable.retirement.begun.set()
        while not client.goodbyes:
            await client.receive()
        assert client.goodbyes == [1]
        # Sent before the client knew: not processed, and the connection does not break before the client has read that.
        late = await client.ask("POST", PATH, bytes(60_000))
        assert not (await client.answer(late)).status
        assert client.closed
    assert client.goodbyes == [1]
    await stoppable.retirement.over.wait()


async def test_a_connection_without_any_request_ends_with_its_first_one(
    node: HttpNode, nursery: trio.Nursery
) -> None:
    stoppable = Stoppable(node)
    await nursery.start(stoppable.serve, math.inf)
    async with connect_http2(stoppable.port) as client, connect_http2(stoppable.port) as silent:
        for each in (client, silent):
            # Its settings have come: it is served.
            await each.receive()
        stoppable.retirement.begun.set()
        number = await client.ask("GET", "/health")
        assert (await client.answer(number)).status == 200
        while not client.closed:
            await client.receive()
        assert client.goodbyes == [number]
        stoppable.retirement.idle_time_over.set()
        while not silent.closed:
            await silent.receive()
    await stoppable.retirement.over.wait()


async def test_a_connection_that_is_never_idle_takes_no_more_requests_after_a_while_and_its_streams_go_on(
    node: HttpNode, nursery: trio.Nursery
) -> None:
    stoppable = Stoppable(node)
    await nursery.start(stoppable.serve, math.inf)
    async with connect_http2(stoppable.port) as client:
        asked = [Http2Asked(client, await client.post(STREAM))]
        served = [await begin(node, asked[0])]
        stoppable.retirement.begun.set()
        asked.append(Http2Asked(client, await client.post(STREAM)))
        served.append(await begin(node, asked[1]))
        served[0].event("two").done()
        assert (await asked[0].over())[1]
        assert client.goodbyes == []
        stoppable.retirement.idle_time_over.set()
        while not client.goodbyes:
            await client.receive()
        # Any request that is under way is processed.
        assert client.goodbyes == [2**31 - 1]
        asked.append(Http2Asked(client, await client.post(STREAM)))
        served.append(await begin(node, asked[2]))
        for one, other in zip(served[1:], asked[1:], strict=True):
            one.event("two").done()
            body, ended = await other.over()
            assert b"two" in body
            assert ended
        assert not stoppable.retirement.over.is_set()
        while not client.closed:
            await client.receive()
        assert client.goodbyes == [2**31 - 1, asked[-1].number]
    await stoppable.retirement.over.wait()


async def test_a_request_that_meets_the_end_of_its_connection_is_answered_or_said_to_be_not(
    nursery: trio.Nursery,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    sock, retirement = listening_socket(), Retirement()
    await nursery.start(partial(serve_http, app, [listener(sock)], retirement=retirement))
    kinds: set[bool] = set()

    async def ask_once(pause: int) -> None:
        async with connect_http2(sock.getsockname()[1]) as client:
            assert (await client.answer(await client.ask("GET", "/"))).ended
            ready.append(client)
            await go.wait()
            for _ in range(pause):
                await trio.lowlevel.checkpoint()
            number = await client.ask("POST", "/", b"x")
            answer = await client.answer(number)
            assert answer.ended or client.goodbyes[-1] < number
            kinds.add(answer.ended)

    ready: list[Http2Client] = []
    go = trio.Event()
    async with trio.open_nursery() as clients:
        for i in range(60):
            clients.start_soon(ask_once, i % 20)
        with trio.fail_after(5):
            while len(ready) < 60:
                await trio.lowlevel.checkpoint()
        go.set()
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        retirement.begun.set()
    with trio.fail_after(5):
        await retirement.over.wait()
    assert kinds == {True, False}
    nursery.cancel_scope.cancel()


async def test_a_client_that_does_not_read_holds_up_neither_a_stop_nor_a_cancellation(
    node: HttpNode, ask: Callable[..., Any], nursery: trio.Nursery
) -> None:
    for graceful in (True, False):
        stoppable = Stoppable(node)
        scope = trio.CancelScope()

        async def serve(
            *, task_status: trio.TaskStatus[None], scope: trio.CancelScope = scope, it: Stoppable = stoppable
        ) -> None:
            with scope:
                await it.serve(0.1, task_status=task_status)
            it.ended.set()

        await nursery.start(serve)
        async with ask(stoppable.port, STREAM, slow=True):
            served = await fill(node)
            if graceful:
                stoppable.stop.set()
            else:
                scope.cancel()
            with patience.fail_after(2):
                await stoppable.ended.wait()
            await served.wait_cancelled()


async def test_a_client_that_leaves_while_the_last_bytes_wait_for_it_is_let_go(nursery: trio.Nursery) -> None:
    """A write that the application shields from cancellation ends as well."""
    over = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with trio.CancelScope(shield=True):
            await send({"type": "http.response.body", "body": bytes(10_000_000)})
        over.set()

    sock = listening_socket()
    await nursery.start(serve_http, app, [listener(sock)])
    for how in ("stream", "close"):
        over = trio.Event()
        async with connect_http2(sock.getsockname()[1], window=1000) as client:
            client.grants = False
            asked = Http2Asked(client, await client.ask("GET", "/"))
            await asked.until(b"\0")
            assert not over.is_set()
            await asked.leave(how)
            with patience.fail_after(2):
                await over.wait()
    nursery.cancel_scope.cancel()
