"""What a client sends to /v1/responses, as a chat handler sees it."""

from __future__ import annotations

from typing import Any

import pytest
from openai_answers import refused, send

from trio_cluster.openai import ChatRequest


def messages(*items: Any) -> list[dict[str, Any]]:
    request: ChatRequest = send("responses", input=list(items))
    return request.messages


USER = {"role": "user", "content": "hi"}
CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "c1",
    "name": "f",
    "arguments": "{}",
    "status": "completed",
}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "42"}


def reasoned(text: str) -> dict[str, Any]:
    return {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
    }


def answered(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]}


def test_a_text_is_a_message_of_the_user() -> None:
    request = send("responses", input="Hello")
    assert request.messages == [{"role": "user", "content": "Hello"}]
    assert request.last_text == "Hello"
    assert request.raw == {"model": "m", "input": "Hello"}


def test_instructions_come_first() -> None:
    assert send("responses", instructions="Be brief.").messages == [
        {"role": "system", "content": "Be brief."},
        USER,
    ]
    assert send("responses", instructions="").messages == [USER]


@pytest.mark.parametrize("role", ["user", "system", "developer", "assistant"])
@pytest.mark.parametrize("typed", [{}, {"type": "message"}, {"type": None}])
def test_a_message_is_a_message(role: str, typed: dict[str, Any]) -> None:
    assert messages({"role": role, "content": "x"} | typed) == [{"role": role, "content": "x"}]


def test_parts_are_those_of_a_chat() -> None:
    parts = [
        {"type": "input_text", "text": "what is this?"},
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low", "file_id": None},
        {"type": "input_image", "image_url": "https://example.org/x.png"},
        {"type": "input_file", "file_data": "data:application/pdf;base64,AAAA", "filename": "x.pdf"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ]
    request = send("responses", input=[{"role": "user", "content": parts}])
    assert request.messages[0]["content"] == [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "x.pdf"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ]
    assert request.has_image_inputs
    assert request.last_text == "what is this?"


def test_text_that_is_one_part_is_just_text() -> None:
    one, two = {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}
    assert messages({"role": "user", "content": [one]}) == [{"role": "user", "content": "a"}]
    assert messages({"role": "user", "content": [one, two]})[0]["content"] == [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
    ]
    assert messages({"role": "assistant", "content": [one, two]}) == [{"role": "assistant", "content": "ab"}]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([CALL], [{"role": "assistant", "content": None, "tool_calls": [CALLED]}]),
        (
            [answered("Let me see."), CALL, OUTPUT],
            [
                {"role": "assistant", "content": "Let me see.", "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
            ],
        ),
        (
            [CALL, CALL | {"call_id": "c2"}],
            [{"role": "assistant", "content": None, "tool_calls": [CALLED, CALLED | {"id": "c2"}]}],
        ),
        (
            [answered("a"), CALL, answered("b"), OUTPUT],
            [
                {"role": "assistant", "content": "ab", "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
            ],
        ),
        (
            [CALL, OUTPUT, answered("42.")],
            [
                {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
                {"role": "assistant", "content": "42."},
            ],
        ),
        (
            [answered("a"), answered("b")],
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        (
            [reasoned("hm"), answered("a"), CALL],
            [{"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": [CALLED]}],
        ),
        (
            [reasoned("hm"), CALL, reasoned(", so"), CALL | {"call_id": "c2"}],
            [
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "hm, so",
                    "tool_calls": [CALLED, CALLED | {"id": "c2"}],
                }
            ],
        ),
        (
            [answered("a"), reasoned("hm"), answered("b")],
            [
                {"role": "assistant", "content": "a"},
                {"role": "assistant", "content": "b", "reasoning_content": "hm"},
            ],
        ),
        ([reasoned("hm")], [{"role": "assistant", "content": "", "reasoning_content": "hm"}]),
        (
            [reasoned("hm"), USER],
            [{"role": "assistant", "content": "", "reasoning_content": "hm"}, USER],
        ),
        (
            [
                {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "short"}]},
                answered("a"),
            ],
            [{"role": "assistant", "content": "a", "reasoning_content": "short"}],
        ),
        ([{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}], []),
        ([USER, answered("a")], [USER, {"role": "assistant", "content": "a"}]),
    ],
)
def test_what_belongs_to_one_answer_is_one_message(items: list[Any], expected: list[Any]) -> None:
    assert messages(*items) == expected


