"""How a stream of each route says that it has failed or is silent, and how the end of a stream is recognized.

Theory of operation
===================

A stream that has begun can no longer fail with a status. It fails with one last event, in the grammar of its route,
because clients ignore events that they do not know:

- chat, completions and custom routes: ``data: {"error": {...}}``;
- transcriptions and speech: the same with ``"type": "error"``; images: also named ``error``;
- responses: ``response.failed`` with the failed response, and with a top-level ``error``, for which the official
  clients raise; numbered like every event of this route;
- messages (the Anthropic API): ``event: error`` with the error types of that API (see ``error_families.py``).

The gateway writes this event, since only it knows what has been sent. It works on the bytes of the stream, because
most streams come from another node, and many from another server. So two things are read from the bytes that were sent
last: the number of the next event, and whether the stream has ended already. A server behind an engine may write its
own error event and then close its connection; the client must see one error event and not two.

While a stream is silent, its clients get comments. The Anthropic API has an event for that, ``ping``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

import attrs
import msgspec

from trio_cluster.errors import ApiError

from .error_families import message_envelope
from .json_values import dumps
from .sse import KEEPALIVE, error_event, event, named_event

__all__ = [
    "ERROR_OBJECT",
    "IMAGE_ERROR",
    "MESSAGE_ERROR",
    "RESPONSE_FAILED",
    "TYPED_ERROR",
    "UNKNOWN_RESPONSE",
    "EndDetector",
    "FailureGrammar",
    "read_error",
]

#: A quotation mark inside of a JSON string has a backslash before it, so this never matches inside of one.
_NUMBER: Final = re.compile(rb'"sequence_number"\s*:\s*(\d{1,15})')

#: The id of a response that has failed before it had one.
UNKNOWN_RESPONSE: Final = "resp_unknown"

#: The members that a response must have, where the response that has begun is not known.
_UNKNOWN_RESPONSE: Final[dict[str, Any]] = {
    "id": UNKNOWN_RESPONSE,
    "object": "response",
    "created_at": 0,
    "model": "",
    "output": [],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "incomplete_details": None,
    "usage": None,
}


@attrs.frozen
class FailureGrammar:
    """How the streams of one route fail, end, and show that they go on.

    Attributes:
        write: ``write(error, first, last)`` returns the event that says that the stream has failed. ``first`` is its
            first event, or empty; ``last`` is what was sent last, or the end of that.
        ends: the types of the events that end a complete stream. ``[DONE]`` ends one on every route.
        failures: the types of the events that end a failed stream. So does every event with an ``error``.
        repeats_end: the events in ``ends`` may come several times, so that none of them is certain to be the last.
        needs_first: ``write`` uses ``first``.
        end_marks: matches something of every event that ends a stream, whole or failed; also in the text of a model.
        keepalive: what is sent while there is nothing else to send.
    """

    write: Callable[[ApiError, bytes, bytes], bytes]
    ends: frozenset[str] = frozenset()
    failures: frozenset[str] = frozenset({"error"})
    repeats_end: bool = False
    needs_first: bool = False
    keepalive: bytes = KEEPALIVE
    end_marks: re.Pattern[bytes] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        kinds = sorted(kind.encode() for kind in self.ends | self.failures)
        marks = b"|".join(map(re.escape, [b"[DONE]", b"error", *kinds]))
        object.__setattr__(self, "end_marks", re.compile(marks))

    def has_ended(self, last: bytes) -> bool:
        """Return whether the last event in ``last`` ends the stream, complete or failed. Comments after it change
        nothing.
        """
        if self.end_marks.search(last) is None:
            return False
        detector = EndDetector(self)
        detector.feed(last)
        return detector.has_ended


class EndDetector:
    """Finds out whether a stream ends as its route demands, from its bytes.

    Args:
        grammar: that of the route.
    """

    #: Bytes of a line that are kept. Of a longer one only the beginning is looked at.
    _LINE_LIMIT: Final = 1 << 16

    def __init__(self, grammar: FailureGrammar) -> None:
        self._grammar = grammar
        self._line = b""
        self._name = b""
        self._data = b""
        self._last = (b"", b"")

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Synchronous."""
        # Nearly every piece is a whole event, and does not end the stream; this is done for each token.
        if (
            not (self._line or self._name or self._data)
            and data.startswith((b"data:", b"event:"))
            and data.endswith(b"\n\n")
            and self._grammar.end_marks.search(data) is None
        ):
            self._last = (b"", b"")
            return
        first, *rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._line = (self._line + first)[: self._LINE_LIMIT]
        for line in rest:
            self._end_line(self._line)
            self._line = line[: self._LINE_LIMIT]

    def _end_line(self, line: bytes) -> None:
        if line.startswith(b"event:"):
            self._name = line[6:].strip()
        elif line.startswith(b"data:"):
            self._data = self._data or line[5:].strip()
        elif not line and (self._data or self._name):
            self._last = (self._name, self._data)
            self._name = self._data = b""

    @property
    def has_ended(self) -> bool:
        """Whether the last complete event ends the stream, complete or failed."""
        name, data = self._last
        if not (name or data or self._data or self._line):
            return False
        if (self._data or self._line[5:].strip()).startswith(b"[DONE]"):
            # Some servers leave out the empty line behind it.
            return True
        if data.startswith(b"[DONE]"):
            return True
        kinds = {name.decode("latin-1")}
        try:
            value = msgspec.json.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            # Not JSON, or too long to be kept.
            if (kind := _TYPE.match(data)) is not None:
                kinds.add(kind[1].decode("ascii"))
        else:
            if isinstance(value, dict):
                if value.get("error"):
                    return True
                kinds.add(str(value.get("type")))
        return bool(kinds & (self._grammar.ends | self._grammar.failures))


