"""The official client gets what it expects on every route, wherever the handler runs."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import attrs
import httpx
import openai
import pytest
from scripted import PNG, SHAPES
from served import Served, chat, open_served, until

from trio_cluster import ChatRequest

pytestmark = [
    # Its streams leave their async generators to the garbage collector.
    pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx|httpcore):ResourceWarning"),
    # It would rather not be asked for translations any more.
    pytest.mark.filterwarnings("ignore:deprecated$:DeprecationWarning"),
]

USER: Any = {"role": "user", "content": "a fine  day"}
AUDIO = ("clip.wav", b"RIFF....WAVE", "audio/wav")


# Chat completions


async def test_a_plain_chat_has_the_text_and_the_usage_of_the_handler(served: Served) -> None:
    async with served.client() as client:
        answer = await client.chat.completions.create(model="echo", messages=[USER])
    assert answer.object == "chat.completion"
    assert answer.model == "echo"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "a fine  day"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        4,
        8,
        12,
    )


async def test_a_streamed_chat_adds_up_to_the_plain_one(served: Served) -> None:
    async with (
        served.client() as client,
        await client.chat.completions.create(model="echo", messages=[USER], stream=True) as stream,
    ):
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a fine  day"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_stream_tells_the_usage_in_its_last_chunk_if_asked_to(served: Served) -> None:
    async with (
        served.client() as client,
        await client.chat.completions.create(
            model="echo", messages=[USER], stream=True, stream_options={"include_usage": True}
        ) as stream,
    ):
        *chunks, last = [chunk async for chunk in stream]
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 12


async def test_a_handler_that_reports_no_usage_used_nothing(served: Served) -> None:
    async with served.client() as client:
        answer = await client.chat.completions.create(model="mirror", messages=[USER])
    assert answer.usage is not None
    assert answer.usage.total_tokens == 0


async def test_several_choices_arrive_apart(served: Served) -> None:
    async with served.client() as client:
        answer = await client.chat.completions.create(model="choices", messages=[USER], n=3)
        async with await client.chat.completions.create(
            model="choices", messages=[USER], n=3, stream=True
        ) as stream:
            texts, reasons = ["", "", ""], {}
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    if choice.finish_reason is not None:
                        reasons[choice.index] = choice.finish_reason
    expected = [f"one of {i};two of {i};" for i in range(3)]
    assert [choice.message.content for choice in answer.choices] == expected == texts
    assert [choice.finish_reason for choice in answer.choices] == ["length", "stop", "stop"]
    assert reasons == {0: "length", 1: "stop", 2: "stop"}


async def test_all_that_the_client_sends_reaches_the_handler_untouched(served: Served) -> None:
    tools: Any = [
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
            },
        }
    ]
    async with served.client() as client:
        answer = await client.chat.completions.create(
            model="mirror",
            messages=[{"role": "system", "content": "héllo \U0001f600"}, USER],
            temperature=0.25,
            tools=tools,
            tool_choice="auto",
            extra_body={"top_k": 7, "lora": {"name": "x", "weights": [1, 2.5, None]}},
            extra_headers={"x-tenant": "blue"},
        )
    raw = json.loads(answer.choices[0].message.content or "")
    assert raw == {
        "model": "mirror",
        "messages": [{"role": "system", "content": "héllo \U0001f600"}, USER],
        "temperature": 0.25,
        "tools": tools,
        "tool_choice": "auto",
        "top_k": 7,
        "lora": {"name": "x", "weights": [1, 2.5, None]},
    }
    [request] = served.trace.requests
    assert request.temperature == 0.25
    assert request.headers["x-tenant"] == "blue"
    assert not any("a-key" in value for value in request.headers.values())


async def test_tool_calls_are_plain_and_streamed_alike(served: Served) -> None:
    async with served.client() as client:
        answer = await client.chat.completions.create(model="tools", messages=[USER])
        async with client.chat.completions.stream(model="tools", messages=[USER]) as stream:
            streamed = await stream.get_final_completion()
    for completion in (answer, streamed):
        choice = completion.choices[0]
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls or []
        assert call.type == "function"
        assert call.id == "call_1"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Kyoto"}


async def test_a_model_with_vision_is_given_images(served: Served) -> None:
    content: Any = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]
    async with served.client() as client:
        answer = await client.chat.completions.create(
            model="org/vision-model", messages=[{"role": "user", "content": content}]
        )
    assert answer.choices[0].message.content == "an image"
    assert served.trace.requests[0].last_text == "what is this?"


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_handler_of_any_shape_answers_alike(served: Served, shape: str) -> None:
    async with served.client() as client:
        answer = await client.chat.completions.create(model=f"shape/{shape}", messages=[USER])
    assert answer.choices[0].message.content == "one two three "
    assert answer.choices[0].finish_reason == "stop"
    streamed = await served.stream(chat(f"shape/{shape}", stream=True))
    assert streamed.report.ending == "finished"
    assert streamed.report.text == "one two three "
    assert streamed.report.finish_reasons == {0: "stop"}


# Completions


async def test_a_chat_model_completes_a_prompt(served: Served) -> None:
    async with served.client() as client:
        answer = await client.completions.create(model="echo", prompt="to be or", echo=True)
        async with await client.completions.create(
            model="echo", prompt="to be or", stream=True, stream_options={"include_usage": True}
        ) as stream:
            *chunks, last = [chunk async for chunk in stream]
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "to be orto be or"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 9
    assert "".join(chunk.choices[0].text for chunk in chunks) == "to be or"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.total_tokens == 9
    assert [request.prompt for request in served.trace.requests] == ["to be or", "to be or"]


# Embeddings


@pytest.mark.parametrize("model", ["vectors", "vectors/numpy"])
@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("four", ["four"]),
        (["a", "bb", "ccc"], ["a", "bb", "ccc"]),
        ([11, 12, 13], [[11, 12, 13]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
    ids=["a text", "texts", "tokens", "lists of tokens"],
)
async def test_embeddings_of_all_inputs_come_in_both_formats(
    served: Served, model: str, given: Any, seen: list[Any]
) -> None:
    expected = [[float(len(each)), 0.5, -0.25, 3.0] for each in seen]
    async with served.client() as client:
        by_default = await client.embeddings.create(model=model, input=given)
        floats = await client.embeddings.create(model=model, input=given, encoding_format="float")
    for answer in (by_default, floats):
        assert [item.embedding for item in answer.data] == expected
        assert [item.index for item in answer.data] == list(range(len(seen)))
        assert answer.model == model
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == (11 if "numpy" in model else 0)
    assert [request.encoding_format for request in served.trace.requests] == ["base64", "float"]
    assert [request.inputs for request in served.trace.requests] == [seen, seen]


async def test_embeddings_are_cut_to_the_dimensions_asked_for(served: Served) -> None:
    async with served.client() as client:
        answer = await client.embeddings.create(model="vectors", input="xyz", dimensions=2)
    assert answer.data[0].embedding == pytest.approx([0.98639392, 0.16439899])


# Audio


async def test_a_transcription_comes_in_every_format(served: Served) -> None:
    text = "clip.wav of 12 bytes. The end."
    async with served.client() as client:
        create = client.audio.transcriptions.create
        plain = await create(model="scribe", file=AUDIO, language="en", temperature=0.5)
        as_text = await create(model="scribe", file=AUDIO, response_format="text")
        verbose = await create(
            model="scribe", file=AUDIO, response_format="verbose_json", timestamp_granularities=["segment"]
        )
        srt = await create(model="scribe", file=AUDIO, response_format="srt")
        vtt = await create(model="scribe", file=AUDIO, response_format="vtt")
    assert plain.text == text
    assert as_text == f"{text}\n"
    assert (verbose.text, verbose.language, verbose.duration) == (text, "english", 2.5)
    assert verbose.segments is not None
    assert [(each.start, each.end) for each in verbose.segments] == [(0.0, 1.0), (1.0, 2.5)]
    assert srt == (
        "1\n00:00:00,000 --> 00:00:01,000\nclip.wav of 12 bytes.\n\n"
        "2\n00:00:01,000 --> 00:00:02,500\nThe end.\n\n"
    )
    assert vtt == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nclip.wav of 12 bytes.\n\n"
        "00:00:01.000 --> 00:00:02.500\nThe end.\n\n"
    )
    first = served.trace.requests[0]
    assert (first.audio, first.filename, first.language, first.temperature) == (
        AUDIO[1],
        "clip.wav",
        "en",
        0.5,
    )
    assert not first.translate


async def test_a_transcription_can_be_streamed(served: Served) -> None:
    async with (
        served.client() as client,
        await client.audio.transcriptions.create(model="scribe", file=AUDIO, stream=True) as stream,
    ):
        events = [event async for event in stream]
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == "clip.wav of 12 bytes. The end."


async def test_a_translation_is_told_from_a_transcription(served: Served) -> None:
    async with served.client() as client:
        answer = await client.audio.translations.create(model="scribe", file=AUDIO)
        verbose = await client.audio.translations.create(
            model="scribe", file=AUDIO, response_format="verbose_json"
        )
    assert answer.text == verbose.text == "clip.wav of 12 bytes. The end."
    assert all(request.translate for request in served.trace.requests)


@pytest.mark.parametrize("file_first", [True, False], ids=["file first", "file last"])
async def test_the_file_of_a_form_may_stand_anywhere(served: Served, file_first: bool) -> None:
    def part(head: str, content: bytes) -> bytes:
        return b"--xx\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content + b"\r\n"

    parts = [
        part('name="file"; filename="a.ogg"\r\nContent-Type: audio/ogg', b"\r\n--x\r\n" * 3),
        part('name="model"', b"scribe"),
        part('name="response_format"', b"text"),
    ]
    response = await served.post(
        "/v1/audio/transcriptions",
        content=b"".join(parts if file_first else reversed(parts)) + b"--xx--\r\n",
        headers={"content-type": "multipart/form-data; boundary=xx"},
    )
    assert (response.status_code, response.text) == (200, "a.ogg of 21 bytes. The end.\n")
    assert served.trace.requests[0].audio == b"\r\n--x\r\n" * 3


@pytest.mark.parametrize(
    ("response_format", "content_type"),
    [
        ("mp3", "audio/mpeg"),
        ("aac", "audio/aac"),
        # The handler's bytes have no header of these formats: they are samples.
        ("opus", "audio/pcm"),
        ("flac", "audio/pcm"),
        ("wav", "audio/pcm"),
        ("pcm", "audio/pcm"),
    ],
)
async def test_speech_is_of_the_type_that_was_asked_for(
    served: Served, response_format: Any, content_type: str
) -> None:
    async with served.client() as client:
        answer = await client.audio.speech.create(
            model="voice", voice="alloy", input="hey you", response_format=response_format
        )
    assert answer.content == b"hey" * 100 + b"you" * 100
    assert answer.response.headers["content-type"] == content_type


async def test_speech_is_streamed_and_may_say_its_own_type(served: Served) -> None:
    async with (
        served.client() as client,
        client.audio.speech.with_streaming_response.create(
            model="voice/thread", voice="alloy", input="hey you", speed=1.5, instructions="slowly"
        ) as response,
    ):
        content = b"".join([piece async for piece in response.iter_bytes()])
    assert content == b"hey" * 100 + b"you" * 100
    assert response.headers["content-type"] == "audio/x-words"
    [request] = served.trace.requests
    assert (request.voice, request.speed, request.instructions) == ("alloy", 1.5, "slowly")


# Images


@pytest.mark.parametrize("response_format", ["b64_json", openai.omit])
async def test_images_come_as_base64_also_when_no_format_was_asked_for(
    served: Served, response_format: Any
) -> None:
    async with served.client() as client:
        answer = await client.images.generate(
            model="painter", prompt="a cat", n=2, size="1024x1024", response_format=response_format
        )
    assert answer.data is not None
    assert [base64.b64decode(image.b64_json or "") for image in answer.data] == [PNG + b"\x00", PNG + b"\x01"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 7
    [request] = served.trace.requests
    assert (request.prompt, request.n, request.size) == ("a cat", 2, "1024x1024")


# Models


async def test_all_models_are_listed_and_each_can_be_retrieved(served: Served) -> None:
    async with served.client() as client:
        models = {model.id: model async for model in client.models.list()}
        vision = await client.models.retrieve("org/vision-model")
    assert sorted(models) == served.front.list_models() == served.back.list_models()
    assert models["org/vision-model"] == vision
    assert vision.object == "model"
    assert vision.owned_by == "trio-cluster"
    assert vision.model_extra is not None
    assert vision.model_extra["capabilities"] == {"vision": True}
    assert vision.model_extra["context_window"] == 4096
    assert vision.model_extra["license"] == "MIT"


async def test_a_model_can_come_and_go_while_the_server_runs(served: Served) -> None:
    async def late(request: ChatRequest) -> str:
        return "better than never"

    async with served.client() as client:

        async def answer() -> str | None:
            answer = await client.chat.completions.create(model="late", messages=[USER])
            return answer.choices[0].message.content

        served.back.register_chat("late", late)
        await until(lambda: served.front.has_model("late"))
        assert await answer() == "better than never"
        served.back.unregister_model("late")
        await until(lambda: not served.front.has_model("late"))
        with pytest.raises(openai.InternalServerError) as failure:
            await answer()
        assert failure.value.status_code == 503
        assert failure.value.code == "model_unavailable"


async def test_every_route_is_there_without_the_prefix_too(served: Served) -> None:
    async with served.client(base="") as client:
        await client.chat.completions.create(model="echo", messages=[USER])
        await client.completions.create(model="echo", prompt="x")
        await client.embeddings.create(model="vectors", input="x")
        await client.audio.transcriptions.create(model="scribe", file=AUDIO)
        await client.audio.translations.create(model="scribe", file=AUDIO)
        await client.audio.speech.create(model="voice", voice="alloy", input="x")
        await client.images.generate(model="painter", prompt="x")
        assert (await client.models.retrieve("org/vision-model")).id == "org/vision-model"
        assert sorted([model.id async for model in client.models.list()]) == served.front.list_models()


# The client without an event loop


async def test_the_synchronous_client_is_served_as_well(served: Served) -> None:
    def ask(client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="echo", messages=[USER])
        assert answer.choices[0].message.content == "a fine  day"
        with client.chat.completions.create(model="echo", messages=[USER], stream=True) as stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == "a fine  day"
        completion = client.completions.create(model="echo", prompt="x")
        assert completion.choices[0].text == "x"
        assert client.embeddings.create(model="vectors", input="x").data[0].embedding[0] == 1.0
        assert client.audio.transcriptions.create(model="scribe", file=AUDIO).text.startswith("clip.wav")
        assert client.audio.translations.create(model="scribe", file=AUDIO).text.startswith("clip.wav")
        assert client.audio.speech.create(model="voice", voice="v", input="x").content == b"x" * 100
        with client.audio.speech.with_streaming_response.create(
            model="voice", voice="v", input="x"
        ) as response:
            assert b"".join(response.iter_bytes()) == b"x" * 100
        assert client.images.generate(model="painter", prompt="x").data
        assert sorted(model.id for model in client.models.list()) == served.front.list_models()

    await served.with_sync_client(ask)


# Here and there


@attrs.frozen
class Question:
    """A request whose answer should not depend on where it is answered."""

    path: str
    body: dict[str, Any] | None = None
    form: dict[str, str] | None = None
    method: str = "POST"

    async def ask(self, client: httpx.AsyncClient) -> tuple[int, dict[str, str], bytes]:
        response = await client.request(
            self.method,
            self.path,
            json=self.body,
            data=self.form,
            files=None if self.form is None else {"file": AUDIO},
            headers={"x-request-id": "the-same"},
        )
        # How an answer is cut into pieces depends on what was ready when; what is in the pieces does not.
        skipped = ("date", "content-length", "transfer-encoding", "openai-processing-ms")
        headers = {name: value for name, value in response.headers.items() if name not in skipped}
        body = re.sub(rb'"id":"(chatcmpl|cmpl)-[0-9a-f]+"', rb'"id":"\1-X"', response.content)
        body = re.sub(rb'"trio_cluster_via":\["[0-9a-f]+"\]', b'"trio_cluster_via":["X"]', body)
        return response.status_code, headers, re.sub(rb'"created":[0-9]+', b'"created":0', body)


QUESTIONS = {
    "chat": Question("/v1/chat/completions", chat("echo", "a fine  day")),
    "streamed chat": Question("/v1/chat/completions", chat("echo", "a fine  day", stream=True)),
    "streamed usage": Question(
        "/v1/chat/completions", chat("echo", stream=True, stream_options={"include_usage": True})
    ),
    "choices": Question("/v1/chat/completions", chat("choices", n=2)),
    "streamed choices": Question("/v1/chat/completions", chat("choices", n=2, stream=True)),
    "tools": Question("/v1/chat/completions", chat("tools")),
    "streamed tools": Question("/v1/chat/completions", chat("tools", stream=True)),
    "mirror": Question(
        "/v1/chat/completions", chat("mirror", "\u00e4\u0000\U0001f600", unknown=[1, 2.50, None])
    ),
    "completion": Question("/v1/completions", {"model": "echo", "prompt": "x y"}),
    "streamed completion": Question("/v1/completions", {"model": "echo", "prompt": "x y", "stream": True}),
    "embeddings": Question("/v1/embeddings", {"model": "vectors", "input": ["x", "yy"]}),
    "base64": Question(
        "/v1/embeddings", {"model": "vectors/numpy", "input": ["x", "yy"], "encoding_format": "base64"}
    ),
    "transcription": Question("/v1/audio/transcriptions", form={"model": "scribe"}),
    "verbose": Question(
        "/v1/audio/transcriptions", form={"model": "scribe", "response_format": "verbose_json"}
    ),
    "subtitles": Question("/v1/audio/translations", form={"model": "scribe", "response_format": "vtt"}),
    "speech": Question("/v1/audio/speech", {"model": "voice", "input": "one two", "voice": "v"}),
    "image": Question("/v1/images/generations", {"model": "painter", "prompt": "x", "n": 3}),
    "models": Question("/v1/models", method="GET"),
    "model": Question("/v1/models/org/vision-model", method="GET"),
    "no model": Question("/v1/chat/completions", chat("nobody")),
    "wrong kind": Question("/v1/chat/completions", chat("vectors")),
    "bad field": Question("/v1/chat/completions", chat("echo", temperature="hot")),
    "error of the handler": Question("/v1/chat/completions", chat("failing", status=429)),
    "crash of the handler": Question("/v1/chat/completions", chat("failing")),
    "crash in a stream": Question("/v1/chat/completions", chat("failing", stream=True)),
    "value of a wrong type": Question("/v1/chat/completions", chat("wrong-type")),
    "short vectors": Question("/v1/embeddings", {"model": "vectors", "input": "x", "dimensions": 9}),
}


@pytest.fixture
async def here_and_there() -> AsyncIterator[tuple[Served, Served]]:
    async with open_served("local") as here, open_served("forwarded") as there:
        yield here, there


async def test_the_answer_is_the_same_byte_for_byte_here_and_from_a_worker(
    here_and_there: tuple[Served, Served],
) -> None:
    here, there = here_and_there
    async with here.http() as client_here, there.http() as client_there:
        for name, question in QUESTIONS.items():
            answer, other = await question.ask(client_here), await question.ask(client_there)
            # All but the node that has answered.
            assert answer[1].pop("x-trio-cluster-worker", "") != other[1].pop(
                "x-trio-cluster-worker", "there"
            )
            assert (name, answer) == (name, other)
            assert answer[1]["x-request-id"] == "the-same"


async def test_a_stream_that_fails_does_so_byte_for_byte_alike_here_and_from_a_worker(
    here_and_there: tuple[Served, Served],
) -> None:
    bodies = []
    for served in here_and_there:
        answer = await served.stream(chat("failing", stream=True, pieces=3, status=429))
        assert answer.report.ending == "failed"
        bodies.append(re.sub(rb'"(id":"chatcmpl-[0-9a-f]+"|created":[0-9]+)', b"", answer.body))
    assert bodies[0] == bodies[1]
