"""JSON Schema, as far as it is needed to describe requests.

Each check describes what it takes as a schema (``Check.schema``), and the description for clients is made of these:
nothing is written down twice. Where JSON Schema cannot express a check, the schema is wider than the check; it is never
narrower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

__all__ = ["ANYTHING", "NULL", "Schema", "any_of", "by_type", "members_of", "or_null"]

Schema: TypeAlias = dict[str, Any]

ANYTHING: Final[Schema] = {}
NULL: Final[Schema] = {"type": "null"}


def any_of(*schemas: Schema) -> Schema:
    """Return the schema of a value that fits one of several."""
    return {"anyOf": list(schemas)}


def or_null(schema: Schema) -> Schema:
    """Return the schema of a member that may also be ``null``, which is the same as absent."""
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
    """Return the schema of an object. Members that are not required may be ``null``; unknown members are allowed."""
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
    """Return the schema of an object whose member ``type`` decides which other members it has.

    Args:
        known: the schemas of objects, by type.
        common: the schema of the members that all of them have.
        default: the type of an object without a ``type``; ``None``: an object must have one.
        closed: no other types are allowed. Otherwise an object of another type may have any members.
    """
    basis = common if common is not None else members_of({})
    variants = []
    for word, schema in known.items():
        needed = () if word == default else ("type",)
        variants.append(_both(basis, schema, {"type": "string", "enum": [word]}, needed))
    if not closed:
        unknown: Schema = {"type": "string", "not": {"enum": list(known)}}
        other = unknown if default is None else or_null(unknown)
        variants.append(_both(basis, members_of({}), other, ("type",)))
    return any_of(*variants)


def _both(basis: Schema, schema: Schema, type_: Schema, needed: tuple[str, ...]) -> Schema:
    properties = basis.get("properties", {}) | schema.get("properties", {}) | {"type": type_}
    required = dict.fromkeys([*needed, *basis.get("required", ()), *schema.get("required", ())])
    return {"type": "object", "properties": properties, "required": list(required)}
