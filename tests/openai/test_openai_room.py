"""The room as a whole: its table of routes, its events, and what it does not need."""

from __future__ import annotations

import json
import subprocess
import sys

import attrs
import pytest

from trio_cluster.core.model import KINDS
from trio_cluster.errors import ApiError
from trio_cluster.openai import DONE, ENDPOINTS, PING, error_body, error_event, event
from trio_cluster.openai.sse import named_event
from trio_cluster.testing import read_stream


def test_the_routes_are_the_documented_ones() -> None:
    assert {each.path: each.kind for each in ENDPOINTS.values()} == {
        "/chat/completions": "chat",
        "/completions": "chat",
        "/responses": "chat",
        "/embeddings": "embedding",
        "/audio/transcriptions": "asr",
        "/audio/translations": "asr",
        "/audio/speech": "tts",
        "/images/generations": "image_generation",
        "/images/edits": "image_edit",
        "/rerank": "rerank",
        "/moderations": "moderation",
    }
    assert {each.kind for each in ENDPOINTS.values()} == set(KINDS) - {"any", "custom"}
    assert all(name == each.name for name, each in ENDPOINTS.items())


def test_the_table_of_routes_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        ENDPOINTS["x"] = ENDPOINTS["embeddings"]  # type: ignore[index]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        ENDPOINTS["embeddings"].path = "/x"  # type: ignore[misc]


def test_events_and_comments_have_the_form_that_clients_read() -> None:
    assert event(b"{}") == b"data: {}\n\n"
    assert named_event("a.b", b"{}") == b"event: a.b\ndata: {}\n\n"
    assert DONE == b"data: [DONE]\n\n"
    assert PING == b": ping\n\n"


def test_an_error_is_the_same_object_in_a_stream_and_without_one() -> None:
    error = ApiError(400, "no\nway", code="c", param="p")
    assert json.loads(error_body(error)) == error.envelope()
    report = read_stream(error_event(error))
    assert report.ending == "failed"
    assert report.error == error.envelope()["error"]


@pytest.mark.parametrize("message", ["\ud800", object(), float("nan")])
def test_an_error_can_be_written_whatever_is_in_it(message: object) -> None:
    error = ApiError(500, message)  # type: ignore[arg-type]
    assert "error" in json.loads(error_body(error))
    assert b"\n" not in error_body(error)


def test_no_array_library_is_imported() -> None:
    program = "import sys, trio_cluster.openai; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
