"""The simulated network: compared with real sockets where that is possible, and with its documentation elsewhere."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster import ClusterPortError
from trio_cluster.net.sockets import port_of
from trio_cluster.testing import Connection, SimulatedNetwork, SimulatedStream


async def simulated_pair(network: SimulatedNetwork) -> tuple[SimulatedStream, Any, Connection]:
    (listener,) = await network.host("server").listen("0.0.0.0", 80)
    near = await network.host("client").connect("server", 80)
    far = await listener.accept()
    listener.close()
    return near, far, network.connections[-1]


@pytest.fixture(params=["sockets", "simulated"])
async def pair(request: pytest.FixtureRequest) -> Any:
    """Two ends of one connection, of each kind."""
    if request.param == "simulated":
        near, far, _ = await simulated_pair(SimulatedNetwork())
    else:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        near = await trio.open_tcp_stream(*listener.socket.getsockname())
        far = await listener.accept()
        await listener.aclose()
    async with near, far:
        yield near, far


def reset(stream: Any) -> None:
    if isinstance(stream, SimulatedStream):
        stream.close(reset=True)
        return
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


# What real sockets do too


async def test_bytes_arrive_in_order_and_in_pieces_of_the_requested_size(pair: Any) -> None:
    near, far = pair
    await near.send_all(b"one ")
    await near.send_all(bytearray(b"two"))
    received = b""
    while len(received) < 7:
        piece = await far.receive_some(2)
        assert 1 <= len(piece) <= 2
        received += piece
    assert received == b"one two"


async def test_an_end_of_file_comes_behind_the_bytes_and_repeats(pair: Any) -> None:
    near, far = pair
    await near.send_all(b"last bytes")
    await near.aclose()
    assert await far.receive_some(100) == b"last bytes"
    assert [await far.receive_some() for _ in range(3)] == [b"", b"", b""]


async def test_a_connection_that_is_closed_in_one_direction_works_in_the_other(pair: Any) -> None:
    near, far = pair
    await near.send_eof()
    assert await far.receive_some() == b""
    await far.send_all(b"answer")
    assert await near.receive_some() == b"answer"
    for more in (b"more", b""):
        with pytest.raises(trio.ClosedResourceError):
            await near.send_all(more)


async def test_sending_to_an_end_that_was_closed_succeeds_once_and_then_fails(pair: Any) -> None:
    near, far = pair
    await far.aclose()
    assert await near.receive_some() == b""
    await near.send_all(b"not known yet")
    await trio.sleep(0.01)
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(b"now it is known")
    assert await near.receive_some() == b""


async def test_a_reset_fails_both_directions_but_what_had_arrived_can_be_read(pair: Any) -> None:
    near, far = pair
    await near.send_all(b"arrived")
    await trio.sleep(0.01)
    reset(near)
    await trio.sleep(0.01)
    assert await far.receive_some() == b"arrived"
    with pytest.raises(trio.BrokenResourceError):
        await far.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await far.send_all(b"x")


async def test_closing_with_bytes_unread_is_a_reset(pair: Any) -> None:
    near, far = pair
    await far.send_all(b"never read")
    await trio.sleep(0.01)
    await near.aclose()
    await trio.sleep(0.01)
    with pytest.raises(trio.BrokenResourceError):
        await far.receive_some()


async def test_a_writer_is_blocked_until_its_peer_reads(pair: Any) -> None:
    near, far = pair
    sent = trio.Event()

    async def send() -> None:
        await near.send_all(bytes(20_000_000))
        sent.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        with trio.move_on_after(0.05):
            await sent.wait()
        assert not sent.is_set()
        left = 20_000_000
        while left:
            left -= len(await far.receive_some(1 << 20))
        with trio.fail_after(5):
            await sent.wait()


async def test_a_blocked_writer_is_woken_by_a_reset(pair: Any) -> None:
    near, far = pair

    async def leave() -> None:
        await trio.sleep(0.05)
        reset(far)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await near.send_all(bytes(20_000_000))


async def test_a_blocked_writer_is_woken_when_its_peer_closes(pair: Any) -> None:
    near, far = pair

    async def leave() -> None:
        await trio.sleep(0.05)
        await far.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await near.send_all(bytes(20_000_000))


async def test_closing_an_end_wakes_the_reader_of_this_end(pair: Any) -> None:
    near, _ = pair
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await near.receive_some()

        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        await near.aclose()


async def test_a_closed_end_refuses_everything_but_to_be_closed_again(pair: Any) -> None:
    near, _ = pair
    await near.aclose()
    await near.aclose()
    for use in (near.receive_some, near.send_eof, lambda: near.send_all(b"x"), lambda: near.send_all(b"")):
        with pytest.raises(trio.ClosedResourceError):
            await use()


async def test_two_tasks_cannot_use_one_direction_at_once(pair: Any) -> None:
    near, _ = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.receive_some)
        nursery.start_soon(near.send_all, bytes(20_000_000))
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await near.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await near.send_all(b"x")
        nursery.cancel_scope.cancel()


async def test_a_cancelled_receive_loses_nothing(pair: Any) -> None:
    near, far = pair
    with trio.move_on_after(0.01):
        await far.receive_some()
    await near.send_all(b"x")
    assert await far.receive_some() == b"x"


async def test_receiving_less_than_a_byte_is_an_error(pair: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        await pair[0].receive_some(0)


# Faults of a connection


async def test_everything_is_delayed_by_the_latency(autojump_clock: MockClock) -> None:
    near, far, connection = await simulated_pair(SimulatedNetwork(latency=2.0))
    assert trio.current_time() == 4.0
    await near.send_all(b"x")
    assert trio.current_time() == 4.0
    assert await far.receive_some() == b"x"
    assert trio.current_time() == 6.0
    connection.delay(10.0)
    await far.send_all(b"y")
    await far.aclose()
    assert await near.receive_some() == b"y"
    assert trio.current_time() == 16.0
    assert await near.receive_some() == b""


async def test_sending_to_a_closed_end_fails_a_round_trip_later(
    autojump_clock: MockClock,
) -> None:
    near, far, _ = await simulated_pair(SimulatedNetwork(latency=1.0))
    await far.aclose()
    await near.send_all(b"x")
    assert trio.current_time() == 2.0
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(b"x")
    assert trio.current_time() == 4.0


@pytest.mark.parametrize(
    ("closed_after", "ending"),
    [(0.0, "FIN"), (0.5, "FIN"), (1.0, "RST"), (1.5, "RST")],
    ids=["just sent", "under way", "just arrived", "unread"],
)
async def test_closing_is_a_reset_only_if_bytes_have_arrived_and_were_not_read(
    closed_after: float, ending: str, autojump_clock: MockClock
) -> None:
    near, far, _ = await simulated_pair(SimulatedNetwork(latency=1.0))
    await far.send_all(b"x")
    await trio.sleep(closed_after)
    await near.aclose()
    began = trio.current_time()
    if ending == "FIN":
        assert [await far.receive_some(), await far.receive_some()] == [b"", b""]
    else:
        with pytest.raises(trio.BrokenResourceError):
            await far.receive_some()
    assert trio.current_time() - began == 1.0


async def test_a_reset_overtakes_and_destroys_what_is_under_way(autojump_clock: MockClock) -> None:
    near, far, connection = await simulated_pair(SimulatedNetwork(latency=1.0))
    await near.send_all(b"arrives")
    await trio.sleep(1)
    await near.send_all(b"does not")
    connection.reset()
    assert await far.receive_some() == b"arrives"
    with pytest.raises(trio.BrokenResourceError):
        await far.receive_some()


async def test_a_cut_is_an_end_of_file_at_both_ends() -> None:
    near, far, connection = await simulated_pair(SimulatedNetwork())
    await near.send_all(b"x")
    connection.cut()
    assert (await far.receive_some(), await far.receive_some(), await near.receive_some()) == (b"x", b"", b"")
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(b"x")


async def test_in_a_partition_nothing_arrives_until_it_heals(
    autojump_clock: MockClock,
) -> None:
    near, far, connection = await simulated_pair(SimulatedNetwork())
    connection.partition()
    connection.partition()
    await near.send_all(b"x")
    await near.aclose()
    with trio.move_on_after(1000) as waited:
        await far.receive_some()
    assert waited.cancelled_caught
    assert connection.held
    connection.heal()
    assert (await far.receive_some(), await far.receive_some()) == (b"x", b"")


async def test_a_reset_in_a_partition_destroys_what_never_arrived(autojump_clock: MockClock) -> None:
    near, far, connection = await simulated_pair(SimulatedNetwork())
    connection.partition()
    await near.send_all(b"x")
    near.close(reset=True)
    connection.heal()
    with pytest.raises(trio.BrokenResourceError):
        await far.receive_some()


async def test_bytes_for_an_end_that_was_closed_meanwhile_are_dropped_and_refused(
    autojump_clock: MockClock,
) -> None:
    near, far, connection = await simulated_pair(SimulatedNetwork())
    connection.partition()
    await near.send_all(b"x")
    await far.aclose()
    connection.heal()
    assert connection.waiting_bytes == 0
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(b"x")


async def test_a_connection_knows_how_many_of_its_ends_are_open() -> None:
    near, far, connection = await simulated_pair(SimulatedNetwork())
    await near.send_all(b"four")
    assert (connection.open_ends, connection.waiting_bytes) == (2, 4)
    await far.aclose()
    assert (connection.open_ends, connection.waiting_bytes) == (1, 0)
    await near.aclose()
    assert connection.open_ends == 0


# Machines


async def test_a_frozen_machine_takes_bytes_and_is_silent_until_it_thaws(autojump_clock: MockClock) -> None:
    network = SimulatedNetwork()
    near, far, _ = await simulated_pair(network)
    network.freeze("server")
    network.freeze("server")
    await near.send_all(b"question")
    await far.send_all(b"answer")
    for stream in (near, far):
        with trio.move_on_after(1000) as waited:
            await stream.receive_some()
        assert waited.cancelled_caught
    network.thaw("server")
    assert (await far.receive_some(), await near.receive_some()) == (b"question", b"answer")


async def test_a_frozen_machine_accepts_connections(autojump_clock: MockClock) -> None:
    network = SimulatedNetwork()
    (listener,) = await network.host("server").listen("", 80)
    network.freeze("server")
    near = await network.host("client").connect("server", 80)
    await near.send_all(b"x")
    with trio.move_on_after(1000) as waited:
        await near.receive_some()
    assert waited.cancelled_caught
    await listener.aclose()


async def test_a_connection_across_a_partition_waits_until_it_heals(autojump_clock: MockClock) -> None:
    network = SimulatedNetwork()
    (listener,) = await network.host("server").listen("", 80)
    network.partition("client", "server")
    with trio.move_on_after(1000) as waited:
        await network.host("client").connect("server", 80)
    assert waited.cancelled_caught
    await network.host("other").connect("server", 80)

    async def heal() -> None:
        await trio.sleep(7)
        network.heal("server", "client")

    before = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heal)
        await network.host("client").connect("server", 80)
    assert trio.current_time() - before == 7
    await listener.aclose()


async def test_unplugging_a_machine_closes_its_connections_and_ports() -> None:
    network = SimulatedNetwork()
    near, far, _ = await simulated_pair(network)
    await network.host("server").listen("", 81)
    network.unplug("server")
    assert await near.receive_some() == b""
    with pytest.raises(trio.ClosedResourceError):
        await far.receive_some()
    with pytest.raises(ConnectionRefusedError):
        await network.host("client").connect("server", 81)


async def test_a_port_can_be_bound_once_and_again_after_it_was_closed() -> None:
    host = SimulatedNetwork().host("server")
    (listener,) = await host.listen("", 80)
    with pytest.raises(ClusterPortError) as caught:
        await host.listen("", 80)
    assert (caught.value.port, caught.value.taken) == (80, True)
    await listener.aclose()
    (again,) = await host.listen("", 80)
    await listener.aclose()
    with pytest.raises(ClusterPortError):
        await host.listen("", 80)
    await again.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await again.accept()


async def test_connections_that_were_not_accepted_are_reset_with_their_listener() -> None:
    network = SimulatedNetwork()
    (listener,) = await network.host("server").listen("", 80)
    near = await network.host("client").connect("server", 80)
    await listener.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await near.receive_some()
    assert network.connections[0].server_stream.closed


async def test_a_machine_reaches_itself_under_the_names_of_loopback() -> None:
    host = SimulatedNetwork().host("server")
    (listener,) = await host.listen("127.0.0.1", 0)
    port = port_of([listener])
    for name in ("localhost", "127.0.0.1", "::1", "server"):
        near = await host.connect(name, port)
        assert near.peer_address == ("server", port)
    await listener.aclose()
