"""What a client sends to /v1/messages, as a chat handler sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st
from openai_answers import refused, send

from trio_cluster.openai import ChatRequest

USER = {"role": "user", "content": "hi"}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words} | more


def block(kind: str, **members: Any) -> dict[str, Any]:
    return {"type": kind} | members


def source(kind: str, **members: Any) -> dict[str, Any]:
    return {"source": {"type": kind} | members}


def user(*blocks: Any) -> Any:
    """Return the messages that one message of the user becomes."""
    return send("messages", messages=[{"role": "user", "content": list(blocks)}]).messages


def assistant(*blocks: Any) -> Any:
    """Return the message that one of the assistant becomes."""
    (message,) = send("messages", messages=[{"role": "assistant", "content": list(blocks)}]).messages
    return message


CALL = block("tool_use", id="toolu_1", name="f", input={"a": [1, "é"]})
CALLED = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"a":[1,"é"]}'}}
THOUGHT = block("thinking", thinking="hm", signature="EqQB==")
HIDDEN = block("redacted_thinking", data="Eu8D")
CACHED = {"cache_control": {"type": "ephemeral"}}


def test_the_whole_request() -> None:
    sent = {
        "system": "Be brief.",
        "stop_sequences": ["END"],
        "temperature": 1,
        "top_k": 5,
        "metadata": {"user_id": "u"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    request: ChatRequest = send("messages", **sent)
    assert request.messages == [{"role": "system", "content": "Be brief."}, USER]
    assert (request.max_tokens, request.stop, request.stop_sequences) == (9, ["END"], ["END"])
    assert (request.temperature, request.user, request.metadata) == (1.0, "u", {"user_id": "u"})
    assert request.raw == {"model": "m", "max_tokens": 9, "messages": [USER]} | sent
    assert not request.stream
    assert send("messages", stream=True).stream


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ([text("a")], "a"),
        ([text("a", **CACHED), text("b")], "a\n\nb"),
        ("a", "a"),
        ("", None),
        ([], None),
    ],
)
def test_the_system_prompt_is_one_text(sent: Any, seen: str | None) -> None:
    first = send("messages", system=sent).messages[0]
    assert first == (USER if seen is None else {"role": "system", "content": seen})


@pytest.mark.parametrize(
    ("blocks", "content"),
    [
        ([text("a", **CACHED)], "a"),
        ([text("a"), text("b")], [text("a"), text("b")]),
        (
            [text("a"), block("image", **source("base64", media_type="image/png", data="AA"))],
            [text("a"), block("image_url", image_url={"url": "data:image/png;base64,AA"})],
        ),
        (
            [block("image", **source("url", url="https://x/y.png"))],
            [block("image_url", image_url={"url": "https://x/y.png"})],
        ),
        ([block("document", **source("text", media_type="text/plain", data="words"))], "words"),
        ([block("document", title="T", context="C", **source("text", data="words"))], "T\n\nC\n\nwords"),
        ([block("document", title=None, **source("content", content="words"))], "words"),
        ([block("document", **source("content", content=[text("a"), text("b")]))], "a\n\nb"),
        (
            [block("document", title="T.pdf", **source("base64", media_type="application/pdf", data="AA"))],
            [block("file", file={"file_data": "data:application/pdf;base64,AA", "filename": "T.pdf"})],
        ),
        ([block("search_result", source="S", title="T", content=[text("a")])], "T\n\nS\n\na"),
    ],
)
def test_the_blocks_of_a_user_are_the_parts_of_a_chat(blocks: list[Any], content: Any) -> None:
    assert user(*blocks) == [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("members", "seen"),
    [
        ({"content": "42"}, {"content": "42"}),
        ({}, {"content": ""}),
        ({"content": None}, {"content": ""}),
        ({"content": []}, {"content": ""}),
        ({"content": "no such file", "is_error": True}, {"content": "no such file", "is_error": True}),
        ({"content": "42", "is_error": False}, {"content": "42"}),
        (
            {"content": [text("a"), block("image", **source("url", url="u"))]},
            {"content": [text("a"), block("image_url", image_url={"url": "u"})]},
        ),
        ({"content": [block("tool_reference", tool_name="f")]}, {"content": "f"}),
        (
            {"content": [block("document", **source("text", data="d")), text("e")]},
            {"content": [text("d"), text("e")]},
        ),
    ],
)
def test_the_result_of_a_tool_is_a_message(members: dict[str, Any], seen: dict[str, Any]) -> None:
    assert user(block("tool_result", tool_use_id="t", **members)) == [
        {"role": "tool", "tool_call_id": "t"} | seen
    ]


def test_results_come_before_the_rest() -> None:
    results = [block("tool_result", tool_use_id=each, content=each) for each in "ab"]
    assert user(text("x"), results[0], results[1], text("y")) == [
        {"role": "tool", "tool_call_id": "a", "content": "a"},
        {"role": "tool", "tool_call_id": "b", "content": "b"},
        {"role": "user", "content": [text("x"), text("y")]},
    ]


@pytest.mark.parametrize(
    ("blocks", "members"),
    [
        ([text("a"), text("b")], {"content": "ab"}),
        ([], {"content": ""}),
        ([CALL], {"content": None, "tool_calls": [CALLED]}),
        ([text("a"), CALL], {"content": "a", "tool_calls": [CALLED]}),
        (
            [THOUGHT, HIDDEN, text("a"), CALL],
            {
                "content": "a",
                "reasoning_content": "hm",
                "thinking_blocks": [THOUGHT, HIDDEN],
                "tool_calls": [CALLED],
            },
        ),
        ([HIDDEN], {"content": "", "thinking_blocks": [HIDDEN]}),
        ([block("thinking", thinking="hm")], {"content": "", "reasoning_content": "hm",
                                              "thinking_blocks": [block("thinking", thinking="hm")]}),
    ],
)  # fmt: skip
def test_an_answer_of_the_assistant_is_one_message(blocks: list[Any], members: dict[str, Any]) -> None:
    assert assistant(*blocks) == {"role": "assistant"} | members


def test_a_message_of_the_system_stays_in_its_place() -> None:
    sent = [USER, {"role": "system", "content": [text("a"), text("b")]}, USER]
    assert send("messages", messages=sent).messages == [USER, {"role": "system", "content": "a\n\nb"}, USER]


TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}, **CACHED}


def test_tools_are_those_of_a_chat() -> None:
    server_tool = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    request = send(
        "messages", tools=[TOOL, TOOL | {"type": "custom", "name": "g", "strict": True}, server_tool]
    )
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert request.tools == [
        {"type": "function", "function": function},
        {"type": "function", "function": function | {"name": "g", "strict": True}},
    ]
    assert send("messages", tools=[server_tool]).tools is None


@pytest.mark.parametrize(
    ("sent", "seen", "parallel"),
    [
        ({"type": "auto"}, "auto", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}, True),
    ],
)
def test_the_choice_of_a_tool_is_that_of_a_chat(sent: Any, seen: Any, parallel: bool) -> None:
    request = send("messages", tools=[TOOL], tool_choice=sent)
    assert (request.tool_choice, request.parallel_tool_calls) == (seen, parallel)


def test_the_configuration_of_the_output_is_that_of_a_chat() -> None:
    request = send(
        "messages", output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"a": 1}}}
    )
    assert request.reasoning_effort == "low"
    assert request.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "output", "schema": {"a": 1}},
    }


CONTENT = "messages[0].content"


@pytest.mark.parametrize(
    ("blocks", "param"),
    [
        ([], CONTENT),
        ([1], f"{CONTENT}[0]"),
        ([{}], f"{CONTENT}[0].type"),
        ([block("nonsense")], f"{CONTENT}[0].type"),
        ([text("a"), block("text")], f"{CONTENT}[1].text"),
        ([CALL], f"{CONTENT}[0].type"),
        ([block("image")], f"{CONTENT}[0].source"),
        ([block("image", source="x")], f"{CONTENT}[0].source"),
        ([block("image", **source("base64", data="AA"))], f"{CONTENT}[0].source.media_type"),
        ([block("image", **source("file", file_id="f"))], f"{CONTENT}[0].source.type"),
        ([block("document", **source("url", url="u"))], f"{CONTENT}[0].source.type"),
        ([block("document", **source("content"))], f"{CONTENT}[0].source.content"),
        ([block("document", title=1, **source("text", data="d"))], f"{CONTENT}[0].title"),
        ([block("tool_result")], f"{CONTENT}[0].tool_use_id"),
        ([block("tool_result", tool_use_id="t", is_error=1)], f"{CONTENT}[0].is_error"),
        ([block("tool_result", tool_use_id="t", content=[CALL])], f"{CONTENT}[0].content[0].type"),
        ([block("search_result", source="", title="", content=[THOUGHT])], f"{CONTENT}[0].content[0].type"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(blocks: list[Any], param: str) -> None:
    error = refused("messages", messages=[{"role": "user", "content": blocks}])
    assert (error.status, error.param) == (400, param)


def test_a_tool_of_the_server_cannot_be_demanded() -> None:
    tools = [TOOL, {"type": "web_search_20250305", "name": "web_search"}]
    error = refused("messages", tools=tools, tool_choice={"type": "tool", "name": "web_search"})
    assert (error.param, error.code) == ("tool_choice.name", "unsupported_value")


WORDS = st.text(max_size=5)
SIMPLE = st.one_of(
    WORDS.map(text),
    st.builds(lambda words: block("document", **source("text", data=words)), WORDS),
    st.builds(lambda url: block("image", **source("url", url=url)), st.text(min_size=1, max_size=5)),
)
RESULTS = st.builds(
    lambda name, content, error: block("tool_result", tool_use_id=name, content=content, is_error=error),
    st.text(min_size=1, max_size=3),
    st.one_of(WORDS, st.lists(SIMPLE, max_size=3)),
    st.booleans(),
)
ANSWERS = st.one_of(
    WORDS.map(text),
    st.builds(lambda words, signature: block("thinking", thinking=words, signature=signature), WORDS, WORDS),
    WORDS.map(lambda data: block("redacted_thinking", data=data)),
    st.builds(
        lambda name, given: block("tool_use", id=name, name=name, input={"x": given}),
        st.text(min_size=1, max_size=3),
        st.one_of(WORDS, st.integers(-9, 9), st.none()),
    ),
)


def texts_in(value: Any) -> str:
    """Return all text in the order in which a model would read it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(texts_in, value))
    if value.get("type") == "image":
        return str(value["source"]["url"])
    if "source" in value:
        return str(value["source"]["data"])
    return str(value.get("text", "") or (value.get("image_url") or {}).get("url", ""))


