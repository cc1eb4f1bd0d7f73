"""The name of the model in the body of a request, replaced; everything else stays as it was, byte by byte.

JSON is read no deeper than its outermost object, and the values in it are copied as they are. A form is framed anew
as it passes, with the contents of its parts untouched, so that a large file never needs to be in memory.
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

__all__ = ["FormRewriter", "rewrite_form", "rewrite_json"]

_FIELD: Final = "model"
#: More headers, and longer ones, than any client gives the parts of a form.
_MOST_HEADERS: Final = 32
_LONGEST_HEADER: Final = 16 * 1024


def rewrite_json(body: bytes, model: str) -> bytes:
    """Return a JSON object with ``model`` as its model.

    Raises:
        InvalidRequest: the body is not a JSON object.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body is not a JSON object: {error}") from None
    fields[_FIELD] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def rewrite_form(body: bytes, content_type: str, model: str) -> bytes:
    """Return a form with ``model`` as its model.

    Raises:
        InvalidRequest: the body is no such form.
    """
    rewriter = FormRewriter(content_type, model)
    return rewriter.feed(body) + rewriter.end()


class FormRewriter:
    """Takes a form in pieces and gives it out in pieces, with ``model`` as the content of its part of this name.

    Raises:
        InvalidRequest: the content type does not say where parts begin.
    """

    def __init__(self, content_type: str, model: str) -> None:
        boundary = parse_options_header(content_type)[1].get("boundary", "")
        try:
            # Latin-1 maps every byte to a character and back, whatever the client's encoding is.
            self._boundary = boundary.encode("latin-1")
            self._parser = PushMultipartParser(
                self._boundary,
                max_header_size=_LONGEST_HEADER,
                max_header_count=_MOST_HEADERS,
                header_charset="latin-1",
            )
        except ValueError as error:
            raise InvalidRequest(f"The boundary of the form makes no sense: {error}") from None
        self._model = model.encode()
        self._inside_model = False

    def feed(self, data: bytes) -> bytes:
        """Take the next piece of the form, and return what can be sent on; perhaps nothing yet.

        Raises:
            InvalidRequest: it is no form.
        """
        if self._parser.closed:
            # What follows the end of a form means nothing.
            return b""
        out: list[bytes] = []
        try:
            for event in self._parser.parse(data):
                self._forward_upload(event, out)
        except MultipartError as error:
            raise _malformed(error) from None
        return b"".join(out)

    def end(self) -> bytes:
        """Return the end of the form.

        Raises:
            InvalidRequest: parts of it have not come.
        """
        try:
            self._parser.close()
        except MultipartError as error:
            raise _malformed(error) from None
        return b"--%b--\r\n" % self._boundary

    def _forward_upload(self, event: Any, out: list[bytes]) -> None:
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
