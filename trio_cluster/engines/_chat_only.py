"""The Messages API in front of a server that has only chat: requests to ``/v1/messages``, translated there and back.

Most servers have ``/v1/messages`` themselves, and get these requests as they are. For one that does not know the route,
the request is translated in the same way as for a chat handler, and what the server answers is encoded in the same way
as what a handler gives: an answer of chat, or a chunk of one, is something that a handler may give.
"""

from __future__ import annotations

import json
import time
from typing import Any, Final

import attrs
import msgspec

from trio_cluster.core import randomness
from trio_cluster.core.answer import Usage
from trio_cluster.errors import UNAVAILABLE_STATUSES, ApiError, UpstreamBusy
from trio_cluster.openai import ENDPOINTS, ChatRequest, Encoder

from ._http_response import HttpError

__all__ = ["CHAT_PATH", "ChatAnswer", "chat_body", "error_of", "read_message_body"]

CHAT_PATH: Final = ENDPOINTS["chat.completions"].path

#: Fields of a chat that are sent if the client has sent what they stand for.
_FIELDS: Final = (
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "tools",
    "tool_choice",
    "response_format",
    "reasoning_effort",
    "user",
)
#: Members of messages that only handlers know.
_OWN_MEMBERS: Final = frozenset({"thinking_blocks", "is_error"})
#: What is read of an answer or of a chunk.
_MEMBERS: Final = ("choices", "usage")
_MAX_MESSAGE: Final = 2000


def read_message_body(body: bytes) -> ChatRequest:
    """Return the chat that a request to ``/v1/messages`` asks for.

    Raises:
        InvalidRequest: it is not valid.
    """
    request: Any = ENDPOINTS["messages"].parse(body, "application/json", {})
    return request  # type: ignore[no-any-return]


def chat_body(request: ChatRequest, *, asks_for_usage: bool) -> bytes:
    """Return the body of the request to the server's chat.

    Args:
        request: the chat.
        asks_for_usage: ask a stream to end with its usage.
    """
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [
            {name: value for name, value in message.items() if name not in _OWN_MEMBERS}
            for message in request.messages
        ],
    }
    defaults = {field.name: field.default for field in attrs.fields(ChatRequest)}
    for name in _FIELDS:
        value = getattr(request, name)
        if name in request.raw or value != defaults[name]:
            body[name] = value
    if not request.parallel_tool_calls:
        body["parallel_tool_calls"] = False
    if request.raw.get("top_k") is not None:
        body["top_k"] = request.raw["top_k"]
    if request.stream:
        body["stream"] = True
        if asks_for_usage:
            body["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(body)


def error_of(status: int, retry_after: str, body: bytes) -> ApiError:
    """Return the error that a server has answered with."""
    message, code, param = f"The server behind the model answered with status {status}", None, None
    try:
        inner = json.loads(body)["error"]
        message = str(inner["message"])[:_MAX_MESSAGE]
        code, param = (
            inner.get(name) if isinstance(inner.get(name), str) else None for name in ("code", "param")
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    seconds = float(retry_after) if retry_after.isascii() and retry_after.isdecimal() else None
    kind = UpstreamBusy if status in UNAVAILABLE_STATUSES else ApiError
    return kind(max(400, status), message, code=code, param=param, retry_after=seconds)


class ChatAnswer:
    """An answer of chat that becomes a message.

    Args:
        request: the chat, with the name that the client gave the model.
    """

    def __init__(self, request: ChatRequest) -> None:
        endpoint = ENDPOINTS["messages"]
        self._encoder: Encoder = endpoint.encoder(
            request, response_id=randomness.token(12), created=int(time.time())
        )
        self._streams = request.stream
        self._held = bytearray()
        self._ended = False
        self._done = False

    @property
    def is_done(self) -> bool:
        """Whether the last event of a stream was fed, so that :meth:`end` can be called."""
        return self._done

    @property
    def content_type(self) -> str:
        """The content type of the message."""
        return self._encoder.head.content_type

    @property
    def usage(self) -> Usage | None:
        """The tokens of the answer, as far as they are known."""
        return self._encoder.reported_usage

    def feed(self, piece: bytes) -> bytes:
        """Take the next bytes of the answer, and return what is to be sent to the client.

        Raises:
            ApiError: the stream reports an error.
            HttpError: it is not an answer of chat.
        """
        self._held += piece
        if not self._streams:
            return b""
        sent = []
        *lines, rest = bytes(self._held).replace(b"\r\n", b"\n").split(b"\n")
        self._held[:] = rest
        for line in lines:
            if line.startswith(b"data:"):
                sent.append(self._take_event(line[5:].strip()))
        return b"".join(sent)

    def end(self) -> bytes:
        """Take note that the answer is complete, and return the rest of the message.

        Raises:
            ApiError, HttpError: see :meth:`feed`; or the stream has no end.
        """
        sent = b""
        if self._streams:
            sent = self.feed(b"\n")
            if not self._ended:
                raise HttpError("the connection was closed before the stream was complete")
        else:
            self._take(bytes(self._held))
        try:
            return sent + self._encoder.finish()
        except ValueError as error:
            raise HttpError(f"its answer cannot be read: {error}") from error

    def _take_event(self, data: bytes) -> bytes:
        if data == b"[DONE]":
            self._ended = self._done = True
            return b""
        return self._take(data)

    def _take(self, data: bytes) -> bytes:
        try:
            value = msgspec.json.decode(data)
            if value.get("error"):
                raise error_of(502, "", data)
            self._ended = self._ended or any(
                choice.get("finish_reason") for choice in value.get("choices") or ()
            )
            return self._encoder.encode({name: value[name] for name in _MEMBERS if name in value})
        except (msgspec.MsgspecError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise HttpError(f"its answer cannot be read: {error}") from error
