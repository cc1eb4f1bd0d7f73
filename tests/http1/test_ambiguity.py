"""Requests that two parsers may understand differently: what is made of each, and what h11 and nginx make of it.

Where a request passes a proxy before it arrives here, the two must agree on where it ends, or a client can hide a
request in another one. So what is ambiguous is refused. h11, a strict parser, stands for what a proxy should do, and a
real nginx, with its default settings, for what one does. Each difference is in the table of cases with its reason, and
so in ``docs/security.md``: one that appears or vanishes fails a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

import attrs
import h11
import pytest
from nginx_proxy import NGINX, Nginx, open_nginx

from trio_cluster.http1.chunks import FRAMING_LIMIT, TRAILER_LIMIT
from trio_cluster.http1.parser import HEAD_LIMIT, HEADER_LIMIT, RequestParser

#: What was understood: the bodies of the requests, and then ``"open"`` (the next request may follow), ``"close"``,
#: ``"more"`` (the last request is not complete), or the status of a refusal.
Outcome: TypeAlias = tuple[list[bytes], str | int]

#: With this version the outcomes were compared. Another one may understand something differently.
NGINX_VERSION: Final = "nginx 1.22"

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
    h11: Outcome | None = None
    """What h11 makes of it, where that differs."""
    nginx: Outcome | None = attrs.field(default=None, kw_only=True)
    """What nginx makes of it, where that differs."""
    why: str = attrs.field(default="", kw_only=True)
    """The reason of the difference, for the table in ``docs/security.md``."""

    @property
    def differs(self) -> bool:
        """Whether anything is made of it that is not made of it here."""
        return self.h11 is not None or self.nginx is not None


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
    Case(
        "an empty Host",
        get(host=b"Host:\r\n"),
        BAD,
        TWO,
        why="only a target without an authority has one, and that is not HTTP over TCP",
    ),
    Case(
        "a path in Host",
        get(host=b"Host: x/y\r\n"),
        BAD,
        TWO,
        why="not the name of a host (RFC 9110, 7.2); h11 does not look into it",
    ),
    Case(
        "a user in Host",
        get(host=b"Host: a@x\r\n"),
        BAD,
        TWO,
        nginx=TWO,
        why="the same; nginx looks for blanks, slashes and control characters only",
    ),
    Case("a blank in Host", get(host=b"Host: x y\r\n"), BAD, TWO, why="the same"),
    Case(
        "an impossible port in Host",
        get(host=b"Host: x:99999\r\n"),
        BAD,
        TWO,
        nginx=TWO,
        why="the same; nginx does not read the port",
    ),
    Case("a port without digits in Host", get(host=b"Host: x:http\r\n"), BAD, TWO, nginx=TWO, why="the same"),
    Case(
        "letters beyond ASCII in Host",
        get(host=b"Host: \xfcml\xe4ut\r\n"),
        BAD,
        TWO,
        nginx=TWO,
        why="the same; names beyond ASCII travel in Punycode",
    ),
    # Where the body ends
    Case("content-length", post(b"Content-Length: 5"), BODY),
    Case("content-length with zeros in front", post(b"Content-Length: 0005"), BODY),
    Case("content-length with a blank behind it", post(b"Content-Length: 5 "), BODY),
    Case("two lengths that differ", post(b"Content-Length: 5", b"Content-Length: 6"), BAD),
    Case(
        "two lengths that agree",
        post(b"Content-Length: 5", b"Content-Length: 5"),
        BAD,
        BODY,
        why="RFC 9112, 6.3 allows both; no client sends this",
    ),
    Case("two lengths in one line", post(b"Content-Length: 5, 5"), BAD, BODY, why="the same"),
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
        why="a number that overflows elsewhere has two meanings",
    ),
    Case("chunks", chunked(CHUNKS), BODY),
    Case("chunked in capitals", post(b"Transfer-Encoding: CHUNKED", body=CHUNKS), BODY),
    Case("chunked with a blank behind it", post(b"Transfer-Encoding: chunked ", body=CHUNKS), BODY),
    Case(
        "chunked with a tab behind it",
        post(b"Transfer-Encoding: chunked\t", body=CHUNKS),
        BAD,
        BODY,
        nginx=([], 501),
        why='allowed, but no client sends this; nginx is one of the parsers that do not take it for "chunked"',
    ),
    Case(
        "chunked and a length",
        chunked(CHUNKS, b"Content-Length: 5"),
        BAD,
        BODY,
        why="two lengths: RFC 9112, 6.1 allows to refuse it, and says that it may be an attack",
    ),
    Case(
        "a length and chunked",
        post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=CHUNKS),
        BAD,
        BODY,
        why="the same",
    ),
    Case(
        "chunked twice", chunked(CHUNKS, b"Transfer-Encoding: chunked"), BAD, ([], 501), why="the status only"
    ),
    Case("gzip, then chunked", post(b"Transfer-Encoding: gzip, chunked", body=CHUNKS), ([], 501)),
    Case(
        "chunked, then gzip",
        post(b"Transfer-Encoding: chunked, gzip", body=CHUNKS),
        BAD,
        ([], 501),
        nginx=([], 501),
        why="the status only",
    ),
    Case(
        "gzip and chunked in two lines",
        post(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked", body=CHUNKS),
        ([], 501),
        nginx=BAD,
        why="the status only",
    ),
    Case("identity", post(b"Transfer-Encoding: identity", body=CHUNKS), ([], 501)),
    Case("an unknown coding", post(b"Transfer-Encoding: xchunked", body=CHUNKS), ([], 501)),
    Case("chunked in quotes", post(b'Transfer-Encoding: "chunked"', body=CHUNKS), ([], 501)),
    Case(
        "an empty coding",
        post(b"Transfer-Encoding:", body=CHUNKS),
        BAD,
        ([], 501),
        nginx=([], 501),
        why="the status only",
    ),
    Case(
        "chunks in HTTP/1.0",
        chunked(CHUNKS, version=b"1.0"),
        ([b"hello"], "close"),
        nginx=BAD,
        why="accepted from clients, but nothing may follow (RFC 9112, 6.1)",
    ),
    Case(
        "chunks in HTTP/1.0 that keep alive",
        chunked(CHUNKS, b"Connection: keep-alive", version=b"1.0"),
        ([b"hello"], "close"),
        nginx=BAD,
        why="the same",
    ),
    Case(
        "a length in HTTP/1.0 that keeps alive",
        post(b"Content-Length: 5", b"Connection: keep-alive", version=b"1.0"),
        BODY,
        ([b"hello"], "close"),
        why="HTTP/1.0 clients that ask for it keep their connection",
    ),
    # Chunks
    Case("chunk size with zeros in front", chunked(b"0005\r\nhello\r\n0\r\n\r\n"), BODY),
    Case("a chunk extension", chunked(b"5;a=b\r\nhello\r\n0;c\r\n\r\n"), BODY),
    Case(
        "blanks before a chunk extension",
        chunked(b"5 ; a=b\r\nhello\r\n0\r\n\r\n"),
        BODY,
        BAD,
        why="RFC 9112, 7.1.1 allows them",
    ),
    Case(
        "a blank behind a chunk size",
        chunked(b"5 \r\nhello\r\n0\r\n\r\n"),
        BAD,
        BODY,
        nginx=BODY,
        why="the grammar does not allow it",
    ),
    Case("a chunk size in 0x", chunked(b"0x5\r\nhello\r\n0\r\n\r\n"), BAD),
    Case("a negative chunk size", chunked(b"-5\r\nhello\r\n0\r\n\r\n"), BAD),
    Case("an empty chunk size", chunked(b"\r\nhello\r\n0\r\n\r\n"), BAD),
    Case(
        "a chunk size of 17 digits",
        chunked(b"00000000000000005\r\nhello\r\n0\r\n\r\n"),
        BAD,
        BODY,
        nginx=BODY,
        why="16 digits are 64 bits; more of them overflow elsewhere",
    ),
    Case(
        "a chunk size that ends in LF",
        chunked(b"5\nhello\r\n0\r\n\r\n"),
        BAD,
        nginx=BODY,
        why="a line ends in CRLF: parsers that differ in this can see different chunks",
    ),
    Case("LF in a chunk extension", chunked(b"5;a\nb\r\nhello\r\n0\r\n\r\n"), BAD),
    Case(
        "CR in a chunk extension",
        chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
        BAD,
        BODY,
        why="some parsers take it for the end of the line",
    ),
    Case("a chunk that is longer than its size", chunked(b"5\r\nhelloX\r\n0\r\n\r\n"), BAD),
    Case(
        "a chunk that ends in LF",
        chunked(b"5\r\nhello\n0\r\n\r\n"),
        BAD,
        nginx=BODY,
        why="a line ends in CRLF, as above",
    ),
    Case(
        "a chunk that is shorter than its size",
        chunked(b"6\r\nhello\r\n0\r\n\r\n"),
        BAD,
        nginx=([b"hello\r", b""], "open"),
        why="nginx takes the CR for the last byte, and LF alone for the end of the line",
    ),
    Case(
        "a chunk extension that never ends",
        chunked(b"5;" + b"a" * 2 * FRAMING_LIMIT),
        ([], 431),
        ([], 400),
        nginx=BAD,
        why="the status only",
    ),
    Case("trailers", chunked(b"5\r\nhello\r\n0\r\nX: y\r\n\r\n"), BODY),
    Case("a trailer that says to close", chunked(b"5\r\nhello\r\n0\r\nConnection: close\r\n\r\n"), BODY),
    Case("a length in a trailer", chunked(b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n"), BODY),
    Case(
        "a coding in a trailer",
        chunked(b"5\r\nhello\r\n0\r\nTransfer-Encoding: gzip\r\n\r\n"),
        BODY,
        ([], 501),
        why="trailers change nothing about a request",
    ),
    Case(
        "a trailer that is a request",
        chunked(b"5\r\nhello\r\n0\r\nGET / HTTP/1.1\r\n\r\n"),
        BAD,
        nginx=BODY,
        why="not a header, but a request for a parser that sees the end of the body before it",
    ),
    Case(
        "a trailer with a blank before its colon",
        chunked(b"5\r\nhello\r\n0\r\nX : y\r\n\r\n"),
        BAD,
        nginx=BODY,
        why="not a header (RFC 9112, 5.1)",
    ),
    Case(
        "a trailer in two lines",
        chunked(b"5\r\nhello\r\n0\r\nX: y\r\n z\r\n\r\n"),
        BAD,
        BODY,
        nginx=BODY,
        why="obsolete line folding (RFC 9112, 5.2)",
    ),
    Case(
        "too many trailers",
        chunked(b"0\r\n" + b"X: y\r\n" * (TRAILER_LIMIT + 1) + b"\r\n"),
        ([], 431),
        TWO,
        nginx=TWO,
        why="our limit",
    ),
    Case(
        "a trailer that is too large",
        chunked(b"0\r\nX: " + b"y" * 2 * HEAD_LIMIT + b"\r\n\r\n"),
        ([], 431),
        TWO,
        nginx=TWO,
        why="our limit",
    ),
    # Lines
    Case(
        "LF for CRLF",
        b"GET /a HTTP/1.1\nHost: x\n\n" + NEXT,
        BAD,
        TWO,
        nginx=TWO,
        why="a head ends at CRLF CRLF and nowhere else",
    ),
    Case("LF for CRLF in a header", get(b"A: b\nC: d"), BAD, TWO, nginx=TWO, why="the same"),
    Case("CR in a value", get(b"A: b\rc"), BAD),
    Case("NUL in a value", get(b"A: b\x00c"), BAD),
    Case("a blank before the colon", get(b"A : b"), BAD),
    Case("a header without a colon", get(b"A"), BAD, nginx=TWO, why="nginx drops the line"),
    Case("a header without a name", get(b": b"), BAD),
    Case("a header in two lines", get(b"A: b", b" c"), BAD, TWO, why="obsolete line folding (RFC 9112, 5.2)"),
    Case("a first header that is indented", b"GET /a HTTP/1.1\r\n Host: x\r\n\r\n" + NEXT, BAD),
    Case("a name beyond ASCII", get(b"\xc4: b"), BAD, nginx=TWO, why="nginx drops the line"),
    Case(
        "empty lines before a request",
        b"\r\n\r\n" + get(),
        TWO,
        BAD,
        why="RFC 9112, 2.2 asks to ignore them; h11 ignores one",
    ),
    Case("a target with a blank", b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT, BAD),
    Case(
        "two blanks before the target",
        b"GET  /a HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT,
        TWO,
        BAD,
        why="the request ends at the same byte",
    ),
    Case(
        "a target beyond ASCII",
        b"GET /\xc4 HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT,
        BAD,
        nginx=TWO,
        why="a target is ASCII (RFC 9112, 3.2); the request ends at the same byte",
    ),
    Case(
        "a blank behind the version",
        b"GET /a HTTP/1.1 \r\nHost: x\r\n\r\n" + NEXT,
        BAD,
        nginx=TWO,
        why="the grammar does not allow it",
    ),
    Case(
        "an unknown method",
        b"BREW /a HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT,
        ([], 501),
        TWO,
        nginx=TWO,
        why="h11 and nginx leave methods to the application",
    ),
    Case(
        "an unknown version",
        get(version=b"1.2"),
        BAD,
        TWO,
        nginx=TWO,
        why="of 1.x there are 1.0 and 1.1; nginx takes every 1.x, and h11 all versions of two digits",
    ),
    Case(
        "a version with a second digit",
        get(version=b"1.10"),
        BAD,
        nginx=TWO,
        why="the same; nginx reads on after the first digit",
    ),
    Case("a version with a zero in front", get(version=b"01.1"), BAD),
    Case("a version without a minor one", get(version=b"1"), BAD),
    Case("a version without a dot", get(version=b"11"), BAD, nginx=([], 505), why="the status only"),
    Case("a version in lower case", b"GET /a http/1.1\r\nHost: x\r\n\r\n" + NEXT, BAD),
    Case(
        "HTTP/0.9 by its number",
        get(version=b"0.9"),
        ([], 505),
        ([b""], "close"),
        nginx=BAD,
        why="a request with a head is none in HTTP/0.9; h11 takes all versions of two digits",
    ),
    Case(
        "HTTP/0.9 without a number",
        b"GET /a\r\nHost: x\r\n\r\n" + NEXT,
        ([], 505),
        BAD,
        nginx=([b""], "close"),
        why="nginx serves it, without a head of its answer, as the last request",
    ),
    Case(
        "HTTP/0.9 with a version for its target",
        b"CONNECT HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT,
        ([], 505),
        BAD,
        nginx=BAD,
        why="the status only",
    ),
    Case("HTTP/2.0", get(version=b"2.0"), ([], 505), TWO, why="h11 takes all versions of two digits"),
    Case(
        "HTTP/3.0", get(version=b"3.0"), BAD, TWO, nginx=([], 505), why="the same; otherwise the status only"
    ),
    Case(
        "RTSP with GET",
        b"GET /a RTSP/1.0\r\nHost: x\r\n\r\n" + NEXT,
        ([], 505),
        BAD,
        nginx=BAD,
        why="the status only",
    ),
    Case(
        "RTSP with OPTIONS",
        b"OPTIONS * RTSP/1.0\r\nHost: x\r\n\r\n" + NEXT,
        ([], 505),
        BAD,
        nginx=BAD,
        why="the same",
    ),
    Case(
        "RTSP with its own method",
        b"SETUP /a RTSP/1.0\r\nHost: x\r\n\r\n" + NEXT,
        ([], 505),
        BAD,
        nginx=BAD,
        why="the same",
    ),
    Case(
        "a method of RTSP with HTTP",
        b"SETUP /a HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT,
        BAD,
        TWO,
        nginx=TWO,
        why="not a method of HTTP; the request ends at the same byte",
    ),
    Case(
        "ICE",
        b"SOURCE /a ICE/1.0\r\nHost: x\r\n\r\n" + NEXT,
        ([], 505),
        BAD,
        nginx=BAD,
        why="the status only",
    ),
    Case("another protocol of the same length", b"GET /a HTTQ/1.1\r\nHost: x\r\n\r\n" + NEXT, BAD),
    Case(
        "a preface of HTTP/2",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ([], 505),
        ([b""], 400),
        nginx=BAD,
        why="the status says what to do; h11 takes it for a request and refuses what follows",
    ),
    # Connections
    Case(
        "an upgrade that is not taken",
        post(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 5"),
        BODY,
    ),
    Case("an upgrade with chunks", chunked(CHUNKS, b"Connection: Upgrade", b"Upgrade: h2c"), BODY),
    Case("an upgrade without a body", get(b"Connection: Upgrade", b"Upgrade: websocket"), TWO),
    Case("a request that is the last", get(b"Connection: close"), ([b""], "close")),
    Case(
        "CONNECT",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT,
        ([b""], "close"),
        TWO,
        nginx=BAD,
        why="what follows is meant for somebody else; nginx refuses the method",
    ),
    # Sizes
    Case(
        "a head at the limit",
        get(b"A: " + b"a" * (HEAD_LIMIT - 200)),
        TWO,
        nginx=BAD,
        why="nginx allows 8 KiB for a line",
    ),
    Case(
        "a header that is too large",
        get(b"A: " + b"a" * 70_000),
        ([], 431),
        TWO,
        nginx=BAD,
        why="our limit; h11 counts only heads that are not complete, and nginx allows 8 KiB for a line",
    ),
    Case(
        "a header that never ends",
        b"GET /a HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 2 * HEAD_LIMIT,
        ([], 431),
        nginx=BAD,
        why="the status only, of what exceeds the limit",
    ),
    Case(
        "a name that never ends",
        b"GET /a HTTP/1.1\r\nHost: x\r\n" + b"a" * 2 * HEAD_LIMIT,
        ([], 431),
        nginx=BAD,
        why="the same",
    ),
    Case(
        "a target that never ends",
        b"GET /" + b"a" * 2 * HEAD_LIMIT,
        ([], 431),
        nginx=([], 414),
        why="the same",
    ),
    Case(
        "empty lines that never end",
        b"\r\n" * HEAD_LIMIT,
        ([], 431),
        BAD,
        nginx=([], "open"),
        why="a limit; nginx drops them without one",
    ),
    Case("many headers", get(*[b"A: b"] * (HEADER_LIMIT - 1)), TWO),
    Case("too many headers", get(*[b"A: b"] * HEADER_LIMIT), ([], 431), TWO, nginx=TWO, why="our limit"),
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


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    if NGINX is None:
        pytest.skip("nginx is not installed, so requests are not compared with what it makes of them")
    with open_nginx(tmp_path_factory.mktemp("nginx")) as opened:
        yield opened


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_ambiguous_request_is_understood_in_one_way_however_it_arrives(case: Case) -> None:
    assert fed(case.data, len(case.data)) == case.ours
    for size in (1, 2, 3, 7, 1000, 16 * 1024):
        assert fed(case.data, size) == case.ours, f"{size} bytes at a time"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_h11_understands_the_same_or_the_difference_is_in_the_table(case: Case) -> None:
    assert fed_to_h11(case.data) == (case.ours if case.h11 is None else case.h11)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nginx_understands_the_same_or_the_difference_is_in_the_table(case: Case, nginx: Nginx) -> None:
    expected = case.ours if case.nginx is None else case.nginx
    assert nginx.understand(case.data) == expected, f"{nginx.version}; the table is of {NGINX_VERSION}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_difference_is_one_and_has_a_reason(case: Case) -> None:
    assert case.h11 != case.ours
    assert case.nginx != case.ours
    assert bool(case.why) == case.differs
    if case.ours[0]:
        # Who serves the first request too, sees the same body.
        served = [each[0][0] for each in (case.h11, case.nginx) if each is not None and each[0]]
        assert set(served) <= {case.ours[0][0]}


def test_only_two_versions_of_http_are_served() -> None:
    served = {case.data.split(b"\r\n", 1)[0].rpartition(b" ")[2] for case in CASES if case.ours[0]}
    served -= {b""}  # empty lines in front
    assert served == {b"HTTP/1.0", b"HTTP/1.1"}


def in_words(outcome: Outcome) -> str:
    """Return an outcome as the table in the documentation has it."""
    bodies, then = outcome
    if then == "more":
        return "waits for the rest"
    if not bodies:
        return str(then) if isinstance(then, int) else "ignored"
    return {"open": "served", "close": "served, closed"}.get(str(then), f"served, then {then}")


def test_the_documentation_has_each_difference_and_no_other() -> None:
    rows = ["| request | here | h11 | nginx | why |", "|---|---|---|---|---|"]
    for case in CASES:
        if case.differs:
            h11s, nginxs = case.h11 or case.ours, case.nginx or case.ours
            words = [in_words(outcome) for outcome in (case.ours, h11s, nginxs)]
            assert len(set(words)) > 1, f"the table does not show how {case.name!r} differs"
            rows.append(f"| {case.name} | {' | '.join(words)} | {case.why} |")
    page = (Path(__file__).parents[2] / "docs/security.md").read_text(encoding="utf-8")
    table = page.partition("### Ambiguous requests\n")[2].partition("\n| request |")[2].partition("\n\n")[0]
    assert f"| request |{table}".splitlines() == rows
    assert NGINX_VERSION in page
