"""What a handler gives: plain values, and :class:`OutputChunk` for what plain values cannot say.

:func:`to_chunk` is the one place that says what a plain value means for a kind of model. Its errors end up in
the log of whoever wrote the handler, so they say what would have been right.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, get_args

import attrs

from trio_cluster.core.model import Kind
from trio_cluster.errors import ApiError

from ..json_values import dumps, plain

__all__ = ["FinishReason", "OutputChunk", "doubles", "is_vector", "to_chunk"]

#: Why a model stopped; the words that the official clients know.
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
    "image",
    "partial_image",
    "data",
    "json",
    "error",
    "usage",
    "finish",
]


def _require(what: str, value: object, wanted: type | tuple[type, ...], expected: str) -> None:
    # A boolean passes for an integer in Python; nobody means it to.
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is int):
        raise TypeError(f"{what} must be {expected}, not {type(value).__name__}")


def _count(what: str, value: object) -> None:
    _require(what, value, int, "an int")
    if value < 0:  # type: ignore[operator]
        raise ValueError(f"{what} must not be negative")


@attrs.frozen(eq=False)
class OutputChunk:
    """A piece of a model's output. Made by the class methods, which check what they are given."""

    kind: _ChunkKind
    value: Any
    index: int | None = None
    """Which choice or which input this belongs to; ``None`` where that means nothing, or just the next."""
    mime_type: str | None = None

    @classmethod
    def text_delta(cls, text: str, index: int = 0) -> OutputChunk:
        """Return more text for choice ``index``. The same as giving a plain ``str``, except for the index."""
        _require("text", text, str, "a str")
        _count("index", index)
        return cls("text_delta", text, index)

    @classmethod
    def final_text(cls, text: str, index: int = 0) -> OutputChunk:
        """Return the authoritative whole text of choice ``index``.

        A plain answer consists of it, whatever deltas came before. In a stream, where what is sent is sent,
        that part of it follows which extends the deltas; if it does not extend them, nothing does.
        """
        _require("text", text, str, "a str")
        _count("index", index)
        return cls("final_text", text, index)

    @classmethod
    def reasoning(cls, text: str, index: int = 0) -> OutputChunk:
        """Return more of what the model thinks before it answers, for choice ``index``.

        Clients of ``/v1/chat/completions`` and ``/v1/completions`` find it as ``reasoning_content``, those of
        ``/v1/responses`` in items of type ``reasoning``.
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
        """Return a call of one of the client's tools.

        A choice with tool calls ends with ``tool_calls``, unless the handler gives another reason.

        Args:
            name: which tool.
            arguments: a ``dict``, or text that is meant to be JSON, which is passed on as the model wrote it.
            id: what the client is going to call it when it comes back with the result; made up if ``None``.
            index: ``None`` is a call of its own, and complete. A call that is made piece by piece has an index from
                the start: text that is given again under the same index, with the same name, is added to its
                arguments. Clients see the calls numbered in the order in which they begin.
            choice: which of several choices makes it.

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
        """Return the embedding of input ``index``: a list of numbers or a one-dimensional array."""
        _count("index", index)
        if not is_vector(vector):
            raise TypeError("an embedding must be a list of numbers or a one-dimensional array")
        return cls("embeddings", [vector], index)

    @classmethod
    def embeddings(cls, vectors: Any) -> OutputChunk:
        """Return the embeddings of the next inputs: a list of vectors or a two-dimensional array."""
        rows = _rows(vectors)
        if rows is None:
            raise TypeError("embeddings must be a list of vectors or a two-dimensional array")
        return cls("embeddings", rows)

    @classmethod
    def scores(cls, scores: Any) -> OutputChunk:
        """Return how well the next documents answer the query: a list of numbers or a one-dimensional array."""
        if not is_vector(scores):
            raise TypeError("scores must be a list of numbers or a one-dimensional array")
        return cls("scores", scores)

    @classmethod
    def audio(cls, data: bytes, mime_type: str | None = None) -> OutputChunk:
        """Return more audio.

        ``mime_type`` of the first chunk becomes the content type of the answer. Without it, a header that can
        be recognised decides, and otherwise the format that the client asked for.
        """
        return cls._of_bytes("audio", data, mime_type)

    @classmethod
    def image(cls, data: bytes, mime_type: str | None = None) -> OutputChunk:
        """Return one image: the bytes of its file, which also say what it is if ``mime_type`` does not."""
        return cls._of_bytes("image", data, mime_type)

    @classmethod
    def partial_image(cls, data: bytes, mime_type: str | None = None) -> OutputChunk:
        """Return an image on the way to the final one, for streams whose clients want to see it.

        How many they want is ``partial_images`` of the request. Those beyond that are dropped, as are all of them where
        the answer is not a stream.
        """
        return cls._of_bytes("partial_image", data, mime_type)

    @classmethod
    def data(cls, data: bytes, mime_type: str | None = None) -> OutputChunk:
        """Return more of the answer to a route of one's own, byte for byte; ``mime_type`` becomes its content type."""
        return cls._of_bytes("data", data, mime_type)

    @classmethod
    def _of_bytes(cls, kind: _ChunkKind, data: bytes, mime_type: str | None) -> OutputChunk:
        _require("data", data, (bytes, bytearray, memoryview), "bytes")
        _require("mime_type", mime_type, (str, type(None)), "a str")
        return cls(kind, bytes(data), None, mime_type)

    @classmethod
    def json(cls, obj: Mapping[str, Any]) -> OutputChunk:
        """Return a JSON object to be merged into the answer. The same as giving a plain ``dict``."""
        _require("obj", obj, dict, "a dict")
        return cls("json", obj)

    @classmethod
    def error(cls, code: str, message: str, status: int = 500) -> OutputChunk:
        """Return a failure: the client gets exactly this, as if the handler had raised ``ApiError``.

        Raises:
            ValueError: ``status`` is not between 400 and 599.
        """
        _require("code", code, (str, type(None)), "a str")
        _require("message", message, str, "a str")
        _require("status", status, int, "an int")
        # Made once here, so that a wrong status fails where it was written; raised anew for every request.
        ApiError(status, message, code=code)
        return cls("error", (status, message, code))

    @classmethod
    def usage(cls, prompt_tokens: int, completion_tokens: int = 0) -> OutputChunk:
        """Return how many tokens were read and written, for the whole answer; the last report counts."""
        _count("prompt_tokens", prompt_tokens)
        _count("completion_tokens", completion_tokens)
        return cls("usage", (prompt_tokens, completion_tokens))

    @classmethod
    def finish(cls, reason: FinishReason, index: int = 0) -> OutputChunk:
        """Return why choice ``index`` ends here. A choice that never says so ends with ``stop``.

        Raises:
            ValueError: ``reason`` is not one that clients know.
        """
        if reason not in _REASONS:
            raise ValueError(f"a finish reason is one of {', '.join(sorted(_REASONS))}, not {reason!r}")
        _count("index", index)
        return cls("finish", reason, index)


