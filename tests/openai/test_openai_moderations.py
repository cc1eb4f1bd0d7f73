"""Moderation: the verdicts that handlers give, and the answers that clients get."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from openai.types import ModerationCreateResponse
from openai_answers import answer_json, send

from trio_cluster.openai import ModerationRequest, OutputChunk

PARTS = [
    {"type": "text", "text": "one"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "text", "text": "two"},
]


def judge(values: list[Any], given: Any = "hi") -> Any:
    result = answer_json("moderations", send("moderations", input=given), values)
    ModerationCreateResponse.model_validate(result, strict=True)
    return result


def verdict(value: Any, given: Any = "hi") -> Any:
    (only,) = judge([value], given)["results"]
    return only


def applying(of: Any) -> set[str]:
    return {name for name, applies in of["categories"].items() if applies}


@pytest.mark.parametrize(
    ("given", "inputs", "texts", "has_images"),
    [
        ("a", ["a"], ["a"], False),
        (["a", "b"], ["a", "b"], ["a", "b"], False),
        (PARTS, [PARTS], ["one\ntwo"], True),
        (PARTS[:1], [PARTS[:1]], ["one"], False),
    ],
)
def test_inputs_are_a_list_however_they_are_sent(
    given: Any, inputs: Any, texts: list[str], has_images: bool
) -> None:
    request: ModerationRequest = send("moderations", input=given)
    assert request.inputs == inputs
    assert request.texts == texts
    assert request.has_image_inputs is has_images


def test_an_answer_has_the_official_form() -> None:
    result = judge([{"violence": 0.75, "hate": 0.25}])
    assert (result["id"], result["model"]) == ("modr-abc", "m")
    (only,) = result["results"]
    assert len(only["categories"]) == len(only["category_scores"]) == 13
    assert only["flagged"] is True
    assert applying(only) == {"violence"}
    assert {name: score for name, score in only["category_scores"].items() if score} == {
        "violence": 0.75,
        "hate": 0.25,
    }
    applied = {name: types for name, types in only["category_applied_input_types"].items() if types}
    assert applied == {"violence": ["text"], "hate": ["text"]}


@pytest.mark.parametrize(
    ("value", "flagged", "categories", "score"),
    [
        ({"violence": 0.5}, False, set(), 0.5),
        ({"violence": np.float32(0.75)}, True, {"violence"}, 0.75),
        ({"category_scores": {"violence": 1}}, True, {"violence"}, 1.0),
        ({"violence": True}, True, {"violence"}, 1.0),
        ({"categories": {"violence": True}}, True, {"violence"}, 1.0),
        ({"categories": {"violence": False}}, False, set(), 0.0),
        ({"categories": {"violence": True}, "category_scores": {"violence": 0.25}}, True, {"violence"}, 0.25),
        ({"categories": {"violence": False}, "category_scores": {"violence": 0.75}}, False, set(), 0.75),
        ({"flagged": True}, True, set(), 0.0),
        ({"flagged": False, "category_scores": {"violence": 0.75}}, False, set(), 0.75),
        ({"flagged": False, "categories": {"violence": True}}, False, {"violence"}, 1.0),
        ({}, False, set(), 0.0),
    ],
)
def test_missing_members_of_a_verdict_follow_from_the_given_ones(
    value: Any, flagged: bool, categories: set[str], score: float
) -> None:
    only = verdict(value)
    assert only["flagged"] is flagged
    assert applying(only) == categories
    assert only["category_scores"]["violence"] == score


def test_categories_that_were_not_judged_are_marked() -> None:
    only = verdict({"violence": 0.0})
    assert only["category_applied_input_types"]["violence"] == ["text"]
    assert only["category_applied_input_types"]["hate"] == []
    given = {"categories": {"violence": True}, "category_applied_input_types": {"violence": ["image"]}}
    assert verdict(given, PARTS)["category_applied_input_types"]["violence"] == ["image"]


def test_what_a_category_is_about_depends_on_the_input() -> None:
    scores = {"violence": 0.9, "hate": 0.9, "own": 0.9}
    of_both = verdict(scores, PARTS)["category_applied_input_types"]
    assert (of_both["violence"], of_both["hate"], of_both["own"]) == (
        ["text", "image"],
        ["text"],
        ["text", "image"],
    )
    of_image = verdict(scores, PARTS[1:2])["category_applied_input_types"]
    assert (of_image["violence"], of_image["hate"]) == (["image"], [])


def test_unofficial_categories_are_passed_on() -> None:
    only = verdict({"spam": 0.9, "hate": 0.1} | {"flood": 0.0})
    assert only["flagged"]
    assert applying(only) == {"spam"}
    assert only["category_scores"]["flood"] == 0.0


@pytest.mark.parametrize(
    "values",
    [
        [{"violence": 0.9}, {"hate": 0.9}],
        [[{"violence": 0.9}, {"hate": 0.9}]],
        [{"results": [{"category_scores": {"violence": 0.9}}, {"category_scores": {"hate": 0.9}}]}],
        [OutputChunk.json({"violence": 0.9}), ({"categories": {"hate": True}},)],
    ],
)
def test_each_input_has_a_verdict(values: list[Any]) -> None:
    results = judge(values, ["a", "b"])["results"]
    assert [applying(each) for each in results] == [{"violence"}, {"hate"}]


def test_the_rest_of_an_answer_may_be_given_too() -> None:
    assert "usage" not in judge([{}])
    result = judge([{"results": [{"flagged": True, "why": "rude"}], "policy": 2, "id": "x", "model": "y"}])
    assert (result["policy"], result["id"], result["model"]) == (2, "modr-abc", "m")
    assert result["results"][0]["why"] == "rude"
    assert judge([{}, OutputChunk.usage(7)])["usage"]["prompt_tokens"] == 7
    assert judge([{}, {"usage": {"prompt_tokens": 7}}])["usage"]["prompt_tokens"] == 7


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], ValueError, "0 verdicts for 1 inputs"),
        ([{}, {}], ValueError, "more verdicts than the 1 inputs"),
        (["x"], TypeError, "of kind moderation gives"),
        ([True], TypeError, "of kind moderation gives"),
        ([OutputChunk.text_delta("x")], TypeError, "cannot give"),
        ([{"violence": 1.5}], ValueError, "score of 'violence'"),
        ([{"violence": -0.1}], ValueError, "score of 'violence'"),
        ([{"violence": float("nan")}], ValueError, "nan"),
        ([{"violence": "high"}], TypeError, "score of 'violence'"),
        ([{"violence": True, "hate": 0.1}], TypeError, "score of 'violence'"),
        ([{"category_scores": [1]}], TypeError, "'category_scores'"),
        ([{"categories": {"violence": 1}}], TypeError, "'categories'"),
        ([{"categories": []}], TypeError, "'categories'"),
        ([{"flagged": "no"}], TypeError, "'flagged'"),
        ([{"category_applied_input_types": ["text"]}], TypeError, "'category_applied_input_types'"),
        ([{"results": {}}], TypeError, "'results' must be a list"),
        ([{"results": [1]}], TypeError, "'results' must be a list"),
    ],
)
def test_what_is_no_verdict_is_the_handlers_failure(
    values: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        judge(values)
