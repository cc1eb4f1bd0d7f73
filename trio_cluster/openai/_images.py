"""Images: each a base64 text in one JSON object."""

from __future__ import annotations

import base64
from typing import Any, ClassVar

from trio_cluster._models import Kind

from ._choices import read_output
from ._chunks import OutputChunk
from ._encoding import Encoder
from ._json import dumps
from ._requests import ImageGenRequest

__all__ = ["ImageEncoder", "image_type"]


def image_type(data: bytes) -> str | None:
    """Return the MIME type that an image's first bytes say it is; ``None`` if they say nothing known."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return "image/gif" if data[:6] in (b"GIF87a", b"GIF89a") else None


_FORMATS = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp", "image/gif": "gif"}


class ImageEncoder(Encoder):
    """The answer to an image request.

    A handler gives its images one by one or as a list, ``n`` at most. A ``dict`` adds members to the answer,
    for instance ``usage``.
    """

    kind: ClassVar[Kind] = "image_generation"

    def __init__(self, request: ImageGenRequest, created: int) -> None:
        super().__init__()
        self._created = created
        self._wanted = request.n
        self._images: list[bytes] = []
        self._types: set[str | None] = set()
        self._extras: dict[str, Any] = {}

    def encode(self, value: Any) -> bytes:
        if isinstance(value, list | tuple):
            for each in value:
                super().encode(each)
            return b""
        return super().encode(value)

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind == "json":
            if "data" in chunk.value:
                raise TypeError("images are given as bytes or OutputChunk.image, not as 'data' of a dict")
            output = read_output(chunk.value)
            self._take_usage(output.usage)
            self._extras |= output.extras
            return b""
        if chunk.kind != "image":
            self._refuse(chunk)
        if not chunk.value:
            raise ValueError("an image of no bytes")
        if len(self._images) == self._wanted:
            raise ValueError(f"more images than the {self._wanted} that were asked for")
        # Base64 needs no escapes in JSON.
        self._images.append(b'{"b64_json":"' + base64.b64encode(chunk.value) + b'"}')
        self._types.add(chunk.mime_type or image_type(chunk.value))
        return b""

    def finish(self) -> bytes:
        if not self._images:
            raise ValueError("the handler gave no image")
        rest: dict[str, Any] = {}
        if len(self._types) == 1 and (written := _FORMATS.get(self._types.pop() or "")):
            rest["output_format"] = written
        if self.usage != (0, 0):
            read, made = self.usage
            rest["usage"] = {
                "input_tokens": read,
                "output_tokens": made,
                "total_tokens": read + made,
            } | self._usage_details
        rest |= self._extras
        tail = b"," + dumps(rest)[1:] if rest else b"}"
        return b'{"created":%d,"data":[' % self._created + b",".join(self._images) + b"]" + tail
