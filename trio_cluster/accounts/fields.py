"""The fields of a key as people set them: in JSON over HTTP, and by flags that the command line makes into JSON.

The check is strict: an unknown field, a wrong type and a number out of range are errors that name the field. A limit
that was misspelt and ignored would be no limit.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from ..core.principal import BudgetPeriod, Priority, Role
from ..errors import ApiError, InvalidRequest
from .keys import KeyRecord

__all__ = [
    "RESERVED_NAMES",
    "read_changes",
    "read_grace",
    "read_name",
    "read_new",
    "read_time",
    "show_key",
    "show_time",
]

#: The names of the principals of the options ``api_key`` and ``operator_key``.
RESERVED_NAMES: Final = frozenset({"default", "operator"})

# A key that is pasted in the place of its name is refused: names are shown everywhere.
_NAME: Final = re.compile(r"(?!tc-)[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")

_MAX_MODELS: Final = 100
_MAX_PATTERN: Final = 256
#: The largest number that a limit may have: JavaScript, and so JSON in many programs, cannot count any further.
_MAX_COUNT: Final = 2**53 - 1
_MAX_WEIGHT: Final = 1000.0
_MAX_GRACE: Final = 366 * 86_400.0
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
#: The end of the year 9999, which is the last one that can be shown.
_LAST_MOMENT: Final = 253_402_300_799.0


def read_name(value: object) -> str:
    """Return the name of a key.

    Raises:
        ApiError: 400: it is no name; 409: it is the name of an option.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _wrong(
            "name",
            "expected 1 to 64 letters, digits and any of . _ @ + -, beginning with a letter or a digit, not with 'tc-'",
        )
    if value in RESERVED_NAMES:
        option = "api_key" if value == "default" else "operator_key"
        raise ApiError(
            409, f"The name '{value}' is taken by the option '{option}'", code="name_taken", param="name"
        )
    return value


def read_new(content: Mapping[str, Any], now: float) -> KeyRecord:
    """Return the key that the JSON object of a request describes.

    Args:
        content: the object. Only ``name`` is required.
        now: seconds since the epoch.

    Raises:
        ApiError: 400: a field is not valid; 409: the name is that of an option.
    """
    if "name" not in content:
        raise _wrong("name", "a key needs one", code="missing_required_parameter")
    name = read_name(content["name"])
    fields = read_changes({key: value for key, value in content.items() if key != "name"})
    return KeyRecord(name=name, created_at=now, **fields)


