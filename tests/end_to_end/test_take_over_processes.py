"""A new process takes the place of a running master, while clients ask and ask: they notice nothing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import fork_server
import httpx
import pytest
import trio
from nodes import Node, Nodes, free_pair
from test_proxies import certificate
from test_rolling_restart import PLAIN, STREAMING, Load

import trio_cluster

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
    await take_over_under_load(nodes, master, load, state)
    for figure, value in [*load.asked.items(), ("take-overs", TAKE_OVERS)]:
        record_property(figure, value)


@pytest.mark.parametrize("http2", [False, True], ids=["auto-http1", "files-http2"])
async def test_a_master_with_tls_is_taken_over_under_load_and_nothing_is_lost(
    nodes: Nodes, tmp_path: Path, http2: bool, record_property: Callable[[str, object], None]
) -> None:
    """One worker was invited, the other one shows a token. The certificate is the authority's, or the operator's."""
    state = (
        "--state-dir",
        str(tmp_path / "state"),
        "--on-conflict",
        "replicate",
        "--cluster-token",
        "secret",
    )
    if http2:
        ca, key = certificate(tmp_path)
        state += ("--http", "hypercorn", "--tls-cert", str(ca), "--tls-key", str(key))
    else:
        ca = tmp_path / "state" / "ca.pem"
        state += ("--tls", "auto")
    master = await nodes.start("master", free_pair(), *state)
    master.tls = True
    environ = dict(os.environ) | {"PYTHONPATH": str(Path(trio_cluster.__file__).parents[1])}
    invited = await fork_server.run(
        ["-m", "trio_cluster", "invite", master.url, "--name", "w1", "--ca-file", str(ca)],
        cwd=nodes.directory,
        env=environ,
    )
    join = invited.stdout.decode().split()[2:]
    async with trio.open_nursery() as nursery:
        for arguments in (
            (*join, "--state-dir", str(tmp_path / "w1")),
            (master.url, "--name", "w2", "--cluster-token", "secret", "--ca-file", str(ca)),
        ):
            nursery.start_soon(partial(nodes.start, "worker", *arguments, models="m"))
    load = Load(master.url, http2=http2)
    workers = await take_over_under_load(nodes, master, load, state)
    assert [worker["admitted"] for worker in workers] == ["certificate", "token"]
    for figure, value in [*load.asked.items(), ("take-overs", TAKE_OVERS)]:
        record_property(figure, value)


async def take_over_under_load(nodes: Nodes, master: Node, load: Load, arguments: Sequence[str]) -> Any:
    """Replace a master as often as wanted, while clients ask; return the status of its workers in the end."""
    async with trio.open_nursery() as asking:
        for stream in itertools.chain([True] * STREAMING, [False] * PLAIN):
            asking.start_soon(load.ask, stream)
        await load.go_on(10)
        for _ in range(TAKE_OVERS):
            successor = await take_over(nodes, master, *arguments)
            successor.tls = master.tls
            await load.go_on(20)
            assert await master.exit_code(within=20) == 0
            master = successor
            await load.go_on(20)
        load.over = True
    assert load.failures == []
    async with httpx.AsyncClient(base_url=master.url, trust_env=False, verify=False) as client:
        status = (await client.get("/cluster/status")).json()
    workers = sorted(status["workers"], key=lambda worker: str(worker["id"]))
    assert [worker["id"] for worker in workers] == ["w1", "w2"]
    assert nodes.notes() == ["m finished"] * load.asked.total()
    return workers
