"""The sockets: who is dropped, how a server ends, and that one connection's trouble stays its own."""

from __future__ import annotations

import functools
import json
import socket
from typing import Any

import patience
import pytest
import trio
from http_node import (
    EVENTS,
    STREAM,
    HttpNode,
    Served,
    Wire,
    listener,
    listening_socket,
    open_http_node,
    raw_request,
)

from trio_cluster.http1 import server
from trio_cluster.http1.connection import Http1Connection
from trio_cluster.http1.lifespan import LifespanError
from trio_cluster.http1.parser import RequestParser
from trio_cluster.http1.server import UNREAD_TIME, serve_http

PATH = "/v1/chat/completions"
STREAM_BODY = json.dumps(STREAM).encode()


async def fill(wire: Wire, node: HttpNode) -> Served:
    """Begin a stream and do not read it, until a write to this client is stuck."""
    await wire.request("POST", PATH, STREAM_BODY)
    served = await node.backend.next()
    served.head(EVENTS)
    with trio.fail_after(5):
        while served.call.body.waiting_bytes < 1 << 18:
            served.data(b"x" * 65536 + b"\n\n")
            for _ in range(20):
                await trio.lowlevel.checkpoint()
    return served


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such limit")
async def test_accepted_connections_have_a_limit_for_unread_bytes_and_no_delay() -> None:
    options: list[tuple[int, int]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        sock = scope["state"]["trio_cluster.connection"]._stream._socket
        options.append(
            (
                sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
                sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            )
        )
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    sock = listening_socket()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_http, app, [listener(sock)])
        async with connect(sock) as wire:
            await wire.send(raw_request("GET", "/"))
            assert (await wire.answer(bodiless=True)).status == 204
        nursery.cancel_scope.cancel()
    assert options == [(int(UNREAD_TIME * 1000), 1)]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such limit")
async def test_a_client_that_stops_reading_is_dropped_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNREAD_TIME", 0.3)
    async with open_http_node(None) as node, node.connect(receive_buffer=4096) as wire:
        served = await fill(wire, node)
        with trio.fail_after(8):
            await served.cancelled.wait()
        assert served.reason == "client left"


async def test_a_client_that_stops_reading_does_not_hold_up_a_cancelled_server() -> None:
    with patience.fail_after(2):
        async with open_http_node(None) as node, node.connect(receive_buffer=4096) as wire:
            served = await fill(wire, node)
    assert served.cancelled.is_set()


async def test_a_client_that_stops_reading_does_not_hold_up_a_graceful_stop_beyond_its_grace() -> None:
    async with open_http_node(None) as node, node.connect(receive_buffer=4096) as wire:
        server = Server(node)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, 0.1)
            async with connect(server.sock, receive_buffer=4096) as other:
                served = await fill(other, node)
                server.stop.set()
                with patience.fail_after(2):
                    await server.ended.wait()
            assert served.cancelled.is_set()
        del wire


