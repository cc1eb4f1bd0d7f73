"""What each route takes and what it refuses, field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from example_counts import examples
from hypothesis import given, settings, strategies as st
from openai_answers import LEAST, refused, send

from trio_cluster.errors import InvalidRequest
from trio_cluster.openai import ENDPOINTS

NOT_STRINGS: list[Any] = [1, True, ["x"], {}]
NOT_NUMBERS: list[Any] = ["1", True, [1], {}]
NOT_INTEGERS: list[Any] = [1.0, "1", True, [1]]
NOT_BOOLEANS: list[Any] = [0, 1, "true", []]
NOT_OBJECTS: list[Any] = [1, "x", True, []]
NOT_LISTS: list[Any] = [1, "x", True, {}]

TEXT_FIELDS: dict[str, tuple[list[Any], list[Any]]] = {
    # field: (what is refused, what is taken)
    "model": ([*NOT_STRINGS, ""], ["x"]),
    "stream": (NOT_BOOLEANS, [True, False]),
    "temperature": ([*NOT_NUMBERS, -0.1, 2.1, 10**4000], [0, 2, 0.5]),
    "top_p": ([*NOT_NUMBERS, -0.1, 1.1], [0, 1, 0.5]),
    "n": ([*NOT_INTEGERS, 0, 129], [1, 128]),
    "stop": ([1, True, {}, [1]], ["x", [], ["a"] * 4, ["a"] * 50]),
    "max_tokens": ([*NOT_INTEGERS, 0, -1], [1, 10**6]),
    "presence_penalty": ([*NOT_NUMBERS, -2.1, 2.1], [-2, 2]),
    "frequency_penalty": ([*NOT_NUMBERS, -2.1, 2.1], [-2, 2]),
    "logit_bias": ([*NOT_OBJECTS, {"1": "x"}, {"1": 101}, {"1": True}], [{}, {"1": -100, "2": 100}]),
    "seed": ([*NOT_INTEGERS, 2**63], [-5, 2**63 - 1]),
    "user": (NOT_STRINGS, ["x"]),
}

FIELDS: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    "chat.completions": TEXT_FIELDS
    | {
        "messages": ([*NOT_LISTS, []], []),
        "max_completion_tokens": ([*NOT_INTEGERS, 0], [1]),
        "logprobs": (NOT_BOOLEANS, [True]),
        "tools": ([*NOT_LISTS], [[], [{"type": "function", "function": {"name": "f", "parameters": {}}}]]),
        "tool_choice": ([1, True, [], "any"], ["none", "auto", "required"]),
        "parallel_tool_calls": (NOT_BOOLEANS, [True]),
        "functions": ([*NOT_LISTS, []], [[{"name": "f"}]]),
        "response_format": (NOT_OBJECTS, [{"type": "text"}, {"type": "json_object"}]),
        "reasoning_effort": (NOT_STRINGS, ["low"]),
        "service_tier": (NOT_STRINGS, ["auto"]),
        "verbosity": ([*NOT_STRINGS, "loud"], ["low"]),
        "modalities": (NOT_LISTS, [["text"]]),
        "audio": (NOT_OBJECTS, [{"voice": "v"}]),
        "prediction": (NOT_OBJECTS, [{}]),
        "web_search_options": (NOT_OBJECTS, [{}]),
        "metadata": ([*NOT_OBJECTS, {"a": 1}, {"a" * 65: "x"}, {"a": "x" * 513}], [{"a": "b"}]),
        "store": (NOT_BOOLEANS, [False]),
        "prompt_cache_key": (NOT_STRINGS, ["x"]),
        "safety_identifier": (NOT_STRINGS, ["x"]),
    },
    "completions": TEXT_FIELDS
    | {
        "max_tokens": ([*NOT_INTEGERS, -1], [0, 1, 10**6]),
        "prompt": (
            [1, True, {}, [], ["a", 1], [1, "a"], [[]], [[1], "a"], [-1], [True], [None], ["x"] * 1025],
            ["", "x", ["x"], ["a", "b"], [1, 2], [[1], [2, 3]]],
        ),
        "logprobs": ([*NOT_INTEGERS, -1, 6], [0, 5]),
        "best_of": ([*NOT_INTEGERS, 0, 21], [1]),
        "echo": (NOT_BOOLEANS, [True]),
        "suffix": (NOT_STRINGS, ["x"]),
    },
    "responses": {
        "model": ([*NOT_STRINGS, ""], ["x"]),
        "input": ([1, True, {}, [], ["x"], [1]], ["", "x", [{"role": "user", "content": "x"}]]),
        "instructions": (NOT_STRINGS, ["", "x"]),
        "stream": (NOT_BOOLEANS, [True, False]),
        "temperature": ([*NOT_NUMBERS, -0.1, 2.1], [0, 2, 0.5]),
        "top_p": ([*NOT_NUMBERS, -0.1, 1.1], [0, 1, 0.5]),
        "max_output_tokens": ([*NOT_INTEGERS, 0], [1]),
        "max_tool_calls": ([*NOT_INTEGERS, 0], [1]),
        "top_logprobs": ([*NOT_INTEGERS, -1, 21], [0, 20]),
        "tools": (NOT_LISTS, [[], [{"type": "function", "name": "f"}]]),
        "tool_choice": (
            [1, True, [], "any"],
            ["none", "auto", "required", {"type": "function", "name": "f"}],
        ),
        "parallel_tool_calls": (NOT_BOOLEANS, [False]),
        "text": (NOT_OBJECTS, [{}, {"format": {"type": "text"}, "verbosity": "low"}]),
        "reasoning": (NOT_OBJECTS, [{}, {"effort": "low", "summary": "auto"}]),
        "include": ([*NOT_LISTS, [1]], [[], ["reasoning.encrypted_content"]]),
        "truncation": ([*NOT_STRINGS, "middle"], ["auto", "disabled"]),
        "metadata": ([*NOT_OBJECTS, {"a": 1}], [{"a": "b"}]),
        "store": (NOT_BOOLEANS, [True, False]),
        "service_tier": (NOT_STRINGS, ["auto"]),
        "prompt_cache_key": (NOT_STRINGS, ["x"]),
        "safety_identifier": (NOT_STRINGS, ["x"]),
        "user": (NOT_STRINGS, ["x"]),
        "previous_response_id": ([*NOT_STRINGS, ""], ["resp_1"]),
        "conversation": ([1, True, "", {}, {"id": 1}, {"id": ""}, ["conv_1"]], ["conv_1", {"id": "conv_1"}]),
        "prompt": ([{"id": "pmpt_1"}], []),
        "background": ([True, 0], [False]),
    },
    "messages": {
        "model": ([*NOT_STRINGS, ""], ["x"]),
        "messages": (
            [1, True, {}, [], ["x"], [{"role": "tool", "content": "x"}]],
            [[{"role": "user", "content": "x"}]],
        ),
        "max_tokens": ([*NOT_INTEGERS, 0], [1, 10**6]),
        "system": ([1, True, {}, ["x"]], ["", "x", [], [{"type": "text", "text": "x"}]]),
        "stream": (NOT_BOOLEANS, [True, False]),
        "stop_sequences": ([*NOT_LISTS, [1]], [[], ["x"] * 9]),
        "temperature": ([*NOT_NUMBERS, -0.1, 1.1], [0, 1, 0.5]),
        "top_p": ([*NOT_NUMBERS, -0.1, 1.1], [0, 1, 0.5]),
        "top_k": ([*NOT_INTEGERS, -1], [0, 40]),
        "tools": (
            [*NOT_LISTS, [{"name": "f"}], [{"name": "", "input_schema": {}}]],
            [[], [{"name": "f", "input_schema": {}}]],
        ),
        "tool_choice": (
            [*NOT_OBJECTS, {"type": "tool"}, {"type": "required"}],
            [{"type": "any"}, {"type": "tool", "name": "f"}],
        ),
        "thinking": ([*NOT_OBJECTS, {}], [{"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}]),
        "output_config": ([*NOT_OBJECTS, {"format": {"type": "text"}}], [{"effort": "low"}]),
        "metadata": ([*NOT_OBJECTS, {"user_id": 1}], [{}, {"user_id": "u", "more": 1}]),
        "service_tier": (NOT_STRINGS, ["auto"]),
    },
    "embeddings": {
        "model": ([*NOT_STRINGS, ""], ["x"]),
        "input": ([1, True, {}, "", [], ["x"] * 2049], ["x", ["x", "y"], [1, 2], [[1], [2, 3]]]),
        "dimensions": ([*NOT_INTEGERS, 0], [1]),
        "encoding_format": ([*NOT_STRINGS, "hex"], ["float", "base64"]),
        "user": (NOT_STRINGS, ["x"]),
    },
    "audio.speech": {
        "model": ([*NOT_STRINGS, ""], ["x"]),
        "input": ([*NOT_STRINGS, "", "x" * 4097], ["x" * 4096]),
        "voice": ([1, True, [], ""], ["v", {"id": "v"}]),
        "response_format": ([*NOT_STRINGS, "ogg"], ["mp3", "opus", "aac", "flac", "wav", "pcm"]),
        "speed": ([*NOT_NUMBERS, 0.24, 4.1], [0.25, 1, 4]),
        "instructions": (NOT_STRINGS, ["x"]),
        "stream_format": ([*NOT_STRINGS, "x"], ["audio", "sse"]),
    },
    "images.generations": {
        "model": ([*NOT_STRINGS, ""], ["x"]),
        "prompt": ([*NOT_STRINGS, "", "x" * 32001], ["x"]),
        "n": ([*NOT_INTEGERS, 0, 11], [1, 10]),
        "size": ([*NOT_STRINGS, "big", "0x10", "10x", "1024 x 1024", "9x9\n"], ["auto", "512x768"]),
        "quality": ([*NOT_STRINGS, "best"], ["auto", "hd", "high"]),
        "response_format": ([*NOT_STRINGS, "url"], ["b64_json"]),
        "style": ([*NOT_STRINGS, "ugly"], ["vivid", "natural"]),
        "background": ([*NOT_STRINGS, "red"], ["opaque"]),
        "moderation": ([*NOT_STRINGS, "high"], ["low"]),
        "output_format": ([*NOT_STRINGS, "bmp"], ["webp"]),
        "output_compression": ([*NOT_INTEGERS, -1, 101], [0, 100]),
        "stream": (NOT_BOOLEANS, [True, False]),
        "partial_images": ([*NOT_INTEGERS, -1, 4], [0, 3]),
        "user": (NOT_STRINGS, ["x"]),
    },
    "rerank": {
        "model": ([*NOT_STRINGS, ""], ["x"]),
        "query": ([*NOT_STRINGS, ""], ["x"]),
        "documents": (
            [*NOT_LISTS, [], [1], ["a", None], [{}], [{"text": 1}], [["a"]]],
            [["a"], [""], [{"text": "a", "id": 7}, "b"]],
        ),
        "top_n": ([*NOT_INTEGERS, 0, -1], [1, 1000]),
        "return_documents": (NOT_BOOLEANS, [True]),
    },
    "moderations": {
        "model": ([*NOT_STRINGS, ""], ["x"]),
        "input": (
            [
                1,
                True,
                {},
                [],
                [1],
                ["a", 1],
                ["a", {"type": "text", "text": "b"}],
                ["x"] * 2049,
                [{"type": "text", "text": "a"}, "b"],
                [{"text": "a"}],
                [{"type": "video"}],
                [{"type": "text"}],
                [{"type": "image_url", "image_url": "x"}],
                [{"type": "image_url", "image_url": {}}],
            ],
            ["", "x", ["x", "y"], [{"type": "text", "text": "a"}]],
        ),
    },
}

FIELDS["messages.count_tokens"] = {
    field: FIELDS["messages"][field]
    for field in ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config")
}

REFUSED = [
    pytest.param(endpoint, field, value, id=f"{endpoint}-{field}-{str(value)[:20]!r}")
    for endpoint, fields in FIELDS.items()
    for field, (bad, _) in fields.items()
    for value in bad
]
TAKEN = [
    pytest.param(endpoint, field, value, id=f"{endpoint}-{field}-{str(value)[:20]!r}")
    for endpoint, fields in FIELDS.items()
    for field, (_, good) in fields.items()
    for value in good
]
OPTIONAL = [
    (endpoint, field)
    for endpoint, fields in FIELDS.items()
    for field in fields
    if field not in LEAST[endpoint]
]
REQUIRED = [(endpoint, field) for endpoint, least in LEAST.items() for field in least]


@pytest.mark.parametrize(("endpoint", "field", "value"), REFUSED)
def test_a_documented_field_with_a_wrong_value_is_refused_by_name(
    endpoint: str, field: str, value: Any
) -> None:
    error = refused(endpoint, **{field: value})
    assert error.status == 400
    assert error.param is not None
    assert error.param.startswith(field)
    assert f"'{error.param}'" in error.message
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize(("endpoint", "field", "value"), TAKEN)
def test_a_documented_field_with_a_right_value_is_taken(endpoint: str, field: str, value: Any) -> None:
    request = send(endpoint, **{field: value})
    assert request.raw[field] == value


@pytest.mark.parametrize(("endpoint", "field"), OPTIONAL)
def test_null_is_the_same_as_an_absent_field(endpoint: str, field: str) -> None:
    with_null = send(endpoint, **{field: None})
    without = send(endpoint)
    if hasattr(without, field):
        assert getattr(with_null, field) == getattr(without, field)


@pytest.mark.parametrize(("endpoint", "field"), REQUIRED)
@pytest.mark.parametrize("value", [..., None], ids=["absent", "null"])
def test_a_required_field_must_be_there(endpoint: str, field: str, value: Any) -> None:
    error = refused(endpoint, **{field: value})
    assert error.param == field
    assert error.code == "missing_required_parameter"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": 1, "content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 1}], "messages[0].content"),
        ([{"role": "user", "content": {}}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": 1}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}],
            "messages[0].content[0].image_url",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].image_url.url",
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}],
            "messages[0].content[0].input_audio.format",
        ),
        ([{"role": "user", "content": "x", "name": 1}], "messages[0].name"),
        ([{"role": "assistant"}], "messages[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": None}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"type": "function"}]}], "messages[0].tool_calls[0].id"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].function"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "function", "content": None}], "messages[0].name"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "messages[1].content"),
    ],
)
def test_a_message_of_the_wrong_shape_is_refused_with_its_place(messages: list[Any], param: str) -> None:
    assert refused("chat.completions", messages=messages).param == param


def test_a_conversation_with_everything_in_it_is_taken() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "be nice", "name": "boss"},
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,", "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
                {"type": "hologram", "depth": 3},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}},
                {"id": "c2", "type": "custom", "custom": {"name": "x", "input": "y"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": None},
        {"role": "assistant", "content": "a cat", "refusal": None, "mood": "good"},
    ]
    assert send("chat.completions", messages=messages).messages == messages


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"function_call": "sometimes"}, "function_call"),
        ({"function_call": {}}, "function_call.name"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"modalities": ["smell"]}, "modalities[0]"),
        ({"stream": True, "stream_options": 1}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    ],
)
def test_what_is_inside_a_field_is_refused_with_its_place(fields: dict[str, Any], param: str) -> None:
    assert refused("chat.completions", **fields).param == param


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (["x", ""], "input[1]"),
        (["x", 1], "input[1]"),
        ([1, "x"], "input[1]"),
        ([1, True], "input[1]"),
        ([-1], "input[0]"),
        ([1.5], "input[0]"),
        ([[1], []], "input[1]"),
        ([[1], ["x"]], "input[1][0]"),
        ([None], "input[0]"),
    ],
)
def test_a_wrong_embedding_input_is_refused_with_its_place(value: Any, param: str) -> None:
    assert refused("embeddings", input=value).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metadata": {"b": "x", "a": 1}}, "metadata.a"),
        ({"metadata": {"a": None}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"logit_bias": {"1": 1, "2": "x"}}, "logit_bias.2"),
        ({"logit_bias": {"2": 101}}, "logit_bias.2"),
    ],
)
def test_a_wrong_member_of_an_object_is_named(fields: dict[str, Any], param: str) -> None:
    assert refused("chat.completions", **fields).param == param


def test_null_is_not_called_missing() -> None:
    for message in ({"role": "user", "content": None}, {"role": "assistant", "content": None}):
        error = refused("chat.completions", messages=[message])
        assert (error.param, error.code) == ("messages[0].content", "invalid_type")
        assert "null" in error.message
    tools = [{"type": "function", "function": {"name": None}}]
    assert "null" in refused("chat.completions", tools=tools).message
    assert "Missing" in refused("chat.completions", messages=[{"role": "user"}]).message


@pytest.mark.parametrize(
    "members", [{"reasoning_content": "hm"}, {"tool_calls": []}, {"content": None, "refusal": ""}]
)
def test_an_assistants_message_may_have_anything_instead_of_a_content(members: dict[str, Any]) -> None:
    message = {"role": "assistant"} | members
    assert send("chat.completions", messages=[message]).messages == [message]


def test_the_logprobs_of_an_echoed_prompt_are_refused_in_words_that_help() -> None:
    error = refused("completions", prompt="a", echo=True, logprobs=1)
    assert error.param == "logprobs"
    assert "log probabilities of the prompt" in error.message


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused(text: str) -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":%s}' % text.encode()
    with pytest.raises(InvalidRequest):
        ENDPOINTS["chat.completions"].parse(body, "application/json", {})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"model":"\xff"}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"model": "m", "seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
@pytest.mark.parametrize("endpoint", sorted(LEAST))
def test_a_body_that_is_not_a_json_object_is_refused(endpoint: str, body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ENDPOINTS[endpoint].parse(body, "application/json", {})
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "", "a/b+json"]
)
def test_json_may_be_called_by_any_of_its_names(content_type: str) -> None:
    body = json.dumps(LEAST["embeddings"]).encode()
    assert ENDPOINTS["embeddings"].parse(body, content_type, {}).model == "m"


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data; boundary=x", "text/plain", "application/x-www-form-urlencoded"]
)
def test_another_content_type_than_json_is_415(content_type: str) -> None:
    body = json.dumps(LEAST["embeddings"]).encode()
    with pytest.raises(InvalidRequest) as caught:
        ENDPOINTS["embeddings"].parse(body, content_type, {})
    assert caught.value.status == 415


def test_a_huge_value_is_not_repeated_in_the_error() -> None:
    assert len(refused("audio.speech", response_format="x" * 10_000).message) < 250


@pytest.mark.parametrize("endpoint", sorted(ENDPOINTS))
@given(body=st.binary(max_size=200), content_type=st.text(max_size=60))
@settings(max_examples=25, deadline=None)
def test_arbitrary_bytes_are_refused_and_nothing_else(endpoint: str, body: bytes, content_type: str) -> None:
    for each in ("application/json", "multipart/form-data; boundary=x", content_type):
        with pytest.raises(InvalidRequest):
            ENDPOINTS[endpoint].parse(body, each, {})


def json_values() -> st.SearchStrategy[Any]:
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text()
    )
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    )


def structured(endpoint: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with the route's own field names and, often enough, something like the right values."""
    roles = st.sampled_from(["user", "assistant", "tool", "function", "robot"])
    members = st.sampled_from(
        ["role", "content", "type", "text", "image_url", "tool_calls", "function", "name"]
    )
    message = st.dictionaries(members, roles | st.text(max_size=5) | json_values(), max_size=5)
    value = json_values() | st.lists(message, max_size=3)
    return st.dictionaries(st.sampled_from(sorted(FIELDS[endpoint])), value, max_size=6)


@pytest.mark.parametrize("endpoint", sorted(LEAST))
@given(data=st.data())
@settings(max_examples=examples(15), deadline=None)
def test_random_values_of_known_fields_are_taken_or_refused_and_nothing_else(
    endpoint: str, data: st.DataObject
) -> None:
    fields = data.draw(structured(endpoint))
    try:
        request = send(endpoint, **fields)
    except InvalidRequest as error:
        error.envelope()
    else:
        assert isinstance(request.model, str)
