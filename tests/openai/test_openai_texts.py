"""Chat completions and completions, streamed and plain."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai_answers import answer, answer_json, encoder, send

from trio_cluster.errors import ApiError
from trio_cluster.openai import ChatRequest, OutputChunk
from trio_cluster.testing import StreamReport, read_stream

ROUTES = ["chat.completions", "completions"]


def plain(values: list[Any], endpoint: str = "chat.completions", **fields: Any) -> Any:
    """Return the plain answer, which the official client's types must accept."""
    result = answer_json(endpoint, send(endpoint, **fields), values)
    (ChatCompletion if endpoint == "chat.completions" else Completion).model_validate(result, strict=True)
    return result


def streamed(values: list[Any], endpoint: str = "chat.completions", **fields: Any) -> StreamReport:
    """Return the streamed answer, each event of which the official client's types must accept."""
    report = read_stream(answer(endpoint, send(endpoint, stream=True, **fields), values))
    if endpoint == "chat.completions":
        for each in report.events:
            ChatCompletionChunk.model_validate(each, strict=True)
    return report


def text_of(result: Any, index: int = 0) -> Any:
    choice = result["choices"][index]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def test_a_plain_chat_answer_is_a_chat_completion() -> None:
    assert plain(["Hello ", "world", OutputChunk.usage(3, 2)]) == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_a_plain_completion_is_a_text_completion() -> None:
    assert plain(["Hello ", "world"], "completions") == {
        "id": "cmpl-abc",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def test_a_streamed_chat_answer_opens_with_the_role_and_ends_with_the_reason() -> None:
    report = streamed(["a", "b"])
    assert report.ending == "finished"
    choices = [each["choices"][0] for each in report.events]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert all(choice["logprobs"] is None for choice in choices)
    for each in report.events:
        del each["choices"]
        assert each == {
            "id": "chatcmpl-abc",
            "object": "chat.completion.chunk",
            "created": 1_700_000_000,
            "model": "m",
        }


def test_a_streamed_completion_has_the_object_of_a_plain_one() -> None:
    report = streamed(["a", "b"], "completions")
    assert report.text == "ab"
    assert [each["choices"][0] for each in report.events] == [
        {"index": 0, "text": "a", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": "b", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"},
    ]
    assert {each["object"] for each in report.events} == {"text_completion"}


@pytest.mark.parametrize("endpoint", ROUTES)
def test_every_piece_of_a_stream_can_be_sent_at_once(endpoint: str) -> None:
    writer = encoder(endpoint, send(endpoint, stream=True))
    assert writer.streaming
    for piece in ("a", "b"):
        assert json.dumps(piece).encode() in writer.encode(piece)
    assert writer.head.content_type == "text/event-stream"


@pytest.mark.parametrize("endpoint", ROUTES)
def test_a_plain_answer_is_kept_until_it_is_complete(endpoint: str) -> None:
    writer = encoder(endpoint, send(endpoint))
    assert not writer.streaming
    assert writer.head.content_type == "application/json"
    assert writer.encode("a") == b""
    assert writer.encode("b") == b""


@pytest.mark.parametrize("endpoint", ROUTES)
def test_an_answer_without_output_is_complete_and_empty(endpoint: str) -> None:
    assert text_of(plain([], endpoint)) == ""
    report = streamed([], endpoint)
    assert (report.ending, report.text, report.finish_reasons) == ("finished", "", {0: "stop"})


PIECES = st.lists(
    st.tuples(st.sampled_from(["plain", "delta", "dict", "message", "chunk"]), st.text(max_size=12)),
    max_size=8,
)


def as_output(piece: tuple[str, str]) -> Any:
    way, text = piece
    return {
        "plain": text,
        "delta": OutputChunk.text_delta(text),
        "dict": {"content": text},
        "message": {"message": {"role": "assistant", "content": text}},
        "chunk": {"id": "x", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]},
    }[way]


