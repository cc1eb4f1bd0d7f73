"""The official client asks for responses, and works with tools, wherever the handler runs."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest
from served import Served, chat, open_served, until

from trio_cluster import ChatRequest, OutputChunk

pytestmark = [
    # Its streams leave their async generators to the garbage collector.
    pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx|httpcore):ResourceWarning"),
]

USER: Any = {"role": "user", "content": "How warm is it in Kyoto?"}
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CHAT_TOOL: Any = {"type": "function", "function": {name: TOOL[name] for name in TOOL if name != "type"}}


async def agent(request: ChatRequest) -> AsyncIterator[Any]:
    """Ask for the weather; once it is known, tell it."""
    last = request.messages[-1]
    if last["role"] == "tool":
        yield OutputChunk.reasoning("Now I know. ")
        for word in ("It is ", last["content"], "."):
            yield word
        yield OutputChunk.usage(20, 4)
        return
    assert request.tools == [CHAT_TOOL]
    for word in ("I should ", "look. "):
        yield OutputChunk.reasoning(word)
    yield "One moment."
    yield OutputChunk.tool_call("weather", {"city": "Kyoto"}, id="call_1")
    yield OutputChunk.tool_call("weather", '{"city":', index=1)
    yield OutputChunk.tool_call("weather", ' "Nara"}', index=1)
    yield OutputChunk.usage(10, 9)


@pytest.fixture
async def with_agent(served: Served) -> Served:
    """The server, with a model that calls tools."""
    served.back.register_chat("agent", agent)
    await until(lambda: served.front.has_model("agent"))
    return served


# What the official client makes of it


async def test_a_plain_response_has_the_text_and_the_usage_of_the_handler(served: Served) -> None:
    async with served.client() as client:
        response = await client.responses.create(model="echo", input="a fine  day", instructions="Be kind.")
    assert response.output_text == "a fine  day"
    assert (response.object, response.model, response.status) == ("response", "echo", "completed")
    assert response.instructions == "Be kind."
    assert response.error is None
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (
        4,
        8,
        12,
    )
    [request] = served.trace.requests
    assert request.messages[0] == {"role": "system", "content": "Be kind."}


async def test_a_streamed_response_adds_up_to_the_plain_one(served: Served) -> None:
    async with (
        served.client() as client,
        await client.responses.create(model="echo", input="a fine  day", stream=True) as stream,
    ):
        events = [event async for event in stream]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert deltas == ["a", " fine", " ", " day"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "a fine  day"
    assert last.response.usage is not None
    assert last.response.usage.total_tokens == 12


async def test_the_clients_own_accumulator_follows_a_stream(with_agent: Served) -> None:
    async with (
        with_agent.client() as client,
        client.responses.stream(model="agent", input=[USER], tools=[TOOL]) as stream,
    ):
        snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        response = await stream.get_final_response()
    assert snapshots == ["One moment."]
    assert [item.type for item in response.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    calls = [item for item in response.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [{"city": "Kyoto"}, {"city": "Nara"}]


class Place(pydantic.BaseModel):
    city: str


async def test_a_response_can_be_parsed_into_a_class(served: Served) -> None:
    async with served.client() as client:
        response = await client.responses.parse(model="echo", input='{"city": "Kyoto"}', text_format=Place)
        async with client.responses.stream(
            model="echo", input='{"city": "Nara"}', text_format=Place
        ) as stream:
            streamed = await stream.get_final_response()
    assert response.output_parsed == Place(city="Kyoto")
    assert streamed.output_parsed == Place(city="Nara")
    wanted = served.trace.requests[0].response_format
    assert wanted["type"] == "json_schema"
    assert wanted["json_schema"]["schema"]["required"] == ["city"]


async def test_the_synchronous_client_is_served_as_well(with_agent: Served) -> None:
    def ask(client: openai.OpenAI) -> None:
        assert client.responses.create(model="echo", input="a day").output_text == "a day"
        with client.responses.create(model="echo", input="a day", stream=True) as stream:
            *_, last = stream
        assert last.type == "response.completed"
        with client.responses.stream(model="agent", input=[USER], tools=[TOOL]) as helper:
            assert helper.get_final_response().output_text == "One moment."

    await with_agent.with_sync_client(ask)


async def test_the_route_is_there_without_the_prefix_too(served: Served) -> None:
    async with served.client(base="") as client:
        assert (await client.responses.create(model="echo", input="x")).output_text == "x"


# Tools, over two turns


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_a_tool_is_called_and_its_result_is_used(with_agent: Served, stream: bool) -> None:
    async with with_agent.client() as client:

        async def ask(conversation: list[Any]) -> Any:
            if not stream:
                return await client.responses.create(model="agent", input=conversation, tools=[TOOL])
            async with client.responses.stream(model="agent", input=conversation, tools=[TOOL]) as events:
                return await events.get_final_response()

        conversation: list[Any] = [USER]
        first = await ask(conversation)
        assert first.output_text == "One moment."
        calls = [item for item in first.output if item.type == "function_call"]
        assert calls[0].call_id == "call_1"
        conversation += [item.to_dict() for item in first.output]
        conversation += [
            {"type": "function_call_output", "call_id": call.call_id, "output": f"{20 + i} degrees"}
            for i, call in enumerate(calls)
        ]
        second = await ask(conversation)
    assert second.output_text == "It is 21 degrees."
    assert second.output[0].content[0].text == "Now I know. "


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_the_same_handler_does_so_in_a_chat(with_agent: Served, stream: bool) -> None:
    async with with_agent.client() as client:

        async def ask(messages: list[Any]) -> Any:
            if not stream:
                answer = await client.chat.completions.create(
                    model="agent", messages=messages, tools=[CHAT_TOOL]
                )
                return answer.choices[0]
            async with client.chat.completions.stream(
                model="agent", messages=messages, tools=[CHAT_TOOL]
            ) as events:
                return (await events.get_final_completion()).choices[0]

        first = await ask([USER])
        assert first.finish_reason == "tool_calls"
        assert first.message.content == "One moment."
        assert first.message.reasoning_content == "I should look. "
        calls = first.message.tool_calls
        assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Kyoto", "Nara"]
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": f"{20 + i} degrees"}
            for i, call in enumerate(calls)
        ]
        # The client's own message has members that are its own business.
        answer = {
            "role": "assistant",
            "content": first.message.content,
            "tool_calls": [
                {"id": call.id, "type": "function", "function": call.function.to_dict()} for call in calls
            ],
        }
        second = await ask([USER, answer, *results])
    assert (second.finish_reason, second.message.content) == ("stop", "It is 21 degrees.")


# What goes wrong


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"previous_response_id": "resp_1", "conversation": "conv_1"}, "previous_response_id"),
        ({"input": []}, "input"),
        ({"temperature": 3}, "temperature"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
            "input",
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
async def test_a_refusal_names_the_field(
    served: Served, stream: bool, fields: dict[str, Any], param: str
) -> None:
    asked = {"model": "echo", "input": "x", "stream": stream} | fields
    async with served.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(**asked)
    assert caught.value.param == param
    assert served.trace.requests == []


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"model": "vectors"}, openai.BadRequestError),
        ({"model": "failing"}, openai.InternalServerError),
        ({"model": "failing", "extra_body": {"status": 429}}, openai.RateLimitError),
        ({"model": "failing", "extra_body": {"status": 503}}, openai.InternalServerError),
        ({"model": "wrong-type"}, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_an_error_before_the_first_output_is_of_the_class_of_its_status(
    served: Served, stream: bool, fields: dict[str, Any], error: type[openai.APIStatusError]
) -> None:
    async with served.client() as client:
        with pytest.raises(error):
            await client.responses.create(**({"input": "x", "stream": stream} | fields))


async def test_a_stream_that_fails_raises_and_never_looks_finished(served: Served) -> None:
    async with served.client() as client:
        stream = await client.responses.create(
            model="failing", input="x", stream=True, extra_body={"pieces": 3, "status": 429}
        )
        seen: list[str] = []

        async def take() -> None:
            async for event in stream:
                seen.append(event.type)

        async def accumulate() -> None:
            async with client.responses.stream(
                model="failing", input="x", extra_body={"pieces": 3, "status": 429}
            ) as helper:
                await helper.get_final_response()

        with pytest.raises(openai.APIError, match="as you wish") as caught:
            await take()
        with pytest.raises(openai.APIError, match="as you wish"):
            await accumulate()
    assert caught.value.code == "my_code"
    assert seen.count("response.output_text.delta") == 3
    assert "response.completed" not in seen
    raw = await served.stream(
        {"model": "failing", "input": "x", "stream": True, "pieces": 3}, "/v1/responses"
    )
    assert raw.report.ending == "failed"
    assert raw.report.error is not None
    assert raw.report.error["code"] == "handler_failed"


async def test_a_response_that_was_cut_short_says_so(served: Served) -> None:
    async def brief(request: ChatRequest) -> AsyncIterator[Any]:
        yield "a"
        yield OutputChunk.finish("length")

    served.back.register_chat("brief", brief)
    await until(lambda: served.front.has_model("brief"))
    async with served.client() as client:
        response = await client.responses.create(model="brief", input="x", max_output_tokens=1)
        async with await client.responses.create(model="brief", input="x", stream=True) as stream:
            *_, last = [event async for event in stream]
    assert (response.status, response.output_text) == ("incomplete", "a")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert last.type == "response.incomplete"


async def test_a_client_that_leaves_a_stream_ends_the_work(served: Served) -> None:
    async with served.client() as client:
        stream = await client.responses.create(model="endless/async-generator", input="x", stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
    assert await served.trace.ended(within=1) == "cancelled"


# Here and there

QUESTIONS: dict[str, dict[str, Any]] = {
    "plain": {"model": "echo", "input": "a fine  day"},
    "streamed": {"model": "echo", "input": "a fine  day", "stream": True},
    "tools": {"model": "agent", "input": [USER], "tools": [TOOL]},
    "streamed tools": {"model": "agent", "input": [USER], "tools": [TOOL], "stream": True},
    "mirror": {"model": "mirror", "input": "\u00e4\u0000\U0001f600", "unknown": [1, 2.50, None]},
    "refused": {"model": "echo", "input": "x", "previous_response_id": "resp_1"},
    "no model": {"model": "nobody", "input": "x"},
    "wrong kind": {"model": "vectors", "input": "x"},
    "error of the handler": {"model": "failing", "input": "x", "status": 429},
    "crash in a stream": {"model": "failing", "input": "x", "stream": True, "pieces": 3},
}


async def test_a_response_is_the_same_byte_for_byte_here_and_from_a_worker() -> None:
    async with open_served("local") as here, open_served("forwarded") as there:
        for served in (here, there):
            served.back.register_chat("agent", agent)
        await until(lambda: there.front.has_model("agent"))
        for name, body in QUESTIONS.items():
            answers = []
            for served in (here, there):
                answer = await served.stream(body, "/v1/responses")
                same = re.sub(rb'"((resp|msg|rs|fc|call)_)[0-9a-f]{16,}', rb'"\1X', answer.body)
                answers.append((answer.status, answer.whole, re.sub(rb'"created_at":[0-9]+', b"", same)))
            assert (name, answers[0]) == (name, answers[1])


async def test_a_chat_with_reasoning_and_tool_calls_is_the_same_here_and_from_a_worker() -> None:
    async with open_served("local") as here, open_served("forwarded") as there:
        for served in (here, there):
            served.back.register_chat("agent", agent)
        await until(lambda: there.front.has_model("agent"))
        for stream in (False, True):
            answers = []
            for served in (here, there):
                answer = await served.stream(chat("agent", tools=[CHAT_TOOL], stream=stream))
                same = re.sub(rb'"((chatcmpl-|call_))[0-9a-f]{16,}', rb'"\1X', answer.body)
                answers.append((answer.status, re.sub(rb'"created":[0-9]+', b"", same)))
            assert answers[0] == answers[1]
