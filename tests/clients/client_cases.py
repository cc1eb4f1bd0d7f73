"""What is asked on every route, and what every client has to get for it.

One table. A case says which method of the client is called with what, and the whole of the answer: a value, or the
events of a stream. Both clients decode JSON, events, base64 and forms with code of their own, and have to arrive at
the same.

The table is open: a route that is new needs a case in :data:`CASES`, and a test fails until there is one.
"""

from __future__ import annotations

from typing import Any, Final
from unittest.mock import ANY

from client_case import Case
from client_media import IMAGES, SOUND, VECTORS, VERDICTS
from client_texts import RESPONSES, TEXTS

__all__ = ["CASES", "endpoint_of"]

_VISION: Final = {
    "id": "org/vision-model", "object": "model", "created": ANY, "owned_by": "trio-cluster", "kind": "chat",
    "capabilities": {"vision": True}, "context_window": 4096, "license": "MIT", "trio_cluster_via": ANY,
    "modalities": {"input": ["text", "image"], "output": ["text"]}, "state": "ready",
}  # fmt: skip


def _sees_the_model(answer: Any, expected: Any) -> None:
    assert [each for each in answer if each["id"] == expected["id"]] == [expected]


_MODELS: Final = {
    "models": Case(method="models.list", value=_VISION, see=_sees_the_model),
    "a model": Case(method="models.retrieve", positional=("org/vision-model",), value=_VISION),
}

#: All cases, by what they are about.
CASES: Final = {**TEXTS, **RESPONSES, **VECTORS, **VERDICTS, **SOUND, **IMAGES, **_MODELS}

_CALLED_OTHERWISE: Final = {
    "images.generate": "images.generations",
    "images.edit": "images.edits",
    "moderations.create": "moderations",
}


def endpoint_of(case: Case) -> str:
    """Return the name of the endpoint that a case asks, or of what it asks instead of one."""
    if case.method == "post":
        path: str = case.positional[0]
        return path.removeprefix("/")
    return _CALLED_OTHERWISE.get(case.method, case.method.removesuffix(".create"))
