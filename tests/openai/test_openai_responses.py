"""Responses, streamed and plain: what a chat handler gives, made into items."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from openai_answers import answer, answer_json, encoder, send
from pydantic import TypeAdapter

from trio_cluster.errors import ApiError
from trio_cluster.openai import OutputChunk
from trio_cluster.testing import StreamReport, read_stream

EVENT: Any = TypeAdapter(ResponseStreamEvent)


def plain(values: list[Any], **fields: Any) -> Any:
    """Return the plain answer, which the official client's types must accept."""
    result = answer_json("responses", send("responses", **fields), values)
    Response.model_validate(result, strict=True)
    return result


def streamed(values: list[Any], **fields: Any) -> StreamReport:
    """Return the streamed answer, which must obey its grammar and be what the official client can follow."""
    report = read_stream(answer("responses", send("responses", stream=True, **fields), values))
    assert report.ending == "finished"
    follow(list(report.events))
    return report


def follow(events: list[Any]) -> None:
    """Read the events of a stream strictly, and with the official client as well."""
    client: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events:
        client.handle_event(EVENT.validate_python(event, strict=True))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    items: list[dict[str, Any]] = []
    grown: dict[int, str] = {}
    for event in events[2:-1]:
        kind, index = event["type"], event["output_index"]
        if kind == "response.output_item.added":
            assert index == len(items)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            assert len({item["id"] for item in items}) == len(items)
            if event["item"]["type"] == "function_call":
                grown[index] = ""
            continue
        item = items[index]
        assert item["status"] == "in_progress", "nothing happens to an item that is done"
        if kind == "response.output_item.done":
            assert index not in grown
            assert {**event["item"], "status": "in_progress"} == item | {
                name: event["item"][name] for name in ("content", "arguments", "name") if name in item
            }
            assert event["item"]["status"] != "in_progress"
            items[index] = event["item"]
            continue
        assert event["item_id"] == item["id"]
        assert event.get("content_index", 0) == 0
        if kind == "response.content_part.added":
            assert item["content"] == []
            assert "" in event["part"].values()
            grown[index] = ""
        elif kind == "response.content_part.done":
            assert grown.pop(index) == event["part"].get("text", event["part"].get("refusal"))
        elif kind.endswith(".delta"):
            assert event["delta"] or event["logprobs"]
            grown[index] += event["delta"]
        else:
            assert kind.endswith(".done")
            name = {"function_call": "arguments"}.get(
                item["type"], "refusal" if "refusal" in kind else "text"
            )
            assert event[name] == grown[index]
            if name == "arguments":
                assert event["name"] == item["name"]
                del grown[index]
    assert grown == {}
    assert events[-1]["response"]["output"] == items


def texts(response: Any) -> list[tuple[str, str]]:
    """Return the texts and the calls of the items of a response, in order."""
    found = []
    for item in response["output"]:
        if item["type"] == "function_call":
            found.append((item["name"], item["arguments"]))
        else:
            [part] = item["content"]
            found.append((part["type"], part.get("text", part.get("refusal"))))
    return found


def test_a_plain_response_has_all_its_members() -> None:
    assert plain(["Hello ", "world", OutputChunk.usage(3, 2)]) == {
        "id": "resp_abc",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "model": "m",
        "output": [
            {
                "id": "msg_abc_0",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "Hello world", "annotations": [], "logprobs": []}
                ],
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 3,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 2,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 5,
        },
        "user": None,
    }


def test_a_streamed_response_has_an_event_for_every_step() -> None:
    report = streamed(["a", "b"])
    assert [event["type"] for event in report.events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert report.text == "ab"
    first = report.events[0]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)


def test_the_last_event_of_a_stream_is_the_plain_answer() -> None:
    values = ["a", OutputChunk.tool_call("f", {}), "b", OutputChunk.usage(3, 2)]
    assert streamed(values).events[-1]["response"] == plain(values)


def test_there_is_no_done_at_the_end_of_a_streamed_response() -> None:
    assert b"[DONE]" not in answer("responses", send("responses", stream=True), ["a"])


