"""The law of lifetimes as it is documented and as it is tested are the same."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
from detour_law import DETOUR_BOUNDS, DETOUR_CAUSES, DETOUR_LAW, DetourCell, detour_markdown
from law import BOUNDS, CAUSES, CLIENTS, HANDLERS, LAW, PHASES, Cell, Impossible, markdown
from storing_law import (
    MOMENTS,
    STORED,
    STORING_BOUNDS,
    STORING_CAUSES,
    STORING_LAW,
    StoringCell,
    storing_markdown,
)

from trio_cluster.core.stats import CallStats

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "lifetimes.md").read_text(encoding="utf-8")


def test_every_cause_has_an_entry_for_every_phase() -> None:
    assert list(LAW) == list(CAUSES)
    assert [list(row) for row in LAW.values()] == [list(PHASES)] * len(CAUSES)


def test_the_page_shows_the_law_that_is_tested() -> None:
    law = PAGE.split("\n## The law\n", 1)[1].split("\n## Remarks\n", 1)[0]
    assert law.strip().splitlines() == "\n".join(markdown()).strip().splitlines()


def test_the_page_shows_the_law_of_storing_that_is_tested() -> None:
    section = PAGE.split("\n## Storing a response\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows == list(storing_markdown())


def test_the_page_shows_the_law_of_detours_that_is_tested() -> None:
    section = PAGE.split("\n## Answered elsewhere, or by a master that was replaced\n", 1)[1].split(
        "\n## ", 1
    )[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows == list(detour_markdown())


def test_the_law_of_detours_has_an_entry_for_every_phase() -> None:
    assert list(DETOUR_LAW) == list(DETOUR_CAUSES)
    assert [list(row) for row in DETOUR_LAW.values()] == [list(PHASES)] * len(DETOUR_CAUSES)
    cells = [each for row in DETOUR_LAW.values() for each in row.values() if isinstance(each, DetourCell)]
    assert {cell.bound for cell in cells} == set(DETOUR_BOUNDS)
    assert {name for cell in cells for name in cell.master} <= {each.name for each in attrs.fields(CallStats)}


def test_the_law_of_storing_has_an_entry_for_every_moment() -> None:
    assert list(STORING_LAW) == list(STORING_CAUSES)
    assert [list(row) for row in STORING_LAW.values()] == [list(MOMENTS)] * len(STORING_CAUSES)
    cells = [each for row in STORING_LAW.values() for each in row.values() if isinstance(each, StoringCell)]
    assert {cell.stored for cell in cells} == set(STORED)


def test_every_bound_of_the_law_is_explained() -> None:
    explained = set(re.findall(r"^\| (\w) \|", PAGE.split("\n## Bounds\n", 1)[1].split("\n## ", 1)[0], re.M))
    used = {
        part
        for bound in STORING_BOUNDS.values()
        if bound.isupper() or bound == "h"
        for part in bound.split(" + ")
    }
    assert explained == used


def test_every_definition_is_used_by_a_cell() -> None:
    cells = [entry for row in LAW.values() for entry in row.values() if isinstance(entry, Cell)]
    assert {cell.client for cell in cells} == set(CLIENTS)
    assert {cell.handler for cell in cells} == set(HANDLERS)
    assert {cell.bound for cell in cells} == set(BOUNDS)
    assert all(entry.why for row in LAW.values() for entry in row.values() if isinstance(entry, Impossible))


def test_there_is_a_counter_for_every_end() -> None:
    counters = {field.name for field in attrs.fields(CallStats)}
    cells = [entry for row in LAW.values() for entry in row.values() if isinstance(entry, Cell)]
    assert {name for cell in cells for name in (cell.master, cell.worker) if name} <= counters


def test_every_test_module_that_the_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", PAGE)
    assert len(named) > 5
    assert [path for path in named if not (ROOT / path).exists()] == []