def _dimensions(value: Any) -> int | None:
    """Return how many dimensions an array of whatever library has; ``None`` if it is no array."""
    dimensions = getattr(value, "ndim", None)
    return dimensions if isinstance(dimensions, int) and hasattr(value, "tolist") else None


def is_vector(value: Any) -> bool:
    """Whether ``value`` looks like one embedding, by its first item; encoding checks them all."""
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
    """Return the numbers of a list, or of an array of whatever library.

    Raises:
        TypeError: there is something else in it; ``what`` begins the message.
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


#: What bytes are.
_BYTES: Final[dict[Kind, _ChunkKind]] = {
    "tts": "audio",
    "image_generation": "image",
    "image_edit": "image",
    "custom": "data",
}


def to_chunk(kind: Kind, value: Any) -> OutputChunk:
    """Return what a handler's value means for a model of this kind.

    Raises:
        TypeError: it means nothing.
    """
    if isinstance(value, OutputChunk):
        return value
    if isinstance(value, dict) and kind != "tts":
        return OutputChunk("json", value)
    if isinstance(value, str) and kind in ("chat", "asr", "custom"):
        return OutputChunk("text_delta", value, 0)
    if isinstance(value, bytes | bytearray | memoryview):
        if kind in _BYTES:
            return OutputChunk(_BYTES[kind], bytes(value))
    elif kind == "embedding":
        if is_vector(value):
            return OutputChunk("embeddings", [value])
        rows = _rows(value)
        if rows is not None:
            return OutputChunk("embeddings", rows)
    elif kind == "rerank":
        if is_vector(value):
            return OutputChunk("scores", value)
        if is_vector([value]):
            return OutputChunk("scores", [value])
    raise TypeError(
        f"a handler of kind {kind} gives {_EXPECTED[kind]}; it gave a value of type {type(value).__name__}"
    )
