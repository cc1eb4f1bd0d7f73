"""Images: base64 texts in a JSON object, or in events.

Edited images are encoded like generated ones; only the events have other names.

The final image of a stream is kept until the handler has finished, so that a stream with a ``completed`` event is
complete. There is no ``[DONE]``: the name of the last event marks the end.
"""

from __future__ import annotations

import base64
from typing import Any, ClassVar, Final

from trio_cluster.core.model import Kind

from ..json_values import dumps
from ..requests.types import ImageEditRequest, ImageGenRequest
from ..sse import named_event
from .choices import read_output
from .chunks import OutputChunk
from .encoder import SSE_HEAD, Encoder

__all__ = ["PlainEdit", "PlainImages", "StreamedEdit", "StreamedImage", "image_type"]


def image_type(data: bytes) -> str | None:
    """Return the MIME type that the first bytes of an image show; ``None`` if they are not known."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return "image/gif" if data[:6] in (b"GIF87a", b"GIF89a") else None


_FORMATS: Final = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
    "image/gif": "gif",
    "image/svg+xml": "svg",
}

#: Values of ``quality`` that only requests may have, and their counterparts in an answer.
_OLD_QUALITIES: Final = {"standard": "medium", "hd": "high"}


def _format_of(image: OutputChunk) -> str | None:
    """Return the API's name for the format of an image; ``None`` if it is not known."""
    return _FORMATS.get(image.mime_type or image_type(image.value) or "")


class _Images(Encoder):
    """The common part of the encoders for images.

    A handler gives its images one by one or as a list, at most ``n``. A ``dict`` adds members to the answer, for
    instance ``usage``.
    """

    kind: ClassVar[Kind] = "image_generation"
    takes_lists = True

    def __init__(self, request: ImageGenRequest | ImageEditRequest, created: int) -> None:
        super().__init__()
        self._request = request
        self._created = created
        self._given = 0
        self._extras: dict[str, Any] = {}

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind == "json":
            if "data" in chunk.value or "b64_json" in chunk.value:
                raise TypeError("images are given as bytes or OutputChunk.image, not in a dict")
            output = read_output(chunk.value)
            self._usage.take_object(output.usage)
            self._extras |= output.extras
            return b""
        if chunk.kind not in ("image", "partial_image"):
            self._refuse(chunk)
        if not chunk.value:
            raise ValueError("an image of no bytes")
        if chunk.kind == "partial_image":
            return self._take_partial(chunk)
        if self._given == self._request.n:
            raise ValueError(f"more images than the {self._given} that were asked for")
        self._given += 1
        self._take_image(chunk)
        return b""

    def _take_image(self, image: OutputChunk) -> None:
        raise NotImplementedError

    def _take_partial(self, image: OutputChunk) -> bytes:
        raise NotImplementedError

    def _image_usage(self) -> dict[str, Any]:
        usage = self._usage
        return {
            "input_tokens": usage.prompt_tokens,
            # A prompt is text. A handler that reads images as well gives a usage object with its own details.
            "input_tokens_details": {"text_tokens": usage.prompt_tokens, "image_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        } | usage.details


class PlainImages(_Images):
    """Images that are sent when they are complete."""

    def __init__(self, request: ImageGenRequest | ImageEditRequest, created: int) -> None:
        super().__init__(request, created)
        self._images: list[bytes] = []
        self._formats: set[str | None] = set()

    def _take_image(self, image: OutputChunk) -> None:
        # Base64 needs no escapes in JSON.
        self._images.append(b'{"b64_json":"' + base64.b64encode(image.value) + b'"}')
        self._formats.add(_format_of(image))

    def _take_partial(self, image: OutputChunk) -> bytes:
        return b""

    def finish(self) -> bytes:
        if not self._images:
            raise ValueError("the handler gave no image")
        rest: dict[str, Any] = {}
        if len(self._formats) == 1 and (written := self._formats.pop()):
            rest["output_format"] = written
        if self._usage.total_tokens:
            rest["usage"] = self._image_usage()
        rest |= self._extras
        tail = b"," + dumps(rest)[1:] if rest else b"}"
        return b'{"created":%d,"data":[' % self._created + b",".join(self._images) + b"]" + tail


class StreamedImage(_Images):
    """One image, and before it the partial images that its client wants to see."""

    streaming = True
    head = SSE_HEAD

    def __init__(self, request: ImageGenRequest | ImageEditRequest, created: int) -> None:
        super().__init__(request, created)
        self._shown = 0
        self._final: OutputChunk | None = None

    def _take_image(self, image: OutputChunk) -> None:
        self._final = image

    def _take_partial(self, image: OutputChunk) -> bytes:
        if self._final is not None:
            raise ValueError("a partial image after the final one")
        if self._shown == self._request.partial_images:
            return b""
        self._shown += 1
        return self._event("partial_image", image, {"partial_image_index": self._shown - 1})

    def _event(self, what: str, image: OutputChunk, members: dict[str, Any]) -> bytes:
        request = self._request
        name = f"{self.kind}.{what}"
        whole = {
            "created_at": self._created,
            "size": request.size,
            "quality": _OLD_QUALITIES.get(request.quality, request.quality),
            "background": request.background,
            "output_format": _format_of(image) or request.output_format,
        }
        head = dumps(whole | self._extras | members | {"type": name})[:-1]
        return named_event(name, head + b',"b64_json":"' + base64.b64encode(image.value) + b'"}')

    def finish(self) -> bytes:
        if self._final is None:
            raise ValueError("the handler gave no image")
        return self._event("completed", self._final, {"usage": self._image_usage()})


class PlainEdit(PlainImages):
    """Edited images that are sent when they are complete."""

    kind: ClassVar[Kind] = "image_edit"


class StreamedEdit(StreamedImage):
    """One edited image, and before it the partial images that its client wants to see."""

    kind: ClassVar[Kind] = "image_edit"