@pytest.mark.parametrize("endpoint", ROUTES)
@given(pieces=PIECES)
@settings(max_examples=80, deadline=None)
def test_a_stream_has_the_same_content_as_the_plain_answer(
    endpoint: str, pieces: list[tuple[str, str]]
) -> None:
    values = [as_output(piece) for piece in pieces]
    report = streamed(values, endpoint)
    assert report.ending == "finished"
    assert report.text == text_of(plain(values, endpoint)) == "".join(text for _, text in pieces)


@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=5)), max_size=12))
@settings(max_examples=50, deadline=None)
def test_choices_do_not_mix(pieces: list[tuple[int, str]]) -> None:
    values = [OutputChunk.text_delta(text, index) for index, text in pieces]
    texts = {index: "".join(text for i, text in pieces if i == index) for index, _ in pieces} or {0: ""}
    report = streamed(values, n=3)
    assert report.texts == texts
    assert report.finish_reasons == dict.fromkeys(texts, "stop")
    result = plain(values, n=3)
    assert {choice["index"]: choice["message"]["content"] for choice in result["choices"]} == texts


@pytest.mark.parametrize("index", [1, 5])
def test_a_choice_that_was_not_asked_for_is_the_handlers_failure(index: int) -> None:
    for stream in (False, True):
        writer = encoder("chat.completions", send("chat.completions", stream=stream))
        with pytest.raises(ValueError, match=f"no choice {index}"):
            writer.encode(OutputChunk.text_delta("x", index))


@pytest.mark.parametrize("endpoint", ROUTES)
@pytest.mark.parametrize(
    ("deltas", "final", "in_stream"),
    [
        (["Hel", "lo"], "Hello world", "Hello world"),
        (["Hello"], "Hello", "Hello"),
        (["Hello "], "Hello", "Hello "),
        (["Hello"], "Goodbye, all", "Hello"),
        ([], "Hello", "Hello"),
        ([], "", ""),
    ],
)
def test_the_final_text_is_the_plain_answer_and_extends_the_stream(
    endpoint: str, deltas: list[str], final: str, in_stream: str
) -> None:
    values = [*deltas, OutputChunk.final_text(final)]
    assert text_of(plain(values, endpoint)) == final
    report = streamed(values, endpoint)
    assert report.ending == "finished"
    assert report.text == in_stream


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (OutputChunk.final_text("a"), "b"),
        (OutputChunk.final_text("a"), OutputChunk.final_text("ab")),
        (OutputChunk.finish("stop"), "b"),
        (OutputChunk.finish("stop"), OutputChunk.final_text("b")),
        (OutputChunk.finish("stop"), OutputChunk.finish("length")),
        (OutputChunk.finish("stop"), {"tool_calls": [{"id": "1", "function": {"name": "f"}}]}),
        ({"finish_reason": "stop"}, "b"),
    ],
)
def test_nothing_can_follow_an_end(stream: bool, first: Any, second: Any) -> None:
    writer = encoder("chat.completions", send("chat.completions", stream=stream))
    writer.encode("a")
    writer.encode(first)
    with pytest.raises(ValueError, match="choice 0"):
        writer.encode(second)


def test_a_reason_is_given_once_per_choice_and_at_the_very_end() -> None:
    writer = encoder("chat.completions", send("chat.completions", stream=True, n=2))
    sent = writer.encode("a") + writer.encode(OutputChunk.finish("length"))
    sent += writer.encode(OutputChunk.text_delta("b", 1))
    assert b'"length"' not in sent
    report = read_stream(sent + writer.finish())
    assert report.finish_reasons == {0: "length", 1: "stop"}
    result = plain(["a", OutputChunk.finish("length"), OutputChunk.text_delta("b", 1)], n=2)
    assert [choice["finish_reason"] for choice in result["choices"]] == ["length", "stop"]


