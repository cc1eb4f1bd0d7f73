"""Streams of text, and their fast path for a plain ``str``.

Theory of operation
===================

In a stream of text, most events differ from the one before in nothing but the text that they add, and, on one route, in
their number. So the bytes around the text are encoded once for each text that grows, and kept in a
:class:`DeltaEvent`. Such an event then costs the encoding of one string and one concatenation.

Most of what handlers give is a plain ``str``, one for each token. On the way through ``Encoder.encode`` a token costs
about ten calls: what does the value mean, which choice is it for, may its text still grow? While a text grows, the
answers stay the same. So a stream that knows them opens the *fast path*: it sets ``_fast_path`` to the event of the
text that a plain ``str`` belongs to, and :meth:`DeltaStream.encode` then does without those calls.

The rule for subclasses: ``_fast_path`` is ``None`` whenever a plain ``str`` would do anything but add to that text,
for instance after the text has ended, or after another one has begun. An empty ``str`` never takes the fast path,
since it makes no event.
"""

from __future__ import annotations

from typing import Any

import attrs

from trio_cluster.core.answer import Head

from ..json_values import dumps
from .encoder import SSE_HEAD, Encoder

__all__ = ["DeltaEvent", "DeltaStream"]


@attrs.frozen(eq=False)
class DeltaEvent:
    """The event that adds to one text, encoded but for the added text and the event's number."""

    before: bytes
    """The event's bytes before the JSON string that it adds."""
    after: bytes
    """Its bytes after that. If events are numbered, with a place for the number, ``%d``; else they are sent as they
    are."""
    is_numbered: bool = False
    pieces: tuple[list[str], ...] = ()
    """Where the pieces of the text are collected. Only the fast path adds to these."""

    def write(self, text: str, number: int = 0) -> bytes:
        """Return the event that adds ``text``, with its number if it has one."""
        return self.before + dumps(text) + (self.after % number if self.is_numbered else self.after)


class DeltaStream(Encoder):
    """The encoding of an answer that is streamed as text; see the top of this module."""

    streaming = True
    head: Head = SSE_HEAD
    #: What a plain ``str`` is encoded as, without being looked at any further.
    _fast_path: DeltaEvent | None = None
    #: The number of the next event, where events are numbered.
    _next_number: int = 0

    def encode(self, value: Any) -> bytes:
        event = self._fast_path
        if event is None or type(value) is not str or not value:
            return super().encode(value)
        for pieces in event.pieces:
            pieces.append(value)
        if not event.is_numbered:
            return event.before + dumps(value) + event.after
        number = self._next_number
        self._next_number = number + 1
        return event.before + dumps(value) + event.after % number
