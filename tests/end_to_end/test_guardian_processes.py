"""A worker's process dies, and leaves a reset behind: its guardian tells the master, and is gone itself."""

from __future__ import annotations

import os
import signal

import httpx
import pytest
import trio
from nodes import Node, Nodes, Stream, free_pair, guardians_of
from served import until
from test_lifetimes_processes import calls_are, wire_to
from test_processes import ask, models_become, open_stream, workers

pytestmark = pytest.mark.processes


async def kill_with_unread_bytes(nursery: trio.Nursery, master: Node, worker: Node) -> None:
    """Kill a worker that has not read everything, so that its connections are reset."""
    worker.send(signal.SIGSTOP)

    async def ask_in_vain() -> None:
        assert (await ask(master, "m")).status_code == 502

    before = (await workers(master))["w"]["in_flight"]
    nursery.start_soon(ask_in_vain)

    async def is_forwarded() -> bool:
        return bool((await workers(master))["w"]["in_flight"] > before)

    await until(is_forwarded, within=5)
    worker.send(signal.SIGKILL)
    await worker.exit_code()


async def fails_soon(stream: Stream) -> None:
    failed = await stream.end(within=5)
    assert failed.report.ending == "failed"
    assert failed.report.error is not None
    assert failed.report.error["code"] == "worker_lost"


async def is_alone(worker: Node) -> None:
    """Wait until the guardian of a worker that has ended is gone."""
    await until(lambda: not guardians_of(worker), within=5)


async def has_guardian(worker: Node) -> None:
    await until(lambda: len(guardians_of(worker)) == 1, within=5)


async def test_a_killed_worker_that_leaves_a_reset_is_lost_at_once(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    master = await nodes.master()
    worker = await nodes.worker(master, "w", models="m")
    await has_guardian(worker)
    stream = await open_stream(nursery, master, "m", ticks=10000)
    await kill_with_unread_bytes(nursery, master, worker)
    await fails_soon(stream)
    await master.log("worker left")
    await models_become(master, set(), within=2)
    await calls_are(master, in_flight=0)
    await is_alone(worker)
    assert not master.logged("connection refused")


async def test_without_a_guardian_the_next_process_of_the_same_name_ends_the_wait(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    master = await nodes.master("--resume-window", "600")
    worker = await nodes.worker(master, "w", "--no-guardian", "--resume-window", "600", models="m")
    assert guardians_of(worker) == []
    stream = await open_stream(nursery, master, "m", ticks=10000)
    await kill_with_unread_bytes(nursery, master, worker)
    await master.log("link cut")
    assert stream.is_running
    assert (await workers(master))["w"]["state"] == "suspended"
    await nodes.worker(master, "w", "--no-guardian", models="m")
    await fails_soon(stream)
    assert (await ask(master, "m")).status_code == 200


async def test_a_worker_that_is_stopped_takes_its_guardian_along(nodes: Nodes, nursery: trio.Nursery) -> None:
    master = await nodes.master()
    worker = await nodes.worker(master, "w", models="m")
    await has_guardian(worker)
    stream = await open_stream(nursery, master, "m", ticks=40, pause=0.05)
    # As Ctrl-C in a terminal. It is not for the guardian, which is needed as long as the worker drains.
    os.killpg(worker.process.pid, signal.SIGINT)
    await worker.log("stopping")
    assert len(guardians_of(worker)) == 1
    ended = await stream.end(within=10)
    assert ended.report.ending == "finished"
    assert await worker.exit_code() == 0
    assert guardians_of(worker) == []
    left = await master.log("worker left")
    assert "guardian" not in left["message"]
    assert not master.logged("connection refused")


async def test_a_killed_master_that_leaves_a_reset_is_not_waited_for(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    port = free_pair()
    master = await nodes.start("master", port)
    worker = await nodes.worker(master, "w", models="m")
    await open_stream(nursery, master, "m", ticks=10000)
    # Meanwhile the worker goes on to write.
    master.send(signal.SIGSTOP)
    await trio.sleep(0.2)
    master.send(signal.SIGKILL)
    await worker.log("the link was cut")
    await until(lambda: nodes.notes() == ["m cancelled"], within=3)
    await nodes.start("master", port)
    await models_become(master, {"m"}, within=10)


async def test_a_worker_of_a_cluster_with_tls_shows_its_certificate_by_its_guardian(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    port = free_pair()
    tls = ("--tls", "auto", "--state-dir", str(nodes.directory / "state"))
    master = await nodes.start("run", port, *tls)
    worker = await nodes.start("run", port, *tls, models="m", ready=False)
    await worker.log("registered with the master")
    await has_guardian(worker)
    master.tls = True
    stream = await open_stream(nursery, master, "m", ticks=10000)
    worker.send(signal.SIGSTOP)
    body = {"model": "m", "messages": [{"role": "user", "content": "unread"}]}
    async with httpx.AsyncClient(verify=False, trust_env=False) as client:
        with trio.move_on_after(1):
            await client.post(f"{master.url}/v1/chat/completions", json=body)
    worker.send(signal.SIGKILL)
    await fails_soon(stream)
    await is_alone(worker)


async def test_a_proxy_that_adds_no_headers_is_known_by_an_option(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    master = await nodes.master()
    async with wire_to(master) as wire:
        port = ("--internal-port", str(wire.port))
        worker = await nodes.worker(master, "w", "--through-proxy", *port, models="m")
        await has_guardian(worker)
        stream = await open_stream(nursery, master, "m", ticks=10000)
        # The proxy is restarted.
        wire.end()
        await master.log("link cut")
        await master.log("link resumed")
        assert stream.is_running
        # The worker dies. That is an end of its connection, too, and its guardian has to go through the proxy.
        worker.send(signal.SIGKILL)
        await fails_soon(stream)
        await master.log("worker left: its process has ended, as its guardian says")
        await is_alone(worker)
