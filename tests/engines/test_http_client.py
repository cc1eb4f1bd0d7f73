"""The HTTP client, with servers that answer right and wrong, and that fail in every way."""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import patience
import pytest
import trio
from hypothesis import given, strategies as st
from raw_server import RawServer, Visit, open_raw_server, reply
from trio.testing import wait_all_tasks_blocked

from trio_cluster.engines._base_url import BaseURL
from trio_cluster.engines._http_client import Body, ConnectFailed, HttpClient, HttpRequest, HttpResponse
from trio_cluster.engines._http_response import (
    FRAMING_LIMIT,
    HttpError,
    IncompleteResponse,
    MalformedResponse,
    ResponseReader,
)

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSE_DELIMITED = b"HTTP/1.1 200 OK\r\n\r\n"


# The parser, without sockets


def read(*pieces: bytes, eof: bool = False) -> tuple[ResponseReader, bytes]:
    reader = ResponseReader()
    body = b""
    for piece in pieces:
        reader.feed(piece)
        body += reader.take()
    if eof:
        reader.feed_eof()
    return reader, body


@pytest.mark.parametrize(
    ("raw", "body", "close_delimited"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc", False),
        (CHUNKED + b"2\r\nab\r\n1;x=y\r\nc\r\n0\r\nTrailer: t\r\n\r\n", b"abc", False),
        (CHUNKED + b"000A ; x\r\n0123456789\r\n0\r\n\r\n", b"0123456789", False),
        (
            CHUNKED + b'A \r\n0123456789\r\n1\t;a = "b" ; c\r\n\r\r\n00 ;\r\nT: t\r\n\r\n',
            b"0123456789\r",
            False,
        ),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", False),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\nX: \r\n\r\n", b"", False),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", b"a", False),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + CHUNKED + b"0\r\n\r\n", b"", False),
        (CLOSE_DELIMITED + b"abc", b"abc", True),
        (b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nabc", b"abc", True),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_response_is_parsed_in_pieces_of_any_size(
    raw: bytes, body: bytes, close_delimited: bool, size: int
) -> None:
    pieces = [raw[start : start + size] for start in range(0, len(raw), size)]
    reader, read_body = read(*pieces, eof=close_delimited)
    assert (reader.complete, reader.close_delimited, read_body) == (True, close_delimited, body)
    assert reader.status in (200, 204)
    assert "link" not in dict(reader.headers)


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=20), st.data())
def test_the_chunks_of_one_feed_come_out_joined_and_unchanged(
    chunks: list[bytes], data: st.DataObject
) -> None:
    raw = CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    cut = data.draw(st.integers(0, len(raw)))
    reader = ResponseReader()
    # All body bytes of one feed are one piece.
    taken = []
    for piece in (raw[:cut], raw[cut:]):
        reader.feed(piece)
        taken.append(reader.take())
        assert reader.take() == b""
    assert b"".join(taken) == b"".join(chunks)
    assert reader.complete
    assert reader.keep_alive


def feed(reader: ResponseReader, raw: bytes, size: int) -> None:
    for start in range(0, len(raw), size):
        reader.feed(raw[start : start + size])


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 000 OK\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 002 OK\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_an_interim_response_has_no_body_and_a_status_from_100(head: bytes, size: int) -> None:
    reader = ResponseReader()
    with pytest.raises(MalformedResponse, match=r"status|interim"):
        feed(reader, head + b"abc" + CLOSE_DELIMITED, size)
    assert reader.take() == b""


def test_an_interim_response_may_say_that_it_has_no_body() -> None:
    reader, body = read(
        b"HTTP/1.1 100 Continue\r\nContent-Length: 0\r\n\r\n" + CHUNKED + b"1\r\na\r\n0\r\n\r\n"
    )
    assert (reader.complete, reader.keep_alive, body) == (True, True, b"a")


@pytest.mark.parametrize("size", [1, 1000])
def test_nothing_is_taken_of_a_body_in_an_unsupported_coding_however_it_arrives(size: int) -> None:
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc"
    reader = ResponseReader()
    with pytest.raises(MalformedResponse, match="transfer coding"):
        feed(reader, raw, size)
    assert reader.take() == b""


