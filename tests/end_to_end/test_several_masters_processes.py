"""Two masters and three workers, as processes: a master is killed under load, and clients of the other notice nothing.

The configuration of nginx is that of the page.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from nodes import Node, Nodes, free_pair
from served import chat, until
from test_proxies import needs_nginx, open_two_masters
from test_rolling_restart import Load

pytestmark = pytest.mark.processes

STREAMING, PLAIN = 3, 3
WORKERS = ("w1", "w2", "w3")


async def status(master: Node) -> Any:
    async with httpx.AsyncClient(base_url=master.url, trust_env=False, verify=False) as client:
        return (await client.get("/cluster/status")).json()


async def has_workers(master: Node) -> bool:
    try:
        workers = (await status(master))["workers"]
    except httpx.TransportError:
        return False
    return [each["id"] for each in workers if "m" in each["models"]] == list(WORKERS)


async def start(nodes: Nodes) -> tuple[list[Node], dict[str, Node]]:
    """Start two masters, and three workers that have both."""
    masters = [await start_master(nodes, free_pair()) for _ in range(2)]
    workers: dict[str, Node] = {}

    async def start_one(name: str) -> None:
        workers[name] = await start_worker(nodes, masters, name)

    async with trio.open_nursery() as nursery:
        for name in WORKERS:
            nursery.start_soon(start_one, name)
    for master in masters:
        await until(lambda master=master: has_workers(master), within=10)
    return masters, workers


async def start_master(nodes: Nodes, port: int) -> Node:
    return await nodes.start("master", port, "--on-conflict", "replicate")


async def start_worker(nodes: Nodes, masters: Sequence[Node], name: str) -> Node:
    where = ",".join(f"127.0.0.1:{master.port}" for master in masters)
    return await nodes.start("worker", where, "--name", name, models="m")


async def test_a_master_that_is_killed_costs_the_clients_of_the_other_nothing(
    nodes: Nodes, record_property: Callable[[str, object], None]
) -> None:
    (killed, kept), _ = await start(nodes)
    address = f"127.0.0.1:{killed.port + 1000}"

    async def is_listed() -> bool:
        masters = (await status(kept))["masters"]
        return [(each["address"], each["workers"]) for each in masters] == [(address, list(WORKERS))]

    await until(is_listed, within=5)
    load, doomed = Load(kept.url), Load(killed.url)
    async with trio.open_nursery() as asking:
        for stream in itertools.chain([True] * STREAMING, [False] * PLAIN):
            asking.start_soon(load.ask, stream)
        async with trio.open_nursery() as dying:
            for stream in (True, False):
                dying.start_soon(doomed.ask, stream)
            await load.go_on(10)
            await doomed.go_on(5)
            killed.send(signal.SIGKILL)
            doomed.over = True
        await load.go_on(20)

        async def is_gone() -> bool:
            return (await status(kept))["masters"] == []

        await until(is_gone, within=5)
        # It comes back, and has all workers and their models again.
        began = trio.current_time()
        back = await start_master(nodes, killed.port)
        await until(lambda: has_workers(back), within=10)
        record_property("seconds until all workers are back", round(trio.current_time() - began, 2))
        await load.go_on(10)
        load.over = True
    assert load.failures == []
    calls = (await status(kept))["calls"]
    assert calls["completed"] == load.asked.total() == calls["admitted"]
    async with httpx.AsyncClient(base_url=back.url, trust_env=False, verify=False) as client:
        answer = await client.post("/v1/chat/completions", json=chat("m", stream=False, ticks=1, pause=0.01))
    assert answer.status_code == 200
    record_property("requests", load.asked.total())


@needs_nginx
async def test_nginx_in_front_of_two_masters_hides_the_loss_of_one(nodes: Nodes, tmp_path: Path) -> None:
    (killed, kept), _ = await start(nodes)
    async with open_two_masters(tmp_path, (killed.port, kept.port)) as url:
        load = Load(url)
        async with trio.open_nursery() as asking:
            # A stream that has begun on a master that is killed ends with it; these are not.
            for _ in range(PLAIN):
                asking.start_soon(load.ask, False)
            await load.go_on(10)
            killed.send(signal.SIGKILL)
            await load.go_on(20)
            load.over = True
        assert load.failures == []
