"""A process of auto mode takes the ports of a master that has gone: both or neither, and exactly one process does."""

from __future__ import annotations

from typing import NoReturn

import pytest
import trio

from trio_cluster import ClusterMode, ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.cluster.dialer import Dialer
from trio_cluster.cluster.promotion import Contender, Ports
from trio_cluster.net.sockets import close_all, open_pair
from trio_cluster.testing import SimulatedNetwork

PORT = 8080


async def contend(network: SimulatedNetwork, winners: list[Contender]) -> None:
    """Be a process whose master has gone, until this one or another one has taken its place."""
    host = network.host("machine")

    async def listen() -> Ports:
        return await open_pair(host, "0.0.0.0", PORT, "0.0.0.0", None)

    with trio.CancelScope() as serving:
        contender = Contender(Dialer(host, "127.0.0.1", PORT + 1000), listen, lambda: False, serving.cancel)
        await contender.connect()
    if contender.ports is not None:
        winners.append(contender)


@pytest.mark.parametrize("processes", [1, 2, 7])
async def test_exactly_one_process_takes_the_ports(
    processes: int, autojump_clock: trio.testing.MockClock
) -> None:
    network, winners = SimulatedNetwork(), list[Contender]()
    async with trio.open_nursery() as nursery:
        for _ in range(processes):
            nursery.start_soon(contend, network, winners)
    # The others are connected to it.
    assert len(winners) == 1
    assert sum(not connection.server_stream.closed for connection in network.connections) == processes - 1


@pytest.mark.parametrize("taken", [PORT, PORT + 1000])
async def test_a_port_that_something_else_has_is_named_and_nothing_is_kept(
    taken: int, autojump_clock: trio.testing.MockClock
) -> None:
    network = SimulatedNetwork()
    host = network.host("machine")
    thief = await host.listen("0.0.0.0", taken)

    class Refused(Dialer):
        async def connect(self) -> NoReturn:
            raise ConnectionRefusedError("nothing listens there")

    async def listen() -> Ports:
        return await open_pair(host, "0.0.0.0", PORT, "0.0.0.0", None)

    with trio.CancelScope() as serving:
        contender = Contender(Refused(host, "127.0.0.1", PORT + 1000), listen, lambda: False, serving.cancel)
        with pytest.raises(
            OSError, match=f"nothing listens there; its ports cannot be taken: port {taken}: "
        ):
            await contender.connect()
        other = PORT if taken != PORT else PORT + 1000
        close_all(await host.listen("0.0.0.0", other))
        close_all(thief)
        await contender.connect()
    assert serving.cancelled_caught
    assert contender.ports is not None


async def test_a_promoted_server_that_is_cancelled_leaves_no_listener(
    autojump_clock: trio.testing.MockClock,
) -> None:
    network = SimulatedNetwork()
    host = network.host("machine")
    first, second = (
        ClusterServer(ClusterServerOptions(server=ServerOptions(port=PORT, worker_id=name)), network=host)
        for name in ("first", "second")
    )
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as one:
            assert await one.start(first.run) is ClusterMode.MASTER
            assert await nursery.start(second.run) is ClusterMode.WORKER
            one.cancel_scope.cancel()
        with trio.fail_after(20):
            while second.mode is not ClusterMode.MASTER:  # noqa: ASYNC110  (there is no event for it)
                await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    close_all([*(await host.listen("0.0.0.0", PORT)), *(await host.listen("0.0.0.0", PORT + 1000))])


async def test_a_master_that_is_frozen_is_said_to_be_silent_however_often_it_is_dialled(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that was opened a moment ago is silent for a moment only, and no sign of life."""
    network = SimulatedNetwork()
    host = network.host("machine")
    first, second = (
        ClusterServer(
            ClusterServerOptions(
                server=ServerOptions(port=PORT, worker_id=name),
                heartbeat_interval=0.2,
                worker_timeout=2.0,
                resume_window=1.0,
            ),
            network=host,
        )
        for name in ("first", "second")
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(first.run)
        await nursery.start(second.run)
        network.freeze("machine")
        # Five seconds after each connection it is looked at.
        await trio.sleep(7.5)
        assert any("the master does not answer, and has its ports still" in each for each in caplog.messages)
        assert second.mode is ClusterMode.WORKER
        nursery.cancel_scope.cancel()
