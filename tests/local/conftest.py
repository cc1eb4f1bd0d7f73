from __future__ import annotations

import pytest
import trio
from handler_bench import Bench


@pytest.fixture
async def bench(nursery: trio.Nursery) -> Bench:
    made = Bench(nursery)
    await nursery.start(made.pool.serve)
    return made
