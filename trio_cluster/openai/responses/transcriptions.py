"""Answers to transcription and translation requests, in the six formats of the API and as a stream."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from trio_cluster.core.answer import Head
from trio_cluster.core.model import Kind
from trio_cluster.errors import ApiError

from ..json_values import dumps
from ..requests.types import ASRRequest
from ..sse import DONE, event
from .chunks import OutputChunk
from .encoder import JSON_HEAD, SSE_HEAD, Encoder
from .transcript import Transcript, write_srt, write_vtt

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

    def _add(self, chunk: OutputChunk) -> str:
        """Add a chunk to the transcript, and return the text that is new."""
        transcript = self._transcript
        if chunk.kind == "text_delta":
            return transcript.add_text(chunk.value)
        if chunk.kind == "final_text":
            return transcript.set_text(chunk.value)
        if chunk.kind == "json":
            obj = dict(chunk.value)
            self._usage.take_object(obj.pop("usage", None))
            return transcript.add_object(obj)
        if chunk.kind != "finish":
            self._refuse(chunk)
        # A transcript has no finish reason. A handler that gives one all the same is not refused.
        return ""

    def _speaker_segments(self, first: int) -> list[dict[str, Any]]:
        """Return the segments from number ``first`` on, with their speakers, in the API's form.

        Raises:
            ApiError: the speaker of a segment is not known.
        """
        segments = []
        for i, segment in enumerate(self._transcript.segments[first:], first):
            if not isinstance(segment.get("speaker"), str):
                raise ApiError(
                    400,
                    "The model does not tell speakers apart; ask for another 'response_format'",
                    param="response_format",
                    code="unsupported_value",
                )
            named = {"type": "transcript.text.segment", "id": f"seg_{i}"}
            segments.append(named | {name: segment[name] for name in ("start", "end", "text", "speaker")})
        return segments

    def _shown_members(self) -> dict[str, Any]:
        """Return the members that a short answer has beside its text."""
        transcript = self._transcript
        shown = {name: value for name, value in transcript.members.items() if name == "languages"}
        if transcript.logprobs and "logprobs" in self._request.include:
            shown["logprobs"] = transcript.logprobs
        return shown | self._usage_member()

    def _usage_member(self) -> dict[str, Any]:
        """Return the member ``usage`` of the answer: the reported counts, or else the handler's usage object."""
        details = self._usage.details
        if self._usage.total_tokens:
            return {"usage": {"type": "tokens"} | self._usage.counts() | details}
        return {"usage": details} if details else {}


class PlainTranscription(_Transcription):
    """A transcript that is sent when it is complete."""

    def __init__(self, request: ASRRequest) -> None:
        super().__init__(request)
        self.head = _HEADS.get(request.response_format, JSON_HEAD)

    def _take(self, chunk: OutputChunk) -> bytes:
        self._add(chunk)
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
            case "diarized_json":
                return dumps(self._diarized())
            case _:
                return dumps({"text": transcript.text} | self._shown_members())

    def _diarized(self) -> dict[str, Any]:
        transcript = self._transcript
        return {
            "task": "transcribe",
            "duration": transcript.duration,
            "text": transcript.text,
            "segments": self._speaker_segments(0),
        } | self._usage_member()

    def _verbose(self) -> dict[str, Any]:
        request, transcript = self._request, self._transcript
        # A translation is in English.
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
        if self._usage.details.get("type") == "duration":
            # In this format, the API has only this type of usage.
            answer["usage"] = self._usage.details
        return answer | {name: value for name, value in transcript.members.items() if name not in answer}


class StreamedTranscription(_Transcription):
    """A transcript that is sent as it comes: events with deltas, and one with the whole text at the end.

    The segments are sent as well if the client wants to know the speakers.
    """

    streaming = True
    head = SSE_HEAD

    def __init__(self, request: ASRRequest) -> None:
        super().__init__(request)
        self._diarized = request.response_format == "diarized_json"
        self._segments_sent = 0

    def _take(self, chunk: OutputChunk) -> bytes:
        before = len(self._transcript.logprobs)
        text = self._add(chunk)
        sent = []
        if text:
            delta = b'{"type":"transcript.text.delta","delta":' + dumps(text)
            logprobs = self._transcript.logprobs[before:]
            if logprobs and "logprobs" in self._request.include:
                delta += b',"logprobs":' + dumps(logprobs)
            sent.append(event(delta + b"}"))
        if self._diarized:
            segments = self._speaker_segments(self._segments_sent)
            self._segments_sent += len(segments)
            sent.extend(event(dumps(segment)) for segment in segments)
        return b"".join(sent)

    def finish(self) -> bytes:
        done = {"type": "transcript.text.done", "text": self._transcript.text} | self._shown_members()
        return event(dumps(done)) + DONE
