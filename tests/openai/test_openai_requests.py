"""Requests as handlers see them."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from openai_answers import send, upload

from trio_cluster.openai import ASRRequest, ChatRequest, EmbeddingRequest, ImageGenRequest, TTSRequest


def chat(*messages: dict[str, Any]) -> ChatRequest:
    return ChatRequest(model="m", messages=list(messages))


def test_a_request_built_by_hand_has_the_documented_defaults() -> None:
    request = chat({"role": "user", "content": "hi"})
    assert (request.temperature, request.top_p, request.n, request.stream) == (1.0, 1.0, 1, False)
    assert (request.presence_penalty, request.frequency_penalty) == (0.0, 0.0)
    assert (request.stop, request.max_tokens, request.tools, request.response_format) == (None,) * 4
    assert request.raw == {}
    assert request.headers == {}
    speech = TTSRequest(model="m", input="hi", voice="v")
    assert (speech.response_format, speech.speed) == ("mp3", 1.0)
    image = ImageGenRequest(model="m", prompt="cat")
    assert (image.n, image.size, image.quality, image.response_format) == (1, "auto", "auto", "b64_json")
    audio = ASRRequest(model="m", audio=b"x")
    assert (audio.response_format, audio.temperature, audio.language, audio.translate) == (
        "json",
        0.0,
        None,
        False,
    )
    assert EmbeddingRequest(model="m", inputs=["x"]).encoding_format == "float"


def test_requests_cannot_be_changed() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        chat().model = "other"  # type: ignore[misc]


def test_a_request_with_few_fields_has_the_same_defaults() -> None:
    parsed = send("chat.completions")
    built = chat({"role": "user", "content": "hi"})
    for field in attrs.fields(ChatRequest):
        if field.name not in ("raw", "headers"):
            assert getattr(parsed, field.name) == getattr(built, field.name)


def test_unknown_fields_are_in_raw() -> None:
    request = send("images.generations", seed=7)
    assert request.raw == {"model": "m", "prompt": "hi", "seed": 7}


def test_an_integer_will_do_for_a_number() -> None:
    temperature = send("chat.completions", temperature=1).temperature
    assert temperature == 1.0
    assert type(temperature) is float


def test_the_last_text_is_the_last_user_messages() -> None:
    request = chat(
        {"role": "user", "content": "first"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "no"},
    )
    assert request.last_text == "second"


def test_the_last_text_joins_text_parts_and_skips_others() -> None:
    parts = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "text", "text": "here"},
    ]
    assert chat({"role": "user", "content": parts}).last_text == "look\nhere"


@pytest.mark.parametrize(
    "messages", [[], [{"role": "system", "content": "x"}], [{"role": "user", "content": None}]]
)
def test_without_user_text_the_last_text_is_empty(messages: list[dict[str, Any]]) -> None:
    assert chat(*messages).last_text == ""


def test_images_are_seen_in_any_message() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    request = chat({"role": "user", "content": [image]}, {"role": "user", "content": "and now?"})
    assert request.has_image_inputs
    assert not chat({"role": "user", "content": [{"type": "text", "text": "x"}]}).has_image_inputs


def test_stop_sequences_are_a_list_in_any_case() -> None:
    assert send("chat.completions").stop_sequences == []
    assert send("chat.completions", stop="x").stop_sequences == ["x"]
    assert send("chat.completions", stop=["x", "y"]).stop_sequences == ["x", "y"]


def test_the_newer_token_limit_wins() -> None:
    assert send("chat.completions").token_limit is None
    assert send("chat.completions", max_tokens=5).token_limit == 5
    assert send("chat.completions", max_tokens=5, max_completion_tokens=7).token_limit == 7


def test_a_completion_is_a_chat_of_one_message() -> None:
    request = send("completions", prompt=["Once"], suffix=".", logprobs=3, max_tokens=9)
    assert request.prompt == "Once"
    assert request.messages == [{"role": "user", "content": "Once"}]
    assert request.last_text == "Once"
    assert (request.logprobs, request.top_logprobs, request.max_tokens) == (True, 3, 9)
    assert request.raw["suffix"] == "."
    assert (request.prompts, request.prompt_tokens, request.parts()) == (None, None, [request])
    assert send("completions", echo=True).raw["echo"] is True


@pytest.mark.parametrize("prompts", [["a", "b"], [[1, 2], [3]]])
def test_several_prompts_are_as_many_requests(prompts: list[Any]) -> None:
    parts = send("completions", prompt=prompts, n=2).parts()
    assert [part.prompt_tokens or part.prompt for part in parts] == prompts
    assert [part.last_text for part in parts] == [each if isinstance(each, str) else "" for each in prompts]
    assert {(part.prompts, part.n) for part in parts} == {(None, 2)}
    alone = send("completions", prompt=prompts[0])
    assert (alone.prompt_tokens or alone.prompt, alone.prompts) == (prompts[0], None)


def test_a_completion_has_the_documented_token_limit() -> None:
    assert send("completions").max_tokens == 16


@pytest.mark.parametrize(
    ("sent", "inputs"),
    [("x", ["x"]), (["x", "y"], ["x", "y"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_inputs_to_embed_are_a_list_in_any_case(sent: Any, inputs: list[Any]) -> None:
    assert send("embeddings", input=sent).inputs == inputs


def test_a_custom_voice_is_its_id() -> None:
    assert send("audio.speech", voice={"id": "voice_1"}).voice == "voice_1"


def test_the_size_of_an_image_can_be_had_as_numbers() -> None:
    request = send("images.generations", size="640x480")
    assert (request.width, request.height) == (640, 480)
    assert send("images.generations").width is None
    assert send("images.generations").height is None


def test_audio_is_not_printed_with_its_request() -> None:
    request = upload("audio.transcriptions")
    assert "<4 bytes>" in repr(request)
