"""Answers to ``/v1/messages``, streamed and plain.

A handler gives the same output as for a chat, with the same meaning; here it becomes content blocks (see
``messages_api_blocks.py``). Both encoders report what happens as events. The encoder of plain answers ignores them, and
writes the message at the end; that of streams writes each event.

What only this API knows, a handler gives in a dict, and other routes pass it on: ``thinking_blocks`` in a message or
delta, a list of thinking with its ``signature`` and of encrypted thinking, in the form in which requests have them; and
``stop_sequence``, the one of the client's sequences at which the text has ended, as a member of the answer. The
``stop_reason`` of a choice is read as well, where servers such as vLLM put that sequence.

There is no ``[DONE]``: a stream that ends with ``message_stop`` is complete. One that fails ends with the event
``error``, which the gateway writes (see ``../failures.py``), and any other was cut.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import attrs

from trio_cluster.core.model import Kind

from ..json_values import dumps
from ..requests.types import ChatRequest
from ..sse import named_event
from .choices import Choice, Delta, read_output
from .chunks import OutputChunk
from .delta_stream import DeltaEvent, DeltaStream
from .encoder import Encoder
from .messages_api_blocks import Block, Blocks, delta_frame

__all__ = ["CountEncoder", "PlainMessage", "StreamedMessage"]

#: The finish reasons of a chat, by their names on this route.
_STOP_REASONS: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}

#: Where usage objects have the tokens that were read from a prompt cache, and those that were written to one: in the
#: details of the prompt, or under the names of this API.
_DETAILS: Final = ("prompt_tokens_details", "input_tokens_details")
_CACHE_READ: Final = "cache_read_input_tokens"
_CACHE_WRITTEN: Final = "cache_creation_input_tokens"


class _Message(Encoder):
    """The common part of both encoders: it makes blocks of what a handler gives."""

    kind: ClassVar[Kind] = "chat"

    def __init__(self, request: ChatRequest, token: str) -> None:
        super().__init__()
        self._model = request.model
        self._id = f"msg_{token}"
        self._choice = Choice(0, token)
        self._blocks = Blocks(self._report)
        self._extras: dict[str, Any] = {}
        self._stop_sequence: str | None = None
        self._stop_sequences = request.stop_sequences
        self._begun = False

    def _report(self, kind: str, members: dict[str, Any]) -> None:
        """Take an event: its type and its other members."""

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._report("message_start", {"message": self._message([], None)})

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind == "json":
            self._take_object(chunk.value)
            return b""
        self._require_only(chunk.index or 0)
        choice = self._choice
        if chunk.kind == "finish":
            choice.require_open()
            choice.reason = chunk.value
            return b""
        self._begin()
        if chunk.kind == "text_delta":
            choice.add_text(chunk.value)
            self._add_text(chunk.value)
        elif chunk.kind == "reasoning":
            choice.add_reasoning(chunk.value)
            self._add_thinking(chunk.value)
        elif chunk.kind == "final_text":
            self._take_final(chunk.value)
        elif chunk.kind == "tool_call":
            self._take_calls(choice.add_call(chunk.value))
        else:
            self._refuse(chunk)
        return b""

    def _require_only(self, index: int) -> None:
        if index:
            raise ValueError(f"there is no choice {index}: a message is only one")

    def _add_text(self, text: str) -> None:
        if text:
            self._blocks.add("text", text)

    def _add_thinking(self, text: str) -> None:
        if text:
            self._blocks.add("thinking", text)

    def _take_final(self, text: str) -> None:
        self._add_text(self._choice.take_final(text))

    def _take_object(self, obj: dict[str, Any]) -> None:
        output = read_output(obj)
        self._usage.take_object(output.usage)
        self._take_stop_sequence(output.extras.pop("stop_sequence", None))
        for choice in obj.get("choices") or ():
            self._take_stop_sequence(choice.get("stop_reason"))
        self._extras |= output.extras
        if output.extras:
            self._begin()
        for delta in output.deltas:
            self._require_only(delta.index)
            self._take_delta(delta)

    def _take_stop_sequence(self, sequence: Any) -> None:
        if isinstance(sequence, str) and sequence in self._stop_sequences:
            self._stop_sequence = sequence

    def _take_delta(self, delta: Delta) -> None:
        content = delta.members.get("content")
        if isinstance(content, list):
            # The content of the message has parts. Only their text can be a part of this message.
            delta = attrs.evolve(delta, text=delta.text + "".join(map(_text_of, content)))
        if not delta.is_empty:
            self._begin()
        sendable = self._choice.add(delta)
        members = sendable.members
        blocks = members.get("thinking_blocks")
        if isinstance(blocks, list) and blocks:
            # Servers that give these repeat their text as reasoning.
            self._take_thinking(blocks)
        elif isinstance(reasoning := members.get("reasoning_content") or members.get("reasoning"), str):
            # Some servers are changing the name, and give both meanwhile.
            self._add_thinking(reasoning)
        self._add_text(delta.text)
        if isinstance(refusal := members.get("refusal"), str):
            self._add_text(refusal)
        self._take_calls(sendable)

    def _take_thinking(self, blocks: list[Any]) -> None:
        for block in blocks:
            if not isinstance(block, dict):
                raise TypeError("a thinking block must be an object")
            if block.get("type") == "redacted_thinking":
                self._blocks.add_redacted(str(block.get("data") or ""))
                continue
            if isinstance(text := block.get("thinking"), str):
                self._add_thinking(text)
            if isinstance(signature := block.get("signature"), str) and signature:
                self._blocks.sign(signature)

    def _take_calls(self, sendable: Delta) -> None:
        for piece in sendable.members.get("tool_calls", ()):
            index: int = piece["index"]
            whole = self._choice.tool_calls[index]
            tool, text = whole.get("function"), (piece.get("function") or {}).get("arguments") or ""
            if not isinstance(tool, dict) or not isinstance(text, str):
                raise TypeError("a tool call in a message must be one of a function, its arguments text")
            name = tool.get("name") or ""
            complete = index in self._choice.whole_calls
            self._blocks.call(index, whole["id"], name, text, complete=complete)

    def finish(self) -> bytes:
        self._begin()
        self._blocks.end_all()
        self.finish_reasons = reason = self._choice.finish_reason
        stop_reason = _STOP_REASONS.get(reason, reason)
        if self._stop_sequence is not None and stop_reason == "end_turn":
            stop_reason = "stop_sequence"
        else:
            self._stop_sequence = None
        usage = self._usage_object()
        delta = {"stop_reason": stop_reason, "stop_sequence": self._stop_sequence}
        self._report("message_delta", {"delta": delta, "usage": usage})
        self._report("message_stop", {})
        return self._last(stop_reason)

    def _last(self, stop_reason: str) -> bytes:
        raise NotImplementedError

    def _message(self, content: list[dict[str, Any]], stop_reason: str | None) -> dict[str, Any]:
        own = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None if stop_reason is None else self._stop_sequence,
            "usage": self._usage_object(),
        }
        return self._extras | own

    def _usage_object(self) -> dict[str, Any]:
        """Return the usage as this API counts: the tokens of the prompt without those of the cache."""
        usage, details = self._usage, dict(self._usage.details)
        of_prompt: dict[str, Any] = {}
        for name in _DETAILS:
            if isinstance(given := details.pop(name, None), dict):
                of_prompt |= given
        read = _count(details.pop(_CACHE_READ, None)) or _count(of_prompt.get("cached_tokens"))
        written = _count(details.pop(_CACHE_WRITTEN, None)) or _count(of_prompt.get("cache_write_tokens"))
        for name in ("completion_tokens_details", "output_tokens_details"):
            details.pop(name, None)
        cached = read + written
        # A handler in front of a server with this API may give counts that are apart already.
        apart = usage.prompt_tokens < cached
        return {
            "input_tokens": usage.prompt_tokens if apart else usage.prompt_tokens - cached,
            "output_tokens": usage.completion_tokens,
            _CACHE_WRITTEN: written,
            _CACHE_READ: read,
        } | details


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _text_of(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else ""


class PlainMessage(_Message):
    """A message that is sent when it is complete."""

    def _last(self, stop_reason: str) -> bytes:
        final = self._choice.final
        if final is not None and not final.startswith("".join(self._choice.pieces)):
            self._blocks.replace_text(final)
        return dumps(self._message([block.whole() for block in self._blocks.all], stop_reason))


class StreamedMessage(DeltaStream, _Message):
    """A message that is sent as it comes, event by event."""

    def __init__(self, request: ChatRequest, token: str) -> None:
        super().__init__(request, token)
        self._sent: list[bytes] = []
        self._delta_events: dict[Block, DeltaEvent] = {}

    def _take(self, chunk: OutputChunk) -> bytes:
        choice = self._choice
        self._close_fast_path()
        super()._take(chunk)
        block = self._blocks.growing
        if block is not None and block.kind == "text" and choice.reason is None and choice.final is None:
            # Text is what grows, and more of it may come.
            self._fast_path = self._delta_event(block)
        return self._collect()

    def _close_fast_path(self) -> None:
        if self._fast_path is not None:
            self._fast_path = None
            self._blocks.take_note(self._blocks.all[-1])

    def _report(self, kind: str, members: dict[str, Any]) -> None:
        self._sent.append(named_event(kind, dumps({"type": kind} | members)))

    def _delta_event(self, block: Block) -> DeltaEvent:
        """Return the event that adds to a block of text."""
        event = self._delta_events.get(block)
        if event is None:
            before, after = delta_frame(block)
            first, last = named_event("content_block_delta", b"{}").split(b"{}")
            event = DeltaEvent(first + before, after + last, pieces=(self._choice.pieces, block.pieces))
            self._delta_events[block] = event
        return event

    def finish(self) -> bytes:
        self._close_fast_path()
        return super().finish()

    def _last(self, stop_reason: str) -> bytes:
        return self._collect()

    def _collect(self) -> bytes:
        sent = b"".join(self._sent)
        self._sent.clear()
        return sent


class CountEncoder(Encoder):
    """The answer to ``/v1/messages/count_tokens``: the one number that the handler gives.

    ``kind`` is that of the models that can be asked.
    """

    kind: ClassVar[Kind] = "chat"

    def __init__(self, request: ChatRequest) -> None:
        super().__init__()
        self._count: int | None = None

    def encode(self, value: Any) -> bytes:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"a number of tokens must be an integer, not {type(value).__name__}")
        if value < 0 or self._count is not None:
            raise ValueError("a handler counts once, and the number of tokens is not negative")
        self._count = value
        return b""

    def finish(self) -> bytes:
        if self._count is None:
            raise ValueError("the handler has not given the number of tokens")
        return dumps({"input_tokens": int(self._count)})
