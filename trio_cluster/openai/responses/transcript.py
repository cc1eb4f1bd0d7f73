"""Speech written down: the pieces that a handler gives, with their times, and the ways to write them.

A handler for speech recognition may give

- text, as ``str`` or ``OutputChunk.text_delta``, and ``OutputChunk.final_text``;
- a ``dict``, or several: ``{"text", "language", "duration", "segments", "words", "logprobs", "languages",
  "usage"}``, all optional. A segment is ``{"start", "end", "text"}`` with times in seconds, and whatever else of
  the API's segment the model knows, above all ``speaker``; a word is ``{"word", "start", "end"}``, a logprob
  ``{"token", "logprob", "bytes"}``. Lists of later dicts extend those of earlier ones.

Text that is not given is made of the segments' texts, and text that is given later takes their place. Times that are
not given are not invented: subtitles without segments are a single cue over ``duration``, and that is 0 where nobody
said otherwise.
"""

from __future__ import annotations

from typing import Any, Final

from ..json_values import plain

__all__ = ["Transcript", "write_srt", "write_vtt"]

#: The members of the API's segment that a model need not know, as "nothing remarkable".
_SEGMENT: Final[dict[str, Any]] = {
    "seek": 0,
    "tokens": [],
    "temperature": 0.0,
    "avg_logprob": 0.0,
    "compression_ratio": 1.0,
    "no_speech_prob": 0.0,
}
_LISTS: Final = ("segments", "words", "logprobs")


def _extension(text: str, seen: str) -> str:
    """Return what follows in ``text`` after what has been seen; nothing, where it does not begin with that."""
    return text[len(seen) :] if text.startswith(seen) else ""


def _require_number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number of seconds")
    if value < 0:
        raise ValueError(f"{what} must not be negative")
    return float(value)


class Transcript:
    """What has been heard so far.

    Attributes:
        segments: as given, each checked to have its times and its text.
        words: as given.
        logprobs: of the tokens, as given.
        members: other members of a handler's objects.
    """

    def __init__(self) -> None:
        self.segments: list[dict[str, Any]] = []
        self.words: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.members: dict[str, Any] = {}
        self._pieces: list[str] = []
        self._final: str | None = None
        self._shown = ""  # the texts of segments, as far as somebody has been told of them

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
        """Seconds of audio, as far as anybody has said."""
        if "duration" in self.members:
            return float(self.members["duration"])
        return max((float(segment["end"]) for segment in self.segments), default=0.0)

    def add_text(self, text: str) -> str:
        """Add a piece of text; return what of it is new to somebody who has seen the segments' texts."""
        if self._final is not None:
            raise ValueError("more text after the final text")
        seen = "" if self._pieces else self._shown
        self._pieces.append(text)
        return _extension(text.lstrip(), seen) if seen else text

    def set_text(self, text: str) -> str:
        """Say what the whole text is; return what of it extends the pieces, if anything does."""
        if self._final is not None:
            raise ValueError("a second final text")
        seen = "".join(self._pieces) or self._shown
        self._final = text
        return _extension(text, seen)

    def add_object(self, obj: dict[str, Any]) -> str:
        """Add a handler's object; return what is new of the text, given as such or in segments.

        Raises:
            TypeError: a member is of the wrong type.
            ValueError: a time is negative, or the segment ends before it starts.
        """
        obj = plain(obj)
        for name in _LISTS:
            given = obj.pop(name, None)
            if given is None:
                continue
            if not isinstance(given, list):
                raise TypeError(f"'{name}' must be a list")
            for i, each in enumerate(given if name != "logprobs" else ()):
                self._require_span(each, f"{name}[{i}]", "word" if name == "words" else "text")
            getattr(self, name).extend(given)
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
        """Return start, end and text of what subtitles show."""
        if self.segments:
            return [(each["start"], each["end"], each["text"].strip()) for each in self.segments]
        text = self.text.strip()
        return [(0.0, self.duration, text)] if text else []

    def full_segments(self) -> list[dict[str, Any]]:
        """Return the segments in the API's form."""
        return [{"id": i} | _SEGMENT | segment for i, segment in enumerate(self.segments)]

    @staticmethod
    def _require_span(value: Any, what: str, text: str) -> None:
        if not isinstance(value, dict):
            raise TypeError(f"{what} must be an object")
        start = _require_number(value.get("start"), f"'start' of {what}")
        end = _require_number(value.get("end"), f"'end' of {what}")
        if end < start:
            raise ValueError(f"{what} ends before it starts")
        if not isinstance(value.get(text), str):
            raise TypeError(f"'{text}' of {what} must be a string")


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
