"""Values drawn from a JSON Schema: some that fit it, some that nearly do, and some that nobody would expect.

It knows the part of JSON Schema that trio_cluster describes itself in, and fails on anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from hypothesis import reject, strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import extend

__all__ = ["ODD", "deep", "fits", "fitting", "json_values", "nearly_fitting"]

_KNOWN: Final = {
    "additionalProperties",
    "allOf",
    "anyOf",
    "contentMediaType",
    "default",
    "description",
    "enum",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "not",
    "pattern",
    "properties",
    "propertyNames",
    "required",
    "type",
}

#: Values that have been somebody's undoing before.
ODD: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**40, -0.0, 0.5, 1.0, 1e308, 5e-324,
    "", " ", "0", "null", "auto", "a\x00b", "\r\n\r\n", "\u2028", "\ufeff", "\u202eabc", "e\u0301\u0300\u0302",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\ud7ff\ue000\uffff", "%s%n{0}", "../../etc/passwd", "x" * 5000,
    [], {}, [[]], [{}], [None], {"": None}, {"type": "text"}, {"type": None}, {"role": "user"}, ["a", 1, None],
)  # fmt: skip


def json_values() -> st.SearchStrategy[Any]:
    """Return a strategy for any JSON value."""
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8)
        | st.sampled_from([each for each in ODD if not isinstance(each, list | dict)])
    )
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )


_JSON: Final = json_values()
_ODD_OR_JSON: Final = st.sampled_from(ODD) | _JSON


def fitting(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for values that fit."""
    return _fitting(schema)


# What is drawn is drawn step by step, and not by one strategy that is put together for all of a schema: that would be
# as large as everything that could be drawn, several times over.
@st.composite
def _fitting(draw: st.DrawFn, schema: dict[str, Any]) -> Any:
    return _draw(draw, schema)


def _draw(draw: st.DrawFn, schema: dict[str, Any]) -> Any:
    assert schema.keys() <= _KNOWN, schema.keys() - _KNOWN
    if "not" not in schema and "allOf" not in schema:
        return _draw_freely(draw, schema)
    validator = fits(schema)
    for _ in range(10):
        value = _draw_freely(draw, schema)
        if validator.is_valid(value):
            return value
    return reject()


def _draw_freely(draw: st.DrawFn, schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return draw(st.sampled_from(schema["enum"]))
    if "anyOf" in schema:
        return _draw(draw, draw(st.sampled_from(schema["anyOf"])))
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = draw(st.sampled_from(kind))
    match kind:
        case "null":
            return None
        case "boolean":
            return draw(st.booleans())
        case "string":
            return draw(_text(schema))
        case "integer" | "number":
            return draw(_numbers(schema, kind))
        case "array":
            least = schema.get("minItems", 0)
            most = min(schema.get("maxItems", least + 2), least + 2)
            return [_draw(draw, schema["items"]) for _ in range(draw(st.integers(least, most)))]
        case "object":
            return _draw_members(draw, schema)
        case _:
            return draw(_JSON)


def _draw_members(draw: st.DrawFn, schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties", {})
    needed = schema.get("required", [])
    optional = sorted(properties.keys() - set(needed))
    chosen = [*needed]
    if optional:
        chosen += draw(st.lists(st.sampled_from(optional), max_size=4, unique=True))
    more = schema.get("additionalProperties", True)
    if more is False:
        return {name: _draw(draw, properties[name]) for name in chosen}
    longest = min(5, schema.get("propertyNames", {}).get("maxLength", 5))
    names = draw(st.lists(st.text(max_size=longest), min_size=schema.get("minProperties", 0), max_size=1))
    others = {
        name: draw(_JSON) if more is True else _draw(draw, more) for name in names if name not in properties
    }
    return others | {name: _draw(draw, properties.get(name, {})) for name in chosen}


def _text(schema: dict[str, Any]) -> st.SearchStrategy[str]:
    if "pattern" in schema:
        # Python's `$` also matches before a line break at the end; that of JSON Schema does not.
        return st.from_regex(schema["pattern"].removesuffix("$") + r"\Z")
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    longest = least + 8 if most is None else min(most, least + 8)
    words = st.text(min_size=least, max_size=longest)
    return words if most is None else words | st.just("y" * most)


def _numbers(schema: dict[str, Any], kind: str) -> st.SearchStrategy[Any]:
    least, most = schema.get("minimum"), schema.get("maximum")
    if kind == "integer":
        return st.integers(least, most)
    whole = st.integers(
        None if least is None else -int(-least // 1), None if most is None else int(most // 1)
    )
    return whole | st.floats(least, most, allow_nan=False, allow_infinity=False)


def nearly_fitting(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for values that fit but for one place, or two, where something else has been put."""

    @st.composite
    def spoilt(draw: st.DrawFn) -> Any:
        value = _draw(draw, schema)
        for _ in range(draw(st.integers(1, 2))):
            # A copy, since what was drawn may have the same list in two places.
            value = json.loads(json.dumps(value))
            places = [place for place in _places(value) if place]
            if not places:
                return draw(_JSON)
            *way, last = draw(st.sampled_from(places))
            parent = value
            for step in way:
                parent = parent[step]
            if draw(st.booleans()):
                del parent[last]
            else:
                parent[last] = draw(_ODD_OR_JSON)
        return value

    return spoilt()


def _places(value: Any) -> Iterator[list[Any]]:
    """Yield the way to every part of a value."""
    yield []
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in steps:
        for way in _places(part):
            yield [step, *way]


def deep(levels: int, kind: str = "list") -> bytes:
    """Return JSON that is nested so deeply."""
    if kind == "list":
        return b"[" * levels + b"]" * levels
    return b'{"a":' * levels + b"1" + b"}" * levels


#: JSON Schema takes 1.0 for an integer; requests are read more strictly, as the OpenAI API does.
_Strict: Final = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int),
)


def fits(schema: dict[str, Any]) -> Any:
    """Return a validator of the schema; ``is_valid`` tells whether a value fits."""
    return _Strict(schema)