@given(st.lists(st.one_of(SIMPLE, RESULTS), min_size=1, max_size=6))
def test_nothing_of_a_users_message_is_lost_and_nothing_is_added(blocks: list[Any]) -> None:
    messages = user(*blocks)
    results = [each for each in blocks if each["type"] == "tool_result"]
    seen = [message for message in messages if message["role"] == "tool"]
    assert messages[: len(seen)] == seen
    assert [
        (each["tool_call_id"], texts_in(each["content"]), each.get("is_error", False)) for each in seen
    ] == [(each["tool_use_id"], texts_in(each["content"]), each["is_error"]) for each in results]
    rest = [each for each in blocks if each["type"] != "tool_result"]
    assert "".join(texts_in(each["content"]) for each in messages[len(seen) :]) == texts_in(rest)
    assert len(messages) == len(seen) + bool(rest)


@given(st.lists(ANSWERS, max_size=6))
def test_nothing_of_an_assistants_message_is_lost_and_thinking_is_untouched(blocks: list[Any]) -> None:
    message = assistant(*blocks)
    assert (message["content"] or "") == texts_in([each for each in blocks if each["type"] == "text"])
    thinking = [each for each in blocks if "thinking" in each["type"]]
    assert message.get("thinking_blocks", []) == thinking
    assert message.get("reasoning_content", "") == "".join(each.get("thinking", "") for each in thinking)
    calls = [
        (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls", [])
    ]
    assert calls == [
        (each["id"], each["name"], each["input"]) for each in blocks if each["type"] == "tool_use"
    ]
