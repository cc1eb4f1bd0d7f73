"""The items of a response: messages, reasoning and function calls, in the order in which a model makes them.

Theory of operation
===================

Where a chat has one message with several members, a response has a list of *items*. Each has one thing in it that
grows: a text, a refusal, reasoning, or the arguments of a call. In a stream an item begins with events that say what
it is, goes on with one event for each piece, and ends with events that say all of it once more.

A message or a piece of reasoning is over when anything else begins; if there is more of it afterwards, that is a new
item. A call is different: a model may make several at once, and go on with any of them. So calls are over when they
have come whole, or else when the response is.

Nothing is ever taken back, so an item keeps its place from the moment it begins: ``output_index`` and id are good for
the whole stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import attrs

__all__ = ["CALL", "REASONING", "REFUSAL", "TEXT", "Form", "Item", "Items", "Tell"]

#: Takes the type of an event, and its members.
Tell: TypeAlias = Callable[[str, dict[str, Any]], None]


@attrs.frozen
class Form:
    """What an item looks like."""

    type: str
    prefix: str
    """How its id begins."""
    events: str
    """How the names of the events about its growth begin."""
    member: str
    """What that which grows is called."""
    part: str | None
    """The type of the content part that grows; ``None`` where the item itself does."""


TEXT: Final = Form("message", "msg", "response.output_text", "text", "output_text")
REFUSAL: Final = Form("message", "msg", "response.refusal", "refusal", "refusal")
REASONING: Final = Form("reasoning", "rs", "response.reasoning_text", "text", "reasoning_text")
CALL: Final = Form("function_call", "fc", "response.function_call_arguments", "arguments", None)


class Item:
    """One item as far as it is known.

    Attributes:
        form: what it looks like.
        id: its own id.
        index: its place in the output.
        pieces: what has grown so far.
        logprobs: of the tokens of a text, in the form of this API.
        status: ``in_progress``, ``completed`` or ``incomplete``.
        call_id: what a call is called by whoever answers it.
        name: the function that a call is for.
    """

    __slots__ = ("call_id", "form", "id", "index", "logprobs", "name", "pieces", "status")

    def __init__(self, form: Form, item_id: str, index: int) -> None:
        self.form = form
        self.id = item_id
        self.index = index
        self.pieces: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.status = "in_progress"
        self.call_id = ""
        self.name = ""

    @property
    def text(self) -> str:
        """All that has grown."""
        return "".join(self.pieces)

    @property
    def place(self) -> dict[str, Any]:
        """The members that tell which item an event is about."""
        place: dict[str, Any] = {"item_id": self.id, "output_index": self.index}
        return place if self.form.part is None else place | {"content_index": 0}

    @property
    def extras(self) -> dict[str, Any]:
        """What an event about the growth of this item has besides, if there is nothing in it."""
        return {"logprobs": []} if self.form is TEXT else {}

    def part(self) -> dict[str, Any]:
        """Return the content part that grows."""
        part: dict[str, Any] = {"type": self.form.part, self.form.member: self.text}
        return part | {"annotations": [], "logprobs": self.logprobs} if self.form is TEXT else part

    def whole(self) -> dict[str, Any]:
        """Return the item. While it is in progress, its content has not been announced, and is not there."""
        item: dict[str, Any] = {"id": self.id, "type": self.form.type, "status": self.status}
        if self.form is CALL:
            return item | {"call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [] if self.status == "in_progress" else [self.part()]
        if self.form is REASONING:
            return item | {"summary": [], "content": content}
        return item | {"role": "assistant", "content": content}

    def beginning(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the events with which it begins; to be called before anything has grown."""
        yield "response.output_item.added", {"output_index": self.index, "item": self.whole()}
        if self.form.part is not None:
            yield "response.content_part.added", self.place | {"part": self.part()}

    def ending(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the events with which it ends; to be called when it is no longer in progress."""
        done = self.place | {self.form.member: self.text}
        if self.form is CALL:
            done["name"] = self.name
        elif self.form is TEXT:
            done["logprobs"] = self.logprobs
        yield f"{self.form.events}.done", done
        if self.form.part is not None:
            yield "response.content_part.done", self.place | {"part": self.part()}
        yield "response.output_item.done", {"output_index": self.index, "item": self.whole()}


class Items:
    """All items of one response.

    Args:
        token: what is unique about the response, for the ids of its items.
        tell: is told of every beginning and every end.

    Attributes:
        all: the items, in order.
        growing: the message or the reasoning that is not over.
    """

    def __init__(self, token: str, tell: Tell) -> None:
        self.all: list[Item] = []
        self.growing: Item | None = None
        self._calls: dict[int, Item] = {}
        self._token = token
        self._tell = tell

    def text(self, form: Form) -> Item:
        """Return the message or the reasoning to which more is to be added."""
        item = self.growing
        if item is None or item.form is not form:
            item = self.growing = self._begin(self._new(form))
        return item

    def call(self, index: int, call_id: str, name: str) -> Item:
        """Return the call of an index to which more is to be added."""
        item = self._calls.get(index)
        if item is None:
            item = self._calls[index] = self._new(CALL)
            item.call_id, item.name = call_id, name
            self._begin(item)
        elif not item.name:
            item.name = name
        return item

    def end(self, item: Item, status: str = "completed") -> None:
        """End an item, if that has not been done."""
        if item.status == "in_progress":
            item.status = status
            self._tell_all(item.ending())

    def end_all(self, status: str) -> None:
        """End all that is left."""
        self.growing = None
        for item in self.all:
            self.end(item, status)

    def replace_text(self, text: str) -> None:
        """Make ``text`` the only text there is, in place of the first one. Not for answers of which a part is sent."""
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
        self._tell_all(item.beginning())
        return item

    def _tell_all(self, events: Iterator[tuple[str, dict[str, Any]]]) -> None:
        for kind, members in events:
            self._tell(kind, members)