@pytest.mark.parametrize("endpoint", ROUTES)
def test_usage_is_sent_at_the_end_of_a_stream_if_it_is_asked_for(endpoint: str) -> None:
    values = ["a", OutputChunk.usage(1, 1), "b", OutputChunk.usage(3, 2)]
    report = streamed(values, endpoint, stream_options={"include_usage": True})
    *others, last = report.events
    assert all(each["usage"] is None for each in others)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert report.text == "ab"


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {}])
def test_usage_is_not_sent_in_a_stream_otherwise(options: Any) -> None:
    report = streamed(["a", OutputChunk.usage(3, 2)], stream_options=options)
    assert all("usage" not in each for each in report.events)


def test_usage_may_come_in_a_dict_with_its_details() -> None:
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 99,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    result = plain([{"content": "x", "usage": usage}])
    assert result["usage"] == usage | {"total_tokens": 5}
    assert streamed([{"usage": usage}], stream_options={"include_usage": True}).usage == result["usage"]


@pytest.mark.parametrize("usage", ["many", {"prompt_tokens": "3"}, {"prompt_tokens": 1.5}])
def test_usage_that_is_no_count_is_the_handlers_failure(usage: Any) -> None:
    with pytest.raises(TypeError):
        plain([{"usage": usage}])


CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at":"sky"}'}}


def tool_deltas(report: StreamReport) -> list[Any]:
    return [
        call
        for each in report.events
        for choice in each["choices"]
        for call in choice["delta"].get("tool_calls", [])
    ]


@pytest.mark.parametrize(
    "values",
    [
        [{"tool_calls": [CALL]}],
        [{"message": {"role": "assistant", "content": None, "tool_calls": [CALL]}}],
        [{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0} | CALL]}, "finish_reason": None}]}],
        [
            {
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "look", "arguments": ""},
                    }
                ]
            },
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"at":'}}]},
            {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "look", "arguments": '"sky"}'}}]},
        ],
        [{"tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": {"at": "sky"}}}]}],
    ],
    ids=["top", "message", "chunk", "deltas", "object"],
)
def test_tool_calls_come_out_whole_however_they_are_given(values: list[Any]) -> None:
    choice = plain(values)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"] == [CALL]
    assert choice["message"]["content"] is None

    report = streamed(values)
    assert report.finish_reasons == {0: "tool_calls"}
    deltas = tool_deltas(report)
    assert {delta["index"] for delta in deltas} == {0}
    assert [delta["id"] for delta in deltas if "id" in delta] == ["c1"]
    assert "".join(delta["function"].get("name", "") for delta in deltas) == "look"
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"at":"sky"}'


def test_tool_calls_without_index_or_id_get_their_own() -> None:
    values = [{"tool_calls": [{"function": {"name": name, "arguments": "{}"}}]} for name in ("f", "g")]
    calls = plain(values)["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["f", "g"]
    assert len({call["id"] for call in calls}) == 2
    deltas = tool_deltas(streamed(values))
    assert [delta["index"] for delta in deltas] == [0, 1]
    assert [delta["id"] for delta in deltas] == [call["id"] for call in calls]


def test_text_before_a_tool_call_is_kept() -> None:
    message = plain(["Let me look.", {"tool_calls": [CALL]}])["choices"][0]["message"]
    assert message["content"] == "Let me look."


def test_reasoning_is_a_text_of_its_own() -> None:
    values = [{"reasoning_content": "hm, "}, {"reasoning_content": "yes"}, "Yes."]
    message = plain(values)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, yes", "Yes.")
    deltas = [each["choices"][0]["delta"] for each in streamed(values).events]
    assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta] == ["hm, ", "yes"]


REASONED = [
    OutputChunk.reasoning("hm, "),
    OutputChunk.reasoning("yes"),
    "Yes.",
    OutputChunk.tool_call("look", {"at": "sky"}, id="c1"),
    OutputChunk.tool_call("go", '{"to":', index=3),
    OutputChunk.tool_call("go", '"sea"}', index=3),
]


