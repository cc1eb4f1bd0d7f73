"""Transcripts: the pieces that a handler gives, with their times, and the formats of subtitles.

A handler for speech recognition may give

- text, as ``str`` or ``OutputChunk.text_delta``, and ``OutputChunk.final_text``;
- a ``dict``, or several: ``{"text", "language", "duration", "segments", "words", "logprobs", "languages",
  "usage"}``, all optional. A segment is ``{"start", "end", "text"}`` with times in seconds, and whatever else of
  the API's segment the model knows, above all ``speaker``; a word is ``{"word", "start", "end"}``, a logprob
  ``{"token", "logprob", "bytes"}``. Lists of later dicts extend those of earlier ones.

Without a text, the texts of the segments are joined to one; a text that is given later replaces it. Times that are not
given are not made up: subtitles without segments are a single cue over ``duration``, which is 0 if it is not given.
"""

from __future__ import annotations

from typing import Any, Final

from ..json_values import plain

__all__ = ["Transcript", "write_srt", "write_vtt"]

#: The members of the API's segment that a model need not give, with neutral values.
_SEGMENT: Final[dict[str, Any]] = {
    "seek": 0,
    "tokens": [],
    "temperature": 0.0,
    "avg_logprob": 0.0,
    "compression_ratio": 1.0,
    "no_speech_prob": 0.0,
}
#: The member with the text in the items of a list that have times.
_TEXTS: Final = {"segments": "text", "words": "word"}


def _extension(text: str, seen: str) -> str:
    """Return the part of ``text`` that follows ``seen``; empty if ``text`` does not begin with ``seen``."""
    return text[len(seen) :] if text.startswith(seen) else ""


def _require_number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number of seconds")
    if value < 0:
        raise ValueError(f"{what} must not be negative")
    return float(value)


def _read_list(given: Any, name: str) -> list[Any]:
    """Return a handler's list of segments, words or log probabilities; an absent one is empty."""
    if given is None:
        return []
    if not isinstance(given, list):
        raise TypeError(f"'{name}' must be a list")
    text = _TEXTS.get(name)
    if text is not None:
        for i, each in enumerate(given):
            _require_span(each, f"{name}[{i}]", text)
    return given


def _require_span(value: Any, what: str, text: str) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{what} must be an object")
    start = _require_number(value.get("start"), f"'start' of {what}")
    end = _require_number(value.get("end"), f"'end' of {what}")
    if end < start:
        raise ValueError(f"{what} ends before it starts")
    if not isinstance(value.get(text), str):
        raise TypeError(f"'{text}' of {what} must be a string")


class Transcript:
    """The transcript, as far as it has come.

    Attributes:
        segments: as given; each has its times, in seconds, and its text.
        words: as given; each has its times, in seconds.
        logprobs: the log probabilities of the tokens, as given.
        members: the other members of the handler's objects.
    """

    def __init__(self) -> None:
        self.segments: list[dict[str, Any]] = []
        self.words: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.members: dict[str, Any] = {}
        self._pieces: list[str] = []
        self._final: str | None = None
        self._shown = ""  # the text of the segments that has been returned as new

    @property
    def text(self) -> str:
        """The whole text."""
        if self._final is not None:
            return self._final
        if self._pieces:
            return "".join(self._pieces)
        return " ".join(segment["text"].strip() for segment in self.segments).strip()

    @property
    def duration(self) -> float:
        """The duration of the audio in seconds, as given; else the end of the last segment, or 0."""
        if "duration" in self.members:
            return float(self.members["duration"])
        return max((float(segment["end"]) for segment in self.segments), default=0.0)

    def add_text(self, text: str) -> str:
        """Add a piece of text, and return the part of it that has not been returned before as text of segments.

        Raises:
            ValueError: there was a final text.
        """
        if self._final is not None:
            raise ValueError("more text after the final text")
        seen = "" if self._pieces else self._shown
        self._pieces.append(text)
        return _extension(text.lstrip(), seen) if seen else text

    def set_text(self, text: str) -> str:
        """Take the whole text, and return the part of it that follows the pieces; empty if it does not begin with them.

        Raises:
            ValueError: there was a final text.
        """
        if self._final is not None:
            raise ValueError("a second final text")
        seen = "".join(self._pieces) or self._shown
        self._final = text
        return _extension(text, seen)

    def add_object(self, obj: dict[str, Any]) -> str:
        """Add a handler's object, and return the text that is new, whether it came as text or in segments.

        Raises:
            TypeError: a member is of the wrong type.
            ValueError: a time is negative, or a segment ends before it starts.
        """
        obj = plain(obj)
        for name, items in (("segments", self.segments), ("words", self.words), ("logprobs", self.logprobs)):
            items.extend(_read_list(obj.pop(name, None), name))
        text = obj.pop("text", None)
        if text is not None and not isinstance(text, str):
            raise TypeError("'text' must be a string")
        if obj.get("duration") is not None:
            _require_number(obj["duration"], "'duration'")
        if not isinstance(obj.get("language") or "", str):
            raise TypeError("'language' must be a string")
        self.members |= {name: value for name, value in obj.items() if value is not None}
        if text:
            return self.add_text(text)
        if self._pieces or self._final is not None:
            return ""
        seen, self._shown = self._shown, self.text
        return _extension(self._shown, seen)

    def cues(self) -> list[tuple[float, float, str]]:
        """Return the cues of subtitles: start and end in seconds, and text."""
        if self.segments:
            return [(each["start"], each["end"], each["text"].strip()) for each in self.segments]
        text = self.text.strip()
        return [(0.0, self.duration, text)] if text else []

    def full_segments(self) -> list[dict[str, Any]]:
        """Return the segments in the API's form."""
        return [{"id": i} | _SEGMENT | segment for i, segment in enumerate(self.segments)]


def _clock(seconds: float, comma: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{comma}{milliseconds % 1000:03}"


def _cue_text(text: str) -> str:
    # A blank line ends a cue, and an arrow would start the next one.
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line).replace("-->", "->")


def write_srt(transcript: Transcript) -> str:
    """Return the transcript as SubRip subtitles."""
    return "".join(
        f"{i}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{_cue_text(text)}\n\n"
        for i, (start, end, text) in enumerate(transcript.cues(), 1)
    )


def write_vtt(transcript: Transcript) -> str:
    """Return the transcript as WebVTT subtitles."""
    return "WEBVTT\n\n" + "".join(
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{_cue_text(text)}\n\n"
        for start, end, text in transcript.cues()
    )
