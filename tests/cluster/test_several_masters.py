"""Workers that have several masters: one link to each, one pool of slots."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from memory_cluster import chat_request
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster import ClusterServer, HandshakeRefused
from trio_cluster.cluster.dialer import Dialer
from trio_cluster.cluster.master import WorkerManager
from trio_cluster.cluster.masters import ResolvedMasters
from trio_cluster.net.sockets import Network
from trio_cluster.protocol import WorkerSession
from trio_cluster.testing import FakeModel, SimulatedCluster, open_cluster, worker

A, B = "master", "master-2"
PORT = 9080


@pytest.fixture
async def pair(cluster: SimulatedCluster) -> SimulatedCluster:
    """Return the simulated cluster, with a second master."""
    cluster.options.on_conflict = "replicate"
    await cluster.start_master(name=B)
    return cluster


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of calls that workers have told their masters."""
    told: list[int] = []
    report = WorkerSession.report_other_masters

    def record(self: WorkerSession, calls: int, masters: tuple[tuple[str, str], ...]) -> None:
        told.append(calls)
        report(self, calls, masters)

    monkeypatch.setattr(WorkerSession, "report_other_masters", record)
    return told


async def start(
    cluster: SimulatedCluster, name: str = "w1", model: Any = None, **options: Any
) -> ClusterServer:
    server = worker(name, **options)
    server.register_chat("m", model or FakeModel(tokens=5, interval=1))
    await cluster.start_worker(server)
    await wait_all_tasks_blocked()
    return server


def manager(cluster: SimulatedCluster, name: str) -> WorkerManager:
    found = cluster.masters[name].server.worker_manager
    assert found is not None
    return found


async def names(cluster: SimulatedCluster, master: str) -> list[str]:
    models = (await cluster.client(of=master).get("/v1/models")).json()
    return [each["id"] for each in models["data"]]


async def until(what: Callable[[], object], seconds: float = 60.0) -> None:
    with trio.fail_after(seconds):
        while not what():  # noqa: ASYNC110
            await trio.sleep(0.01)


# The law of several masters


async def test_every_master_has_all_models_and_clients_may_ask_any(pair: SimulatedCluster) -> None:
    server = await start(pair)
    server.register_chat("later", FakeModel())
    await wait_all_tasks_blocked()
    for master in (A, B):
        assert await names(pair, master) == ["later", "m"]
        assert (await pair.client(of=master).chat("m")).report().ending == "finished"
    server.unregister_model("later")
    await wait_all_tasks_blocked()
    assert [await names(pair, master) for master in (A, B)] == [["m"], ["m"]]


async def test_slots_are_counted_once_and_a_call_that_finds_none_waits_in_the_worker(
    pair: SimulatedCluster,
) -> None:
    model = FakeModel(tokens=3, interval=1)
    server = await start(pair, model=model, max_concurrency=1, queue_timeout=60)
    most = 0

    async def ask(master: str) -> None:
        assert (await pair.client(f"client of {master}", of=master).chat("m")).report().ending == "finished"

    async with trio.open_nursery() as nursery:
        for master in (A, B, A, B):
            nursery.start_soon(ask, master)
        await trio.sleep(0.5)
        while nursery.child_tasks:
            most = max(most, server.pool.running)
            await trio.sleep(0.1)
    assert most == 1
    # Nothing was refused, and nothing ran at the same time.
    assert trio.current_time() >= 4 * 2


async def test_what_another_master_does_is_known_within_half_a_second(pair: SimulatedCluster) -> None:
    await start(pair, "w1", max_concurrency=4)
    await start(pair, "w2", max_concurrency=4)
    first = manager(pair, B).workers["w1"]
    async with pair.client(of=A).open_chat("m") as response:
        await response.receive_until(b"t0")
        await trio.sleep(0.5)
        busy = next(w for w in manager(pair, A).workers.values() if w.in_flight)
        other = "w2" if busy.name == "w1" else "w1"
        seen = manager(pair, B).workers
        assert (seen[busy.name].elsewhere, seen[busy.name].load) == (1, 0.25)
        assert (seen[other].elsewhere, seen[other].load) == (0, 0.0)
        # So requests of this master go to the worker that has nothing to do.
        for _ in range(3):
            call = pair.masters[B].server.router.open(chat_request())
            assert call.served_by == other
            call.cancel("enough")
            await trio.sleep(1)
        await response.finish()
    await trio.sleep(0.5)
    assert [each.elsewhere for each in manager(pair, B).workers.values()] == [0, 0]
    assert first.other_masters == ((A, "master:9080"),)