def test_chunks_for_reasoning_and_tool_calls_mean_the_same_as_dicts() -> None:
    choice = plain(REASONED)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, yes", "Yes.")
    assert message["tool_calls"] == [
        CALL,
        {
            "id": "call_abc_0_1",
            "type": "function",
            "function": {"name": "go", "arguments": '{"to":"sea"}'},
        },
    ]
    report = streamed(REASONED)
    assert (report.text, report.finish_reasons) == ("Yes.", {0: "tool_calls"})
    deltas = [each["choices"][0]["delta"] for each in report.events]
    assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta] == ["hm, ", "yes"]
    assert tool_deltas(report) == [
        {"index": 0} | CALL,
        {
            "index": 1,
            "id": "call_abc_0_1",
            "type": "function",
            "function": {"name": "go", "arguments": '{"to":'},
        },
        {"index": 1, "function": {"arguments": '"sea"}'}},
    ]


def test_each_choice_has_its_own_reasoning_and_tool_calls() -> None:
    values = [
        OutputChunk.reasoning("a"),
        OutputChunk.reasoning("b", 1),
        OutputChunk.tool_call("f", {}, choice=1),
    ]
    first, second = plain(values, n=2)["choices"]
    assert (first["message"]["reasoning_content"], first["finish_reason"]) == ("a", "stop")
    assert (second["message"]["reasoning_content"], second["finish_reason"]) == ("b", "tool_calls")
    report = streamed(values, n=2)
    assert report.finish_reasons == {0: "stop", 1: "tool_calls"}
    assert [
        (each["choices"][0]["index"], delta["reasoning_content"])
        for each in report.events
        if "reasoning_content" in (delta := each["choices"][0]["delta"])
    ] == [(0, "a"), (1, "b")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_reason_of_the_handlers_own_beats_its_tool_calls(stream: bool) -> None:
    values = [OutputChunk.tool_call("f", {}), OutputChunk.finish("length")]
    if stream:
        assert streamed(values).finish_reasons == {0: "length"}
    else:
        assert plain(values)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (
            OutputChunk.tool_call("f", "{", index=0),
            OutputChunk.tool_call("g", "}", index=0),
            "'f', not of 'g'",
        ),
        (OutputChunk.tool_call("f", {}, id="c"), OutputChunk.tool_call("f", {}, id="c"), "second tool call"),
        (OutputChunk.finish("stop"), OutputChunk.reasoning("x"), "already ended"),
        (OutputChunk.finish("stop"), OutputChunk.tool_call("f", {}), "already ended"),
        ("x", OutputChunk.reasoning("x", 1), "no choice 1"),
        ("x", OutputChunk.tool_call("f", {}, choice=1), "no choice 1"),
    ],
)
def test_a_tool_call_that_cannot_be_is_the_handlers_failure(
    stream: bool, first: Any, second: Any, why: str
) -> None:
    writer = encoder("chat.completions", send("chat.completions", stream=stream))
    writer.encode(first)
    with pytest.raises(ValueError, match=why):
        writer.encode(second)


def test_tool_calls_with_and_without_an_index_do_not_get_into_each_others_way() -> None:
    values = [
        OutputChunk.tool_call("f", "{", index=1),
        OutputChunk.tool_call("g", {}),
        OutputChunk.tool_call("h", "[", index=0),
        OutputChunk.tool_call("f", "}", index=1),
        OutputChunk.tool_call("h", "]", index=0),
    ]
    calls = plain(values)["choices"][0]["message"]["tool_calls"]
    assert [tuple(call["function"].values()) for call in calls] == [("f", "{}"), ("g", "{}"), ("h", "[]")]
    assert [delta["index"] for delta in tool_deltas(streamed(values))] == [0, 1, 2, 0, 2]


def test_completions_have_reasoning_and_tool_calls_as_members_of_the_choice() -> None:
    choice = plain(REASONED, "completions")["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Yes.", "stop")
    assert choice["reasoning_content"] == "hm, yes"
    assert [call["function"]["name"] for call in choice["tool_calls"]] == ["look", "go"]
    report = streamed(REASONED, "completions")
    assert (report.text, report.finish_reasons) == ("Yes.", {0: "stop"})
    choices = [each["choices"][0] for each in report.events]
    assert [each["reasoning_content"] for each in choices if "reasoning_content" in each] == ["hm, ", "yes"]
    assert [len(each["tool_calls"]) for each in choices if "tool_calls" in each] == [1, 1, 1]


