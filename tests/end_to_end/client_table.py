"""The tables of docs/clients.md: which client was seen to do what. They are written by the run that has seen it.

A test has a marker, ``@pytest.mark.feature("name")``, which is its column, and the row is that of the client which it
was parametrized with. A cell is what came of all tests in it. If the environment variable ``CLIENTS_PAGE`` names the
page, the block of that name is written at the end of the run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import attrs
import pytest

__all__ = ["PAGE_VARIABLE", "ClientTable", "block_in", "with_block"]

#: The environment variable that names the page to write to. Without it, nothing is written.
PAGE_VARIABLE: Final = "CLIENTS_PAGE"

_BLOCK: Final = "<!-- {name}: written by `nox -s {name}` -->\n{text}<!-- end of {name} -->"


def block_in(page: str, name: str) -> str:
    """Return what a page has between the markers of a block.

    Raises:
        LookupError: there are none.
    """
    found = re.search(re.escape(_BLOCK).replace(r"\{name\}", name).replace(r"\{text\}", "(.*?)"), page, re.S)
    if found is None:
        raise LookupError(f"the page has no block of the name {name}")
    return found[1]


def with_block(page: str, name: str, text: str) -> str:
    """Return a page with other text in a block; it has to have the markers."""
    old = _BLOCK.format(name=name, text=block_in(page, name))
    return page.replace(old, _BLOCK.format(name=name, text=text))


@attrs.define(eq=False)
class ClientTable:
    """A plugin of pytest that keeps what came of the tests with a feature.

    Attributes:
        name: the session that writes it, and the block.
        parameter: the parameter of the tests that is the client.
        clients: the rows: the id of the parameter, and what the table says.
        versions: what the table says of the version of each client.
        notes: what a test has found, for its cell, by the id of the client and the feature.
    """

    name: str
    parameter: str
    clients: dict[str, str]
    versions: dict[str, str] = attrs.field(factory=dict)
    notes: dict[tuple[str, str], str] = attrs.field(factory=dict)
    _features: list[str] = attrs.field(factory=list)
    _outcomes: dict[tuple[str, str], set[str]] = attrs.field(factory=dict)
    _cells: dict[str, tuple[str, str]] = attrs.field(factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker, callspec = item.get_closest_marker("feature"), getattr(item, "callspec", None)
            if marker is None or callspec is None or self.parameter not in callspec.params:
                continue
            client = callspec.params[self.parameter]
            feature = marker.args[0]
            if feature not in self._features:
                self._features.append(feature)
            self._cells[item.nodeid] = (client if isinstance(client, str) else client.name, feature)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = self._cells.get(report.nodeid)
        if cell is not None and (report.when == "call" or report.outcome != "passed"):
            self._outcomes.setdefault(cell, set()).add(report.outcome)

    def pytest_sessionfinish(self) -> None:
        page = os.environ.get(PAGE_VARIABLE)
        # A worker of pytest-xdist has seen a part only.
        if "PYTEST_XDIST_WORKER" not in os.environ and page is not None and self._outcomes:
            path = Path(page)
            path.write_text(with_block(path.read_text("utf-8"), self.name, self.text()), encoding="utf-8")

    def text(self) -> str:
        """Return the table, in Markdown."""
        rows = [["Client", "Version", *self._features], ["---"] * (2 + len(self._features))]
        for client, title in self.clients.items():
            cells = [self._cell(client, feature) for feature in self._features]
            rows.append([title, self.versions.get(client, "not installed"), *cells])
        return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n"

    def _cell(self, client: str, feature: str) -> str:
        outcomes = self._outcomes.get((client, feature), set())
        if "failed" in outcomes:
            return "**fails**"
        if "passed" in outcomes:
            return self.notes.get((client, feature), "yes")
        return "not run" if outcomes else "–"
