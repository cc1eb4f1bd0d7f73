"""Routes that the OpenAI API does not have: their paths, their requests, and their answers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from openai_answers import FORM, form

from trio_cluster.errors import ApiError, InvalidRequest
from trio_cluster.openai import ENDPOINTS, CustomRequest, OutputChunk, custom_path, endpoint_named

PATH = "/v1/tokenize"


def parse(body: bytes, content_type: str = "application/json") -> CustomRequest:
    request: CustomRequest = endpoint_named(PATH).parse(body, content_type, {"x-a": "b"})
    return request


def answer(values: list[Any], *, stream: bool = False) -> tuple[str, bytes]:
    """Return content type and body of an answer."""
    request = CustomRequest(model="m", path=PATH, stream=stream)
    writer = endpoint_named(PATH).encoder(request, response_id="abc", created=0)
    body = b"".join([writer.encode(value) for value in values]) + writer.finish()
    return writer.head.content_type, body


@pytest.mark.parametrize(
    ("path", "known"), [(PATH, PATH), ("/v1/a/b-c.d/", "/v1/a/b-c.d"), ("/v1/messages/x",) * 2]
)
def test_a_path_is_known_without_a_slash_at_its_end(path: str, known: str) -> None:
    assert custom_path(path) == known


@pytest.mark.parametrize(
    "path",
    [
        "tokenize",
        "/tokenize",
        "/v2/tokenize",
        "/v1",
        "/v1/",
        "/v1//",
        "/v1//x",
        "/v1/a?b=c",
        "/v1/a#b",
        "/v1/a%20b",
        "/v1/a b",
        "/v1/ä",
        "/v1/a\n",
        "/v1/" + "a" * 256,
        None,
        b"/v1/a",
    ],
)
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match="the path of a route"):
        custom_path(path)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/x", *(f"/v1{each.path}" for each in ENDPOINTS.values())]
)
def test_the_apis_own_routes_cannot_be_taken(path: str) -> None:
    with pytest.raises(ValueError, match="is a route of the API already"):
        custom_path(path)


def test_an_endpoint_has_a_name_or_a_path() -> None:
    assert endpoint_named("embeddings") is ENDPOINTS["embeddings"]
    assert (endpoint_named(PATH).name, endpoint_named(PATH).path) == (PATH, "/tokenize")
    with pytest.raises(KeyError):
        endpoint_named("tokenize")


def test_a_request_in_json_is_passed_on_as_it_is() -> None:
    body = b'{"model": "m", "text": "hi", "stream": true}'
    request = parse(body)
    assert (request.model, request.path, request.stream, request.files) == ("m", PATH, True, {})
    assert request.raw == {"model": "m", "text": "hi", "stream": True}
    assert (request.body, request.content_type, request.headers) == (body, "application/json", {"x-a": "b"})
    assert not parse(b'{"model": "m", "stream": "yes"}').stream


def test_a_request_in_a_form_has_its_files() -> None:
    body = form(
        ("model", "m"), ("stream", "true"), ("n", "2"), ("file", "a.bin", b"abc"), ("file", "b.bin", b"")
    )
    request = parse(body, FORM)
    assert (request.model, request.stream) == ("m", True)
    assert request.raw == {"model": "m", "stream": "true", "n": "2"}
    assert request.files == {"file": [b"abc", b""]}
    assert request.body == body


@pytest.mark.parametrize(
    ("body", "content_type", "status", "param"),
    [
        (b"{}", "application/json", 400, "model"),
        (b'{"model": null}', "application/json", 400, "model"),
        (b'{"model": 1}', "application/json", 400, "model"),
        (b'{"model": ""}', "application/json", 400, "model"),
        (b"[]", "application/json", 400, None),
        (b"x", "application/json", 400, None),
        (b'{"model": "m"}', "text/plain", 415, None),
        (form(("a", "b")), FORM, 400, "model"),
        (form(("model", "a"), ("model", "b")), FORM, 400, "model"),
        (b"x", FORM, 400, None),
    ],
)
def test_a_request_that_names_no_model_is_refused(
    body: bytes, content_type: str, status: int, param: str | None
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(body, content_type)
    assert (caught.value.status, caught.value.param) == (status, param)


@pytest.mark.parametrize(
    ("values", "content_type", "body"),
    [
        ([{"tokens": [1, 2]}], "application/json", b'{"tokens":[1,2]}'),
        ([{"a": 1}, OutputChunk.json({"b": np.arange(2)})], "application/json", b'{"a":1,"b":[0,1]}'),
        ([], "application/json", b"{}"),
        (["one ", "two"], "text/plain; charset=utf-8", b"one two"),
        ([b"ab", b"c"], "application/octet-stream", b"abc"),
        ([OutputChunk.data(b"<a/>", "text/xml"), b"<b/>"], "text/xml", b"<a/><b/>"),
        ([OutputChunk.data(b"[1]", "application/json")], "application/json", b"[1]"),
        ([OutputChunk.image(b"x", "image/png")], "image/png", b"x"),
        ([{"a": 1}, OutputChunk.usage(3, 4)], "application/json", b'{"a":1}'),
    ],
)
def test_an_answer_is_objects_or_text_or_bytes(values: list[Any], content_type: str, body: bytes) -> None:
    assert answer(values) == (content_type, body)


def test_objects_and_texts_are_events_in_a_stream() -> None:
    content_type, body = answer([{"a": 1}, "two", {"b": 3}], stream=True)
    assert content_type == "text/event-stream"
    *events, done, end = body.split(b"\n\n")
    assert [json.loads(each.removeprefix(b"data: ")) for each in events] == [
        {"a": 1},
        {"text": "two"},
        {"b": 3},
    ]
    assert (done, end) == (b"data: [DONE]", b"")
    assert answer([], stream=True)[1] == b"data: [DONE]\n\n"


def test_bytes_are_sent_as_they_come_whether_a_stream_was_wanted_or_not() -> None:
    for stream in (True, False):
        request = CustomRequest(model="m", path=PATH, stream=stream)
        writer = endpoint_named(PATH).encoder(request, response_id="abc", created=0)
        assert writer.streaming
        assert [writer.encode(b"ab"), writer.encode(b"c")] == [b"ab", b"c"]
        assert writer.streaming
        assert writer.finish() == b""
        assert writer.head.content_type == "application/octet-stream"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("values", [[{"a": 1}, b"x"], [b"x", {"a": 1}], ["x", b"x"], [b"x", "x"]])
def test_bytes_do_not_go_together_with_anything_else(values: list[Any], stream: bool) -> None:
    with pytest.raises(TypeError, match="cannot go on with"):
        answer(values, stream=stream)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"a": float("nan")}, ValueError),
        ({"a": object()}, TypeError),
        (["x"], TypeError),
        (None, TypeError),
        (OutputChunk.final_text("x"), TypeError),
        (OutputChunk.embedding([0.5]), TypeError),
        (OutputChunk.error("c", "m", 418), ApiError),
    ],
)
def test_what_is_no_answer_is_the_handlers_failure(value: Any, error: type[Exception]) -> None:
    for stream in (True, False):
        with pytest.raises(error):
            answer([value], stream=stream)
    with pytest.raises(TypeError, match="of objects cannot go on with text"):
        answer([{"a": 1}, "x"])
