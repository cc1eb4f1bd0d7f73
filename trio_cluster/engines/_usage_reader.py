"""Reading the tokens of a server's answer from its bytes, while they pass.

Theory of operation
===================

An answer is neither collected nor parsed for its usage; it may have 60 MB. Every piece is searched for the key
``"usage"`` with an object behind it, and only where there is one, something is parsed. This is cheap because a stream
has one such object in hundreds of pieces, and because a piece of a stream nearly always ends with the end of an event,
so that nothing needs to be remembered from one piece to the next.

The key alone says little: a client may have a property of that name in a tool's schema, which some servers repeat in
their answers. So the *depth* of the key counts: ``usage`` is a member of the outermost object, or, in the events of two
routes, of an object in it (``response``, ``message``). :class:`_Scanner` knows the depth from the quotation marks,
braces and brackets, which it gets out of a piece with one call of ``bytes.translate``.

Three readers have the same interface:

- :class:`JsonReader` for an answer that is one JSON object;
- :class:`EventReader` for a stream of events that passes as it is;
- :class:`UsageFilter` for a stream whose usage the engine has asked for, and not the client. The server then sends one
  more event, with the usage and without choices. This event is taken out of the stream; all others pass byte for byte,
  wherever the pieces are divided. An event is passed on when it is complete: no client can do anything with a part of
  one. If the stream breaks off within an event, that part is dropped, so that what the gateway sends after it is an
  event of its own. Nothing is added to a stream, so that a broken one does not look complete.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, Protocol

import msgspec

from trio_cluster.core.answer import Usage
from trio_cluster.openai import read_usage

__all__ = ["EventReader", "JsonReader", "UsageFilter", "UsageReader", "usage_reader"]

_KEY: Final = b'"usage"'
#: The key with an object as its value. Blanks are bounded, so that a key is held over the end of a piece for so long
#: only.
_USAGE: Final = re.compile(rb'"usage"[ \t\r\n]{0,16}:[ \t\r\n]{0,16}(?=\{)')
#: The beginning of that at the end of a piece, and how long it can be.
_BEGINNING: Final = re.compile(
    rb'"(?:u(?:s(?:a(?:g(?:e(?:"[ \t\r\n]{0,16}(?::[ \t\r\n]{0,16})?)?)?)?)?)?)?\Z', re.DOTALL
)
_BEGINNING_MAX: Final = len(_KEY) + 33

#: Bytes of a usage object that are read; a larger one is none.
_OBJECT_LIMIT: Final = 16 * 1024

#: All bytes but those that make up the structure of JSON.
_CONTENT: Final = bytes(set(range(256)) - set(b'"{}[]'))
_ESCAPE: Final = re.compile(rb"\\.", re.DOTALL)

#: Bytes of an event that are held until it is complete. One with more is not the event that is taken out.
_EVENT_LIMIT: Final = 64 * 1024
_EVENT_END: Final = re.compile(rb"\r?\n\r?\n|\r\r")
_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")
#: Bytes of the end of an event that may be in the piece before.
_END_OVERLAP: Final = 3

#: Routes whose answers have no tokens of their own.
_PROMPT_ONLY: Final = frozenset({"embeddings", "rerank", "moderations"})
#: How the names of the endpoints of the Messages API begin; older masters call them by their paths.
_MESSAGES: Final = ("messages", "/v1/messages")


class UsageReader(Protocol):
    """Reads the usage of one answer. Everything here is synchronous, and never raises."""

    @property
    def usage(self) -> Usage | None:
        """What has been read so far; ``None`` if there was none."""
        ...

    def feed(self, piece: bytes) -> bytes:
        """Take the next piece of the answer, and return what is to be sent to the client of it; it may be empty."""
        ...

    def end(self) -> bytes:
        """Take note that the answer is complete, and return what is still to be sent."""
        ...


def usage_reader(
    endpoint: str, status: int, content_type: str, content_encoding: str, *, asked: bool = False
) -> UsageReader | None:
    """Return the reader for an answer; ``None`` for one whose usage cannot be read.

    Args:
        endpoint: the name of the endpoint, or the path of another route.
        status, content_type, content_encoding: those of the answer.
        asked: the engine has asked for the usage of the stream, and not the client.
    """
    if not 200 <= status < 300 or content_encoding.strip().lower() not in ("", "identity"):
        return None
    counts = _Counts(endpoint)
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        return JsonReader(counts)
    if media_type == "text/event-stream":
        return UsageFilter(counts) if asked else EventReader(counts)
    return None


class _Counts:
    """The usage objects of one answer, as tokens.

    Attributes:
        depth: how deep in an event of this route the key ``usage`` can be.
    """

    def __init__(self, endpoint: str) -> None:
        self._prompt_only = endpoint in _PROMPT_ONLY
        self._messages = endpoint.startswith(_MESSAGES)
        self.depth = 2 if self._messages or endpoint == "responses" else 1
        self._members: dict[str, Any] = {}

    def take(self, members: dict[str, Any]) -> Usage | None:
        """Take the next usage object, and return the usage of the answer so far; ``None``: it has no counts."""
        if self._messages:
            # The counts of the prompt come with the first event, those of the answer with a later one.
            self._members |= {name: value for name, value in members.items() if value is not None}
            members = self._members
        return read_usage(members, prompt_only=self._prompt_only, apart=self._messages)


class _Scanner:
    """Finds the objects under the key ``usage`` in JSON that passes in pieces.

    Args:
        counts: gets what is found.
        depth: how deep the key may be; 1 is the outermost object.

    Attributes:
        usage: what ``counts`` has made of it.
    """

    __slots__ = (
        "_counts",
        "_depth",
        "_escaped",
        "_in_text",
        "_level",
        "_object",
        "_object_level",
        "_tail",
        "usage",
    )

    def __init__(self, counts: _Counts, depth: int) -> None:
        self.usage: Usage | None = None
        self._counts = counts
        self._depth = depth
        self.reset()

    def reset(self) -> None:
        """Begin with another JSON text."""
        # How many objects and arrays are open; within a text; after a backslash.
        self._level = 0
        self._in_text = self._escaped = False
        # What may be the beginning of the key.
        self._tail = b""
        # The object that is being collected, and the level around it.
        self._object: bytearray | None = None
        self._object_level = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._tail:
            data, self._tail = self._tail + data, b""
        position = 0
        while position < len(data):
            if self._object is not None:
                position = self._collect(data, position)
                continue
            match = _USAGE.search(data, position)
            if match is None:
                break
            self._advance(data[position : match.start()])
            at_key = not self._in_text and not self._escaped and 1 <= self._level <= self._depth
            self._advance(data[match.start() : match.end()])
            position = match.end()
            if at_key:
                self._object, self._object_level = bytearray(), self._level
        if position < len(data):
            rest = data[position:] if position else data
            beginning = _BEGINNING.search(rest, max(0, len(rest) - _BEGINNING_MAX))
            if beginning is not None:
                self._tail = rest[beginning.start() :]
                rest = rest[: beginning.start()]
            self._advance(rest)

    def _collect(self, data: bytes, position: int) -> int:
        """Add to the object up to its end, and return the position of what follows."""
        assert self._object is not None
        while True:
            end = data.find(b"}", position) + 1 or len(data)
            part = data[position:end]
            self._object += part
            self._advance(part)
            if len(self._object) > _OBJECT_LIMIT:
                self._object = None
            elif self._level == self._object_level and not self._in_text:
                members, self._object = _decode(self._object), None
                if members is not None and (usage := self._counts.take(members)) is not None:
                    self.usage = usage
            if self._object is None or end == len(data):
                return end
            position = end

    def _advance(self, data: bytes) -> None:
        """Follow the structure of what has been passed."""
        if self._escaped and data:
            data, self._escaped = data[1:], False
        if b"\\" in data:
            data = _ESCAPE.sub(b"", data)
            self._escaped = data.endswith(b"\\")
        structure = data.translate(None, _CONTENT)
        if not structure:
            return
        parts = structure.split(b'"')
        for part in parts[self._in_text :: 2]:
            if part:
                self._level += part.count(b"{") + part.count(b"[") - part.count(b"}") - part.count(b"]")
        self._in_text ^= len(parts) % 2 == 0


def _decode(data: bytes | bytearray) -> dict[str, Any] | None:
    """Return a JSON object; ``None`` if that is not what it is."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # NaN and the like, which some servers write, are beside the counts.
        try:
            value = json.loads(bytes(data))
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


