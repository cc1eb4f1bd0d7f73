"""The output of handlers, and the errors for values that they cannot give."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from trio_cluster.core.model import KINDS, Kind
from trio_cluster.openai import OutputChunk, to_chunk

MEANINGS: dict[Kind, list[tuple[Any, str]]] = {
    "chat": [("x", "text_delta"), ({"a": 1}, "json")],
    "asr": [("x", "text_delta"), ({"text": "x"}, "json")],
    "tts": [(b"x", "audio"), (bytearray(b"x"), "audio"), (memoryview(b"x"), "audio")],
    "image_generation": [(b"x", "image"), ({"a": 1}, "json")],
    "image_edit": [(b"x", "image"), ({"a": 1}, "json")],
    "rerank": [
        (0.5, "scores"),
        (1, "scores"),
        (np.float32(0.5), "scores"),
        ([0.5, 1], "scores"),
        (np.zeros(3), "scores"),
        ({"results": []}, "json"),
    ],
    "moderation": [({"violence": 0.5}, "json")],
    "custom": [("x", "text_delta"), ({"a": 1}, "json"), (b"x", "data")],
    "embedding": [
        ([0.5, 1], "embeddings"),
        ((0.5, 1), "embeddings"),
        ([[0.5], [1]], "embeddings"),
        (np.zeros(3), "embeddings"),
        (np.zeros((2, 3)), "embeddings"),
        ([np.zeros(3), np.zeros(3)], "embeddings"),
        ([np.float32(0.5)], "embeddings"),
        ({"usage": {}}, "json"),
    ],
}
NOTHING: dict[Kind, list[Any]] = {
    "chat": [None, 1, b"x", ["x"], [0.5]],
    "asr": [None, b"x", ["x"]],
    "tts": [None, "x", {"a": 1}, [b"x"]],
    "image_generation": [None, "x", 1],
    "image_edit": [None, "x", 1],
    "rerank": [None, "x", b"x", True, [], ["x"], [[0.5]], np.zeros((2, 1))],
    "moderation": [None, True, 0.5, "x", b"x"],
    "custom": [None, 1, ["x"]],
    "embedding": [
        None,
        0.5,
        "x",
        b"x",
        [],
        [[]],
        ["x"],
        [True],
        [[0.5], "x"],
        np.zeros((1, 1, 1)),
        np.float32(1),
    ],
}


@pytest.mark.parametrize(
    ("kind", "value", "meaning"), [(kind, *each) for kind, pairs in MEANINGS.items() for each in pairs]
)
def test_a_plain_value_means_what_its_kind_of_model_makes(kind: Kind, value: Any, meaning: str) -> None:
    assert to_chunk(kind, value).kind == meaning


@pytest.mark.parametrize(
    ("kind", "value"), [(kind, value) for kind, values in NOTHING.items() for value in values]
)
def test_a_wrong_value_is_refused_with_what_is_expected(kind: Kind, value: Any) -> None:
    with pytest.raises(TypeError, match=f"of kind {kind} gives .* or OutputChunk; it gave") as caught:
        to_chunk(kind, value)
    assert type(value).__name__ in str(caught.value)


def test_there_are_meanings_for_every_kind() -> None:
    # What stands behind a model of kind `any` gives bytes to the client, and never a chunk.
    assert MEANINGS.keys() == NOTHING.keys() == set(KINDS) - {"any"}


def test_a_chunk_is_itself() -> None:
    chunk = OutputChunk.usage(1, 2)
    assert to_chunk("tts", chunk) is chunk


@pytest.mark.parametrize(
    ("make", "arguments", "error"),
    [
        (OutputChunk.text_delta, (b"x",), TypeError),
        (OutputChunk.text_delta, ("x", -1), ValueError),
        (OutputChunk.text_delta, ("x", True), TypeError),
        (OutputChunk.final_text, (None,), TypeError),
        (OutputChunk.embedding, ([[0.5]],), TypeError),
        (OutputChunk.embedding, ([],), TypeError),
        (OutputChunk.embedding, ([0.5], -1), ValueError),
        (OutputChunk.embeddings, ([0.5],), TypeError),
        (OutputChunk.audio, ("x",), TypeError),
        (OutputChunk.audio, (b"x", 1), TypeError),
        (OutputChunk.image, ("x",), TypeError),
        (OutputChunk.partial_image, ("x",), TypeError),
        (OutputChunk.partial_image, (b"x", 1), TypeError),
        (OutputChunk.data, ("x",), TypeError),
        (OutputChunk.data, (b"x", 1), TypeError),
        (OutputChunk.scores, (0.5,), TypeError),
        (OutputChunk.scores, ([],), TypeError),
        (OutputChunk.json, ([],), TypeError),
        (OutputChunk.error, ("c", "m", 200), ValueError),
        (OutputChunk.error, ("c", "m", "500"), TypeError),
        (OutputChunk.error, (1, "m"), TypeError),
        (OutputChunk.usage, (-1, 0), ValueError),
        (OutputChunk.usage, (1.0, 0), TypeError),
        (OutputChunk.finish, ("done",), ValueError),
        (OutputChunk.reasoning, (b"x",), TypeError),
        (OutputChunk.reasoning, ("x", -1), ValueError),
        (OutputChunk.tool_call, ("", "{}"), ValueError),
        (OutputChunk.tool_call, (None, "{}"), TypeError),
        (OutputChunk.tool_call, ("f", None), TypeError),
        (OutputChunk.tool_call, ("f", ["x"]), TypeError),
        (OutputChunk.tool_call, ("f", {"x": float("nan")}), ValueError),
        (OutputChunk.tool_call, ("f", {"x": object()}), TypeError),
        (partial(OutputChunk.tool_call, id=1), ("f", "{}"), TypeError),
        (partial(OutputChunk.tool_call, index=-1), ("f", "{}"), ValueError),
        (partial(OutputChunk.tool_call, choice=True), ("f", "{}"), TypeError),
    ],
)
def test_a_chunk_that_cannot_be_is_refused_where_it_is_made(
    make: Any, arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        make(*arguments)
