"""Transcriptions, translations, speech and images."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import wave
from array import array
from typing import Any

import numpy as np
import pytest
from openai.types import ImagesResponse
from openai.types.audio import (
    TranscriptionDiarized,
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionTextSegmentEvent,
    TranscriptionVerbose,
    TranslationVerbose,
)
from openai_answers import answer, answer_json, encoder, send, upload

from trio_cluster import ApiError
from trio_cluster.openai import OutputChunk
from trio_cluster.testing import read_stream

SEGMENTS = [
    {"start": 0, "end": 1.5, "text": " Hello there."},
    {"start": 3661.0625, "end": 3662, "text": " Bye -->\n\nnow."},
]
TRANSCRIPT = {"text": "Hello there. Bye.", "language": "english", "duration": 3662.5, "segments": SEGMENTS}


def transcribe(values: list[Any], *fields: tuple[str, str], endpoint: str = "audio.transcriptions") -> bytes:
    return answer(endpoint, upload(endpoint, *fields), values)


def transcribe_json(
    values: list[Any], *fields: tuple[str, str], endpoint: str = "audio.transcriptions"
) -> Any:
    return json.loads(transcribe(values, *fields, endpoint=endpoint))


@pytest.mark.parametrize(
    "values",
    [
        ["Hello ", "world"],
        [{"text": "Hello world"}],
        ["Hello ", {"text": "world", "language": "en"}],
        ["Hallo", OutputChunk.final_text("Hello world")],
        [{"segments": [{"start": 0, "end": 1, "text": " Hello"}, {"start": 1, "end": 2, "text": " world"}]}],
    ],
)
def test_a_transcript_is_text_however_it_is_given(values: list[Any]) -> None:
    assert transcribe_json(values) == {"text": "Hello world"}
    assert transcribe(values, ("response_format", "text")) == b"Hello world\n"


def test_silence_is_an_empty_text() -> None:
    assert transcribe_json([]) == {"text": ""}
    assert transcribe([], ("response_format", "srt")) == b""
    assert transcribe([], ("response_format", "vtt")) == b"WEBVTT\n\n"


def test_a_verbose_transcript_has_segments_in_the_apis_form() -> None:
    result = transcribe_json([TRANSCRIPT], ("response_format", "verbose_json"))
    TranscriptionVerbose.model_validate(result, strict=True)
    assert result["task"] == "transcribe"
    assert (result["text"], result["language"], result["duration"]) == (TRANSCRIPT["text"], "english", 3662.5)
    assert [each["id"] for each in result["segments"]] == [0, 1]
    assert [each["text"] for each in result["segments"]] == [each["text"] for each in SEGMENTS]
    assert "words" not in result


def test_words_are_sent_if_they_are_asked_for() -> None:
    words = [{"word": "Hello", "start": 0.0, "end": 0.5}]
    fields = (("response_format", "verbose_json"), ("timestamp_granularities[]", "word"))
    result = transcribe_json([TRANSCRIPT | {"words": words}], *fields)
    TranscriptionVerbose.model_validate(result, strict=True)
    assert result["words"] == words
    assert "segments" not in result
    both = transcribe_json([TRANSCRIPT | {"words": words}], *fields, ("timestamp_granularities[]", "segment"))
    assert both.keys() > {"words", "segments"}


def test_a_verbose_translation_is_marked_as_one() -> None:
    result = transcribe_json(["Hello"], ("response_format", "verbose_json"), endpoint="audio.translations")
    TranslationVerbose.model_validate(result, strict=True)
    assert (result["task"], result["language"], result["duration"]) == ("translate", "english", 0.0)


def test_usage_of_a_transcript_is_what_was_reported() -> None:
    tokens = {"type": "tokens", "input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    assert transcribe_json(["x", OutputChunk.usage(3, 2)]) == {"text": "x", "usage": tokens}
    seconds = {"type": "duration", "seconds": 3.0}
    assert transcribe_json([{"text": "x", "usage": seconds}]) == {"text": "x", "usage": seconds}
    result = transcribe_json([{"text": "x", "usage": seconds}], ("response_format", "verbose_json"))
    TranscriptionVerbose.model_validate(result, strict=True)
    assert result["usage"] == seconds
    assert "usage" not in transcribe_json(["x", OutputChunk.usage(3, 2)], ("response_format", "verbose_json"))


def test_segments_of_several_dicts_follow_each_other() -> None:
    result = transcribe_json([{"segments": [each]} for each in SEGMENTS], ("response_format", "verbose_json"))
    assert [each["id"] for each in result["segments"]] == [0, 1]
    assert result["duration"] == 3662.0


def test_subtitles_are_made_of_segments() -> None:
    assert transcribe([TRANSCRIPT], ("response_format", "srt")).decode() == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello there.\n\n2\n01:01:01,062 --> 01:01:02,000\nBye ->\nnow.\n\n"
    )
    assert transcribe([TRANSCRIPT], ("response_format", "vtt")).decode() == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:01.500\nHello there.\n\n"
        "01:01:01.062 --> 01:01:02.000\nBye ->\nnow.\n\n"
    )


def test_subtitles_without_segments_are_one_cue() -> None:
    assert transcribe(["Hello", {"duration": 2.5}], ("response_format", "srt")).decode() == (
        "1\n00:00:00,000 --> 00:00:02,500\nHello\n\n"
    )
    assert b"00:00.000 --> 00:00:00.000" in transcribe(["Hello"], ("response_format", "vtt"))


@pytest.mark.parametrize(
    ("response_format", "content_type"),
    [
        ("json", "application/json"),
        ("verbose_json", "application/json"),
        ("text", "text/plain; charset=utf-8"),
        ("srt", "text/plain; charset=utf-8"),
        ("vtt", "text/vtt; charset=utf-8"),
    ],
)
def test_a_transcripts_content_type_goes_with_its_format(response_format: str, content_type: str) -> None:
    request = upload("audio.transcriptions", ("response_format", response_format))
    assert encoder("audio.transcriptions", request).head.content_type == content_type


def test_a_streamed_transcript_ends_with_the_whole_text() -> None:
    values = ["Hel", {"text": "lo"}, OutputChunk.final_text("Hello world"), OutputChunk.usage(3, 2)]
    report = read_stream(transcribe(values, ("stream", "true")))
    *deltas, done = report.events
    for each in deltas:
        TranscriptionTextDeltaEvent.model_validate(each, strict=True)
    TranscriptionTextDoneEvent.model_validate(done, strict=True)
    assert [each["delta"] for each in deltas] == ["Hel", "lo", " world"]
    assert done["text"] == "Hello world"
    assert done["usage"]["total_tokens"] == 5
    assert report.ending == "finished"


def events_of(values: list[Any], *fields: tuple[str, str]) -> list[dict[str, Any]]:
    report = read_stream(transcribe(values, ("stream", "true"), *fields))
    assert report.ending == "finished"
    return list(report.events)


def deltas_of(values: list[Any]) -> list[str]:
    return [each["delta"] for each in events_of(values) if each["type"] == "transcript.text.delta"]


def test_the_text_of_segments_is_streamed() -> None:
    segments = [
        {"start": i, "end": i + 1, "text": text} for i, text in enumerate([" Hello", " big", " world. "])
    ]
    assert deltas_of([{"segments": segments[:1]}, {"segments": segments[1:]}]) == ["Hello", " big world."]
    assert deltas_of([{"segments": segments[:2], "text": "Hello big"}]) == ["Hello big"]
    assert deltas_of([{"language": "en"}, {"segments": []}]) == []


@pytest.mark.parametrize(
    ("later", "deltas", "text"),
    [
        (" Hello world", ["Hello", " world"], " Hello world"),
        (OutputChunk.final_text("Hello!"), ["Hello", "!"], "Hello!"),
        ("Goodbye", ["Hello"], "Goodbye"),
        ({"segments": [{"start": 1, "end": 2, "text": "you"}]}, ["Hello", " you"], "Hello you"),
    ],
)
def test_a_text_that_is_given_after_its_segments_is_not_sent_twice(
    later: Any, deltas: list[str], text: str
) -> None:
    values = [{"segments": [{"start": 0, "end": 1, "text": " Hello"}]}, later]
    assert deltas_of(values) == deltas
    assert events_of(values)[-1]["text"] == text


def test_logprobs_are_sent_to_those_who_want_them() -> None:
    logprobs = [{"token": each, "logprob": -0.5, "bytes": list(each.encode())} for each in ("Hel", "lo")]
    values = [{"text": each["token"], "logprobs": [each]} for each in logprobs]
    wanted = ("include[]", "logprobs")
    assert transcribe_json(values) == {"text": "Hello"}
    assert transcribe_json(values, wanted) == {"text": "Hello", "logprobs": logprobs}
    *deltas, done = events_of(values, wanted)
    for each in deltas:
        TranscriptionTextDeltaEvent.model_validate(each, strict=True)
    TranscriptionTextDoneEvent.model_validate(done, strict=True)
    assert [each["logprobs"] for each in deltas] == [logprobs[:1], logprobs[1:]]
    assert done["logprobs"] == logprobs
    assert not any("logprobs" in each for each in events_of(values))


def test_languages_are_in_the_answer() -> None:
    values = [{"text": "Hello", "languages": [{"code": "en"}]}]
    assert transcribe_json(values)["languages"] == [{"code": "en"}]
    assert events_of(values)[-1]["languages"] == [{"code": "en"}]


SPOKEN = [segment | {"speaker": name} for segment, name in zip(SEGMENTS, ("A", "B"), strict=True)]


def test_segments_have_their_speakers() -> None:
    usage = {"type": "duration", "seconds": 4.0}
    result = transcribe_json(
        [TRANSCRIPT | {"segments": SPOKEN, "usage": usage}], ("response_format", "diarized_json")
    )
    TranscriptionDiarized.model_validate(result, strict=True)
    assert (result["task"], result["text"], result["duration"]) == ("transcribe", TRANSCRIPT["text"], 3662.5)
    assert result["usage"] == usage
    assert [(each["id"], each["speaker"], each["text"]) for each in result["segments"]] == [
        ("seg_0", "A", " Hello there."),
        ("seg_1", "B", " Bye -->\n\nnow."),
    ]


def test_segments_of_speakers_are_streamed_as_they_come() -> None:
    events = events_of([{"segments": [each]} for each in SPOKEN], ("response_format", "diarized_json"))
    kinds = [each["type"].removeprefix("transcript.text.") for each in events]
    assert kinds == ["delta", "segment", "delta", "segment", "done"]
    for each in (events[1], events[3]):
        TranscriptionTextSegmentEvent.model_validate(each, strict=True)
    assert [each.get("speaker") for each in events[1::2]] == ["A", "B"]
    assert [each["id"] for each in events[1::2]] == ["seg_0", "seg_1"]


@pytest.mark.parametrize("stream", [(), (("stream", "true"),)])
def test_a_model_that_does_not_know_who_speaks_does_not_pretend(stream: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(ApiError) as caught:
        transcribe([TRANSCRIPT], ("response_format", "diarized_json"), *stream)
    assert (caught.value.status, caught.value.param) == (400, "response_format")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"segments": "x"}, TypeError),
        ({"logprobs": "x"}, TypeError),
        ({"segments": ["x"]}, TypeError),
        ({"segments": [{"start": 0, "end": 1}]}, TypeError),
        ({"segments": [{"start": "0", "end": 1, "text": "x"}]}, TypeError),
        ({"segments": [{"start": True, "end": 1, "text": "x"}]}, TypeError),
        ({"segments": [{"start": 2, "end": 1, "text": "x"}]}, ValueError),
        ({"segments": [{"start": -1, "end": 1, "text": "x"}]}, ValueError),
        ({"segments": [{"start": 0, "end": float("inf"), "text": "x"}]}, ValueError),
        ({"words": [{"start": 0, "end": 1, "text": "x"}]}, TypeError),
        ({"text": 1}, TypeError),
        ({"duration": "1"}, TypeError),
        ({"language": 1}, TypeError),
        (OutputChunk.audio(b"x"), TypeError),
        (b"x", TypeError),
    ],
)
def test_a_transcript_that_cannot_be_is_the_handlers_failure(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        transcribe([value])


@pytest.mark.parametrize("second", ["more", OutputChunk.final_text("again"), {"text": "more"}])
def test_no_text_follows_the_final_text(second: Any) -> None:
    with pytest.raises(ValueError, match="final text"):
        transcribe([OutputChunk.final_text("all"), second])


def test_speech_is_sent_as_it_comes() -> None:
    writer = encoder("audio.speech", send("audio.speech"))
    assert writer.streaming
    assert [writer.encode(b"ab"), writer.encode(OutputChunk.audio(b"cd")), writer.finish()] == [
        b"ab",
        b"cd",
        b"",
    ]


@pytest.mark.parametrize(
    ("response_format", "first", "content_type"),
    [
        (None, b"\0", "audio/mpeg"),
        ("opus", b"\0", "audio/ogg"),
        ("aac", b"\0", "audio/aac"),
        ("flac", b"\0", "audio/flac"),
        ("wav", b"\0", "audio/wav"),
        ("pcm", b"\0", "audio/pcm"),
        (None, OutputChunk.audio(b"\0", "audio/x-own"), "audio/x-own"),
        (None, b"RIFF\0\0\0\0WAVEfmt ", "audio/wav"),
        ("wav", b"OggS", "audio/ogg"),
        ("pcm", OutputChunk.audio(b"fLaC"), "audio/flac"),
        ("flac", b"ID3", "audio/mpeg"),
        ("wav", b"\0" * 12, "audio/pcm"),
        ("opus", b"\1\2" * 100, "audio/pcm"),
        ("mp3", b"\0" * 12, "audio/mpeg"),
    ],
)
def test_the_content_type_of_speech_is_what_it_is_and_else_what_was_asked_for(
    response_format: str | None, first: Any, content_type: str
) -> None:
    writer = encoder("audio.speech", send("audio.speech", response_format=response_format))
    assert writer.encode(b"") == b""
    assert writer.encode(first)
    assert writer.encode(OutputChunk.audio(b"more", "audio/other"))
    assert writer.head.content_type == content_type


@pytest.mark.parametrize("values", [[], [b""]])
def test_speech_without_audio_is_the_handlers_failure(values: list[bytes]) -> None:
    with pytest.raises(ValueError, match="no audio"):
        answer("audio.speech", send("audio.speech"), values)


@pytest.mark.parametrize("value", ["x", {"a": 1}, OutputChunk.image(b"x"), OutputChunk.json({})])
def test_speech_that_is_not_audio_is_the_handlers_failure(value: Any) -> None:
    with pytest.raises(TypeError):
        answer("audio.speech", send("audio.speech"), [value])


def speak(values: list[Any], **fields: Any) -> bytes:
    return answer("audio.speech", send("audio.speech", **fields), values)


def read_wav(data: bytes) -> tuple[int, int, list[int]]:
    """Return the rate, the channels and the samples that the standard library finds in a WAV file."""
    with wave.open(io.BytesIO(data)) as file:
        assert file.getsampwidth() == 2
        frames = file.readframes(len(data))
        return file.getframerate(), file.getnchannels(), list(array("h", frames))


@pytest.mark.parametrize(
    ("samples", "channels"),
    [
        ([0.0, 1.0, -1.0, 2.5, -9.0, math.nan], 1),
        ((0, 32767, -32767, 40000, -32767, 0), 1),
        (array("f", [0, 1, -1, math.inf, -math.inf, 0]), 1),
        (array("h", [0, 32767, -32767, 32767, -32767, 0]), 1),
        (array("h", [0, 32767, -32767, 32767, -32767, 0]).tobytes(), 1),
        (np.array([0, 1, -1, 7, -7, math.nan], "float32"), 1),
        (np.array([[0, 1], [-1, 7], [-7, 0]], "float64"), 2),
        (np.array([[0, 32767], [-32767, 99999], [-32767, 0]], "int64"), 2),
        (np.array([[0, 32767], [-32767, 32767], [-32767, 0]], "int16").T.copy().T, 2),
        ([0.0, 1.0, -1.0, 1.0, -1.0, 0.0], 2),
    ],
)
def test_samples_become_a_wav_file_whatever_they_are_held_in(samples: Any, channels: int) -> None:
    file = speak([OutputChunk.pcm(samples, 16_000, channels, whole=True)], response_format="wav")
    assert read_wav(file) == (16_000, channels, [0, 32767, -32767, 32767, -32767, 0])
    assert struct.unpack_from("<I", file, 4)[0] == len(file) - 8


def test_samples_that_come_in_pieces_have_one_header_without_a_length() -> None:
    writer = encoder("audio.speech", send("audio.speech", response_format="mp3"))
    first = writer.encode(OutputChunk.pcm([0.5], 24_000))
    assert writer.head.content_type == "audio/wav"
    assert struct.unpack_from("<I", first, 40)[0] == struct.unpack_from("<I", first, 4)[0] == 0xFFFFFFFF
    assert writer.encode(OutputChunk.pcm([0.5], 24_000)) == first[44:]
    assert read_wav(first + first[44:]) == (24_000, 1, [16384, 16384])


def test_a_client_that_asks_for_pcm_gets_bare_samples() -> None:
    writer = encoder("audio.speech", send("audio.speech", response_format="pcm"))
    assert writer.encode(OutputChunk.pcm([1.0], 24_000)) == b"\xff\x7f"
    assert writer.head.content_type == "audio/pcm"


def test_samples_in_events_begin_with_the_header() -> None:
    data = speak([OutputChunk.pcm([1, 2], 8000)], response_format="wav", stream_format="sse")
    first = json.loads(data.split(b"\n\n")[0].removeprefix(b"data: "))
    assert read_wav(base64.b64decode(first["audio"])) == (8000, 1, [1, 2])


@pytest.mark.parametrize(
    "second", [b"raw", OutputChunk.pcm([1], 16_000), OutputChunk.pcm([1, 2], 8000, 2)], ids=repr
)
def test_an_answer_has_samples_of_one_form(second: Any) -> None:
    with pytest.raises(ValueError, match="one form"):
        speak([OutputChunk.pcm([1], 8000), second])
    with pytest.raises(ValueError, match="whole answer"):
        speak([OutputChunk.pcm([1], 8000, whole=True), OutputChunk.pcm([1], 8000)])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("text", 8000), TypeError),
        (([1, "x"], 8000), TypeError),
        (([1], "8000"), TypeError),
        (([1], True), TypeError),
        (([1], 0), ValueError),
        (([1], 8000, 65), ValueError),
        (([1, 2, 3], 8000, 2), ValueError),
        ((b"odd", 8000), ValueError),
        ((np.zeros((2, 3)), 8000, 2), ValueError),
    ],
    ids=repr,
)
def test_samples_that_are_none_are_refused_where_they_are_given(
    arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        OutputChunk.pcm(*arguments)


def test_speech_in_events_is_base64_and_ends_with_its_usage() -> None:
    data = bytes(range(256)) * 1000
    request = send("audio.speech", stream_format="sse", response_format="pcm")
    writer = encoder("audio.speech", request)
    assert writer.streaming
    assert writer.head.content_type == "text/event-stream"
    sent = [writer.encode(value) for value in (b"", b"ab", OutputChunk.audio(data), OutputChunk.usage(3, 40))]
    assert sent[0] == b""
    report = read_stream(b"".join(sent) + writer.finish())
    assert report.ending == "finished"
    *deltas, done = report.events
    assert {each["type"] for each in deltas} == {"speech.audio.delta"}
    assert len(deltas) == 1 + -(-len(data) // (48 * 1024))
    assert b"".join(base64.b64decode(each["audio"], validate=True) for each in deltas) == b"ab" + data
    assert done == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": 3, "output_tokens": 40, "total_tokens": 43},
    }


@pytest.mark.parametrize("values", [[], [b""]])
def test_speech_in_events_without_audio_is_the_handlers_failure(values: list[bytes]) -> None:
    with pytest.raises(ValueError, match="no audio"):
        answer("audio.speech", send("audio.speech", stream_format="sse"), values)


PNG = b"\x89PNG\r\n\x1a\n..."


def draw(values: list[Any], **fields: Any) -> Any:
    result = answer_json("images.generations", send("images.generations", **fields), values)
    ImagesResponse.model_validate(result, strict=True)
    return result


@pytest.mark.parametrize("values", [[PNG, b"raw"], [[PNG, b"raw"]], [(OutputChunk.image(PNG), b"raw")]])
def test_images_are_base64_in_order(values: list[Any]) -> None:
    result = draw(values, n=2)
    assert result["created"] == 1_700_000_000
    assert [base64.b64decode(each["b64_json"]) for each in result["data"]] == [PNG, b"raw"]


@pytest.mark.parametrize(
    ("image", "written"),
    [
        (PNG, "png"),
        (b"\xff\xd8\xff\xe0", "jpeg"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "webp"),
        (OutputChunk.image(b"raw", "image/png"), "png"),
        (b"raw", None),
    ],
)
def test_the_format_of_an_image_is_in_the_answer_if_it_is_known(image: Any, written: str | None) -> None:
    assert draw([image]).get("output_format") == written


def test_usage_of_images_is_sent_if_it_was_reported() -> None:
    assert "usage" not in draw([PNG])
    details = {"input_tokens_details": {"image_tokens": 0, "text_tokens": 3}}
    usage = {"input_tokens": 3, "output_tokens": 4} | details
    assert draw([PNG, {"usage": usage, "seed": 5}]) == {
        "created": 1_700_000_000,
        "data": [{"b64_json": base64.b64encode(PNG).decode()}],
        "output_format": "png",
        "usage": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7} | details,
        "seed": 5,
    }


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([], ValueError),
        ([PNG, PNG], ValueError),
        ([b""], ValueError),
        (["x"], TypeError),
        ([["x"]], TypeError),
        ([OutputChunk.audio(PNG)], TypeError),
        ([{"data": []}], TypeError),
        ([{"b64_json": ""}], TypeError),
        ([OutputChunk.partial_image(b"")], ValueError),
        ([OutputChunk.partial_image(PNG)], ValueError),
    ],
)
def test_output_that_is_no_image_is_the_handlers_failure(values: list[Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        draw(values)
