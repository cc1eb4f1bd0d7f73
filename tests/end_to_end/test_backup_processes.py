"""A master that is backed up while it runs, and restored on another machine: another directory, another process."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import fork_server
import httpx
import pytest
import trio
from nodes import Nodes, free_pair
from served import chat, until

import trio_cluster

pytestmark = pytest.mark.processes

ADMIN = {"authorization": "Bearer sk-admin"}


async def run(nodes: Nodes, *words: str) -> str:
    environ: Mapping[str, str] = os.environ | {"PYTHONPATH": str(Path(trio_cluster.__file__).parents[1])}
    done = await fork_server.run(["-m", "trio_cluster", *words], cwd=nodes.directory, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


async def has_worker(client: httpx.AsyncClient) -> bool:
    return bool((await client.get("/cluster/status", headers=ADMIN)).json()["workers"])


async def test_a_restored_master_has_keys_usage_responses_and_its_workers(
    nodes: Nodes, tmp_path: Path
) -> None:
    port, old, new = free_pair(), tmp_path / "old", tmp_path / "new"

    async def start(state: Path, database: Path) -> Any:
        arguments = (
            "--state-dir",
            str(state),
            "--database",
            f"sqlite:///{database}",
            "--api-key",
            "sk-admin",
        )
        master = await nodes.start("master", port, "--tls", "auto", *arguments)
        master.tls = True
        return master

    master = await start(old, tmp_path / "responses.db")
    node = (master.url, "--ca-file", str(old / "ca.pem"), "--api-key", "sk-admin")
    key = (await run(nodes, "keys", "create", "app", *node)).strip()
    as_app = {"authorization": f"Bearer {key}"}
    join = (await run(nodes, "invite", *node)).split()
    await nodes.start("worker", *join[2:], "--state-dir", str(tmp_path / "w"), models="m")

    async with httpx.AsyncClient(base_url=master.url, verify=False, trust_env=False, timeout=20) as client:
        stored = await client.post("/v1/responses", json={"model": "m", "input": "hello"}, headers=as_app)
        assert stored.status_code == 200

        async def used() -> int:
            answer = await client.get("/cluster/usage?group_by=key", headers=ADMIN)
            return sum(row["requests"] for row in answer.json()["data"] if row["key"] == "app")

        async def is_written() -> bool:
            return await used() == 1

        await until(is_written, within=10)

        # While requests go on.
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(
                    lambda: client.post("/v1/chat/completions", json=chat("m"), headers=as_app)
                )
            archive = str(tmp_path / "state.tar.gz")
            url = f"sqlite:///{tmp_path / 'responses.db'}"
            await run(nodes, "backup", archive, "--state-dir", str(old), "--database", url)

    master.send(signal.SIGKILL)
    await master.exit_code()
    old.rename(tmp_path / "lost")
    (tmp_path / "responses.db").unlink()
    assert "database.db" in await run(nodes, "restore", archive, "--state-dir", str(new))

    master = await start(new, new / "database.db")
    # The worker was not started again, and was told nothing: the authority is the one that it trusts.
    async with httpx.AsyncClient(base_url=master.url, verify=False, trust_env=False, timeout=20) as client:
        await until(partial(has_worker, client), within=10)
        status = (await client.get("/cluster/status", headers=ADMIN)).json()
        assert [each["admitted"] for each in status["workers"]] == ["certificate"]
        answer = await client.post("/v1/chat/completions", json=chat("m"), headers=as_app)
        assert answer.status_code == 200
        found = await client.get(f"/v1/responses/{stored.json()['id']}", headers=as_app)
        assert found.json()["output"] == stored.json()["output"]
        assert await used() >= 1
    # A certificate of the restored authority: clients that trust it still do.
    assert "app" in await run(
        nodes, "keys", "list", master.url, "--ca-file", str(new / "ca.pem"), "--api-key", "sk-admin"
    )
