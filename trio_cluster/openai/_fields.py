"""Checks for the fields of a request, and the tables that hold them.

Theory of operation
===================

A check is built once, at import, and says what a field may be. Called with a value and the field's name it
returns the value to use or raises :class:`InvalidRequest` that names the field, what was expected and what
came. The same check reads the field from a form, where everything is text, with :meth:`Check.from_text`.

Checks are strict: a boolean is no integer, ``"7"`` is not ``7``; an integer will do for a number. ``null`` is
the same as an absent field. Fields that a table does not know are nobody's business here and pass.

A :class:`Table` runs over what the client *sent*, not over what it could have sent: a request with three
fields costs three look-ups. That, and closures instead of schemas, is why this runs in a few microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from trio_cluster._errors import InvalidRequest

from ._json import dumps, read_object

__all__ = [
    "ANY_OBJECT",
    "ANY_STRING",
    "BOOLEAN",
    "Check",
    "Custom",
    "Integer",
    "ListOf",
    "Number",
    "ObjectOf",
    "OneOf",
    "String",
    "Table",
    "missing",
    "wrong_type",
    "wrong_value",
]

_LONGEST_SHOWN: Final = 60
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


def wrong_type(name: str, expected: str, value: Any) -> InvalidRequest:
    """Return the error for a field of the wrong type."""
    return InvalidRequest(
        f"Invalid type for '{name}': expected {expected}, but got {_kind_of(value)}",
        param=name,
        code="invalid_type",
    )


def wrong_value(name: str, expected: str, value: Any) -> InvalidRequest:
    """Return the error for a field of the right type whose value, a scalar or nearly one, cannot be."""
    return InvalidRequest(
        f"Invalid value for '{name}': expected {expected}, but got {_show(value)}",
        param=name,
        code="invalid_value",
    )


def missing(name: str) -> InvalidRequest:
    """Return the error for a required field that is not there."""
    return InvalidRequest(f"Missing required field: '{name}'", param=name, code="missing_required_parameter")


class Check:
    """What a field may be."""

    def __call__(self, value: Any, name: str) -> Any:
        """Return the value to use for the field.

        Raises:
            InvalidRequest: the value will not do.
        """
        raise NotImplementedError

    def from_text(self, text: str, name: str) -> Any:
        """Do the same for a field of a form. Unless the check knows better, text is what it is."""
        return self(text, name)


@attrs.frozen
class String(Check):
    """Text of ``least`` to ``most`` characters, in the given form if there is one."""

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


@attrs.frozen
class Number(Check):
    """A number from ``least`` to ``most``; always given on as a float."""

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

    def _expected(self) -> str:
        return f"a number between {self.least:g} and {self.most:g}"


@attrs.frozen
class Integer(Check):
    """A whole number from ``least`` to ``most``."""

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

    def _expected(self) -> str:
        # Whole numbers are shown in full, also where a float would show an exponent.
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
        word = text.lower()
        if word in ("true", "1"):
            return True
        if word in ("false", "0"):
            return False
        raise wrong_value(name, "true or false", text)


@attrs.frozen
class OneOf(Check):
    """One of a few words."""

    words: tuple[str, ...]

    def __call__(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(name, self._expected(), value)
        if value not in self.words:
            raise wrong_value(name, self._expected(), value)
        return value

    def _expected(self) -> str:
        return "one of " + ", ".join(f"'{word}'" for word in self.words)


@attrs.frozen
class ListOf(Check):
    """A list of ``least`` to ``most`` things that pass a check of their own."""

    item: Check
    least: int = 0
    most: int | None = None

    def __call__(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise wrong_type(name, "an array", value)
        self._require_length(value, name)
        item = self.item
        # Names of items are only spelled out for the one that fails.
        try:
            return [item(each, name) for each in value]
        except InvalidRequest:
            return [item(each, f"{name}[{i}]") for i, each in enumerate(value)]

    def from_texts(self, texts: Sequence[str], name: str) -> list[Any]:
        """Read the list from a form, where its items are fields of the same name."""
        self._require_length(texts, name)
        return [self.item.from_text(text, f"{name}[{i}]") for i, text in enumerate(texts)]

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
    """An object whose known members pass checks of their own."""

    members: Mapping[str, Check] = attrs.field(factory=dict)
    required: tuple[str, ...] = ()

    def __call__(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        for member in self.required:
            if value.get(member) is None:
                raise missing(f"{name}.{member}")
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


@attrs.frozen
class Custom(Check):
    """Whatever a function of (value, name) says."""

    function: Callable[[Any, str], Any]

    def __call__(self, value: Any, name: str) -> Any:
        return self.function(value, name)


#: Checks that need no arguments.
BOOLEAN: Final = Boolean()
ANY_STRING: Final = String()
ANY_OBJECT: Final = ObjectOf()


class Table:
    """The documented fields of one route.

    Args:
        required: names that must be there and not be ``null``.
        checks: what the fields may be, by name.
    """

    def __init__(self, required: tuple[str, ...], checks: Mapping[str, Check]) -> None:
        self._required = required
        self._checks = dict(checks)

    def read(self, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Return the documented fields of a JSON object that are there, checked.

        Raises:
            InvalidRequest: one is missing or will not do.
        """
        checks = self._checks
        known: dict[str, Any] = {}
        for name, value in sent.items():
            if value is not None and (check := checks.get(name)) is not None:
                known[name] = check(value, name)
        return self._complete(known)

    def read_form(self, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Return the documented fields of a form that are there, checked; an empty text is an absent field.

        Lists are fields of the same name, with or without ``[]`` after it, or a single field.

        Raises:
            InvalidRequest: one is missing, will not do, or was given more than once without being a list.
        """
        known: dict[str, Any] = {}
        for sent_name, value in sent.items():
            name = sent_name.removesuffix("[]")
            check = self._checks.get(name)
            if check is None or value == "":
                continue
            if isinstance(check, ListOf):
                known[name] = check.from_texts(value if isinstance(value, list) else [value], name)
            elif isinstance(value, str):
                known[name] = check.from_text(value, name)
            elif isinstance(value, dict):
                known[name] = check(value, name)
            elif isinstance(value, list):
                raise InvalidRequest(f"Field '{name}' was given more than once", param=name)
            else:
                raise InvalidRequest(f"Field '{name}' must be text, not a file", param=name)
        return self._complete(known)

    def _complete(self, known: dict[str, Any]) -> dict[str, Any]:
        for name in self._required:
            if name not in known:
                raise missing(name)
        return known
