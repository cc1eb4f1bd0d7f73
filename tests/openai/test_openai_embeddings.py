"""Embeddings, as lists and as base64."""

from __future__ import annotations

import base64
import math
import struct
from array import array
from typing import Any

import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse
from openai_answers import answer_json, encoder, send

from trio_cluster.errors import ApiError
from trio_cluster.openai import OutputChunk


def embed(values: list[Any], **fields: Any) -> Any:
    result = answer_json("embeddings", send("embeddings", **fields), values)
    if fields.get("encoding_format") != "base64":
        CreateEmbeddingResponse.model_validate(result, strict=True)
    return result


def vectors(result: Any) -> list[list[float]]:
    assert [each["index"] for each in result["data"]] == list(range(len(result["data"])))
    found = [each["embedding"] for each in result["data"]]
    return [decode(each) if isinstance(each, str) else each for each in found]


def decode(text: str) -> list[float]:
    data = base64.b64decode(text, validate=True)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def test_an_answer_is_a_list_of_embeddings() -> None:
    assert embed([[0.5, 1.0], OutputChunk.usage(3)]) == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}],
        "model": "m",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


SAME: list[Any] = [
    [[[0.5, 1], [2, -3]]],
    [[0.5, 1], [2, -3]],
    [[(0.5, 1), (2, -3)]],
    [np.array([[0.5, 1], [2, -3]])],
    [np.array([[0.5, 1], [2, -3]], dtype="f4")],
    [np.array([[0.5, 1], [2, -3]], dtype="f2")],
    [np.array([[0.5, 1], [2, -3]], dtype=">f8")],
    [np.array([0.5, 1]), np.array([2, -3])],
    [[np.array([0.5, 1]), [2, -3]]],
    [[np.float32(0.5), np.int64(1)], [2, -3]],
    [array("f", [0.5, 1]), array("d", [2, -3])],
    [OutputChunk.embeddings([[0.5, 1], [2, -3]])],
    [OutputChunk.embeddings(np.array([[0.5, 1], [2, -3]]))],
    [OutputChunk.embedding([2, -3], 1), OutputChunk.embedding([0.5, 1])],
    [OutputChunk.embedding([2, -3], 1), [0.5, 1]],
]


@pytest.mark.parametrize("values", SAME, ids=range(len(SAME)))
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_vectors_may_be_given_in_any_form(values: list[Any], encoding_format: str) -> None:
    result = embed(values, input=["x", "y"], encoding_format=encoding_format)
    assert vectors(result) == [[0.5, 1.0], [2.0, -3.0]]


def test_base64_is_little_endian_float32() -> None:
    text = embed([[1.0]], encoding_format="base64")["data"][0]["embedding"]
    assert base64.b64decode(text) == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize("vector", [[3.0, 4.0, 12.0], np.array([3.0, 4.0, 12.0], dtype="f4")])
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_vectors_are_cut_to_the_dimensions_and_have_length_one_again(
    vector: Any, encoding_format: str
) -> None:
    (cut,) = vectors(embed([vector], dimensions=2, encoding_format=encoding_format))
    assert cut == pytest.approx([0.6, 0.8])
    assert math.hypot(*cut) == pytest.approx(1)


def test_vectors_of_the_right_dimensions_are_left_alone() -> None:
    assert vectors(embed([[3.0, 4.0]], dimensions=2)) == [[3.0, 4.0]]


def test_a_vector_of_zeros_can_be_cut() -> None:
    assert vectors(embed([[0.0, 0.0]], dimensions=1)) == [[0.0]]


@pytest.mark.parametrize("vector", [[1.0, 2.0], np.zeros(2)])
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_more_dimensions_than_there_are_is_the_clients_error(vector: Any, encoding_format: str) -> None:
    with pytest.raises(ApiError) as caught:
        embed([vector], dimensions=3, encoding_format=encoding_format)
    assert (caught.value.status, caught.value.param) == (400, "dimensions")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [list, np.array], ids=["list", "array"])
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("dimensions", [None, 2])
def test_a_number_that_is_not_finite_is_the_handlers_failure(
    bad: float, make: Any, encoding_format: str, dimensions: int | None
) -> None:
    with pytest.raises(ValueError, match="finite"):
        embed([make([bad, 1.0, 2.0])], encoding_format=encoding_format, dimensions=dimensions)


def test_a_double_that_no_float_can_hold_is_the_handlers_failure() -> None:
    with pytest.raises(ValueError, match="finite"):
        embed([[1e300]], encoding_format="base64")
    assert vectors(embed([[1e300]])) == [[1e300]]


def test_large_numbers_whose_sum_is_too_large_are_finite() -> None:
    assert vectors(embed([[1e308, 1e308]])) == [[1e308, 1e308]]


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([], ValueError),
        ([[0.5]], ValueError),
        ([[0.5], [0.5], [0.5]], ValueError),
        ([[0.5], [0.5, 1]], ValueError),
        ([OutputChunk.embedding([0.5]), OutputChunk.embedding([0.5])], ValueError),
        ([OutputChunk.embedding([0.5], 2)], ValueError),
        ([[0.5, "x"], [0.5, 1]], TypeError),
        ([[0.5, None], [0.5, 1]], TypeError),
        ([{"data": []}], TypeError),
        ([OutputChunk.text_delta("x")], TypeError),
        ([OutputChunk.finish("stop")], TypeError),
        (["x"], TypeError),
    ],
)
def test_output_that_is_no_answer_is_the_handlers_failure(values: list[Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        embed(values, input=["x", "y"])


def test_a_dict_adds_members_to_the_answer() -> None:
    result = embed([[0.5], {"usage": {"prompt_tokens": 7, "total_tokens": 7}, "took": 3}])
    assert result["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert result["took"] == 3


def test_an_embedding_answer_is_sent_whole() -> None:
    writer = encoder("embeddings", send("embeddings"))
    assert not writer.streaming
    assert writer.encode([0.5]) == b""
    assert writer.head.content_type == "application/json"


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize("count", [3, 400])
def test_an_answer_in_parts_is_the_same_as_in_one_piece(form: str, count: int) -> None:
    numbers = np.random.default_rng(7).normal(size=(count, 500)).astype("f4")
    body = send("embeddings", input=["word"] * count, encoding_format=form)
    whole, parts = encoder("embeddings", body), encoder("embeddings", body)
    whole.encode(numbers)
    divided = parts.divide(numbers)
    assert [len(each.value) * 500 <= 4096 for each in divided] == [True] * len(divided)
    for each in divided:
        parts.encode(each)
    early = list(parts.early())
    assert b"".join([*early, parts.finish()]) == whole.finish()
    large = count == 400
    assert (len(early) > 10) is large
    # 64 KiB, and the bytes between the vectors.
    assert all(len(each) <= 66_000 for each in early)


def test_what_is_no_list_of_vectors_is_not_divided() -> None:
    embeddings = encoder("embeddings", send("embeddings", input=["word"]))
    for value in ([0.5, 1.0], {"usage": {"prompt_tokens": 1}}, OutputChunk.usage(3), np.zeros((0, 3))):
        assert len(embeddings.divide(value)) == 1


def test_an_answer_that_lacks_a_vector_gives_nothing_early() -> None:
    embeddings = encoder("embeddings", send("embeddings", input=["word"] * 1000))
    embeddings.encode(np.ones((999, 500)))
    with pytest.raises(ValueError, match="999 embeddings for 1000 inputs"):
        list(embeddings.early())
