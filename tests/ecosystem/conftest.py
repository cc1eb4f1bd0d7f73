"""Libraries and programs that people put in front of this server, each in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from client_table import ClientTable
from ecosystem_libraries import ECOSYSTEM_FOLDER, LIBRARIES, PROGRAMS, Library
from served import Served, open_served

TABLE = ClientTable("ecosystem", "library", {library.name: library.title for library in LIBRARIES})


def pytest_configure(config: pytest.Config) -> None:
    """Have the table of docs/clients.md written."""
    config.pluginmanager.register(TABLE)


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.name)
def library(request: pytest.FixtureRequest) -> Library:
    """One of the libraries."""
    value: Library = request.param
    return value


@pytest.fixture
def command(library: Library) -> list[str]:
    """The beginning of the command that runs its program; without the library, the test is skipped."""
    folder = Path(os.environ.get(ECOSYSTEM_FOLDER, "/nonexistent"))
    missing = f"{library.title} is not installed; `nox -s ecosystem` installs it"
    if library.environment == "node_modules":
        manifest = folder / "node_modules" / library.package / "package.json"
        node = shutil.which("node")
        if node is None or not manifest.is_file():
            pytest.skip(missing)
        TABLE.versions.setdefault(library.name, json.loads(manifest.read_text("utf-8"))["version"])
        return [node, str(PROGRAMS / f"{library.name}_program.mjs")]
    found = sorted((folder / library.environment).glob(f"lib/*/site-packages/{library.package}-*.dist-info"))
    if not found:
        pytest.skip(missing)
    TABLE.versions.setdefault(library.name, found[0].name.removesuffix(".dist-info").rpartition("-")[2])
    python = folder / library.environment / "bin" / "python"
    return [str(python), str(PROGRAMS / f"{library.name}_program.py")]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """A server with its models on a worker."""
    async with open_served("forwarded") as running:
        yield running
