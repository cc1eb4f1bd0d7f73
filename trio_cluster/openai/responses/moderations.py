"""Answers to moderation requests: for each input, the categories of harm that it belongs to.

A handler judges each input and gives what it knows: scores, or categories, or just whether the input is to be flagged.
The rest of the official form is filled in here:

- without ``categories``, a category applies if its score is above one half; none applies if the handler gives
  ``"flagged": False``;
- without ``category_scores``, the score of a category is 1 if it applies, and 0 if it does not;
- without ``flagged``, an input is flagged if any category applies;
- the official categories that the handler does not give are false, with a score of 0. The input was not examined for
  them, so their list in ``category_applied_input_types`` is empty.

Categories that the official API does not have are sent as they are given.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from trio_cluster.core.model import Kind

from ..json_values import dumps, plain
from ..requests.types import ModerationRequest
from .chunks import OutputChunk
from .encoder import Encoder

__all__ = ["ModerationEncoder"]

_FOR_TEXT: Final = ("text",)
_FOR_BOTH: Final = ("text", "image")

#: The official categories, and the types of input that they can apply to.
_CATEGORIES: Final[dict[str, tuple[str, ...]]] = {
    "harassment": _FOR_TEXT,
    "harassment/threatening": _FOR_TEXT,
    "hate": _FOR_TEXT,
    "hate/threatening": _FOR_TEXT,
    "illicit": _FOR_TEXT,
    "illicit/violent": _FOR_TEXT,
    "self-harm": _FOR_BOTH,
    "self-harm/instructions": _FOR_BOTH,
    "self-harm/intent": _FOR_BOTH,
    "sexual": _FOR_BOTH,
    "sexual/minors": _FOR_TEXT,
    "violence": _FOR_BOTH,
    "violence/graphic": _FOR_BOTH,
}

#: A category whose score is above this applies, unless the handler decides otherwise.
_THRESHOLD: Final = 0.5

_TYPES: Final = "category_applied_input_types"
_OF_VERDICT: Final = frozenset({"flagged", "categories", "category_scores", _TYPES})


def _types_of(given: str | list[dict[str, Any]]) -> set[str]:
    """Return the types of an input: ``text``, ``image``, or both."""
    return {"text"} if isinstance(given, str) else {part["type"].removesuffix("_url") for part in given}


def _read_flagged(given: Any) -> bool | None:
    if given is not None and not isinstance(given, bool):
        raise TypeError("'flagged' must be a boolean")
    return given


def _read_scores(given: Any) -> dict[str, float]:
    if not isinstance(given, dict):
        raise TypeError("'category_scores' must be an object of numbers")
    for name, score in given.items():
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise TypeError(f"the score of '{name}' must be a number")
        if not 0 <= score <= 1:
            raise ValueError(f"the score of '{name}' must be between 0 and 1, not {score}")
    return {name: float(score) for name, score in given.items()}


def _read_categories(given: Any) -> dict[str, bool]:
    if not isinstance(given, dict) or not all(isinstance(each, bool) for each in given.values()):
        raise TypeError("'categories' must be an object of booleans")
    return given


def _read_types(given: Any) -> dict[str, list[Any]]:
    if not isinstance(given, dict) or not all(isinstance(each, list) for each in given.values()):
        raise TypeError(f"'{_TYPES}' must be an object of lists")
    return given


def _applied_types(category: str, types: set[str]) -> list[str]:
    """Return those types of an input that a category can apply to. An unofficial category can apply to all."""
    return [each for each in _CATEGORIES.get(category, _FOR_BOTH) if each in types]


def _complete(given: dict[str, Any], input_types: set[str]) -> dict[str, Any]:
    """Return a handler's verdict on an input in the official form."""
    flagged = _read_flagged(given.pop("flagged", None))
    scores = _read_scores(given.pop("category_scores", None) or {})
    categories = given.pop("categories", None)
    if categories is None:
        categories = {name: flagged is not False and score > _THRESHOLD for name, score in scores.items()}
    else:
        categories = _read_categories(categories)
    judged = dict.fromkeys([*categories, *scores])
    types: dict[str, list[Any]] = {name: _applied_types(name, input_types) for name in judged}
    if (given_types := given.pop(_TYPES, None)) is not None:
        types = _read_types(given_types)
    names = dict.fromkeys([*_CATEGORIES, *judged])
    return {
        "flagged": any(categories.values()) if flagged is None else flagged,
        "categories": {name: categories.get(name, False) for name in names},
        "category_scores": {name: scores.get(name, float(categories.get(name, False))) for name in names},
        _TYPES: {name: [] for name in names} | types,
    } | given


class ModerationEncoder(Encoder):
    """The answer to a moderation request: one verdict for each input, in their order.

    A handler gives the verdicts one by one or as lists. A verdict is a dict with any members of the official form; or a
    dict from categories to scores, or from categories to whether they apply. A dict with ``results`` has a list of
    verdicts, and its other members become members of the answer.
    """

    kind: ClassVar[Kind] = "moderation"
    takes_lists = True

    def __init__(self, request: ModerationRequest, answer_id: str) -> None:
        super().__init__()
        self._request = request
        self._id = answer_id
        self._verdicts: list[dict[str, Any]] = []
        self._extras: dict[str, Any] = {}

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind != "json":
            self._refuse(chunk)
        obj = plain(chunk.value)
        self._usage.take_object(obj.pop("usage", None))
        if "results" in obj:
            results = obj.pop("results")
            if not isinstance(results, list) or not all(isinstance(each, dict) for each in results):
                raise TypeError("'results' must be a list of objects")
            for each in results:
                self._judge(each)
            self._extras |= {name: value for name, value in obj.items() if name not in ("id", "model")}
        elif obj or not chunk.value:
            self._judge(obj)
        return b""

    def _judge(self, given: dict[str, Any]) -> None:
        inputs = self._request.inputs
        if len(self._verdicts) == len(inputs):
            raise ValueError(f"more verdicts than the {len(inputs)} inputs")
        if not _OF_VERDICT & given.keys():
            has_booleans = bool(given) and all(isinstance(each, bool) for each in given.values())
            given = {"categories" if has_booleans else "category_scores": given}
        self._verdicts.append(_complete(given, _types_of(inputs[len(self._verdicts)])))

    def finish(self) -> bytes:
        if len(self._verdicts) != len(self._request.inputs):
            raise ValueError(f"{len(self._verdicts)} verdicts for {len(self._request.inputs)} inputs")
        answer: dict[str, Any] = {"id": self._id, "model": self._request.model, "results": self._verdicts}
        if self._usage.total_tokens:
            answer["usage"] = self._usage.for_chat()
        return dumps(answer | self._extras)