@given(st.integers(0, 200))
def test_a_response_that_is_truncated_anywhere_is_incomplete(cut: int) -> None:
    raw = CHUNKED + b"5\r\nhello\r\n5\r\nworld\r\n0\r\n\r\n"
    reader, _ = read(raw[: min(cut, len(raw) - 1)])
    assert not reader.complete
    with pytest.raises(IncompleteResponse):
        reader.feed_eof()


def test_headers_keep_their_order_and_values() -> None:
    reader, _ = read(b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-a: caf\xe9 \r\nContent-Length: 0\r\n\r\n")
    assert reader.headers == [("x-a", "1"), ("x-a", "café"), ("content-length", "0")]


@pytest.mark.parametrize(
    "surplus", [b"x", b"\x00" * 10, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmore", b"HTTP/1.1 500"]
)
@pytest.mark.parametrize("together", [True, False])
def test_bytes_after_a_response_are_dropped_and_prevent_keep_alive(surplus: bytes, together: bool) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    reader, body = read(raw + surplus) if together else read(raw, surplus)
    assert (reader.complete, reader.status, body, reader.keep_alive) == (True, 200, b"abc", False)


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"\x16\x03\x01\x02\x00",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        CHUNKED + b"zz\r\n",
        CHUNKED + b"0x1\r\na\r\n",
        CHUNKED + b" 1\r\na\r\n",
        CHUNKED + b"+1\r\na\r\n",
        CHUNKED + b"1 1\r\na\r\n",
        CHUNKED + b";x\r\n",
        CHUNKED + b"1\na\r\n",
        CHUNKED + b"1;x\ry\r\na\r\n",
        CHUNKED + b"1\r\nab\r\n",
        CHUNKED + b"1\r\na\n0\r\n\r\n",
        CHUNKED + b"%x\r\n" % (1 << 64),
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * FRAMING_LIMIT,
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * (FRAMING_LIMIT // 6),
    ],
)
def test_what_is_not_http_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedResponse) as caught:
        read(raw)
    assert "callback" not in str(caught.value)


def test_framing_without_a_body_has_a_bound() -> None:
    reader, _ = read(CHUNKED, b"1;", *[b"a" * 1000] * 50)
    with pytest.raises(MalformedResponse):
        reader.feed(b"a" * 20_000)


# Base URLs


@pytest.mark.parametrize(
    ("url", "expected", "authority"),
    [
        ("http://127.0.0.1:8000/v1", ("http", "127.0.0.1", 8000, "/v1"), "127.0.0.1:8000"),
        ("http://gpu.lan/v1/", ("http", "gpu.lan", 80, "/v1"), "gpu.lan"),
        ("https://gpu.lan/a%2Fb/v1", ("https", "gpu.lan", 443, "/a%2Fb/v1"), "gpu.lan"),
        ("https://gpu.lan:80", ("https", "gpu.lan", 80, ""), "gpu.lan:80"),
        ("http://[::1]:8000/some/prefix/v1", ("http", "::1", 8000, "/some/prefix/v1"), "[::1]:8000"),
    ],
)
def test_a_base_url_is_parsed(url: str, expected: tuple[str, str, int, str], authority: str) -> None:
    base = BaseURL.parse(url)
    assert (base.scheme, base.host, base.port, base.path) == expected
    assert base.authority == authority
    assert BaseURL.parse(str(base)) == base


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "localhost:8000/v1",
        "ftp://host/v1",
        "http:///v1",
        "http://host:port/v1",
        "http://host:70000/v1",
        "http://host:0/v1",
        "http://user:secret@host/v1",
        "http://host/v1#x",
        "http://host/a b",
        "http://host/\r\nx: y",
        "http://hôte/v1",
        "http://[::1/v1",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        BaseURL.parse(url)
    assert "\n" not in str(caught.value)


# Requests over real sockets


async def send(client: HttpClient, body: Body = b"", **fields: object) -> tuple[HttpResponse, bytes]:
    """Send a request, and receive the whole response."""
    responses: list[HttpResponse] = []
    pieces: list[bytes] = []

    async def take(response: HttpResponse) -> None:
        responses.append(response)
        while piece := await response.receive():
            pieces.append(piece)

    request = HttpRequest("POST", "/x", body=body, **fields)  # type: ignore[arg-type]
    with trio.fail_after(5):
        await client.send(request, take)
    return responses[0], b"".join(pieces)


