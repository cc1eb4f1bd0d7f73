"""Cases about everything that is not a conversation: vectors, ranks, verdicts, sound, pictures."""

from __future__ import annotations

import base64
import json
from typing import Any, Final
from unittest.mock import ANY

from client_case import Beginning, Case
from client_drivers import file
from scripted import PNG

__all__ = ["CLIP", "IMAGES", "SOUND", "VECTORS", "VERDICTS"]

CLIP: Final = file("clip.wav", b"RIFF....WAVE", "audio/wav")

_HEARD: Final = "clip.wav of 12 bytes. The end."


# Vectors


def _embeddings(model: str, *vectors: list[float] | str, tokens: int = 0) -> dict[str, Any]:
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


VECTORS: Final = {
    # Each client asks for base64 unless it is told not to, and decodes it.
    "embeddings": Case(
        method="embeddings.create",
        body={"model": "vectors", "input": ["a", "bb"]},
        value=_embeddings("vectors", [1.0, 0.5, -0.25, 3.0], [2.0, 0.5, -0.25, 3.0]),
        asked={"encoding_format": "base64", "inputs": ["a", "bb"]},
    ),
    "embeddings as numbers": Case(
        method="embeddings.create",
        body={"model": "vectors/numpy", "input": "four", "encoding_format": "float"},
        value=_embeddings("vectors/numpy", [4.0, 0.5, -0.25, 3.0], tokens=11),
        asked={"encoding_format": "float", "inputs": ["four"]},
    ),
    "embeddings as base64": Case(
        method="embeddings.create",
        body={"model": "vectors/numpy", "input": "four", "encoding_format": "base64"},
        value=_embeddings("vectors/numpy", "AACAQAAAAD8AAIC+AABAQA==", tokens=11),
        untyped="data.0.embedding",
    ),
    "embeddings of tokens": Case(
        method="embeddings.create",
        body={"model": "vectors", "input": [[1], [2, 3]]},
        value=_embeddings("vectors", [1.0, 0.5, -0.25, 3.0], [2.0, 0.5, -0.25, 3.0]),
        asked={"inputs": [[1], [2, 3]]},
    ),
}


# Judgement


_CATEGORIES: Final = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent",
    "self-harm", "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence",
    "violence/graphic",
)  # fmt: skip


def _verdict(violence: float) -> dict[str, Any]:
    return {
        "flagged": violence > 0.5,
        "categories": dict.fromkeys(_CATEGORIES, False) | {"violence": violence > 0.5},
        "category_scores": dict.fromkeys(_CATEGORIES, 0.0) | {"violence": violence},
        "category_applied_input_types": {name: [] for name in _CATEGORIES} | {"violence": ["text"]},
    }


VERDICTS: Final = {
    "moderation": Case(
        method="moderations.create",
        body={"model": "judge", "input": ["hit him", "pat him"]},
        value={"id": Beginning("modr-"), "model": "judge", "results": [_verdict(0.9), _verdict(0.1)]},
    ),
    # There is no official form of it, and no method of the clients.
    "ranking": Case(
        method="post",
        positional=("/rerank",),
        body={"model": "ranker", "query": "a b", "documents": ["x", "a b", "a"], "top_n": 2},
        value={
            "id": Beginning("rerank-"),
            "object": "list",
            "model": "ranker",
            "results": [{"index": 1, "relevance_score": 2.0}, {"index": 2, "relevance_score": 1.0}],
            "usage": {"prompt_tokens": 3, "total_tokens": 3},
        },
        asked={"query": "a b", "documents": ["x", "a b", "a"]},
    ),
    "a route of the model's own": Case(
        method="post",
        positional=("/tokenize",),
        body={"model": "echo", "prompt": "hey you"},
        value={"token_0": "hey", "token_1": "you"},
    ),
}


# Sound


def _segment(number: int, start: float, end: float, text: str) -> dict[str, Any]:
    unknown = {
        "seek": 0,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": 0.0,
        "compression_ratio": 1.0,
        "no_speech_prob": 0.0,
    }
    return {"id": number, "start": start, "end": end, "text": text, **unknown}


_SEGMENTS: Final = [_segment(0, 0.0, 1.0, " clip.wav of 12 bytes."), _segment(1, 1.0, 2.5, " The end.")]
_HEARING: Final = {"type": "tokens", "input_tokens": 7, "output_tokens": 6, "total_tokens": 13}


