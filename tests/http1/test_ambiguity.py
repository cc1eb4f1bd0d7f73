"""Requests that two parsers may understand differently: what is made of each, and what h11 makes of it.

Where a request passes a proxy before it arrives here, the two must agree on where it ends, or a client can hide a
request in another one. So what is ambiguous is refused. h11 stands for the proxy; where the answers differ, a row of
the table in ``docs/security.md`` names the case and the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeAlias

import attrs
import h11
import pytest

from trio_cluster.http1.chunks import FRAMING_LIMIT, TRAILER_LIMIT
from trio_cluster.http1.parser import HEAD_LIMIT, HEADER_LIMIT, RequestParser

#: What was understood: the bodies of the requests, and then ``"open"`` (the next request may follow), ``"close"``,
#: ``"more"`` (the last request is not complete), or the status of a refusal.
Outcome: TypeAlias = tuple[list[bytes], str | int]

NEXT: Final = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"
TWO: Final = ([b"", b""], "open")
BODY: Final = ([b"hello", b""], "open")
BAD: Final = ([], 400)
MORE: Final = ([b"hello" + NEXT], "more")


@attrs.frozen
class Case:
    """What a client sends, and what is made of it."""

    name: str
    data: bytes
    ours: Outcome
    theirs: Outcome | None = None
    """h11's, where that differs."""


def get(*lines: bytes, version: bytes = b"1.1", host: bytes = b"Host: x\r\n") -> bytes:
    return (
        b"GET /a HTTP/"
        + version
        + b"\r\n"
        + host
        + b"".join(line + b"\r\n" for line in lines)
        + b"\r\n"
        + NEXT
    )


def post(*lines: bytes, body: bytes = b"hello", version: bytes = b"1.1") -> bytes:
    head = b"POST /a HTTP/" + version + b"\r\nHost: x\r\n" + b"".join(line + b"\r\n" for line in lines)
    return head + b"\r\n" + body + NEXT


def chunked(body: bytes, *lines: bytes, version: bytes = b"1.1") -> bytes:
    return post(b"Transfer-Encoding: chunked", *lines, body=body, version=version)


CHUNKS: Final = b"5\r\nhello\r\n0\r\n\r\n"