def client_of(server: RawServer, **options: float) -> HttpClient:
    """Return a client that is closed together with the server."""
    client = HttpClient(BaseURL.parse(server.url), **options)  # type: ignore[arg-type]
    server.at_end.append(client.close)
    return client


async def echo(visit: Visit) -> None:
    while True:
        received = await visit.request()
        await visit.send(reply(received.body))


def pieces_of(*pieces: bytes) -> Callable[[], Awaitable[bytes]]:
    left = [*pieces, b""]

    async def receive() -> bytes:
        await trio.lowlevel.checkpoint()
        return left.pop(0)

    return receive


async def test_a_request_is_sent_as_it_is() -> None:
    async with open_raw_server(echo) as server:
        client = client_of(server)
        request = HttpRequest(
            "POST", "/chat%2Fx", [("x-a", "1"), ("content-type", "text/plain")], b"\x00body"
        )
        assert await client.fetch(request, 100) == (200, b"\x00body")
        client.close()
    (received,) = server.received
    assert received.raw_head == (
        b"POST /v1/chat%%2Fx HTTP/1.1\r\nhost: 127.0.0.1:%d\r\naccept-encoding: identity\r\nx-a: 1\r\n"
        b"content-type: text/plain\r\ncontent-length: 5" % server.port
    )


async def test_a_query_of_the_base_url_is_part_of_every_request_and_is_not_shown() -> None:
    async with open_raw_server(echo) as server:
        client = HttpClient(BaseURL.parse(f"{server.url}/?api-version=2024-06-01&sig=secret"))
        await client.fetch(HttpRequest("POST", "/chat"), 100)
        await client.fetch(HttpRequest("GET", "/models"), 100)
        client.close()
    query = "?api-version=2024-06-01&sig=secret"
    assert [received.target for received in server.received] == [f"/v1/chat{query}", f"/v1/models{query}"]
    assert "secret" not in f"{client.base} {client.base!r}"


@pytest.mark.parametrize(
    ("base", "given", "sent"),
    [
        ("", "", ""),
        ("", "a=1&a=2", "?a=1&a=2"),
        ("?v=1", "", "?v=1"),
        ("?v=1", "a=1", "?v=1&a=1"),
        ("?v=1&w", "a=1&v=2&w=3&%76=4&vv=5", "?v=1&w&a=1&vv=5"),
        ("?v=1", "v=2", "?v=1"),
    ],
)
def test_a_parameter_of_the_base_url_counts_more_than_one_of_a_request(
    base: str, given: str, sent: str
) -> None:
    assert BaseURL.parse(f"http://h/v1{base}").target("/x", given) == "/v1/x" + sent


async def test_a_header_cannot_inject_another_one() -> None:
    async with open_raw_server(echo) as server:
        client = client_of(server)
        with pytest.raises(ValueError, match="line break"):
            await send(client, headers=[("x-a", "1\r\nx-b: 2")])
    assert server.received == []


