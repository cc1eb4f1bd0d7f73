"""What a master remembers over a restart, and what clients get meanwhile."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from nodes import free_pair
from trio.testing import MockClock

from trio_cluster import ClusterServer, RawCall
from trio_cluster.cluster.model_memory import ModelMemory
from trio_cluster.core.state_dir import StateDir, StateDirError
from trio_cluster.routing.catalog import Catalog
from trio_cluster.testing import SimulatedCluster, open_cluster, worker


async def echo(request: Any) -> str:
    return "hello"


async def ask(cluster: SimulatedCluster, model: str) -> tuple[int, str | None]:
    messages = [{"role": "user", "content": "x"}]
    answer = await cluster.client().post("/v1/chat/completions", {"model": model, "messages": messages})
    return answer.status, answer.error["code"] if answer.status >= 400 else None


async def start(cluster: SimulatedCluster) -> None:
    """Start a worker with a model, and wait until the master has written down its name."""
    server = worker("w")
    server.register_chat("m", echo)
    await cluster.start_worker(server)
    assert await ask(cluster, "m") == (200, None)
    await trio.sleep(2)


def make_older(directory: Path, seconds: float) -> None:
    """Let time pass for what was written down, which has the machine's time: a mock clock does not move that."""
    path = directory / "models.json"
    entries = json.loads(path.read_text())
    for entry in entries:
        if entry["left"] is not None:
            entry["left"] -= seconds
    path.write_text(json.dumps(entries))


