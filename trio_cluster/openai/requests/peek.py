"""Finding the model that a request is for, without reading the rest of the request.

A request that is only forwarded is not checked here: the node that answers it checks it. But its model decides to which
node it goes. So a model that is named twice is refused: of two names, this node would go by one, and the server that
answers perhaps by the other.

The same is done for the wish for a stream, by which nothing is decided but what is sent while the answer is waited for.
"""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec
from multipart import MultipartSegment  # type: ignore[import-untyped]

from trio_cluster.errors import InvalidRequest

from .forms import is_form, malformed, open_parser

__all__ = ["FormPeek", "asks_for_events", "peek_model", "require_one_model"]

#: Bytes of a model's name that are read; no name is longer.
_NAME_BYTES: Final = 4 * 512


#: How the key ``model`` stands in a JSON text, and what every way to escape one of its letters begins with.
_KEY: Final = b'"model"'
_ESCAPED_LETTER: Final = b"\\u006"


class _NamedTwice(InvalidRequest):
    """The request names its model more than once."""

    def __init__(self) -> None:
        super().__init__("'model' is given more than once", param="model")


class _Named(msgspec.Struct):
    model: str | None = None


_json: Final = msgspec.json.Decoder(_Named)


class _Wish(msgspec.Struct):
    stream: Any = False
    stream_format: Any = None


_wishes: Final = msgspec.json.Decoder(_Wish)

#: The fields of a form that are read here, and the texts with which a form says yes; see ``checks.py``.
_PEEKED: Final = frozenset({"model", "stream"})
_YES: Final = frozenset({b"true", b"1"})


def peek_model(body: bytes, content_type: str) -> str | None:
    """Return the model that a whole body names; ``None`` if it names none, or is malformed before the name.

    Raises:
        InvalidRequest: it is a form that names its model more than once.
    """
    try:
        if is_form(content_type):
            peek = FormPeek(content_type)
            peek.feed(body)
            return peek.model
        return _json.decode(body).model
    except _NamedTwice:
        raise
    except (InvalidRequest, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def asks_for_events(body: bytes, content_type: str) -> bool:
    """Return whether a whole body asks for an answer in events; ``False`` also if it is malformed."""
    try:
        if is_form(content_type):
            peek = FormPeek(content_type)
            peek.feed(body)
            return peek.stream
        wish = _wishes.decode(body)
    except (InvalidRequest, msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return wish.stream is True or wish.stream_format == "sse"


def require_one_model(body: bytes) -> None:
    """Refuse a JSON text whose object has more than one member ``model``.

    Decoders take the last one without a word, or the first. Nearly all texts are recognized without being decoded; a
    text that is not JSON is left to its reader.

    Raises:
        InvalidRequest: there is more than one.
    """
    if body.count(_KEY) < 2 and _ESCAPED_LETTER not in body:
        return
    members: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        # Called for the outermost object last.
        nonlocal members
        members = pairs

    try:
        whole = json.loads(body, object_pairs_hook=keep)
    except (ValueError, RecursionError):
        return
    if whole is None and sum(name == "model" for name, _ in members) > 1:
        raise _NamedTwice


class FormPeek:
    """Finds the model in a form that is being forwarded, and whether it asks for a stream; keeps nothing else of it.

    Args:
        content_type: the content type of the form, with its boundary.

    Raises:
        InvalidRequest: the content type is not that of a form, or has no boundary.

    Attributes:
        model: the value of the field ``model``; ``None`` until all of it has arrived.
        stream: whether the field ``stream`` has arrived, and asks for a stream.
    """

    def __init__(self, content_type: str) -> None:
        self.model: str | None = None
        self.stream = False
        self._parser = open_parser(content_type)
        self._value: bytearray | None = None
        self._field = ""
        self._named = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the form.

        Raises:
            InvalidRequest: the form is malformed, it names its model more than once, or the name is longer than any, or
                not UTF-8.
        """
        # The parser would take an empty piece for the end of the form.
        if not data or self._parser.closed:
            return
        try:
            for event in self._parser.parse(data):
                if isinstance(event, MultipartSegment):
                    named = event.name == "model"
                    if named and self._named:
                        raise _NamedTwice
                    self._named = self._named or named
                    peeked = event.name in _PEEKED and event.filename is None
                    self._field = event.name
                    self._value = bytearray() if peeked else None
                elif self._value is None:
                    continue
                elif event is None:
                    if self._field == "model":
                        self.model = self._value.decode()
                    else:
                        self.stream = bytes(self._value).lower() in _YES
                    self._value = None
                else:
                    self._value += event
                    if len(self._value) <= _NAME_BYTES:
                        continue
                    if self._field == "stream":
                        self._value = None
                    else:
                        raise InvalidRequest("'model' is longer than any name of a model", param="model")
        except ValueError as error:
            raise malformed(error) from None
