"""The table of routes: the name of each, the kind of model that answers it, its reader and its encoder.

A new route needs one row here, and nothing else: the code that relays requests and runs handlers goes by this table and
knows no route by name. Rows are looked up by name, because the name is what travels over the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, Final, Protocol

import attrs

from trio_cluster.core.model import Kind

from .error_families import MESSAGE_ERRORS, OPENAI_ERRORS, ErrorFamily
from .failures import (
    ERROR_OBJECT,
    IMAGE_ERROR,
    MESSAGE_ERROR,
    RESPONSE_FAILED,
    TYPED_ERROR,
    FailureGrammar,
)
from .requests.custom import checked_path, read_custom
from .requests.fields import Table
from .requests.forms import Form
from .requests.messages_api import COUNT, MESSAGE, read_count, read_message
from .requests.moderations import MODERATION, read_moderation
from .requests.readers import (
    image_edit_of,
    read_chat,
    read_completion,
    read_embedding,
    read_image_edit,
    read_image_generation,
    read_speech,
    read_transcription,
    read_translation,
    transcription_of,
    translation_of,
)
from .requests.rerank import RERANK, read_rerank
from .requests.responses_api import RESPONSE, read_response
from .requests.tables import (
    CHAT,
    COMPLETION,
    EMBEDDING,
    IMAGE_EDIT,
    IMAGE_GENERATION,
    SPEECH,
    TRANSCRIPTION,
    TRANSLATION,
)
from .requests.types import (
    ASRRequest,
    ChatRequest,
    CustomRequest,
    EmbeddingRequest,
    ImageEditRequest,
    ImageGenRequest,
    ModelRequest,
    ModerationRequest,
    RerankRequest,
    TTSRequest,
)
from .responses.custom import CustomEncoder
from .responses.embeddings import EmbeddingEncoder
from .responses.encoder import Encoder
from .responses.images import PlainEdit, PlainImages, StreamedEdit, StreamedImage
from .responses.messages_api import CountEncoder, PlainMessage, StreamedMessage
from .responses.moderations import ModerationEncoder
from .responses.rerank import RerankEncoder
from .responses.responses_api import PlainResponse, StreamedResponse
from .responses.speech import PlainSpeech, StreamedSpeech
from .responses.text import ChatShape, CompletionShape, PlainText, StreamedText, TextShape
from .responses.transcriptions import PlainTranscription, StreamedTranscription

__all__ = ["COUNT_TOKENS", "ENDPOINTS", "KNOWN_STREAMS", "Endpoint", "custom_path", "endpoint_named"]


_JSON: Final = ("application/json",)
_JSON_OR_EVENTS: Final = (*_JSON, "text/event-stream")


#: The name of the route that counts the tokens of a prompt.
COUNT_TOKENS: Final = "messages.count_tokens"


class _Parse(Protocol):
    def __call__(
        self, body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
    ) -> ModelRequest: ...


class _ParseForm(Protocol):
    def __call__(self, form: Form, headers: Mapping[str, str], *, checked: bool = False) -> ModelRequest: ...


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
    """``parse(body, content_type, headers)`` returns the request, or raises ``InvalidRequest``. With ``checked=True``,
    the body must have passed ``parse`` before, on another node: the same request is made of it, and nothing is checked.
    Of a body that would not have passed, anything may be made, and any exception may be raised."""
    encoder: _MakeEncoder
    """``encoder(request, response_id=..., created=...)`` returns the encoder for one answer. ``response_id`` is a
    unique token, to which the route adds its prefix; ``created`` is in seconds since the epoch."""
    table: Table | None = None
    """The documented fields, for the description of the route; ``None``: anything may be sent."""
    answers: tuple[str, ...] = _JSON
    """The media types of its answers, or ranges of media types."""
    parse_form: _ParseForm | None = None
    """For routes that take only a form: ``parse_form(form, headers)`` does the same as ``parse``, with a form that has
    been read. The form is used up. ``checked`` is as for ``parse``."""
    failure: FailureGrammar = ERROR_OBJECT
    """How a stream of this route says that it has failed."""
    errors: ErrorFamily = OPENAI_ERRORS
    """How the errors of this route look, and which headers its answers have."""
    optional: Kind | None = None
    """For a route that a model answers only if its handler can: the kind of the models that may."""
    is_stored: bool = False
    """Its answers can be stored, and its requests may refer to stored ones; see ``gateway/stored_responses.py``."""


def _text(shape: TextShape, request: ChatRequest, answer_id: str, created: int) -> Encoder:
    encoder = StreamedText if request.stream else PlainText
    return encoder(shape, request, answer_id, created)


def _chat(request: ChatRequest, *, response_id: str, created: int) -> Encoder:
    return _text(ChatShape(request), request, f"chatcmpl-{response_id}", created)


def _completion(request: ChatRequest, *, response_id: str, created: int) -> Encoder:
    return _text(CompletionShape(request), request, f"cmpl-{response_id}", created)


def _response(request: ChatRequest, *, response_id: str, created: int) -> Encoder:
    encoder = StreamedResponse if request.stream else PlainResponse
    return encoder(request, response_id, created)


def _message(request: ChatRequest, *, response_id: str, created: int) -> Encoder:
    encoder = StreamedMessage if request.stream else PlainMessage
    return encoder(request, response_id)


def _count(request: ChatRequest, *, response_id: str, created: int) -> Encoder:
    return CountEncoder(request)


def _embedding(request: EmbeddingRequest, *, response_id: str, created: int) -> Encoder:
    return EmbeddingEncoder(request)


def _transcription(request: ASRRequest, *, response_id: str, created: int) -> Encoder:
    return StreamedTranscription(request) if request.stream else PlainTranscription(request)


def _speech(request: TTSRequest, *, response_id: str, created: int) -> Encoder:
    return StreamedSpeech(request) if request.stream_format == "sse" else PlainSpeech(request)


def _image(request: ImageGenRequest, *, response_id: str, created: int) -> Encoder:
    return StreamedImage(request, created) if request.stream else PlainImages(request, created)


def _edit(request: ImageEditRequest, *, response_id: str, created: int) -> Encoder:
    return StreamedEdit(request, created) if request.stream else PlainEdit(request, created)


def _rerank(request: RerankRequest, *, response_id: str, created: int) -> Encoder:
    return RerankEncoder(request, f"rerank-{response_id}")


def _moderation(request: ModerationRequest, *, response_id: str, created: int) -> Encoder:
    return ModerationEncoder(request, f"modr-{response_id}")


#: Every route that asks a model, by name.
ENDPOINTS: Final[Mapping[str, Endpoint]] = MappingProxyType(
    {
        each.name: each
        for each in (
            Endpoint(
                "chat.completions", "/chat/completions", "chat", read_chat, _chat, CHAT, _JSON_OR_EVENTS
            ),
            Endpoint(
                "completions",
                "/completions",
                "chat",
                read_completion,
                _completion,
                COMPLETION,
                _JSON_OR_EVENTS,
            ),
            Endpoint(
                "responses",
                "/responses",
                "chat",
                read_response,
                _response,
                RESPONSE,
                _JSON_OR_EVENTS,
                failure=RESPONSE_FAILED,
                is_stored=True,
            ),
            Endpoint(
                "messages",
                "/messages",
                "chat",
                read_message,
                _message,
                MESSAGE,
                _JSON_OR_EVENTS,
                failure=MESSAGE_ERROR,
                errors=MESSAGE_ERRORS,
            ),
            Endpoint(
                COUNT_TOKENS,
                "/messages/count_tokens",
                "custom",
                read_count,
                _count,
                COUNT,
                errors=MESSAGE_ERRORS,
                optional="chat",
            ),
            Endpoint("embeddings", "/embeddings", "embedding", read_embedding, _embedding, EMBEDDING),
            Endpoint(
                "audio.transcriptions",
                "/audio/transcriptions",
                "asr",
                read_transcription,
                _transcription,
                TRANSCRIPTION,
                (*_JSON_OR_EVENTS, "text/plain", "text/vtt"),
                transcription_of,
                TYPED_ERROR,
            ),
            Endpoint(
                "audio.translations",
                "/audio/translations",
                "asr",
                read_translation,
                _transcription,
                TRANSLATION,
                (*_JSON, "text/plain", "text/vtt"),
                translation_of,
                TYPED_ERROR,
            ),
            Endpoint(
                "audio.speech",
                "/audio/speech",
                "tts",
                read_speech,
                _speech,
                SPEECH,
                ("audio/*", "text/event-stream"),
                failure=TYPED_ERROR,
            ),
            Endpoint(
                "images.generations",
                "/images/generations",
                "image_generation",
                read_image_generation,
                _image,
                IMAGE_GENERATION,
                _JSON_OR_EVENTS,
                failure=IMAGE_ERROR,
            ),
            Endpoint(
                "images.edits",
                "/images/edits",
                "image_edit",
                read_image_edit,
                _edit,
                IMAGE_EDIT,
                _JSON_OR_EVENTS,
                image_edit_of,
                IMAGE_ERROR,
            ),
            Endpoint("rerank", "/rerank", "rerank", read_rerank, _rerank, RERANK),
            Endpoint("moderations", "/moderations", "moderation", read_moderation, _moderation, MODERATION),
        )
    }
)


#: The names of the endpoints whose streams have a grammar that is known, whichever server answers.
KNOWN_STREAMS: Final = frozenset({*ENDPOINTS, "/v1/messages"})

_BY_PATH: Final = {f"/v1{endpoint.path}": endpoint for endpoint in ENDPOINTS.values()}

#: Paths that cannot become custom routes.
_TAKEN: Final = {"/v1/models", "/v1/conversations", *_BY_PATH}


def custom_path(path: str) -> str:
    """Return the path of a custom route in its canonical form: with ``/v1``, and without a slash at the end.

    Raises:
        ValueError: it cannot be the path of a route, or the API has this route.
    """
    path = checked_path(path)
    if path in _TAKEN or path.startswith(("/v1/models/", "/v1/conversations/")):
        raise ValueError(f"{path} is a route of the API already")
    return path


def endpoint_named(name: str) -> Endpoint:
    """Return the endpoint of a name; the name of a custom route is its path.

    Nodes of older versions call routes that they do not know by their paths, too.

    Raises:
        KeyError: the table has no such route, and it is not a path.
    """
    if not name.startswith("/"):
        return ENDPOINTS[name]
    return _BY_PATH.get(name) or _custom_endpoint(name)


def _custom(request: CustomRequest, *, response_id: str, created: int) -> Encoder:
    return CustomEncoder(request)


# Bounded, since the paths come from clients. Few of them are routes that a model answers.
@lru_cache(maxsize=256)
def _custom_endpoint(path: str) -> Endpoint:
    return Endpoint(path, path.removeprefix("/v1"), "custom", partial(read_custom, path=path), _custom)