def read_changes(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`KeyRecord` that a JSON object sets. ``null`` takes a limit away.

    Raises:
        InvalidRequest: a field is unknown or not valid.
    """
    fields: dict[str, Any] = {}
    for name, value in content.items():
        if name == "budget":
            fields |= _read_budget(value)
            continue
        reader = _READERS.get(name)
        if reader is None:
            if name == "name":
                raise _wrong("name", "the name of a key cannot be changed")
            raise InvalidRequest(
                f"Unknown field: {name!r}; a key has: name, {', '.join(sorted([*_READERS, 'budget']))}",
                param=name,
                code="unknown_parameter",
            )
        fields[name] = reader(name, value)
    return fields


def read_grace(content: Mapping[str, Any]) -> float:
    """Return for how many seconds the old key is valid beside the new one: the field ``grace``, and 0 without it.

    Raises:
        InvalidRequest: it is not valid, or there are other fields.
    """
    for name in content:
        if name != "grace":
            raise InvalidRequest(f"Unknown field: {name!r}", param=name, code="unknown_parameter")
    value = content.get("grace")
    if value is None:
        return 0.0
    if not _is_number(value) or not 0 <= value <= _MAX_GRACE:
        raise _wrong("grace", "expected a number of seconds, 0 or more, and at most a year")
    return float(value)


def read_time(param: str, value: object) -> float:
    """Return a time in seconds since the epoch.

    Args:
        param: the name of the field, for the error.
        value: a date or a time in the format of ISO 8601, in UTC if it does not say otherwise, before 1970 is the
            beginning of 1970; or seconds since the epoch.

    Raises:
        InvalidRequest: it is neither.
    """
    expected = "expected a time such as 2026-12-31 or 2026-12-31T18:00:00Z"
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip().upper())
        except ValueError:
            raise _wrong(param, f"{expected}, got {value[:64]!r}") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        # Years that are far away may be written with a zone that leads out of those that can be shown.
        seconds = min(max((moment - _EPOCH).total_seconds(), 0.0), _LAST_MOMENT)
    elif _is_number(value):
        seconds = float(typing.cast("float", value))
    else:
        raise _wrong(param, expected)
    if not 0 <= seconds <= _LAST_MOMENT:
        raise _wrong(param, f"{expected}, and not before 1970 or after 9999")
    return seconds


def show_time(seconds: float) -> str:
    """Return a time as ISO 8601 in UTC, in whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def show_key(record: KeyRecord) -> dict[str, Any]:
    """Return a key as JSON has it; the opposite of :func:`read_new`."""
    budget = None
    if record.budget_tokens is not None:
        budget = {"tokens": record.budget_tokens, "per": record.budget_per}
    return {
        "name": record.name,
        "models": list(record.models),
        "role": record.role,
        "requests_per_minute": record.requests_per_minute,
        "tokens_per_minute": record.tokens_per_minute,
        "max_concurrency": record.max_concurrency,
        "budget": budget,
        "priority": record.priority,
        "weight": record.weight,
        "expires_at": None if record.expires_at is None else show_time(record.expires_at),
        "disabled": record.disabled,
        "created_at": show_time(record.created_at),
    }


def _wrong(param: str, expected: str, code: str = "invalid_value") -> InvalidRequest:
    return InvalidRequest(f"{param}: {expected}", param=param, code=code)


def _is_number(value: object) -> bool:
    """Tell whether a value is a finite number that a ``float`` can have; JSON has integers of any length."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _read_models(param: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if (
        not isinstance(value, list)
        or len(value) > _MAX_MODELS
        or not all(
            isinstance(each, str) and 0 < len(each) <= _MAX_PATTERN and each.isprintable() for each in value
        )
    ):
        raise _wrong(
            param,
            f"expected a list of at most {_MAX_MODELS} names of models, in which * stands for anything",
        )
    return tuple(value)


def _read_count(param: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_COUNT:
        raise _wrong(param, "expected a whole number of at least 1, or null for no limit")
    return value


def _read_word(words: Any) -> Callable[[str, object], Any]:
    choices = typing.get_args(words)

    def read(param: str, value: object) -> Any:
        if value not in choices or not isinstance(value, str):
            raise _wrong(param, f"expected one of {', '.join(choices)}")
        return value

    return read


def _read_weight(param: str, value: object) -> float:
    if not _is_number(value) or not 0 < typing.cast("float", value) <= _MAX_WEIGHT:
        raise _wrong(param, f"expected a number of more than 0, and at most {_MAX_WEIGHT:g}")
    return float(typing.cast("float", value))


def _read_expiry(param: str, value: object) -> float | None:
    return None if value is None else read_time(param, value)


def _read_flag(param: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(param, "expected true or false")
    return value


def _read_budget(value: object) -> dict[str, Any]:
    if value is None:
        return {"budget_tokens": None}
    if not isinstance(value, dict) or value.keys() != {"tokens", "per"}:
        raise _wrong("budget", 'expected an object such as {"tokens": 1000000, "per": "month"}, or null')
    tokens = _read_count("budget.tokens", value["tokens"])
    if tokens is None:
        raise _wrong("budget.tokens", "expected a whole number of at least 1")
    return {"budget_tokens": tokens, "budget_per": _read_word(BudgetPeriod)("budget.per", value["per"])}


_READERS: Final[Mapping[str, Callable[[str, object], Any]]] = {
    "models": _read_models,
    "role": _read_word(Role),
    "requests_per_minute": _read_count,
    "tokens_per_minute": _read_count,
    "max_concurrency": _read_count,
    "priority": _read_word(Priority),
    "weight": _read_weight,
    "expires_at": _read_expiry,
    "disabled": _read_flag,
}
