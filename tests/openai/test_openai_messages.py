"""Messages, streamed and plain: what a chat handler gives, made into content blocks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st
from openai_answers import answer, answer_json, encoder, send

from trio_cluster.errors import ApiError
from trio_cluster.openai import OutputChunk
from trio_cluster.testing import StreamReport, read_stream


def plain(values: list[Any], **fields: Any) -> Any:
    return answer_json("messages", send("messages", **fields), values)


def streamed(values: list[Any], **fields: Any) -> StreamReport:
    """Return the streamed answer, which must obey its grammar."""
    report = read_stream(answer("messages", send("messages", stream=True, **fields), values))
    assert report.ending == "finished"
    return report


def folded(report: StreamReport) -> Any:
    """Return the message that a client makes of the events."""
    message: dict[str, Any] = {}
    arguments = ""
    for event in report.events:
        kind = event["type"]
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            message["content"].append(event["content_block"])
            arguments = ""
        elif kind == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            if delta["type"] == "input_json_delta":
                arguments += delta["partial_json"]
            else:
                member = delta["type"].removesuffix("_delta")
                block[member] += delta[member]
        elif kind == "content_block_stop":
            block = message["content"][event["index"]]
            if block["type"] == "tool_use" and arguments:
                block["input"] = json.loads(arguments)
        elif kind == "message_delta":
            message |= event["delta"]
            message["usage"] = event["usage"]
    return message


def piece(index: int, arguments: str, **more: Any) -> dict[str, Any]:
    """Return a piece of a call, as servers send it."""
    call = {"index": index, "function": {"arguments": arguments} | more}
    return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}


USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
}


def test_a_plain_message_has_all_its_members() -> None:
    assert plain(["Hello ", "world", OutputChunk.usage(3, 2)]) == {
        "id": "msg_abc",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "Hello world"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": USAGE | {"input_tokens": 3, "output_tokens": 2},
    }


def test_a_streamed_message_has_all_its_events() -> None:
    report = streamed(["Hello ", "wörld", OutputChunk.usage(3, 2)])
    head = {"id": "msg_abc", "type": "message", "role": "assistant", "model": "m", "content": []}
    assert report.events == (
        {
            "type": "message_start",
            "message": head | {"stop_reason": None, "stop_sequence": None, "usage": USAGE},
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello "}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "wörld"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": USAGE | {"input_tokens": 3, "output_tokens": 2},
        },
        {"type": "message_stop"},
    )


def test_a_token_is_one_event_and_is_sent_at_once() -> None:
    writer = encoder("messages", send("messages", stream=True))
    assert writer.encode("a").count(b"\n\n") == 3
    for token in ("b", "c"):
        assert writer.encode(token) == (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
            b'{"type":"text_delta","text":"%s"}}\n\n' % token.encode()
        )
    assert writer.encode("") == b""


TEXT = {"type": "text", "text": "a"}
CALLS = [OutputChunk.tool_call("f", {"x": 1}, id="c1"), OutputChunk.tool_call("g", "", id="c2")]
CALLED = [
    {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}},
    {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
]
SIGNED = {"type": "thinking", "thinking": "hm", "signature": "EqQB=="}
HIDDEN = {"type": "redacted_thinking", "data": "Eu8D"}

#: What a handler gives, the blocks that a client gets, and why the message ends.
OUTPUTS: dict[str, tuple[list[Any], list[Any], str]] = {
    "nothing": ([], [], "end_turn"),
    "text": (["a"], [TEXT], "end_turn"),
    "text of a server": ([{"choices": [{"delta": {"content": "a"}}]}], [TEXT], "end_turn"),
    "parts": ([{"content": [{"type": "text", "text": "a"}]}], [TEXT], "end_turn"),
    "calls": (CALLS, CALLED, "tool_use"),
    "text and calls": (["a", *CALLS], [TEXT, *CALLED], "tool_use"),
    "calls and text": ([*CALLS, "a"], [*CALLED, TEXT], "tool_use"),
    "text, cut off": (["a", OutputChunk.finish("length")], [TEXT], "max_tokens"),
    "refused": ([{"refusal": "a"}, OutputChunk.finish("content_filter")], [TEXT], "refusal"),
    "reasoning": (
        [OutputChunk.reasoning("h"), OutputChunk.reasoning("m"), "a"],
        [{"type": "thinking", "thinking": "hm", "signature": ""}, TEXT],
        "end_turn",
    ),
    "reasoning of a server": (
        [{"reasoning_content": "hm"}, "a"],
        [{"type": "thinking", "thinking": "hm", "signature": ""}, TEXT],
        "end_turn",
    ),
    "signed": (
        [{"message": {"thinking_blocks": [SIGNED, HIDDEN], "content": "a"}}],
        [SIGNED, HIDDEN, TEXT],
        "end_turn",
    ),
    "signed in pieces": (
        [
            {"delta": {"thinking_blocks": [{"type": "thinking", "thinking": "h"}], "reasoning_content": "h"}},
            {"delta": {"thinking_blocks": [{"type": "thinking", "thinking": "m"}], "reasoning_content": "m"}},
            {"delta": {"thinking_blocks": [{"type": "thinking", "thinking": "", "signature": "EqQB=="}]}},
            {"delta": {"thinking_blocks": [{"type": "thinking", "thinking": "x"}]}},
            "a",
        ],
        [SIGNED, {"type": "thinking", "thinking": "x", "signature": ""}, TEXT],
        "end_turn",
    ),
    "only a signature": (
        [{"delta": {"thinking_blocks": [{"type": "thinking", "signature": "s"}]}}],
        [{"type": "thinking", "thinking": "", "signature": "s"}],
        "end_turn",
    ),
    "a call in pieces": (
        [piece(0, '{"x"', name="f"), piece(0, ""), piece(0, ":1}")],
        [{"type": "tool_use", "id": "call_abc_0_0", "name": "f", "input": {"x": 1}}],
        "tool_use",
    ),
    "two calls, one after the other": (
        [piece(0, '{"x":1}', name="f"), piece(1, "{}", name="g"), piece(0, "\n")],
        [
            {"type": "tool_use", "id": "call_abc_0_0", "name": "f", "input": {"x": 1}},
            {"type": "tool_use", "id": "call_abc_0_1", "name": "g", "input": {}},
        ],
        "tool_use",
    ),
    "two calls, in turns": (
        [piece(0, '{"x":', name="f"), piece(1, '{"y":', name="g"), "a", piece(1, "2}"), piece(0, "1}")],
        [
            {"type": "tool_use", "id": "call_abc_0_0", "name": "f", "input": {"x": 1}},
            {"type": "tool_use", "id": "call_abc_0_1", "name": "g", "input": {"y": 2}},
            TEXT,
        ],
        "tool_use",
    ),
    "a call whose name comes late": (
        [piece(0, '{"x":'), piece(0, "1}", name="f")],
        [{"type": "tool_use", "id": "call_abc_0_0", "name": "f", "input": {"x": 1}}],
        "tool_use",
    ),
    "final text": (["a", OutputChunk.final_text("a")], [TEXT], "end_turn"),
}  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_output_becomes_the_same_blocks_either_way(output: tuple[list[Any], list[Any], str]) -> None:
    values, blocks, reason = output
    message = plain(values)
    assert (message["content"], message["stop_reason"]) == (blocks, reason)
    assert folded(streamed(values)) == message


def test_arguments_that_are_no_object_are_not_taken_for_others() -> None:
    values = [OutputChunk.tool_call("f", '{"x": "cut', id="c")]
    assert plain(values)["content"][0]["input"] == {"INVALID_JSON": '{"x": "cut'}
    deltas = [event["delta"] for event in streamed(values).events if event["type"] == "content_block_delta"]
    assert deltas == [{"type": "input_json_delta", "partial_json": '{"x": "cut'}]


def test_a_final_text_that_differs_replaces_the_text_of_a_plain_message() -> None:
    values = ["a", OutputChunk.reasoning("r"), "b", OutputChunk.final_text("other")]
    assert [block.get("text") for block in plain(values)["content"]] == ["other", None]
    assert streamed(values).text == "ab"


@pytest.mark.parametrize(
    "sequence",
    [{"stop_sequence": "END"}, {"choices": [{"index": 0, "finish_reason": "stop", "stop_reason": "END"}]}],
    ids=["given", "in a choice"],
)
def test_the_stop_sequence_is_named_if_the_handler_knows_it(sequence: dict[str, Any]) -> None:
    message = plain(["a", sequence], stop_sequences=["END"])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    assert "END" in str(folded(streamed(["a", sequence], stop_sequences=["END"])))
    other = plain(["a", sequence])
    assert (other["stop_reason"], other["stop_sequence"]) == ("end_turn", None)


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 2}, (9, 2, 0, 0)),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
            (5, 2, 0, 4),
        ),
        (
            {
                "input_tokens": 9,
                "output_tokens": 2,
                "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3},
            },
            (2, 2, 3, 4),
        ),
        ({"input_tokens": 1, "output_tokens": 2, "cache_read_input_tokens": 8}, (1, 2, 0, 8)),
        (
            {"prompt_tokens": 9, "prompt_tokens_details": None, "completion_tokens_details": {"x": 1}},
            (9, 0, 0, 0),
        ),
    ],
)
def test_usage_is_counted_as_this_api_counts(given: dict[str, Any], seen: tuple[int, int, int, int]) -> None:
    usage = plain(["a", {"usage": given}])["usage"]
    assert tuple(usage[name] for name in USAGE) == seen
    assert set(usage) == set(USAGE)
    assert folded(streamed(["a", {"usage": given}]))["usage"] == usage


def test_usage_that_is_known_at_the_beginning_is_in_the_first_event() -> None:
    first = streamed([OutputChunk.usage(3, 0), "a"]).events[0]
    assert first["message"]["usage"]["input_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_members_of_the_answer_itself_are_passed_on(stream: bool) -> None:
    values = [{"system_fingerprint": "fp"}, "a"]
    message = folded(streamed(values)) if stream else plain(values)
    assert message["system_fingerprint"] == "fp"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (OutputChunk.text_delta("a", 1), ValueError),
        (OutputChunk.audio(b"x"), TypeError),
        ({"delta": {"thinking_blocks": [1]}}, TypeError),
        ({"delta": {"tool_calls": [{"type": "custom", "custom": {"name": "f", "input": ""}}]}}, TypeError),
    ],
)
def test_what_a_message_cannot_have_is_refused(value: Any, error: type[Exception], stream: bool) -> None:
    with pytest.raises(error):
        answer("messages", send("messages", stream=stream), ["a", value])


def test_a_call_cannot_go_on_after_its_arguments_were_complete_and_another_has_begun() -> None:
    values = [piece(0, "{}", name="f"), piece(1, "{}", name="g"), piece(0, "{}")]
    with pytest.raises(ValueError, match="complete"):
        answer("messages", send("messages", stream=True), values)


def test_an_error_of_the_handler_is_raised() -> None:
    with pytest.raises(ApiError):
        answer("messages", send("messages", stream=True), ["a", OutputChunk.error("c", "m")])


VALUES = st.one_of(
    st.text(max_size=3),
    st.text(max_size=3).map(OutputChunk.text_delta),
    st.text(max_size=3).map(OutputChunk.reasoning),
    st.sampled_from(["{}", '{"a":1}', "", "nonsense"]).map(lambda words: OutputChunk.tool_call("f", words)),
    st.builds(
        lambda index, words: OutputChunk.tool_call("g", words, index=index),
        st.integers(0, 2),
        st.sampled_from(["", " ", '{"a":', "[", "1"]),
    ),
    st.builds(
        lambda words, signature: {
            "delta": {"thinking_blocks": [{"type": "thinking", "thinking": words, "signature": signature}]}
        },
        st.text(max_size=2),
        st.sampled_from(["", "s"]),
    ),
    st.just({"delta": {"thinking_blocks": [HIDDEN]}}),
    st.just(OutputChunk.usage(1, 2)),
)


def of_pieces(content: list[Any]) -> list[Any]:
    return [{**block, "input": ...} if block["type"] == "tool_use" else block for block in content]


@given(st.lists(VALUES, max_size=8))
def test_a_stream_obeys_its_grammar_and_says_what_the_plain_answer_says(values: list[Any]) -> None:
    message = plain(values)
    report = streamed(values)
    content: list[Any] = []
    for event in report.events:
        if event["type"] == "content_block_start":
            content.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta" and event["delta"]["type"] != "input_json_delta":
            member = event["delta"]["type"].removesuffix("_delta")
            content[event["index"]][member] += event["delta"][member]
    assert of_pieces(content) == of_pieces(message["content"])
    assert report.usage == message["usage"]