def test_the_result_of_a_call_may_have_parts() -> None:
    parts = [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": "data:,"}]
    [message] = messages(OUTPUT | {"output": parts})
    assert message["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "data:,"}},
    ]


def test_tools_are_those_of_a_chat() -> None:
    parameters = {"type": "object", "properties": {}}
    tools = [
        {"type": "function", "name": "f", "description": "d", "parameters": parameters, "strict": True},
        {"type": "function", "name": "g", "parameters": None, "strict": None},
    ]
    assert send("responses", tools=tools).tools == [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": parameters, "strict": True},
        },
        {"type": "function", "function": {"name": "g"}},
    ]


#: What a coding agent sends: an MCP server, a tool that takes text, and tools of the server.
GRAMMAR = {"syntax": "lark", "definition": "start: x"}
AGENT_TOOLS = [
    {"type": "function", "name": "shell", "parameters": {}},
    {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"} | GRAMMAR},
    {
        "type": "namespace",
        "name": "mcp__demo",
        "description": "a demo",
        "tools": [
            {"type": "function", "name": "add", "description": "adds", "strict": False, "parameters": {}},
            {"type": "web_search"},
        ],
    },
    {"type": "namespace", "name": "mcp__other__", "tools": [{"type": "custom", "name": "say"}]},
    {"type": "web_search", "external_web_access": False},
    {"type": "mcp", "server_label": "x"},
    {"type": "some_new_tool"},
]


def test_namespaces_are_flattened_and_tools_of_the_server_are_not_offered() -> None:
    assert send("responses", tools=AGENT_TOOLS).tools == [
        {"type": "function", "function": {"name": "shell", "parameters": {}}},
        {
            "type": "custom",
            "custom": {"name": "apply_patch", "format": {"type": "grammar", "grammar": GRAMMAR}},
        },
        {
            "type": "function",
            "function": {"name": "mcp__demo__add", "description": "adds", "strict": False, "parameters": {}},
        },
        {"type": "custom", "custom": {"name": "mcp__other__say"}},
    ]
    assert send("responses", tools=AGENT_TOOLS[4:]).tools is None


def test_calls_of_tools_in_namespaces_and_of_custom_tools_come_back_as_they_were_offered() -> None:
    items = [
        {"type": "function_call", "call_id": "1", "name": "add", "namespace": "mcp__demo", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "2", "name": "apply_patch", "input": "*** Begin"},
        {"type": "function_call_output", "call_id": "1", "output": "3"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "done"},
    ]
    assert send("responses", tools=AGENT_TOOLS, input=items).messages == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "mcp__demo__add", "arguments": "{}"}},
                {"id": "2", "type": "custom", "custom": {"name": "apply_patch", "input": "*** Begin"}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "tool", "tool_call_id": "2", "content": "done"},
    ]


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "custom", "name": "f"}, {"type": "custom", "custom": {"name": "f"}}),
        (
            {"type": "function", "name": "f", "namespace": "n"},
            {"type": "function", "function": {"name": "n__f"}},
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, "none"),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "web_search"}, {"type": "custom", "name": "f"}],
            },
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "custom", "custom": {"name": "f"}}]},
            },
        ),
        ({"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
            },
        ),
    ],
)
def test_the_choice_of_a_tool_is_that_of_a_chat(sent: Any, seen: Any) -> None:
    assert send("responses", tool_choice=sent).tool_choice == seen


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ({"type": "text"}, {"type": "text"}),
        ({"type": "json_object"}, {"type": "json_object"}),
        (
            {
                "type": "json_schema",
                "name": "n",
                "schema": {"type": "object"},
                "strict": True,
                "description": None,
            },
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
            },
        ),
    ],
)
def test_the_format_of_the_text_is_that_of_a_chat(sent: Any, seen: Any) -> None:
    request = send("responses", text={"format": sent, "verbosity": "low"})
    assert (request.response_format, request.verbosity) == (seen, "low")


def test_other_fields_are_under_their_names_in_a_chat() -> None:
    request = send(
        "responses",
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.25,
        reasoning={"effort": "low", "summary": "auto"},
        parallel_tool_calls=False,
        metadata={"a": "b"},
        user="u",
        stream=True,
        stream_options={"include_obfuscation": False},
        unheard_of=[1],
    )
    assert (request.max_tokens, request.token_limit) == (7, 7)
    assert (request.temperature, request.top_p, request.reasoning_effort) == (0.5, 0.25, "low")
    assert (request.parallel_tool_calls, request.metadata, request.user) == (False, {"a": "b"}, "u")
    assert (request.stream, request.n, request.logprobs) == (True, 1, False)
    assert request.raw["unheard_of"] == [1]


@pytest.mark.parametrize(
    ("fields", "top"),
    [({"include": ["message.output_text.logprobs"]}, None), ({"top_logprobs": 3}, 3)],
)
def test_log_probabilities_can_be_asked_for(fields: dict[str, Any], top: int | None) -> None:
    request = send("responses", **fields)
    assert (request.logprobs, request.top_logprobs) == (True, top)


