"""The names of spans, attributes and metrics: one table, which the documentation has too, and nothing else is sent."""

from __future__ import annotations

import re
from pathlib import Path

from trio_cluster.openai import ENDPOINTS
from trio_cluster.telemetry import names
from trio_cluster.telemetry.operations import operation_of

PAGE = Path(__file__).parents[2] / "docs" / "tracing.md"


def rows(heading: str) -> dict[str, list[str]]:
    """Return the rows of the table below a heading: the names in the first cell, with those in the second."""
    section = PAGE.read_text("utf-8").split(f"\n### {heading}\n")[1].split("\n#")[0]
    found = {}
    for line in section.splitlines():
        cells = line.strip("|").split("|")
        if line.startswith("| `"):
            (name,) = re.findall(r"`([^`]+)`", cells[0])
            found[name] = re.findall(r"`([^`]+)`", cells[1])
    return found


def test_the_page_has_the_same_table() -> None:
    assert rows("Spans") == {name: list(attributes) for name, attributes in names.SPANS.items()}
    assert list(rows("Metrics")) == list(names.METRICS)
    assert f"version {names.SEMCONV_VERSION}" in PAGE.read_text("utf-8")


def test_every_endpoint_has_an_operation() -> None:
    assert names.OPERATIONS.keys() == ENDPOINTS.keys()
    assert {operation_of(endpoint) for endpoint in ENDPOINTS} == set(names.OPERATIONS.values())
    assert operation_of("/v1/a/tokenize") == "tokenize"


def test_names_are_of_the_conventions_or_of_this_project() -> None:
    for attributes in names.SPANS.values():
        for name in attributes:
            assert re.fullmatch(
                r"(http|url|server|client|user_agent|error|gen_ai|trio_cluster)\.[a-z_.-]+", name
            )
