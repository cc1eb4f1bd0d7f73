"""Choices: the parallel texts of an answer, and how a handler's JSON objects are added to them.

A handler can express everything that the API knows with a ``dict``, in the same way for streams and for plain answers.
Its dicts are *deltas*: text is appended to text, lists are extended, and a tool call with the index of an earlier one
continues it. The members of a dict mean:

- ``choices``: a list of choices in the API's form (``index``, ``delta`` or ``message`` or ``text``, ``logprobs``,
  ``finish_reason``);
- members of a message (``content``, ``tool_calls``, ``reasoning_content``, ``refusal`` ...), ``delta``, ``message``,
  ``text``, ``logprobs`` and ``finish_reason``: the same for choice 0, without the list;
- ``usage``: a report of usage with details; see ``usage.py``;
- ``id``, ``object``, ``created`` and ``model``: ignored, since the answer has values of its own for these;
- anything else: a member of the answer itself.

So a handler in front of another OpenAI-compatible server may pass on that server's answers and chunks unchanged.
"""

from __future__ import annotations

from typing import Any, Final

import attrs

from ..json_values import dumps, plain

__all__ = ["Choice", "Delta", "Output", "read_output"]

_OWN: Final = frozenset({"id", "object", "created", "model"})
_MESSAGE: Final = frozenset(
    {
        "annotations",
        "audio",
        "content",
        "function_call",
        "reasoning",
        "reasoning_content",
        "refusal",
        "role",
        "tool_calls",
    }
)
_CHOICE: Final = frozenset({"delta", "message", "text", "logprobs", "finish_reason"})


@attrs.frozen
class Delta:
    """What a piece of output adds to a choice."""

    index: int
    """The index of the choice."""
    text: str = ""
    members: dict[str, Any] = attrs.field(factory=dict)
    """Other members of the message."""
    logprobs: Any = None
    reason: str | None = None
    """Why the choice ends with this delta; ``None`` if it does not."""

    @property
    def is_empty(self) -> bool:
        """Whether it adds nothing to the choice; a reason is no addition."""
        return not (self.text or self.members or self.logprobs)


@attrs.frozen
class Output:
    """The parts of a handler's JSON object."""

    deltas: list[Delta]
    extras: dict[str, Any]
    """Members of the answer itself."""
    usage: Any = None
    """The usage object as it was given, unchecked."""


def _require_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{what} must be an object, not {type(value).__name__}")
    return value


def _read_choice(given: dict[str, Any], index: int) -> Delta:
    members: dict[str, Any] = {}
    for name in ("message", "delta"):
        if given.get(name) is not None:
            members |= _require_object(given[name], f"'{name}'")
    members |= {name: value for name, value in given.items() if name in _MESSAGE}
    members.pop("role", None)
    members = {name: value for name, value in members.items() if value is not None}
    text = given.get("text") or ""
    if isinstance(members.get("content"), str):
        text += members.pop("content")
    if not isinstance(text, str):
        raise TypeError("'text' must be a string")
    reason = given.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise TypeError("'finish_reason' must be a string")
    return Delta(index, text, members, given.get("logprobs"), reason)


def read_output(obj: dict[str, Any]) -> Output:
    """Split a handler's JSON object into its parts; the top of this module describes its members.

    Raises:
        TypeError: a member is of the wrong type, or has no JSON form.
        ValueError: a number in it has no JSON form, or it is nested too deeply.
    """
    obj = plain(obj)
    deltas = []
    for i, given in enumerate(obj.pop("choices", None) or ()):
        index = _require_object(given, "a choice").get("index", i)
        if not isinstance(index, int):
            raise TypeError("the 'index' of a choice must be an integer")
        deltas.append(_read_choice(given, index))
    usage = obj.pop("usage", None)
    of_choice = {name: obj.pop(name) for name in list(obj) if name in _MESSAGE or name in _CHOICE}
    if of_choice:
        deltas.append(_read_choice(of_choice, 0))
    return Output(deltas, {name: value for name, value in obj.items() if name not in _OWN}, usage)


def _merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add the members of a delta to those of the whole."""
    for name, value in part.items():
        earlier = whole.get(name)
        if isinstance(value, str) and isinstance(earlier, str):
            whole[name] = earlier + value
        elif isinstance(value, list) and isinstance(earlier, list):
            earlier.extend(value)
        elif isinstance(value, dict) and isinstance(earlier, dict):
            whole[name] = dict(earlier)
            _merge(whole[name], value)
        elif value is not None or name not in whole:
            whole[name] = value


def _read_tool_call(given: Any) -> dict[str, Any]:
    """Return a copy of a handler's tool call, its arguments as text."""
    call = dict(_require_object(given, "a tool call"))
    if call.get("function") is not None:
        function = call["function"] = dict(_require_object(call["function"], "the 'function' of a tool call"))
        if isinstance(function.get("arguments"), dict):
            # In the API, the arguments are text that is JSON; a dict can only mean that text.
            function["arguments"] = dumps(function["arguments"]).decode()
    return call


