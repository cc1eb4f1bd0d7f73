"""Routes that the OpenAI API does not have, answered by handlers that know what they are for.

The request is JSON or a form and names its model, and everything else is the handler's business. So is the answer, and
what the handler gives first decides what it is:

- objects are put together to one JSON object, and text to one text. A client that sends ``"stream": true`` gets each
  of them as an event of its own, and ``[DONE]`` at the end;
- bytes are sent as they come, whether the client wants a stream or not.

A handler that gives nothing answers with an empty object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from trio_cluster.core.answer import Head
from trio_cluster.core.model import Kind
from trio_cluster.errors import InvalidRequest

from .json_values import dumps, plain
from .requests.checks import missing, wrong_type
from .requests.forms import is_form, read_form
from .requests.readers import read_json
from .requests.types import CustomRequest
from .responses.chunks import OutputChunk
from .responses.encoder import JSON_HEAD, SSE_HEAD, Encoder
from .sse import DONE, event

__all__ = ["CustomEncoder", "checked_path", "read_custom"]

_TEXT_HEAD: Final = Head(200, "text/plain; charset=utf-8")
_BYTES: Final = "application/octet-stream"

#: Characters of a path; it is announced to the master and stands in logs.
_LONGEST_PATH: Final = 256


def checked_path(path: str) -> str:
    """Return the path of a route of its own in the form in which it is known everywhere.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(path, str) or not path.isascii() or not path.isprintable() or len(path) > _LONGEST_PATH:
        raise ValueError(
            f"the path of a route is at most {_LONGEST_PATH} ASCII characters, which {path!r} is not"
        )
    whole = path.rstrip("/")
    if not whole.startswith("/v1/") or "//" in whole:
        raise ValueError(
            f"the path of a route begins with /v1/, and none of its parts is empty; not so {path!r}"
        )
    if any(mark in whole for mark in "?#% "):
        raise ValueError(f"the path of a route has neither a query nor escapes; {path!r} has")
    return whole


def read_custom(body: bytes, content_type: str, headers: Mapping[str, str], path: str) -> CustomRequest:
    """Read a request to a route of its own.

    Raises:
        InvalidRequest: it is neither JSON nor a form, or names no model.
    """
    files: dict[str, list[bytes]] = {}
    if is_form(content_type):
        form = read_form(body, content_type)
        raw = form.fields
        files = {name: [file.data for file in some] for name, some in form.files.items()}
        stream = raw.get("stream") in ("true", "True", "1")
    else:
        raw = read_json(body, content_type)
        stream = raw.get("stream") is True
    model = raw.get("model")
    if model is None:
        raise missing("model")
    if not isinstance(model, str):
        raise wrong_type("model", "a string", model)
    if not model:
        raise InvalidRequest("'model' must not be empty", param="model")
    return CustomRequest(
        model=model,
        path=path,
        stream=stream,
        body=body,
        content_type=content_type,
        files=files,
        raw=raw,
        headers=headers,
    )


class CustomEncoder(Encoder):
    """The answer to such a request. What is given must be of one sort: objects and text, or bytes."""

    kind: ClassVar[Kind] = "custom"

    def __init__(self, request: CustomRequest) -> None:
        super().__init__()
        self._events = request.stream
        # Until it is known what the answer is, there is no head to send.
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
        """Note what the answer consists of.

        Raises:
            TypeError: it already consists of something that does not go together with that.
        """
        earlier = self._sort
        if earlier and earlier != sort and not (self._events and "bytes" not in (earlier, sort)):
            raise TypeError(f"an answer of {earlier} cannot go on with {sort}")
        self._sort = sort
        if sort != "bytes" and not self._events:
            self.streaming = False
            self.head = _TEXT_HEAD if sort == "text" else JSON_HEAD

    def finish(self) -> bytes:
        # An answer without any bytes has a head all the same.
        self.streaming = False
        if self._sort == "bytes":
            return b""
        if self._events:
            return DONE
        return "".join(self._texts).encode() if self._sort == "text" else dumps(self._object)
