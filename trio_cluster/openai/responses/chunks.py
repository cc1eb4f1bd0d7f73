"""The output of handlers: plain values, and :class:`OutputChunk` for what plain values cannot express.

:func:`to_chunk` is the one place that decides what a plain value means for a kind of model. Its errors are logged for
the author of the handler, so they name what the handler may give.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, get_args

import attrs

from trio_cluster.core.model import Kind
from trio_cluster.errors import ApiError

from ..json_values import dumps, plain
from .pcm import to_pcm16

__all__ = ["FinishReason", "OutputChunk", "PcmPiece", "doubles", "is_vector", "to_chunk"]

#: Why a model stopped: the values that the official clients know.
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]

_REASONS: Final = frozenset(get_args(FinishReason))

_ChunkKind: TypeAlias = Literal[
    "text_delta",
    "final_text",
    "reasoning",
    "tool_call",
    "embeddings",
    "scores",
    "audio",
    "pcm",
    "image",
    "partial_image",
    "data",
    "json",
    "error",
    "usage",
    "finish",
]


def _require(what: str, value: object, wanted: type | tuple[type, ...], expected: str) -> None:
    # In Python, a boolean is an integer. Where a count is expected, it is a mistake.
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is int):
        raise TypeError(f"{what} must be {expected}, not {type(value).__name__}")


def _count(what: str, value: object) -> None:
    _require(what, value, int, "an int")
    if value < 0:  # type: ignore[operator]
        raise ValueError(f"{what} must not be negative")


@attrs.frozen
class PcmPiece:
    """Samples of audio: 16-bit little-endian PCM."""

    data: bytes
    rate: int
    channels: int
    whole: bool


@attrs.frozen(eq=False)
class OutputChunk:
    """A piece of a model's output. To be made with the class methods, which check their arguments.

    Each class method raises ``TypeError`` for an argument of the wrong type and ``ValueError`` for a negative index or
    count; other errors are named there. A chunk that the kind of model cannot have is refused when it is encoded.
    """

    kind: _ChunkKind
    value: Any
    index: int | None = None
    """The choice or the input that the chunk belongs to, from 0; ``None``: the next one, or not applicable."""
    mime_type: str | None = None
    """The media type of a chunk of bytes, if the handler gave one."""

    @classmethod
    def text_delta(cls, text: str, index: int = 0) -> OutputChunk:
        """Return more text for a choice. The same as a plain ``str``, except for the index.

        Args:
            text: what is appended to the text of the choice.
            index: the choice.
        """
        _require("text", text, str, "a str")
        _count("index", index)
        return cls("text_delta", text, index)

    @classmethod
    def final_text(cls, text: str, index: int = 0) -> OutputChunk:
        """Return the whole text of a choice, which replaces the deltas. No more text may follow.

        In a plain answer, it is the text of the choice. A stream cannot take back what it has sent: if the text begins
        with the deltas, the rest of it is sent, and otherwise nothing.

        Args:
            text: the whole text.
            index: the choice.
        """
        _require("text", text, str, "a str")
        _count("index", index)
        return cls("final_text", text, index)

    @classmethod
    def reasoning(cls, text: str, index: int = 0) -> OutputChunk:
        """Return more of the reasoning that comes before the answer.

        Clients of ``/v1/chat/completions`` and ``/v1/completions`` get it as ``reasoning_content``, and clients of
        ``/v1/responses`` in items of type ``reasoning``.

        Args:
            text: what is appended to the reasoning of the choice.
            index: the choice.
        """
        _require("text", text, str, "a str")
        _count("index", index)
        return cls("reasoning", text, index)

    @classmethod
    def tool_call(
        cls,
        name: str,
        arguments: str | Mapping[str, Any],
        *,
        id: str | None = None,
        index: int | None = None,
        choice: int = 0,
    ) -> OutputChunk:
        """Return a call of one of the client's tools, or a piece of such a call.

        A choice with tool calls ends with ``tool_calls``, unless the handler gives another reason.

        Args:
            name: the tool.
            arguments: a ``dict``, or text that should be JSON. Text is passed on as the model wrote it.
            id: the name of the call, under which the client returns its result; ``None``: one is made up.
            index: ``None``: a new call, and complete. A call that is made piece by piece has an index from its first
                piece on: the arguments of a later chunk with the same index and name are appended. Clients get the
                calls numbered in the order in which they begin.
            choice: the choice that makes the call.

        Raises:
            ValueError: the name is empty, or a number in the arguments has no JSON form.
        """
        _require("name", name, str, "a str")
        if not name:
            raise ValueError("name must not be empty")
        _require("arguments", arguments, (str, dict), "a str or a dict")
        _require("id", id, (str, type(None)), "a str")
        if index is not None:
            _count("index", index)
        _count("choice", choice)
        text = arguments if isinstance(arguments, str) else dumps(plain(arguments)).decode()
        call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": text}}
        return cls("tool_call", call, choice)

    @classmethod
    def embedding(cls, vector: Any, index: int = 0) -> OutputChunk:
        """Return the embedding of one input.

        Args:
            vector: a list of numbers or a one-dimensional array; all vectors of an answer have one length.
            index: the input.
        """
        _count("index", index)
        if not is_vector(vector):
            raise TypeError("an embedding must be a list of numbers or a one-dimensional array")
        return cls("embeddings", [vector], index)

    @classmethod
    def embeddings(cls, vectors: Any) -> OutputChunk:
        """Return the embeddings of the next inputs.

        Args:
            vectors: a list of vectors or a two-dimensional array, one row for each input.
        """
        rows = _rows(vectors)
        if rows is None:
            raise TypeError("embeddings must be a list of vectors or a two-dimensional array")
        return cls("embeddings", rows)

    @classmethod
    def scores(cls, scores: Any) -> OutputChunk:
        """Return how well the next documents answer the query.

        Args:
            scores: a list of numbers or a one-dimensional array, one for each document. Higher is better.
        """
        if not is_vector(scores):
            raise TypeError("scores must be a list of numbers or a one-dimensional array")
        return cls("scores", scores)

    @classmethod
    def audio(cls, data: bytes, mime_type: str | None = None) -> OutputChunk:
        """Return more audio.

        Args:
            data: bytes that are appended to the audio.
            mime_type: in the first chunk, the content type of the answer; ``None``: the type that the first bytes have,
                if it is recognised, or else the format that the client asked for.
        """
        return cls._of_bytes("audio", data, mime_type)

    @classmethod
    def pcm(cls, samples: Any, sample_rate: int, channels: int = 1, *, whole: bool = False) -> OutputChunk:
        """Return more audio, as samples. The answer is a WAV file, or raw samples for a client that asked for ``pcm``.

        The first chunk of an answer decides its header; all chunks must have the same rate and channels. Formats that
        would have to be encoded, such as ``mp3``, are answered with a WAV file, whose content type says so.

        Args:
            samples: ``bytes`` of 16-bit little-endian PCM, or numbers: a list or an array. Integers are 16-bit samples,
                other numbers are from -1 to 1; larger ones are clipped. With several channels, the samples of all
                channels in turn, or an array of the shape (frames, channels).
            sample_rate: samples per second and channel, 1 to 4294967.
            channels: how many channels there are, 1 to 64.
            whole: these are all samples of the answer, so the header of the WAV file has its exact lengths. Otherwise
                more may follow, and the lengths are the largest possible, as in every stream: players then read on to
                the end.

        Raises:
            ValueError: the rate or the channels are out of range, or the last frame is not complete.
        """
        for name, number, most in (("sample_rate", sample_rate, 4_294_967), ("channels", channels, 64)):
            _require(name, number, int, "an int")
            if not 1 <= number <= most:
                raise ValueError(f"{name} must be from 1 to {most}, not {number}")
        return cls("pcm", PcmPiece(to_pcm16(samples, channels), sample_rate, channels, whole))

    @classmethod
    def image(cls, data: bytes, mime_type: str | None = None) -> OutputChunk:
        """Return one image.

        Args:
            data: the bytes of the image's file.
            mime_type: its type; ``None``: the type that its first bytes have, if it is recognised.
        """
        return cls._of_bytes("image", data, mime_type)

    @classmethod
    def partial_image(cls, data: bytes, mime_type: str | None = None) -> OutputChunk:
        """Return a preview of the final image, for clients that want to see previews in a stream.

        ``partial_images`` of the request is the number that the client wants. Those beyond it are dropped, and so are
        all of them if the answer is not a stream.

        Args:
            data: the bytes of the image's file.
            mime_type: as for :meth:`image`.
        """
        return cls._of_bytes("partial_image", data, mime_type)

    @classmethod
    def data(cls, data: bytes, mime_type: str | None = None) -> OutputChunk:
        """Return more of the answer to a custom route, byte for byte.

        Args:
            data: bytes that are appended to the answer.
            mime_type: in the first chunk, the content type of the answer; ``None``: ``application/octet-stream``.
        """
        return cls._of_bytes("data", data, mime_type)

    @classmethod
    def _of_bytes(cls, kind: _ChunkKind, data: bytes, mime_type: str | None) -> OutputChunk:
        _require("data", data, (bytes, bytearray, memoryview), "bytes")
        _require("mime_type", mime_type, (str, type(None)), "a str")
        return cls(kind, bytes(data), None, mime_type)

    @classmethod
    def json(cls, obj: Mapping[str, Any]) -> OutputChunk:
        """Return a JSON object to be merged into the answer. The same as a plain ``dict``.

        Args:
            obj: a ``dict`` of JSON types, arrays and numbers of array libraries. What its members mean depends on the
                kind of model.
        """
        _require("obj", obj, dict, "a dict")
        return cls("json", obj)

    @classmethod
    def error(cls, code: str, message: str, status: int = 500) -> OutputChunk:
        """Return a failure: the client gets this error, as if the handler had raised ``ApiError``.

        Args:
            code: the ``code`` of the error.
            message: its ``message``.
            status: the HTTP status, 400 to 599.

        Raises:
            ValueError: ``status`` is not between 400 and 599.
        """
        _require("code", code, (str, type(None)), "a str")
        _require("message", message, str, "a str")
        _require("status", status, int, "an int")
        # Made here only to check the status: a wrong one fails in the handler. The encoder raises another one.
        ApiError(status, message, code=code)
        return cls("error", (status, message, code))

    @classmethod
    def usage(cls, prompt_tokens: int, completion_tokens: int = 0) -> OutputChunk:
        """Return how many tokens were read and written for the whole answer; the last report counts.

        Args:
            prompt_tokens: tokens read.
            completion_tokens: tokens written.
        """
        _count("prompt_tokens", prompt_tokens)
        _count("completion_tokens", completion_tokens)
        return cls("usage", (prompt_tokens, completion_tokens))

    @classmethod
    def finish(cls, reason: FinishReason, index: int = 0) -> OutputChunk:
        """Return the end of a choice. Without one, a choice ends with ``stop``.

        Args:
            reason: why it ends.
            index: the choice.

        Raises:
            ValueError: ``reason`` is not one that the OpenAI API has.
        """
        if reason not in _REASONS:
            raise ValueError(f"a finish reason is one of {', '.join(sorted(_REASONS))}, not {reason!r}")
        _count("index", index)
        return cls("finish", reason, index)


def _dimensions(value: Any) -> int | None:
    """Return how many dimensions an array of any library has; ``None`` if it is no array."""
    dimensions = getattr(value, "ndim", None)
    return dimensions if isinstance(dimensions, int) and hasattr(value, "tolist") else None


def is_vector(value: Any) -> bool:
    """Return whether ``value`` is a vector, judged by its first item; encoding checks all of them."""
    dimensions = _dimensions(value)
    if dimensions is not None:
        return dimensions == 1
    if not isinstance(value, list | tuple | array) or not value:
        return False
    first = value[0]
    return not isinstance(first, bool | str) and (
        isinstance(first, int | float) or (_dimensions(first) == 0 and hasattr(first, "__float__"))
    )


def doubles(value: Any, what: str) -> array[float]:
    """Return the numbers of a list, or of an array of any library.

    Args:
        value: the list or array.
        what: how the message of the error begins.

    Raises:
        TypeError: there is anything but numbers in it.
    """
    tolist = getattr(value, "tolist", None)
    try:
        return array("d", value if tolist is None else tolist())
    except TypeError as exc:
        raise TypeError(f"{what}: {exc}") from None


def _rows(value: Any) -> list[Any] | None:
    if _dimensions(value) == 2 or (isinstance(value, list | tuple) and value and all(map(is_vector, value))):
        return list(value)
    return None


_EXPECTED: Final[dict[Kind, str]] = {
    "chat": "str, dict or OutputChunk",
    "embedding": "a list of floats or a 1-D array, several of them, dict or OutputChunk",
    "asr": "str, dict or OutputChunk",
    "tts": "bytes or OutputChunk",
    "image_generation": "bytes, a list of bytes, dict or OutputChunk",
    "image_edit": "bytes, a list of bytes, dict or OutputChunk",
    "rerank": "numbers, a list or a 1-D array of them, dict or OutputChunk",
    "moderation": "dict, a list of dicts or OutputChunk",
    "custom": "str, dict, bytes or OutputChunk",
}

#: The kinds of models of which a ``str`` is text.
_TEXT: Final[tuple[Kind, ...]] = ("chat", "asr", "custom")
#: What bytes are for a kind of model.
_BYTES: Final[dict[Kind, _ChunkKind]] = {
    "tts": "audio",
    "image_generation": "image",
    "image_edit": "image",
    "custom": "data",
}


def to_chunk(kind: Kind, value: Any) -> OutputChunk:
    """Return what a handler's value means for a model of this kind.

    Raises:
        TypeError: a handler of this kind cannot give it.
    """
    if isinstance(value, OutputChunk):
        return value
    chunk: OutputChunk | None = None
    if isinstance(value, dict):
        chunk = None if kind == "tts" else OutputChunk("json", value)
    elif isinstance(value, str):
        chunk = OutputChunk("text_delta", value, 0) if kind in _TEXT else None
    elif isinstance(value, bytes | bytearray | memoryview):
        chunk = OutputChunk(_BYTES[kind], bytes(value)) if kind in _BYTES else None
    elif kind in ("embedding", "rerank"):
        chunk = _of_numbers(kind, value)
    if chunk is None:
        raise TypeError(
            f"a handler of kind {kind} gives {_EXPECTED[kind]}; it gave a value of type {type(value).__name__}"
        )
    return chunk


def _of_numbers(kind: Kind, value: Any) -> OutputChunk | None:
    """Return what a number, a vector or several vectors mean; ``None`` if it is none of these."""
    if kind == "embedding":
        rows = [value] if is_vector(value) else _rows(value)
        return None if rows is None else OutputChunk("embeddings", rows)
    if is_vector(value):
        return OutputChunk("scores", value)
    return OutputChunk("scores", [value]) if is_vector([value]) else None
