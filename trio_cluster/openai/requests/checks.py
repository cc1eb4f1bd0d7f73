"""Checks for the fields of a request.

Theory of operation
===================

A check is built once, at import, and defines what a field may be. Called with a value and the field's name it returns
what the field is read into, or raises :class:`InvalidRequest` that names the field, what was expected and what came.
The same check reads the field from a form, where everything is text, with :meth:`Check.from_text`.

Most fields are read into the value that was sent. The others are converted: a number becomes a float, a list with a
single prompt becomes its text. :meth:`Check.convert` and :meth:`Check.convert_text` do the conversion alone, for a body
that has been checked before: a worker need not repeat the checks of its master.

Checks are strict: a boolean is not an integer, and ``"7"`` is not ``7``; but an integer is a number. ``null`` is the
same as an absent field.

A check also describes what it takes as a JSON Schema, for clients (see ``openai/openapi.py``).
Checks do not run on schemas: they are one call each, which is why reading a request takes a few microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from trio_cluster.errors import InvalidRequest

from ..json_values import dumps, read_object
from .schemas import ANYTHING, Schema, members_of

__all__ = [
    "ANY_OBJECT",
    "ANY_STRING",
    "BOOLEAN",
    "NOT_EMPTY",
    "Check",
    "Custom",
    "Integer",
    "ListOf",
    "Number",
    "ObjectOf",
    "OneOf",
    "String",
    "missing",
    "missing_in",
    "nothing_in",
    "shown_name",
    "wrong_type",
    "wrong_value",
]

_LONGEST_SHOWN: Final = 60
_LONGEST_NAME: Final = 64
_TEXT_OF_NUMBER: Final = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_TEXT_OF_INTEGER: Final = re.compile(r"[-+]?\d{1,40}", re.ASCII)


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    for known, words in ((str, "a string"), (int, "an integer"), (float, "a number"), (list, "an array")):
        if isinstance(value, known):
            return words
    return "an object"


def _show(value: Any) -> str:
    text = dumps(value).decode()
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def shown_name(name: str) -> str:
    """Return a name that the client has chosen (of a key, of a type) for an error: one line, and cut short."""
    name = name[:_LONGEST_NAME]
    return name if name.isprintable() else dumps(name).decode()[1:-1]


def wrong_type(name: str, expected: str, value: Any) -> InvalidRequest:
    """Return the error for a field of the wrong type."""
    return InvalidRequest(
        f"Invalid type for '{name}': expected {expected}, but got {_kind_of(value)}",
        param=name,
        code="invalid_type",
    )


def wrong_value(name: str, expected: str, value: Any) -> InvalidRequest:
    """Return the error for a field of the right type with a wrong value, which should be a scalar or a short list."""
    return InvalidRequest(
        f"Invalid value for '{name}': expected {expected}, but got {_show(value)}",
        param=name,
        code="invalid_value",
    )


def missing(name: str) -> InvalidRequest:
    """Return the error for a required field that is absent."""
    return InvalidRequest(f"Missing required field: '{name}'", param=name, code="missing_required_parameter")


def missing_in(given: Mapping[str, Any], member: str, name: str) -> InvalidRequest:
    """Return the error for a required member that an object does not have, or that is ``null``.

    Args:
        given: the object.
        member: the name of the member in it.
        name: what to call the member in errors.
    """
    if member not in given:
        return missing(name)
    return InvalidRequest(f"'{name}' is required, and must not be null", param=name, code="invalid_type")


def nothing_in(name: str, item: str) -> InvalidRequest:
    """Return the error for an empty array that must have at least one ``item``."""
    return InvalidRequest(
        f"Invalid value for '{name}': expected at least 1 {item}, but got 0", param=name, code="empty_array"
    )


class Check:
    """What a field may be, and what it is read into."""

    def __call__(self, value: Any, name: str) -> Any:
        """Return what the field is read into.

        Args:
            value: what was sent; not ``None``.
            name: what to call the field in errors.

        Raises:
            InvalidRequest: the value is not allowed.
        """
        raise NotImplementedError

    def from_text(self, text: str, name: str) -> Any:
        """Do the same for a field of a form, where everything is text. By default, it is the same as a JSON string."""
        return self(text, name)

    @property
    def converts(self) -> bool:
        """Whether a field is read into anything but the value that was sent."""
        return False

    def convert(self, value: Any) -> Any:
        """Return what the field is read into, for a value that has passed this check before. Checks nothing."""
        return value

    def convert_text(self, text: str) -> Any:
        """Do the same for a field of a form."""
        return self.convert(text)

    def schema(self) -> Schema:
        """Return what the field may be as a JSON Schema. By default, that is anything."""
        return ANYTHING


def _bounds(**bounds: float | None) -> Schema:
    return {word: bound for word, bound in bounds.items() if bound is not None}


@attrs.frozen
class String(Check):
    """Text of ``least`` to ``most`` characters that matches ``pattern``; ``form`` describes the pattern in errors."""

    least: int = 0
    most: int | None = None
    pattern: re.Pattern[str] | None = None
    form: str = "a string"

    def __call__(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(name, self.form, value)
        if len(value) < self.least:
            raise wrong_value(
                name,
                "a string that is not empty"
                if self.least == 1
                else f"a string of at least {self.least} characters",
                value,
            )
        if self.most is not None and len(value) > self.most:
            raise InvalidRequest(
                f"Invalid value for '{name}': expected a string of at most {self.most} characters, "
                f"but got one of {len(value)}",
                param=name,
                code="string_above_max_length",
            )
        if self.pattern is not None and self.pattern.fullmatch(value) is None:
            raise wrong_value(name, self.form, value)
        return value

    def schema(self) -> Schema:
        schema = {"type": "string"} | _bounds(minLength=self.least or None, maxLength=self.most)
        if self.pattern is not None:
            schema["pattern"] = f"^(?:{self.pattern.pattern})$"
        return schema


@attrs.frozen
class Number(Check):
    """A number from ``least`` to ``most``, both included; read into a float."""

    least: float
    most: float

    def __call__(self, value: Any, name: str) -> float:
        if type(value) is not float and type(value) is not int:
            raise wrong_type(name, self._expected(), value)
        if not self.least <= value <= self.most:
            raise wrong_value(name, self._expected(), value)
        return float(value)

    def from_text(self, text: str, name: str) -> float:
        if _TEXT_OF_NUMBER.fullmatch(text) is None:
            raise wrong_value(name, self._expected(), text)
        return self(float(text), name)

    @property
    def converts(self) -> bool:
        return True

    def convert(self, value: Any) -> float:
        return float(value)

    def schema(self) -> Schema:
        return {"type": "number", "minimum": self.least, "maximum": self.most}

    def _expected(self) -> str:
        return f"a number between {self.least:g} and {self.most:g}"


@attrs.frozen
class Integer(Check):
    """A whole number from ``least`` to ``most``, both included; ``None``: no bound."""

    least: int | None = None
    most: int | None = None

    def __call__(self, value: Any, name: str) -> int:
        if type(value) is not int:
            raise wrong_type(name, self._expected(), value)
        if (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
            raise wrong_value(name, self._expected(), value)
        return value

    def from_text(self, text: str, name: str) -> int:
        if _TEXT_OF_INTEGER.fullmatch(text) is None:
            raise wrong_value(name, self._expected(), text)
        return self(int(text), name)

    def convert_text(self, text: str) -> int:
        return int(text)

    def schema(self) -> Schema:
        return {"type": "integer"} | _bounds(minimum=self.least, maximum=self.most)

    def _expected(self) -> str:
        # Whole numbers are shown in full; `:g` would show an exponent.
        if self.least is not None and self.most is not None:
            return f"an integer between {self.least} and {self.most}"
        return f"an integer of at least {self.least}" if self.least is not None else "an integer"


@attrs.frozen
class Boolean(Check):
    """``true`` or ``false``; in a form also as 1 and 0, and in any case."""

    def __call__(self, value: Any, name: str) -> bool:
        if type(value) is not bool:
            raise wrong_type(name, "a boolean", value)
        return value

    def from_text(self, text: str, name: str) -> bool:
        if text.lower() not in ("true", "1", "false", "0"):
            raise wrong_value(name, "true or false", text)
        return self.convert_text(text)

    def convert_text(self, text: str) -> bool:
        return text.lower() in ("true", "1")

    def schema(self) -> Schema:
        return {"type": "boolean"}


@attrs.frozen
class OneOf(Check):
    """One of a few words. ``refused`` are words that the OpenAI API has and this server has not, with the reason."""

    words: tuple[str, ...]
    refused: Mapping[str, str] = attrs.field(factory=dict)

    def __call__(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(name, self._expected(), value)
        if value not in self.words:
            if value in self.refused:
                message = f"'{name}' must be {self._expected()}: {self.refused[value]}"
                raise InvalidRequest(message, param=name, code="unsupported_value")
            raise wrong_value(name, self._expected(), value)
        return value

    def schema(self) -> Schema:
        return {"type": "string", "enum": list(self.words)}

    def _expected(self) -> str:
        words = ", ".join(f"'{word}'" for word in self.words)
        return words if len(self.words) == 1 else f"one of {words}"


@attrs.frozen
class ListOf(Check):
    """A list of ``least`` to ``most`` items, each of which passes a check."""

    item: Check
    least: int = 0
    most: int | None = None

    def __call__(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise wrong_type(name, "an array", value)
        self._require_length(value, name)
        item = self.item
        # The name of each item is made only when one has failed.
        try:
            return [item(each, name) for each in value]
        except InvalidRequest:
            return [item(each, f"{name}[{i}]") for i, each in enumerate(value)]

    def from_texts(self, texts: Sequence[str], name: str) -> list[Any]:
        """Read the list from a form, where its items are fields of the same name."""
        self._require_length(texts, name)
        return [self.item.from_text(text, f"{name}[{i}]") for i, text in enumerate(texts)]

    @property
    def converts(self) -> bool:
        return self.item.converts

    def convert(self, value: Any) -> list[Any]:
        convert = self.item.convert
        return [convert(each) for each in value]

    def convert_texts(self, texts: Sequence[str]) -> list[Any]:
        """Do the same for a list in a form."""
        return [self.item.convert_text(text) for text in texts]

    def schema(self) -> Schema:
        bounds = _bounds(minItems=self.least or None, maxItems=self.most)
        return {"type": "array", "items": self.item.schema()} | bounds

    def _require_length(self, value: Sequence[Any], name: str) -> None:
        count = len(value)
        if count < self.least:
            raise InvalidRequest(
                f"Invalid value for '{name}': expected at least {self.least} item"
                f"{'' if self.least == 1 else 's'}, but got {count}",
                param=name,
                code="empty_array" if count == 0 else "array_below_min_length",
            )
        if self.most is not None and count > self.most:
            raise InvalidRequest(
                f"Invalid value for '{name}': expected at most {self.most} items, but got {count}",
                param=name,
                code="array_above_max_length",
            )


@attrs.frozen
class ObjectOf(Check):
    """An object whose known members each pass a check. Unknown members are allowed."""

    members: Mapping[str, Check] = attrs.field(factory=dict)
    required: tuple[str, ...] = ()

    def __call__(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        for member in self.required:
            if value.get(member) is None:
                raise missing_in(value, member, f"{name}.{member}")
        for member, check in self.members.items():
            each = value.get(member)
            if each is not None:
                check(each, f"{name}.{member}")
        return value

    def from_text(self, text: str, name: str) -> dict[str, Any]:
        try:
            value = read_object(text.encode())
        except InvalidRequest:
            raise wrong_value(name, "a JSON object", text) from None
        return self(value, name)

    def convert_text(self, text: str) -> dict[str, Any]:
        return read_object(text.encode())

    def schema(self) -> Schema:
        return members_of({name: check.schema() for name, check in self.members.items()}, self.required)


@attrs.frozen
class Custom(Check):
    """What a function of (value, name) does not refuse with ``InvalidRequest``."""

    function: Callable[[Any, str], object]
    """Its result is not used."""
    described: Schema = attrs.field(factory=dict)
    conversion: Callable[[Any], Any] | None = None
    """Makes what the field is read into; ``None``: the value that was sent."""

    def __call__(self, value: Any, name: str) -> Any:
        self.function(value, name)
        return value if self.conversion is None else self.conversion(value)

    @property
    def converts(self) -> bool:
        return self.conversion is not None

    def convert(self, value: Any) -> Any:
        return value if self.conversion is None else self.conversion(value)

    def schema(self) -> Schema:
        return self.described


#: The checks that many fields share.
BOOLEAN: Final = Boolean()
ANY_STRING: Final = String()
NOT_EMPTY: Final = String(least=1)
ANY_OBJECT: Final = ObjectOf()
