"""A body that has been checked is not checked again, and the same request is made of it."""

from __future__ import annotations

import json
import sys
from typing import Any

import attrs
import pytest
from described import fitting
from hypothesis import given, strategies as st
from openai_answers import FORM, LEAST, form
from openai_drawn import EXAMPLES, form_parts, named, schema_of

from trio_cluster.errors import InvalidRequest
from trio_cluster.openai import ENDPOINTS, Endpoint, FormReader, ModelRequest, endpoint_named

JSON = "application/json"


def contents(request: ModelRequest) -> tuple[type, str]:
    """Return all that is in a request. As text, in which 1, 1.0 and true differ."""
    return type(request), repr(attrs.asdict(request))


def assert_same(endpoint: Endpoint, body: bytes, content_type: str) -> None:
    request = endpoint.parse(body, content_type, {"x": "y"})
    assert contents(endpoint.parse(body, content_type, {"x": "y"}, checked=True)) == contents(request)


@pytest.mark.parametrize("name", named(with_form=False))
@given(data=st.data())
@EXAMPLES
def test_the_same_request_is_made_of_a_checked_body(name: str, data: st.DataObject) -> None:
    endpoint = ENDPOINTS[name]
    assert_same(endpoint, json.dumps(data.draw(fitting(schema_of(endpoint)))).encode(), JSON)


@pytest.mark.parametrize("name", named(with_form=True))
@given(data=st.data())
@EXAMPLES
def test_the_same_request_is_made_of_a_checked_form(name: str, data: st.DataObject) -> None:
    endpoint = ENDPOINTS[name]
    fields, files = data.draw(form_parts(endpoint))
    body = form(*fields, *files)
    assert_same(endpoint, body, FORM)

    def read() -> Any:
        reader = FormReader(FORM)
        reader.feed(body)
        return reader.finish()

    assert endpoint.parse_form is not None
    checked = endpoint.parse_form(read(), {}, checked=True)
    assert contents(checked) == contents(endpoint.parse_form(read(), {}))


#: Values that are read into something else, which few of the drawn ones are.
CONVERTED: list[tuple[str, dict[str, Any]]] = [
    ("chat.completions", {"temperature": 1, "top_p": 1, "logit_bias": {"1": 5}, "stop": ["a"], "user": None}),
    ("completions", {"prompt": ["one"], "logprobs": 2, "best_of": 2, "suffix": "s"}),
    ("completions", {"prompt": [[1, 2], [3]], "max_tokens": 0}),
    ("embeddings", {"input": "a"}),
    ("embeddings", {"input": ["a", "b"]}),
    ("embeddings", {"input": [1, 2]}),
    ("embeddings", {"input": [[1, 2], [3]]}),
    ("audio.speech", {"voice": {"id": "v"}, "speed": 1}),
    ("rerank", {"documents": ["a", {"text": "b", "id": 1}], "return_documents": True}),
    ("moderations", {"input": ["a", "b"]}),
    ("moderations", {"input": [{"type": "text", "text": "a"}]}),
    ("responses", {"instructions": "i", "max_output_tokens": 5, "reasoning": {"effort": "low"}, "background": False}),
    ("responses", {"tools": [{"type": "function", "name": "f", "strict": None}], "tool_choice": "auto"}),
    ("responses", {"tool_choice": {"type": "function", "name": "f"}}),
    ("responses", {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
        {"type": "function", "name": "f"}]}}),
    ("responses", {"text": {"verbosity": "low", "format": {"type": "json_schema", "name": "n", "schema": {}}}}),
    ("responses", {"include": ["message.output_text.logprobs"], "text": {"format": None}}),
    ("responses", {"input": [
        {"role": "user", "content": [
            {"type": "input_text", "text": "a"},
            {"type": "input_image", "image_url": "u", "detail": "low"},
            {"type": "input_file", "file_data": "d", "filename": "f"},
            {"type": "input_audio", "input_audio": {"data": "d", "format": "wav"}},
        ]},
        {"type": "reasoning", "summary": [{"text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"role": "assistant", "content": [
            {"type": "output_text", "text": "x"}, {"type": "output_text", "text": "y"}]},
        {"type": "function_call_output", "call_id": "c", "output": "o"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"type": "reasoning", "content": [{"text": "cut"}]},
    ]}),
    ("messages", {
        "system": [{"type": "text", "text": "a"}],
        "tools": [{"name": "f", "input_schema": {}}, {"type": "bash_20250124"}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "stop_sequences": ["x"], "temperature": 1,
        "metadata": {"user_id": "u"},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
        "messages": [
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}]},
        ],
    }),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), CONVERTED)
def test_a_checked_body_is_converted_like_any_other(name: str, fields: dict[str, Any]) -> None:
    assert_same(ENDPOINTS[name], json.dumps(LEAST[name] | fields).encode(), JSON)


def test_a_checked_form_is_converted_like_any_other() -> None:
    fields = [
        ("model", "m"), ("temperature", "1"), ("stream", "TRUE"), ("language", ""), ("include[]", "logprobs"),
        ("chunking_strategy", '{"type": "server_vad"}'), ("timestamp_granularities[0]", "word"),
    ]  # fmt: skip
    assert_same(ENDPOINTS["audio.transcriptions"], form(*fields, ("file", "a.wav", b"RIFF")), FORM)
    images = [("image[]", "a.png", b"1"), ("image", "b.png", b"2"), ("mask", "m.png", b"3")]
    fields = [("model", "m"), ("prompt", "p"), ("n", "2"), ("stream", "0"), ("output_compression", "7")]
    assert_same(ENDPOINTS["images.edits"], form(*fields, *images), FORM)


def test_a_checked_request_to_a_custom_route_is_the_same() -> None:
    custom = endpoint_named("/v1/own")
    assert_same(custom, b'{"model":"m","stream":true,"a":[1]}', JSON)
    assert_same(custom, form(("model", "m"), ("stream", "true"), ("f", "f.bin", b"x")), FORM)


def test_a_checked_body_is_not_checked_again() -> None:
    body = json.dumps(LEAST["chat.completions"] | {"temperature": 9, "stream": "yes"}).encode()
    chat = ENDPOINTS["chat.completions"]
    with pytest.raises(InvalidRequest):
        chat.parse(body, JSON, {})
    request: Any = chat.parse(body, "text/plain", {}, checked=True)
    assert (request.temperature, request.stream) == (9.0, "yes")


def test_a_checked_form_is_not_checked_again() -> None:
    body = form(("model", "m"), ("prompt", "p"), ("n", "99"), ("stream", "1"), ("image", "a.png", b""))
    edits = ENDPOINTS["images.edits"]
    with pytest.raises(InvalidRequest):
        edits.parse(body, FORM, {})
    request: Any = edits.parse(body, FORM, {}, checked=True)
    assert (request.n, request.images) == (99, [b""])


def test_a_checked_body_that_is_no_json_is_still_the_clients_error() -> None:
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        ENDPOINTS["chat.completions"].parse(b"{", JSON, {}, checked=True)


def test_a_checked_chat_is_read_in_a_few_calls() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"hello"}],"stream":true}'
    calls = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    earlier = sys.getprofile()
    sys.setprofile(note)
    try:
        ENDPOINTS["chat.completions"].parse(body, JSON, {}, checked=True)
    finally:
        sys.setprofile(earlier)
    # The reader, the JSON, its fields, and the request; before, each field was checked by a call or several.
    assert len(calls) <= 5, calls
