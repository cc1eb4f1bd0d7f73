"""The grammar of a streamed response, as a strict parser for tests.

Theory of operation
===================

All that a client can know about a stream is how it ended. :func:`read_stream` parses the bytes of one stream strictly
and reports which of three endings it had:

- *finished*: ``data: [DONE]`` is the last event, and every choice had a ``finish_reason``, once;
- *failed*: one error event is the last event, and there is no ``[DONE]``. It has the form of its route: the error
  object alone; with ``"type": "error"`` among the events of transcripts, speech and images, where those of images also
  have the name ``error``; or ``response.failed``, with its number and with the error object;
- *cut*: neither. The bytes just end, at the end of an event or in the middle of one.

The events of ``/v1/messages`` have names. A message begins with ``message_start``; its blocks come one after the other,
numbered from 0, each with a beginning, deltas of its own kind and an end; then come ``message_delta`` with the reason
and ``message_stop``, which is the last event. It fails with the event ``error``.

The events of ``/v1/responses`` have names and sequence numbers, which must be right, and instead of ``[DONE]`` the last
one is ``response.completed`` or ``response.incomplete``. Those of images have names as well, and the last one is
``image_generation.completed`` or ``image_edit.completed``.

Everything else is a :class:`StreamGrammarError`: a stream that looks finished and is not, two endings, events after the
end, lines that clients cannot parse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs
import msgspec

__all__ = ["StreamGrammarError", "StreamReport", "read_stream"]

_DONE: Final = b"[DONE]"

#: Events without text in streams of named events, and those that stand for ``[DONE]``.
_PROGRESS: Final = frozenset(
    {"transcript.text.segment", "image_generation.partial_image", "image_edit.partial_image"}
)
_LAST: Final = frozenset({"image_generation.completed", "image_edit.completed"})

#: The reasons why a message ends, as the ``finish_reason`` of the other routes.
_STOP_REASONS: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
#: The events of a message, and which kinds of deltas a block may have.
_MESSAGE: Final = frozenset(
    {
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
    }
)
_BLOCK_DELTAS: Final = {
    "text": {"text_delta": "text", "citations_delta": "citation"},
    "thinking": {"thinking_delta": "thinking", "signature_delta": "signature"},
    "redacted_thinking": {},
    "tool_use": {"input_json_delta": "partial_json"},
}

#: The reasons why a response is incomplete, as the ``finish_reason`` of the other routes.
_INCOMPLETE: Final = {"max_output_tokens": "length"}


class StreamGrammarError(AssertionError):
    """A server may not send a stream of these bytes. The message says what is wrong, and shows the event."""


@attrs.frozen
class StreamReport:
    """The content of a stream, and how it ended."""

    ending: Literal["finished", "failed", "cut"]
    events: tuple[dict[str, Any], ...]
    """The JSON objects of its events, in order, without the error event."""
    texts: Mapping[int, str]
    """The deltas of each choice, joined, by the index of the choice."""
    finish_reasons: Mapping[int, str]
    usage: dict[str, Any] | None
    """The last usage object in an event."""
    error: dict[str, Any] | None
    """The members of the envelope of the error event; ``None`` if there was none."""
    comments: int
    """How many comments there were, or events ``ping`` in their place. Clients ignore them."""

    @property
    def text(self) -> str:
        """The text of choice 0."""
        return self.texts.get(0, "")


def read_stream(data: bytes) -> StreamReport:
    """Parse the bytes of one streamed response. Synchronous.

    Args:
        data: the body of the response, as far as it was received.

    Returns:
        The content of the stream, and how it ended. A body that ends anywhere is not an error, but a stream that was
        ``cut``.

    Raises:
        StreamGrammarError: they break the grammar in a way that a lost connection does not explain.
    """
    reader = _Reader()
    *blocks, rest = data.replace(b"\r\n", b"\n").split(b"\n\n")
    for block in blocks:
        reader.read(block)
    if rest and reader.ending is not None:
        raise StreamGrammarError(f"{rest!r} after the end of the stream")
    return reader.report()


class _Reader:
    def __init__(self) -> None:
        self.ending: Literal["finished", "failed"] | None = None
        self._events: list[dict[str, Any]] = []
        self._texts: dict[int, list[str]] = {}
        self._reasons: dict[int, str] = {}
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self._comments = 0
        self._number = 0  # of the next event that has one
        # Of a message: the kinds of its blocks, whether the last one is open, and why it ends.
        self._blocks: list[str] | None = None
        self._block_is_open = False
        self._stop_reason: str | None = None

    def read(self, block: bytes) -> None:
        """Parse one block: an event or a comment."""
        if self.ending is not None:
            raise StreamGrammarError(f"{block!r} after the end of the stream")
        if block.startswith(b":"):
            if b"\n" in block:
                raise StreamGrammarError(f"{block!r}: a comment is a block of its own")
            self._comments += 1
        elif block.startswith(b"data: "):
            if b"\n" in block:
                raise StreamGrammarError(f"{block!r}: an event is a single line")
            self._read_event(block.removeprefix(b"data: "))
        elif block.startswith(b"event: "):
            name, _, line = block.removeprefix(b"event: ").partition(b"\n")
            if not line.startswith(b"data: ") or b"\n" in line:
                raise StreamGrammarError(f"{block!r}: an event is its name and a single line")
            self._read_event(line.removeprefix(b"data: "), name.decode("latin-1"))
        else:
            raise StreamGrammarError(f"{block!r}: neither an event nor a comment")

    def _read_event(self, data: bytes, name: str | None = None) -> None:
        if data == _DONE:
            open_choices = sorted(self._texts.keys() - self._reasons.keys())
            if open_choices:
                raise StreamGrammarError(f"[DONE], but choices {open_choices} have no finish_reason")
            if not self._reasons:
                raise StreamGrammarError("[DONE], but no choice has ended")
            self.ending = "finished"
            return
        try:
            event = msgspec.json.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise StreamGrammarError(f"{data!r}: not JSON: {exc}") from None
        if not isinstance(event, dict):
            raise StreamGrammarError(f"{data!r}: not an object")
        if name is not None and event.get("type") != name:
            raise StreamGrammarError(f"{data!r}: its type is not its name {name!r}")
        if name == "ping" and event == {"type": "ping"}:
            # What the Anthropic API has in the place of comments.
            self._comments += 1
            return
        if "error" in event:
            self._read_error(event, name, data)
            return
        self._events.append(event)
        if event.get("usage") is not None:
            self._usage = event["usage"]
        try:
            self._read_output(event, data)
        except (AttributeError, KeyError, TypeError) as exc:
            raise StreamGrammarError(f"{data!r}: not in the form of the API: {exc!r}") from None

    def _read_error(self, event: dict[str, Any], name: str | None, data: bytes) -> None:
        """Take the error event, which must have the form of the events before it."""
        error = event["error"]
        if not isinstance(error, dict) or "message" not in error:
            raise StreamGrammarError(f"{data!r}: not an error envelope")
        kinds = {"" if "choices" in each else str(each.get("type")) for each in self._events}
        kind = event.get("type")
        if any(each.startswith("response.") for each in kinds):
            response = event.get("response")
            if kind != "response.failed" or not isinstance(response, dict):
                raise StreamGrammarError(f"{data!r}: a response fails with response.failed")
            if event.get("sequence_number") != self._number:
                raise StreamGrammarError(f"{data!r}: should have been number {self._number}")
            if response.get("status") != "failed" or "message" not in (response.get("error") or {}):
                raise StreamGrammarError(f"{data!r}: the status of the response is another one")
        elif any(each.startswith("image_") for each in kinds):
            if (name, kind) != ("error", "error"):
                raise StreamGrammarError(f"{data!r}: an error between images has the name and the type error")
        elif any(each.startswith(("transcript.", "speech.")) for each in kinds):
            if (name, kind) != (None, "error"):
                raise StreamGrammarError(f"{data!r}: an error on this route has no name, and the type error")
        elif kinds & _MESSAGE:
            if (name, kind) != ("error", "error") or not isinstance(error.get("type"), str):
                raise StreamGrammarError(
                    f"{data!r}: an error in a message has a type, and the name and the type error"
                )
        elif kinds and (name, kind) != (None, None):
            raise StreamGrammarError(f"{data!r}: an error on this route has neither name nor type")
        self._error = error
        self.ending = "failed"

    def _read_output(self, event: dict[str, Any], data: bytes) -> None:
        if "choices" in event:
            for choice in event["choices"]:
                self._read_choice(choice, data)
        elif str(event.get("type")).startswith("response."):
            self._read_response(event, data)
        elif event.get("type") in _MESSAGE:
            self._read_message(event, data)
        elif event.get("type") in _PROGRESS:
            pass
        elif event.get("type") in _LAST:
            self._end(0, "stop", data)
            self.ending = "finished"
        elif event.get("type") == "speech.audio.delta":
            self._texts.setdefault(0, [])
        elif event.get("type") == "speech.audio.done":
            self._end(0, "stop", data)
        elif event.get("type") == "transcript.text.delta":
            self._texts.setdefault(0, []).append(event["delta"])
        elif event.get("type") == "transcript.text.done":
            self._end(0, "stop", data)
            self._texts[0] = [event["text"]]
        else:
            raise StreamGrammarError(f"{data!r}: an event of no known kind")

    def _read_response(self, event: dict[str, Any], data: bytes) -> None:
        kind = event["type"]
        if event["sequence_number"] != self._number:
            raise StreamGrammarError(f"{data!r}: should have been number {self._number}")
        self._number += 1
        if kind == "response.output_text.delta":
            self._texts.setdefault(0, []).append(event["delta"])
        elif kind in ("response.completed", "response.incomplete"):
            response = event["response"]
            details = response["incomplete_details"]
            status = "completed" if details is None else "incomplete"
            if not kind.removeprefix("response.") == response["status"] == status:
                raise StreamGrammarError(f"{data!r}: the status of the response is another one")
            reason = "stop" if details is None else details["reason"]
            self._end(0, _INCOMPLETE.get(reason, reason), data)
            self._texts.setdefault(0, [])
            self._usage = response["usage"]
            self.ending = "finished"

    def _read_message(self, event: dict[str, Any], data: bytes) -> None:
        kind = event["type"]
        if kind == "ping":
            return
        if kind == "message_start":
            message = event["message"]
            if self._blocks is not None or message["content"] or message["stop_reason"] is not None:
                raise StreamGrammarError(f"{data!r}: a message begins once, and empty")
            self._blocks = []
            self._usage = message["usage"]
            return
        if self._blocks is None or (self._stop_reason is not None and kind != "message_stop"):
            raise StreamGrammarError(f"{data!r}: outside of a message")
        if kind == "content_block_start":
            if self._block_is_open or event["index"] != len(self._blocks):
                raise StreamGrammarError(f"{data!r}: blocks come one after the other")
            self._blocks.append(event["content_block"]["type"])
            self._block_is_open = True
            return
        if kind.startswith("content_block_"):
            if not self._block_is_open or event["index"] != len(self._blocks) - 1:
                raise StreamGrammarError(f"{data!r}: this block is not open")
            if kind == "content_block_stop":
                self._block_is_open = False
                return
            delta = event["delta"]
            member = _BLOCK_DELTAS[self._blocks[-1]][delta["type"]]
            if delta["type"] == "text_delta":
                self._texts.setdefault(0, []).append(delta[member])
            elif delta[member] is None:
                raise StreamGrammarError(f"{data!r}: a delta adds something")
        elif self._block_is_open:
            raise StreamGrammarError(f"{data!r}: a block is still open")
        elif kind == "message_delta":
            self._stop_reason = event["delta"]["stop_reason"]
            if (self._stop_reason == "stop_sequence") != (event["delta"]["stop_sequence"] is not None):
                raise StreamGrammarError(f"{data!r}: the reason and the stop sequence do not fit")
        elif self._stop_reason is None:
            raise StreamGrammarError(f"{data!r}: without a reason")
        else:
            self._texts.setdefault(0, [])
            self._end(0, _STOP_REASONS.get(self._stop_reason, self._stop_reason), data)
            self.ending = "finished"

    def _read_choice(self, choice: dict[str, Any], data: bytes) -> None:
        index = choice["index"]
        text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        reason = choice.get("finish_reason")
        if index in self._reasons:
            raise StreamGrammarError(f"{data!r}: choice {index} had already ended")
        self._texts.setdefault(index, []).append(text or "")
        if reason is not None:
            self._end(index, reason, data)

    def _end(self, index: int, reason: str, data: bytes) -> None:
        if index in self._reasons:
            raise StreamGrammarError(f"{data!r}: choice {index} had already ended")
        self._reasons[index] = reason

    def report(self) -> StreamReport:
        """Return what has been parsed."""
        return StreamReport(
            ending=self.ending or "cut",
            events=tuple(self._events),
            texts={index: "".join(texts) for index, texts in self._texts.items()},
            finish_reasons=dict(self._reasons),
            usage=self._usage,
            error=self._error,
            comments=self._comments,
        )
