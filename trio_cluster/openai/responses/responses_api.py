"""Answers to ``/v1/responses``, streamed and plain.

A handler gives the same output as for a chat, with the same meaning; here it becomes items. Both encoders report what
happens as events. The encoder of plain answers ignores the events and writes the response at the end. That of streams
writes each event, and the same response in the last one.

There is no ``[DONE]``. A stream that ends with ``response.completed`` or ``response.incomplete`` is complete. One that
fails ends with ``response.failed``, which the gateway writes (see ``../failures.py``), and any other was cut.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import attrs

from trio_cluster.core.model import Kind

from ..json_values import dumps
from ..requests.types import ChatRequest
from ..sse import named_event
from ..tool_names import CallName, callable_names
from .choices import Choice, Delta, read_output
from .chunks import OutputChunk
from .delta_stream import DeltaEvent, DeltaStream
from .encoder import Encoder
from .responses_api_items import REASONING, REFUSAL, SUMMARY, TEXT, Form, Item, Items

__all__ = ["PlainResponse", "StreamedResponse"]

#: The finish reasons that leave a response incomplete, and their names on this route.
_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}

#: Members of a response that repeat fields of the request, and their values if the client did not send them.
_REPEATED: Final[dict[str, Any]] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "temperature": 1.0,
    "tool_choice": "auto",
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}

#: The members of a tool that the client need not send.
_TOOL: Final[dict[str, Any]] = {"description": None, "parameters": None, "strict": None}


class _Response(Encoder):
    """The common part of both encoders: it makes items of what a handler gives."""

    kind: ClassVar[Kind] = "chat"

    def __init__(self, request: ChatRequest, token: str, created: int) -> None:
        super().__init__()
        self._request = request
        self._id = f"resp_{token}"
        self._created = created
        self._choice = Choice(0, token)
        self._items = Items(token, self._report)
        self._extras: dict[str, Any] = {}
        reasoning = request.raw.get("reasoning") or {}
        summary = reasoning.get("summary") or reasoning.get("generate_summary")
        self._reasoning = SUMMARY if summary else REASONING
        self._names = callable_names(request.raw.get("tools"))
        self._begun = False

    def _report(self, kind: str, members: dict[str, Any]) -> None:
        """Take an event: its type and its other members."""

    def _grow(self, item: Item, text: str, logprobs: list[dict[str, Any]] | None = None) -> None:
        """Add text to an item."""
        item.pieces.append(text)
        if logprobs:
            item.logprobs.extend(logprobs)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            response = self._response("in_progress", None)
            self._report("response.created", {"response": response})
            self._report("response.in_progress", {"response": response})

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
            self._add(TEXT, chunk.value)
        elif chunk.kind == "reasoning":
            choice.add_reasoning(chunk.value)
            self._add(self._reasoning, chunk.value)
        elif chunk.kind == "final_text":
            self._take_final(chunk.value)
        elif chunk.kind == "tool_call":
            self._take_calls(choice.add_call(chunk.value))
        else:
            self._refuse(chunk)
        return b""

    def _require_only(self, index: int) -> None:
        if index:
            raise ValueError(f"there is no choice {index}: a response has only one")

    def _add(self, form: Form, text: str) -> None:
        if text:
            self._grow(self._items.text(form), text)

    def _take_final(self, text: str) -> None:
        self._add(TEXT, self._choice.take_final(text))

    def _take_object(self, obj: dict[str, Any]) -> None:
        output = read_output(obj)
        self._usage.take_object(output.usage)
        self._extras |= output.extras
        if output.extras:
            self._begin()
        for delta in output.deltas:
            self._require_only(delta.index)
            self._take_delta(delta)

    def _take_delta(self, delta: Delta) -> None:
        content = delta.members.get("content")
        if isinstance(content, list):
            # The content of the message has parts. Only their text can be a part of a response.
            delta = attrs.evolve(delta, text=delta.text + "".join(map(_text_of, content)))
        if not delta.is_empty:
            self._begin()
        sendable = self._choice.add(delta)
        members = sendable.members
        # Some servers are changing the name, and give both meanwhile.
        reasoning = members.get("reasoning_content") or members.get("reasoning")
        if isinstance(reasoning, str):
            self._add(self._reasoning, reasoning)
        logprobs = _logprobs(delta.logprobs)
        if delta.text or logprobs:
            self._grow(self._items.text(TEXT), delta.text, logprobs)
        if isinstance(refusal := members.get("refusal"), str):
            self._add(REFUSAL, refusal)
        self._take_calls(sendable)

    def _take_calls(self, sendable: Delta) -> None:
        for piece in sendable.members.get("tool_calls", ()):
            index: int = piece["index"]
            whole = self._choice.tool_calls[index]
            kind, member = ("custom", "input") if whole.get("custom") else ("function", "arguments")
            tool, text = whole.get(kind), (piece.get(kind) or {}).get(member) or ""
            if tool is None or not isinstance(text, str):
                raise TypeError(
                    "a tool call in a response must be one of a function, its arguments text, or of a custom tool"
                )
            flat = tool.get("name") or ""
            name = self._names.get(flat) or CallName(flat, is_custom=kind == "custom")
            item = self._items.call(index, whole["id"], name, is_custom=name.is_custom)
            if text:
                self._grow(item, text)
            if index in self._choice.whole_calls:
                self._items.end(item)

    def finish(self) -> bytes:
        self._begin()
        if not self._items.all:
            # A handler that gave nothing has answered with an empty text.
            self._items.text(TEXT)
        self.finish_reasons = reason = self._choice.finish_reason
        why = _INCOMPLETE.get(reason)
        status = "completed" if why is None else "incomplete"
        self._items.end_all(status)
        response = self._response(status, why)
        self._report(f"response.{status}", {"response": response})
        return self._last(response)

    def _last(self, response: dict[str, Any]) -> bytes:
        raise NotImplementedError

    def _response(self, status: str, why: str | None) -> dict[str, Any]:
        asked = self._request.raw
        own = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None if why is None else {"reason": why},
            "model": self._request.model,
            "output": [item.whole() for item in self._items.all],
            "previous_response_id": asked.get("previous_response_id"),
            "reasoning": {"effort": None, "summary": None} | (asked.get("reasoning") or {}),
            "service_tier": "default",
            "store": asked.get("store") is not False,
            "text": {"format": {"type": "text"}} | _given(asked.get("text")),
            "tools": [
                _TOOL | tool if tool["type"] == "function" else tool for tool in asked.get("tools") or ()
            ],
            "usage": None if status == "in_progress" else self._usage_object(),
        }
        if (conversation := asked.get("conversation")) is not None:
            own["conversation"] = {"id": conversation} if isinstance(conversation, str) else conversation
        for name, default in _REPEATED.items():
            value = asked.get(name)
            own[name] = default if value is None else value
        return self._extras | own

    def _usage_object(self) -> dict[str, Any]:
        usage = self._usage
        details = dict(usage.details)
        of_input = _given(details.pop("prompt_tokens_details", None)) | _given(
            details.pop("input_tokens_details", None)
        )
        of_output = _given(details.pop("completion_tokens_details", None)) | _given(
            details.pop("output_tokens_details", None)
        )
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0} | of_input,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0} | of_output,
            "total_tokens": usage.total_tokens,
        } | details


def _given(value: Any) -> dict[str, Any]:
    """Return the members of an object that are not ``null``."""
    return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else {}


def _text_of(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else ""


def _logprobs(logprobs: Any) -> list[dict[str, Any]]:
    """Return the tokens of a chat's ``logprobs`` in the form of this route, where ``bytes`` must be there."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    return [
        token
        | {
            "bytes": token.get("bytes") or [],
            "top_logprobs": [
                each | {"bytes": each.get("bytes") or []} for each in token.get("top_logprobs") or ()
            ],
        }
        for token in tokens or ()
    ]


