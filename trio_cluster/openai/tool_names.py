"""The names of a client's tools on ``/v1/responses``, as the client knows them and as the model does.

A client may have its functions in namespaces; a model knows one flat list of names. Reading a request makes flat names,
and encoding an answer takes them apart again. Both go by the tools as they were sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

__all__ = ["CallName", "callable_names", "callables", "flat_name"]


@attrs.frozen
class CallName:
    """How a client knows one of its tools."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


def flat_name(namespace: str | None, name: str) -> str:
    """Return the name by which a model knows a tool that is in a namespace, or in none."""
    if namespace is None:
        return name
    return namespace + name if namespace.endswith("__") else f"{namespace}__{name}"


def callables(tools: list[dict[str, Any]]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield the tools that a model can be offered, each with the namespace that it is in.

    Args:
        tools: as the client has sent them, and checked.
    """
    for tool in tools:
        if tool["type"] == "namespace":
            for inner in tool["tools"]:
                if inner["type"] in ("function", "custom"):
                    yield tool["name"], inner
        elif tool["type"] in ("function", "custom"):
            yield None, tool


def callable_names(tools: Any) -> Mapping[str, CallName]:
    """Return how the client knows its tools, by the names that the model knows.

    Args:
        tools: as for :func:`callables`; ``None`` if there are none.
    """
    return {
        flat_name(namespace, tool["name"]): CallName(tool["name"], namespace, tool["type"] == "custom")
        for namespace, tool in callables(tools or [])
    }
