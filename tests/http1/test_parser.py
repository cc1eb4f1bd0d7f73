"""The parser alone: requests in their order, and how many bytes they count for."""

from __future__ import annotations

import tracemalloc

import pytest

from trio_cluster.http1.parser import HEAD_LIMIT, HEADER_LIMIT, RequestParser

POST = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def fed(*pieces: bytes) -> RequestParser:
    parser = RequestParser()
    for piece in pieces:
        parser.feed(piece)
    return parser


def test_a_request_can_be_taken_before_its_body_is_complete() -> None:
    parser = fed(POST[:-3])
    (request,) = parser.requests
    assert not request.complete
    assert parser.take_body(request) == b"he"
    parser.feed(POST[-3:])
    assert request.complete
    assert parser.take_body(request) == b"llo"


def test_nothing_counts_as_unread_when_all_was_taken_out_or_discarded() -> None:
    parser = fed(POST * 3)
    assert parser.unread > 3 * len("hello")
    for request in parser.requests:
        if request is not parser.requests[0]:
            parser.take_body(request)
        parser.discard(request)
    assert parser.unread == 0


def test_what_follows_the_last_request_is_ignored_and_counts_for_nothing() -> None:
    for rest in (POST, POST[:-1], b"rubbish\r\n\r\n", b"\x00"):
        for pieces in ((LAST + rest,), (LAST, rest), (LAST + rest[:1], rest[1:])):
            parser = fed(*pieces)
            assert [request.target for request in parser.requests] == [b"/last"]
            assert parser.refused is None
            parser.discard(parser.requests[0])
            assert parser.unread == 0


def test_requests_that_have_not_begun_are_ignored_when_the_connection_is_to_end() -> None:
    parser = fed(POST + POST[:20])
    unread = parser.unread
    parser.no_more = True
    parser.feed(POST[20:-1])
    parser.feed(POST[-1:] + b"rubbish\r\n\r\n")
    assert len(parser.requests) == 1
    assert parser.refused is None
    assert parser.unread == unread


def test_the_first_refusal_counts() -> None:
    parser = fed(POST, b"BREW / HTTP/1.1\r\n\r\n")
    assert len(parser.requests) == 1
    assert parser.refused is not None
    assert parser.refused.status == 501


@pytest.mark.parametrize(
    "begins",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nA: ",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: ",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;",
    ],
)
def test_a_line_that_never_ends_costs_no_more_than_the_limit(begins: bytes) -> None:
    parser = fed(begins)
    fed_bytes, most = 0, 0
    tracemalloc.start()
    try:
        while parser.refused is None and fed_bytes < 1 << 20:
            parser.feed(b"a" * 1024)
            fed_bytes += 1024
            most = max(most, tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert parser.refused is not None
    assert parser.refused.status == 431
    assert fed_bytes <= HEAD_LIMIT + 1024
    assert most < 3 * HEAD_LIMIT


def test_small_headers_count_for_the_memory_that_they_take() -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A:\r\n" * (HEADER_LIMIT - 1) + b"\r\n"
    tracemalloc.start()
    try:
        parser = fed(head * 50)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(parser.requests) == 50
    assert parser.unread > 0.75 * taken
    for request in parser.requests:
        parser.discard(request)
    assert parser.unread == 0


def test_a_body_in_tiny_pieces_takes_not_much_more_than_its_bytes() -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    parser = fed(head, *[b"1\r\na\r\n"] * 10_000)
    (request,) = parser.requests
    assert parser.unread - request.weight == 10_000
    assert len(request.body) < 20
    assert parser.take_body(request) == b"a" * 10_000
