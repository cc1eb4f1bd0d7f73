"""Answers to transcription and translation requests, in the five formats of the API and as a stream."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from trio_cluster._calls import Head
from trio_cluster._models import Kind

from ._chunks import OutputChunk
from ._encoding import JSON_HEAD, SSE_HEAD, Encoder
from ._json import dumps
from ._requests import ASRRequest
from ._segments import Transcript, write_srt, write_vtt
from ._sse import DONE, event

__all__ = ["PlainTranscription", "StreamedTranscription"]

_TEXT_HEAD: Final = Head(200, "text/plain; charset=utf-8")
_VTT_HEAD: Final = Head(200, "text/vtt; charset=utf-8")

_HEADS: Final = {"text": _TEXT_HEAD, "srt": _TEXT_HEAD, "vtt": _VTT_HEAD}


class _Transcription(Encoder):
    kind: ClassVar[Kind] = "asr"

    def __init__(self, request: ASRRequest) -> None:
        super().__init__()
        self._request = request
        self._transcript = Transcript()

    def _hear(self, chunk: OutputChunk) -> str:
        """Note what the handler gave; return the text that is new in it."""
        transcript = self._transcript
        if chunk.kind == "text_delta":
            transcript.add_text(chunk.value)
            return str(chunk.value)
        if chunk.kind == "final_text":
            return transcript.set_text(chunk.value)
        if chunk.kind == "json":
            obj = dict(chunk.value)
            self._take_usage(obj.pop("usage", None))
            return transcript.add_object(obj)
        if chunk.kind != "finish":
            self._refuse(chunk)
        # A transcript has no reasons; a handler that is used to giving one does no harm.
        return ""

    def _usage_member(self) -> dict[str, Any]:
        """Return the answer's ``usage``: reported numbers of tokens, or what else a handler's dict said."""
        details = self._usage_details
        if self.usage != (0, 0):
            read, written = self.usage
            counts = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
            return {"usage": {"type": "tokens"} | counts | details}
        return {"usage": details} if details else {}


class PlainTranscription(_Transcription):
    """A transcript that is sent when it is complete."""

    def __init__(self, request: ASRRequest) -> None:
        super().__init__(request)
        self.head = _HEADS.get(request.response_format, JSON_HEAD)

    def _take(self, chunk: OutputChunk) -> bytes:
        self._hear(chunk)
        return b""

    def finish(self) -> bytes:
        transcript = self._transcript
        match self._request.response_format:
            case "text":
                return transcript.text.encode() + b"\n"
            case "srt":
                return write_srt(transcript).encode()
            case "vtt":
                return write_vtt(transcript).encode()
            case "verbose_json":
                return dumps(self._verbose())
            case _:
                return dumps({"text": transcript.text} | self._usage_member())

    def _verbose(self) -> dict[str, Any]:
        request, transcript = self._request, self._transcript
        # A translation is English, whatever was spoken.
        language = "english" if request.translate else request.language or ""
        answer: dict[str, Any] = {
            "task": "translate" if request.translate else "transcribe",
            "language": transcript.members.get("language", language),
            "duration": transcript.duration,
            "text": transcript.text,
        }
        wanted = request.timestamp_granularities
        if "segment" in wanted or not transcript.words:
            answer["segments"] = transcript.full_segments()
        if "word" in wanted:
            answer["words"] = transcript.words
        if self._usage_details.get("type") == "duration":
            # In this format the API knows no other usage.
            answer["usage"] = self._usage_details
        return answer | {name: value for name, value in transcript.members.items() if name not in answer}


class StreamedTranscription(_Transcription):
    """A transcript that is sent as it is heard: delta events, and one with the whole text at the end."""

    streaming = True
    head = SSE_HEAD

    def _take(self, chunk: OutputChunk) -> bytes:
        text = self._hear(chunk)
        if not text:
            return b""
        return event(b'{"type":"transcript.text.delta","delta":' + dumps(text) + b"}")

    def finish(self) -> bytes:
        done = {"type": "transcript.text.done", "text": self._transcript.text} | self._usage_member()
        return event(dumps(done)) + DONE
