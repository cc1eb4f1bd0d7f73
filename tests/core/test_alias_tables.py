"""Tables of aliases: what may be in them, and which models a request for an alias is for."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trio_cluster.core.aliases import expand, reachable, read_aliases
from trio_cluster.routing.aliases import Aliases

TABLE = {
    "one": "m",
    "list": ["a", "b", "a", "c"],
    "weights": {"x": 0.75, "y": 0.25, "z": 0},
    "nested": ["weights", "list", "one"],
    "own": ["own", "b"],
    "around": ["own", "m"],
}


def draw_nothing(name: str) -> float:
    raise AssertionError(name)


def test_names_are_tried_in_the_order_in_which_they_are_written_and_each_once() -> None:
    table = read_aliases(TABLE)
    assert expand(table, "one", draw_nothing) == ("m",)
    assert expand(table, "list", draw_nothing) == ("a", "b", "c")
    assert expand(table, "nested", lambda name: 0.8) == ("y", "a", "b", "c", "m")
    assert reachable(table, "nested") == ("x", "y", "z", "a", "b", "c", "m")


def test_an_alias_that_names_itself_means_the_model() -> None:
    table = read_aliases(TABLE)
    assert expand(table, "own", draw_nothing) == ("own", "b")
    assert expand(table, "around", draw_nothing) == ("own", "b", "m")


@pytest.mark.parametrize(
    ("drawn", "name"), [(0.0, "x"), (0.7499, "x"), (0.75, "y"), (0.9999, "y"), (1.0, "y")]
)
def test_a_weight_is_a_share_and_one_of_0_is_none(drawn: float, name: str) -> None:
    assert expand(read_aliases(TABLE), "weights", lambda alias: drawn) == (name,)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "b", "b": "a"}, "the aliases stand for each other in a circle: a -> b -> a"),
        ({"a": ["m", "b"], "b": {"c": 1}, "c": "b"}, "b -> c -> b"),
        ({"a": []}, "a: expected 1 to 32 names, got 0"),
        ({"a": [f"m{i}" for i in range(33)]}, "a: expected 1 to 32 names, got 33"),
        ({"a": ""}, "a: a model's name must have 1 to 512 printable characters"),
        ({"": "m"}, ": a model's name must have 1 to 512"),
        ({"a": {"m": -1}}, "a: the weight of 'm' must be 0 or more"),
        ({"a": {"m": float("inf")}}, "a: the weight of 'm' must be 0 or more"),
        ({"a": {"m": float("nan")}}, "a: the weight of 'm' must be 0 or more"),
        ({"a": {"m": 0}}, "a: at least one weight must be more than 0"),
        ({f"a{i}": f"a{i + 1}" for i in range(9)}, "more than 8 aliases in a row: a0 -> a1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_name_of_the_alias(table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_aliases(table)


@pytest.mark.parametrize("table", ["a", 3, {"a": 3}, {"a": None}, {"a": [1]}, {"a": {"m": "1"}}, {1: "m"}])
def test_what_is_no_table_of_aliases_is_a_type_error(table: Any) -> None:
    with pytest.raises(TypeError):
        read_aliases(table)


def test_a_table_is_not_changed_by_those_who_gave_it() -> None:
    given: dict[str, Any] = {"a": ["m"], "b": {"m": 1}}
    table = read_aliases(given)
    given["a"].append("other")
    given["b"]["other"] = 1
    assert table == {"a": ("m",), "b": {"m": 1.0}}


def test_the_aliases_of_the_configuration_are_replaced_at_once_and_those_of_the_code_stay() -> None:
    aliases = Aliases()
    aliases.add("coded", "m")
    aliases.add("both", "m")
    aliases.configure({"both": "n", "old": "m"})
    assert aliases.table == {"coded": "m", "both": "n", "old": "m"}
    aliases.configure({"new": "m"})
    assert aliases.table == {"coded": "m", "both": "m", "new": "m"}
    # What is wrong changes nothing, also if it is wrong only together with the others.
    with pytest.raises(ValueError, match="coded -> new -> coded"):
        aliases.add("coded", "new") or aliases.configure({"new": "coded"})
    with pytest.raises(ValueError, match="both -> both2 -> both"):
        aliases.configure({"both": "both2", "both2": "both"})
    assert aliases.table == {"coded": "new", "both": "m", "new": "m"}
    assert aliases.remove("coded")
    assert not aliases.remove("new")
    aliases.configure(None)
    assert aliases.table == {"both": "m"}
