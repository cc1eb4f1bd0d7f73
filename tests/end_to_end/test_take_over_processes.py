"""A new process takes the place of a running master, while clients ask and ask: they notice nothing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx
import pytest
import trio
from nodes import Node, Nodes, free_pair
from test_rolling_restart import PLAIN, STREAMING, Load

#: How often the master is replaced; the session `law` does it four times, and more by this variable.
TAKE_OVERS: Final = int(os.environ.get("TAKE_OVERS", "1"))

pytestmark = pytest.mark.processes


async def take_over(nodes: Nodes, old: Node, *arguments: str) -> Node:
    """Start a master that takes the place of ``old``, and wait until it serves."""
    return await nodes.start("master", old.port, "--take-over", *arguments)


async def test_a_master_is_taken_over_again_and_again_under_load_and_nothing_is_lost(
    nodes: Nodes, nursery: trio.Nursery, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    state = ("--state-dir", str(tmp_path / "state"), "--on-conflict", "replicate")
    master = await nodes.start("master", free_pair(), *state)
    for name in ("w1", "w2"):
        await nodes.worker(master, name, models="m")
    load = Load(master.url)
    times = TAKE_OVERS
    async with trio.open_nursery() as asking:
        for stream in itertools.chain([True] * STREAMING, [False] * PLAIN):
            asking.start_soon(load.ask, stream)
        await load.go_on(10)
        for _ in range(times):
            successor = await take_over(nodes, master, *state)
            await load.go_on(20)
            assert await master.exit_code(within=20) == 0
            master = successor
            await load.go_on(20)
        load.over = True
    assert load.failures == []
    async with httpx.AsyncClient(base_url=master.url, trust_env=False, verify=False) as client:
        status = (await client.get("/cluster/status")).json()
    assert {worker["id"] for worker in status["workers"]} == {"w1", "w2"}
    assert nodes.notes() == ["m finished"] * load.asked.total()
    for figure, value in [*load.asked.items(), ("take-overs", times)]:
        record_property(figure, value)
