"""Answers that are text: chat completions and completions, streamed and plain.

The two routes differ only in the shape of their objects, and a stream differs from a plain answer only in when its
parts are sent. So there are two shapes and two encoders, which can be combined freely.

The bytes around a piece of streamed text are encoded once; see ``delta_stream.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import attrs

from trio_cluster.core.model import Kind

from ..json_values import dumps
from ..requests.types import ChatRequest
from ..sse import DONE, event
from .choices import Choice, Delta, Output, read_output
from .chunks import OutputChunk
from .delta_stream import DeltaEvent, DeltaStream
from .encoder import Encoder

__all__ = ["ChatShape", "CompletionShape", "PlainText", "StreamedText", "TextShape"]


class TextShape(Protocol):
    """The shape of a route's objects."""

    whole_object: str
    part_object: str

    def whole(self, choice: Choice) -> dict[str, Any]:
        """Return a choice of a plain answer."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the choice of the chunk that comes before the text of a choice; ``None`` if there is none."""
        ...

    def part(self, delta: Delta) -> dict[str, Any]:
        """Return a choice of a chunk; a delta with a reason is the last one of its choice."""
        ...

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        """Return the JSON of a choice of a chunk that adds text: the bytes before and after the JSON string."""
        ...

    def around_reasoning(self, index: int) -> tuple[bytes, bytes]:
        """Return the same for a chunk that adds reasoning."""
        ...


