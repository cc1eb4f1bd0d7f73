"""Speech: audio that is sent as it is made."""

from __future__ import annotations

from typing import ClassVar, Final

from trio_cluster._calls import Head
from trio_cluster._models import Kind

from ._chunks import OutputChunk
from ._encoding import Encoder
from ._requests import TTSRequest

__all__ = ["SpeechEncoder"]

_TYPES: Final = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}

#: File headers that cannot be taken for anything else, samples included.
_MAGIC: Final = ((b"OggS", "audio/ogg"), (b"fLaC", "audio/flac"), (b"ID3", "audio/mpeg"))


def _recognise(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "audio/wav"
    for magic, mime_type in _MAGIC:
        if data.startswith(magic):
            return mime_type
    return None


class SpeechEncoder(Encoder):
    """The answer to a speech request: the handler's bytes, as they are.

    The content type is what the first chunk says it is; else what its header says; else what was asked for.
    """

    kind: ClassVar[Kind] = "tts"
    streaming = True

    def __init__(self, request: TTSRequest) -> None:
        super().__init__()
        self._asked = _TYPES[request.response_format]
        self.head = Head(200, self._asked)
        self._begun = False

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind != "audio":
            self._refuse(chunk)
        data: bytes = chunk.value
        if data and not self._begun:
            self._begun = True
            self.head = Head(200, chunk.mime_type or _recognise(data) or self._asked)
        return data

    def finish(self) -> bytes:
        if not self._begun:
            raise ValueError("the handler gave no audio")
        return b""
