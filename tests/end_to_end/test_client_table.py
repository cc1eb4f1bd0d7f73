"""The tables of docs/clients.md are in it, and are rewritten in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
from client_table import ClientTable, block_in, with_block

pytest_plugins = ["pytester"]

PAGE = (Path(__file__).parent.parent.parent / "docs" / "clients.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["agents", "ecosystem", "clients"])
def test_a_block_is_replaced_and_nothing_else(name: str) -> None:
    changed = with_block(PAGE, name, "\nnew\n")
    assert block_in(changed, name) == "\nnew\n"
    assert with_block(changed, name, block_in(PAGE, name)) == PAGE


def test_a_page_without_the_block_is_left_alone() -> None:
    with pytest.raises(LookupError):
        with_block(PAGE, "others", "new")


def test_a_row_says_what_came_of_a_client(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    page = pytester.path / "page.md"
    page.write_text(with_block(PAGE, "clients", "\nold\n"), encoding="utf-8")
    monkeypatch.setenv("CLIENTS_PAGE", str(page))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makeini("[pytest]\nmarkers = feature(name): a column\n")
    pytester.makepyfile(
        """
import pytest

@pytest.mark.feature("one")
@pytest.mark.parametrize("client", ["a", "b"])
def test_one(client):
    assert client == "a"

@pytest.mark.feature("two")
@pytest.mark.parametrize("client", ["a", "b"])
def test_two(client):
    if client == "b":
        pytest.skip("it has none")
"""
    )
    table = ClientTable(
        "clients", "client", {"a": "A", "b": "B", "c": "C"}, versions={"a": "1.0", "b": "2.0"}
    )
    table.notes["a", "two"] = "twice"
    pytester.inline_run("-p", "no:asyncio", plugins=[table])
    assert block_in(page.read_text("utf-8"), "clients").splitlines()[3:6] == [
        "| A | 1.0 | yes | twice |",
        "| B | 2.0 | **fails** | not run |",
        "| C | not installed | – | – |",
    ]
