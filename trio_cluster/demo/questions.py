"""One request for each of the demo's models, and a check of its response.

The requests build on each other: the speech model's audio is the transcription model's input. They are sent with the
standard library's HTTP client, over the API that every client uses.
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

#: Seconds that one response may take.
_TIMEOUT: Final = 60.0

_SENTENCE: Final = "Several machines can answer as one."


class ApiFailed(Exception):
    """A request has failed, or its response is not as expected; the message says why."""


@attrs.frozen
class Api:
    """A client of the demo's API. Its methods block, and raise :class:`ApiFailed`.

    Attributes:
        host: a name or an address of this machine.
        port: the port of the API.
    """

    host: str
    port: int

    @property
    def url(self) -> str:
        """The base URL of the API, as clients of the OpenAI API need it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    def models(self) -> list[str]:
        """Return the names of the models that are served."""
        return [entry["id"] for entry in json.loads(self._call("/models", None, ""))["data"]]

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """POST a JSON object, and return the body of the response."""
        return self._call(path, json.dumps(body).encode(), "application/json")

    def upload(self, path: str, model: str, filename: str, data: bytes) -> bytes:
        """POST a form with the fields ``model`` and ``file``, and return the body of the response."""
        line = "trio-cluster-demo-boundary"
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
        # Without the configured proxy: the API is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_TIMEOUT) as response:
                data: bytes = response.read()
                return data
        except urllib.error.HTTPError as error:
            content = error.read().decode(errors="replace")
            raise ApiFailed(f"{error.code} {content}") from error
        except OSError as error:
            raise ApiFailed(str(error)) from error


@attrs.frozen
class Question:
    """A question to one model.

    Attributes:
        kind: the model's kind.
        model: the model's name.
        text: the question, as it is shown.
        ask: sends the request. Returns the answer as it is shown, or raises :class:`ApiFailed`. Its second argument is
            a dictionary in which a question can leave data for later ones.
    """

    kind: str
    model: str
    text: str
    ask: Callable[[Api, dict[str, bytes]], str]


def _require(condition: bool, answer: str) -> None:
    if not condition:
        raise ApiFailed(f"unexpected answer: {answer}")


_CHAT: Final = "What is the capital of France? Answer in one short sentence."


def _chat(api: Api, shared: dict[str, bytes]) -> str:
    message = {"role": "user", "content": _CHAT}
    body = {"model": "smollm2", "messages": [message], "max_tokens": 40, "temperature": 0}
    answer: str = json.loads(api.post("/chat/completions", body))["choices"][0]["message"]["content"]
    _require("paris" in answer.lower(), answer)
    return answer


_TEXTS: Final = ("How do I reset my password?", "I cannot log in to my account.", "The cat sat on the mat.")


def _embeddings(api: Api, shared: dict[str, bytes]) -> str:
    answer = json.loads(api.post("/embeddings", {"model": "all-MiniLM-L6-v2", "input": list(_TEXTS)}))
    first, second, third = (entry["embedding"] for entry in answer["data"])

    def likeness(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    near, far = likeness(first, second), likeness(first, third)
    shown = f"the second with {near:.2f}, the third with {far:.2f} ({len(first)} dimensions)"
    _require(near > far + 0.1, shown)
    return shown


def _speech(api: Api, shared: dict[str, bytes]) -> str:
    audio = api.post("/audio/speech", {"model": "hibari", "input": _SENTENCE, "voice": "alloy"})
    _require(audio[:4] == b"RIFF", repr(audio[:40]))
    shared["speech"] = audio
    (rate,) = struct.unpack_from("<I", audio, 24)
    seconds = (len(audio) - 44) / (2 * rate)
    shown = f"{len(audio)} bytes of WAV, {seconds:.1f} s at {rate} Hz"
    _require(seconds > 1.0, shown)
    return shown


def _transcription(api: Api, shared: dict[str, bytes]) -> str:
    if "speech" not in shared:
        raise ApiFailed("there is no audio: the speech model has failed")
    answer = json.loads(
        api.upload("/audio/transcriptions", "whisper-tiny.en", "speech.wav", shared["speech"])
    )["text"]
    spoken, understood = (
        set("".join(c for c in each.lower() if c.isalpha() or c == " ").split())
        for each in (_SENTENCE, answer)
    )
    _require(len(spoken & understood) >= len(spoken) - 1, answer)
    return str(answer).strip()


def _image(api: Api, shared: dict[str, bytes]) -> str:
    body = {"model": "digits", "prompt": "a handwritten seven", "size": "64x64", "seed": 7}
    answer = json.loads(api.post("/images/generations", body))
    picture = base64.b64decode(answer["data"][0]["b64_json"])
    _require(picture[:8] == b"\x89PNG\r\n\x1a\n", repr(picture[:40]))
    width, height = struct.unpack_from(">II", picture, 16)
    shown = f"{len(picture)} bytes of PNG, {width} by {height}"
    _require((width, height) == (64, 64), shown)
    return f"{shown}\n{_drawn(picture, width, height)}"


def _drawn(picture: bytes, width: int, height: int) -> str:
    """Return a grey PNG as text. Its rows must be stored unfiltered, as those of the ``digits`` model are."""
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
    Question("asr", "whisper-tiny.en", "what does that speech say?", _transcription),
    Question("image_generation", "digits", "draw: a handwritten seven", _image),
)
