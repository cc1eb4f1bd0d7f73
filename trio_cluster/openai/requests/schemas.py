"""JSON Schema, as far as it takes to say what a request may be.

Checks say what they take as schemas (``Check.schema``), and what is described to clients is made of those: nothing is
written down twice. A schema may be wider than its check where JSON Schema has no words for it, never narrower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

__all__ = ["ANYTHING", "NULL", "Schema", "any_of", "by_type", "members_of", "or_null"]

Schema: TypeAlias = dict[str, Any]

ANYTHING: Final[Schema] = {}
NULL: Final[Schema] = {"type": "null"}


def any_of(*schemas: Schema) -> Schema:
    """Return the schema of what fits one of several."""
    return {"anyOf": list(schemas)}


def or_null(schema: Schema) -> Schema:
    """Return the schema of a member that may also be ``null``, which is the same as not being there."""
    if not schema:
        return schema
    if set(schema) == {"anyOf"}:
        return any_of(*schema["anyOf"], NULL)
    if not isinstance(schema.get("type"), str):
        return any_of(schema, NULL)
    wider = schema | {"type": [schema["type"], "null"]}
    if "enum" in schema:
        wider["enum"] = [*schema["enum"], None]
    return wider


def members_of(members: Mapping[str, Schema], required: Iterable[str] = ()) -> Schema:
    """Return the schema of an object; members that are not required may be ``null``, unknown ones may be there."""
    needed = list(required)
    schema: Schema = {"type": "object"}
    if members:
        schema["properties"] = {
            name: each if name in needed else or_null(each) for name, each in members.items()
        }
    if needed:
        schema["required"] = needed
    return schema


def by_type(
    known: Mapping[str, Schema],
    *,
    common: Schema | None = None,
    default: str | None = None,
    closed: bool = False,
) -> Schema:
    """Return the schema of an object that says in its ``type`` what else is in it.

    Args:
        known: the schemas of objects of these types.
        common: the schema of what all of them have.
        default: the type of an object that does not say it.
        closed: there are no others. Else an object of another type may have anything in it.
    """
    basis = common if common is not None else members_of({})
    variants = []
    for word, schema in known.items():
        says_it = () if word == default else ("type",)
        variants.append(_both(basis, schema, {"type": "string", "enum": [word]}, says_it))
    if not closed:
        unknown: Schema = {"type": "string", "not": {"enum": list(known)}}
        other = unknown if default is None else or_null(unknown)
        variants.append(_both(basis, members_of({}), other, ("type",)))
    return any_of(*variants)


def _both(basis: Schema, schema: Schema, type_: Schema, says_it: tuple[str, ...]) -> Schema:
    properties = basis.get("properties", {}) | schema.get("properties", {}) | {"type": type_}
    required = dict.fromkeys([*says_it, *basis.get("required", ()), *schema.get("required", ())])
    return {"type": "object", "properties": properties, "required": list(required)}