@pytest.mark.parametrize("ends", ["kill", "stop"])
async def test_models_are_unavailable_and_not_unknown_while_workers_return_after_a_restart(
    ends: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_cluster(state_dir=str(tmp_path / "s")) as cluster:
        await start(cluster)
        getattr(cluster.master, ends)()
        await cluster.master.over.wait()
        await cluster.start_master(ClusterServer(attrs.evolve(cluster.options)))
        began = trio.current_time()
        assert await ask(cluster, "m") == (503, "model_unavailable")
        assert await ask(cluster, "never") == (404, "model_not_found")
        await trio.sleep_until(began + 5.2)
        assert await ask(cluster, "m") == (200, None), "the worker takes too long to return"


async def test_a_worker_returns_within_five_seconds_of_a_long_outage(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_cluster(state_dir=str(tmp_path / "s")) as cluster:
        await start(cluster)
        cluster.master.kill()
        for _ in range(5):
            await trio.sleep(200)
            await cluster.start_master(ClusterServer(attrs.evolve(cluster.options)))
            assert await ask(cluster, "m") in [(200, None), (503, "model_unavailable")]
            await trio.sleep(5.2)
            assert await ask(cluster, "m") == (200, None)
            cluster.master.kill()


@pytest.mark.parametrize("ends", ["kill", "stop", "stop, and kill while it stops"])
async def test_a_long_outage_of_the_master_does_not_count_as_absence_of_its_models(
    ends: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_cluster(state_dir=str(tmp_path / "s")) as cluster:
        await start(cluster)
        for end in ends.split(", and "):
            getattr(cluster.master, end.split()[0])()
            await trio.sleep(0 if end == "stop" else 1)
        await cluster.master.over.wait()
        await trio.sleep(3600)
        make_older(tmp_path / "s", 3600)
        await cluster.start_master(ClusterServer(attrs.evolve(cluster.options)))
        assert await ask(cluster, "m") in [(200, None), (503, "model_unavailable")]
        await trio.sleep(5.2)
        assert await ask(cluster, "m") == (200, None)


async def test_a_model_that_left_before_its_master_was_stopped_is_unknown_after_a_long_outage(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_cluster(state_dir=str(tmp_path / "s")) as cluster:
        await start(cluster)
        cluster.workers["w"].kill()
        await trio.sleep(30)
        cluster.master.stop()
        await cluster.master.over.wait()
        make_older(tmp_path / "s", 200)
        await cluster.start_master(ClusterServer(attrs.evolve(cluster.options)))
        assert await ask(cluster, "m") == (404, "model_not_found")


async def test_a_model_that_does_not_return_is_unknown_after_two_minutes(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_cluster(state_dir=str(tmp_path / "s")) as cluster:
        await start(cluster)
        cluster.workers["w"].kill()
        cluster.master.kill()
        await cluster.start_master(ClusterServer(attrs.evolve(cluster.options)))
        await trio.sleep(119)
        assert await ask(cluster, "m") == (503, "model_unavailable")
        await trio.sleep(2)
        assert await ask(cluster, "m") == (404, "model_not_found")


async def test_what_only_one_replica_answers_is_unavailable_until_that_one_has_returned(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async def ask_at(path: str) -> int:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        return (await cluster.client().post(path, body)).status

    async def answer(call: RawCall) -> None:
        call.begin(200, "application/json")
        await call.send(b"{}")

    async with open_cluster(state_dir=str(tmp_path / "s"), on_conflict="replicate") as cluster:
        for name in ("w1", "w2", "w3"):
            server = worker(name)
            if name == "w3":
                server.register_raw("m", answer)
            else:
                server.register_chat("m", echo)
            if name == "w2":
                server.route("/v1/own", "m", echo)
            await cluster.start_worker(server)
        paths = ("/v1/chat/completions", "/v1/own", "/v1/embeddings")
        assert [await ask_at(path) for path in paths] == [200] * 3
        await trio.sleep(2)
        for name in ("w2", "w3"):
            cluster.workers[name].kill()
        cluster.master.kill()
        await cluster.start_master(ClusterServer(attrs.evolve(cluster.options)))
        await trio.sleep(5.2)
        assert [await ask_at(path) for path in paths] == [200, 503, 503]
        await trio.sleep(121)
        assert [await ask_at(path) for path in paths] == [200, 404, 400]


async def test_without_a_state_directory_a_simulated_master_remembers_nothing(
    autojump_clock: MockClock,
) -> None:
    async with open_cluster() as cluster:
        await start(cluster)
        cluster.workers["w"].kill()
        await trio.sleep(1)
        assert await ask(cluster, "m") == (503, "model_unavailable")
        cluster.master.kill()
        await cluster.start_master(ClusterServer(attrs.evolve(cluster.options)))
        assert await ask(cluster, "m") == (404, "model_not_found")


async def test_what_left_long_before_the_restart_is_not_remembered(tmp_path: Path) -> None:
    now = time.time()
    entries = [
        {"name": "now", "kind": "chat"},
        {"name": "then", "kind": "chat", "left": now - 30},
        {"name": "long ago", "kind": "chat", "left": now - 130},
        {"name": "of the future", "kind": "chat", "left": now + 1000},
        {"name": "strange", "kind": "what?"},
        {"name": "", "kind": "chat"},
        {"name": "custom", "kind": "custom", "endpoints": ["/v1/own"], "unknown": 1},
    ]
    (tmp_path / "models.json").write_text(json.dumps(entries))
    catalog = Catalog()
    ModelMemory(catalog, StateDir(tmp_path)).restore()
    assert {info.name for info, _ in catalog.absent} == {"now", "then", "of the future", "custom"}
    assert catalog.answers("/v1/own")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"name": 1}', b"\xff"])
async def test_a_file_that_cannot_be_understood_is_ignored_and_replaced(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "models.json").write_bytes(content)
    memory = ModelMemory(Catalog(), StateDir(tmp_path))
    memory.restore()
    memory.save()
    assert "are lost" in caplog.text
    assert (tmp_path / "models.json").read_bytes() == b"[]"


async def test_a_master_refuses_to_start_with_a_state_directory_that_it_cannot_use(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    server = ClusterServer()
    server.options.state_dir = str(tmp_path)
    with trio.fail_after(5), pytest.raises(StateDirError, match="others may write"):
        await server.run_as_master(0)


async def test_a_master_goes_on_without_a_default_state_directory_and_says_so_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nursery: trio.Nursery,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    server = ClusterServer(free_pair())
    server.options.server.host = "127.0.0.1"
    with caplog.at_level(logging.WARNING):
        await nursery.start(server.run_as_master)
        server.register_chat("m", echo)
        await trio.sleep(0.1)
    assert caplog.text.count("will not survive a restart") == 1
    server.stop()


async def test_a_master_on_a_port_of_its_own_keeps_its_state_below_the_default_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    own = free_pair()
    for port in (own, 0):
        server = ClusterServer(port)
        server.options.server.host = "127.0.0.1"
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run_as_master)
            server.stop()
    assert [path.name for path in (tmp_path / "trio_cluster").iterdir()] == [f"master-{own}"]