def test_every_piece_of_a_stream_can_be_sent_at_once() -> None:
    writer = encoder("responses", send("responses", stream=True))
    assert writer.streaming
    assert writer.head.content_type == "text/event-stream"
    for piece in ("a", "b", OutputChunk.reasoning("c"), OutputChunk.tool_call("f", "d", index=0)):
        shown = "abcd"[["a", "b"].index(piece)] if isinstance(piece, str) else piece.value
        text = shown if isinstance(shown, str) else "d"
        assert f'"delta":"{text}"'.encode() in writer.encode(piece)


def test_a_stream_does_not_begin_before_there_is_anything_to_show() -> None:
    writer = encoder("responses", send("responses", stream=True))
    assert writer.encode(OutputChunk.usage(3, 2)) == b""
    assert writer.encode({"usage": {"prompt_tokens": 3}}) == b""
    assert writer.encode({"timings": {"ms": 3}}) != b""


def test_a_plain_answer_is_kept_until_it_is_complete() -> None:
    writer = encoder("responses", send("responses"))
    assert not writer.streaming
    assert writer.head.content_type == "application/json"
    assert writer.encode("a") == writer.encode("b") == b""


def test_an_answer_without_output_is_complete_and_empty() -> None:
    assert texts(plain([])) == [("output_text", "")]
    assert texts(streamed([""]).events[-1]["response"]) == [("output_text", "")]


def test_a_response_repeats_what_it_was_asked() -> None:
    asked: dict[str, Any] = {
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low"},
        "temperature": 0.5,
        "text": {"format": {"type": "json_object"}, "verbosity": "low"},
        "tool_choice": {"type": "function", "name": "f"},
        "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}],
        "top_p": 0.25,
        "truncation": "auto",
        "user": "u",
    }
    response = plain(["x"], store=False, service_tier="flex", **asked)
    assert response["reasoning"] == {"effort": "low", "summary": None}
    assert response["tools"] == [asked["tools"][0] | {"description": None}]
    for name in asked.keys() - {"reasoning", "tools"}:
        assert response[name] == asked[name]
    assert (response["store"], response["service_tier"]) == (False, "default")


@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
    ],
)
@pytest.mark.parametrize("way", [OutputChunk.finish, lambda reason: {"finish_reason": reason}])
def test_a_response_is_incomplete_if_the_model_was_cut_short(
    reason: Any, status: str, why: str | None, way: Any
) -> None:
    values = [OutputChunk.reasoning("hm"), "a", way(reason)]
    response = plain(values)
    assert (response["status"], [item["status"] for item in response["output"]]) == (
        status,
        ["completed", status],
    )
    assert response["incomplete_details"] == (None if why is None else {"reason": why})
    report = streamed(values)
    assert report.events[-1]["type"] == f"response.{status}"
    assert report.events[-1]["response"] == response


VALUES: list[Any] = [
    OutputChunk.reasoning("hm, "),
    {"reasoning_content": "a sky"},
    "Let ",
    {"content": "me look."},
    OutputChunk.tool_call("look", {"at": "sky"}, id="c1"),
    OutputChunk.tool_call("go", '{"to":', index=1),
    "Meanwhile",
    OutputChunk.tool_call("go", '"sea"}', index=1),
    {"refusal": "no, "},
    {"refusal": "sorry"},
]


def test_items_are_in_the_order_in_which_they_began() -> None:
    response = plain(VALUES)
    assert texts(response) == [
        ("reasoning_text", "hm, a sky"),
        ("output_text", "Let me look."),
        ("look", '{"at":"sky"}'),
        ("go", '{"to":"sea"}'),
        ("output_text", "Meanwhile"),
        ("refusal", "no, sorry"),
    ]
    calls = [item["call_id"] for item in response["output"] if item["type"] == "function_call"]
    assert calls == ["c1", "call_abc_0_1"]
    assert streamed(VALUES).events[-1]["response"] == response


def test_a_whole_call_is_done_at_once_and_one_in_pieces_at_the_end() -> None:
    types = [event["type"] for event in streamed(VALUES).events]
    done = [i for i, kind in enumerate(types) if kind == "response.function_call_arguments.done"]
    refused = types.index("response.refusal.delta")
    assert done[0] < types.index("response.output_text.delta", done[0]) < refused < done[1]


def test_another_servers_chat_can_be_passed_on() -> None:
    chat = answer(
        "chat.completions", send("chat.completions", stream=True), [*VALUES, OutputChunk.usage(3, 2)]
    )
    assert texts(plain(list(read_stream(chat).events))) == texts(plain(VALUES))