def part(**members: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [members]}]}


def item(**members: Any) -> dict[str, Any]:
    return {"input": [USER, members]}


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "not stored"),
        ({"background": True}, "background", "ends with the request"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "no tools of its own"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]}},
            "tool_choice.tools[0].type",
            "'web_search'",
        ),
        (item(type="item_reference", id="msg_1"), "input[1].id", "nothing is stored"),
        (item(type="item_reference", id="rs_1"), "input[1].id", "providerOptions.openai.store"),
        (item(id="msg_1"), "input[1].id", "openai.chat(...)"),
        (item(type="web_search_call", id="ws_1"), "input[1].type", "'web_search_call'"),
        (item(type="local_shell_call"), "input[1].type", "expected one of 'message'"),
        (
            part(type="input_image", file_id="file-1"),
            "input[0].content[0].file_id",
            "send the content itself",
        ),
        (part(type="input_file", file_id="file-1"), "input[0].content[0].file_id", "send the content itself"),
        (part(type="input_file", file_url="https://x"), "input[0].content[0].file_url", "'file_data'"),
    ],
)
def test_what_needs_storage_or_server_tools_is_refused_with_a_reason(
    fields: dict[str, Any], param: str, why: str
) -> None:
    error = refused("responses", **fields)
    assert (error.status, error.param, error.code) == (400, param, "unsupported_value")
    assert why in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (item(), "input[1].role"),
        (item(type=1), "input[1].type"),
        (item(type="message"), "input[1].role"),
        (item(role="tool", content="x"), "input[1].role"),
        (item(role=1, content="x"), "input[1].role"),
        (item(role="user"), "input[1].content"),
        (item(role="user", content=1), "input[1].content"),
        (item(role="user", content=[]), "input[1].content"),
        (item(role="user", content=["x"]), "input[1].content[0]"),
        (part(text="x"), "input[0].content[0].type"),
        (part(type="image_url", image_url={"url": "x"}), "input[0].content[0].type"),
        (part(type="input_text"), "input[0].content[0].text"),
        (part(type="output_text", text=1), "input[0].content[0].text"),
        (part(type="refusal"), "input[0].content[0].refusal"),
        (part(type="input_image"), "input[0].content[0].image_url"),
        (part(type="input_image", image_url={"url": "x"}), "input[0].content[0].image_url"),
        (part(type="input_file", filename="x"), "input[0].content[0].file_data"),
        (part(type="input_audio", input_audio={"data": "x"}), "input[0].content[0].input_audio.format"),
        (item(type="function_call", name="f", arguments="{}"), "input[1].call_id"),
        (item(type="function_call", call_id="c", arguments="{}"), "input[1].name"),
        (item(type="function_call", call_id="c", name="f", arguments={}), "input[1].arguments"),
        (item(type="function_call", call_id="c", name="f", arguments="", namespace=1), "input[1].namespace"),
        (item(type="custom_tool_call"), "input[1].call_id"),
        (item(type="custom_tool_call", call_id="c", name="f", input={}), "input[1].input"),
        (item(type="custom_tool_call_output", call_id="c", output=1), "input[1].output"),
        (item(type="function_call_output", output="x"), "input[1].call_id"),
        (item(type="function_call_output", call_id="c"), "input[1].output"),
        (item(type="function_call_output", call_id="c", output=1), "input[1].output"),
        (item(type="function_call_output", call_id="c", output=[{"type": "x"}]), "input[1].output[0].type"),
        (item(type="reasoning", content="x"), "input[1].content"),
        (item(type="reasoning", summary=[{}]), "input[1].summary[0].text"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [{"type": "custom"}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools[0].tools"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{}]}]}, "tools[0].tools[0].type"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]},
            "tools[0].tools[0].name",
        ),
        (
            {
                "tools": [
                    {"type": "function", "name": "n__f"},
                    {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]},
                ]
            },
            "tools",
        ),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "none", "tools": [1]}}, "tool_choice.mode"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"text": {"format": {}}}, "text.format.type"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"reasoning": {"effort": 1}}, "reasoning.effort"),
        ({"stream_options": {}}, "stream_options"),
        ({"input": ...}, "input"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    error = refused("responses", **fields)
    assert (error.status, error.param) == (400, param)
    assert f"'{param}'" in error.message


def test_an_unsupported_type_of_any_length_makes_a_short_message() -> None:
    assert len(refused("responses", **item(type="x" * 10_000)).message) < 300
    assert len(refused("responses", tool_choice={"type": "x" * 10_000}).message) < 300
