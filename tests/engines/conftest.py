from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from clusters import Clusters


@pytest.fixture
async def clusters() -> AsyncIterator[Clusters]:
    async with trio.open_nursery() as nursery:
        yield Clusters(nursery)
        nursery.cancel_scope.cancel()
