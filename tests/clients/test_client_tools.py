"""An agent with tools, over two turns, as programs are built around the official clients.

The model asks for two tools at once, the program runs them and answers, the model concludes. Whatever the model said
goes back to it as the client gave it, with all that the client has added, which is what programs do.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import attrs
import pytest
from client_drivers import Answer, Client
from served import Served, until

from trio_cluster import ChatRequest, OutputChunk

pytestmark = pytest.mark.feature("tools over two turns")

QUESTION = "What is it like in Kyoto?"
CONCLUSION = "In Kyoto it is 21 degrees at 9 o'clock."
THOUGHT = "The user wants to know two things."

TOOLS = {
    "temperature": lambda city: f"21 degrees in {city}",
    "time": lambda city: f"9 o'clock in {city}",
}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


@attrs.define
class Concierge:
    """The model.

    Attributes:
        requests: all that it was asked.
    """

    requests: list[ChatRequest] = attrs.field(factory=list)

    async def answer(self, request: ChatRequest) -> AsyncIterator[Any]:
        """Be the handler: ask for tools, and when they have answered, conclude."""
        self.requests.append(request)
        told = [message["content"] for message in request.messages if message["role"] == "tool"]
        yield OutputChunk.reasoning(THOUGHT)
        if told:
            yield "In Kyoto it is "
            yield " at ".join(each.removesuffix(" in Kyoto") for each in told) + "."
        else:
            yield OutputChunk.tool_call("temperature", '{"city":', id="call_a", index=0)
            yield OutputChunk.tool_call("temperature", ' "Kyoto"}', index=0)
            yield OutputChunk.tool_call("time", {"city": "Kyoto"}, id="call_b")
        yield OutputChunk.usage(10, 5)


@pytest.fixture
async def concierge(served: Served) -> Concierge:
    model = Concierge()
    served.back.register_chat("concierge", model.answer)
    await until(lambda: served.front.has_model("concierge"))
    return model


def run(name: str, arguments: str) -> str:
    """Use a tool."""
    return TOOLS[name](**json.loads(arguments))


# Chats

Turn: TypeAlias = Callable[[Client, list[Any]], Awaitable[dict[str, Any]]]


def sound(answer: Answer) -> Answer:
    """Return an answer that is one."""
    assert answer.failure is None, answer.failure
    assert answer.complaints == []
    return answer


def offered() -> list[Any]:
    """Return the tools in the form that chats have for them."""
    function: dict[str, Any] = {"parameters": PARAMETERS, "strict": True}
    return [{"type": "function", "function": {"name": name, **function}} for name in TOOLS]


async def plain(client: Client, messages: list[Any]) -> dict[str, Any]:
    answer = sound(
        await client.ask(
            "chat.completions.create",
            model="concierge",
            messages=messages,
            tools=offered(),
            tool_choice="auto",
        )
    )
    [choice] = answer.value["choices"]
    assert choice["finish_reason"] == ("tool_calls" if choice["message"].get("tool_calls") else "stop")
    message: dict[str, Any] = choice["message"]
    return message


async def streamed(client: Client, messages: list[Any]) -> dict[str, Any]:
    """Put the message together from its deltas, as programs do that have no helper for it."""
    answer = sound(
        await client.ask(
            "chat.completions.create", model="concierge", messages=messages, tools=offered(), stream=True
        )
    )
    message: dict[str, Any] = {"role": "assistant", "content": None}
    calls: dict[int, dict[str, Any]] = {}
    reasons = []
    for event in answer.events:
        [choice] = event["choices"]
        delta = choice["delta"]
        for member in ("content", "reasoning_content"):
            if delta.get(member):
                message[member] = (message.get(member) or "") + delta[member]
        for piece in delta.get("tool_calls", ()):
            call = calls.setdefault(piece["index"], {"function": {"name": "", "arguments": ""}})
            function = piece["function"]
            call["id"] = piece.get("id") or call["id"]
            call["type"] = piece.get("type") or call["type"]
            call["function"]["name"] = function.get("name") or call["function"]["name"]
            call["function"]["arguments"] += function.get("arguments") or ""
        reasons.append(choice["finish_reason"])
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    assert [reason for reason in reasons if reason] == ["tool_calls" if calls else "stop"]
    return message


async def put_together(client: Client, messages: list[Any]) -> dict[str, Any]:
    """Let the client's own helper do that."""
    answer = await client.ask(
        "chat.completions.stream", model="concierge", messages=messages, tools=offered()
    )
    message: dict[str, Any] = sound(answer).value["choices"][0]["message"]
    return message


