"""The lesser known routes, as their clients see them: moderation, images and sound in streams, edits, rankings."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import openai
import pytest
from scripted import PNG
from served import Served

pytestmark = [
    # Its streams leave their async generators to the garbage collector.
    pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx|httpcore):ResourceWarning"),
]

AUDIO = ("clip.wav", b"RIFF....WAVE", "audio/wav")


def decoded(*items: Any) -> list[bytes]:
    return [base64.b64decode(item.b64_json or "") for item in items]


# Moderation


async def test_texts_are_moderated_one_by_one(served: Served) -> None:
    async with served.client() as client:
        answer = await client.moderations.create(model="judge", input=["a hug", "a hit"])
        single = await client.moderations.create(model="judge", input="a hit")
    assert answer.model == "judge"
    assert answer.id.startswith("modr-")
    assert [result.flagged for result in answer.results] == [False, True]
    assert [result.category_scores.violence for result in answer.results] == [0.1, 0.9]
    assert answer.results[1].categories.violence
    assert not answer.results[1].categories.self_harm_intent
    assert answer.results[1].category_applied_input_types.violence == ["text"]
    assert single.results == answer.results[1:]


async def test_parts_are_moderated_together(served: Served) -> None:
    parts: Any = [
        {"type": "text", "text": "a hit"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]
    async with served.client() as client:
        answer = await client.moderations.create(model="judge", input=parts)
    (result,) = answer.results
    assert result.flagged
    assert result.category_applied_input_types.violence == ["text", "image"]
    assert served.trace.requests[0].inputs == [parts]


async def test_a_moderation_without_a_model_is_refused_by_name(served: Served) -> None:
    async with served.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.moderations.create(input="a hit")
    assert caught.value.param == "model"


# Images


@pytest.mark.parametrize("mask", [None, b"mask"])
async def test_images_are_made_from_others(served: Served, mask: bytes | None) -> None:
    more: Any = {} if mask is None else {"mask": ("mask.png", mask, "image/png")}
    async with served.client() as client:
        one = await client.images.edit(
            model="painter", prompt="sharper", image=("a.png", b"one", "image/png"), **more
        )
        two = await client.images.edit(
            model="painter",
            prompt="sharper",
            image=[("a.png", b"one", "image/png"), ("b.webp", b"two", "image/webp")],
            n=2,
            size="64x64",
            input_fidelity="high",
            **more,
        )
    assert decoded(*(one.data or ())) == [PNG + b"one" + (mask or b"")]
    assert decoded(*(two.data or ())) == [PNG + b"one" + (mask or b""), PNG + b"two" + (mask or b"")]
    request = served.trace.requests[1]
    assert (request.prompt, request.n, request.width, request.input_fidelity) == ("sharper", 2, 64, "high")
    assert request.image_types == ["image/png", "image/webp"]
    assert request.mask == mask


@pytest.mark.parametrize("asked", [0, 2])
async def test_an_image_comes_after_those_on_the_way_to_it(served: Served, asked: int) -> None:
    async with (
        served.client() as client,
        await client.images.generate(
            model="painter", prompt="a cat", stream=True, partial_images=asked, size="64x64"
        ) as stream,
    ):
        *partial, last = [event async for event in stream]
    assert [event.type for event in partial] == ["image_generation.partial_image"] * asked
    assert decoded(*partial) == [PNG + bytes([100 + i]) for i in range(asked)]
    assert last.type == "image_generation.completed"
    assert decoded(last) == [PNG + b"\x00"]
    assert (last.output_format, last.size, last.quality) == ("png", "64x64", "auto")
    assert last.usage.total_tokens == 7
    assert served.trace.requests[0].partial_images == asked


async def test_an_edit_is_streamed_as_well(served: Served) -> None:
    def ask(client: openai.OpenAI) -> list[Any]:
        with client.images.edit(
            model="painter", prompt="sharper", image=b"one", stream=True, partial_images=1
        ) as stream:
            return list(stream)

    partial, last = await served.with_sync_client(ask)
    assert (partial.type, partial.partial_image_index) == ("image_edit.partial_image", 0)
    assert last.type == "image_edit.completed"
    assert decoded(partial, last) == [PNG, PNG + b"one"]


async def test_a_stream_of_images_that_fails_raises(served: Served) -> None:
    broken: Any = {"model": "painter", "prompt": "fail", "image": b"one", "stream": True}
    async with served.client() as client:
        async with await client.images.edit(**broken, partial_images=1) as stream:
            partial = await anext(stream)
            with pytest.raises(openai.APIError, match="the brush broke") as caught:
                await anext(stream)
        assert partial.type == "image_edit.partial_image"
        assert caught.value.code == "my_code"
        # Without anything on the way there is nothing to begin a stream with, and the failure is a real one.
        with pytest.raises(openai.InternalServerError, match="the brush broke"):
            await client.images.edit(**broken)


async def test_a_stream_has_one_image(served: Served) -> None:
    async with served.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.images.generate(model="painter", prompt="a cat", n=2, stream=True)
    assert caught.value.param == "stream"


# Sound


async def test_speech_comes_in_events_if_they_are_asked_for(served: Served) -> None:
    async with (
        served.client() as client,
        client.audio.speech.with_streaming_response.create(
            model="voice", voice="alloy", input="hey you", stream_format="sse"
        ) as response,
    ):
        lines = [line async for line in response.iter_lines() if line]
    assert response.headers["content-type"] == "text/event-stream"
    *deltas, done, end = [line.removeprefix("data: ") for line in lines]
    sound = [base64.b64decode(json.loads(delta)["audio"]) for delta in deltas]
    assert sound == [b"hey" * 100, b"you" * 100]
    assert json.loads(done) == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
    }
    assert end == "[DONE]"


async def test_speech_in_events_that_fails_does_not_look_complete(served: Served) -> None:
    streamed = await served.stream(
        {"model": "failing/voice", "voice": "x", "input": "hi", "stream_format": "sse"}, "/v1/audio/speech"
    )
    report = streamed.report
    assert (report.ending, report.error and report.error["code"]) == ("failed", "handler_failed")


async def test_a_streamed_transcript_has_what_was_asked_for(served: Served) -> None:
    async with (
        served.client() as client,
        await client.audio.transcriptions.create(
            model="scribe/speakers", file=AUDIO, stream=True, include=["logprobs"]
        ) as stream,
    ):
        *deltas, done = [event async for event in stream]
    assert [delta.type for delta in deltas] == ["transcript.text.delta"] * 2
    assert [delta.delta for delta in deltas] == ["I am A.", " I am B."]
    assert [delta.logprobs[0].token for delta in deltas] == ["A", "B"]
    assert (done.type, done.text) == ("transcript.text.done", "I am A. I am B.")
    assert [logprob.token for logprob in done.logprobs] == ["A", "B"]
    assert (done.usage.type, done.usage.total_tokens) == ("tokens", 13)


async def test_it_is_told_who_speaks_plain_and_streamed_alike(served: Served) -> None:
    async with served.client() as client:
        plain = await client.audio.transcriptions.create(
            model="scribe/speakers", file=AUDIO, response_format="diarized_json"
        )
        async with await client.audio.transcriptions.create(
            model="scribe/speakers", file=AUDIO, response_format="diarized_json", stream=True
        ) as stream:
            events = [event async for event in stream]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.audio.transcriptions.create(
                model="scribe", file=AUDIO, response_format="diarized_json"
            )
    segments = [event for event in events if event.type == "transcript.text.segment"]
    assert [(each.id, each.speaker, each.start, each.end) for each in segments] == [
        ("seg_0", "A", 0.0, 1.0),
        ("seg_1", "B", 1.0, 2.0),
    ]
    assert [each.model_dump() for each in plain.segments] == [each.model_dump() for each in segments]
    assert (plain.text, plain.duration) == ("I am A. I am B.", 2.0)
    assert caught.value.param == "response_format"


# Rankings, and routes that are nobody else's


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
async def test_documents_are_ranked(served: Served, path: str) -> None:
    body = {
        "model": "ranker",
        "query": "a red cat",
        "documents": ["a dog", {"text": "a red cat", "id": 7}, "the cat is red"],
        "top_n": 2,
        "return_documents": True,
    }
    response = await served.post(path, json=body)
    assert response.status_code == 200
    assert response.json()["results"] == [
        {"index": 1, "relevance_score": 3.0, "document": {"text": "a red cat", "id": 7}},
        {"index": 2, "relevance_score": 2.0, "document": {"text": "the cat is red"}},
    ]
    assert response.json()["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    [request] = served.trace.requests
    assert request.documents == ["a dog", "a red cat", "the cat is red"]


@pytest.mark.parametrize("path", ["/v1/tokenize", "/tokenize"])
async def test_a_route_of_its_own_is_answered_plain_and_streamed(served: Served, path: str) -> None:
    body = {"model": "echo", "prompt": "to be"}
    response = await served.post(path, json=body)
    assert (response.status_code, response.json()) == (200, {"token_0": "to", "token_1": "be"})
    streamed = await served.post(path, json=body | {"stream": True})
    assert streamed.content == b'data: {"token_0":"to"}\n\ndata: {"token_1":"be"}\n\ndata: [DONE]\n\n'
    async with served.client() as client:
        by_client: Any = await client.post("/tokenize", cast_to=object, body=body)
        with pytest.raises(openai.BadRequestError):
            await client.post("/tokenize", cast_to=object, body=body | {"model": "mirror"})
    assert by_client == response.json()


@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_a_route_of_its_own_takes_files_and_gives_bytes(served: Served, size: int) -> None:
    data = bytes(range(250)) * (size // 250) + b"x"
    files: Any = {"file": ("a.bin", data, "application/octet-stream")}
    response = await served.post("/v1/sound", data={"model": "echo"}, files=files)
    assert (response.status_code, response.headers["content-type"]) == (200, "audio/x-backwards")
    assert response.content == data[::-1]


async def test_a_route_of_its_own_is_not_for_any_method(served: Served) -> None:
    async with served.http() as client:
        response: httpx.Response = await client.get("/v1/tokenize")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["message"] == "/v1/tokenize does not allow GET"
