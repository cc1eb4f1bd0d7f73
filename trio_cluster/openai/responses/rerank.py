"""Answers to rerank requests: the documents that answer a query best, with their scores.

This route has no official form. What is written here is what the servers and hosted APIs that people use have in
common: ``results`` with ``index`` and ``relevance_score``, the best first; ``usage`` in tokens. A handler gives one
score for each document. Sorting them, cutting the list and returning the documents are done here.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from trio_cluster.core.model import Kind

from ..json_values import dumps
from ..requests.types import RerankRequest
from .choices import read_output
from .chunks import OutputChunk, doubles
from .encoder import Encoder

__all__ = ["RerankEncoder"]


class RerankEncoder(Encoder):
    """The answer to a rerank request.

    Scores are those of the next documents, and there must be one for each document in the end. Or the handler gives a
    dict with ``results``, in any order and any number, each with ``index`` and ``relevance_score`` (or ``score``);
    other members of the dict become members of the answer.
    """

    kind: ClassVar[Kind] = "rerank"

    def __init__(self, request: RerankRequest, answer_id: str) -> None:
        super().__init__()
        self._request = request
        self._id = answer_id
        self._scores: list[float] = []
        self._results: dict[int, dict[str, Any]] = {}
        self._is_chosen = False  # the handler has chosen the documents, with a dict of results
        self._extras: dict[str, Any] = {}

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind == "scores":
            for score in doubles(chunk.value, "scores are numbers"):
                self._add(len(self._scores), {"relevance_score": score})
                self._scores.append(score)
        elif chunk.kind == "json":
            self._take_object(dict(chunk.value))
        else:
            self._refuse(chunk)
        return b""

    def _take_object(self, obj: dict[str, Any]) -> None:
        output = read_output(obj)
        results = output.extras.pop("results", None)
        self._usage.take_object(output.usage)
        self._extras |= output.extras
        if results is None:
            return
        self._is_chosen = True
        if not isinstance(results, list) or not all(isinstance(each, dict) for each in results):
            raise TypeError("'results' must be a list of objects")
        for i, result in enumerate(results):
            index = result.pop("index", None)
            if type(index) is not int:
                raise TypeError(f"the 'index' of results[{i}] must be an integer")
            if "score" in result:
                result.setdefault("relevance_score", result.pop("score"))
            self._add(index, result)

    def _add(self, index: int, result: dict[str, Any]) -> None:
        count = len(self._request.documents)
        score = result.get("relevance_score")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise TypeError(f"the score of document {index} must be a number")
        if not math.isfinite(score):
            raise ValueError(f"the score of document {index} is {score}")
        if not 0 <= index < count:
            raise ValueError(f"a score for document {index}: there are {count}, counted from 0")
        if index in self._results:
            raise ValueError(f"a second score for document {index}")
        self._results[index] = result

    def finish(self) -> bytes:
        request = self._request
        if not self._is_chosen and len(self._scores) != len(request.documents):
            raise ValueError(f"{len(self._scores)} scores for {len(request.documents)} documents")
        best = sorted(self._results, key=lambda index: (-self._results[index]["relevance_score"], index))
        usage = self._usage.for_chat()
        usage.pop("completion_tokens")
        answer = {
            "id": self._id,
            "object": "list",
            "model": request.model,
            "results": [self._result(index) for index in best[: request.top_n]],
            "usage": usage,
        }
        return dumps(answer | self._extras)

    def _result(self, index: int) -> dict[str, Any]:
        request, given = self._request, dict(self._results[index])
        result = {"index": index, "relevance_score": given.pop("relevance_score")}
        given.pop("document", None)
        if request.return_documents:
            sent = request.raw.get("documents", request.documents)[index]
            result["document"] = sent if isinstance(sent, dict) else {"text": sent}
        return result | given
