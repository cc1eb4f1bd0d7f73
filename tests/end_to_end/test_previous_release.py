"""Masters and workers of this version and of the previous release, as they meet while a cluster is upgraded.

``nox -s versions`` runs these tests with the package that is built from the commit of that release.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import attrs
import httpx
import pytest
import trio
from nodes import Node, Nodes, free_pair
from previous_release import PreviousRelease, open_previous_release
from served import until
from test_processes import ask, models_become, open_stream, request, workers
from test_proxies import needs_nginx, open_two_masters
from test_rolling_restart import Load

from trio_cluster.testing import read_stream

pytestmark = pytest.mark.processes

takes_long = pytest.mark.skipif(
    "PREVIOUS_PYTHON" not in os.environ, reason="takes long; `nox -s versions` runs it"
)

#: Clients that ask for streams, and clients that do not.
STREAMING, PLAIN = 4, 4


@pytest.fixture(scope="session")
def previous(tmp_path_factory: pytest.TempPathFactory) -> PreviousRelease:
    """The previous release."""
    return open_previous_release(tmp_path_factory.mktemp("previous"))


@attrs.frozen
class Mixed:
    """Nodes, the masters of one version and the workers of the other one."""

    nodes: Nodes
    previous: PreviousRelease
    master_is_new: bool

    async def master(self, *arguments: str | int) -> Node:
        if self.master_is_new:
            return await self.nodes.start("master", *(arguments or (0,)))
        return await self.previous.master(self.nodes, *arguments)

    async def worker(self, master: Node, name: str, *arguments: str, models: str) -> Node:
        if self.master_is_new:
            return await self.previous.worker(self.nodes, master, name, *arguments, models=models)
        return await self.nodes.worker(master, name, *arguments, models=models)


@pytest.fixture(params=[True, False], ids=["old worker, new master", "new worker, old master"])
def mixed(request: pytest.FixtureRequest, nodes: Nodes, previous: PreviousRelease) -> Mixed:
    return Mixed(nodes, previous, request.param)


async def test_requests_are_answered_and_cancelled_and_a_worker_drains(
    mixed: Mixed, nursery: trio.Nursery
) -> None:
    master = await mixed.master()
    worker = await mixed.worker(master, "w", models="m")
    digest = f"digest-{worker.process.pid}"
    assert {"m", digest} <= {
        entry["id"] for entry in (await request(master, "GET", "/v1/models")).json()["data"]
    }

    plain = await ask(master, "m", ticks=3)
    assert (plain.status_code, plain.json()["choices"][0]["message"]["content"]) == (200, "0 1 2 ")
    streamed = await open_stream(nursery, master, "m", ticks=5)
    report = (await streamed.end(within=5)).report
    assert (report.ending, report.text) == ("finished", "0 1 2 3 4 ")
    # More than the credit of a call.
    audio = os.urandom(1 << 20)
    heard = await request(
        master, "POST", "/v1/audio/transcriptions", data={"model": digest}, files={"file": ("a.wav", audio)}
    )
    assert (heard.status_code, heard.json()["text"]) == (200, hashlib.sha256(audio).hexdigest())
    assert mixed.nodes.notes() == ["m finished"] * 2

    # A client leaves: its handler is cancelled, and the slot is free again.
    with trio.CancelScope() as leaving:
        async with trio.open_nursery() as asking:
            await open_stream(asking, master, "m", ticks=10_000)
            leaving.cancel()
    await until(lambda: mixed.nodes.notes()[2:] == ["m cancelled"], within=2)

    async def is_idle() -> bool:
        return bool((await workers(master))["w"]["in_flight"] == 0)

    await until(is_idle, within=2)

    # An operator drains the worker: what has begun is finished.
    stream = await open_stream(nursery, master, "m", ticks=20, pause=0.05)
    assert (await request(master, "POST", "/cluster/workers/w/drain")).status_code == 202
    assert (await stream.end(within=5)).report.ending == "finished"
    assert await worker.exit_code(within=5) == 0
    await models_become(master, set(), within=2)
    assert mixed.nodes.notes()[3:] == ["m finished"]
    for node in (master, worker):
        assert [entry for entry in node.entries if entry["level"] not in ("info", "debug")] == []


async def test_a_worker_that_is_killed_is_lost_at_once_and_a_new_master_is_found(
    mixed: Mixed, nursery: trio.Nursery
) -> None:
    port = free_pair()
    master = await mixed.master(port)
    kept = await mixed.worker(master, "kept", models="k")
    killed = await mixed.worker(master, "killed", models="m")
    doomed = await open_stream(nursery, master, "m", ticks=10_000)
    other = await open_stream(nursery, master, "k", ticks=40, pause=0.05)
    killed.send(signal.SIGKILL)
    # The previous release says so in the stream as well, and then ends the connection without its last chunk.
    lost = read_stream((await doomed.end(within=2)).body)
    assert lost.ending == "failed"
    assert lost.error is not None
    assert lost.error["code"] == "worker_lost"
    await models_become(master, {"k"}, within=2)
    assert (await other.end(within=5)).report.ending == "finished"

    # The master is killed: its work ends on the worker, which finds the next master.
    cut = await open_stream(nursery, master, "k", ticks=10_000)
    master.send(signal.SIGKILL)
    assert (await cut.end(within=2)).report.ending == "cut"
    await until(lambda: mixed.nodes.notes()[-1] == "k cancelled", within=2)
    await kept.log("lost the master")
    master = await mixed.master(port)
    await models_become(master, {"k"}, within=20)
    assert (await ask(master, "k")).status_code == 200


#: Kinds of models, and ways to serve them, that the previous release does not have.
NEWER = """\
from trio_cluster import ClusterServer

