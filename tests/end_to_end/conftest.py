"""Everything here runs the whole of it: real servers, real sockets, real processes, the official client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from nodes import Nodes, open_nodes
from private_postgres import PrivatePostgres, open_postgres
from served import PLACEMENTS, Served, open_served


@pytest.fixture(params=PLACEMENTS)
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    """A server with default options, its models at home or behind it."""
    async with open_served(request.param) as running:
        yield running


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    """Where processes are started."""
    async with open_nodes(tmp_path) as opened:
        yield opened


@pytest.fixture
def own_postgres() -> Iterator[PrivatePostgres]:
    """A PostgreSQL server that no other test needs."""
    with open_postgres() as server:
        yield server