CASES: Final = [
    # Which host
    Case("one Host", get(), TWO),
    Case("no Host", get(host=b""), BAD),
    Case("two Hosts", get(b"Host: y"), BAD),
    Case("two equal Hosts", get(b"Host: x"), BAD),
    Case("no Host in HTTP/1.0", get(host=b"", version=b"1.0"), ([b""], "close")),
    Case("two Hosts in HTTP/1.0", get(b"Host: y", version=b"1.0"), BAD),
    Case("an address with a port", get(host=b"Host: [::1]:8080\r\n"), TWO),
    Case("an underscore in Host", get(host=b"Host: my_service:80\r\n"), TWO),
    Case("an empty Host", get(host=b"Host:\r\n"), BAD, TWO),
    Case("a path in Host", get(host=b"Host: x/y\r\n"), BAD, TWO),
    Case("a user in Host", get(host=b"Host: a@x\r\n"), BAD, TWO),
    Case("a blank in Host", get(host=b"Host: x y\r\n"), BAD, TWO),
    Case("an impossible port in Host", get(host=b"Host: x:99999\r\n"), BAD, TWO),
    Case("a port without digits in Host", get(host=b"Host: x:http\r\n"), BAD, TWO),
    Case("letters beyond ASCII in Host", get(host=b"Host: \xfcml\xe4ut\r\n"), BAD, TWO),
    # Where the body ends
    Case("content-length", post(b"Content-Length: 5"), BODY),
    Case("content-length with zeros in front", post(b"Content-Length: 0005"), BODY),
    Case("content-length with a blank behind it", post(b"Content-Length: 5 "), BODY),
    Case("two lengths that differ", post(b"Content-Length: 5", b"Content-Length: 6"), BAD),
    Case("two lengths that agree", post(b"Content-Length: 5", b"Content-Length: 5"), BAD, BODY),
    Case("two lengths in one line", post(b"Content-Length: 5, 5"), BAD, BODY),
    Case("a negative length", post(b"Content-Length: -5"), BAD),
    Case("a length with a sign", post(b"Content-Length: +5"), BAD),
    Case("a hexadecimal length", post(b"Content-Length: 0x5"), BAD),
    Case("an empty length", post(b"Content-Length:"), BAD),
    Case("a length with an underscore", post(b"Content-Length: 1_0"), BAD),
    Case(
        "a length of more than 64 bits",
        post(b"Content-Length: 18446744073709551621"),
        BAD,
        ([b"hello" + NEXT], "more"),
    ),
    Case("chunks", chunked(CHUNKS), BODY),
    Case("chunked in capitals", post(b"Transfer-Encoding: CHUNKED", body=CHUNKS), BODY),
    Case("chunked with a blank behind it", post(b"Transfer-Encoding: chunked ", body=CHUNKS), BODY),
    Case("chunked with a tab behind it", post(b"Transfer-Encoding: chunked\t", body=CHUNKS), BAD, BODY),
    Case("chunked and a length", chunked(CHUNKS, b"Content-Length: 5"), BAD, BODY),
    Case(
        "a length and chunked",
        post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=CHUNKS),
        BAD,
        BODY,
    ),
    Case("chunked twice", chunked(CHUNKS, b"Transfer-Encoding: chunked"), BAD, ([], 501)),
    Case("gzip, then chunked", post(b"Transfer-Encoding: gzip, chunked", body=CHUNKS), ([], 501)),
    Case("chunked, then gzip", post(b"Transfer-Encoding: chunked, gzip", body=CHUNKS), BAD, ([], 501)),
    Case(
        "gzip and chunked in two lines",
        post(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked", body=CHUNKS),
        ([], 501),
    ),
    Case("identity", post(b"Transfer-Encoding: identity", body=CHUNKS), ([], 501)),
    Case("an unknown coding", post(b"Transfer-Encoding: xchunked", body=CHUNKS), ([], 501)),
    Case("chunked in quotes", post(b'Transfer-Encoding: "chunked"', body=CHUNKS), ([], 501)),
    Case("an empty coding", post(b"Transfer-Encoding:", body=CHUNKS), BAD, ([], 501)),
    Case("chunks in HTTP/1.0", chunked(CHUNKS, version=b"1.0"), ([b"hello"], "close")),
    Case(
        "chunks in HTTP/1.0 that keep alive",
        chunked(CHUNKS, b"Connection: keep-alive", version=b"1.0"),
        ([b"hello"], "close"),
    ),
    Case(
        "a length in HTTP/1.0 that keeps alive",
        post(b"Content-Length: 5", b"Connection: keep-alive", version=b"1.0"),
        BODY,
        ([b"hello"], "close"),
    ),
    # Chunks
    Case("chunk size with zeros in front", chunked(b"0005\r\nhello\r\n0\r\n\r\n"), BODY),
    Case("a chunk extension", chunked(b"5;a=b\r\nhello\r\n0;c\r\n\r\n"), BODY),
    Case("blanks before a chunk extension", chunked(b"5 ; a=b\r\nhello\r\n0\r\n\r\n"), BODY, BAD),
    Case("a blank behind a chunk size", chunked(b"5 \r\nhello\r\n0\r\n\r\n"), BAD, BODY),
    Case("a chunk size in 0x", chunked(b"0x5\r\nhello\r\n0\r\n\r\n"), BAD),
    Case("a negative chunk size", chunked(b"-5\r\nhello\r\n0\r\n\r\n"), BAD),
    Case("an empty chunk size", chunked(b"\r\nhello\r\n0\r\n\r\n"), BAD),
    Case("a chunk size of 17 digits", chunked(b"00000000000000005\r\nhello\r\n0\r\n\r\n"), BAD, BODY),
    Case("a chunk size that ends in LF", chunked(b"5\nhello\r\n0\r\n\r\n"), BAD),
    Case("LF in a chunk extension", chunked(b"5;a\nb\r\nhello\r\n0\r\n\r\n"), BAD),
    Case("CR in a chunk extension", chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n"), BAD, BODY),
    Case("a chunk that is longer than its size", chunked(b"5\r\nhelloX\r\n0\r\n\r\n"), BAD),
    Case("a chunk that ends in LF", chunked(b"5\r\nhello\n0\r\n\r\n"), BAD),
    Case("a chunk that is shorter than its size", chunked(b"6\r\nhello\r\n0\r\n\r\n"), BAD),
    Case(
        "a chunk extension that never ends", chunked(b"5;" + b"a" * 2 * FRAMING_LIMIT), ([], 431), ([], 400)
    ),
    Case("trailers", chunked(b"5\r\nhello\r\n0\r\nX: y\r\n\r\n"), BODY),
    Case("a trailer that says to close", chunked(b"5\r\nhello\r\n0\r\nConnection: close\r\n\r\n"), BODY),
    Case("a length in a trailer", chunked(b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n"), BODY),
    Case(
        "a coding in a trailer",
        chunked(b"5\r\nhello\r\n0\r\nTransfer-Encoding: gzip\r\n\r\n"),
        BODY,
        ([], 501),
    ),
    Case("a trailer that is a request", chunked(b"5\r\nhello\r\n0\r\nGET / HTTP/1.1\r\n\r\n"), BAD),
    Case("a trailer with a blank before its colon", chunked(b"5\r\nhello\r\n0\r\nX : y\r\n\r\n"), BAD),
    Case("a trailer in two lines", chunked(b"5\r\nhello\r\n0\r\nX: y\r\n z\r\n\r\n"), BAD, BODY),
    Case(
        "too many trailers", chunked(b"0\r\n" + b"X: y\r\n" * (TRAILER_LIMIT + 1) + b"\r\n"), ([], 431), TWO
    ),
    Case(
        "a trailer that is too large",
        chunked(b"0\r\nX: " + b"y" * 2 * HEAD_LIMIT + b"\r\n\r\n"),
        ([], 431),
        TWO,
    ),
    # Lines
    Case("LF for CRLF", b"GET /a HTTP/1.1\nHost: x\n\n" + NEXT, BAD, TWO),
    Case("LF for CRLF in a header", get(b"A: b\nC: d"), BAD, TWO),
    Case("CR in a value", get(b"A: b\rc"), BAD),
    Case("NUL in a value", get(b"A: b\x00c"), BAD),
    Case("a blank before the colon", get(b"A : b"), BAD),
    Case("a header without a colon", get(b"A"), BAD),
    Case("a header without a name", get(b": b"), BAD),
    Case("a header in two lines", get(b"A: b", b" c"), BAD, TWO),
    Case("a first header that is indented", b"GET /a HTTP/1.1\r\n Host: x\r\n\r\n" + NEXT, BAD),
    Case("a name beyond ASCII", get(b"\xc4: b"), BAD),
    Case("empty lines before a request", b"\r\n\r\n" + get(), TWO, BAD),
    Case("a target with a blank", b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT, BAD),
    Case("two blanks before the target", b"GET  /a HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT, TWO, BAD),
    Case("a target beyond ASCII", b"GET /\xc4 HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT, BAD),
    Case("a blank behind the version", b"GET /a HTTP/1.1 \r\nHost: x\r\n\r\n" + NEXT, BAD),
    Case("an unknown method", b"BREW /a HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT, ([], 501), TWO),
    Case("an unknown version", get(version=b"1.2"), BAD, TWO),
    Case("a preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ([], 505), ([b""], 400)),
    # Connections
    Case(
        "an upgrade that is not taken",
        post(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 5"),
        BODY,
    ),
    Case("an upgrade with chunks", chunked(CHUNKS, b"Connection: Upgrade", b"Upgrade: h2c"), BODY),
    Case("an upgrade without a body", get(b"Connection: Upgrade", b"Upgrade: websocket"), TWO),
    Case("a request that is the last", get(b"Connection: close"), ([b""], "close")),
    Case("CONNECT", b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT, ([b""], "close"), TWO),
    # Sizes
    Case("a head at the limit", get(b"A: " + b"a" * (HEAD_LIMIT - 200)), TWO),
    Case("a header that is too large", get(b"A: " + b"a" * 70_000), ([], 431), TWO),
    Case("a header that never ends", b"GET /a HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 2 * HEAD_LIMIT, ([], 431)),
    Case("a name that never ends", b"GET /a HTTP/1.1\r\nHost: x\r\n" + b"a" * 2 * HEAD_LIMIT, ([], 431)),
    Case("a target that never ends", b"GET /" + b"a" * 2 * HEAD_LIMIT, ([], 431)),
    Case("empty lines that never end", b"\r\n" * HEAD_LIMIT, ([], 431), BAD),
    Case("many headers", get(*[b"A: b"] * (HEADER_LIMIT - 1)), TWO),
    Case("too many headers", get(*[b"A: b"] * HEADER_LIMIT), ([], 431), TWO),
]


def fed(data: bytes, size: int) -> Outcome:
    """Return what our parser makes of bytes that come so many at a time."""
    parser = RequestParser()
    for at in range(0, len(data), size):
        parser.feed(data[at : at + size])
    requests = [request for request in parser.requests if request.complete]
    bodies = [parser.take_body(request) for request in requests]
    if parser.refused is not None:
        return bodies, parser.refused.status
    if len(requests) < len(parser.requests):
        return [*bodies, parser.take_body(parser.latest)], "more"
    return bodies, "close" if parser.no_more else "open"


def fed_to_h11(data: bytes) -> Outcome:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)
    connection.receive_data(data)
    bodies: list[bytes] = []
    complete = True
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            return (bodies if complete else bodies[:-1]), error.error_status_hint
        if isinstance(event, h11.Request):
            bodies.append(b"")
            complete = False
        elif isinstance(event, h11.Data):
            bodies[-1] += event.data
        elif isinstance(event, h11.EndOfMessage):
            complete = True
            connection.send(h11.Response(status_code=404, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is not h11.DONE:
                return bodies, "close"
            connection.start_next_cycle()
        elif event is h11.PAUSED:
            return bodies, "close"
        else:
            return bodies, "open" if complete else "more"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_ambiguous_request_is_understood_in_one_way_however_it_arrives(case: Case) -> None:
    assert fed(case.data, len(case.data)) == case.ours
    for size in (1, 2, 3, 7, 1000, 16 * 1024):
        assert fed(case.data, size) == case.ours, f"{size} bytes at a time"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_h11_understands_the_same_or_the_difference_is_documented(case: Case) -> None:
    theirs = fed_to_h11(case.data)
    assert theirs == (case.ours if case.theirs is None else case.theirs)
    documented = f"| {case.name} |" in (Path(__file__).parents[2] / "docs/security.md").read_text()
    assert documented == (case.theirs is not None), "docs/security.md lists the differences and nothing else"
    assert case.theirs != case.ours