@pytest.mark.parametrize("size", [0, 1, 64 * 1024, 64 * 1024 + 1, 5_000_000])
async def test_bodies_of_any_size_are_sent_and_received(size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with open_raw_server(echo) as server:
        client = client_of(server)
        for _ in range(2):
            _, echoed = await send(client, body)
            assert echoed == body
        client.close()
    assert len(server.visits) == 1


@pytest.mark.parametrize("size", [-1, 300_000])
async def test_a_streamed_body_is_sent_in_pieces(size: int) -> None:
    pieces = [b"a" * 100_000, b"b" * 50_000, b"c" * 150_000]
    async with open_raw_server(echo) as server:
        _, echoed = await send(client_of(server), pieces_of(*pieces), size=size)
        assert echoed == b"".join(pieces)
    (received,) = server.received
    assert received.headers.get("content-length") == (None if size < 0 else "300000")
    assert received.headers.get("transfer-encoding") == ("chunked" if size < 0 else None)


@pytest.mark.parametrize(("size", "message"), [(3, "fewer"), (1, "more")])
async def test_a_streamed_body_of_another_size_than_declared_is_never_completed(
    size: int, message: str
) -> None:
    async with open_raw_server(echo) as server:
        with pytest.raises(HttpError, match=message):
            await send(client_of(server), pieces_of(b"ab"), size=size)
        await server.visits[0].closed()
    assert server.received[0].body == b""


async def test_an_error_of_the_body_is_the_error_of_the_request() -> None:
    async def failing() -> bytes:
        await trio.lowlevel.checkpoint()
        raise KeyError("no more")

    async with open_raw_server(echo) as server:
        with pytest.raises(KeyError, match="no more"):
            await send(client_of(server), failing)
        await server.visits[0].closed()


async def test_pieces_of_the_response_are_passed_on_as_they_arrive() -> None:
    taken = trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED + b"5\r\nfirst\r\n")
        await taken.wait()
        await visit.send(b"6\r\nsecond\r\n5\r\nthird\r\n", b"0\r\n\r\n")

    pieces = []

    async def take(response: HttpResponse) -> None:
        while piece := await response.receive():
            pieces.append(piece)
            taken.set()

    async with open_raw_server(script) as server:
        with trio.fail_after(5):
            await client_of(server).send(HttpRequest("POST", "/x"), take)
    assert pieces == [b"first", b"secondthird"]


# Idle connections


async def test_a_connection_is_reused() -> None:
    async with open_raw_server(echo) as server:
        client = client_of(server)
        for number in range(3):
            assert (await send(client, b"%d" % number))[1] == b"%d" % number
        client.close()
        await server.visits[0].closed()
    assert len(server.visits) == 1


async def test_a_request_that_ends_after_its_client_was_closed_leaves_no_connection() -> None:
    async with open_raw_server(echo) as server:
        client = client_of(server)

        async def close_first(response: HttpResponse) -> None:
            client.close()
            while await response.receive():
                pass

        await client.send(HttpRequest("POST", "/x", body=b"abc"), close_first)
        await server.visits[0].closed()


async def test_a_streamed_body_gets_a_new_connection() -> None:
    async with open_raw_server(echo) as server:
        client = client_of(server)
        await send(client, b"a")
        await send(client, pieces_of(b"b"))
        assert len(server.visits) == 2


async def test_idle_connections_are_bounded_in_number_and_age() -> None:
    async with open_raw_server(echo) as server:
        client = client_of(server, max_keepalive=2, keepalive_expiry=0.05)
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(send, client, b"a" * 100_000)
        assert len(server.visits) == 4
        assert len(client._idle) == 2
        await trio.sleep(0.06)
        await send(client, b"a")
        assert len(server.visits) == 5
        assert len(client._idle) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\na",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nasurplus",
    ],
)
async def test_a_connection_without_keep_alive_is_closed(answer: bytes) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(answer)
        await visit.closed()

    async with open_raw_server(script) as server:
        client = client_of(server)
        assert (await send(client))[1] == b"a"
        assert (await send(client))[1] == b"a"
        assert len(server.visits) == 2


@pytest.mark.parametrize(
    ("status", "body", "reused"),
    [
        ("200 OK", b"body", True),
        ("404 Not Found", b"body", False),
        ("413 Content Too Large", b"x" * 100_000, False),
        ("500 Oops", b"body", False),
        ("302 Found", b"body", False),
        ("404 Not Found", b"", True),
    ],
)
async def test_a_connection_is_kept_only_if_the_body_of_its_request_was_surely_read(
    status: str, body: bytes, reused: bool
) -> None:
    async def script(visit: Visit) -> None:
        while True:
            await visit.request()
            await visit.send(reply(b"x", status))

    async with open_raw_server(script) as server:
        client = client_of(server)
        for _ in range(2):
            assert (await send(client, body))[1] == b"x"
        assert len(server.visits) == (1 if reused else 2)


async def test_a_server_that_does_not_read_bodies_is_not_sent_another_request_on_that_connection() -> None:
    """It would take the body of the first request for a request."""

    async def script(visit: Visit) -> None:
        while True:
            head = await visit.head()
            await visit.send(reply(head.target.encode(), "404 Not Found"))

    async with open_raw_server(script) as server:
        client = client_of(server)
        smuggled = b"POST /v1/smuggled HTTP/1.1\r\ncontent-length: 0\r\n\r\n"
        for _ in range(2):
            assert (await send(client, smuggled))[1] == b"/v1/x"


