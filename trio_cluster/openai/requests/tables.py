"""The documented fields of the routes: one table for each, from which requests are checked, converted and described."""

from __future__ import annotations

import re
from typing import Any, Final

from .checks import (
    ANY_OBJECT,
    ANY_STRING,
    BOOLEAN,
    NOT_EMPTY,
    Check,
    Custom,
    Integer,
    ListOf,
    Number,
    ObjectOf,
    OneOf,
    String,
    nothing_in,
    shown_name,
    wrong_type,
    wrong_value,
)
from .conversation import FUNCTIONS, MESSAGES, RESPONSE_FORMAT, TOOL_CHOICE, TOOLS
from .fields import OnlyIf, Table, Uploads
from .schemas import any_of

__all__ = [
    "CHAT",
    "COMPLETION",
    "EMBEDDING",
    "IMAGE_EDIT",
    "IMAGE_GENERATION",
    "METADATA",
    "SPEECH",
    "TRANSCRIPTION",
    "TRANSLATION",
]

_INT64: Final = Integer(-(2**63), 2**63 - 1)


# Chat and completions

#: The OpenAI API takes four; servers of this field take more, and so do many models.
_STOP_LIST: Final = ListOf(ANY_STRING)
_BIAS: Final = Number(-100, 100)
_METADATA: Final = String(most=512)
_MOST_METADATA: Final = 16
_LONGEST_KEY: Final = 64
_FUNCTION_WORD: Final = OneOf(("none", "auto"))
_FUNCTION_NAMED: Final = ObjectOf({"name": NOT_EMPTY}, ("name",))


def _check_stop(value: Any, name: str) -> None:
    if not isinstance(value, str):
        _STOP_LIST(value, name)