def test_another_servers_whole_answer_can_be_passed_on() -> None:
    values = [OutputChunk.reasoning("hm"), "a", OutputChunk.tool_call("f", {}), OutputChunk.finish("length")]
    whole = answer_json("chat.completions", send("chat.completions"), values)
    response = plain([whole])
    assert texts(response) == texts(plain(values))
    assert response["status"] == "incomplete"
    assert response["id"] == "resp_abc"


def test_reasoning_that_comes_under_two_names_is_sent_once() -> None:
    assert texts(plain([{"reasoning": "hm", "reasoning_content": "hm"}])) == [("reasoning_text", "hm")]
    assert texts(plain([{"reasoning": "hm"}])) == [("reasoning_text", "hm")]


def test_a_message_of_parts_becomes_their_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    assert texts(plain([{"content": parts}])) == [("output_text", "ab")]


def test_usage_has_its_details() -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": None},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert plain([{"usage": usage}])["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 14,
    }


@pytest.mark.parametrize("details", [None, "many"])
def test_usage_without_details_has_zeros(details: Any) -> None:
    usage = plain([{"usage": {"input_tokens": 9, "prompt_tokens_details": details}}])["usage"]
    assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert usage["total_tokens"] == 9


def test_log_probabilities_belong_to_their_text() -> None:
    def piece(token: str) -> dict[str, Any]:
        top = [{"token": token, "logprob": -0.5}]
        logprobs = {"content": [{"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": top}]}
        return {"choices": [{"delta": {"content": token}, "logprobs": logprobs}]}

    values = [piece("a"), piece("b"), "c"]
    [part] = plain(values)["output"][0]["content"]
    assert part["text"] == "abc"
    assert [token["token"] for token in part["logprobs"]] == ["a", "b"]
    assert part["logprobs"][0]["bytes"] == part["logprobs"][0]["top_logprobs"][0]["bytes"] == []
    deltas = [event for event in streamed(values).events if event["type"] == "response.output_text.delta"]
    assert [[token["token"] for token in event["logprobs"]] for event in deltas] == [["a"], ["b"], []]


def test_other_members_of_a_dict_are_members_of_the_response_but_cannot_replace_its_own() -> None:
    values = ["a", {"system_fingerprint": "fp", "id": "x", "status": "failed", "output": [], "store": False}]
    response = plain(values)
    assert response["system_fingerprint"] == "fp"
    assert (response["id"], response["status"], response["store"]) == ("resp_abc", "completed", True)
    assert texts(response) == [("output_text", "a")]
    assert streamed(values).events[-1]["response"] == response