class JsonReader:
    """Reads the usage of an answer that is one JSON object. See ``UsageReader``."""

    def __init__(self, counts: _Counts) -> None:
        self._scanner = _Scanner(counts, 1)

    @property
    def usage(self) -> Usage | None:
        return self._scanner.usage

    def feed(self, piece: bytes) -> bytes:
        self._scanner.feed(piece)
        return piece

    def end(self) -> bytes:
        return b""


class EventReader:
    """Reads the usage of a stream that passes as it is. See ``UsageReader``."""

    def __init__(self, counts: _Counts) -> None:
        self._scanner = _Scanner(counts, counts.depth)
        self._in_line = False

    @property
    def usage(self) -> Usage | None:
        return self._scanner.usage

    def feed(self, piece: bytes) -> bytes:
        # Written out, since this is done for every token.
        if (
            not self._in_line
            and piece.endswith(b"\n")
            and (_KEY not in piece or _USAGE.search(piece) is None)
        ):
            return piece
        scanner = self._scanner
        first, *rest = piece.split(b"\n")
        scanner.feed(first)
        for line in rest:
            # There are no line breaks within the JSON of an event.
            scanner.reset()
            scanner.feed(line)
        self._in_line = not piece.endswith(b"\n")
        return piece

    def end(self) -> bytes:
        return b""