#: The type of an event, if that is its first member.
_TYPE: Final = re.compile(rb'\{\s*"type"\s*:\s*"([\w.]*)"')


def _write_object(error: ApiError, first: bytes, last: bytes) -> bytes:
    return error_event(error)


def _write_typed(error: ApiError, first: bytes, last: bytes) -> bytes:
    return event(_dumps({"type": "error"} | error.envelope()))


def _write_image_error(error: ApiError, first: bytes, last: bytes) -> bytes:
    return named_event("error", _dumps({"type": "error"} | error.envelope()))


def _write_message_error(error: ApiError, first: bytes, last: bytes) -> bytes:
    return named_event("error", _dumps(message_envelope(error)))


def _write_response_failed(error: ApiError, first: bytes, last: bytes) -> bytes:
    numbers = _NUMBER.findall(last) or _NUMBER.findall(first)
    inner = {"code": error.code or "server_error", "message": error.message}
    failed = _begun_response(first) | {"status": "failed", "error": inner}
    members = {
        "type": "response.failed",
        "sequence_number": int(numbers[-1]) + 1 if numbers else 0,
        "response": failed,
    }
    return named_event("response.failed", _dumps(members | error.envelope()))


def _begun_response(first: bytes) -> dict[str, Any]:
    """Return the response that a stream's first event has announced."""
    for line in first.splitlines():
        if line.startswith(b"data:"):
            try:
                response = msgspec.json.decode(line[5:])["response"]
            except (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError):
                break
            return response if isinstance(response, dict) else dict(_UNKNOWN_RESPONSE)
    return dict(_UNKNOWN_RESPONSE)


def read_error(status: int, body: bytes) -> ApiError:
    """Return the error that a server has answered with, so that it can be sent in a stream.

    Args:
        status: 400 to 599.
        body: of the answer; that of the OpenAI API and similar ones is understood.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        value = None
    error = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(error, str):
        error = {"message": error}
    members = error if isinstance(error, dict) else {}
    texts = {name: members[name] for name in ("code", "type", "param") if isinstance(members.get(name), str)}
    message = members.get("message")
    if not (isinstance(message, str) and message):
        message = f"The server behind the model answered with status {status}"
    return ApiError(status, message, **texts)


def _dumps(value: dict[str, Any]) -> bytes:
    """Encode an error, whatever values a handler has put into it."""
    try:
        return dumps(value)
    except (TypeError, ValueError):
        return json.dumps(value, default=str, skipkeys=True).encode("ascii")


ERROR_OBJECT: Final = FailureGrammar(_write_object)
TYPED_ERROR: Final = FailureGrammar(_write_typed, frozenset({"transcript.text.done", "speech.audio.done"}))
IMAGE_ERROR: Final = FailureGrammar(
    _write_image_error, frozenset({"image_generation.completed", "image_edit.completed"}), repeats_end=True
)
RESPONSE_FAILED: Final = FailureGrammar(
    _write_response_failed,
    frozenset({"response.completed", "response.incomplete"}),
    frozenset({"response.failed", "error"}),
    needs_first=True,
)
MESSAGE_ERROR: Final = FailureGrammar(
    _write_message_error, frozenset({"message_stop"}), keepalive=named_event("ping", b'{"type": "ping"}')
)