@pytest.mark.parametrize("turn", [plain, streamed, put_together])
async def test_an_agent_chats_with_a_model_that_uses_tools(
    client: Client, concierge: Concierge, turn: Turn
) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    message = await turn(client, messages)
    while calls := message.get("tool_calls"):
        messages.append(message)
        messages += [
            {
                "role": "tool",
                "tool_call_id": call["id"],
                "content": run(**_name_and_arguments(call["function"])),
            }
            for call in calls
        ]
        message = await turn(client, messages)
    assert message["content"] == CONCLUSION
    assert message["reasoning_content"] == THOUGHT
    first, second = concierge.requests
    assert [tool["function"]["name"] for tool in first.tools or []] == list(TOOLS)
    [_, asked, temperature, time] = second.messages
    assert [call["id"] for call in asked["tool_calls"]] == ["call_a", "call_b"]
    assert [call["function"]["arguments"] for call in asked["tool_calls"]] == [
        '{"city": "Kyoto"}',
        '{"city":"Kyoto"}',
    ]
    assert [temperature["tool_call_id"], time["tool_call_id"]] == ["call_a", "call_b"]


def _name_and_arguments(call: dict[str, Any]) -> dict[str, Any]:
    # Helpers add what they have parsed.
    return {name: call[name] for name in ("name", "arguments")}


# Responses


def offered_for_responses() -> list[Any]:
    """Return the tools in the form that responses have for them."""
    function: dict[str, Any] = {"parameters": PARAMETERS, "strict": True}
    return [{"type": "function", "name": name, **function} for name in TOOLS]


async def plain_response(client: Client, items: list[Any]) -> list[Any]:
    answer = await client.ask(
        "responses.create", model="concierge", input=items, tools=offered_for_responses()
    )
    output: list[Any] = sound(answer).value["output"]
    return output


async def streamed_response(client: Client, items: list[Any]) -> list[Any]:
    """Take the items as they are complete, and see that the last event has the same."""
    answer = sound(
        await client.ask(
            "responses.create", model="concierge", input=items, tools=offered_for_responses(), stream=True
        )
    )
    done = [event for event in answer.events if event["type"] == "response.output_item.done"]
    # Calls that the model makes at once may be complete in another order than they have begun.
    output: list[Any] = [event["item"] for event in sorted(done, key=lambda event: event["output_index"])]
    assert answer.events[-1]["type"] == "response.completed"
    assert answer.events[-1]["response"]["output"] == output
    assert [event["sequence_number"] for event in answer.events] == list(range(len(answer.events)))
    return output


async def response_put_together(client: Client, items: list[Any]) -> list[Any]:
    """Let the client's own helper do that."""
    answer = await client.ask(
        "responses.stream", model="concierge", input=items, tools=offered_for_responses()
    )
    output: list[Any] = sound(answer).value["output"]
    return output


@pytest.mark.parametrize("turn", [plain_response, streamed_response, response_put_together])
async def test_an_agent_exchanges_items_with_a_model_that_uses_tools(
    client: Client, concierge: Concierge, turn: Callable[[Client, list[Any]], Awaitable[list[Any]]]
) -> None:
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    output = await turn(client, items)
    while calls := [item for item in output if item["type"] == "function_call"]:
        items += output
        items += [
            {
                "type": "function_call_output",
                "call_id": call["call_id"],
                "output": run(**_name_and_arguments(call)),
            }
            for call in calls
        ]
        output = await turn(client, items)
    reasoning, message = output
    assert (reasoning["type"], reasoning["content"][0]["text"]) == ("reasoning", THOUGHT)
    assert message["content"][0]["text"] == CONCLUSION
    first, second = concierge.requests
    # A handler sees a chat, however it was asked.
    assert [tool["function"]["name"] for tool in first.tools or []] == list(TOOLS)
    [_, asked, temperature, time] = second.messages
    assert asked["reasoning_content"] == THOUGHT
    assert [call["id"] for call in asked["tool_calls"]] == ["call_a", "call_b"]
    assert [temperature["tool_call_id"], time["tool_call_id"]] == ["call_a", "call_b"]
    assert temperature["content"] == "21 degrees in Kyoto"
