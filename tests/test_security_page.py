"""The table of the cluster's bounds names what there is: files, constants and tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")
CLUSTER = PAGE.partition("## Cluster\n")[2].partition("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in CLUSTER.splitlines()
    if line.startswith("| ") and not line.startswith("| bound ")
]
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def test_the_table_has_rows() -> None:
    assert len(ROWS) > 10


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_code_and_a_test_that_are_there(row: list[str]) -> None:
    assert len(row) == 4, row
    path, *names = re.findall(r"`([^`]+)`", row[2])
    source = (ROOT / "trio_cluster" / path).read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf"\b{re.escape(name)}\b", source), name
    tests = re.findall(r"`(test_\w+)`", row[3])
    assert tests
    for test in tests:
        assert re.search(rf"def {test}\b", TESTS), test
