"""What a request of a schedule tells its model to do, and what a client must then get.

The script travels inside the request: a model here is one function that does what it is asked. So the answer is known
before it is given, piece by piece, and every piece says which request it is for; a piece that is lost, doubled, out
of order or somebody else's cannot go unnoticed. The request is checked in the same way, by a filling that follows
from its number.
"""

from __future__ import annotations

import base64
import json
from typing import Any, Final, Literal

import attrs

from ..core.model import Kind

__all__ = ["MARGIN", "Failure", "Script", "ScriptedFailure", "read_script"]

#: How a scripted model fails: with an error that is meant for the client, or with one that is not.
Failure = Literal["told", "untold"]

#: Seconds by which things may be later than arithmetic says, without network or load being in the way.
MARGIN: Final = 0.05

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"


class ScriptedFailure(Exception):
    """What a model raises that was told to fail without telling."""


@attrs.frozen
class Script:
    """What a model is to do for one request. Durations are seconds.

    Attributes:
        number: of the request.
        kind: of the model.
        pieces: how many pieces of output it gives.
        size: characters or bytes of each piece, at least.
        first_after: how long it is silent at first.
        interval: how long it waits after each piece.
        fails: how it fails, if it does.
        fails_at: after how many pieces.
        stalls_at: after how many pieces it is silent for once; never if negative.
        stall: for how long.
        clings: how long it goes on after it was cancelled.
        filling: bytes that the request has beyond what it needs.
        model_last: in a form, the model comes behind the file.
    """

    number: int
    kind: Kind
    pieces: int = 5
    size: int = 0
    first_after: float = 0.0
    interval: float = 0.1
    fails: Failure | None = None
    fails_at: int = 0
    stalls_at: int = -1
    stall: float = 0.0
    clings: float = 0.0
    filling: int = 0
    model_last: bool = False

    def dump(self) -> str:
        """Return the text of the request."""
        return json.dumps({**attrs.asdict(self), "f": filling(self.number, self.filling)})

    def piece(self, index: int) -> str:
        """Return a piece of the output."""
        head = f"{self.number}.{index} "
        return head + filling(self.number + index, self.size - len(head))

    @property
    def whole(self) -> str:
        """The complete output."""
        return "".join(self.piece(index) for index in range(self.pieces))

    @property
    def vector(self) -> list[float]:
        """The complete output of a model that embeds."""
        return [float(self.number), float(self.pieces), 0.5]

    @property
    def bytes_out(self) -> int:
        """About how large the output is."""
        return self.pieces * max(self.size, 8)

    @property
    def duration(self) -> float:
        """How long it takes if nobody is in the way."""
        return self.first_after + self.outputs * self.interval + self.stalled

    @property
    def stalled(self) -> float:
        """How long it stalls, if it comes to that."""
        return self.stall if 0 <= self.stalls_at <= self.outputs else 0.0

    @property
    def outputs(self) -> int:
        """How many pieces there are before it ends or fails."""
        return self.pieces if self.fails is None else min(self.fails_at, self.pieces)

    @property
    def longest_silence(self) -> float:
        """How long it is silent at most."""
        return max(
            self.first_after + (self.stalled if self.stalls_at == 0 else 0.0), self.interval + self.stalled
        )

    def value(self, index: int) -> Any:
        """Return a piece of the output in the form in which a handler of this kind gives it."""
        if self.kind == "embedding":
            return self.vector
        text = self.piece(index)
        return text.encode() if self.kind in ("tts", "image_generation") else text

    def request(self, model: str, *, stream: bool, route: str) -> tuple[str, bytes, str]:
        """Return path, body and content type of a request that carries this script.

        Args:
            model: whom to ask.
            stream: whether the answer is to be streamed, where that can be chosen.
            route: for a chat model, ``completions`` or ``chat``.
        """
        text = self.dump()
        if self.kind == "asr":
            return "/v1/audio/transcriptions", *_form(model, text, stream, self.model_last)
        if self.kind == "chat" and route == "completions":
            path, fields = "/v1/completions", {"prompt": text, "stream": stream}
        elif self.kind == "chat":
            path = "/v1/chat/completions"
            fields = {"messages": [{"role": "user", "content": text}], "stream": stream}
        elif self.kind == "embedding":
            path, fields = "/v1/embeddings", {"input": text}
        elif self.kind == "tts":
            path, fields = "/v1/audio/speech", {"input": text, "voice": "any"}
        else:
            path, fields = "/v1/images/generations", {"prompt": text}
        return path, json.dumps({"model": model, **fields}).encode(), "application/json"

    def is_whole(self, body: bytes) -> bool:
        """Return whether an answer that is not a stream of events is exactly what it must be."""
        if self.kind == "tts":
            return body == self.whole.encode()
        try:
            return self._is_whole_object(json.loads(body))
        except (LookupError, TypeError, ValueError):
            return False

    def _is_whole_object(self, answer: Any) -> bool:
        if self.kind == "embedding":
            return bool(answer["data"][0]["embedding"] == self.vector)
        if self.kind == "image_generation":
            return base64.b64decode(answer["data"][0]["b64_json"]) == self.whole.encode()
        if self.kind == "asr":
            return bool(answer["text"] == self.whole)
        choice = answer["choices"][0]
        return bool((choice["message"]["content"] if "message" in choice else choice["text"]) == self.whole)


def filling(number: int, length: int) -> str:
    """Return so many characters that depend on a number."""
    if length <= 0:
        return ""
    start = number * 7 % len(_ALPHABET)
    turned = _ALPHABET[start:] + _ALPHABET[:start]
    # A period that is no divisor of any buffer's size, so that a piece which is cut out or doubled shifts the rest.
    return (turned * (length // len(turned) + 1))[:length]


def read_script(text: str) -> Script:
    """Return the script that a request carries.

    Raises:
        ValueError: the request is damaged.
    """
    fields = json.loads(text)
    filled = fields.pop("f")
    script = Script(**fields)
    if filled != filling(script.number, script.filling):
        raise ValueError(f"the body of request {script.number} was damaged")
    return script


def _form(model: str, text: str, stream: bool, model_last: bool) -> tuple[bytes, str]:
    boundary = "scripted-request"
    fields = [("model", model), *([("stream", "true")] if stream else [])]
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields
    ]
    file = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        f"Content-Type: audio/wav\r\n\r\n{text}\r\n"
    )
    parts.insert(0 if model_last else len(parts), file)
    return "".join([*parts, f"--{boundary}--\r\n"]).encode(), f"multipart/form-data; boundary={boundary}"
