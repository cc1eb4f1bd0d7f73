"""The content blocks of a message of the Messages API, in the order in which a model makes them.

Theory of operation
===================

A message is a list of blocks: text, thinking, calls of tools. In a stream, a block begins with an event, grows by
others, and ends with one before the next block begins: only one block is *open* at a time. Models do not always keep to
that: a handler may give the pieces of two calls in turns. So a block that begins while an incomplete call is open
waits, with the text that it gets, until that call is complete: it was given whole, or its arguments are a complete JSON
object, or the answer ends. Text and thinking end when anything else begins, so nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import msgspec

from ..json_values import dumps

__all__ = ["Block", "BlockKind", "Blocks", "Report", "delta_frame"]

BlockKind: TypeAlias = Literal["text", "thinking", "redacted_thinking", "tool_use"]

#: Takes the type of an event, and its other members.
Report: TypeAlias = Callable[[str, dict[str, Any]], None]

#: What a call has in place of arguments that are no JSON object, so that a client does not take them for others.
_INVALID: Final = "INVALID_JSON"

#: The type of a delta that adds to a block, and the member with what it adds.
_DELTAS: Final[dict[str, tuple[str, str]]] = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


class Block:
    """One block, as far as it has come.

    Attributes:
        kind: the type of the block.
        index: its place in the message.
        pieces: the pieces of its text so far: text, thinking, or the arguments of a call.
        id, name: those of a call; its name may come later than its first piece.
        signature: what a client must send back with thinking; empty if there is none.
        data: the content of thinking that is encrypted.
        complete: nothing can be added to it.
    """

    __slots__ = ("complete", "data", "id", "index", "kind", "name", "pieces", "sent", "signature")

    def __init__(self, kind: BlockKind, index: int) -> None:
        self.kind: BlockKind = kind
        self.index = index
        self.pieces: list[str] = []
        self.id = self.name = self.signature = self.data = ""
        self.complete = False
        # Pieces that were reported.
        self.sent = 0

    @property
    def text(self) -> str:
        """Its text so far."""
        return "".join(self.pieces)

    def beginning(self) -> dict[str, Any]:
        """Return the block as the event that begins it has it."""
        if self.kind == "tool_use":
            return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        if self.kind == "redacted_thinking":
            return {"type": "redacted_thinking", "data": self.data}
        return {"type": "text", "text": ""}

    def whole(self) -> dict[str, Any]:
        """Return the block as a plain answer has it."""
        if self.kind == "tool_use":
            return self.beginning() | {"input": _arguments(self.text)}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": self.text, "signature": self.signature}
        return self.beginning() if self.kind == "redacted_thinking" else {"type": "text", "text": self.text}

    @property
    def may_end(self) -> bool:
        """Whether another block may be opened after it, although the answer goes on."""
        return self.complete or self.kind != "tool_use" or _is_object(self.text)


def _is_object(text: str) -> bool:
    return text.rstrip().endswith("}") and isinstance(_decoded(text), dict)


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _arguments(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    arguments = _decoded(text)
    return arguments if isinstance(arguments, dict) else {_INVALID: text}


class Blocks:
    """The blocks of one message.

    Args:
        report: called with every event of a block.

    Attributes:
        all: the blocks, in order.
    """

    def __init__(self, report: Report) -> None:
        self.all: list[Block] = []
        self._report = report
        self._calls: dict[int, Block] = {}
        # The index of the block that is open, or would be next, and whether it is open.
        self._current = 0
        self._is_open = False

    @property
    def growing(self) -> Block | None:
        """The block that is open, if it is the last one and not complete."""
        if not self._is_open or self._current != len(self.all) - 1 or self.all[-1].complete:
            return None
        return self.all[-1]

    def add(self, kind: Literal["text", "thinking"], text: str) -> Block:
        """Add text to the last block, if that is of this kind and not complete, or else to a new one."""
        last = self.all[-1] if self.all else None
        block = last if last is not None and last.kind == kind and not last.complete else self._new(kind)
        block.pieces.append(text)
        self._settle()
        return block

    def sign(self, signature: str) -> None:
        """Complete the last block of thinking with its signature; begin an empty one if there is none."""
        last = self.all[-1] if self.all else None
        if last is None or last.kind != "thinking" or last.complete:
            last = self._new("thinking")
        last.signature, last.complete = signature, True
        self._settle()

    def add_redacted(self, data: str) -> None:
        """Add a block of encrypted thinking."""
        block = self._new("redacted_thinking")
        block.data, block.complete = data, True
        self._settle()

    def call(self, index: int, call_id: str, name: str, arguments: str, *, complete: bool) -> None:
        """Add to the call of an index; begin it if necessary.

        Args:
            index: the client's index of the call.
            call_id: its id.
            name: its tool; empty if it is not known yet.
            arguments: what is added to its arguments.
            complete: nothing more will be added.

        Raises:
            ValueError: the call has ended already, because its arguments were complete and others have begun.
        """
        block = self._calls.get(index)
        if block is None:
            block = self._calls[index] = self._new("tool_use")
            block.id = call_id
        block.name = name
        if block.index < self._current and arguments.strip():
            raise ValueError(f"more arguments for tool call {index} after they were complete")
        if arguments and block.index >= self._current:
            block.pieces.append(arguments)
        block.complete = block.complete or complete
        self._settle()

    def end_all(self) -> None:
        """End all blocks that have not ended."""
        for block in self.all:
            block.complete = True
        self._settle()

    def replace_text(self, text: str) -> None:
        """Replace the first text by ``text``, and remove all others.

        To be called when all blocks have ended, and not for streams, which cannot take text back.
        """
        first, *others = [block for block in self.all if block.kind == "text"]
        first.pieces = [text]
        self.all = [block for block in self.all if block not in others]

    def take_note(self, block: Block) -> None:
        """Take the pieces of a block as reported; to be called by what reports them itself."""
        block.sent = len(block.pieces)

    def _new(self, kind: BlockKind) -> Block:
        block = Block(kind, len(self.all))
        self.all.append(block)
        return block

    def _settle(self) -> None:
        """Report as much as the order of the blocks allows."""
        while self._current < len(self.all):
            block = self.all[self._current]
            if not self._is_open:
                if block.kind == "tool_use" and not (block.name or block.complete):
                    return
                self._is_open = True
                self._report(
                    "content_block_start", {"index": block.index, "content_block": block.beginning()}
                )
            if block.sent < len(block.pieces):
                text = "".join(block.pieces[block.sent :])
                block.sent = len(block.pieces)
                kind, member = _DELTAS[block.kind]
                self._report_delta(block, {"type": kind, member: text})
            if self._current == len(self.all) - 1 and not block.complete:
                return
            if not block.may_end:
                return
            self._close(block)

    def _close(self, block: Block) -> None:
        if block.signature:
            self._report_delta(block, {"type": "signature_delta", "signature": block.signature})
        self._report("content_block_stop", {"index": block.index})
        self._is_open = False
        self._current += 1

    def _report_delta(self, block: Block, delta: dict[str, Any]) -> None:
        self._report("content_block_delta", {"index": block.index, "delta": delta})


def delta_frame(block: Block) -> tuple[bytes, bytes]:
    """Return the JSON of the event that adds to a block: the bytes before and after the JSON string that it adds."""
    kind, member = _DELTAS[block.kind]
    same = dumps({"type": "content_block_delta", "index": block.index, "delta": {"type": kind}})
    return same.removesuffix(b"}}") + b',"%s":' % member.encode("ascii"), b"}}"