@pytest.mark.parametrize(
    ("given", "final", "whole", "in_stream"),
    [
        ([], "abc", [("output_text", "abc")], [("output_text", "abc")]),
        (["a"], "abc", [("output_text", "abc")], [("output_text", "abc")]),
        (["a", "b"], "abc", [("output_text", "abc")], [("output_text", "abc")]),
        (["a", "b"], "xyz", [("output_text", "xyz")], [("output_text", "ab")]),
        (
            ["a", OutputChunk.tool_call("f", {})],
            "ab",
            [("output_text", "a"), ("f", "{}"), ("output_text", "b")],
            [("output_text", "a"), ("f", "{}"), ("output_text", "b")],
        ),
        (
            ["a", OutputChunk.tool_call("f", {}), "b"],
            "xyz",
            [("output_text", "xyz"), ("f", "{}")],
            [("output_text", "a"), ("f", "{}"), ("output_text", "b")],
        ),
    ],
)
def test_a_final_text_is_the_whole_text(given: Any, final: str, whole: Any, in_stream: Any) -> None:
    values = [*given, OutputChunk.final_text(final)]
    assert texts(plain(values)) == whole
    assert texts(streamed(values).events[-1]["response"]) == in_stream


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (OutputChunk.final_text("a"), "b", "after its final text"),
        (OutputChunk.finish("stop"), "b", "already ended"),
        (OutputChunk.finish("stop"), OutputChunk.finish("stop"), "already ended"),
        (OutputChunk.finish("stop"), OutputChunk.reasoning("b"), "already ended"),
        ({"finish_reason": "stop"}, {"content": "b"}, "already ended"),
        ("a", OutputChunk.text_delta("b", 1), "no choice 1"),
        ("a", OutputChunk.reasoning("b", 1), "no choice 1"),
        ("a", {"choices": [{"index": 1, "delta": {"content": "b"}}]}, "no choice 1"),
    ],
)
def test_what_cannot_follow_is_the_handlers_failure(stream: bool, first: Any, second: Any, why: str) -> None:
    writer = encoder("responses", send("responses", stream=stream))
    writer.encode("a")
    writer.encode(first)
    with pytest.raises(ValueError, match=why):
        writer.encode(second)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"tool_calls": [{"id": "1", "type": "custom", "custom": {}}]}, TypeError),
        ({"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": 1}}]}, TypeError),
        ({"x": float("nan")}, ValueError),
        (OutputChunk.audio(b"x"), TypeError),
        (b"x", TypeError),
        ("\ud800", ValueError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_output_that_fits_nowhere_is_the_handlers_failure(
    stream: bool, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        answer("responses", send("responses", stream=stream), ["a", value])


def test_an_error_chunk_is_raised_as_the_error_it_is() -> None:
    writer = encoder("responses", send("responses", stream=True))
    writer.encode("a")
    with pytest.raises(ApiError, match="too long"):
        writer.encode(OutputChunk.error("context_length_exceeded", "too long", 400))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def _call(index: int, text: str) -> OutputChunk:
    return OutputChunk.tool_call(f"f{index}", text, index=index)


#: Anything that a handler could come up with, in any order.
OUTPUT = st.lists(
    st.one_of(
        TEXT,
        st.builds(OutputChunk.text_delta, TEXT),
        st.builds(OutputChunk.reasoning, TEXT),
        st.builds(_call, st.integers(0, 2), TEXT),
        st.builds(OutputChunk.tool_call, st.just("whole"), TEXT | st.just({"a": 1})),
        st.builds(lambda text: {"refusal": text}, TEXT),
        st.builds(lambda a, b: {"content": a, "reasoning_content": b}, TEXT, TEXT),
        st.builds(OutputChunk.usage, st.integers(0, 9), st.integers(0, 9)),
        st.just({"timings": {"ms": 1}}),
        st.just({}),
    ),
    max_size=12,
)
ENDS = st.sampled_from([[], [OutputChunk.finish("stop")], [OutputChunk.finish("length")]])


@given(OUTPUT, ENDS)
@settings(max_examples=150, deadline=None)
def test_any_course_of_output_is_a_stream_that_clients_can_follow(values: list[Any], end: list[Any]) -> None:
    report = streamed(values + end)
    assert report.events[-1]["response"] == plain(values + end)


@given(OUTPUT)
@settings(max_examples=150, deadline=None)
def test_a_response_has_the_same_texts_as_a_chat(values: list[Any]) -> None:
    found = texts(plain(values))
    message = answer_json("chat.completions", send("chat.completions"), values)["choices"][0]["message"]

    def all_of(kind: str) -> str:
        return "".join(text for name, text in found if name == kind)

    assert all_of("output_text") == (message["content"] or "")
    assert all_of("reasoning_text") == message.get("reasoning_content", "")
    assert all_of("refusal") == (message["refusal"] or "")
    calls = [tuple(call["function"].values()) for call in message.get("tool_calls", ())]
    assert sorted(each for each in found if each[0][0] in "fw") == sorted(calls)


@given(OUTPUT)
@settings(max_examples=150, deadline=None)
def test_the_output_of_a_model_can_be_sent_back(values: list[Any]) -> None:
    output = plain(values)["output"]
    request = send("responses", input=[{"role": "user", "content": "hi"}, *output])
    answers = request.messages[1:]
    assert {message["role"] for message in answers} == {"assistant"}
    found = texts({"output": output})

    def all_of(kind: str) -> str:
        return "".join(text for name, text in found if name == kind)

    spoken = ""
    for message in answers:
        for part in message["content"] if isinstance(message["content"], list) else ():
            assert part["type"] == "refusal"
        spoken += message["content"] if isinstance(message["content"], str) else ""
    assert spoken == all_of("output_text")
    assert "".join(message.get("reasoning_content", "") for message in answers) == all_of("reasoning_text")
    calls = [call["function"] for message in answers for call in message.get("tool_calls", ())]
    assert [(call["name"], call["arguments"]) for call in calls] == [
        each for each in found if each[0][0] in "fw"
    ]


# Tools in namespaces, and custom tools

AGENT_TOOLS = [
    {"type": "function", "name": "shell"},
    {"type": "custom", "name": "apply_patch"},
    {
        "type": "namespace",
        "name": "mcp__demo",
        "description": "a demo",
        "tools": [{"type": "function", "name": "add"}],
    },
    {"type": "web_search"},
]
AGENT_CALLS: list[Any] = [
    OutputChunk.tool_call("shell", "{}", id="1"),
    OutputChunk.tool_call("mcp__demo__add", '{"a":', id="2", index=1),
    OutputChunk.tool_call("mcp__demo__add", "1}", index=1),
    {
        "tool_calls": [
            {"index": 2, "id": "3", "type": "custom", "custom": {"name": "apply_patch", "input": "*"}}
        ]
    },
    {"tool_calls": [{"index": 2, "custom": {"name": "apply_patch", "input": "**"}}]},
    OutputChunk.tool_call("apply_patch", "as text", id="4", index=3),
    OutputChunk.tool_call("add", "{}", id="5"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_come_back_under_the_names_that_the_client_knows(stream: bool) -> None:
    request = send("responses", tools=AGENT_TOOLS, stream=stream)
    body = answer("responses", request, AGENT_CALLS)
    if stream:
        events = read_stream(body).events
        response = events[-1]["response"]
        deltas = [each["delta"] for each in events if each["type"] == "response.custom_tool_call_input.delta"]
        assert deltas == ["*", "**", "as text"]
        done = [each["input"] for each in events if each["type"] == "response.custom_tool_call_input.done"]
        assert done == ["***", "as text"]
        added = [each["item"] for each in events if each["type"] == "response.output_item.added"]
        assert [(each["name"], each.get("namespace")) for each in added[:2]] == [
            ("shell", None),
            ("add", "mcp__demo"),
        ]
        for event in events:
            EVENT.validate_python(event, strict=True)
    else:
        response = json.loads(body)
        Response.model_validate(response, strict=True)
    seen = [
        (
            each["type"],
            each["call_id"],
            each["name"],
            each.get("namespace"),
            each.get("arguments", each.get("input")),
        )
        for each in response["output"]
    ]
    assert seen == [
        ("function_call", "1", "shell", None, "{}"),
        ("function_call", "2", "add", "mcp__demo", '{"a":1}'),
        ("custom_tool_call", "3", "apply_patch", None, "***"),
        ("custom_tool_call", "4", "apply_patch", None, "as text"),
        ("function_call", "5", "add", None, "{}"),
    ]
    assert response["tools"][1:] == AGENT_TOOLS[1:]


@pytest.mark.parametrize("asked", [{"summary": "auto"}, {"generate_summary": "concise"}])
def test_reasoning_is_the_summary_where_one_is_asked_for(asked: dict[str, Any]) -> None:
    values = [OutputChunk.reasoning("hm, "), OutputChunk.reasoning("so"), "a"]
    item, message = answer_json("responses", send("responses", reasoning=asked), values)["output"]
    assert item["summary"] == [{"type": "summary_text", "text": "hm, so"}]
    assert (item["type"], item["content"], message["type"]) == ("reasoning", [], "message")
    events = read_stream(answer("responses", send("responses", reasoning=asked, stream=True), values)).events
    client: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events:
        client.handle_event(EVENT.validate_python(event, strict=True))
    assert [event["type"].removeprefix("response.") for event in events[2:9]] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    assert events[8]["item"] | {"id": ""} == item | {"id": ""}
    # What comes back to the server is the same reasoning.
    again = send("responses", input=[item, message, {"role": "user", "content": "and?"}])
    assert again.messages[0]["reasoning_content"] == "hm, so"


def test_a_response_repeats_what_it_continues() -> None:
    response = plain(["x"], previous_response_id="resp_1")
    assert (response["previous_response_id"], response["store"]) == ("resp_1", True)
    assert "conversation" not in response
    for conversation in ("conv_1", {"id": "conv_1"}):
        assert plain(["x"], conversation=conversation)["conversation"] == {"id": "conv_1"}
