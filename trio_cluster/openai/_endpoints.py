"""The table of routes: what each is called, which kind of model answers it, how it is read and how it is
written.

One row is all that a route needs; whatever relays requests or runs handlers goes by this table and knows no
route by name. Rows are found by name, because the name is what travels over the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol

import attrs

from trio_cluster._models import Kind

from ._embeddings import EmbeddingEncoder
from ._encoding import Encoder
from ._images import ImageEncoder
from ._readers import (
    read_chat,
    read_completion,
    read_embedding,
    read_image_generation,
    read_speech,
    read_transcription,
    read_translation,
)
from ._requests import ASRRequest, ChatRequest, EmbeddingRequest, ImageGenRequest, ModelRequest, TTSRequest
from ._speech import SpeechEncoder
from ._texts import ChatShape, CompletionShape, PlainText, StreamedText, TextShape
from ._transcriptions import PlainTranscription, StreamedTranscription

__all__ = ["ENDPOINTS", "Endpoint"]


class _Parse(Protocol):
    def __call__(self, body: bytes, content_type: str, headers: Mapping[str, str]) -> ModelRequest: ...


class _MakeEncoder(Protocol):
    def __call__(self, request: Any, *, response_id: str, created: int) -> Encoder: ...


@attrs.frozen
class Endpoint:
    """One route of the API."""

    name: str
    path: str
    """Without the ``/v1`` in front."""
    kind: Kind
    parse: _Parse
    """``parse(body, content_type, headers)`` returns what was sent, or raises ``InvalidRequest``."""
    encoder: _MakeEncoder
    """``encoder(request, response_id=..., created=...)`` returns the encoder for one answer. ``response_id``
    is a unique token, to which the route adds its prefix; ``created`` is in seconds since the epoch."""


def _text(shape: TextShape, request: ChatRequest, answer_id: str, created: int) -> Encoder:
    encoder = StreamedText if request.stream else PlainText
    return encoder(shape, request, answer_id, created)


def _chat(request: ChatRequest, *, response_id: str, created: int) -> Encoder:
    return _text(ChatShape(request), request, f"chatcmpl-{response_id}", created)


def _completion(request: ChatRequest, *, response_id: str, created: int) -> Encoder:
    return _text(CompletionShape(request), request, f"cmpl-{response_id}", created)


def _embedding(request: EmbeddingRequest, *, response_id: str, created: int) -> Encoder:
    return EmbeddingEncoder(request)


def _transcription(request: ASRRequest, *, response_id: str, created: int) -> Encoder:
    return StreamedTranscription(request) if request.stream else PlainTranscription(request)


def _speech(request: TTSRequest, *, response_id: str, created: int) -> Encoder:
    return SpeechEncoder(request)


def _image(request: ImageGenRequest, *, response_id: str, created: int) -> Encoder:
    return ImageEncoder(request, created)


#: Every route that asks a model something, by name.
ENDPOINTS: Final[Mapping[str, Endpoint]] = MappingProxyType(
    {
        each.name: each
        for each in (
            Endpoint("chat.completions", "/chat/completions", "chat", read_chat, _chat),
            Endpoint("completions", "/completions", "chat", read_completion, _completion),
            Endpoint("embeddings", "/embeddings", "embedding", read_embedding, _embedding),
            Endpoint(
                "audio.transcriptions", "/audio/transcriptions", "asr", read_transcription, _transcription
            ),
            Endpoint("audio.translations", "/audio/translations", "asr", read_translation, _transcription),
            Endpoint("audio.speech", "/audio/speech", "tts", read_speech, _speech),
            Endpoint(
                "images.generations", "/images/generations", "image_generation", read_image_generation, _image
            ),
        )
    }
)
