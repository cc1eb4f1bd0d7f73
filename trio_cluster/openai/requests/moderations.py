"""Requests to ``/v1/moderations``: texts and images to be judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .checks import NOT_EMPTY, Check, ListOf, ObjectOf, OneOf, String, nothing_in, wrong_type
from .fields import Table
from .readers import read_json
from .schemas import Schema, any_of, by_type
from .types import ModerationRequest

__all__ = ["MODERATION", "read_moderation"]

_MOST_INPUTS: Final = 2048


class _Input(Check):
    """A text, several texts, or the parts of a single input; read into a list of inputs in any case."""

    _texts = ListOf(String(), least=1, most=_MOST_INPUTS)
    _types = OneOf(("text", "image_url"))
    _parts: Mapping[str, ObjectOf] = {
        "text": ObjectOf({"text": String()}, ("text",)),
        "image_url": ObjectOf({"image_url": ObjectOf({"url": NOT_EMPTY}, ("url",))}, ("image_url",)),
    }

    def __call__(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, str):
            self._check_list(value, name)
        return self.convert(value)

    @property
    def converts(self) -> bool:
        return True

    def convert(self, value: Any) -> list[Any]:
        return [value] if isinstance(value, str) or isinstance(value[0], dict) else value

    def _check_list(self, value: Any, name: str) -> None:
        if not isinstance(value, list):
            raise wrong_type(name, "a string or an array", value)
        if not value:
            raise nothing_in(name, "input")
        if not isinstance(value[0], dict):
            self._texts(value, name)
            return
        for i, part in enumerate(value):
            self._check_part(part, f"{name}[{i}]")

    def _check_part(self, part: Any, name: str) -> None:
        if not isinstance(part, dict):
            raise wrong_type(name, "an object", part)
        self._parts[self._types(part.get("type"), f"{name}.type")](part, name)

    def schema(self) -> Schema:
        parts = by_type({word: check.schema() for word, check in self._parts.items()}, closed=True)
        return any_of(
            String().schema(), self._texts.schema(), {"type": "array", "items": parts, "minItems": 1}
        )


MODERATION: Final = Table(("model", "input"), {"model": NOT_EMPTY, "input": _Input()})


def read_moderation(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> ModerationRequest:
    """Read a request to ``/v1/moderations``."""
    raw = read_json(body, content_type, checked=checked)
    known = MODERATION.read(raw, checked=checked)
    return ModerationRequest(model=known["model"], inputs=known["input"], raw=raw, headers=headers)
