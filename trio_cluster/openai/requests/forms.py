"""Forms with files in them: ``multipart/form-data``.

A form may be read while it arrives. Its parts may be in any order: some clients send the file first, some last. A part
with a file name is a file, and any other is a field. A file is copied once, into the memory where it stays: a large one
is in memory a single time, also at the moment at which it is complete.
"""

from __future__ import annotations

import re
from functools import lru_cache
from io import BytesIO
from typing import Any, Final

import attrs
from multipart import (  # type: ignore[import-untyped]
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from trio_cluster.errors import InvalidRequest

__all__ = ["File", "Form", "FormReader", "is_form", "malformed", "media_type", "open_parser", "read_form"]

#: More parts than any documented form has, few enough that parsing stays cheap.
MOST_PARTS: Final = 256

_FORM: Final = "multipart/form-data"

_MEMBER: Final = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")


@attrs.frozen
class File:
    """An uploaded file."""

    data: bytes = attrs.field(repr=lambda data: f"<{len(data)} bytes>")
    name: str
    mime_type: str


@attrs.frozen
class Form:
    """The parts of a form, by name."""

    fields: dict[str, Any]
    """By name: text; a list of texts for a name that came more than once; a dict for names like ``name[member]``.
    Numbered members are items of a list: ``name[0]`` is the same as ``name[]``."""
    files: dict[str, list[File]]


def is_form(content_type: str) -> bool:
    """Return whether a body of this content type is a form that may have files in it."""
    return media_type(content_type) == _FORM


# Clients choose the header; those that are sent all the time are few.
@lru_cache(maxsize=64)
def media_type(content_type: str) -> str:
    """Return the media type of a ``Content-Type`` header in lower case, without parameters; empty if there is none."""
    return content_type.partition(";")[0].strip().lower()


def open_parser(content_type: str) -> PushMultipartParser:
    """Return a parser for a form of this content type. It raises ``ValueError``; see :func:`malformed`.

    Raises:
        InvalidRequest: the content type is another one (415), or has no boundary.
    """
    if not is_form(content_type):
        raise InvalidRequest(
            f"Unsupported content type '{media_type(content_type)}': expected {_FORM}",
            status=415,
            code="unsupported_media_type",
        )
    boundary = parse_options_header(content_type)[1].get("boundary", "")
    if not boundary:
        raise InvalidRequest(f"The content type {_FORM} came without a boundary")
    try:
        return PushMultipartParser(boundary, max_segment_count=MOST_PARTS)
    except ValueError as error:
        # The parser's own errors are ValueErrors, and so is a boundary that cannot be encoded.
        raise malformed(error) from None


def malformed(error: ValueError) -> InvalidRequest:
    """Return the error for a client whose form the parser refuses."""
    reason = str(error.args[0]) if error.args else "it makes no sense"
    # The parser's words for these are those of a Python exception.
    if isinstance(error, UnicodeEncodeError):
        reason = "its boundary is not ASCII"
    elif any(isinstance(cause, UnicodeDecodeError) for cause in (error, *error.args)):
        reason = "the name of a field or of a file is not UTF-8"
    return InvalidRequest(f"The request body is not valid {_FORM}: {reason}")


def read_form(body: bytes, content_type: str) -> Form:
    """Return the parts of a ``multipart/form-data`` body.

    Raises:
        InvalidRequest: the content type is another one (415), or the body is malformed.
    """
    reader = FormReader(content_type)
    reader.feed(body)
    return reader.finish()


class FormReader:
    """Reads a form while it arrives.

    Args:
        content_type: the content type of the form, with its boundary.

    Raises:
        InvalidRequest: the content type is not that of a form (415), or has no boundary.
    """

    def __init__(self, content_type: str) -> None:
        self._parser = open_parser(content_type)
        self._form = Form({}, {})
        self._segment: MultipartSegment | None = None
        self._content = BytesIO()

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the form; an empty piece is ignored.

        Raises:
            InvalidRequest: the form is malformed, a field of it is not UTF-8, or two fields contradict each other.
        """
        if not data:
            return
        try:
            for event in self._parser.parse(data):
                self._take(event)
        except ValueError as error:
            raise malformed(error) from None

    def finish(self) -> Form:
        """Return the form. To be called once, when all of it has been fed.

        Raises:
            InvalidRequest: the form is not complete.
        """
        try:
            self._parser.close()
        except ValueError as error:
            raise malformed(error) from None
        return self._form

    def _take(self, event: MultipartSegment | bytearray | bytes | None) -> None:
        if event is None:
            assert self._segment is not None
            # `getvalue` shares the buffer of a BytesIO, so a large file is not in memory twice; `b"".join` would copy
            # it. A BytesIO shares the bytes that it is made of as well, as long as nothing is written to it.
            _add(self._form, self._segment, self._content.getvalue())
            self._content = BytesIO()
        elif isinstance(event, MultipartSegment):
            self._segment = event
        elif self._content.tell() == 0:
            self._content = BytesIO(event)
            self._content.seek(len(event))
        else:
            self._content.write(event)


def _add(form: Form, segment: MultipartSegment, data: bytes) -> None:
    name = segment.name or ""
    if segment.filename is not None:
        file = File(data, segment.filename, segment.content_type or "")
        form.files.setdefault(name, []).append(file)
        return
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"Field '{name}' is not valid UTF-8", param=name) from None
    member = _MEMBER.fullmatch(name)
    if member is not None and member[2].isdigit():
        name = f"{member[1]}[]"
    elif member is not None:
        whole = form.fields.setdefault(member[1], {})
        if isinstance(whole, dict) and member[2] not in whole:
            whole[member[2]] = text
            return
        raise InvalidRequest(f"Field '{name}' contradicts an earlier field", param=name)
    earlier = form.fields.get(name)
    if earlier is None:
        form.fields[name] = text
    elif isinstance(earlier, list):
        earlier.append(text)
    elif isinstance(earlier, str):
        form.fields[name] = [earlier, text]
    else:
        raise InvalidRequest(f"Field '{name}' contradicts an earlier field", param=name)
