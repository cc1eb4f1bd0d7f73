"""The official client believes that responses are stored, and finds them, wherever the handler runs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import trio
from served import Served, open_served, until

from trio_cluster import ChatRequest, OutputChunk

pytestmark = [
    # Its streams leave their async generators to the garbage collector.
    pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx|httpcore):ResourceWarning"),
]

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


class Teller:
    """A model that asks for the weather once, and otherwise says how many messages it was given.

    Attributes:
        requests: all that it was asked.
    """

    def __init__(self) -> None:
        self.requests: list[ChatRequest] = []

    async def answer(self, request: ChatRequest) -> AsyncIterator[Any]:
        self.requests.append(request)
        if request.last_text == "break":
            yield "Well, "
            raise RuntimeError
        if request.last_text == "much":
            yield OutputChunk.finish("length")
        elif request.tools and request.messages[-1]["role"] != "tool":
            yield OutputChunk.reasoning("I should look. ")
            yield OutputChunk.tool_call("weather", {"city": "Kyoto"}, id="call_1")
        else:
            for word in ("It is ", str(len(request.messages)), "."):
                yield word
        yield OutputChunk.usage(10, 9)


@pytest.fixture
async def teller(served: Served) -> Teller:
    model = Teller()
    served.back.register_chat("teller", model.answer)
    await until(lambda: served.front.has_model("teller"))
    return model


async def ask(client: openai.AsyncOpenAI, text: Any, *, stream: bool = False, **fields: Any) -> Any:
    """Return a response, streamed or not."""
    if not stream:
        return await client.responses.create(model="teller", input=text, **fields)
    last = None
    async for event in await client.responses.create(model="teller", input=text, stream=True, **fields):
        last = event
    return last.response  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_a_response_can_be_retrieved_continued_and_deleted(
    served: Served, teller: Teller, stream: bool
) -> None:
    async with served.client() as client:
        first = await ask(client, "one", stream=stream, instructions="Be kind.", metadata={"a": "b"})
        assert first.store is True
        assert await client.responses.retrieve(first.id) == first
        second = await ask(client, "two", stream=stream, previous_response_id=first.id)
        assert second.previous_response_id == first.id
        third = await ask(client, [{"role": "user", "content": "three"}], previous_response_id=second.id)
        assert (second.output_text, third.output_text) == ("It is 3.", "It is 5.")
        # Instructions are those of one request only.
        assert [(each["role"], each["content"]) for each in teller.requests[-1].messages] == [
            ("user", "one"),
            ("assistant", "It is 2."),
            ("user", "two"),
            ("assistant", "It is 3."),
            ("user", "three"),
        ]
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, "four", previous_response_id=first.id)
        assert (caught.value.code, caught.value.param) == (
            "previous_response_not_found",
            "previous_response_id",
        )
        # What continued it has all of it.
        fourth = await ask(client, "four", previous_response_id=third.id)
        assert fourth.output_text == "It is 7."


async def test_the_input_of_a_response_is_listed_with_all_that_it_continues(
    served: Served, teller: Teller
) -> None:
    async with served.client() as client:
        first = await ask(client, "one")
        second = await ask(
            client,
            [{"role": "user", "content": [{"type": "input_text", "text": "two"}]}],
            previous_response_id=first.id,
        )
        listed = await client.responses.input_items.list(second.id, order="asc")
        assert [item.content[0].text for item in listed.data] == ["one", "It is 1.", "two"]  # type: ignore[union-attr]
        ids = [item.id for item in listed.data]
        assert len(set(ids)) == 3
        assert ids[1] == first.output[0].id
        pages = [item.id async for item in client.responses.input_items.list(second.id, limit=1)]
        assert pages == ids[::-1]
        page = await client.responses.input_items.list(second.id, limit=2, order="asc", after=ids[0])
        assert ([item.id for item in page.data], page.has_more) == (ids[1:], False)
        for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_none"}):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.input_items.list(second.id, **wrong)  # type: ignore[arg-type]
            assert caught.value.param == next(iter(wrong))
        with pytest.raises(openai.NotFoundError):
            await client.responses.input_items.list("resp_none")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_a_tool_loop_goes_on_by_the_id_of_the_response(
    served: Served, teller: Teller, stream: bool
) -> None:
    async with served.client() as client:
        first = await ask(client, "How warm?", stream=stream, tools=[TOOL])
        [call] = [item for item in first.output if item.type == "function_call"]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}
        second = await ask(client, [result], stream=stream, tools=[TOOL], previous_response_id=first.id)
        assert second.output_text == "It is 3."
        [_, answer, tool] = teller.requests[-1].messages
        assert answer["reasoning_content"] == "I should look. "
        assert answer["tool_calls"][0]["id"] == tool["tool_call_id"] == "call_1"
        # By references to the items, as the AI SDK does it; those that are there already are left out.
        references = [{"type": "item_reference", "id": item.id} for item in first.output]
        question = {"role": "user", "content": "How warm?"}
        for fields in (
            {"input": [question, *references, result]},
            {"input": [question, *references, result]},
        ):
            again = await client.responses.create(model="teller", tools=[TOOL], **fields)
            assert again.output_text == "It is 3."
            assert teller.requests[-1].messages == teller.requests[1].messages
        both = await ask(
            client, [{"id": first.output[0].id}, result], tools=[TOOL], previous_response_id=first.id
        )
        assert both.output_text == "It is 3."


async def test_an_unknown_item_is_404(served: Served, teller: Teller) -> None:
    async with served.client() as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await ask(client, [{"type": "item_reference", "id": "msg_none"}])
    assert (caught.value.param, caught.value.type) == ("input", "invalid_request_error")
    assert "providerOptions.openai.store" in caught.value.message
    assert teller.requests == []


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_what_is_not_to_be_stored_is_not(served: Served, teller: Teller, stream: bool) -> None:
    async with served.client() as client:
        response = await ask(client, "one", stream=stream, store=False)
        assert response.store is False
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
        stored = await ask(client, "one", stream=stream)
        # It may continue one that is.
        second = await ask(client, "two", stream=stream, store=False, previous_response_id=stored.id)
        assert (second.output_text, second.store) == ("It is 3.", False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(second.id)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_an_incomplete_response_is_stored(served: Served, teller: Teller, stream: bool) -> None:
    async with served.client() as client:
        response = await ask(client, "much", stream=stream)
        assert response.status == "incomplete"
        assert await client.responses.retrieve(response.id) == response


async def test_a_response_that_fails_in_the_middle_is_stored_as_failed(
    served: Served, teller: Teller
) -> None:
    raw = await served.stream({"model": "teller", "input": "break", "stream": True}, "/v1/responses")
    events = [json.loads(line[6:]) for line in raw.body.decode().splitlines() if line.startswith("data: ")]
    assert events[-1]["type"] == "response.failed"
    response_id = events[0]["response"]["id"]
    async with served.client() as client:
        response = await client.responses.retrieve(response_id)
    assert (response.status, response.id) == ("failed", response_id)
    assert response.error is not None


async def test_a_client_that_leaves_leaves_nothing_behind(served: Served, teller: Teller) -> None:
    began = trio.Event()

    async def endless(request: ChatRequest) -> AsyncIterator[str]:
        yield "It "
        began.set()
        await trio.sleep_forever()

    served.back.register_chat("endless", endless)
    await until(lambda: served.front.has_model("endless"))
    body = {"model": "endless", "input": "x", "stream": True}
    async with served.http() as http, http.stream("POST", "/v1/responses", json=body) as stream:
        lines = stream.aiter_lines()
        async for line in lines:
            if line.startswith("data: "):
                response_id = json.loads(line[6:])["response"]["id"]
                break
        await began.wait()
        await lines.aclose()  # type: ignore[attr-defined]
    await served.in_flight(0)
    async with served.client() as client:
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response_id)


async def test_a_response_is_not_cancelled_nor_streamed_again(served: Served, teller: Teller) -> None:
    async with served.client() as client:
        response = await ask(client, "one")
        with pytest.raises(openai.BadRequestError):
            await client.responses.cancel(response.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.cancel("resp_none")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.retrieve(response.id, stream=True)
        assert caught.value.param == "stream"


async def test_a_conversation_grows_with_its_responses(served: Served, teller: Teller) -> None:
    async with served.client() as client:
        conversation = await client.conversations.create(
            items=[{"type": "message", "role": "user", "content": "zero"}], metadata={"a": "b"}
        )
        first = await ask(client, "one", conversation=conversation.id)
        assert first.conversation is not None
        assert first.conversation.id == conversation.id
        second = await ask(client, "two", stream=True, conversation={"id": conversation.id})
        assert (first.output_text, second.output_text) == ("It is 2.", "It is 4.")
        items = client.conversations.items
        listed = [item async for item in items.list(conversation.id, order="asc")]
        texts = [item.content[0].text for item in listed]  # type: ignore[union-attr]
        assert texts == ["zero", "one", "It is 2.", "two", "It is 4."]
        added = await items.create(
            conversation.id, items=[{"type": "message", "role": "user", "content": "three"}]
        )
        [new] = added.data
        assert await items.retrieve(new.id, conversation_id=conversation.id) == new
        await items.delete(new.id, conversation_id=conversation.id)
        with pytest.raises(openai.NotFoundError):
            await items.retrieve(new.id, conversation_id=conversation.id)
        changed = await client.conversations.update(conversation.id, metadata={"c": "d"})
        assert await client.conversations.retrieve(conversation.id) == changed
        assert changed.metadata == {"c": "d"}
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, "x", conversation=conversation.id, previous_response_id=first.id)
        assert caught.value.code == "mutually_exclusive_parameters"
        await client.conversations.delete(conversation.id)
        with pytest.raises(openai.NotFoundError) as gone:
            await ask(client, "x", conversation=conversation.id)
        assert gone.value.param == "conversation"
        # The responses are records of their own.
        assert (await client.responses.retrieve(second.id)).output_text == "It is 4."


async def test_a_conversation_has_items_of_known_types_only(served: Served) -> None:
    wrong: list[Any] = [
        {"items": "x"},
        {"items": [{"role": "nobody", "content": "x"}]},
        {"items": [{"type": "web_search_call", "id": "ws_1"}]},
        {"items": [{"role": "user", "content": "x"}] * 21},
        {"metadata": {"a": 1}},
    ]
    for body in wrong:
        answer = await served.post("/v1/conversations", json=body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["param"].startswith(next(iter(body)))


async def test_a_node_that_stores_nothing_says_so() -> None:
    async with open_served("forwarded") as served:
        served.front.options.stored_responses = 0
        teller = Teller()
        served.back.register_chat("teller", teller.answer)
        await until(lambda: served.front.has_model("teller"))
        async with served.client() as client:
            for fields in ({}, {"store": True}, {"store": None}):
                response = await ask(client, "one", **fields)
                assert response.store is False
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(response.id)
            for name in ("previous_response_id", "conversation"):
                with pytest.raises(openai.BadRequestError) as caught:
                    await ask(client, "x", **{name: response.id})
                assert (caught.value.code, caught.value.param) == ("unsupported_value", name)
            with pytest.raises(openai.BadRequestError) as caught:
                await ask(client, [{"type": "item_reference", "id": "msg_1"}])
            assert (caught.value.code, caught.value.param) == ("unsupported_value", "input[0].id")
            with pytest.raises(openai.BadRequestError):
                await client.conversations.create()
