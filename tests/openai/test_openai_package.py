"""The package as a whole: its table of routes, its events, and what it imports."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

import trio_cluster.openai
from trio_cluster.core.model import KINDS
from trio_cluster.errors import ApiError
from trio_cluster.openai import DONE, ENDPOINTS, KEEPALIVE, error_body, error_event, event
from trio_cluster.openai.sse import named_event
from trio_cluster.testing import read_stream


def test_the_routes_are_the_documented_ones() -> None:
    assert {each.path: each.kind for each in ENDPOINTS.values()} == {
        "/chat/completions": "chat",
        "/completions": "chat",
        "/responses": "chat",
        "/messages": "chat",
        "/messages/count_tokens": "custom",
        "/embeddings": "embedding",
        "/audio/transcriptions": "asr",
        "/audio/translations": "asr",
        "/audio/speech": "tts",
        "/images/generations": "image_generation",
        "/images/edits": "image_edit",
        "/rerank": "rerank",
        "/moderations": "moderation",
    }
    assert {each.kind for each in ENDPOINTS.values()} == set(KINDS) - {"any"}
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
    assert KEEPALIVE == b": keepalive\n\n"


def test_an_error_is_the_same_object_in_a_stream_and_without_one() -> None:
    error = ApiError(400, "no\nway", code="c", param="p")
    assert json.loads(error_body(error)) == error.envelope()
    report = read_stream(error_event(error))
    assert report.ending == "failed"
    assert report.error == error.envelope()["error"]


@pytest.mark.parametrize("message", ["\ud800", object(), float("nan")])
def test_an_error_with_any_value_in_it_can_be_written(message: object) -> None:
    error = ApiError(500, message)  # type: ignore[arg-type]
    assert "error" in json.loads(error_body(error))
    assert b"\n" not in error_body(error)


def test_no_array_library_is_imported() -> None:
    program = "import sys, trio_cluster.openai; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def imports_of(module: Path) -> set[str]:
    """Return the modules of the package that a module imports, by their paths: ``requests/types``."""
    package = Path(trio_cluster.openai.__file__).parent
    folder = module.relative_to(package).parent
    imported = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (package / folder).joinpath(*[".."] * (node.level - 1), *(node.module or "").split("."))
            if base.resolve().is_relative_to(package):
                imported.add(base.resolve().relative_to(package).as_posix())
    return imported


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("requests", {"json_values", "sse", "tool_names"}),
        ("responses", {"json_values", "sse", "tool_names", "requests/types"}),
    ],
)
def test_reading_requests_and_writing_answers_do_not_depend_on_each_other(
    folder: str, allowed: set[str]
) -> None:
    modules = list((Path(trio_cluster.openai.__file__).parent / folder).glob("*.py"))
    assert len(modules) > 10
    for module in modules:
        foreign = {each for each in imports_of(module) if not each.startswith(f"{folder}/")}
        assert foreign <= allowed, module.name
