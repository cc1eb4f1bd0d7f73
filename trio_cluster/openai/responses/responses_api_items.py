"""The items of a response: messages, reasoning and function calls, in the order in which a model makes them.

Theory of operation
===================

Where a chat has one message with several members, a response has a list of *items*. In each item one text grows: that
of a message, a refusal, reasoning, or the arguments of a call. In a stream, an item begins with events that announce
it, continues with one event for each piece, and ends with events that repeat all of it.

A message or a reasoning item ends when anything else begins; more of the same kind after that is a new item. Calls are
different: a model may make several at once, and continue any of them. So a call ends when it has come complete, or else
with the response.

Nothing is ever taken back, so an item keeps its place from its beginning: ``output_index`` and id are valid for the
whole stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import attrs

from ..tool_names import CallName

__all__ = [
    "CALL",
    "CUSTOM_CALL",
    "REASONING",
    "REFUSAL",
    "SUMMARY",
    "TEXT",
    "Form",
    "Item",
    "Items",
    "Report",
]

#: Takes the type of an event, and its other members.
Report: TypeAlias = Callable[[str, dict[str, Any]], None]


@attrs.frozen
class Form:
    """The JSON form of an item."""

    type: str
    """The ``type`` of the item."""
    prefix: str
    """The beginning of its id."""
    events: str
    """The beginning of the types of the events about its text."""
    member: str
    """The name of the member with the text that grows."""
    part: str | None
    """The type of the content part that has this member; ``None``: the item itself has it."""
    part_events: str = "response.content_part"
    """The beginning of the types of the events about that part."""
    index: str = "content_index"
    """The member of an event with the place of that part."""


TEXT: Final = Form("message", "msg", "response.output_text", "text", "output_text")
REFUSAL: Final = Form("message", "msg", "response.refusal", "refusal", "refusal")
REASONING: Final = Form("reasoning", "rs", "response.reasoning_text", "text", "reasoning_text")
#: Reasoning for clients that have asked for a summary of it: most of them show nothing else.
SUMMARY: Final = Form(
    "reasoning",
    "rs",
    "response.reasoning_summary_text",
    "text",
    "summary_text",
    "response.reasoning_summary_part",
    "summary_index",
)
CALL: Final = Form("function_call", "fc", "response.function_call_arguments", "arguments", None)
CUSTOM_CALL: Final = Form("custom_tool_call", "ctc", "response.custom_tool_call_input", "input", None)


class Item:
    """One item, as far as it has come.

    Attributes:
        form: its JSON form.
        id: the id of the item.
        index: its place in the output.
        pieces: the pieces of its text so far.
        logprobs: the log probabilities of the tokens of a message, in the form of this API.
        status: ``in_progress``, ``completed`` or ``incomplete``.
        call_id: the id of a call, which its result refers to.
        name: the function of a call, as the client knows it.
        namespace: the namespace that it is in; ``None`` if it is in none.
    """

    __slots__ = ("call_id", "form", "id", "index", "logprobs", "name", "namespace", "pieces", "status")

    def __init__(self, form: Form, item_id: str, index: int) -> None:
        self.form = form
        self.id = item_id
        self.index = index
        self.pieces: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.status = "in_progress"
        self.call_id = ""
        self.name = ""
        self.namespace: str | None = None

    @property
    def text(self) -> str:
        """Its text so far."""
        return "".join(self.pieces)

    @property
    def place(self) -> dict[str, Any]:
        """The members of an event that identify the item."""
        place: dict[str, Any] = {"item_id": self.id, "output_index": self.index}
        return place if self.form.part is None else place | {self.form.index: 0}

    @property
    def extras(self) -> dict[str, Any]:
        """Members that an event about the text of this item must have, even if they are empty."""
        return {"logprobs": []} if self.form is TEXT else {}

    def part(self) -> dict[str, Any]:
        """Return the content part with the text."""
        part: dict[str, Any] = {"type": self.form.part, self.form.member: self.text}
        return part | {"annotations": [], "logprobs": self.logprobs} if self.form is TEXT else part

    def whole(self) -> dict[str, Any]:
        """Return the item. While it is in progress it has no content, since other events announce its parts."""
        item: dict[str, Any] = {"id": self.id, "type": self.form.type, "status": self.status}
        if self.form is CALL or self.form is CUSTOM_CALL:
            call = {"call_id": self.call_id, "name": self.name, self.form.member: self.text}
            return item | call | ({} if self.namespace is None else {"namespace": self.namespace})
        content = [] if self.status == "in_progress" else [self.part()]
        if self.form is REASONING:
            return item | {"summary": [], "content": content}
        if self.form is SUMMARY:
            return item | {"summary": content, "content": []}
        return item | {"role": "assistant", "content": content}

    def beginning(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the events that begin the item; to be called while its text is empty."""
        yield "response.output_item.added", {"output_index": self.index, "item": self.whole()}
        if self.form.part is not None:
            yield f"{self.form.part_events}.added", self.place | {"part": self.part()}

    def ending(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the events that end the item; to be called when it is no longer in progress."""
        done = self.place | {self.form.member: self.text}
        if self.form is CALL:
            done["name"] = self.name
        elif self.form is TEXT:
            done["logprobs"] = self.logprobs
        yield f"{self.form.events}.done", done
        if self.form.part is not None:
            yield f"{self.form.part_events}.done", self.place | {"part": self.part()}
        yield "response.output_item.done", {"output_index": self.index, "item": self.whole()}


class Items:
    """The items of one response.

    Args:
        token: makes the ids of the items unique.
        report: called with every event that begins or ends an item.

    Attributes:
        all: the items, in order.
        growing: the message or the reasoning item that has not ended, if there is one.
    """

    def __init__(self, token: str, report: Report) -> None:
        self.all: list[Item] = []
        self.growing: Item | None = None
        self._calls: dict[int, Item] = {}
        self._token = token
        self._report = report

    def text(self, form: Form) -> Item:
        """Return the message or the reasoning item that text of this form is added to; begin one if necessary."""
        item = self.growing
        if item is None or item.form is not form:
            item = self.growing = self._begin(self._new(form))
        return item

    def call(self, index: int, call_id: str, name: CallName, *, is_custom: bool) -> Item:
        """Return the call of an index; begin it if necessary.

        Args:
            index: the client's index of the call.
            call_id: the id of a call that begins.
            name: its tool, as the client knows it; with an empty name if it is not known yet.
            is_custom: a call that begins is one of a custom tool.
        """
        item = self._calls.get(index)
        if item is None:
            item = self._calls[index] = self._new(CUSTOM_CALL if is_custom else CALL)
            item.call_id, item.name, item.namespace = call_id, name.name, name.namespace
            self._begin(item)
        elif not item.name:
            item.name, item.namespace = name.name, name.namespace
        return item

    def end(self, item: Item, status: str = "completed") -> None:
        """End an item, unless it has ended."""
        if item.status == "in_progress":
            item.status = status
            self._report_all(item.ending())

    def end_all(self, status: str) -> None:
        """End all items that have not ended."""
        self.growing = None
        for item in self.all:
            self.end(item, status)

    def replace_text(self, text: str) -> None:
        """Replace the first text by ``text``, and remove all others. Not for streams, which cannot take text back."""
        first, *others = [item for item in self.all if item.form is TEXT]
        first.pieces, first.logprobs = [text], []
        self.all = [item for item in self.all if item not in others]

    def _new(self, form: Form) -> Item:
        return Item(form, f"{form.prefix}_{self._token}_{len(self.all)}", len(self.all))

    def _begin(self, item: Item) -> Item:
        if self.growing is not None:
            self.end(self.growing)
            self.growing = None
        self.all.append(item)
        self._report_all(item.beginning())
        return item

    def _report_all(self, events: Iterator[tuple[str, dict[str, Any]]]) -> None:
        for kind, members in events:
            self._report(kind, members)