async def test_an_idle_connection_that_was_closed_is_not_used() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(reply(b"a"))

    async with open_raw_server(script) as server:
        client = client_of(server)
        await send(client)
        await wait_all_tasks_blocked(0.01)
        await send(client)
    assert len(server.received) == 2


async def test_bytes_on_an_idle_connection_are_not_the_response_to_the_next_request() -> None:
    async def script(visit: Visit) -> None:
        received = await visit.request()
        await visit.send(reply(received.body))
        await visit.send(reply(b"you are too slow", "408 Request Timeout"))
        await visit.closed()

    async with open_raw_server(script) as server:
        client = client_of(server)
        await send(client, b"a")
        await wait_all_tasks_blocked(0.01)
        response, body = await send(client, b"b")
        assert (response.status, body) == (200, b"b")


@pytest.mark.parametrize("size", [10, 1_000_000])
async def test_an_idle_connection_that_fails_during_a_request_is_replaced_once(size: int) -> None:
    async def script(visit: Visit) -> None:
        received = await visit.request()
        await visit.send(reply(received.body))
        await visit.head()

    async with open_raw_server(script) as server:
        client = client_of(server)
        await send(client, b"a")
        assert (await send(client, b"b" * size))[1] == b"b" * size
    assert len(server.visits) == 2


async def test_a_new_connection_that_fails_is_not_replaced() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()

    async with open_raw_server(script) as server:
        with pytest.raises(IncompleteResponse, match="before the response began"):
            await send(client_of(server))
        assert len(server.visits) == 1


async def test_a_request_is_not_repeated_after_the_first_byte_of_its_response() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(reply(b"a"))
        await visit.request()
        await visit.send(b"HTTP/1.1 2")

    async with open_raw_server(script) as server:
        client = client_of(server)
        await send(client)
        with pytest.raises(IncompleteResponse):
            await send(client)
        assert len(server.visits) == 1


# Incomplete responses and cancellation


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"5\r\nhel",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello",
    ],
)
@pytest.mark.parametrize("reset", [True, False])
async def test_a_truncated_response_is_an_error_after_what_was_received_of_it(
    answer: bytes, reset: bool
) -> None:
    received = trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(answer)
        await received.wait()
        if reset:
            # Closing the socket now sends a reset.
            visit.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    pieces = []

    async def take(response: HttpResponse) -> None:
        while piece := await response.receive():
            pieces.append(piece)
            received.set()

    async with open_raw_server(script) as server:
        with trio.fail_after(5), pytest.raises(IncompleteResponse):
            await client_of(server).send(HttpRequest("POST", "/x"), take)
    assert b"".join(pieces) in (b"hello", b"hel")


async def test_a_close_delimited_response_ends_with_its_connection() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CLOSE_DELIMITED + b"hello", b" world")

    async with open_raw_server(script) as server:
        response, body = await send(client_of(server))
        assert (response.close_delimited, body) == (True, b"hello world")


async def wait_for_response(client: HttpClient, begun: trio.Event) -> None:
    async def take(response: HttpResponse) -> None:
        begun.set()
        while await response.receive():
            pass

    await client.send(HttpRequest("POST", "/x", body=b"a"), take)


@pytest.mark.parametrize("response_begun", [True, False])
async def test_a_cancelled_request_closes_its_connection_at_once(response_begun: bool) -> None:
    begun, closed = trio.Event(), trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        if response_begun:
            await visit.send(CHUNKED + b"1\r\na\r\n")
        else:
            begun.set()
        await visit.closed()
        closed.set()

    async with open_raw_server(script) as server:
        client = client_of(server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_response, client, begun)
            await begun.wait()
            nursery.cancel_scope.cancel()
        with patience.fail_after(0.5):
            await closed.wait()
        assert client._idle == []