async def test_nothing_is_reported_while_nothing_changes(
    pair: SimulatedCluster, reports: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    await start(pair)
    await trio.sleep(10)
    # Each master was told about the other one.
    assert reports == [0, 0]
    await trio.sleep(3600)
    assert reports == [0, 0]
    async with pair.client(of=A).open_chat("m") as response:
        await response.receive_until(b"t0")
        await trio.sleep(3)
        assert reports == [0, 0, 1]
        await response.finish()
    await trio.sleep(100)
    assert reports == [0, 0, 1, 0]


async def test_a_worker_with_one_master_reports_nothing(
    autojump_clock: MockClock, reports: list[int]
) -> None:
    async with open_cluster() as cluster:
        await start(cluster)
        assert (await cluster.client().chat("m")).report().ending == "finished"
        await trio.sleep(100)
    assert reports == []


async def test_the_loss_of_a_master_cancels_its_own_calls_and_no_others(pair: SimulatedCluster) -> None:
    model = FakeModel(tokens=20, interval=1)
    server = await start(pair, model=model)
    async with (
        pair.client("lost", of=A).open_chat("m") as lost,
        pair.client("kept", of=B).open_chat("m") as kept,
    ):
        await lost.receive_until(b"t2")
        await kept.receive_until(b"t2")
        pair.masters[A].kill()
        await trio.sleep(0.1)
        assert server.pool.running == 1
        assert (await kept.finish()).report().ending == "finished"
    await pair.masters[A].over.wait()
    assert server.worker_client is not None
    assert server.worker_client.connected
    await pair.start_master(name=A)
    await trio.sleep(5)
    assert await names(pair, A) == ["m"]
    assert (await pair.client(of=A).chat("m")).report().ending == "finished"


async def test_a_handler_of_a_lost_master_counts_until_it_has_stopped(pair: SimulatedCluster) -> None:
    model = FakeModel(tokens=20, interval=1, ignore_cancellation_for=10)
    await start(pair, model=model)
    async with pair.client(of=A).open_chat("m") as response:
        await response.receive_until(b"t2")
        pair.masters[A].kill()
        await trio.sleep(1)
        assert manager(pair, B).workers["w1"].elsewhere == 1
        await trio.sleep(10)
        assert manager(pair, B).workers["w1"].elsewhere == 0
        assert manager(pair, B).workers["w1"].other_masters == ()
    await pair.masters[A].over.wait()
    await pair.start_master(name=A)
    await trio.sleep(5)


async def test_a_worker_is_ready_with_one_of_its_masters(pair: SimulatedCluster) -> None:
    pair.masters[A].kill()
    await pair.masters[A].over.wait()
    server = await start(pair)
    assert server.worker_client is not None
    assert server.worker_client.connected
    assert await names(pair, B) == ["m"]
    await trio.sleep(100)
    await pair.start_master(name=A)
    await trio.sleep(5)
    assert await names(pair, A) == ["m"]


async def test_a_link_that_is_cut_is_resumed_for_each_master_alone(pair: SimulatedCluster) -> None:
    model = FakeModel(tokens=10, interval=1)
    await start(pair, model=model)
    async with (
        pair.client("a", of=A).open_chat("m") as one,
        pair.client("b", of=B).open_chat("m") as two,
    ):
        await one.receive_until(b"t2")
        links = [pair.workers["w1"].link_to(master) for master in (A, B)]
        links[0].reset()
        assert (await one.finish()).report().ending == "finished"
        assert (await two.finish()).report().ending == "finished"
    assert pair.workers["w1"].link_to(A) is not links[0]
    assert pair.workers["w1"].link_to(B) is links[1]
    assert manager(pair, A).workers["w1"].state == "ok"


# Stopping


async def test_a_worker_that_stops_drains_at_all_masters(pair: SimulatedCluster) -> None:
    server = await start(pair)
    async with (
        pair.client("a", of=A).open_chat("m") as one,
        pair.client("b", of=B).open_chat("m") as two,
    ):
        await one.receive_until(b"t1")
        await two.receive_until(b"t1")
        server.stop()
        await wait_all_tasks_blocked()
        assert [manager(pair, master).workers["w1"].state for master in (A, B)] == ["draining"] * 2
        for response in (one, two):
            assert (await response.finish()).report().ending == "finished"
    await pair.workers["w1"].over.wait()
    assert pair.workers["w1"].error is None
    assert trio.current_time() < 7


async def test_a_worker_that_stops_does_not_wait_for_a_master_that_is_away(pair: SimulatedCluster) -> None:
    server = await start(pair)
    pair.masters[A].kill()
    await trio.sleep(20)
    began = trio.current_time()
    server.stop()
    await pair.workers["w1"].over.wait()
    assert trio.current_time() == began
    await pair.start_master(name=A)


async def test_one_master_may_ask_a_worker_to_stop(pair: SimulatedCluster) -> None:
    await start(pair)
    async with pair.client(of=B).open_chat("m") as response:
        await response.receive_until(b"t1")
        assert (await pair.client("operator", of=A).post("/cluster/workers/w1/drain", {})).status == 202
        assert (await response.finish()).report().ending == "finished"
    await pair.workers["w1"].over.wait()
    assert manager(pair, A).workers == manager(pair, B).workers == {}


# Refusals


async def test_a_master_that_refuses_is_reported_and_the_others_are_served(
    pair: SimulatedCluster, caplog: pytest.LogCaptureFixture
) -> None:
    pair.masters[B].server.options.cluster_token = "secret"
    server = await start(pair)
    (record,) = (each for each in caplog.records if each.levelno == logging.ERROR)
    assert "a master refused this worker" in record.getMessage()
    assert "wrong or missing cluster token" in record.getMessage()
    assert await names(pair, A) == ["m"]
    await trio.sleep(300)
    assert server.worker_client is not None
    assert server.worker_client.connected
    pair.masters[B].server.options.cluster_token = None
    await trio.sleep(61)
    assert await names(pair, B) == ["m"]


async def test_a_worker_that_all_masters_refuse_ends(pair: SimulatedCluster) -> None:
    for node in pair.masters.values():
        node.server.options.cluster_token = "secret"
    with pytest.raises(HandshakeRefused, match="wrong or missing cluster token"):
        await start(pair)


async def test_a_worker_that_one_master_refuses_goes_on_while_the_other_is_away(
    pair: SimulatedCluster,
) -> None:
    pair.masters[A].kill()
    await pair.masters[A].over.wait()
    pair.masters[B].server.options.cluster_token = "secret"
    server = worker("w1")
    server.register_chat("m", FakeModel())
    await pair.start_worker(server, wait=False)
    await trio.sleep(30)
    assert not pair.workers["w1"].over.is_set()
    await pair.start_master(name=A)
    await trio.sleep(5)
    assert await names(pair, A) == ["m"]


async def test_models_that_a_master_refuses_are_listed_with_its_address(pair: SimulatedCluster) -> None:
    pair.masters[B].server.options.on_conflict = "reject"
    await start(pair, "w1")
    server = await start(pair, "w2")
    client = server.worker_client
    assert client is not None
    await until(lambda: client.rejected_models)
    assert list(client.rejected_models) == ["m"]
    assert client.rejected_models["m"].startswith("master-2:9080: ")


# Status


async def test_status_lists_the_other_masters_and_a_worker_its_own(pair: SimulatedCluster) -> None:
    first = await start(pair, "w1")
    await start(pair, "w2")
    await trio.sleep(1)
    status = (await pair.client(of=B).get("/cluster/status")).json()
    assert status["masters"] == [{"id": A, "address": "master:9080", "workers": ["w1", "w2"]}]
    assert [each["in_flight_elsewhere"] for each in status["workers"]] == [0, 0]
    pair.masters[B].kill()
    await trio.sleep(1)
    assert (await pair.client(of=A).get("/cluster/status")).json()["masters"] == []
    assert first.worker_client is not None
    one, two = first.worker_client.status()
    assert (one.id, one.address, one.connected, one.why) == (A, "master:9080", True, "")
    assert (two.id, two.address, two.connected, two.why) == ("", "master-2:9080", False, "Connection refused")
    await pair.masters[B].over.wait()
    await pair.start_master(name=B)


# Several addresses of one master


class WithAliases:
    """A network on which machines have further names."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.away: set[str] = set()

    async def listen(self, host: str, port: int) -> Any:
        return await self._network.listen(host, port)

    async def connect(self, host: str, port: int) -> Any:
        await trio.lowlevel.checkpoint()
        if host in self.away:
            raise OSError(113, "No route to host")
        return await self._network.connect(host.removesuffix("-alias"), port)


@pytest.mark.parametrize("gap", [0.0, 0.5])
async def test_two_addresses_of_one_master_make_one_link_and_one_is_spare(
    autojump_clock: MockClock, gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[WithAliases] = []

    def above(network: Network) -> WithAliases:
        networks.append(WithAliases(network))
        return networks[-1]

    async with open_cluster(above=above) as cluster:
        server = worker("w1")
        server.register_chat("m", FakeModel(tokens=10, interval=1))
        server.network = network = above(cluster.network.host("w1"))
        if gap:
            network.away.add("master-alias")
        masters = [("master", PORT), ("master-alias", PORT)]
        async with trio.open_nursery() as nursery:

            async def run(task_status: trio.TaskStatus[Any]) -> None:
                await server.run_as_worker(masters=masters, task_status=task_status)

            await nursery.start(run)
            await trio.sleep(gap)
            network.away.clear()
            await trio.sleep(10)
            client, workers = server.worker_client, manager(cluster, A).workers
            assert client is not None
            joined = workers["w1"].connected_at
            # One of the addresses has the link, whichever was first.
            assert sorted(each.connected for each in client.status()) == [False, True]
            assert "another address leads to the same master" in {each.why for each in client.status()}
            # The other one leaves it alone, with what it carries.
            async with cluster.client().open_chat("m") as response:
                assert (await response.finish()).report().ending == "finished"
            await trio.sleep(600)
            assert workers["w1"].connected_at == joined
            # The address that has the link is gone: the other one is used.
            holder = next(each for each in client.status() if each.connected)
            network.away.add(holder.address.removesuffix(":9080"))
            cluster.network.connections_of("w1")[-1 if len(client.sessions) == 1 else 0].cut()
            next(c for c in cluster.network.connections_of("w1") if c.open_ends == 2).cut()
            await trio.sleep(10)
            assert client.connected
            assert [each.connected for each in client.status() if each.address != holder.address] == [True]
            nursery.cancel_scope.cancel()


# A name that is resolved again and again


class Names:
    """A DNS server.

    Attributes:
        addresses: what the name resolves to; ``None``: its resolution fails.
        partly: each answer has one of them.
    """

    def __init__(self) -> None:
        self.addresses: list[str] | None = []
        self.partly = False

    async def resolve(self, name: str) -> list[str]:
        assert name == "masters.example"
        await trio.lowlevel.checkpoint()
        if not self.addresses:
            raise OSError("no address")
        if self.partly:
            # As some servers do.
            self.addresses.append(self.addresses.pop(0))
            return self.addresses[:1]
        return self.addresses

    async def getaddrinfo(self, host: bytes, port: Any, *args: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, 0)) for address in await self.resolve(host.decode())]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


@pytest.fixture
def dns() -> Names:
    return Names()


async def follow(dns: Names, play: Callable[[list[list[str]]], Awaitable[None]]) -> None:
    """Play something while the name is followed. It gets the list of what has been found so far."""
    found: list[list[str]] = []
    masters = ResolvedMasters(
        "masters.example", lambda address: Dialer(None, address, PORT), addresses_of=dns.resolve  # type: ignore[arg-type]
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        nursery.start_soon(masters.run, lambda dialers: found.append([each.host for each in dialers]))
        await play(found)
        nursery.cancel_scope.cancel()


async def test_a_name_is_followed_as_it_changes(
    dns: Names, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(found: list[list[str]]) -> None:
        await trio.sleep(11)
        assert found == []
        assert caplog.text.count("cannot be resolved: no address") == 1
        dns.addresses = ["10.0.0.1", "10.0.0.2"]
        await trio.sleep(5)
        assert found.pop() == ["10.0.0.1", "10.0.0.2"]
        dns.addresses = ["10.0.0.2", "10.0.0.1", "10.0.0.3"]
        await trio.sleep(5)
        assert found.pop() == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
        # A failing resolution keeps what is known.
        dns.addresses = None
        await trio.sleep(600)
        assert found == []
        dns.addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
        dns.partly = True
        await trio.sleep(100)
        assert found == []
        dns.partly = False
        await trio.sleep(5)
        dns.addresses = ["10.0.0.3"]
        await trio.sleep(9)
        assert found == []
        await trio.sleep(7)
        assert found == [["10.0.0.3"]]

    await follow(dns, play)


async def test_a_worker_follows_a_name_and_drains_the_link_to_an_address_that_is_gone(
    dns: Names, autojump_clock: MockClock
) -> None:
    trio.socket.set_custom_hostname_resolver(dns)  # type: ignore[arg-type]
    async with open_cluster() as cluster:
        for name in ("10.0.0.1", "10.0.0.2"):
            await cluster.start_master(name=name)
        server = worker("w1")
        server.register_chat("m", FakeModel(tokens=60, interval=1))
        server.network = cluster.network_of("w1")
        dns.addresses = ["10.0.0.1"]
        async with trio.open_nursery() as nursery:

            async def run(task_status: trio.TaskStatus[Any]) -> None:
                await server.run_as_worker(masters_from=("masters.example", PORT), task_status=task_status)

            await nursery.start(run)
            dns.addresses = ["10.0.0.1", "10.0.0.2"]
            await trio.sleep(6)
            assert await names(cluster, "10.0.0.2") == ["m"]
            async with cluster.client(of="10.0.0.1").open_chat("m") as response:
                await response.receive_until(b"t2")
                dns.addresses = ["10.0.0.2"]
                await trio.sleep(20)
                old = manager(cluster, "10.0.0.1").workers["w1"]
                assert (old.state, old.in_flight) == ("draining", 1)
                # It is there again before the call has ended: the link ends nevertheless, and there is a new one.
                dns.addresses = ["10.0.0.1", "10.0.0.2"]
                await trio.sleep(6)
                assert (await response.finish()).report().ending == "finished"
            await trio.sleep(5)
            new = manager(cluster, "10.0.0.1").workers["w1"]
            assert new is not old
            assert new.state == "ok"
            dns.addresses = ["10.0.0.2"]
            await trio.sleep(20)
            assert manager(cluster, "10.0.0.1").workers == {}
            assert list(manager(cluster, "10.0.0.2").workers) == ["w1"]
            client = server.worker_client
            assert client is not None
            assert [each.address for each in client.status()] == ["10.0.0.2:9080"]
            nursery.cancel_scope.cancel()


# How masters are given


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), {}),
        (("a",), {}),
        (("a", 1), {"masters": [("b", 1)]}),
        (("a", 1), {"masters_from": ("b", 1)}),
        ((), {"masters": [("b", 1)], "masters_from": ("b", 1)}),
    ],
)
async def test_masters_are_given_in_one_way(arguments: Any, named: Any) -> None:
    with pytest.raises(TypeError, match="give master_host and master_port, or masters, or masters_from"):
        await ClusterServer().run_as_worker(*arguments, **named)


async def test_at_least_one_master_is_needed() -> None:
    with pytest.raises(ValueError, match="at least one"):
        await ClusterServer().run_as_worker(masters=[])