class Server:
    """The application of a node, served once more, so that it can be stopped."""

    def __init__(self, node: HttpNode) -> None:
        self.app = node.app
        self.sock = listening_socket()
        self.stop = trio.Event()
        self.ended = trio.Event()

    async def serve(
        self, grace: float, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await serve_http(
            self.app,
            [listener(self.sock)],
            shutdown_trigger=self.stop.wait,
            grace=grace,
            task_status=task_status,
        )
        self.ended.set()


def connect(sock: socket.socket, **options: Any) -> Any:
    return HttpNode(None, sock.getsockname()[1], None, None).connect(**options)


async def test_a_graceful_stop_lets_requests_finish_and_takes_no_new_connections() -> None:
    async with open_http_node(None) as node, trio.open_nursery() as nursery:
        server = Server(node)
        address = server.sock.getsockname()
        await nursery.start(server.serve, 5.0)
        async with connect(server.sock) as wire, connect(server.sock) as idle, connect(server.sock) as mute:
            await idle.request("GET", "/health")
            assert (await idle.answer()).status == 200
            await wire.request("POST", PATH, STREAM_BODY)
            served = await node.backend.next()
            served.head(EVENTS).event("one")
            await wire.head()
            server.stop.set()
            # Idle connections do not wait for the grace.
            assert await idle.closed()
            assert await mute.closed()
            with pytest.raises(OSError, match="failed"):
                await trio.open_tcp_stream(*address)
            served.event("two").done()
            while chunk := await wire.chunk():
                pass
            assert chunk == b""
            with patience.fail_after(2):
                await server.ended.wait()
    assert not served.cancelled.is_set()


async def test_what_does_not_finish_in_its_grace_is_cancelled_and_cut() -> None:
    async with open_http_node(None) as node, trio.open_nursery() as nursery:
        server = Server(node)
        await nursery.start(server.serve, 0.05)
        async with connect(server.sock) as wire:
            await wire.request("POST", PATH, STREAM_BODY)
            served = await node.backend.next()
            served.head(EVENTS).event("one")
            await wire.head()
            server.stop.set()
            with patience.fail_after(2):
                await server.ended.wait()
            await served.wait_cancelled()
            while chunk := await wire.chunk():
                pass
            assert chunk is None


async def test_an_infinite_grace_waits_for_as_long_as_it_takes() -> None:
    async with open_http_node(None) as node, trio.open_nursery() as nursery:
        server = Server(node)
        await nursery.start(server.serve, float("inf"))
        async with connect(server.sock) as wire:
            await wire.request("POST", PATH, STREAM_BODY)
            served = await node.backend.next()
            server.stop.set()
            served.head(EVENTS).event("one").done()
            assert b"one" in (await wire.answer()).body
        with patience.fail_after(2):
            await server.ended.wait()


async def test_a_connection_that_fails_ends_no_other_one(
    node: HttpNode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Http1Connection.serve

    async def fail_once(self: Http1Connection) -> None:
        monkeypatch.setattr(Http1Connection, "serve", serve)
        self.close()
        raise RuntimeError("a bug")

    async with node.connect() as other:
        await other.request("GET", "/health")
        assert (await other.answer()).status == 200
        monkeypatch.setattr(Http1Connection, "serve", fail_once)
        async with node.connect() as wire:
            assert await wire.closed()
        await other.request("GET", "/health")
        assert (await other.answer()).status == 200
    assert [record.message for record in caplog.records] == ["a connection failed"]


async def test_what_cannot_be_taken_in_ends_its_own_connection_only(
    node: HttpNode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = RequestParser.feed

    def fail_once(self: RequestParser, data: bytes) -> None:
        monkeypatch.setattr(RequestParser, "feed", feed)
        raise RuntimeError("a bug")

    async with node.connect() as other, node.connect() as wire:
        for each in (other, wire):
            await each.request("GET", "/health")
            assert (await each.answer()).status == 200
        monkeypatch.setattr(RequestParser, "feed", fail_once)
        await wire.request("GET", "/health")
        assert await wire.closed()
        await other.request("GET", "/health")
        assert (await other.answer()).status == 200
    (record,) = caplog.records
    assert record.message == "a connection failed"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "a bug"


async def test_the_applications_lifespan_functions_run() -> None:
    async with open_http_node() as node, trio.open_nursery() as nursery:
        ran: list[str] = []

        @node.app.before_serving
        async def before() -> None:
            ran.append("before")

        @node.app.after_serving
        async def after() -> None:
            ran.append("after")

        server = Server(node)
        await nursery.start(server.serve, 1.0)
        assert ran == ["before"]
        server.stop.set()
        with patience.fail_after(2):
            await server.ended.wait()
        assert ran == ["before", "after"]


async def test_an_application_that_cannot_begin_is_an_error_and_closes_the_sockets() -> None:
    async with open_http_node() as node:

        @node.app.before_serving
        async def before() -> None:
            raise RuntimeError("no disk")

        sock, served = listening_socket(), False
        with pytest.RaisesGroup(pytest.RaisesExc(LifespanError, match="no disk"), flatten_subgroups=True):
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_http, node.app, [listener(sock)])
                served = True
        assert sock.fileno() == -1
        assert not served


async def test_what_is_not_a_request_is_refused_in_plain_text_unless_the_application_has_a_form_for_it() -> (
    None
):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise NotImplementedError

    sock = listening_socket()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_http, app, [listener(sock)])
        async with connect(sock) as wire:
            await wire.send(b"BREW / HTTP/1.1\r\n\r\n")
            answer = await wire.answer()
            assert (answer.status, answer.headers["connection"]) == (501, "close")
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
            assert answer.body == b"The method of this request is not known here\n"
            assert await wire.closed()
        nursery.cancel_scope.cancel()


async def test_every_socket_is_served_and_all_are_closed_in_the_end() -> None:
    async with open_http_node() as node:
        sockets = [listening_socket(), listening_socket()]
        async with trio.open_nursery() as nursery:
            await nursery.start(functools.partial(serve_http, node.app, list(map(listener, sockets))))
            for sock in sockets:
                async with connect(sock) as wire:
                    await wire.request("GET", "/health")
                    assert (await wire.answer()).status == 200
            nursery.cancel_scope.cancel()
        assert [sock.fileno() for sock in sockets] == [-1, -1]