def _check_logit_bias(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    for token, bias in value.items():
        _BIAS(bias, f"{name}.{shown_name(token)}")


def _convert_logit_bias(value: dict[str, Any]) -> dict[str, float]:
    return {token: float(bias) for token, bias in value.items()}


def _check_metadata(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    if len(value) > _MOST_METADATA:
        raise wrong_value(name, f"at most {_MOST_METADATA} pairs", len(value))
    for key, each in value.items():
        if len(key) > _LONGEST_KEY:
            raise wrong_value(name, f"keys of at most {_LONGEST_KEY} characters", key)
        if each is None:
            raise wrong_type(f"{name}.{shown_name(key)}", "a string", each)
        _METADATA(each, f"{name}.{shown_name(key)}")


def _check_function_call(value: Any, name: str) -> None:
    (_FUNCTION_WORD if isinstance(value, str) else _FUNCTION_NAMED)(value, name)


#: Up to 16 pairs of text that a client may attach to a request.
METADATA: Final = Custom(
    _check_metadata,
    {
        "type": "object",
        "additionalProperties": _METADATA.schema(),
        "propertyNames": {"maxLength": _LONGEST_KEY},
        "maxProperties": _MOST_METADATA,
    },
)

#: The fields that both routes for text have.
_TEXT_FIELDS: Final[dict[str, Check]] = {
    "model": NOT_EMPTY,
    "stream": BOOLEAN,
    "stream_options": ObjectOf({"include_usage": BOOLEAN, "include_obfuscation": BOOLEAN}),
    "temperature": Number(0, 2),
    "top_p": Number(0, 1),
    "n": Integer(1, 128),
    "stop": Custom(_check_stop, any_of(ANY_STRING.schema(), _STOP_LIST.schema())),
    "max_tokens": Integer(1),
    "presence_penalty": Number(-2, 2),
    "frequency_penalty": Number(-2, 2),
    "logit_bias": Custom(
        _check_logit_bias, {"type": "object", "additionalProperties": _BIAS.schema()}, _convert_logit_bias
    ),
    "seed": _INT64,
    "user": ANY_STRING,
}
_OPTIONS_OF_STREAMS: Final = OnlyIf("stream_options", "stream", (True,))

CHAT: Final = Table(
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
        "function_call": Custom(
            _check_function_call, any_of(_FUNCTION_WORD.schema(), _FUNCTION_NAMED.schema())
        ),
        "response_format": RESPONSE_FORMAT,
        # The API keeps adding words for these two. Which of them a model knows is left to its handler.
        "reasoning_effort": ANY_STRING,
        "service_tier": ANY_STRING,
        "verbosity": OneOf(("low", "medium", "high")),
        "modalities": ListOf(OneOf(("text", "audio"))),
        "audio": ANY_OBJECT,
        "prediction": ANY_OBJECT,
        "web_search_options": ANY_OBJECT,
        "metadata": METADATA,
        "store": BOOLEAN,
        "prompt_cache_key": ANY_STRING,
        "safety_identifier": ANY_STRING,
    },
    rules=(_OPTIONS_OF_STREAMS, OnlyIf("top_logprobs", "logprobs", (True,))),
)


#: Prompts of one request; they are answered one after the other.
_MOST_PROMPTS: Final = 1024
_TOKENS: Final = ListOf(Integer(0, 2**63 - 1), least=1)
_PROMPTS: Final = ListOf(ANY_STRING, least=1, most=_MOST_PROMPTS)
_TOKEN_PROMPTS: Final = ListOf(_TOKENS, least=1, most=_MOST_PROMPTS)


def _check_prompt(value: Any, name: str) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array", value)
    if not value:
        raise nothing_in(name, "prompt")
    first = value[0]
    if type(first) is int:
        _TOKENS(value, name)
    else:
        (_TOKEN_PROMPTS if isinstance(first, list) else _PROMPTS)(value, name)


def _convert_prompt(value: Any) -> list[Any]:
    """Return a list of texts or of lists of tokens, whichever of the four documented forms came."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value


COMPLETION: Final = Table(
    ("model", "prompt"),
    {
        **_TEXT_FIELDS,
        "prompt": Custom(
            _check_prompt,
            any_of(*(each.schema() for each in (ANY_STRING, _PROMPTS, _TOKENS, _TOKEN_PROMPTS))),
            _convert_prompt,
        ),
        "logprobs": Integer(0, 5),
        "best_of": Integer(1, 20),
        "max_tokens": Integer(0),
        "echo": BOOLEAN,
        "suffix": ANY_STRING,
    },
    # Handlers give only what they have generated.
    rules=(
        _OPTIONS_OF_STREAMS,
        OnlyIf(
            "logprobs",
            "echo",
            (False,),
            by_default=True,
            why="the log probabilities of the prompt are not available",
        ),
    ),
)


# Embeddings

_MOST_INPUTS: Final = 2048
_TEXTS: Final = ListOf(NOT_EMPTY, least=1, most=_MOST_INPUTS)
_TOKEN_LISTS: Final = ListOf(_TOKENS, least=1, most=_MOST_INPUTS)


def _check_input(value: Any, name: str) -> None:
    if isinstance(value, str):
        NOT_EMPTY(value, name)
        return
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array", value)
    if not value:
        raise nothing_in(name, "input")
    first = value[0]
    if isinstance(first, int):
        _TOKENS(value, name)
    elif isinstance(first, str | list):
        (_TEXTS if isinstance(first, str) else _TOKEN_LISTS)(value, name)
    else:
        raise wrong_type(f"{name}[0]", "a string, an integer or an array of integers", first)


def _convert_input(value: Any) -> list[Any]:
    """Return a list of texts or of lists of tokens, whichever of the four documented forms came."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value


EMBEDDING: Final = Table(
    ("model", "input"),
    {
        "model": NOT_EMPTY,
        "input": Custom(
            _check_input,
            any_of(*(each.schema() for each in (NOT_EMPTY, _TEXTS, _TOKENS, _TOKEN_LISTS))),
            _convert_input,
        ),
        "dimensions": Integer(1),
        "encoding_format": OneOf(("float", "base64")),
        "user": ANY_STRING,
    },
)


# Audio


class _Chunking(Check):
    """``auto``, or an object; in a form, the object is JSON text."""

    def __call__(self, value: Any, name: str) -> Any:
        if value == "auto" or isinstance(value, dict):
            return value
        raise wrong_value(name, "'auto' or an object", value)

    def from_text(self, text: str, name: str) -> Any:
        return ANY_OBJECT.from_text(text, name) if text.startswith("{") else self(text, name)

    def convert_text(self, text: str) -> Any:
        return ANY_OBJECT.convert_text(text) if text.startswith("{") else text

    def schema(self) -> dict[str, Any]:
        return any_of(OneOf(("auto",)).schema(), ANY_OBJECT.schema())


_FILE: Final = {"file": Uploads()}
_TRANSLATION_FIELDS: Final[dict[str, Check]] = {
    "model": NOT_EMPTY,
    "prompt": ANY_STRING,
    "response_format": OneOf(("json", "text", "srt", "verbose_json", "vtt")),
    "temperature": Number(0, 1),
}
TRANSLATION: Final = Table(("model",), _TRANSLATION_FIELDS, files=_FILE)
TRANSCRIPTION: Final = Table(
    ("model",),
    {
        **_TRANSLATION_FIELDS,
        "response_format": OneOf(("json", "text", "srt", "verbose_json", "vtt", "diarized_json")),
        "language": ANY_STRING,
        "timestamp_granularities": ListOf(OneOf(("word", "segment"))),
        "stream": BOOLEAN,
        "include": ListOf(ANY_STRING),
        "chunking_strategy": _Chunking(),
        "known_speaker_names": ListOf(ANY_STRING),
        "known_speaker_references": ListOf(ANY_STRING),
        "keywords": ListOf(ANY_STRING),
        "languages": ListOf(ANY_STRING),
    },
    # An answer in another format can only be written when the whole text is known.
    rules=(OnlyIf("stream", "response_format", ("json", "text", "diarized_json"), by_default=True),),
    files=_FILE,
)

_VOICE: Final = ObjectOf({"id": NOT_EMPTY}, ("id",))


def _check_voice(value: Any, name: str) -> None:
    (_VOICE if isinstance(value, dict) else NOT_EMPTY)(value, name)


def _convert_voice(value: str | dict[str, str]) -> str:
    """Return the name of a voice, or the id out of a reference to a custom one."""
    return value["id"] if isinstance(value, dict) else value


SPEECH: Final = Table(
    ("model", "input", "voice"),
    {
        "model": NOT_EMPTY,
        "input": String(1, 4096),
        "voice": Custom(_check_voice, any_of(NOT_EMPTY.schema(), _VOICE.schema()), _convert_voice),
        "response_format": OneOf(("mp3", "opus", "aac", "flac", "wav", "pcm")),
        "speed": Number(0.25, 4),
        "instructions": ANY_STRING,
        "stream_format": OneOf(("audio", "sse")),
    },
)


# Images

_SIZE: Final = String(
    pattern=re.compile(r"auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4}"),
    form="'auto' or WIDTHxHEIGHT, for instance '1024x1024'",
)


#: The fields that both routes for images have.
_IMAGE_FIELDS: Final[dict[str, Check]] = {
    "model": NOT_EMPTY,
    "prompt": String(1, 32000),
    "n": Integer(1, 10),
    "size": _SIZE,
    "quality": OneOf(("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")),
    "response_format": OneOf(
        ("b64_json",), {"url": "images are not kept anywhere that a URL could point to"}
    ),
    "background": OneOf(("transparent", "opaque", "auto")),
    "output_format": OneOf(("png", "webp", "jpeg", "gif", "svg")),
    "output_compression": Integer(0, 100),
    "stream": BOOLEAN,
    "partial_images": Integer(0, 3),
    "user": ANY_STRING,
}
#: The events of a stream have no member for which of several images they are about.
_STREAMED_ALONE: Final = OnlyIf("stream", "n", (1,), by_default=True)

IMAGE_GENERATION: Final = Table(
    ("model", "prompt"),
    {
        **_IMAGE_FIELDS,
        "style": OneOf(("vivid", "natural")),
        "moderation": OneOf(("low", "auto")),
    },
    rules=(_STREAMED_ALONE,),
)
IMAGE_EDIT: Final = Table(
    ("model", "prompt"),
    {**_IMAGE_FIELDS, "input_fidelity": OneOf(("high", "low"))},
    rules=(_STREAMED_ALONE,),
    files={"image": Uploads(most=16), "mask": Uploads(least=0)},
)
