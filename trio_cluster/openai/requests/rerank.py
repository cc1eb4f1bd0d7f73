"""Requests to ``/v1/rerank``: a query, and the documents to rank by how well they answer it.

This route has no official form. What is read here is what the servers and hosted APIs that people use have in common:
``query``, ``documents``, ``top_n`` and ``return_documents``. See ``responses/rerank.py`` for the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .checks import BOOLEAN, NOT_EMPTY, Check, Integer, ListOf, ObjectOf, String
from .fields import Table
from .readers import read_json
from .schemas import Schema, any_of
from .types import RerankRequest

__all__ = ["RERANK", "read_rerank"]


class _Document(Check):
    """A text, or an object with a text and any members that its client wants back; read into the text."""

    _text = String(form="a string or an object with a 'text'")
    _object = ObjectOf({"text": String()}, ("text",))

    def __call__(self, value: Any, name: str) -> str:
        if isinstance(value, dict):
            return self.convert(self._object(value, name))
        return self._text(value, name)

    @property
    def converts(self) -> bool:
        return True

    def convert(self, value: str | dict[str, Any]) -> str:
        return value if isinstance(value, str) else value["text"]

    def schema(self) -> Schema:
        return any_of(self._text.schema(), self._object.schema())


RERANK: Final = Table(
    ("model", "query", "documents"),
    {
        "model": NOT_EMPTY,
        "query": NOT_EMPTY,
        "documents": ListOf(_Document(), least=1),
        "top_n": Integer(1),
        "return_documents": BOOLEAN,
    },
)


def read_rerank(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> RerankRequest:
    """Read a request to ``/v1/rerank``."""
    raw = read_json(body, content_type, checked=checked)
    return RerankRequest(raw=raw, headers=headers, **RERANK.read(raw, checked=checked))
