"""Finding the model that a request is for, without reading the rest of the request.

A request that is only forwarded is not checked here: the node that answers it checks it. But its model decides to which
node it goes.
"""

from __future__ import annotations

from typing import Final

import msgspec
from multipart import MultipartSegment  # type: ignore[import-untyped]

from trio_cluster.errors import InvalidRequest

from .forms import is_form, malformed, open_parser

__all__ = ["FormPeek", "peek_model"]

#: Bytes of a model's name that are read; no name is longer.
_NAME_BYTES: Final = 4 * 512


class _Named(msgspec.Struct):
    model: str | None = None


_json: Final = msgspec.json.Decoder(_Named)


def peek_model(body: bytes, content_type: str) -> str | None:
    """Return the model that a whole body names; ``None`` if it names none, or is malformed before the name."""
    try:
        if is_form(content_type):
            peek = FormPeek(content_type)
            peek.feed(body)
            return peek.model
        return _json.decode(body).model
    except (InvalidRequest, msgspec.MsgspecError, ValueError, RecursionError):
        return None


class FormPeek:
    """Finds the model in a form that is being forwarded, and keeps nothing else of it.

    Args:
        content_type: the content type of the form, with its boundary.

    Raises:
        InvalidRequest: the content type is not that of a form, or has no boundary.

    Attributes:
        model: the value of the field ``model``; ``None`` until all of it has arrived.
    """

    def __init__(self, content_type: str) -> None:
        self.model: str | None = None
        self._parser = open_parser(content_type)
        self._value: bytearray | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the form. May be left out once the model is known.

        Raises:
            InvalidRequest: the form is malformed, or its model is longer than any name, or not UTF-8.
        """
        # The parser would take an empty piece for the end of the form.
        if not data or self._parser.closed or self.model is not None:
            return
        try:
            for event in self._parser.parse(data):
                if isinstance(event, MultipartSegment):
                    wanted = event.name == "model" and event.filename is None
                    self._value = bytearray() if wanted else None
                elif self._value is None:
                    continue
                elif event is None:
                    self.model = self._value.decode()
                    return
                else:
                    self._value += event
                    if len(self._value) > _NAME_BYTES:
                        raise InvalidRequest("'model' is longer than any name of a model", param="model")
        except ValueError as error:
            raise malformed(error) from None
