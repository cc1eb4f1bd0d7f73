"""One real question for each of the demo's models, and what its answer must be like.

The questions build on each other: what the speech model says is what the listening one is given to write
    down. They are asked with the standard library's client, over the same API that everybody uses.
"""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from typing import Any, Final

import attrs

__all__ = ["QUESTIONS", "Api", "ApiFailed", "Question"]

#: Seconds that one answer may take.
_TIMEOUT: Final = 60.0

_SENTENCE: Final = "Several machines can answer as one."


class ApiFailed(Exception):
    """A question was not answered, or not as it should be; says why."""


@attrs.frozen
class Api:
    """The demo's API, for blocking calls in a thread."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Where it is, as clients want to know it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    def models(self) -> list[str]:
        """Return the names of the models that are there."""
        return [entry["id"] for entry in json.loads(self._call("/models", None, ""))["data"]]

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """Return the answer to a JSON request."""
        return self._call(path, json.dumps(body).encode(), "application/json")

    def upload(self, path: str, model: str, filename: str, data: bytes) -> bytes:
        """Return the answer to a form with a file in it."""
        line = "the-demo-s-own-line"
        body = io.BytesIO()
        body.write(f'--{line}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'.encode())
        body.write(
            f'--{line}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'.encode()
        )
        body.write(data + f"\r\n--{line}--\r\n".encode())
        return self._call(path, body.getvalue(), f"multipart/form-data; boundary={line}")

    def _call(self, path: str, body: bytes | None, content_type: str) -> bytes:
        request = urllib.request.Request(
            self.url + path, body, {"Content-Type": content_type} if body else {}
        )
        # A proxy that is configured for the rest of the world is not for this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_TIMEOUT) as answer:
                data: bytes = answer.read()
                return data
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise ApiFailed(f"{error.code} {said}") from error
        except OSError as error:
            raise ApiFailed(str(error)) from error


@attrs.frozen
class Question:
    """A question: ``ask`` returns the answer as it is to be shown, or raises :class:`ApiFailed`.

    ``ask`` is also given a dictionary in which one question can leave something for the next.
    """

    kind: str
    model: str
    text: str
    ask: Callable[[Api, dict[str, bytes]], str]


def _require(condition: bool, answer: str) -> None:
    if not condition:
        raise ApiFailed(f"not the answer that was expected: {answer}")


_CHAT: Final = "What is the capital of France? Answer in one short sentence."


def _chat(api: Api, heard: dict[str, bytes]) -> str:
    message = {"role": "user", "content": _CHAT}
    body = {"model": "smollm2", "messages": [message], "max_tokens": 40, "temperature": 0}
    answer: str = json.loads(api.post("/chat/completions", body))["choices"][0]["message"]["content"]
    _require("paris" in answer.lower(), answer)
    return answer


_TEXTS: Final = ("How do I reset my password?", "I cannot log in to my account.", "The cat sat on the mat.")


def _embeddings(api: Api, heard: dict[str, bytes]) -> str:
    answer = json.loads(api.post("/embeddings", {"model": "all-MiniLM-L6-v2", "input": list(_TEXTS)}))
    first, second, third = (entry["embedding"] for entry in answer["data"])

    def likeness(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    near, far = likeness(first, second), likeness(first, third)
    shown = f"the second with {near:.2f}, the third with {far:.2f} ({len(first)} dimensions)"
    _require(near > far + 0.1, shown)
    return shown


def _speech(api: Api, heard: dict[str, bytes]) -> str:
    audio = api.post("/audio/speech", {"model": "hibari", "input": _SENTENCE, "voice": "alloy"})
    _require(audio[:4] == b"RIFF", repr(audio[:40]))
    heard["speech"] = audio
    (rate,) = struct.unpack_from("<I", audio, 24)
    seconds = (len(audio) - 44) / (2 * rate)
    shown = f"{len(audio)} bytes of WAV, {seconds:.1f} s at {rate} Hz"
    _require(seconds > 1.0, shown)
    return shown


def _transcription(api: Api, heard: dict[str, bytes]) -> str:
    if "speech" not in heard:
        raise ApiFailed("there is no speech to listen to")
    answer = json.loads(
        api.upload("/audio/transcriptions", "whisper-tiny.en", "speech.wav", heard["speech"])
    )["text"]
    said, understood = (
        set("".join(c for c in each.lower() if c.isalpha() or c == " ").split())
        for each in (_SENTENCE, answer)
    )
    _require(len(said & understood) >= len(said) - 1, answer)
    return str(answer).strip()


def _image(api: Api, heard: dict[str, bytes]) -> str:
    body = {"model": "digits", "prompt": "a handwritten seven", "size": "64x64", "seed": 7}
    answer = json.loads(api.post("/images/generations", body))
    picture = base64.b64decode(answer["data"][0]["b64_json"])
    _require(picture[:8] == b"\x89PNG\r\n\x1a\n", repr(picture[:40]))
    width, height = struct.unpack_from(">II", picture, 16)
    shown = f"{len(picture)} bytes of PNG, {width} by {height}"
    _require((width, height) == (64, 64), shown)
    return f"{shown}\n{_drawn(picture, width, height)}"


def _drawn(picture: bytes, width: int, height: int) -> str:
    """Return a grey PNG as text. Its rows are known to be stored without filters."""
    position, packed = 8, b""
    while position < len(picture):
        size, kind = struct.unpack_from(">I4s", picture, position)
        if kind == b"IDAT":
            packed += picture[position + 8 : position + 8 + size]
        position += size + 12
    pixels = zlib.decompress(packed)
    rows = [pixels[y * (width + 1) + 1 : (y + 1) * (width + 1)] for y in range(2, height, 4)]
    return "\n".join("".join("@%#*+=-. "[value * 8 // 255] for value in row[::2]) for row in rows)


QUESTIONS: Final = (
    Question("chat", "smollm2", _CHAT, _chat),
    Question(
        "embedding",
        "all-MiniLM-L6-v2",
        f"which of these is like the first: {' / '.join(_TEXTS)}",
        _embeddings,
    ),
    Question("tts", "hibari", f"say: {_SENTENCE}", _speech),
    Question("asr", "whisper-tiny.en", "what was just said?", _transcription),
    Question("image_generation", "digits", "draw: a handwritten seven", _image),
)