def _logprob(token: str) -> dict[str, Any]:
    return {"token": token, "logprob": -0.5, "bytes": [ord(token)]}


def _speaking(number: int, name: str) -> dict[str, Any]:
    return {
        "type": "transcript.text.segment", "id": f"seg_{number}", "start": float(number),
        "end": number + 1.0, "text": f" I am {name}.", "speaker": name,
    }  # fmt: skip


def _events(*events: dict[str, Any]) -> bytes:
    texts = [json.dumps(event, separators=(",", ":")) for event in events] + ["[DONE]"]
    return "".join(f"data: {text}\n\n" for text in texts).encode()


_SPOKEN: Final = b"hey" * 100 + b"you" * 100

SOUND: Final = {
    "transcription": Case(
        method="audio.transcriptions.create",
        body={"model": "scribe", "file": CLIP, "language": "en", "temperature": 0.5},
        value={"text": _HEARD},
        asked={
            "audio": b"RIFF....WAVE",
            "filename": "clip.wav",
            "language": "en",
            "temperature": 0.5,
            "translate": False,
        },
    ),
    "transcription as text": Case(
        method="audio.transcriptions.create",
        body={"model": "scribe", "file": CLIP, "response_format": "text"},
        value=f"{_HEARD}\n",
    ),
    "transcription with segments": Case(
        method="audio.transcriptions.create",
        body={
            "model": "scribe",
            "file": CLIP,
            "response_format": "verbose_json",
            "timestamp_granularities": ["segment"],
        },
        value={
            "task": "transcribe",
            "language": "english",
            "duration": 2.5,
            "text": _HEARD,
            "segments": _SEGMENTS,
        },
        asked={"timestamp_granularities": ["segment"]},
    ),
    "transcription as subtitles": Case(
        method="audio.transcriptions.create",
        body={"model": "scribe", "file": CLIP, "response_format": "srt"},
        value=(
            "1\n00:00:00,000 --> 00:00:01,000\nclip.wav of 12 bytes.\n\n"
            "2\n00:00:01,000 --> 00:00:02,500\nThe end.\n\n"
        ),
    ),
    "transcription, streamed": Case(
        method="audio.transcriptions.create",
        body={"model": "scribe", "file": CLIP, "stream": True},
        events=[
            {"type": "transcript.text.delta", "delta": _HEARD},
            {"type": "transcript.text.done", "text": _HEARD},
        ],
    ),
    "transcription with logprobs, streamed": Case(
        method="audio.transcriptions.create",
        body={"model": "scribe/speakers", "file": CLIP, "include": ["logprobs"], "stream": True},
        events=[
            {"type": "transcript.text.delta", "delta": "I am A.", "logprobs": [_logprob("A")]},
            {"type": "transcript.text.delta", "delta": " I am B.", "logprobs": [_logprob("B")]},
            {
                "type": "transcript.text.done",
                "text": "I am A. I am B.",
                "logprobs": [_logprob("A"), _logprob("B")],
                "usage": _HEARING,
            },
        ],
        asked={"include": ["logprobs"]},
    ),
    "transcription of several speakers": Case(
        method="audio.transcriptions.create",
        body={"model": "scribe/speakers", "file": CLIP, "response_format": "diarized_json"},
        value={
            "task": "transcribe",
            "duration": 2.0,
            "text": "I am A. I am B.",
            "segments": [_speaking(0, "A"), _speaking(1, "B")],
            "usage": _HEARING,
        },
    ),
    "transcription of several speakers, streamed": Case(
        method="audio.transcriptions.create",
        body={
            "model": "scribe/speakers",
            "file": CLIP,
            "response_format": "diarized_json",
            "stream": True,
        },
        events=[
            {"type": "transcript.text.delta", "delta": "I am A."},
            _speaking(0, "A"),
            {"type": "transcript.text.delta", "delta": " I am B."},
            _speaking(1, "B"),
            {"type": "transcript.text.done", "text": "I am A. I am B.", "usage": _HEARING},
        ],
    ),
    "translation": Case(
        method="audio.translations.create",
        body={"model": "scribe", "file": CLIP},
        value={"text": _HEARD},
        asked={"translate": True},
    ),
    "translation with segments": Case(
        method="audio.translations.create",
        body={"model": "scribe", "file": CLIP, "response_format": "verbose_json"},
        value={
            "task": "translate",
            "language": "english",
            "duration": 2.5,
            "text": _HEARD,
            "segments": _SEGMENTS,
        },
    ),
    "speech": Case(
        method="audio.speech.create",
        body={"model": "voice", "voice": "alloy", "input": "hey you", "speed": 1.5},
        data=_SPOKEN,
        content_type="audio/mpeg",
        asked={"voice": "alloy", "speed": 1.5, "input": "hey you"},
    ),
    "speech in another format": Case(
        method="audio.speech.create",
        body={"model": "voice", "voice": "alloy", "input": "hey you", "response_format": "flac"},
        data=_SPOKEN,
        # The handler's bytes are no FLAC file.
        content_type="audio/pcm",
    ),
    # Neither client reads these events; they hand over the bytes.
    "speech as events": Case(
        method="audio.speech.create",
        body={"model": "voice", "voice": "alloy", "input": "hey", "stream_format": "sse"},
        data=_events(
            {"type": "speech.audio.delta", "audio": base64.b64encode(b"hey" * 100).decode()},
            {
                "type": "speech.audio.done",
                "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
            },
        ),
        content_type="text/event-stream",
    ),
    "speech as it is made": Case(
        method="audio.speech.create",
        body={"model": "voice/thread", "voice": "alloy", "input": "hey you"},
        as_pieces=True,
        data=_SPOKEN,
        content_type="audio/x-words",
    ),
}


