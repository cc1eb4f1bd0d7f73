"""Sample requests for a model of each kind, and the part of a response that can be compared."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Mapping
from typing import Any, Final

from ..core.model import Kind
from ._grammar import read_stream

__all__ = ["CHAT_ENDPOINTS", "ENDPOINT_OF", "comparable", "encode", "sample", "supports_streaming"]

#: The endpoint that is checked for each kind; for ``custom``, a route that the OpenAI API does not have.
ENDPOINT_OF: Final[Mapping[Kind, str]] = {
    "chat": "chat.completions",
    "embedding": "embeddings",
    "asr": "audio.transcriptions",
    "tts": "audio.speech",
    "image_generation": "images.generations",
    "image_edit": "images.edits",
    "rerank": "rerank",
    "moderation": "moderations",
    "custom": "/v1/sample",
}

#: The endpoints on which a chat model can be checked, and the fields that their requests need beside the messages.
CHAT_ENDPOINTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "chat.completions": {},
    "messages": {"max_tokens": 1024},
}

#: The signature of a PNG file, which is all that is needed of one.
_PICTURE: Final = b"\x89PNG\r\n\x1a\n"
_BOUNDARY: Final = "end-of-a-part"


def supports_streaming(kind: Kind) -> bool:
    """Return whether clients may ask a model of this kind for a stream of events."""
    return kind in ("chat", "asr")


def sample(kind: Kind, number: int) -> Mapping[str, Any]:
    """Return the fields of a short request. There are two for each kind, with the numbers 0 and 1."""
    text = ("The first of two requests.", "And here is the second one.")[number]
    samples: dict[Kind, dict[str, Any]] = {
        "chat": {"messages": [{"role": "user", "content": text}]},
        "embedding": {"input": [text, "Something else."]},
        "asr": {"file": _silence(1 + number)},
        "tts": {"input": text, "voice": "alloy"},
        "image_generation": {"prompt": text},
        "image_edit": {"image": _PICTURE, "prompt": text},
        "rerank": {"query": text, "documents": [text, "Something else."]},
        "moderation": {"input": text},
        "custom": {"text": text},
    }
    return samples[kind]


def encode(fields: Mapping[str, Any], *, stream: bool) -> tuple[bytes, str]:
    """Return the body of a request, and its content type: a form if any field is ``bytes``, otherwise JSON."""
    whole = {"model": "model", **({"stream": True} if stream else {}), **fields}
    if not any(isinstance(value, bytes) for value in whole.values()):
        return json.dumps(whole).encode(), "application/json"
    body = b""
    for name, value in whole.items():
        head = f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"'
        if isinstance(value, bytes):
            name, mime_type = ("sound.wav", "audio/wav") if name == "file" else ("picture.png", "image/png")
            body += f'{head}; filename="{name}"\r\ncontent-type: {mime_type}\r\n\r\n'.encode() + value
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            body += f"{head}\r\n\r\n{text}".encode()
        body += b"\r\n"
    return body + f"--{_BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={_BOUNDARY}"


def comparable(kind: Kind, body: bytes, *, stream: bool) -> Any:
    """Return the content of a response, without ids and times, to compare it with another one.

    Returns:
        Anything that can be compared; it is false if the response has no content.

    Raises:
        AssertionError, KeyError, TypeError, ValueError: it is not a response of this kind.
    """
    if stream:
        report = read_stream(body)
        if report.ending != "finished":
            raise ValueError(f"the stream was {report.ending}")
        calls = [choice["delta"].get("tool_calls") for event in report.events for choice in _choices(event)]
        calls += [_called(event.get("content_block")) for event in report.events]
        return "".join(report.texts.values()) or [call for call in calls if call]
    if kind in ("tts", "custom"):
        return body
    if kind == "asr":
        return json.loads(body)["text"]
    response = json.loads(body)
    if kind == "chat" and response.get("type") == "message":
        return [(block.get("text"), _called(block)) for block in response["content"]]
    if kind == "chat":
        messages = [choice["message"] for choice in response["choices"]]
        contents = [(message.get("content"), message.get("tool_calls")) for message in messages]
        return contents if any(map(any, contents)) else []
    if kind == "rerank":
        return [(item["index"], item["relevance_score"]) for item in response["results"]]
    if kind == "moderation":
        return [(item["flagged"], item["category_scores"]) for item in response["results"]]
    name = "embedding" if kind == "embedding" else "b64_json"
    return [item[name] for item in response["data"]]


def _choices(event: Mapping[str, Any]) -> list[Any]:
    choices: list[Any] = event.get("choices", [])
    return choices


def _called(block: Any) -> Any:
    """Return the call that a content block of a message is; ``None`` if it is none."""
    if not isinstance(block, dict) or block["type"] != "tool_use":
        return None
    return block["name"], block["input"]


def _silence(tenths: int) -> bytes:
    """Return a WAV file with ``tenths`` tenths of a second of silence."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(2 * 1_600 * tenths))
    return file.getvalue()