class _Chunk(msgspec.Struct):
    """What has to be known of an event of chat or completions."""

    choices: Any = msgspec.UNSET
    usage: Any = None


class UsageFilter:
    """Reads the usage of a stream, and takes the event out that has nothing else. See ``UsageReader``."""

    def __init__(self, counts: _Counts) -> None:
        self._usage: Usage | None = None
        self._counts = counts
        # The beginning of an event.
        self._held = bytearray()
        # Within an event that is larger than the limit, the last bytes that were passed on.
        self._passed: bytes | None = None

    @property
    def usage(self) -> Usage | None:
        return self._usage

    def feed(self, piece: bytes) -> bytes:
        if not self._held and self._passed is None and piece.endswith(_EVENT_ENDS) and not _has_usage(piece):
            return piece
        sent: list[bytes] = []
        if self._passed is not None:
            piece = self._pass(self._passed, piece, sent)
        searched = max(0, len(self._held) - _END_OVERLAP)
        self._held += piece
        one_by_one = _has_usage(self._held)
        begin = complete = 0
        for end in _EVENT_END.finditer(bytes(self._held), searched):
            complete = end.end()
            if one_by_one:
                event = bytes(self._held[begin:complete])
                if len(event) > _EVENT_LIMIT or not self._is_extra(event):
                    sent.append(event)
                begin = complete
        if begin < complete:
            sent.append(bytes(self._held[:complete]))
        del self._held[:complete]
        if len(self._held) > _EVENT_LIMIT:
            sent.append(bytes(self._held))
            self._passed = sent[-1][-_END_OVERLAP:]
            self._held.clear()
        return sent[0] if len(sent) == 1 else b"".join(sent)

    def _pass(self, before: bytes, piece: bytes, sent: list[bytes]) -> bytes:
        """Pass on what belongs to a large event, and return the rest."""
        end = _EVENT_END.search(before + piece)
        if end is None:
            self._passed = (before + piece)[-_END_OVERLAP:]
            sent.append(piece)
            return b""
        self._passed = None
        size = end.end() - len(before)
        sent.append(piece[:size])
        return piece[size:]

    def end(self) -> bytes:
        rest = bytes(self._held)
        self._held.clear()
        return b"" if self._is_extra(rest) else rest

    def _is_extra(self, event: bytes) -> bool:
        """Read the usage of an event, if there is any, and tell whether the event has nothing else."""
        if not _has_usage(event):
            return False
        data = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
        if len(data) != 1:
            return False
        try:
            chunk = msgspec.json.decode(data[0], type=_Chunk)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        if not isinstance(chunk.usage, dict):
            return False
        usage = self._counts.take(chunk.usage)
        if usage is not None:
            self._usage = usage
        return bool(chunk.choices == [])


def _has_usage(data: bytes | bytearray) -> bool:
    # The first test is the cheap one. Many servers have `"usage":null` in every event.
    return _KEY in data and _USAGE.search(data) is not None
