"""Random requests, from valid ones to bytes that are not HTTP, drawn from the API's own description.

A request is bytes, and what it may be answered with. What it may never be answered with, 500 among others, the test
knows that sends it.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from typing import Any, Final

import attrs
from described import ODD, deep, fits, fitting, json_values, nearly_fitting
from hypothesis import strategies as st
from obliging import MODELS, ODD_MODEL, OWN_ROUTE, RAW_MODEL

from trio_cluster.admin.description import description
from trio_cluster.openai import ENDPOINTS, Endpoint

__all__ = ["LARGEST", "Sent", "anywhere", "asked", "garbled", "requests"]

#: What the server under test takes, and what it needs not to.
LARGEST: Final = 1 << 19

_PATHS: Final[Mapping[str, Any]] = json.loads(description(False))["paths"]
_BOUNDARY: Final = "--=tc'()+_,./:=?"
_FORM: Final = f'multipart/form-data; boundary="{_BOUNDARY}"'


@attrs.frozen
class Sent:
    """One request.

    Attributes:
        data: all of it.
        cuts: the sizes of the pieces in which it is sent; what is left over is the last one.
        allowed: the statuses that are right for it; empty: any but those that never are.
        bodiless: an answer to it has no body.
        request_id: what is to be in the answer, if anything.
        leaves_after: so many bytes are sent before the client leaves, if it does.
        reads: so many bytes of the answer are read before the client leaves, if it does.
        is_impatient: the time that it gives its answer is none, so that one which has begun may be cut off.
        is_raw: it need not be HTTP, and may be none, one or several requests.
    """

    data: bytes
    cuts: tuple[int, ...] = ()
    allowed: frozenset[int] = frozenset()
    bodiless: bool = False
    request_id: str | None = None
    leaves_after: int | None = None
    reads: int | None = None
    is_impatient: bool = False
    is_raw: bool = False

    def pieces(self) -> list[bytes]:
        """Return what is sent, piece by piece."""
        pieces, left = [], self.data
        for size in self.cuts:
            pieces.append(left[:size])
            left = left[size:]
        return [piece for piece in [*pieces, left] if piece]


# Heads

_QUIET: Final = st.sampled_from(
    [
        (b"accept", b"*/*"),
        (b"accept", b"\xff\xfe"),
        (b"accept-encoding", b"gzip, br"),
        (b"authorization", b"Bearer \x80\xff"),
        (b"authorization", b"Basic Og=="),
        (b"connection", b"keep-alive"),
        (b"connection", b"close"),
        (b"content-encoding", b"identity"),
        (b"cookie", b"a=b; " * 50),
        (b"expect", b"100-continue"),
        (b"openai-organization", b"x" * 2000),
        (b"te", b"trailers"),
        (b"user-agent", b""),
        (b"x-forwarded-for", b"::1, unknown"),
        (b"x-stainless-read-timeout", b"600"),
        (b"x-stainless-read-timeout", b"nan"),
        (b"x-request-timeout", b"100"),
        (b"x-tab", b"a\tb"),
    ]
)
_NO_TIME: Final = b"0.0000001"
_ODD_HEADERS: Final = st.sampled_from(
    [
        (b"x-request-timeout", b"0"),
        (b"x-request-timeout", b"-1"),
        (b"x-request-timeout", b"1e9"),
        (b"x-request-timeout", b"inf"),
        (b"x-request-timeout", b"9" * 400),
        (b"x-request-timeout", _NO_TIME),
        (b"x-stainless-read-timeout", _NO_TIME),
        (b"upgrade", b"websocket"),
        (b"upgrade", b"h2c"),
        (b"connection", b"upgrade"),
        (b"origin", b"https://example.com"),
        (b"access-control-request-method", b"POST"),
        (b"host", b"two.example"),
        (b"host", b"a b"),
        (b"content-encoding", b"gzip"),
        (b"expect", b"a miracle"),
        (b"range", b"bytes=0-"),
        (b"x-http-method-override", b"DELETE"),
        (b"transfer-encoding", b"gzip"),
        (b"content-length", b"5"),
    ]
)
_REQUEST_IDS: Final = st.none() | st.sampled_from(["r", "a b", "%00", "x" * 128])


def _head(method: str, target: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    lines = [method.encode("latin-1") + b" " + target + b" HTTP/1.1", b"host: localhost"]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


@st.composite
def _framed(
    draw: st.DrawFn,
    method: str,
    target: bytes,
    headers: list[tuple[bytes, bytes]],
    body: bytes,
    allowed: frozenset[int],
) -> Sent:
    """Put a body into one piece or into chunks, and all of it into pieces."""
    request_id = draw(_REQUEST_IDS)
    headers = [*headers]
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    if body and draw(st.booleans()):
        headers.append((b"transfer-encoding", b"chunked"))
        sizes = draw(st.lists(st.integers(1, max(1, len(body))), max_size=3))
        body = _chunked(body, sizes)
    elif body or method == "POST":
        headers.append((b"content-length", b"%d" % len(body)))
    data = _head(method, target, headers) + body
    cuts = draw(st.just(()) | st.lists(st.integers(1, len(data)), max_size=4).map(tuple))
    leaves_after = reads = None
    match draw(st.integers(0, 9)):
        case 0:
            leaves_after = draw(st.integers(0, len(data) - 1))
        case 1:
            reads = draw(st.integers(0, 1000))
    is_impatient = any(value == _NO_TIME for _, value in headers)
    return Sent(data, cuts, allowed, method == "HEAD", request_id, leaves_after, reads, is_impatient)


def _chunked(body: bytes, sizes: list[int]) -> bytes:
    pieces = []
    for size in sizes:
        pieces.append(body[:size])
        body = body[size:]
    return (
        b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, body] if piece) + b"0\r\n\r\n"
    )


# Questions to models


def _models(endpoint: Endpoint) -> st.SearchStrategy[tuple[Any, frozenset[int]]]:
    """Names, and what a request that is right in all else may get for them."""
    kind = endpoint.optional or endpoint.kind
    right = [MODELS[kind], RAW_MODEL, *([ODD_MODEL] if kind == "chat" else [])]
    wrong = sorted(set(MODELS.values()) - {MODELS[kind]})
    good = st.sampled_from(right).map(lambda name: (name, frozenset({200})))
    bad = (
        st.sampled_from(wrong).map(lambda name: (name, frozenset({400})))
        | st.text(min_size=1).map(lambda name: (name, frozenset({200, 400, 404})))
        | st.sampled_from(ODD).map(lambda name: (name, frozenset({400, 404})))
    )
    return st.integers(0, 4).flatmap(lambda number: good if number else bad)


def _dumped(value: Any) -> st.SearchStrategy[bytes]:
    # What is not ASCII may be escaped or not; both are JSON.
    return st.booleans().map(
        lambda escaped: json.dumps(value, ensure_ascii=escaped).encode("utf-8", "replace")
    )


def _garbage(text: bytes) -> st.SearchStrategy[bytes]:
    """Bodies that are no JSON object, or not the one that was meant."""
    return st.one_of(
        st.binary(max_size=40),
        st.integers(0, len(text)).map(lambda size: text[:size]),
        st.sampled_from(
            [
                b"",
                b"\xef\xbb\xbf" + text,
                text.decode().encode("utf-16"),
                text + text,
                text[:-1] + b',"model":"chat","model":null}',
                text[:-1] + b',"temperature":NaN}',
                text[:-1] + b',"temperature":1e999}',
                text[:-1] + b',"seed":' + b"9" * 5000 + b"}",
                text[:-1] + b',"user":"\\ud800"}',
                text[:-1] + b',"user":"\xff"}',
                text[:-1] + b',"more":' + deep(900) + b"}",
                text[:-1] + b',"more":' + deep(20_000) + b"}",
                text[:-1] + b',"messages":' + deep(20_000, "object") + b"}",
                text[:-1] + b',"more":"' + b"x" * LARGEST + b'"}',
                deep(100_000),
                b"[" + text + b"]",
                json.dumps(text.decode()).encode(),
                b"a=b&model=chat",
            ]
        ),
        json_values().map(lambda value: json.dumps(value).encode()),
    )


_TYPES: Final = st.sampled_from(
    [b"application/json", b"application/json; charset=utf-8", b"APPLICATION/JSON", b"application/x+json"]
)
_ODD_TYPES: Final = st.sampled_from(
    [
        b"",
        b"text/plain",
        b"application/x-www-form-urlencoded",
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=\xff\xfe",
        b"multipart/form-data; boundary=" + b"b" * 3000,
        b"multipart/form-data; boundary*=utf-8''x",
        b"multipart/mixed; boundary=x",
        b'application/json; "',
        b"\xc3\xa9",
        b";;;",
    ]
)


@st.composite
def asked(draw: st.DrawFn) -> Sent:
    """Draw a request to a model."""
    endpoint = draw(st.sampled_from(sorted(ENDPOINTS.values(), key=lambda each: each.name)))
    content = _PATHS[f"/v1{endpoint.path}"]["post"]["requestBody"]["content"]
    (media_type,) = content
    schema = content[media_type]["schema"]
    model, allowed = draw(_models(endpoint))
    route = draw(st.sampled_from([endpoint.path, "/tokenize"])) if model == RAW_MODEL else endpoint.path
    path = draw(st.sampled_from(["/v1", ""])) + route + draw(st.sampled_from(["", "", "/", "?a=b&c=%20"]))
    care = draw(st.sampled_from(["fits", "fits", "fits", "nearly", "garbage"]))
    if media_type == "multipart/form-data":
        body = draw(_forms(schema, model, care))
        content_type = _FORM.encode()
    else:
        value = draw(nearly_fitting(schema) if care == "nearly" else fitting(schema))
        if care == "fits" and draw(st.booleans()) and fits(schema).is_valid(value | {"stream": True}):
            value["stream"] = True
        if isinstance(value, dict) and "model" in value:
            value["model"] = model
        if endpoint.name == "completions" and isinstance(value, dict) and value.get("echo") and allowed:
            # Prompts of token ids cannot be echoed, which the schema does not say.
            allowed |= {400}
        if (
            endpoint.name == "completions"
            and isinstance(value, dict)
            and isinstance(value.get("prompt"), list)
        ):
            # Prompts are answered one after the other, which may take longer than a drawn timeout.
            allowed = allowed and allowed | {504}
        if endpoint.name == "responses" and _refers_to_what_is_stored(value):
            allowed = allowed and allowed | {400, 404}
        body = draw(_dumped(value))
        if care == "garbage":
            body = draw(_garbage(body))
        content_type = draw(_TYPES)
    if care != "fits":
        allowed |= {200, 400, 404, 413}
    if draw(st.integers(0, 9)) == 0:
        content_type = draw(_ODD_TYPES)
        allowed |= {200, 400, 404, 415}
    headers = [(b"content-type", content_type)] if content_type or draw(st.booleans()) else []
    headers += draw(st.lists(_QUIET, max_size=3, unique_by=lambda header: header[0]))
    if draw(st.integers(0, 7)) == 0:
        headers.append(draw(_ODD_HEADERS))
        allowed = frozenset()
    if endpoint.kind == "embedding" and allowed:
        # Models have vectors of some length, and that of these is bounded.
        allowed |= {400}
    if len(body) > LARGEST and allowed:
        allowed |= {413}
    return draw(_framed("POST", path.encode(), headers, body, allowed))


def _refers_to_what_is_stored(value: Any) -> bool:
    """Return whether a request names a response, a conversation or an item of one; there is none by these names."""
    if not isinstance(value, dict):
        return False
    items = value.get("input")
    return bool(
        value.get("previous_response_id") is not None
        or value.get("conversation") is not None
        or (isinstance(items, list) and any(isinstance(item, dict) and "id" in item for item in items))
    )


@st.composite
def _forms(draw: st.DrawFn, schema: dict[str, Any], model: Any, care: str) -> bytes:
    properties = schema["properties"]
    files = [name for name in properties if "contentMediaType" in json.dumps(properties[name])]
    texts = {name: each for name, each in properties.items() if name not in files}
    needed = [name for name in schema["required"] if name not in files]
    only_texts = schema | {"properties": texts, "required": needed, "additionalProperties": False}
    fields = draw(nearly_fitting(only_texts) if care == "nearly" else fitting(only_texts))
    if care == "fits" and draw(st.booleans()) and fits(only_texts).is_valid(fields | {"stream": True}):
        fields["stream"] = True
    parts = []
    for name, value in fields.items() if isinstance(fields, dict) else ():
        each = model if name == "model" else value
        for item in each if isinstance(each, list) else [each]:
            text = item if isinstance(item, str) else json.dumps(item)
            parts.append(_part(name, text.encode("utf-8", "replace")))
    for name in files:
        if name in schema["required"] or draw(st.booleans()):
            data = draw(st.binary(min_size=1, max_size=60) | st.just(b"\r\n--" * 1000))
            parts.append(_part(name, data, draw(st.sampled_from(["a.wav", "\u4e2d", "..\\..", ""]))))
    if care != "fits":
        parts += draw(st.lists(_ODD_PARTS, max_size=2))
    parts = draw(st.permutations(parts))
    body = b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode()
    if care == "garbage":
        body = draw(
            st.integers(0, len(body)).map(lambda size: body[:size])
            | st.binary(max_size=40)
            | st.sampled_from(
                [b"", body + body, b"preamble\r\n" + body, body.replace(b"\r\n", b"\n"), body * 300]
            )
        )
    return body


def _part(name: str, data: bytes, filename: str | None = None) -> bytes:
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'
    if filename is not None:
        head += f'; filename="{filename}"\r\nContent-Type: application/octet-stream'
    return head.encode() + b"\r\n\r\n" + data + b"\r\n"


_ODD_PARTS: Final = st.sampled_from(
    [
        _part("model", b"chat"),
        _part("model[]", b"chat"),
        _part("model[a]", b"chat"),
        _part("file", b"text"),
        _part("file", b""),
        _part("file", b"", "empty"),
        _part("file[0]", b"x", "a"),
        _part("image[]", b"x", "a"),
        _part("stream", b"yes"),
        _part("", b"nothing"),
        _part("x" * 5000, b""),
        _part("temperature", b"1e400"),
        _part("temperature", b"NaN"),
        _part("prompt", b"\xff\xfe"),
        _part("chunking_strategy", deep(5000, "object")),
        _part("large", b"x" * (LARGEST // 4 * 3), "large"),
        _part("larger", b"x" * LARGEST, "larger"),
        f"--{_BOUNDARY}\r\n\r\nno head\r\n".encode(),
        f"--{_BOUNDARY}\r\nContent-Disposition: attachment\r\n\r\n\r\n".encode(),
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="a"\r\nX: {"y" * 9000}\r\n\r\n\r\n'.encode(),
        f"--{_BOUNDARY}\r\nContent-Disposition: form-data; name*=utf-8''%FF\r\n\r\n\r\n".encode(),
    ]
)


# Anything else that may be asked of the server

_METHODS: Final = st.sampled_from(
    ["GET", "GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND", "TRACE"]
)
_QUERIES: Final = st.sampled_from([b"", b"", b"?", b"?a=1&a=2", b"?%00=%ff", b"?\xff", b"?" + b"q" * 3000])


def _segments() -> st.SearchStrategy[bytes]:
    return st.one_of(
        st.text(max_size=8).map(lambda text: urllib.parse.quote(text, safe="").encode()),
        st.text(min_size=1, max_size=8).map(lambda text: urllib.parse.quote(text, safe="/").encode()),
        st.sampled_from(
            [b"%2F", b"%", b"%zz", b"%ff", b"%00", b"..", b".", b"%0d%0a", b"\xc3\xa9", b"{model}"]
        ),
        st.sampled_from(sorted(set(MODELS.values()))).map(str.encode),
        st.just(urllib.parse.quote(ODD_MODEL, safe="").encode()),
    )


@st.composite
def anywhere(draw: st.DrawFn) -> Sent:
    """Draw a request with any method to any path, described or not."""
    path = draw(st.sampled_from([*_PATHS, OWN_ROUTE, "/v1/nobody/knows"])).encode()
    while b"{" in path:
        before, _, rest = path.partition(b"{")
        path = before + draw(_segments()).replace(b"{", b"") + rest.partition(b"}")[2]
    path = draw(
        st.just(path)
        | st.just(path.removeprefix(b"/v1"))
        | st.just(path + b"/")
        | st.just(b"/" + path)
        | st.just(b"http://elsewhere.example" + path)
        | _segments().map(lambda segment: path + b"/" + segment)
        | st.just(b"*")
    )
    method = draw(_METHODS)
    headers = draw(st.lists(_QUIET | _ODD_HEADERS, max_size=3, unique_by=lambda header: header[0]))
    body = b""
    if method in ("POST", "PUT", "PATCH"):
        body = draw(st.binary(max_size=20) | json_values().map(lambda value: json.dumps(value).encode()))
        headers.append((b"content-type", draw(_TYPES | _ODD_TYPES)))
    return draw(_framed(method, (path or b"/") + draw(_QUERIES), headers, body, frozenset()))


@st.composite
def garbled(draw: st.DrawFn) -> Sent:
    """Draw something that is no longer HTTP, for the most part; the client says no more after it."""
    sent = draw(asked() | anywhere())
    data = bytearray(sent.data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, min(len(data), 400) - 1)))
        junk = draw(
            st.binary(min_size=1, max_size=3) | st.sampled_from([b"\r\n", b"\r\n\r\n", b"\x00", b" ", b":"])
        )
        data[place : place + draw(st.integers(0, 3))] = junk
    whole = draw(
        st.just(bytes(data))
        | st.sampled_from(
            [
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01",
                b"GET / HTTP/3.0\r\n\r\n",
                b"GET /health\r\n\r\n",
                b"GET /health HTTP/1.0\r\n\r\n",
                b"GET /health HTTP/1.1\r\n\r\n",
                b"GET /" + b"a" * 70_000,
                b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000,
                b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
                b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n\r\n",
                b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
                b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n",
                b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999\r\n\r\n{}",
            ]
        )
    )
    return Sent(whole, sent.cuts, is_impatient=sent.is_impatient, is_raw=True)


def requests() -> st.SearchStrategy[Sent]:
    """Return a strategy for all of these."""
    return asked() | asked() | asked() | anywhere() | garbled()
