"""Forms with files in them: ``multipart/form-data``.

A body is parsed in one go, since it is in memory anyway. The parts may come in any order: some clients put
the file first, some last. Files are told from fields by having a file name, and are not copied more often
than once.
"""

from __future__ import annotations

import re
from typing import Any, Final

import attrs
from multipart import (  # type: ignore[import-untyped]
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from trio_cluster._errors import InvalidRequest

__all__ = ["File", "Form", "boundary_of", "media_type", "read_form"]

#: More parts than any documented form has, few enough that parsing stays cheap.
_MOST_PARTS: Final = 256

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
    """Text; a list of texts where a name came more than once; a dict where it came as ``name[member]``.
    Numbered members are items of a list: ``name[0]`` is the same as ``name[]``."""
    files: dict[str, list[File]]


def media_type(content_type: str) -> str:
    """Return the bare media type of a ``Content-Type`` header, in lower case; empty if there is none."""
    return content_type.partition(";")[0].strip().lower()


def boundary_of(content_type: str) -> str:
    """Return what stands between the parts of a ``multipart/form-data`` body.

    Raises:
        InvalidRequest: the body is of another type (415), or the type does not say.
    """
    kind = media_type(content_type)
    if kind != "multipart/form-data":
        raise InvalidRequest(
            f"Unsupported content type '{kind}': expected multipart/form-data",
            status=415,
            code="unsupported_media_type",
        )
    boundary: str = parse_options_header(content_type)[1].get("boundary", "")
    if not boundary:
        raise InvalidRequest("The content type multipart/form-data came without a boundary")
    return boundary


def read_form(body: bytes, content_type: str) -> Form:
    """Return the parts of a ``multipart/form-data`` body.

    Raises:
        InvalidRequest: it is of another type (415), or malformed.
    """
    boundary = boundary_of(content_type)
    form = Form({}, {})
    try:
        for segment, data in _segments(body, boundary):
            _add(form, segment, data)
    except ValueError as exc:
        # The parser's own errors are ValueErrors, and so is a boundary that cannot be encoded.
        raise InvalidRequest(f"The request body is not valid multipart/form-data: {exc}") from None
    return form


def _segments(body: bytes, boundary: str) -> list[tuple[MultipartSegment, bytes]]:
    found: list[tuple[MultipartSegment, bytes]] = []
    with PushMultipartParser(boundary, max_segment_count=_MOST_PARTS) as parser:
        segment: MultipartSegment | None = None
        pieces: list[bytes] = []
        for event in parser.parse(body):
            if event is None:
                assert segment is not None
                # Given all at once, the content of a part comes as one piece, which need not be joined.
                found.append((segment, pieces[0] if len(pieces) == 1 else b"".join(pieces)))
            elif isinstance(event, MultipartSegment):
                segment, pieces = event, []
            else:
                pieces.append(bytes(event))
    return found


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