async def test_an_error_of_the_response_handler_is_raised_and_closes_the_connection() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED + b"1\r\na\r\n")
        await visit.closed()
        done.set()

    async def fail(response: HttpResponse) -> None:
        await response.receive()
        raise KeyError("enough")

    done = trio.Event()
    async with open_raw_server(script) as server:
        for body in (b"a", b"a" * 100_000):
            done = trio.Event()
            with pytest.raises(KeyError, match="enough"):
                await client_of(server).send(HttpRequest("POST", "/x", body=body), fail)
            with patience.fail_after(2):
                await done.wait()


# Sending and receiving at the same time


@pytest.mark.parametrize("whole", [True, False])
async def test_an_early_refusal_is_received_and_ends_the_upload(whole: bool) -> None:
    produced = 0

    async def endless() -> bytes:
        nonlocal produced
        await trio.lowlevel.checkpoint()
        produced += 100_000
        return b"a" * 100_000

    async def script(visit: Visit) -> None:
        await visit.head()
        await visit.send(reply(b"too large", "413 Content Too Large"))
        await visit.closed()

    body: Body = b"a" * 50_000_000 if whole else endless
    async with open_raw_server(script) as server:
        client = client_of(server)
        response, text = await send(client, body)
        assert (response.status, text) == (413, b"too large")
        assert client._idle == []
    assert produced < 50_000_000


async def test_an_early_refusal_ends_the_upload_even_if_the_server_goes_on_reading() -> None:
    async def endless() -> bytes:
        await trio.lowlevel.checkpoint()
        return b"a" * 100_000

    async def script(visit: Visit) -> None:
        await visit.head()
        await visit.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 9\r\n\r\n")
        with pytest.raises(trio.TooSlowError):
            await visit.closed(0.2, silent=True)
        await visit.send(b"too large")

    async with open_raw_server(script) as server:
        _, text = await send(client_of(server), endless)
        assert text == b"too large"


async def test_a_response_is_received_after_a_failed_write(monkeypatch: pytest.MonkeyPatch) -> None:
    over = trio.Event()
    send_all = trio.SocketStream.send_all

    async def send_too_late(stream: trio.SocketStream, data: bytes) -> None:
        await send_all(stream, data)
        if data.startswith(b"POST"):
            await over.wait()
            raise trio.BrokenResourceError

    async def script(visit: Visit) -> None:
        await visit.head()
        await visit.send(reply(b"no", "401 Unauthorized"))
        over.set()

    monkeypatch.setattr(trio.SocketStream, "send_all", send_too_late)
    async with open_raw_server(script) as server:
        response, text = await send(client_of(server), b"a")
        assert (response.status, text) == (401, b"no")


async def test_an_early_refusal_is_received_from_a_server_that_closes() -> None:
    async def script(visit: Visit) -> None:
        await visit.head()
        await visit.send(reply(b"no", "401 Unauthorized"))

    async with open_raw_server(script) as server:
        response, text = await send(client_of(server), b"a" * 20_000_000)
        assert (response.status, text) == (401, b"no")


async def test_a_response_may_begin_before_the_request_has_ended() -> None:
    response_begun = trio.Event()

    async def slowly() -> bytes:
        if response_begun.is_set():
            return b""
        await response_begun.wait()
        return b"the rest"

    async def script(visit: Visit) -> None:
        received = await visit.head()
        assert received.headers["transfer-encoding"] == "chunked"
        await visit.send(CHUNKED + b"5\r\nearly\r\n")
        while b"0\r\n\r\n" not in visit.rest:
            await visit._more()
        await visit.send(b"4\r\nlate\r\n0\r\n\r\n")

    pieces = []

    async def take(response: HttpResponse) -> None:
        while piece := await response.receive():
            pieces.append(piece)
            response_begun.set()

    async with open_raw_server(script) as server:
        with trio.fail_after(5):
            await client_of(server).send(HttpRequest("POST", "/x", body=slowly), take)
        assert b"the rest" in server.visits[0].rest
    assert pieces == [b"early", b"late"]


# Failed connections


async def test_the_error_for_a_refused_connection_has_the_reason_and_no_address() -> None:
    async with open_raw_server(echo) as server:
        pass
    with pytest.raises(ConnectFailed) as caught:
        await send(client_of(server))
    assert str(caught.value) == "Connection refused"