class ChatShape:
    """Objects of ``/v1/chat/completions``."""

    whole_object = "chat.completion"
    part_object = "chat.completion.chunk"

    def __init__(self, request: ChatRequest) -> None:
        pass

    def whole(self, choice: Choice) -> dict[str, Any]:
        text = choice.text
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None} | choice.members
        if choice.tool_calls:
            message["tool_calls"] = choice.all_calls
        if not text and (choice.tool_calls or "function_call" in message or message["refusal"]):
            message["content"] = None
        return {
            "index": choice.index,
            "message": message,
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._choice(index, {"role": "assistant", "content": "", "refusal": None})

    def part(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        return self._choice(delta.index, content | delta.members, delta.logprobs, delta.reason)

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        return (
            b'{"index":%d,"delta":{"content":' % index,
            b'},"logprobs":null,"finish_reason":null}',
        )

    def around_reasoning(self, index: int) -> tuple[bytes, bytes]:
        return (
            b'{"index":%d,"delta":{"reasoning_content":' % index,
            b'},"logprobs":null,"finish_reason":null}',
        )

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class CompletionShape:
    """Objects of ``/v1/completions``, where a choice is a text; ``echo`` puts the prompt before it.

    This route has no members for reasoning and tool calls. They become members of the choice, under the names that they
    have in a chat: so nothing is lost, and clients that do not know them ignore them.
    """

    whole_object = "text_completion"
    part_object = "text_completion"

    def __init__(self, request: ChatRequest) -> None:
        self._n = request.n
        self._echoed = (request.prompts or [request.prompt or ""]) if request.raw.get("echo") else []
        # By choice, how much text the tokens with logprobs have had.
        self._lengths: dict[int, int] = {}

    def _echo(self, index: int) -> str:
        return str(self._echoed[index // self._n]) if self._echoed else ""

    def whole(self, choice: Choice) -> dict[str, Any]:
        members = choice.members
        if choice.tool_calls:
            members["tool_calls"] = choice.all_calls
        text = self._echo(choice.index) + choice.text
        return self.part(Delta(choice.index, text, members, choice.logprobs, choice.finish_reason))

    def opening(self, index: int) -> dict[str, Any] | None:
        echo = self._echo(index)
        return self.part(Delta(index, echo)) if echo else None

    def part(self, delta: Delta) -> dict[str, Any]:
        reason = delta.reason
        if reason in ("tool_calls", "function_call"):
            # Only the chat route has these reasons. On this route, the model has stopped.
            reason = "stop"
        return delta.members | {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.index, delta.logprobs),
            "finish_reason": reason,
        }

    def _logprobs(self, index: int, logprobs: Any) -> Any:
        """Return log probabilities in the form of this route, given those of a chat; others as they are."""
        tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
        if not isinstance(tokens, list):
            return logprobs
        legacy: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        length = self._lengths.get(index, len(self._echo(index)))
        for token in tokens:
            text = token.get("token") or ""
            legacy["tokens"].append(text)
            legacy["token_logprobs"].append(token.get("logprob"))
            alternatives = token.get("top_logprobs") or [token]
            legacy["top_logprobs"].append({each.get("token"): each.get("logprob") for each in alternatives})
            legacy["text_offset"].append(length)
            length += len(text)
        self._lengths[index] = length
        return legacy

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        return b'{"index":%d,"text":' % index, b',"logprobs":null,"finish_reason":null}'

    def around_reasoning(self, index: int) -> tuple[bytes, bytes]:
        return (
            b'{"index":%d,"text":"","reasoning_content":' % index,
            b',"logprobs":null,"finish_reason":null}',
        )


class _Text(Encoder):
    """The common part of both encoders of text."""

    kind: ClassVar[Kind] = "chat"

    def __init__(self, shape: TextShape, request: ChatRequest, answer_id: str, created: int) -> None:
        super().__init__()
        self._shape = shape
        self._id = answer_id
        self._created = created
        self._model = request.model
        self._wanted = request.n
        # The index of the first choice of the part that the handler answers now.
        self._first = 0
        self._choices: dict[int, Choice] = {}

    def next_part(self) -> None:
        self._end_part()
        self._first += self._wanted
        self._usage.begin_part()

    def _choice(self, index: int) -> Choice:
        choice = self._choices.get(index)
        if choice is None:
            if not 0 <= index - self._first < self._wanted:
                given, wanted = index - self._first, self._wanted
                raise ValueError(f"there is no choice {given}: the client asked for {wanted}")
            choice = self._choices[index] = Choice(index, self._id.rpartition("-")[2])
        return choice

    def _deltas(self, output: Output) -> list[Delta]:
        """Return the deltas of a handler's object, with the indices of the answer's choices."""
        if not self._first:
            return output.deltas
        return [attrs.evolve(delta, index=delta.index + self._first) for delta in output.deltas]

    def _end_part(self) -> None:
        # A handler that gave nothing has answered with an empty text.
        if not any(index >= self._first for index in self._choices):
            self._choice(self._first)

    def _all_choices(self) -> list[Choice]:
        self._end_part()
        return [choice for _, choice in sorted(self._choices.items())]

    def _answer(self, kind: str, choices: list[dict[str, Any]], extras: dict[str, Any]) -> dict[str, Any]:
        own = {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        return own | extras


class PlainText(_Text):
    """A text that is sent when it is complete."""

    def __init__(self, shape: TextShape, request: ChatRequest, answer_id: str, created: int) -> None:
        super().__init__(shape, request, answer_id, created)
        self._extras: dict[str, Any] = {}

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind == "json":
            output = read_output(chunk.value)
            self._usage.take_object(output.usage)
            for delta in self._deltas(output):
                self._choice(delta.index).add(delta)
            self._extras |= output.extras
            return b""
        choice = self._choice((chunk.index or 0) + self._first)
        if chunk.kind == "text_delta":
            choice.add_text(chunk.value)
        elif chunk.kind == "final_text":
            choice.take_final(chunk.value)
        elif chunk.kind == "reasoning":
            choice.add_reasoning(chunk.value)
        elif chunk.kind == "tool_call":
            choice.add_call(chunk.value)
        elif chunk.kind == "finish":
            choice.require_open()
            choice.reason = chunk.value
        else:
            self._refuse(chunk)
        return b""

    def finish(self) -> bytes:
        choices = [self._shape.whole(choice) for choice in self._all_choices()]
        self.finish_reasons = ",".join([choice["finish_reason"] for choice in choices])
        answer = self._answer(self._shape.whole_object, choices, self._extras)
        answer["usage"] = self._usage.for_chat()
        return dumps(answer)


class StreamedText(DeltaStream, _Text):
    """A text that is sent as it comes.

    The reason for which a choice ends is sent when the handler has finished, so that a client that stops reading there
    has got a complete answer. A handler that fails after it has given a reason ends in an error like any other.
    """

    def __init__(self, shape: TextShape, request: ChatRequest, answer_id: str, created: int) -> None:
        super().__init__(shape, request, answer_id, created)
        options = request.stream_options or {}
        self._includes_usage = bool(options.get("include_usage"))
        # By choice. The fast path, which is that of plain text for the first choice, is open while that can grow.
        self._text_events: dict[int, DeltaEvent] = {}
        self._reasoning_events: dict[int, DeltaEvent] = {}

    def next_part(self) -> None:
        super().next_part()
        self._fast_path = None

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind == "json":
            return self._take_object(chunk.value)
        index = (chunk.index or 0) + self._first
        if chunk.kind == "text_delta":
            return self._text(index, chunk.value)
        if chunk.kind == "final_text":
            opening = self._open(index)
            rest = self._choice(index).take_final(chunk.value)
            if index == self._first:
                self._fast_path = None
            return opening + self._text_events[index].write(rest) if rest else opening
        if chunk.kind == "reasoning":
            return self._reasoning(index, chunk.value)
        if chunk.kind == "tool_call":
            opening = self._open(index)
            sendable = self._choice(index).add_call(chunk.value)
            return opening + self._event([self._shape.part(sendable)], {})
        if chunk.kind != "finish":
            self._refuse(chunk)
        choice = self._choice(index)
        choice.require_open()
        self._end(choice, chunk.value)
        return b""

    def _text(self, index: int, text: str) -> bytes:
        opening = self._open(index)
        self._choice(index).add_text(text)
        return opening + self._text_events[index].write(text) if text else opening

    def _reasoning(self, index: int, text: str) -> bytes:
        opening = self._open(index)
        self._choice(index).add_reasoning(text)
        return opening + self._reasoning_events[index].write(text) if text else opening

    def _take_object(self, obj: dict[str, Any]) -> bytes:
        output = read_output(obj)
        self._usage.take_object(output.usage)
        sent = b""
        parts = []
        for delta in self._deltas(output):
            sent += self._open(delta.index)
            choice = self._choice(delta.index)
            sendable = choice.add(delta)
            if delta.reason is not None:
                self._end(choice, delta.reason)
            if not sendable.is_empty:
                parts.append(
                    self._shape.part(Delta(delta.index, sendable.text, sendable.members, delta.logprobs))
                )
        if output.extras and not parts:
            # Clients read the first choice of every chunk, so there must be one. An empty delta adds nothing.
            sent += self._open(self._first)
            parts.append(self._shape.part(Delta(self._first)))
        if parts:
            sent += self._event(parts, output.extras)
        return sent

    def _open(self, index: int) -> bytes:
        """Return the event that comes before the text of a choice, the first time; nothing after that."""
        if index in self._text_events:
            return b""
        choice = self._choice(index)
        # The choice goes where the JSON of an event with a single choice would have it.
        mark = b'"choices":['
        frame = self._event([], {})
        cut = frame.index(mark) + len(mark)
        before, after = self._shape.around_text(index)
        text = DeltaEvent(frame[:cut] + before, after + frame[cut:], pieces=(choice.pieces,))
        before, after = self._shape.around_reasoning(index)
        self._reasoning_events[index] = DeltaEvent(frame[:cut] + before, after + frame[cut:])
        self._text_events[index] = text
        if index == self._first:
            self._fast_path = text
        opening = self._shape.opening(index)
        return b"" if opening is None else self._event([opening], {})

    def _end(self, choice: Choice, reason: str) -> None:
        choice.reason = reason
        if choice.index == self._first:
            self._fast_path = None

    def _event(self, choices: list[dict[str, Any]], extras: dict[str, Any]) -> bytes:
        answer = self._answer(self._shape.part_object, choices, extras)
        if self._includes_usage:
            answer["usage"] = None
        return event(dumps(answer))

    def finish(self) -> bytes:
        self._fast_path = None
        sent, reasons = [], []
        for choice in self._all_choices():
            sent.append(self._open(choice.index))
            reasons.append(reason := choice.finish_reason)
            last = self._shape.part(Delta(choice.index, reason=reason))
            sent.append(self._event([last], {}))
        self.finish_reasons = ",".join(reasons)
        if self._includes_usage:
            answer = self._answer(self._shape.part_object, [], {})
            answer["usage"] = self._usage.for_chat()
            sent.append(event(dumps(answer)))
        sent.append(DONE)
        return b"".join(sent)
