"""Speech: audio that is sent as it is made, as bytes or in events."""

from __future__ import annotations

import base64
from typing import ClassVar, Final, Literal

from trio_cluster.core.answer import Head
from trio_cluster.core.model import Kind

from ..json_values import dumps
from ..requests.types import TTSRequest
from ..sse import DONE, event
from .chunks import OutputChunk, PcmPiece
from .encoder import SSE_HEAD, Encoder
from .pcm import wav_header

__all__ = ["PlainSpeech", "StreamedSpeech"]

_TYPES: Final = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}

#: Bytes of audio in one event: a multiple of 3, so that its base64 has no padding, and few enough for any client's
#: buffer.
_PIECE: Final = 48 * 1024

#: File headers that cannot be confused with others, or with raw samples.
_MAGIC: Final = ((b"OggS", "audio/ogg"), (b"fLaC", "audio/flac"), (b"ID3", "audio/mpeg"))


#: Formats whose first bytes are always recognised: what does not begin so is none of them, and most likely raw samples.
_CONTAINERS: Final = frozenset({"audio/wav", "audio/flac", "audio/ogg"})
#: Bytes that are needed for that.
_HEADER: Final = 12


def _recognise(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "audio/wav"
    for magic, mime_type in _MAGIC:
        if data.startswith(magic):
            return mime_type
    return None


class _Speech(Encoder):
    kind: ClassVar[Kind] = "tts"
    streaming = True

    def __init__(self, request: TTSRequest) -> None:
        super().__init__()
        self._begun = False
        self._wants_samples = request.response_format == "pcm"
        # The rate and the channels of the samples, if the handler gives samples; `None` before the first chunk.
        self._layout: tuple[int, int] | Literal["bytes"] | None = None
        self._complete = False

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind == "pcm":
            chunk = self._from_samples(chunk.value)
        elif chunk.kind != "audio":
            self._refuse(chunk)
        elif chunk.value:
            self._require_layout("bytes")
        if not chunk.value:
            return b""
        if not self._begun:
            self._begun = True
            self._begin(chunk)
        return self._send(chunk.value)

    def _from_samples(self, piece: PcmPiece) -> OutputChunk:
        """Return samples as the client wants them: as they are, or as a part of a WAV file."""
        first = self._layout is None
        self._require_layout((piece.rate, piece.channels))
        if piece.whole and not first:
            raise ValueError("samples that are the whole answer came after others")
        self._complete = piece.whole
        if self._wants_samples:
            return OutputChunk("audio", piece.data, None, _TYPES["pcm"])
        length = len(piece.data) if piece.whole else None
        header = wav_header(piece.rate, channels=piece.channels, length=length) if first else b""
        return OutputChunk("audio", header + piece.data, None, _TYPES["wav"])

    def _require_layout(self, layout: tuple[int, int] | Literal["bytes"]) -> None:
        if self._complete:
            raise ValueError("more audio came after samples that were the whole answer")
        if self._layout is None:
            self._layout = layout
        elif layout != self._layout:
            raise ValueError(
                "all audio of an answer is of one form: bytes, or samples of one rate and one number of channels; "
                f"it began with {self._layout}, and {layout} came"
            )

    def _begin(self, chunk: OutputChunk) -> None:
        """Look at the first chunk with any audio in it."""

    def _send(self, data: bytes) -> bytes:
        raise NotImplementedError

    def finish(self) -> bytes:
        if not self._begun:
            raise ValueError("the handler gave no audio")
        return self._end()

    def _end(self) -> bytes:
        return b""


class PlainSpeech(_Speech):
    """The handler's bytes, as they are.

    The content type is the one of the first chunk; else the one that its header shows; else the one of the requested
    format, or that of raw samples if the format has a header which is not there.
    """

    def __init__(self, request: TTSRequest) -> None:
        super().__init__(request)
        self._requested = _TYPES[request.response_format]
        self.head = Head(200, self._requested)

    def _begin(self, chunk: OutputChunk) -> None:
        mime_type = chunk.mime_type or _recognise(chunk.value)
        if not mime_type:
            raw = self._requested in _CONTAINERS and len(chunk.value) >= _HEADER
            mime_type = _TYPES["pcm"] if raw else self._requested
        self.head = Head(200, mime_type)

    def _send(self, data: bytes) -> bytes:
        return data


class StreamedSpeech(_Speech):
    """The handler's bytes in events; the last event has the usage."""

    head = SSE_HEAD

    def _send(self, data: bytes) -> bytes:
        return b"".join(
            # Base64 needs no escapes in JSON.
            event(b'{"type":"speech.audio.delta","audio":"' + base64.b64encode(data[i : i + _PIECE]) + b'"}')
            for i in range(0, len(data), _PIECE)
        )

    def _end(self) -> bytes:
        return event(dumps({"type": "speech.audio.done", "usage": self._usage.counts()})) + DONE
