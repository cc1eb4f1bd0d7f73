"""The HTTP face is tested over sockets: what it is about happens between it and the server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from house import House, open_house


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        yield opened
    assert not opened.registry.live, "a call has outlived its request"
