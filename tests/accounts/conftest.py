"""Fixtures for the tests of accounts: the databases that they are played on."""

from __future__ import annotations

from pathlib import Path

import pytest
from private_postgres import PrivatePostgres


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return tmp_path / "accounts.db"
    server: PrivatePostgres = request.getfixturevalue("postgres")
    return server.create_database()
