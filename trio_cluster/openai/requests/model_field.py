"""Replacement of the model's name in the body of a request; everything else stays as it was, byte for byte.

JSON is decoded no deeper than its outermost object, and the values in it are copied as they are. A form is framed anew
while it passes, with the contents of its parts untouched, so that a large file is never in memory as a whole.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from multipart import (  # type: ignore[import-untyped]
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from trio_cluster.errors import InvalidRequest

__all__ = ["FormRewriter", "JsonRewriter", "rewrite_form", "rewrite_json"]

_FIELD: Final = "model"
#: Headers of one part of a form, and bytes of one header: more than any client sends.
_MAX_HEADERS: Final = 32
_MAX_HEADER_SIZE: Final = 16 * 1024


def rewrite_json(body: bytes, model: str) -> bytes:
    """Return a JSON object with ``model`` as the value of its field ``model``. Synchronous.

    Args:
        body: the JSON object.
        model: the new name.

    Raises:
        InvalidRequest: the body is not a JSON object.
    """
    fields = _fields_of(body)
    fields[_FIELD] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def _fields_of(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body is not a JSON object: {error}") from None


class JsonRewriter:
    """Writes one JSON object with several names in its field ``model``. It is decoded once, when this is made.

    Args:
        body: the JSON object.

    Raises:
        InvalidRequest: the body is not a JSON object.
    """

    def __init__(self, body: bytes) -> None:
        fields = _fields_of(body)
        fields.pop(_FIELD, None)
        self._rest = (b"," if fields else b"") + msgspec.json.encode(fields)[1:]

    def with_model(self, model: str) -> bytes:
        """Return the object with ``model`` as its first field. Synchronous; the rest is only copied."""
        return b'{"model":' + msgspec.json.encode(model) + self._rest


def rewrite_form(body: bytes, content_type: str, model: str) -> bytes:
    """Return a form with ``model`` as the content of its part ``model``. Synchronous.

    Args:
        body: the form.
        content_type: the request's content type, which names the boundary.
        model: the new name.

    Raises:
        InvalidRequest: the body is not a form, or the content type has no boundary.
    """
    rewriter = FormRewriter(content_type, model)
    return rewriter.feed(body) + rewriter.end()


class FormRewriter:
    """Rewrites a form piece by piece, with ``model`` as the content of its part ``model``.

    Args:
        content_type: the request's content type, which names the boundary.
        model: the new name.

    Raises:
        InvalidRequest: the content type has no boundary, or none that is valid.
    """

    def __init__(self, content_type: str, model: str) -> None:
        boundary = parse_options_header(content_type)[1].get("boundary", "")
        try:
            # Latin-1 maps every byte to a character and back, so that headers in any encoding stay as they are.
            self._boundary = boundary.encode("latin-1")
            self._parser = PushMultipartParser(
                self._boundary,
                max_header_size=_MAX_HEADER_SIZE,
                max_header_count=_MAX_HEADERS,
                header_charset="latin-1",
            )
        except ValueError as error:
            raise InvalidRequest(f"The content type of the form has no valid boundary: {error}") from None
        self._model = model.encode()
        self._inside_model = False

    def feed(self, data: bytes) -> bytes:
        """Rewrite the next piece of the form.

        Returns:
            What can be sent on; may be empty.

        Raises:
            InvalidRequest: the body is not a form.
        """
        if self._parser.closed:
            # Bytes after the end of a form have no meaning, and are dropped.
            return b""
        out: list[bytes] = []
        try:
            for event in self._parser.parse(data):
                self._rewrite(event, out)
        except MultipartError as error:
            raise _malformed(error) from None
        return b"".join(out)

    def end(self) -> bytes:
        """Return the end of the form.

        Raises:
            InvalidRequest: the form is incomplete.
        """
        try:
            self._parser.close()
        except MultipartError as error:
            raise _malformed(error) from None
        return b"--%b--\r\n" % self._boundary

    def _rewrite(self, event: Any, out: list[bytes]) -> None:
        if event is None:
            out.append(b"\r\n")
        elif isinstance(event, MultipartSegment):
            lines = [b"--" + self._boundary]
            lines += [f"{name}: {value}".encode("latin-1") for name, value in event.headerlist]
            out.append(b"\r\n".join([*lines, b"\r\n"]))
            self._inside_model = event.name == _FIELD and event.filename is None
            if self._inside_model:
                out.append(self._model)
        elif not self._inside_model:
            out.append(bytes(event))


def _malformed(error: MultipartError) -> InvalidRequest:
    return InvalidRequest(f"The request body is not valid multipart/form-data: {error}")
