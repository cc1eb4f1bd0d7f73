"""Aliases: other names for models, a table of which is checked as a whole before it is used.

A target is one name, a list of names in the order in which they are tried, or a table of names with their weights. A
name in it is that of a model or of another alias. An alias may name itself: that is the model of the same name, which
can only be reached through the alias. Every other circle is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from .model import require_model_name

__all__ = [
    "AliasTarget",
    "AliasTargets",
    "check_loops",
    "expand",
    "reachable",
    "read_aliases",
    "shown_target",
]

#: What an alias stands for: a name, names in order, or names with weights.
AliasTarget: TypeAlias = str | tuple[str, ...] | Mapping[str, float]
#: The same as it is given.
AliasTargets: TypeAlias = Mapping[str, str | Sequence[str] | Mapping[str, float]]

#: Names that one alias may have as its target, and aliases of aliases in a row.
_MOST_NAMES: Final = 32
_DEEPEST: Final = 8


def read_aliases(given: object) -> dict[str, AliasTarget]:
    """Return a table of aliases as it is used, with copies of all that is in it.

    Args:
        given: the targets by alias.

    Raises:
        TypeError: it is not a table of such targets.
        ValueError: a name or a weight is not valid, or there is a circle. The message names the alias.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"expected a table of names and what they stand for, got {given!r}")
    table = {name: _read_target(name, target) for name, target in given.items()}
    check_loops(table)
    return table


def _read_target(name: object, target: object) -> AliasTarget:
    try:
        require_model_name(name)
        if isinstance(target, str):
            require_model_name(target)
            return target
        if isinstance(target, list | tuple):
            _require_names(target)
            return tuple(target)
        if isinstance(target, Mapping):
            _require_names(target)
            return _read_weights(target)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    raise TypeError(f"{name}: expected a name, a list of names, or a table of weights, got {target!r}")


def _require_names(names: list[object] | tuple[object, ...] | Mapping[object, object]) -> None:
    if not 0 < len(names) <= _MOST_NAMES:
        raise ValueError(f"expected 1 to {_MOST_NAMES} names, got {len(names)}")
    for name in names:
        require_model_name(name)


def _read_weights(table: Mapping[object, object]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for name, weight in table.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"the weight of '{name}' must be a number, got {weight!r}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"the weight of '{name}' must be 0 or more, and not infinite, got {weight!r}")
        weights[str(name)] = float(weight)
    if not 0 < sum(weights.values()) < math.inf:
        raise ValueError("at least one weight must be more than 0")
    return weights


def check_loops(table: Mapping[str, AliasTarget]) -> None:
    """Refuse aliases that stand for each other in a circle, and chains of too many.

    Raises:
        ValueError: there is one; the message has the names on it.
    """
    for name in table:
        _follow(table, name, ())


def _follow(table: Mapping[str, AliasTarget], name: str, way: tuple[str, ...]) -> None:
    if name in way:
        raise ValueError(f"the aliases stand for each other in a circle: {' -> '.join((*way, name))}")
    way = (*way, name)
    if len(way) > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} aliases in a row: {' -> '.join(way)}")
    for target in _names_in(table[name]):
        if target != name and target in table:
            _follow(table, target, way)


def _names_in(target: AliasTarget) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else tuple(target)


def reachable(table: Mapping[str, AliasTarget], alias: str) -> tuple[str, ...]:
    """Return all models that an alias may stand for, each once, in the order in which they are written."""
    return _expand(table, alias, lambda name, weights: tuple(weights))


def expand(table: Mapping[str, AliasTarget], alias: str, draw: Callable[[str], float]) -> tuple[str, ...]:
    """Return the models that a request for an alias is for, in the order in which they are tried, each once.

    Args:
        table: all aliases.
        alias: one of them.
        draw: called with the name of an alias that has weights; returns a number from 0 to 1, less than 1, which
            selects one of its names.
    """
    return _expand(table, alias, lambda name, weights: (_select(weights, draw(name)),))


def _expand(
    table: Mapping[str, AliasTarget],
    alias: str,
    choose: Callable[[str, Mapping[str, float]], tuple[str, ...]],
) -> tuple[str, ...]:
    found: dict[str, None] = {}
    passed: set[str] = set()

    def visit(name: str) -> None:
        passed.add(name)
        target = table[name]
        names = choose(name, target) if isinstance(target, Mapping) else _names_in(target)
        for each in names:
            if each == name or each not in table:
                found[each] = None
            elif each not in passed:
                visit(each)

    visit(alias)
    return tuple(found)


def _select(weights: Mapping[str, float], drawn: float) -> str:
    left = drawn * sum(weights.values())
    last = ""
    for name, weight in weights.items():
        if weight > 0:
            last = name
            left -= weight
            if left < 0:
                break
    return last


def shown_target(target: AliasTarget) -> str | list[str] | dict[str, float]:
    """Return what an alias stands for as a JSON value, in the form in which it was given."""
    if isinstance(target, str):
        return target
    return dict(target) if isinstance(target, Mapping) else list(target)
