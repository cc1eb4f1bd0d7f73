"""What comes in on a connection, without one: requests in their order, and what they count for."""

from __future__ import annotations

from trio_cluster.http1.parser import Incoming

POST = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def fed(*pieces: bytes) -> Incoming:
    incoming = Incoming()
    for piece in pieces:
        incoming.feed(piece)
    return incoming


def test_a_request_can_be_taken_before_its_body_is_complete() -> None:
    incoming = fed(POST[:-3])
    (request,) = incoming.requests
    assert not request.complete
    assert incoming.take_body(request) == b"he"
    incoming.feed(POST[-3:])
    assert request.complete
    assert incoming.take_body(request) == b"llo"


def test_what_is_unread_is_nothing_when_all_has_been_taken_out_or_forgotten() -> None:
    incoming = fed(POST * 3)
    assert incoming.unread > 3 * len("hello")
    for request in incoming.requests:
        if request is not incoming.requests[0]:
            incoming.take_body(request)
        incoming.forget(request)
    assert incoming.unread == 0


def test_what_follows_the_last_request_is_nobodys_and_counts_for_nothing() -> None:
    for rest in (POST, POST[:-1], b"rubbish\r\n\r\n", b"\x00"):
        for pieces in ((LAST + rest,), (LAST, rest), (LAST + rest[:1], rest[1:])):
            incoming = fed(*pieces)
            assert [request.target for request in incoming.requests] == [b"/last"]
            assert incoming.refused is None
            incoming.forget(incoming.requests[0])
            assert incoming.unread == 0


def test_whoever_knows_that_the_connection_ends_can_refuse_what_has_not_begun() -> None:
    incoming = fed(POST + POST[:20])
    unread = incoming.unread
    incoming.no_more = True
    incoming.feed(POST[20:-1])
    incoming.feed(POST[-1:] + b"rubbish\r\n\r\n")
    assert len(incoming.requests) == 1
    assert incoming.refused is None
    assert incoming.unread == unread


def test_the_first_thing_that_is_wrong_is_what_is_told() -> None:
    incoming = fed(POST, b"BREW / HTTP/1.1\r\n\r\n")
    assert len(incoming.requests) == 1
    assert incoming.refused is not None
    assert incoming.refused.status == 501