class PlainResponse(_Response):
    """A response that is sent when it is complete."""

    def _take_final(self, text: str) -> None:
        revises = not text.startswith("".join(self._choice.pieces))
        super()._take_final(text)
        if revises:
            self._items.replace_text(text)

    def _last(self, response: dict[str, Any]) -> bytes:
        return dumps(response)


class StreamedResponse(DeltaStream, _Response):
    """A response that is sent as it comes, event by event."""

    def __init__(self, request: ChatRequest, token: str, created: int) -> None:
        super().__init__(request, token, created)
        self._sent: list[bytes] = []
        self._delta_events: dict[Item, DeltaEvent] = {}

    def _take(self, chunk: OutputChunk) -> bytes:
        self._fast_path = None
        super()._take(chunk)
        choice, item = self._choice, self._items.growing
        if item is not None and item.form is TEXT and choice.reason is None and choice.final is None:
            # Text is what grows, and more of it may come.
            self._fast_path = self._delta_event(item)
        return self._collect()

    def _report(self, kind: str, members: dict[str, Any]) -> None:
        data = {"type": kind, "sequence_number": self._next_number} | members
        self._next_number += 1
        self._sent.append(named_event(kind, dumps(data)))

    def _grow(self, item: Item, text: str, logprobs: list[dict[str, Any]] | None = None) -> None:
        super()._grow(item, text, logprobs)
        if logprobs:
            self._report(f"{item.form.events}.delta", item.place | {"delta": text, "logprobs": logprobs})
            return
        self._sent.append(self._delta_event(item).write(text, self._next_number))
        self._next_number += 1

    def _delta_event(self, item: Item) -> DeltaEvent:
        """Return the event that adds to an item."""
        delta = self._delta_events.get(item)
        if delta is None:
            kind = f"{item.form.events}.delta"
            same = dumps({"type": kind} | item.place | item.extras)
            before, after = same.removesuffix(b"}") + b',"delta":', b',"sequence_number":%d}'
            first, last = named_event(kind, b"{}").split(b"{}")
            pieces = (self._choice.pieces, item.pieces)
            delta = DeltaEvent(first + before, after + last, is_numbered=True, pieces=pieces)
            self._delta_events[item] = delta
        return delta

    def _last(self, response: dict[str, Any]) -> bytes:
        self._fast_path = None
        return self._collect()

    def _collect(self) -> bytes:
        sent = b"".join(self._sent)
        self._sent.clear()
        return sent
