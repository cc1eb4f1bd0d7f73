"""Rankings: what handlers give, and what clients get."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from openai_answers import answer_json, send

from trio_cluster.openai import OutputChunk, RerankRequest

DOCUMENTS = ["a", "b", "c"]


def rank(values: list[Any], **fields: Any) -> Any:
    return answer_json("rerank", send("rerank", documents=DOCUMENTS, **fields), values)


def ranking(values: list[Any], **fields: Any) -> list[tuple[int, float]]:
    return [(each["index"], each["relevance_score"]) for each in rank(values, **fields)["results"]]


def test_documents_are_texts_however_they_are_sent() -> None:
    request = send("rerank", documents=["a", {"text": "b", "id": 7}], top_n=1, return_documents=True)
    assert request.documents == ["a", "b"]
    assert (request.query, request.top_n, request.return_documents) == ("hi", 1, True)
    assert request.raw["documents"] == ["a", {"text": "b", "id": 7}]
    assert (send("rerank").top_n, send("rerank").return_documents) == (None, False)


@pytest.mark.parametrize(
    "values",
    [
        [[0.25, 0.75, 0.5]],
        [0.25, 0.75, 0.5],
        [np.array([0.25, 0.75, 0.5], dtype=np.float32)],
        [[0.25], (0.75, 0.5)],
        [OutputChunk.scores([0.25, 0.75]), np.float64(0.5)],
        [
            {
                "results": [
                    {"index": i, "relevance_score": score} for i, score in ((2, 0.5), (0, 0.25), (1, 0.75))
                ]
            }
        ],
        [{"results": [{"index": i, "score": score} for i, score in enumerate((0.25, 0.75, 0.5))]}],
    ],
)
def test_the_best_comes_first_however_scores_are_given(values: list[Any]) -> None:
    assert ranking(values) == [(1, 0.75), (2, 0.5), (0, 0.25)]


def test_an_answer_has_what_clients_look_for() -> None:
    assert rank([[3, 1, 2], OutputChunk.usage(40)]) == {
        "id": "rerank-abc",
        "object": "list",
        "model": "m",
        "results": [
            {"index": 0, "relevance_score": 3.0},
            {"index": 2, "relevance_score": 2.0},
            {"index": 1, "relevance_score": 1.0},
        ],
        "usage": {"prompt_tokens": 40, "total_tokens": 40},
    }


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (3, 3), (100, 3), (None, 3)])
def test_no_more_results_are_sent_than_are_wanted(top_n: int | None, count: int) -> None:
    assert len(ranking([[0.25, 0.75, 0.5]], top_n=top_n)) == count


def test_documents_are_returned_as_they_were_sent_if_they_are_wanted() -> None:
    sent = ["a", {"text": "b", "id": 7}]
    request = send("rerank", documents=sent, return_documents=True)
    results = answer_json("rerank", request, [[1, 2]])["results"]
    assert [each["document"] for each in results] == [{"text": "b", "id": 7}, {"text": "a"}]
    by_hand = RerankRequest(model="m", query="q", documents=["a"], return_documents=True)
    assert answer_json("rerank", by_hand, [[1]])["results"][0]["document"] == {"text": "a"}
    given_anyway = [{"results": [{"index": 0, "score": 1, "document": {"text": "x"}, "rank": 1}]}]
    assert rank(given_anyway)["results"] == [{"index": 0, "relevance_score": 1, "rank": 1}]


def test_another_servers_answer_may_be_passed_on() -> None:
    results = [{"index": 2, "relevance_score": 0.5}, {"index": 0, "relevance_score": 0.75}]
    answer = {"id": "x", "model": "y", "results": results, "meta": {"billed_units": {"search_units": 1}}}
    result = rank([answer | {"usage": {"total_tokens": 9, "prompt_tokens": 9}}], top_n=5)
    assert [each["index"] for each in result["results"]] == [0, 2]
    assert (result["id"], result["model"]) == ("rerank-abc", "m")
    assert result["meta"] == {"billed_units": {"search_units": 1}}
    assert result["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert rank([{"results": []}])["results"] == []


@given(scores=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_a_ranking_is_sorted_and_complete_and_earlier_documents_win_ties(scores: list[float]) -> None:
    request = send("rerank", documents=["x"] * len(scores))
    results = answer_json("rerank", request, [scores])["results"]
    ranked = [(each["relevance_score"], each["index"]) for each in results]
    assert ranked == sorted(
        zip(scores, range(len(scores)), strict=True), key=lambda each: (-each[0], each[1])
    )


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], ValueError, "0 scores for 3 documents"),
        ([{"model": "x"}], ValueError, "0 scores for 3 documents"),
        ([[0.5, 0.5]], ValueError, "2 scores for 3 documents"),
        ([[0.5] * 4], ValueError, "document 3: there are 3"),
        ([[0.5, float("nan"), 0.5]], ValueError, "document 1 is nan"),
        ([np.array([0.5, 0.5, np.inf])], ValueError, "document 2 is inf"),
        ([[0.5, "x", 0.5]], TypeError, "scores are numbers"),
        ([np.zeros((3, 1))], TypeError, "a 1-D array of them"),
        (["x"], TypeError, "of kind rerank gives"),
        ([OutputChunk.text_delta("x")], TypeError, "cannot give OutputChunk.text_delta"),
        ([{"results": {}}], TypeError, "'results' must be a list"),
        ([{"results": [1]}], TypeError, "'results' must be a list"),
        ([{"results": [{"relevance_score": 1}]}], TypeError, "'index' of"),
        ([{"results": [{"index": True, "relevance_score": 1}]}], TypeError, "'index' of"),
        ([{"results": [{"index": 0}]}], TypeError, "score of document 0"),
        ([{"results": [{"index": 0, "score": True}]}], TypeError, "score of document 0"),
        ([{"results": [{"index": 3, "score": 1}]}], ValueError, "document 3: there are 3"),
        ([{"results": [{"index": -1, "score": 1}]}], ValueError, "document -1"),
        ([{"results": [{"index": 0, "score": 1}] * 2}], ValueError, "second score for document 0"),
        ([{"results": [{"index": 0, "score": float("nan")}]}], ValueError, "nan"),
    ],
)
def test_scores_that_make_no_ranking_are_the_handlers_failure(
    values: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rank(values)
