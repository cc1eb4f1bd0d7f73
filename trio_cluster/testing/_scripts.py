"""Scripts: what a request of a schedule tells its model to do, and what the client must then receive.

The script travels inside the request, and a scripted model is one function that does what its request says. So the
output is known before it is made, piece by piece, and every piece names the request that it belongs to: a piece that
is lost, duplicated, out of order, or of another request is always found. The request is checked in the same way, by
padding that follows from its number.
"""

from __future__ import annotations

import base64
import json
from typing import Any, Final, Literal

import attrs

from ..core.model import Kind

__all__ = ["MARGIN", "Failure", "Script", "ScriptedFailure", "read_script"]

#: How a scripted model fails: with an ``ApiError``, which the client gets as it is, or with any other exception.
Failure = Literal["api_error", "exception"]

#: Seconds by which things may be later than computed, without any delay by network or load.
MARGIN: Final = 0.05

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"


class ScriptedFailure(Exception):
    """Raised by a model whose script fails with an ``exception``."""


@attrs.frozen
class Script:
    """What a model is to do for one request. Durations are seconds.

    Attributes:
        number: of the request.
        kind: of the model.
        pieces: how many pieces of output it gives.
        size: characters or bytes of each piece, at least.
        first_after: how long it waits before the first piece.
        interval: how long it waits after each piece.
        fails: how it fails, if it does.
        fails_at: after how many pieces it fails.
        stalls_at: after how many pieces it stalls, once; never if negative.
        stall: how long it stalls.
        ignore_cancellation_for: how long it continues after it was cancelled.
        padding: characters in the request beyond what it needs.
        model_last: in a form, the field ``model`` comes behind the file.
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
    ignore_cancellation_for: float = 0.0
    padding: int = 0
    model_last: bool = False

    def dump(self) -> str:
        """Return the text of the request, which carries the script and the padding."""
        return json.dumps({**attrs.asdict(self), "filler": _filler(self.number, self.padding)})

    def piece(self, index: int) -> str:
        """Return one piece of the output."""
        head = f"{self.number}.{index} "
        return head + _filler(self.number + index, self.size - len(head))

    @property
    def output(self) -> str:
        """The complete output."""
        return "".join(self.piece(index) for index in range(self.pieces))

    @property
    def vector(self) -> list[float]:
        """The complete output of an embedding model."""
        return [float(self.number), float(self.pieces), 0.5]

    @property
    def output_bytes(self) -> int:
        """About how many bytes the output has."""
        return self.pieces * max(self.size, 8)

    @property
    def duration(self) -> float:
        """How long it takes if nothing delays it."""
        return self.first_after + self.pieces_given * self.interval + self.stalled

    @property
    def stalled(self) -> float:
        """How long it stalls; 0 if it ends before."""
        return self.stall if 0 <= self.stalls_at <= self.pieces_given else 0.0

    @property
    def pieces_given(self) -> int:
        """How many pieces it gives before it ends or fails."""
        return self.pieces if self.fails is None else min(self.fails_at, self.pieces)

    @property
    def longest_silence(self) -> float:
        """The longest time without output."""
        return max(
            self.first_after + (self.stalled if self.stalls_at == 0 else 0.0), self.interval + self.stalled
        )

    def value(self, index: int) -> Any:
        """Return one piece of the output, in the type that a handler of this kind gives."""
        if self.kind == "embedding":
            return self.vector
        text = self.piece(index)
        return text.encode() if self.kind in ("tts", "image_generation") else text

    def request(self, model: str, *, stream: bool, route: str) -> tuple[str, bytes, str]:
        """Return path, body and content type of a request that carries this script.

        Args:
            model: the name of the model.
            stream: ask for a stream, where the route has the choice.
            route: for a chat model, ``chat``, ``completions`` or ``messages``.
        """
        text = self.dump()
        if self.kind == "asr":
            return "/v1/audio/transcriptions", *_form(model, text, stream, self.model_last)
        if self.kind == "chat" and route == "completions":
            path, fields = "/v1/completions", {"prompt": text, "stream": stream}
        elif self.kind == "chat":
            path = "/v1/chat/completions"
            fields = {"messages": [{"role": "user", "content": text}], "stream": stream}
            if route == "messages":
                path, fields = "/v1/messages", fields | {"max_tokens": 9}
        elif self.kind == "embedding":
            path, fields = "/v1/embeddings", {"input": text}
        elif self.kind == "tts":
            path, fields = "/v1/audio/speech", {"input": text, "voice": "any"}
        else:
            path, fields = "/v1/images/generations", {"prompt": text}
        return path, json.dumps({"model": model, **fields}).encode(), "application/json"

    def is_complete(self, body: bytes) -> bool:
        """Return whether the body of a response that is not a stream of events holds exactly the complete output."""
        if self.kind == "tts":
            return body == self.output.encode()
        try:
            return self._is_complete_object(json.loads(body))
        except (LookupError, TypeError, ValueError):
            return False

    def _is_complete_object(self, response: Any) -> bool:
        if self.kind == "embedding":
            return bool(response["data"][0]["embedding"] == self.vector)
        if self.kind == "image_generation":
            return base64.b64decode(response["data"][0]["b64_json"]) == self.output.encode()
        if self.kind == "asr":
            return bool(response["text"] == self.output)
        if response.get("type") == "message":
            return bool([block["text"] for block in response["content"]] == [self.output])
        choice = response["choices"][0]
        return bool((choice["message"]["content"] if "message" in choice else choice["text"]) == self.output)


def read_script(text: str) -> Script:
    """Return the script that a request carries.

    Raises:
        ValueError: the request is damaged.
    """
    fields = json.loads(text)
    filler = fields.pop("filler")
    script = Script(**fields)
    if filler != _filler(script.number, script.padding):
        raise ValueError(f"the body of request {script.number} was damaged")
    return script


def _filler(number: int, length: int) -> str:
    """Return ``length`` characters that depend on ``number``; none if ``length`` is negative."""
    if length <= 0:
        return ""
    start = number * 7 % len(_ALPHABET)
    rotated = _ALPHABET[start:] + _ALPHABET[:start]
    # The period divides no buffer size, so a part that is cut out or duplicated shifts everything behind it.
    return (rotated * (length // len(rotated) + 1))[:length]


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