async def test_a_name_that_cannot_be_resolved_is_an_error_with_the_reason() -> None:
    client = HttpClient(BaseURL.parse("http://nobody.invalid/v1"))
    with pytest.raises(ConnectFailed, match=r".") as caught:
        await send(client)
    assert "nobody" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
async def test_a_server_is_reached_by_name_and_by_address(host: str) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    try:
        listeners = await trio.open_tcp_listeners(0, host="::1" if host == "::1" else "127.0.0.1")
    except OSError:
        pytest.skip("there is no IPv6 here")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        client = HttpClient(BaseURL("http", host, listeners[0].socket.getsockname()[1], ""))
        with trio.fail_after(5):
            assert await client.fetch(HttpRequest("GET", "/"), 10) == (200, b"hello")
        client.close()
        nursery.cancel_scope.cancel()


async def test_connecting_to_a_name_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio, "open_tcp_stream", never)
    with pytest.raises(ConnectFailed, match=r"no connection within 0.05 s"):
        await send(HttpClient(BaseURL.parse("http://localhost:1/v1"), connect_timeout=0.05))


async def test_connecting_to_an_address_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        closed = False

        async def connect(self, address: tuple[str, int]) -> None:
            await trio.sleep_forever()

        def close(self) -> None:
            self.closed = True

    never = Never()
    monkeypatch.setattr(trio.socket, "socket", lambda family: never)
    with pytest.raises(ConnectFailed, match=r"no connection within 0.05 s"):
        await send(HttpClient(BaseURL.parse("http://127.0.0.1:1/v1"), connect_timeout=0.05))
    assert never.closed


async def test_a_response_over_the_limit_of_fetch_is_an_error() -> None:
    async with open_raw_server(echo) as server:
        with pytest.raises(HttpError, match="more than 10 bytes"):
            await client_of(server).fetch(HttpRequest("POST", "/x", body=b"a" * 11), 10)


# TLS


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {key} -out {certificate}"
    try:
        subprocess.run(
            [
                *command.split(),
                "-days",
                "2",
                "-subj",
                "/CN=localhost",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
            ],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("needs the command openssl")
    return key, certificate


async def serve_encrypted(
    key: Path, certificate: Path, closed: trio.Event, *, task_status: trio.TaskStatus[int]
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        try:
            visit = Visit(RawServer(echo), stream)  # type: ignore[arg-type]
            received = await visit.request()
            await visit.send(reply(received.body))
            await visit.request()
            await visit.send(CHUNKED + b"1\r\na\r\n")
            await visit.closed()
            closed.set()
        except (trio.EndOfChannel, trio.BrokenResourceError):
            pass

    listeners = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1", https_compatible=True)
    port = listeners[0].transport_listener.socket.getsockname()[1]
    await trio.serve_listeners(serve, listeners, task_status=_Port(task_status, port))  # type: ignore[arg-type]


class _Port:
    def __init__(self, task_status: trio.TaskStatus[int], port: int) -> None:
        self._task_status, self._port = task_status, port

    def started(self, value: object = None) -> None:
        self._task_status.started(self._port)


async def test_requests_over_tls_are_answered_and_cancelled_at_once(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[1]))
    closed = trio.Event()
    port = await nursery.start(partial(serve_encrypted, *certificate, closed))
    client = HttpClient(BaseURL.parse(f"https://127.0.0.1:{port}/v1"))
    body = b"a" * 1_000_000
    assert (await send(client, body))[1] == body
    assert len(client._idle) == 1
    begun = trio.Event()
    async with trio.open_nursery() as sending:
        sending.start_soon(wait_for_response, client, begun)
        await begun.wait()
        sending.cancel_scope.cancel()
    with patience.fail_after(2):
        await closed.wait()


async def test_an_untrusted_certificate_is_an_error_with_the_reason(
    certificate: tuple[Path, Path], nursery: trio.Nursery
) -> None:
    port = await nursery.start(partial(serve_encrypted, *certificate, trio.Event()))
    with pytest.raises(ConnectFailed, match="TLS: self-signed certificate"):
        await send(HttpClient(BaseURL.parse(f"https://127.0.0.1:{port}/v1")))
