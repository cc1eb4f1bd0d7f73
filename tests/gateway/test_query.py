"""What of a query string is passed on."""

from __future__ import annotations

import pytest

from trio_cluster.core.headers import QUERY, QUERY_MAX
from trio_cluster.errors import InvalidRequest
from trio_cluster.gateway.query import forwarded_query
from trio_cluster.http1.parser import RequestParser


@pytest.mark.parametrize(
    "query",
    [
        b"api-version=2024-10-21",
        b"a=1&a=2&&b&=c&d=",
        b"a=%0d%0aHost:%20x&b=%C3%A9+%26",
        b"tokens=5&max_tokens=6&keyword=x&author=y&monkey=z",
        b"a=b=c?/:@!$'()*,;~[]{}|\\^`\"<>",
    ],
)
def test_a_query_is_passed_on_as_it_was_sent(query: bytes) -> None:
    assert forwarded_query(query, "m") == query.decode()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"a=\r\nHost: x", "a=%0D%0AHost:%20x"),
        (b"a=\x00\x7f\t", "a=%00%7F%09"),
        ("a=\u00e9".encode(), "a=%C3%A9"),
        (b"a=1#fragment", "a=1%23fragment"),
    ],
)
def test_bytes_that_no_url_has_are_encoded(query: bytes, expected: str) -> None:
    assert forwarded_query(query, "m") == expected


def test_no_byte_can_end_a_request_line() -> None:
    assert QUERY.fullmatch(forwarded_query(bytes(range(256)).replace(b"&", b""), "m"))


@pytest.mark.parametrize("mark", [bytes([byte]) for byte in range(256)] + [b"\r\n", b"\r\n\r\n"])
def test_whatever_is_taken_for_a_query_stays_in_one_line(mark: bytes) -> None:
    parser = RequestParser()
    parser.feed(b"POST /v1/x?a=" + mark + b"b HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    request = parser.latest
    if parser.refused is not None or request.version != "1.1":
        return  # the gateway refuses the version 0.9
    query = forwarded_query(request.target.partition(b"?")[2], "m")
    assert query == "a=" + mark.decode().replace("#", "%23") + "b"


@pytest.mark.parametrize(
    "name",
    [
        "key",
        "KEY",
        "api-key",
        "api_key",
        "apikey",
        "x-api-key",
        "k%65y",
        "subscription-key",
        "access_token",
        "token",
        "authorization",
        "password",
        "client_secret",
    ],
)
def test_keys_are_not_passed_on(name: str) -> None:
    assert forwarded_query(f"a=1&{name}=secret&b=2".encode(), "m") == "a=1&b=2"
    assert forwarded_query(name.encode(), "m") == ""


@pytest.mark.parametrize("query", [b"model=m", b"mod%65l=m", b"a=1&model=m&b=2", b"Model=m"])
def test_the_name_of_the_model_stays_in_the_body(query: bytes) -> None:
    assert "odel" not in forwarded_query(query, "m")


@pytest.mark.parametrize("query", [b"model=other", b"model", b"model=", b"model=m&mod%65l=other"])
def test_another_model_is_refused(query: bytes) -> None:
    with pytest.raises(InvalidRequest, match="another model") as refused:
        forwarded_query(query, "m")
    assert (refused.value.status, refused.value.param) == (400, "model")


def test_a_query_is_bounded() -> None:
    assert len(forwarded_query(b"a" * QUERY_MAX, "m")) == QUERY_MAX
    for query in (b"a" * (QUERY_MAX + 1), b"\xff" * (QUERY_MAX // 2)):
        with pytest.raises(InvalidRequest) as refused:
            forwarded_query(query, "m")
        assert refused.value.status == 414