class Choice:
    """One choice, as far as it has come.

    Args:
        index: its place in the answer.
        answer_id: makes the ids of its tool calls unique.

    Attributes:
        index: its place in the answer.
        pieces: its text so far, in the pieces in which it came.
        final: the whole text, once the handler has given it.
        tool_calls: its tool calls, by the index that they have for the client: 0, 1, ... in the order of their first
            pieces.
        whole_calls: the indices of the calls that came complete, and cannot be continued.
        logprobs: the log probabilities of its tokens, if there are any.
        reason: why it ended, once the handler has given a reason.
    """

    __slots__ = (
        "_id",
        "_members",
        "_numbers",
        "_texts",
        "final",
        "index",
        "logprobs",
        "pieces",
        "reason",
        "tool_calls",
        "whole_calls",
    )

    def __init__(self, index: int, answer_id: str) -> None:
        self.index = index
        self.pieces: list[str] = []
        self.final: str | None = None
        self.tool_calls: dict[int, dict[str, Any]] = {}
        self.whole_calls: set[int] = set()
        self.logprobs: dict[str, Any] | None = None
        self.reason: str | None = None
        self._id = answer_id
        # Members that are text may grow by one token at a time, and are joined when they are read.
        self._texts: dict[str, list[str]] = {}
        # From the handler's index of a call to the client's. A handler may leave gaps, and give some calls no index.
        self._numbers: dict[int, int] = {}
        self._members: dict[str, Any] = {}

    @property
    def members(self) -> dict[str, Any]:
        """Other members of its message."""
        return {name: "".join(pieces) for name, pieces in self._texts.items()} | self._members

    @property
    def all_calls(self) -> list[dict[str, Any]]:
        """Its tool calls, in their order."""
        return [call for _, call in sorted(self.tool_calls.items())]

    @property
    def text(self) -> str:
        """Its whole text."""
        return self.final if self.final is not None else "".join(self.pieces)

    @property
    def finish_reason(self) -> str:
        """Why it ended: the handler's reason, or else the one that follows from what is in it."""
        if self.reason is not None:
            return self.reason
        if self.tool_calls:
            return "tool_calls"
        return "function_call" if "function_call" in self._members else "stop"

    def add(self, delta: Delta) -> Delta:
        """Add a delta, and return it in the form in which it can be sent.

        Raises:
            TypeError: its tool calls are malformed.
            ValueError: the choice has ended.
        """
        if not delta.is_empty:
            self.require_open()
        if delta.text:
            self.add_text(delta.text)
        members = dict(delta.members)
        if "tool_calls" in members:
            members["tool_calls"] = self._add_tool_calls(members["tool_calls"])
        for name, value in members.items():
            if isinstance(value, str):
                self._texts.setdefault(name, []).append(value)
            elif name != "tool_calls":
                _merge(self._members, {name: value})
        if isinstance(delta.logprobs, dict):
            self.logprobs = self.logprobs or {}
            _merge(self.logprobs, delta.logprobs)
        if delta.reason is not None:
            self.reason = delta.reason
        return attrs.evolve(delta, members=members)

    def add_text(self, text: str) -> None:
        """Add a piece of text.

        Raises:
            ValueError: the choice has ended, or its text has.
        """
        self.require_open()
        if self.final is not None:
            raise ValueError(f"more text for choice {self.index} after its final text")
        self.pieces.append(text)

    def add_reasoning(self, text: str) -> None:
        """Add a piece of reasoning.

        Raises:
            ValueError: the choice has ended.
        """
        self.require_open()
        self._texts.setdefault("reasoning_content", []).append(text)

    def add_call(self, call: dict[str, Any]) -> Delta:
        """Add a tool call, or a piece of one, as ``OutputChunk.tool_call`` makes them, and return what can be sent.

        Raises:
            ValueError: the choice has ended, the id is that of another call, or the name is not that of the same call.
        """
        name, index, call_id = call["function"]["name"], call["index"], call["id"]
        earlier = self.tool_calls.get(self._numbers.get(index, -1))
        if earlier is None:
            if call_id and any(call_id == each["id"] for each in self.tool_calls.values()):
                raise ValueError(f"a second tool call with the id {call_id!r}")
        elif (before := earlier.get("function", {}).get("name")) not in (None, name):
            raise ValueError(f"tool call {index} is one of {before!r}, not of {name!r}")
        return self.add(Delta(self.index, members={"tool_calls": [call]}))

    def take_final(self, text: str) -> str:
        """Take the whole text, and return the part of it that follows the pieces.

        That part is empty if the text does not begin with the pieces.

        Raises:
            ValueError: the choice has ended, or there was a final text before.
        """
        self.require_open()
        if self.final is not None:
            raise ValueError(f"a second final text for choice {self.index}")
        seen = "".join(self.pieces)
        self.final = text
        return text[len(seen) :] if text.startswith(seen) else ""

    def require_open(self) -> None:
        """Raise ``ValueError`` if the choice has ended."""
        if self.reason is not None:
            raise ValueError(f"choice {self.index} has already ended with {self.reason!r}")

    def _add_tool_calls(self, given: Any) -> list[dict[str, Any]]:
        if not isinstance(given, list):
            raise TypeError("'tool_calls' must be a list")
        return [self._add_tool_call(_read_tool_call(call)) for call in given]

    def _add_tool_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Add a tool call or a piece of one, and return what can be sent."""
        index = self._client_index(call.pop("index", None))
        whole = self.tool_calls.get(index)
        if whole is None:
            if not call.get("id"):
                call["id"] = f"call_{self._id}_{self.index}_{index}"
            call.setdefault("type", "function")
            self.tool_calls[index] = dict(call)
        else:
            # The id, the type and the name of a call are sent once. Only the rest grows.
            call = {name: value for name, value in call.items() if name not in ("id", "type")}
            for kind in ("function", "custom"):
                tool = call.get(kind)
                if isinstance(tool, dict) and "name" in (whole.get(kind) or ()):
                    call[kind] = {name: value for name, value in tool.items() if name != "name"}
            _merge(whole, call)
        return {"index": index} | call

    def _client_index(self, index: Any) -> int:
        """Return the client's index of a call, given the handler's; a call without one is new and complete."""
        following = len(self.tool_calls)
        if index is None:
            self.whole_calls.add(following)
            return following
        if type(index) is not int or index < 0:
            raise TypeError("the 'index' of a tool call must be a non-negative integer")
        return self._numbers.setdefault(index, following)
