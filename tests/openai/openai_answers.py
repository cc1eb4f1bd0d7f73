"""Helpers of these tests: sending a request, and encoding an answer to it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from trio_cluster.errors import InvalidRequest
from trio_cluster.openai import ENDPOINTS, Encoder, ModelRequest

BOUNDARY = "----tc"
FORM = f"multipart/form-data; boundary={BOUNDARY}"

#: The least that each JSON route takes.
LEAST: dict[str, dict[str, Any]] = {
    "chat.completions": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "completions": {"model": "m", "prompt": "hi"},
    "responses": {"model": "m", "input": "hi"},
    "messages": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
    "messages.count_tokens": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "embeddings": {"model": "m", "input": "hi"},
    "audio.speech": {"model": "m", "input": "hi", "voice": "v"},
    "images.generations": {"model": "m", "prompt": "hi"},
    "rerank": {"model": "m", "query": "hi", "documents": ["a", "b"]},
    "moderations": {"model": "m", "input": "hi"},
}


def send(endpoint: str, /, **fields: Any) -> Any:
    """Parse the least request to a route, with ``fields`` on top; ``...`` takes a field away."""
    body = {name: value for name, value in (LEAST[endpoint] | fields).items() if value is not ...}
    return ENDPOINTS[endpoint].parse(json.dumps(body).encode(), "application/json", {})


def form(*parts: tuple[str, str] | tuple[str, str, bytes]) -> bytes:
    """Build a form: (name, text) is a field, (name, filename, data) a file."""
    body = b""
    for name, text, *data in parts:
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        if data:
            body += f'; filename="{text}"\r\nContent-Type: audio/wav\r\n\r\n'.encode() + data[0] + b"\r\n"
        else:
            body += f"\r\n\r\n{text}\r\n".encode()
    return body + f"--{BOUNDARY}--\r\n".encode()


def upload(endpoint: str, *parts: tuple[str, str] | tuple[str, str, bytes]) -> Any:
    """Parse a form with a model and a file, and ``parts`` besides."""
    body = form(("model", "m"), *parts, ("file", "a.wav", b"RIFF"))
    return ENDPOINTS[endpoint].parse(body, FORM, {})


def refused(endpoint: str, /, **fields: Any) -> InvalidRequest:
    """Return the error that a request gets."""
    with pytest.raises(InvalidRequest) as caught:
        send(endpoint, **fields)
    return caught.value


def encoder(endpoint: str, request: ModelRequest) -> Encoder:
    return ENDPOINTS[endpoint].encoder(request, response_id="abc", created=1_700_000_000)


def answer(endpoint: str, request: ModelRequest, values: Iterable[Any]) -> bytes:
    """Encode a whole answer."""
    writer = encoder(endpoint, request)
    return b"".join([writer.encode(value) for value in values] + [writer.finish()])


def answer_json(endpoint: str, request: ModelRequest, values: Iterable[Any]) -> Any:
    return json.loads(answer(endpoint, request, values))
