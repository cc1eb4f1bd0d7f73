"""From what a client sent to a request: one table of fields and one reader for each route.

A reader takes the body as it came, its content type and the headers worth keeping, and returns a request or
raises :class:`InvalidRequest` with ``param`` naming what is wrong. Whatever cannot be served is refused here,
before it takes anybody's slot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from trio_cluster._errors import InvalidRequest

from ._conversation import FUNCTIONS, MESSAGES, RESPONSE_FORMAT, TOOL_CHOICE, TOOLS
from ._fields import (
    ANY_OBJECT,
    ANY_STRING,
    BOOLEAN,
    Check,
    Custom,
    Integer,
    ListOf,
    Number,
    ObjectOf,
    OneOf,
    String,
    Table,
    missing,
    wrong_type,
    wrong_value,
)
from ._forms import media_type, read_form
from ._json import read_object
from ._requests import ASRRequest, ChatRequest, EmbeddingRequest, ImageGenRequest, TTSRequest

__all__ = [
    "read_chat",
    "read_completion",
    "read_embedding",
    "read_image_generation",
    "read_speech",
    "read_transcription",
    "read_translation",
]

_NOT_EMPTY: Final = String(least=1)
_INT64: Final = Integer(-(2**63), 2**63 - 1)


def _read_json(body: bytes, content_type: str) -> dict[str, Any]:
    """Return the JSON object in ``body``; a missing content type is forgiven, a wrong one is not."""
    kind = media_type(content_type)
    if kind not in ("application/json", "") and not kind.endswith("+json"):
        raise InvalidRequest(
            f"Unsupported content type '{kind}': expected application/json",
            status=415,
            code="unsupported_media_type",
        )
    return read_object(body)


# Chat and completions


def _check_stop(value: Any, name: str) -> Any:
    return value if isinstance(value, str) else _STOP_LIST(value, name)


def _check_logit_bias(value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    return {token: _BIAS(bias, name) for token, bias in value.items()}


def _check_metadata(value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    if len(value) > 16:
        raise wrong_value(name, "at most 16 pairs", len(value))
    for key, each in value.items():
        if len(key) > 64:
            raise wrong_value(name, "keys of at most 64 characters", key)
        _METADATA(each, name)
    return value


def _check_function_call(value: Any, name: str) -> Any:
    return _FUNCTION_WORD(value, name) if isinstance(value, str) else _FUNCTION_NAMED(value, name)


_STOP_LIST: Final = ListOf(ANY_STRING, most=4)
_BIAS: Final = Number(-100, 100)
_METADATA: Final = String(most=512)
_FUNCTION_WORD: Final = OneOf(("none", "auto"))
_FUNCTION_NAMED: Final = ObjectOf({"name": _NOT_EMPTY}, ("name",))

#: What both routes for text have in common.
_TEXT_FIELDS: Final[dict[str, Check]] = {
    "model": _NOT_EMPTY,
    "stream": BOOLEAN,
    "stream_options": ObjectOf({"include_usage": BOOLEAN, "include_obfuscation": BOOLEAN}),
    "temperature": Number(0, 2),
    "top_p": Number(0, 1),
    "n": Integer(1, 128),
    "stop": Custom(_check_stop),
    "max_tokens": Integer(1),
    "presence_penalty": Number(-2, 2),
    "frequency_penalty": Number(-2, 2),
    "logit_bias": Custom(_check_logit_bias),
    "seed": _INT64,
    "user": ANY_STRING,
}

_CHAT: Final = Table(
    ("model", "messages"),
    {
        **_TEXT_FIELDS,
        "messages": MESSAGES,
        "max_completion_tokens": Integer(1),
        "logprobs": BOOLEAN,
        "top_logprobs": Integer(0, 20),
        "tools": TOOLS,
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": BOOLEAN,
        "functions": FUNCTIONS,
        "function_call": Custom(_check_function_call),
        "response_format": RESPONSE_FORMAT,
        # The words for these two are still growing; which of them a model knows is its own business.
        "reasoning_effort": ANY_STRING,
        "service_tier": ANY_STRING,
        "verbosity": OneOf(("low", "medium", "high")),
        "modalities": ListOf(OneOf(("text", "audio"))),
        "audio": ANY_OBJECT,
        "prediction": ANY_OBJECT,
        "web_search_options": ANY_OBJECT,
        "metadata": Custom(_check_metadata),
        "store": BOOLEAN,
        "prompt_cache_key": ANY_STRING,
        "safety_identifier": ANY_STRING,
    },
)


def _require_stream(known: Mapping[str, Any]) -> None:
    if "stream_options" in known and not known.get("stream", False):
        raise InvalidRequest(
            "'stream_options' is only allowed when 'stream' is true",
            param="stream_options",
            code="invalid_value",
        )


def read_chat(body: bytes, content_type: str, headers: Mapping[str, str]) -> ChatRequest:
    """Read a request to ``/v1/chat/completions``."""
    raw = _read_json(body, content_type)
    known = _CHAT.read(raw)
    _require_stream(known)
    if "top_logprobs" in known and not known.get("logprobs", False):
        raise InvalidRequest(
            "'top_logprobs' is only allowed when 'logprobs' is true",
            param="top_logprobs",
            code="invalid_value",
        )
    return ChatRequest(raw=raw, headers=headers, **known)


def _check_prompt(value: Any, name: str) -> str:
    """Take one text: a handler answers one prompt, and telling the client so beats answering a part."""
    if isinstance(value, list):
        if not value:
            raise wrong_value(name, "a string", value)
        if isinstance(value[0], int | list):
            raise InvalidRequest(
                f"'{name}' must be text: token ids are not supported", param=name, code="invalid_type"
            )
        if len(value) > 1:
            raise InvalidRequest(
                f"'{name}' must be a single prompt: send one request for each of several prompts",
                param=name,
                code="invalid_value",
            )
        value = value[0]
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    return value


_COMPLETION: Final = Table(
    ("model", "prompt"),
    {
        **_TEXT_FIELDS,
        "prompt": Custom(_check_prompt),
        "logprobs": Integer(0, 5),
        "best_of": Integer(1, 20),
        "echo": BOOLEAN,
        "suffix": ANY_STRING,
    },
)

#: How many tokens a completion has if the client does not say; the OpenAI reference's own default.
_COMPLETION_TOKENS: Final = 16


def read_completion(body: bytes, content_type: str, headers: Mapping[str, str]) -> ChatRequest:
    """Read a request to ``/v1/completions``: a chat of one message, for any chat model to answer.

    ``echo``, ``suffix`` and ``best_of`` are checked and stay in ``raw``; a number of ``logprobs`` becomes
    ``top_logprobs``.
    """
    raw = _read_json(body, content_type)
    known = _COMPLETION.read(raw)
    _require_stream(known)
    for name in ("best_of", "echo", "suffix"):
        known.pop(name, None)
    logprobs = known.pop("logprobs", None)
    if logprobs is not None:
        known |= {"logprobs": True, "top_logprobs": logprobs}
    known.setdefault("max_tokens", _COMPLETION_TOKENS)
    messages = [{"role": "user", "content": known["prompt"]}]
    return ChatRequest(messages=messages, raw=raw, headers=headers, **known)


# Embeddings

_TOKEN: Final = Integer(0, 2**63 - 1)
_TOKENS: Final = ListOf(_TOKEN, least=1)
_MOST_INPUTS: Final = 2048


def _check_input(value: Any, name: str) -> Any:
    """Return a list of texts or of lists of tokens, whichever of the four documented forms came."""
    if isinstance(value, str):
        return [_NOT_EMPTY(value, name)]
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array", value)
    if not value:
        raise InvalidRequest(
            f"Invalid value for '{name}': expected at least 1 input, but got 0",
            param=name,
            code="empty_array",
        )
    first = value[0]
    if isinstance(first, int):
        return [_TOKENS(value, name)]
    if not isinstance(first, str | list):
        raise wrong_type(f"{name}[0]", "a string, an integer or an array of integers", first)
    return (_TEXTS if isinstance(first, str) else _TOKEN_LISTS)(value, name)


_TEXTS: Final = ListOf(_NOT_EMPTY, most=_MOST_INPUTS)
_TOKEN_LISTS: Final = ListOf(_TOKENS, most=_MOST_INPUTS)

_EMBEDDING: Final = Table(
    ("model", "input"),
    {
        "model": _NOT_EMPTY,
        "input": Custom(_check_input),
        "dimensions": Integer(1),
        "encoding_format": OneOf(("float", "base64")),
        "user": ANY_STRING,
    },
)


def read_embedding(body: bytes, content_type: str, headers: Mapping[str, str]) -> EmbeddingRequest:
    """Read a request to ``/v1/embeddings``."""
    raw = _read_json(body, content_type)
    known = _EMBEDDING.read(raw)
    return EmbeddingRequest(inputs=known.pop("input"), raw=raw, headers=headers, **known)


# Audio


def _check_chunking(value: Any, name: str) -> Any:
    if value == "auto" or isinstance(value, dict):
        return value
    if isinstance(value, str) and value.startswith("{"):
        return ANY_OBJECT.from_text(value, name)
    raise wrong_value(name, "'auto' or an object", value)


_TRANSLATION_FIELDS: Final[dict[str, Check]] = {
    "model": _NOT_EMPTY,
    "prompt": ANY_STRING,
    "response_format": OneOf(("json", "text", "srt", "verbose_json", "vtt")),
    "temperature": Number(0, 1),
}
_TRANSLATION: Final = Table(("model",), _TRANSLATION_FIELDS)
_TRANSCRIPTION: Final = Table(
    ("model",),
    {
        **_TRANSLATION_FIELDS,
        "language": ANY_STRING,
        "timestamp_granularities": ListOf(OneOf(("word", "segment"))),
        "stream": BOOLEAN,
        "include": ListOf(ANY_STRING),
        "chunking_strategy": Custom(_check_chunking),
        "keywords": ListOf(ANY_STRING),
        "languages": ListOf(ANY_STRING),
    },
)

#: Formats that can be written before the whole text is known.
_STREAMABLE: Final = ("json", "text")


def _read_audio(
    table: Table, body: bytes, content_type: str, headers: Mapping[str, str], translate: bool
) -> ASRRequest:
    form = read_form(body, content_type)
    known = table.read_form(form.fields)
    files = form.files.pop("file", [])
    if not files:
        if "file" in form.fields:
            raise InvalidRequest("'file' must be an uploaded file with a file name, not text", param="file")
        raise missing("file")
    if len(files) > 1:
        raise InvalidRequest("'file' must be a single file", param="file")
    file = files[0]
    if not file.data:
        raise InvalidRequest("The uploaded file is empty", param="file")
    known_format = known.get("response_format", "json")
    if known.get("stream") and known_format not in _STREAMABLE:
        raise InvalidRequest(
            f"'stream' is not possible with the response format '{known_format}'",
            param="stream",
            code="invalid_value",
        )
    raw = form.fields | {name: [each.data for each in others] for name, others in form.files.items()}
    return ASRRequest(
        audio=file.data,
        filename=file.name,
        mime_type=file.mime_type,
        translate=translate,
        raw=raw,
        headers=headers,
        **known,
    )


def read_transcription(body: bytes, content_type: str, headers: Mapping[str, str]) -> ASRRequest:
    """Read a request to ``/v1/audio/transcriptions``."""
    return _read_audio(_TRANSCRIPTION, body, content_type, headers, False)


def read_translation(body: bytes, content_type: str, headers: Mapping[str, str]) -> ASRRequest:
    """Read a request to ``/v1/audio/translations``."""
    return _read_audio(_TRANSLATION, body, content_type, headers, True)


def _check_voice(value: Any, name: str) -> str:
    """Take the name of a voice, or the id out of a reference to a custom one."""
    if isinstance(value, dict):
        return _NOT_EMPTY(_VOICE(value, name)["id"], f"{name}.id")
    return _NOT_EMPTY(value, name)


_VOICE: Final = ObjectOf({"id": ANY_STRING}, ("id",))

_SPEECH: Final = Table(
    ("model", "input", "voice"),
    {
        "model": _NOT_EMPTY,
        "input": String(1, 4096),
        "voice": Custom(_check_voice),
        "response_format": OneOf(("mp3", "opus", "aac", "flac", "wav", "pcm")),
        "speed": Number(0.25, 4),
        "instructions": ANY_STRING,
        "stream_format": OneOf(("sse", "audio")),
    },
)


def read_speech(body: bytes, content_type: str, headers: Mapping[str, str]) -> TTSRequest:
    """Read a request to ``/v1/audio/speech``."""
    raw = _read_json(body, content_type)
    known = _SPEECH.read(raw)
    if known.get("stream_format") == "sse":
        raise InvalidRequest(
            "'stream_format' must be 'audio': audio in server-sent events is not supported",
            param="stream_format",
            code="unsupported_value",
        )
    return TTSRequest(raw=raw, headers=headers, **known)


# Images

_SIZE: Final = String(
    pattern=re.compile(r"auto|[1-9]\d{0,4}x[1-9]\d{0,4}", re.ASCII),
    form="'auto' or WIDTHxHEIGHT, for instance '1024x1024'",
)

_IMAGE: Final = Table(
    ("model", "prompt"),
    {
        "model": _NOT_EMPTY,
        "prompt": String(1, 32000),
        "n": Integer(1, 10),
        "size": _SIZE,
        "quality": OneOf(("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")),
        "response_format": OneOf(("url", "b64_json")),
        "style": OneOf(("vivid", "natural")),
        "background": OneOf(("transparent", "opaque", "auto")),
        "moderation": OneOf(("low", "auto")),
        "output_format": OneOf(("png", "webp", "jpeg", "gif", "svg")),
        "output_compression": Integer(0, 100),
        "partial_images": Integer(0, 3),
        "stream": BOOLEAN,
        "user": ANY_STRING,
    },
)


def read_image_generation(body: bytes, content_type: str, headers: Mapping[str, str]) -> ImageGenRequest:
    """Read a request to ``/v1/images/generations``."""
    raw = _read_json(body, content_type)
    known = _IMAGE.read(raw)
    if known.get("response_format") == "url":
        raise InvalidRequest(
            "'response_format' must be 'b64_json': images are not kept anywhere that a URL could point to",
            param="response_format",
            code="unsupported_value",
        )
    if known.pop("stream", False):
        raise InvalidRequest(
            "'stream' must be false: images are not streamed", param="stream", code="unsupported_value"
        )
    known.pop("partial_images", None)
    return ImageGenRequest(raw=raw, headers=headers, **known)
