"""Three clusters in a ring, as processes of the command line: each one serves what the one before it lists."""

from __future__ import annotations

import signal
from functools import partial
from typing import Any

import httpx
import pytest
import trio
from nodes import Node, Nodes, free_pair
from served import chat, until

pytestmark = pytest.mark.processes

POLL = 0.5
#: Seconds in which all is as before: workers return within 5 s, three polls follow, and a machine may be slow.
SETTLED = 5.0 + 3 * POLL + 3.0


async def ask(node: Node, **headers: str) -> tuple[int, str | None]:
    async with httpx.AsyncClient(base_url=node.url, timeout=5, trust_env=False, verify=False) as client:
        body = chat("m", ticks=2, pause=0.005)
        response = await client.post("/v1/chat/completions", json=body, headers=headers)
    return response.status_code, None if response.is_success else response.json()["error"]["code"]


async def via(node: Node) -> list[str]:
    """Return the ids of the clusters through which a cluster's clients get the model."""
    async with httpx.AsyncClient(base_url=node.url, timeout=5, trust_env=False, verify=False) as client:
        entry: dict[str, Any] = (await client.get("/v1/models/m")).json()
    ids: list[str] = entry["trio_cluster_via"]
    return ids


async def test_three_clusters_in_a_ring_survive_the_restart_of_each(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    masters: dict[int, Node] = {}

    async def start(number: int, port: int) -> None:
        masters[number] = await nodes.start(
            "master", port, "--state-dir", str(nodes.directory / f"s{number}")
        )

    async def all_answer() -> bool:
        return all([(await ask(master)) == (200, None) for master in masters.values()])

    async with trio.open_nursery() as starting:
        for number in range(3):
            starting.start_soon(start, number, free_pair())
    async with trio.open_nursery() as starting:
        starting.start_soon(partial(nodes.worker, masters[0], "real", models="m"))
        for number in range(3):
            spec = f"openai:{masters[(number - 1) % 3].url}/v1,poll={POLL}"
            starting.start_soon(
                partial(nodes.worker, masters[number], f"relay{number}", "--serve", spec, models="")
            )
    await until(all_answer, SETTLED)
    assert [len(await via(masters[number])) for number in range(3)] == [1, 2, 3]
    ids = await via(masters[2])
    assert [await ask(masters[number], **{"x-trio-cluster-via": ids[number]}) for number in range(3)] == [
        (508, "loop_detected")
    ] * 3

    for number in range(3):
        port = masters[number].port
        masters[number].send(signal.SIGKILL)
        await masters[number].exit_code()
        for other in {0, 1, 2} - {number}:
            # Whatever it is, it is an answer.
            assert (await ask(masters[other]))[0] in (200, 502, 503, 508)
        await start(number, port)
        await until(all_answer, SETTLED)

    await trio.sleep(2 * POLL)
    (nodes.directory / "notes").unlink()
    for _ in range(5):
        assert await all_answer()
    assert nodes.notes() == ["m finished"] * 15
