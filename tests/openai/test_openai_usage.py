"""The tokens that a handler reports, as the node gets them; what clients get is tested with each route."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from openai_answers import encoder, send, upload

from trio_cluster.core.answer import Usage
from trio_cluster.openai import OutputChunk, endpoint_named


def transcribe(endpoint: str, **fields: str) -> Any:
    return upload(endpoint, *fields.items())


#: For each encoder: its route, how to make a request for it, and the least that its handler gives.
ENCODERS: dict[str, tuple[str, Any, list[Any]]] = {
    "chat, plain": ("chat.completions", send, ["a"]),
    "chat, streamed": ("chat.completions", partial(send, stream=True), ["a"]),
    "completion, plain": ("completions", send, ["a"]),
    "completion, streamed": ("completions", partial(send, stream=True), ["a"]),
    "response, plain": ("responses", send, ["a"]),
    "response, streamed": ("responses", partial(send, stream=True), ["a"]),
    "embeddings": ("embeddings", send, [[0.5, 1.0]]),
    "transcription, plain": ("audio.transcriptions", transcribe, ["a"]),
    "transcription, streamed": (
        "audio.transcriptions",
        partial(transcribe, stream="true"),
        ["a"],
    ),
    "transcription, subtitles": (
        "audio.transcriptions",
        partial(transcribe, response_format="srt"),
        ["a"],
    ),
    "speech, plain": ("audio.speech", send, [b"a"]),
    "speech, streamed": ("audio.speech", partial(send, stream_format="sse"), [b"a"]),
    "images, plain": ("images.generations", send, [b"a"]),
    "image, streamed": ("images.generations", partial(send, stream=True), [b"a"]),
    "rerank": ("rerank", send, [[1, 2]]),
    "moderations": ("moderations", send, [{"flagged": False}]),
}
#: Encoders whose handlers may give a usage object in a dict.
WITH_OBJECTS = [name for name in ENCODERS if not name.startswith("speech")]


def reported(name: str, *reports: Any) -> Usage | None:
    """Return the usage that an encoder reports when its answer is complete."""
    endpoint, make_request, values = ENCODERS[name]
    writer = encoder(endpoint, make_request(endpoint))
    for value in (*values, *reports):
        writer.encode(value)
    for _ in writer.early():
        pass
    writer.finish()
    return writer.reported_usage


@pytest.mark.parametrize("name", ENCODERS)
def test_without_a_report_there_is_no_usage(name: str) -> None:
    assert reported(name) is None


@pytest.mark.parametrize("name", ENCODERS)
def test_a_report_of_nothing_is_a_report(name: str) -> None:
    assert reported(name, OutputChunk.usage(0, 0)) == Usage()


@pytest.mark.parametrize("name", ENCODERS)
def test_the_last_report_counts(name: str) -> None:
    reports = OutputChunk.usage(1, 2), OutputChunk.usage(7, 5)
    assert reported(name, *reports) == Usage(prompt_tokens=7, completion_tokens=5)


@pytest.mark.parametrize("name", WITH_OBJECTS)
def test_a_usage_object_has_cached_tokens_and_reasoning_tokens(name: str) -> None:
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 6,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": None},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
    assert reported(name, {"usage": usage}) == Usage(10, 6, 8, 4)


@pytest.mark.parametrize("name", WITH_OBJECTS)
def test_a_usage_object_may_have_the_names_of_the_newer_routes(name: str) -> None:
    usage = {
        "input_tokens": 10,
        "output_tokens": 6,
        "input_tokens_details": {"cached_tokens": 8},
        "output_tokens_details": {"reasoning_tokens": 4},
    }
    assert reported(name, {"usage": usage}) == Usage(10, 6, 8, 4)


def of_chat(usage: Any) -> Usage | None:
    return reported("chat, plain", {"usage": usage})


def test_cached_tokens_may_have_the_name_that_anthropic_gives_them() -> None:
    assert of_chat({"prompt_tokens": 9, "cache_read_input_tokens": 8}) == Usage(9, 0, 8)
    details = {"prompt_tokens_details": {"cached_tokens": 7}}
    assert of_chat({"prompt_tokens": 9, "cache_read_input_tokens": 8} | details) == Usage(9, 0, 7)


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": 3}, {"type": "duration", "seconds": 3}])
def test_a_usage_object_without_counts_reports_nothing(usage: Any) -> None:
    assert of_chat(usage) is None
    assert reported("chat, plain", OutputChunk.usage(3, 2), {"usage": usage}) == (
        Usage(3, 2) if usage is None else None
    )


@pytest.mark.parametrize(
    "details", ["many", None, [], {"cached_tokens": None}, {"cached_tokens": -1}, {"cached_tokens": 1.5},
                {"cached_tokens": "7"}, {"cached_tokens": True}],
)  # fmt: skip
def test_details_that_are_no_counts_are_taken_for_zero(details: Any) -> None:
    assert of_chat({"prompt_tokens": 3, "prompt_tokens_details": details}) == Usage(3)


def test_a_count_is_no_larger_than_what_the_master_takes() -> None:
    large = 2**60
    usage = {
        "prompt_tokens": large,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": large},
    }
    assert of_chat(usage) == Usage(2**53 - 1, 1, 2**53 - 1)


def test_an_answer_to_a_custom_route_has_the_usage_of_chunks_only() -> None:
    custom = endpoint_named("/v1/own")
    for values, usage in (
        ([{"usage": {"prompt_tokens": 3}}], None),
        ([{"a": 1}, OutputChunk.usage(3, 2)], Usage(3, 2)),
        ([b"a", OutputChunk.usage(3, 2)], Usage(3, 2)),
    ):
        writer = custom.encoder(custom.parse(b'{"model":"m"}', "", {}), response_id="r", created=1)
        for value in values:
            writer.encode(value)
        writer.finish()
        assert writer.reported_usage == usage
