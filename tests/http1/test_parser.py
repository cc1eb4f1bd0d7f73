"""The parser alone: requests in their order, and how many bytes they count for."""

from __future__ import annotations

from trio_cluster.http1.parser import RequestParser

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
