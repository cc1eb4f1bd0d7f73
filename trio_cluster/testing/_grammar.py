"""The grammar of a streamed answer, as a check that tests can lean on.

A client has little to go by: the stream ends, and then it was complete, or it was not. :func:`read_stream`
reads the bytes of one stream strictly and says which of three endings it had:

- *finished*: ``data: [DONE]`` is the last thing in it, and every choice said why it ended, once;
- *failed*: one error event is the last thing in it, and there is no ``[DONE]``;
- *cut*: neither. The bytes just end, at the end of an event or in the middle of one.

The events of ``/v1/responses`` have names and numbers, which must be right, and what stands for ``[DONE]`` is
``response.completed`` or ``response.incomplete``. Those of images have names as well, and the last one is
``image_generation.completed`` or ``image_edit.completed``.

Whatever is none of these is a :class:`StreamGrammarError`: a stream that looks finished and is not, two
endings, events after the end, lines that clients cannot read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs
import msgspec

__all__ = ["StreamGrammarError", "StreamReport", "read_stream"]

_DONE: Final = b"[DONE]"

#: Events of streams with names: those on the way, and those that stand for ``[DONE]``.
_PASSING: Final = frozenset(
    {"transcript.text.segment", "image_generation.partial_image", "image_edit.partial_image"}
)
_LAST: Final = frozenset({"image_generation.completed", "image_edit.completed"})

#: The reasons why a response is incomplete, in the words of the other routes.
_INCOMPLETE: Final = {"max_output_tokens": "length"}


class StreamGrammarError(AssertionError):
    """The bytes are no stream that a server may send. The message says where, and shows it."""


@attrs.frozen
class StreamReport:
    """What was in a stream."""

    ending: Literal["finished", "failed", "cut"]
    events: tuple[dict[str, Any], ...]
    """The JSON objects of its events, in order; the error event is not among them."""
    texts: Mapping[int, str]
    """The deltas of each choice, put together."""
    finish_reasons: Mapping[int, str]
    usage: dict[str, Any] | None
    """The last usage object that was in an event."""
    error: dict[str, Any] | None
    """What is inside the envelope of the error event."""
    comments: int
    """How many comments there were; they mean nothing to a client."""

    @property
    def text(self) -> str:
        """The text of choice 0."""
        return self.texts.get(0, "")


def read_stream(data: bytes) -> StreamReport:
    """Read the bytes of one streamed answer.

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

    def read(self, block: bytes) -> None:
        """Read one block: an event or a comment."""
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
                raise StreamGrammarError(f"[DONE], but choices {open_choices} never said why they ended")
            if not self._reasons:
                raise StreamGrammarError("[DONE], but nothing has ended")
            self.ending = "finished"
            return
        try:
            event = msgspec.json.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise StreamGrammarError(f"{data!r}: not JSON: {exc}") from None
        if not isinstance(event, dict):
            raise StreamGrammarError(f"{data!r}: not an object")
        if "error" in event:
            if not isinstance(event["error"], dict) or "message" not in event["error"]:
                raise StreamGrammarError(f"{data!r}: not an error envelope")
            self._error = event["error"]
            self.ending = "failed"
            return
        if name is not None and event.get("type") != name:
            raise StreamGrammarError(f"{data!r}: not what its name {name!r} says")
        self._events.append(event)
        if event.get("usage") is not None:
            self._usage = event["usage"]
        try:
            self._read_output(event, data)
        except (AttributeError, KeyError, TypeError) as exc:
            raise StreamGrammarError(f"{data!r}: not in the form of the API: {exc!r}") from None

    def _read_output(self, event: dict[str, Any], data: bytes) -> None:
        if "choices" in event:
            for choice in event["choices"]:
                self._read_choice(choice, data)
        elif str(event.get("type")).startswith("response."):
            self._read_response(event, data)
        elif event.get("type") in _PASSING:
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
                raise StreamGrammarError(f"{data!r}: the response says something else")
            reason = "stop" if details is None else details["reason"]
            self._end(0, _INCOMPLETE.get(reason, reason), data)
            self._texts.setdefault(0, [])
            self._usage = response["usage"]
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
        """Return what has been read."""
        return StreamReport(
            ending=self.ending or "cut",
            events=tuple(self._events),
            texts={index: "".join(texts) for index, texts in self._texts.items()},
            finish_reasons=dict(self._reasons),
            usage=self._usage,
            error=self._error,
            comments=self._comments,
        )