# Pictures


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _spent(read: int, written: int) -> dict[str, Any]:
    return {
        "input_tokens": read,
        "input_tokens_details": {"text_tokens": read, "image_tokens": 0},
        "output_tokens": written,
        "total_tokens": read + written,
    }


def _picture(kind: str, data: bytes, **members: Any) -> dict[str, Any]:
    return {
        "type": kind, "b64_json": _base64(data), "created_at": ANY, "size": "auto", "quality": "auto",
        "background": "auto", "output_format": "png", **members,
    }  # fmt: skip


def _png(name: str) -> dict[str, str]:
    return file(f"{name}.png", PNG + name.encode(), "image/png")


IMAGES: Final = {
    "images": Case(
        method="images.generate",
        body={"model": "painter", "prompt": "a cat", "n": 2, "size": "1024x1024"},
        value={
            "created": ANY,
            "data": [{"b64_json": _base64(PNG + bytes([i]))} for i in range(2)],
            "output_format": "png",
            "usage": _spent(3, 4),
        },
        asked={"prompt": "a cat", "n": 2, "size": "1024x1024"},
    ),
    "an image, streamed": Case(
        method="images.generate",
        body={"model": "painter", "prompt": "a cat", "stream": True, "partial_images": 2},
        events=[
            _picture("image_generation.partial_image", PNG + bytes([100]), partial_image_index=0),
            _picture("image_generation.partial_image", PNG + bytes([101]), partial_image_index=1),
            _picture("image_generation.completed", PNG + bytes([0]), usage=_spent(3, 4)),
        ],
    ),
    "an image that is changed": Case(
        method="images.edit",
        body={"model": "painter", "prompt": "older", "image": _png("a"), "mask": _png("m")},
        value={
            "created": ANY,
            "data": [{"b64_json": _base64(PNG + PNG + b"a" + PNG + b"m")}],
            "output_format": "png",
        },
        asked={"prompt": "older", "images": [PNG + b"a"], "mask": PNG + b"m"},
    ),
    "several images that are changed": Case(
        method="images.edit",
        body={"model": "painter", "prompt": "older", "image": [_png("a"), _png("b")], "n": 2},
        value={
            "created": ANY,
            "data": [{"b64_json": _base64(PNG + PNG + name)} for name in (b"a", b"b")],
            "output_format": "png",
        },
        asked={"images": [PNG + b"a", PNG + b"b"], "n": 2},
    ),
    "an image that is changed, streamed": Case(
        method="images.edit",
        body={
            "model": "painter", "prompt": "older", "image": _png("a"), "stream": True, "partial_images": 1,
        },
        events=[
            _picture("image_edit.partial_image", PNG, partial_image_index=0),
            _picture("image_edit.completed", PNG + PNG + b"a", usage=_spent(0, 0)),
        ],
    ),
}  # fmt: skip
