"""A provider for tests, which records what an engine's handler pushes."""

from __future__ import annotations

from typing import Any

import trio


class RecordingProvider:
    """Records what is pushed.

    Attributes:
        pieces: everything, in order.
        first: set with the first piece.
    """

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.first = trio.Event()

    async def push(self, chunk: object) -> None:
        self.pieces.append(chunk)
        self.first.set()
        await trio.lowlevel.checkpoint()

    def end(self) -> None:
        raise AssertionError("engines end by returning")

    def values(self, kind: str) -> list[Any]:
        """Return the values of all pieces of a kind; ``json`` is also the kind of plain objects."""
        return [piece.value for piece in self.pieces if getattr(piece, "kind", "json") == kind]
