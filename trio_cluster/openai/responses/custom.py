"""Answers to custom routes, which the OpenAI API does not have.

The first output of the handler decides what the answer is:

- objects are merged into one JSON object, and texts are joined to one text. A client that sends ``"stream": true``
  gets each of them as a separate event, and ``[DONE]`` at the end;
- bytes are sent as they come, whether the client wants a stream or not.

A handler that gives nothing answers with an empty object.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

from trio_cluster.core.answer import Head
from trio_cluster.core.model import Kind

from ..json_values import dumps, plain
from ..requests.types import CustomRequest
from ..sse import DONE, event
from .chunks import OutputChunk
from .encoder import JSON_HEAD, SSE_HEAD, Encoder

__all__ = ["CustomEncoder"]

_TEXT_HEAD: Final = Head(200, "text/plain; charset=utf-8")
_BYTES: Final = "application/octet-stream"


class CustomEncoder(Encoder):
    """The answer to a request to a custom route. All values must be of one sort: objects, texts, or bytes.

    In a stream of events, objects and texts may be mixed.
    """

    kind: ClassVar[Kind] = "custom"

    def __init__(self, request: CustomRequest) -> None:
        super().__init__()
        self._events = request.stream
        # The first value decides what the answer is. There is no head to send before that.
        self.streaming = True
        self.head = SSE_HEAD if request.stream else JSON_HEAD
        self._sort: Literal["", "objects", "text", "bytes"] = ""
        self._object: dict[str, Any] = {}
        self._texts: list[str] = []

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind == "json":
            self._require("objects")
            value = plain(chunk.value)
            if self._events:
                return event(dumps(value))
            self._object |= value
        elif chunk.kind == "text_delta":
            self._require("text")
            if self._events:
                return event(dumps({"text": chunk.value}))
            self._texts.append(chunk.value)
        elif chunk.kind in ("data", "audio", "image"):
            if not self._sort:
                self.head = Head(200, chunk.mime_type or _BYTES)
            self._require("bytes")
            return bytes(chunk.value)
        else:
            self._refuse(chunk)
        return b""

    def _require(self, sort: Literal["objects", "text", "bytes"]) -> None:
        """Note the sort of a value.

        Raises:
            TypeError: the answer has values of another sort, which cannot be mixed with it.
        """
        earlier = self._sort
        if earlier and earlier != sort and not (self._events and "bytes" not in (earlier, sort)):
            raise TypeError(f"an answer of {earlier} cannot go on with {sort}")
        self._sort = sort
        if sort != "bytes" and not self._events:
            self.streaming = False
            self.head = _TEXT_HEAD if sort == "text" else JSON_HEAD

    def finish(self) -> bytes:
        # The head is sent now at the latest, even if there are no bytes, as it is with a plain answer.
        self.streaming = False
        if self._sort == "bytes":
            return b""
        if self._events:
            return DONE
        return "".join(self._texts).encode() if self._sort == "text" else dumps(self._object)
