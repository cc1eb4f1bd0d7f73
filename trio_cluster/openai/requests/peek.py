"""Which model a request is for, found without reading more of it than that takes.

What only passes through here is not checked here: whoever answers it does that. But it has to be known where it goes.
"""

from __future__ import annotations

from typing import Final

import msgspec
from multipart import MultipartSegment  # type: ignore[import-untyped]

from trio_cluster.errors import InvalidRequest

from .forms import is_form, malformed, open_parser

__all__ = ["FormPeek", "peek_model"]

#: Bytes of a model's name that are looked at; no name is longer.
_NAME_BYTES: Final = 4 * 512


class _Named(msgspec.Struct):
    model: str | None = None


_json: Final = msgspec.json.Decoder(_Named)


def peek_model(body: bytes, content_type: str) -> str | None:
    """Return the model that a whole body names; ``None`` if it names none, or cannot be read so far."""
    try:
        if is_form(content_type):
            peek = FormPeek(content_type)
            peek.feed(body)
            return peek.model
        return _json.decode(body).model
    except (InvalidRequest, msgspec.MsgspecError, ValueError, RecursionError):
        return None


class FormPeek:
    """A form on its way through: tells the model as soon as that has come by, and keeps nothing else.

    Args:
        content_type: the form's, with its boundary.

    Raises:
        InvalidRequest: it has no boundary, or is no form.

    Attributes:
        model: the value of the field ``model``, once that is known.
    """

    def __init__(self, content_type: str) -> None:
        self.model: str | None = None
        self._parser = open_parser(content_type)
        self._value: bytearray | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the form; not needed any more once the model is known.

        Raises:
            InvalidRequest: it is malformed, or the name of the model cannot be one.
        """
        # An empty piece would be the end to the parser.
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