server = ClusterServer()


@server.chat("m")
async def m(request):
    yield "fine"


@server.route("/v1/own", "m")
async def own(request):
    return {"fine": True}


@server.rerank("ranking")
async def ranking(request):
    return [1.0 for _ in request.documents]


@server.embedding("vectors", hedge=True)
async def vectors(request):
    return [[1.0] for _ in request.inputs]
"""


async def test_an_old_master_refuses_what_it_does_not_know_and_serves_the_rest(
    nodes: Nodes, previous: PreviousRelease
) -> None:
    (nodes.directory / "newer.py").write_text(NEWER)
    master = await previous.master(nodes)
    worker = await nodes.start(
        "worker", "127.0.0.1", master.port, "--name", "w", "--app", "newer:server", ready=False
    )
    await worker.log("the master refused a model", level="warning", model="ranking")
    await worker.log("registered with the master")
    listed = (await request(master, "GET", "/v1/models")).json()["data"]
    assert {entry["id"] for entry in listed} == {"m", "vectors"}
    assert (await ask(master, "m")).json()["choices"][0]["message"]["content"] == "fine"
    vectors = await request(master, "POST", "/v1/embeddings", json={"model": "vectors", "input": "x"})
    assert vectors.json()["data"][0]["embedding"] == [1.0]


async def has_workers(master: Node, names: Sequence[str]) -> bool:
    try:
        linked = await workers(master)
    except httpx.TransportError:
        return False
    return sorted(name for name, each in linked.items() if "m" in each["models"]) == sorted(names)


@takes_long
async def test_a_master_alone_is_upgraded_with_nothing_worse_than_refusals(
    nodes: Nodes, previous: PreviousRelease
) -> None:
    """The previous release has no ``--take-over``: its successor opens the ports when they are free."""
    port = free_pair()
    master = await previous.master(nodes, port, "--on-conflict", "replicate")
    names = ["w1", "w2"]
    old = {name: await previous.worker(nodes, master, name, models="m") for name in names}
    load = Load(master.url)
    async with trio.open_nursery() as asking:
        for stream in [True] * STREAMING + [False] * PLAIN:
            asking.start_soon(load.ask, stream)
        await load.go_on(12)
        assert load.failures == []
        master.send(signal.SIGTERM)
        assert await master.exit_code(within=20) == 0
        # At its very end, the previous release answers 404 to clients that are still connected.
        stopping = len(load.failures)
        master = await nodes.start("master", port, "--on-conflict", "replicate")
        await until(partial(has_workers, master, names), within=20)
        starting = len(load.failures)
        await load.go_on(24)
        upgraded = len(load.failures)
        # Its old workers give back what they do not begin any more.
        for name in names:
            old[name].send(signal.SIGTERM)
            assert await old[name].exit_code(within=20) == 0
            await load.go_on(12)
            await nodes.worker(master, name, models="m")
            await until(partial(has_workers, master, names), within=20)
        load.over = True
    assert load.failures[upgraded:] == []
    # A connection that was kept open may be closed while the next request is on its way.
    begun = [each for each in load.failures if "without sending a response" not in each]
    assert [
        each for each in begun if each.startswith(("cut", "failed", "plain: Remote", "streams: Remote"))
    ] == []
    told = load.failures[stopping:starting]
    # The previous release has written no names of models down.
    known = ("503: ", "404: ")
    assert [each for each in told if "ConnectError" not in each and not each.startswith(known)] == []
    # Those that were on their way a moment before the worker was there are the last.
    assert upgraded - starting <= STREAMING + PLAIN


@needs_nginx
@takes_long
async def test_an_upgrade_of_everything_behind_two_masters_is_not_noticed_by_clients(
    nodes: Nodes, previous: PreviousRelease, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """As ``docs/upgrading.md`` says: the workers one by one, then the masters one by one."""
    masters = [await previous.master(nodes, free_pair(), "--on-conflict", "replicate") for _ in range(2)]
    # A worker of the previous release has one master.
    old = {
        name: await previous.worker(nodes, masters[i], name, models="m")
        for i, names in enumerate((("a1", "a2"), ("b1", "b2")))
        for name in names
    }
    addresses = ",".join(f"127.0.0.1:{master.port}" for master in masters)
    # At its very end, a master of the previous release answers 404.
    passed_on = ("error http_503", "error http_503 http_404")
    async with open_two_masters(tmp_path, (masters[0].port, masters[1].port), upgrade=passed_on) as url:
        load = Load(url)
        async with trio.open_nursery() as asking:
            for stream in [True] * STREAMING + [False] * PLAIN:
                asking.start_soon(load.ask, stream)
            await load.go_on(12)
            new: list[str] = []
            for name in ("a1", "a2", "b1", "b2"):
                old[name].send(signal.SIGTERM)
                assert await old[name].exit_code(within=20) == 0
                await load.go_on(12)
                if not name.endswith("1"):
                    continue
                # A worker of this version takes the place of two: it has both masters.
                new.append(f"n-{name}")
                await nodes.start("worker", addresses, "--name", new[-1], models="m")
                for i, master in enumerate(masters):
                    left = [n for n in old if n > name and n.startswith("ab"[i])]
                    await until(partial(has_workers, master, [*left, *new]), within=20)
            for i, master in enumerate(masters):
                master.send(signal.SIGTERM)
                assert await master.exit_code(within=20) == 0
                await load.go_on(12)
                masters[i] = await nodes.start("master", master.port, "--on-conflict", "replicate")
                await until(partial(has_workers, masters[i], new), within=20)
                await load.go_on(12)
            load.over = True
    record_property("requests", load.asked.total())
    assert load.failures == []
    assert nodes.notes() == ["m finished"] * load.asked.total()