def test_log_probabilities_are_put_together() -> None:
    def piece(token: str) -> dict[str, Any]:
        logprobs = {"content": [{"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
        return {"choices": [{"delta": {"content": token}, "logprobs": logprobs}]}

    values = [piece("a"), piece("b")]
    tokens = plain(values)["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in tokens] == ["a", "b"]
    report = streamed(values)
    assert [
        each["choices"][0]["logprobs"]["content"][0]["token"]
        for each in report.events
        if each["choices"][0]["logprobs"]
    ] == ["a", "b"]


def test_other_members_of_a_dict_are_members_of_the_answer() -> None:
    values = ["a", {"system_fingerprint": "fp", "timings": {"ms": 3}}]
    result = plain(values)
    assert (result["system_fingerprint"], result["timings"]) == ("fp", {"ms": 3})
    report = streamed(values)
    assert [each["timings"] for each in report.events if "timings" in each] == [{"ms": 3}]
    assert all(len(each["choices"]) == 1 for each in report.events)


def test_an_answer_keeps_its_own_identity() -> None:
    foreign = {"id": "x", "object": "y", "created": 1, "model": "z", "content": "a"}
    for each in (plain([foreign]), *streamed([foreign]).events):
        assert (each["id"], each["created"], each["model"]) == ("chatcmpl-abc", 1_700_000_000, "m")


def test_another_servers_whole_answer_can_be_passed_on() -> None:
    foreign = plain(["Hello", OutputChunk.finish("length"), OutputChunk.usage(3, 2)])
    assert plain([foreign]) == foreign
    assert streamed([foreign]).text == "Hello"


def test_another_servers_stream_can_be_passed_on() -> None:
    options = {"include_usage": True}
    original = streamed(
        ["a", "b", OutputChunk.finish("length"), OutputChunk.usage(3, 2)], stream_options=options
    )
    passed_on = streamed(list(original.events), stream_options=options)
    assert passed_on == original


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"choices": ["x"]}, TypeError),
        ({"choices": [{"index": "0"}]}, TypeError),
        ({"delta": "x"}, TypeError),
        ({"text": 1}, TypeError),
        ({"finish_reason": 1}, TypeError),
        ({"tool_calls": {}}, TypeError),
        ({"tool_calls": ["x"]}, TypeError),
        ({"tool_calls": [{"function": "x"}]}, TypeError),
        ({"tool_calls": [{"index": -1}]}, TypeError),
        ({"x": object()}, TypeError),
        ({"x": float("nan")}, ValueError),
        ({"x": [1, {"y": float("inf")}]}, ValueError),
        (OutputChunk.audio(b"x"), TypeError),
        (OutputChunk.image(b"x"), TypeError),
        (OutputChunk.embedding([0.5]), TypeError),
        (b"x", TypeError),
        ("\ud800", ValueError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_output_that_fits_nowhere_is_the_handlers_failure(
    stream: bool, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        answer("chat.completions", send("chat.completions", stream=stream), ["a", value])


def test_a_dict_nested_without_end_is_the_handlers_failure() -> None:
    value: dict[str, Any] = {}
    value["self"] = value
    with pytest.raises(ValueError, match="nested"):
        plain([value])


def test_a_dict_may_be_changed_after_it_was_given() -> None:
    writer = encoder("chat.completions", send("chat.completions"))
    shared: dict[str, Any] = {"timings": {"ms": 1}}
    writer.encode(shared)
    shared["timings"]["ms"] = 2
    assert json.loads(writer.finish())["timings"] == {"ms": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_chunk_is_raised_as_the_error_it_is(stream: bool) -> None:
    writer = encoder("chat.completions", send("chat.completions", stream=stream))
    writer.encode("a")
    with pytest.raises(ApiError, match="too long") as caught:
        writer.encode(OutputChunk.error("context_length_exceeded", "too long", 400))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_echo_puts_the_prompt_before_the_text_of_a_completion() -> None:
    fields = {"prompt": "Once ", "echo": True}
    assert text_of(plain(["upon"], "completions", **fields)) == "Once upon"
    assert streamed(["upon"], "completions", **fields).text == "Once upon"
    assert streamed([], "completions", **fields).text == "Once "


def test_a_refusal_has_no_content() -> None:
    message = plain([{"refusal": "no"}])["choices"][0]["message"]
    assert (message["content"], message["refusal"]) == (None, "no")
    assert plain(["a", {"refusal": "no"}])["choices"][0]["message"]["content"] == "a"


TOKENS = [
    {
        "token": each,
        "logprob": -0.5,
        "bytes": list(each.encode()),
        "top_logprobs": [{"token": each, "logprob": -0.5}, {"token": "x", "logprob": -2.0}],
    }
    for each in ("Hel", "lo")
]
LEGACY = {
    "tokens": ["Hel", "lo"],
    "token_logprobs": [-0.5, -0.5],
    "top_logprobs": [{"Hel": -0.5, "x": -2.0}, {"lo": -0.5, "x": -2.0}],
    "text_offset": [0, 3],
}


@pytest.mark.parametrize("given", ["chat", "legacy"])
def test_logprobs_of_a_completion_have_the_form_of_that_route(given: str) -> None:
    def pieces() -> list[Any]:
        if given == "legacy":
            return [{"text": "Hello", "logprobs": dict(LEGACY)}]
        return [{"text": token["token"], "logprobs": {"content": [dict(token)]}} for token in TOKENS]

    assert plain(pieces(), "completions", logprobs=2)["choices"][0]["logprobs"] == LEGACY
    events = streamed(pieces(), "completions", logprobs=2).events
    sent = [each["choices"][0]["logprobs"] for each in events if each["choices"][0]["logprobs"]]
    assert {name: [value for each in sent for value in each[name]] for name in LEGACY} == LEGACY


def test_alternatives_that_are_not_known_are_the_token_itself() -> None:
    logprobs = {"content": [{"token": "a", "logprob": -1.0, "bytes": None, "top_logprobs": []}]}
    answer = plain([{"text": "a", "logprobs": logprobs}], "completions", logprobs=0)
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -1.0}]


@pytest.mark.parametrize("stream", [False, True])
def test_the_choices_of_several_prompts_are_in_their_order(stream: bool) -> None:
    request = send(
        "completions", prompt=["A ", "B ", "C "], n=2, echo=True, stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )  # fmt: skip
    writer = encoder("completions", request)
    sent = [
        writer.encode(value) for value in ("one", OutputChunk.text_delta("two", 1), OutputChunk.usage(1, 2))
    ]
    writer.next_part()
    writer.next_part()
    sent += [writer.encode(value) for value in ("th", {"choices": [{"index": 1, "text": "four"}]}, "ree")]
    with pytest.raises(ValueError, match="no choice 2"):
        writer.encode(OutputChunk.text_delta("x", 2))
    sent += [writer.encode(OutputChunk.usage(3, 4)), writer.finish()]
    expected = {0: "A one", 1: "A two", 2: "B ", 4: "C three", 5: "C four"}
    if stream:
        report = read_stream(b"".join(sent))
        assert dict(report.texts) == expected
        assert set(report.finish_reasons) == set(expected)
        usage = report.usage
    else:
        answer = json.loads(b"".join(sent))
        assert {each["index"]: each["text"] for each in answer["choices"]} == expected
        usage = answer["usage"]
    assert usage == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}


def test_a_completion_does_not_end_with_a_word_of_the_other_route() -> None:
    assert plain([{"tool_calls": [CALL]}], "completions")["choices"][0]["finish_reason"] == "stop"


def test_a_model_name_may_look_like_json() -> None:
    request = ChatRequest(model='"choices":[]}\n\n', messages=[], stream=True)
    report = read_stream(answer("chat.completions", request, ["a"]))
    assert report.text == "a"
    assert {each["model"] for each in report.events} == {'"choices":[]}\n\n'}
