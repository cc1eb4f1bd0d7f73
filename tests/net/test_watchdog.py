"""While its event loop is blocked a process goes on giving signs of life, and never tears what the loop writes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import patience
import pytest
import trio
import trio.lowlevel
import wsproto
from certificates import client_side, server_side
from memory_streams import MemoryStream, memory_pair
from trio.testing import wait_all_tasks_blocked
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Request

from trio_cluster.link.link import Link, LinkClosed
from trio_cluster.link.websocket import accept, dial
from trio_cluster.net.streams import TcpStream
from trio_cluster.net.tls import TlsStream
from trio_cluster.net.watchdog import (
    NotInjectable,
    blocking_frame,
    heartbeats_while_blocked,
    injectable,
    take_max_lag,
)
from trio_cluster.protocol import Handshake, Heartbeat, MasterSession, WorkerSession, decode
from trio_cluster.security.authority import MASTER_NAME

EVERY = 0.05


class Pair:
    """An injectable stream, and the plain socket at its other end."""

    def __init__(self) -> None:
        ours, self.far = socket.socketpair()
        # As small as the system allows, so that it is soon full.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        self.plain = TcpStream(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        self.stream = injectable(self.plain)
        self._received = b""

    def received(self) -> bytes:
        """Return what has arrived so far."""
        with contextlib.suppress(BlockingIOError):
            while piece := self.far.recv(1 << 16, socket.MSG_DONTWAIT):
                self._received += piece
        return self._received

    def read_in_thread(self) -> Callable[[], bytes]:
        """Read all that comes until the stream is closed, whatever the event loop does; return what waits for it."""
        pieces: list[bytes] = []

        def read() -> None:
            while piece := self.far.recv(1 << 16):
                pieces.append(piece)

        thread = threading.Thread(target=read)
        thread.start()

        def result() -> bytes:
            thread.join(5)
            assert not thread.is_alive()
            return b"".join(pieces)

        return result


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    opened = Pair()
    try:
        yield opened
    finally:
        opened.far.close()
        await trio.aclose_forcefully(opened.stream)


def frame(lag: float, blame: str) -> bytes:
    return f"<{lag:.2f} {blame}>".encode()


def block(seconds: float) -> None:
    time.sleep(seconds)


def block_until(condition: Callable[[], object]) -> None:
    """Block the event loop for as long as it takes; a machine that has much to do takes longer."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(EVERY / 5)


def lags(data: bytes) -> list[float]:
    return [float(each.split()[0]) for each in data.decode().strip("<>").split("><")] if data else []


def watchdog_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "trio_cluster watchdog"]


@pytest.fixture(autouse=True)
def no_thread_of_an_earlier_test() -> None:
    """A thread ends a moment after the last stream that it was for."""
    for thread in watchdog_threads():
        thread.join(5)


def nothing() -> None:
    pass


# When there are signs of life


async def test_frames_are_written_while_the_loop_is_blocked_and_say_by_what(pair: Pair) -> None:
    with heartbeats_while_blocked(pair.stream, EVERY, frame, nothing):
        block_until(lambda: len(lags(pair.received())) >= 5)
    told = lags(pair.received())
    assert told == sorted(told)
    assert len(told) <= told[-1] / EVERY + 1
    # The first one may be written before the loop has arrived in the function.
    assert pair.received().count(b" in block_until>") >= len(told) - 1


async def test_frames_are_written_in_tls_too_and_in_order_with_those_of_the_loop() -> None:
    ours, theirs = socket.socketpair()
    near, far = (
        TcpStream(trio.SocketStream(trio.socket.from_stdlib_socket(each))) for each in (ours, theirs)
    )
    client, server = TlsStream(near, client_side(), server_name=MASTER_NAME), TlsStream(far, server_side())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.handshake)
        nursery.start_soon(server.handshake)
    stream, received = injectable(client), bytearray()

    def told() -> int:
        with contextlib.suppress(trio.WouldBlock):
            received.extend(server.read_nowait(1 << 16))
        return received.count(b"<")

    async with server, stream:
        with heartbeats_while_blocked(stream, EVERY, frame, nothing):
            await stream.write(b"[before]")
            block_until(lambda: told() >= 3)
        await stream.write(b"[after]")
        while not received.endswith(b"[after]"):
            received += await server.read(1 << 16)
    assert received.startswith(b"[before]<")
    between = lags(bytes(received[len("[before]") : -len("[after]")]))
    assert between == sorted(between)


async def test_nothing_is_written_while_the_loop_runs_be_it_idle_or_busy(pair: Pair) -> None:
    # Long enough for a process that does not get its time at once.
    with heartbeats_while_blocked(pair.stream, 1.0, frame, nothing):
        await trio.sleep(1.1)
        end = time.monotonic() + 1.1
        while time.monotonic() < end:
            await trio.lowlevel.checkpoint()
    assert pair.received() == b""


async def test_a_turn_shorter_than_the_interval_is_no_block_but_an_overdue_heartbeat_is_sent(
    pair: Pair,
) -> None:
    with heartbeats_while_blocked(pair.stream, 1.0, frame, nothing):
        await trio.sleep(0.8)
        block(0.6)
    assert pair.received().endswith(b" >")
    assert len(lags(pair.received())) == 1


async def test_what_the_loop_has_just_written_needs_no_second_sign_of_life(pair: Pair) -> None:
    with heartbeats_while_blocked(pair.stream, 1.0, frame, nothing):
        await trio.sleep(0.6)
        await pair.stream.write(b"x")
        block(0.6)
        assert pair.received() == b"x"


async def test_nothing_is_written_before_the_block_is_entered_nor_after_it_was_left(pair: Pair) -> None:
    # Long enough for a machine that is busy with other things while the block is left.
    every = 0.5
    block(3 * EVERY)
    # So that nothing is overdue in the block, however slow this machine is.
    await pair.stream.write(b"x")
    with heartbeats_while_blocked(pair.stream, every, frame, nothing):
        await trio.lowlevel.checkpoint()
    block(2 * every)
    assert pair.received() == b"x"
    assert not pair.stream.inject_frame(b"late")


async def test_every_stream_gets_its_own_frames_from_one_thread(pair: Pair) -> None:
    other = Pair()
    with other.far:
        with (
            heartbeats_while_blocked(pair.stream, EVERY, frame, nothing),
            heartbeats_while_blocked(other.stream, EVERY, lambda lag, blame: b"o", nothing),
        ):
            assert len(watchdog_threads()) == 1
            block_until(lambda: len(lags(pair.received())) >= 2 and other.received().count(b"o") >= 2)
        await other.stream.aclose()


async def test_the_thread_ends_with_the_last_stream_and_begins_anew_with_the_next(pair: Pair) -> None:
    assert watchdog_threads() == []
    for _ in range(2):
        with heartbeats_while_blocked(pair.stream, EVERY, frame, nothing):
            (thread,) = watchdog_threads()
            assert thread.daemon
            before = len(pair.received())
            block_until(lambda before=before: len(pair.received()) > before)
        thread.join(5)
        assert not thread.is_alive()


async def test_a_stream_whose_time_stands_still_while_the_loop_is_blocked_needs_no_thread() -> None:
    ours, theirs = memory_pair()
    with heartbeats_while_blocked(injectable(ours), EVERY, frame, nothing):
        assert watchdog_threads() == []
        block(3 * EVERY)
    with pytest.raises(trio.WouldBlock):
        theirs.read_nowait(1)


class Wrapped(MemoryStream):
    """A stream that only its task can write to, and whose peer has a clock of its own."""

    virtual_time = False


async def test_a_stream_that_no_thread_can_write_to_is_refused_and_closed() -> None:
    ours, theirs = Wrapped(), Wrapped()
    ours.peer, theirs.peer = theirs, ours
    with pytest.raises(NotInjectable, match="no heartbeats can be sent on a Wrapped"):
        injectable(ours)
    assert theirs.read_nowait(1) == b""


async def test_without_a_thread_to_be_had_the_stream_works_as_before(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with heartbeats_while_blocked(pair.stream, EVERY, frame, nothing):
        await pair.stream.write(b"x")
    assert pair.received() == b"x"
    assert "can't start new thread" in caplog.text


async def test_the_end_of_a_block_is_told_in_the_loop_and_both_are_logged_once(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    revivals: list[int] = []
    loop = threading.get_ident()
    with heartbeats_while_blocked(pair.stream, EVERY, frame, lambda: revivals.append(threading.get_ident())):
        block_until(lambda: len(lags(pair.received())) >= 3 and caplog.records)
        assert revivals == []
        await wait_all_tasks_blocked()
        assert set(revivals) == {loop}
        first, second = (record for record in caplog.records if record.name == "trio_cluster.pulse")
        assert first.getMessage().startswith("the event loop is blocked: test_watchdog.py:")
        assert first.thread != loop
        assert second.getMessage() == "the event loop runs again"
        assert second.fields["blocked_for"] >= lags(pair.received())[-1] - 0.01  # type: ignore[attr-defined]
        caplog.clear()
        block_until(lambda: caplog.records)
        await wait_all_tasks_blocked()
        assert len(caplog.records) == 2


# Frames are never torn


async def test_the_thread_completes_what_the_loop_had_begun_to_write(
    pair: Pair, nursery: trio.Nursery
) -> None:
    large = bytes(range(256)) * 400
    nursery.start_soon(pair.stream.write, large)
    await wait_all_tasks_blocked()
    assert pair.stream._unsent, "the buffers are too large for this test"
    with heartbeats_while_blocked(pair.stream, EVERY, frame, nothing):
        result = pair.read_in_thread()
        # Not one turn of the loop passes here.
        block_until(lambda: not pair.stream._unsent)
        block(4 * EVERY)
        await wait_all_tasks_blocked()
    await pair.stream.aclose()
    data = result()
    assert data.startswith(large)
    assert len(lags(data.removeprefix(large))) >= 1


async def test_the_loop_completes_what_the_thread_could_not(pair: Pair) -> None:
    pair.stream.allow_injection(True)
    large = bytes(range(256)) * 8000
    before = pair.stream.last_frame
    assert pair.stream.inject_frame(large)
    assert pair.stream.last_frame == before, "it is not there before its end is"
    assert not pair.stream.inject_frame(b"more"), "there is no room for more, so nothing may pile up"
    result = pair.read_in_thread()
    await pair.stream.write(b"after")
    await pair.stream.aclose()
    assert result() == large + b"after"


async def test_what_a_cancelled_send_leaves_goes_first(pair: Pair) -> None:
    large = bytes(range(256)) * 8000
    with trio.move_on_after(0.05) as scope:
        await pair.stream.write(large)
    assert scope.cancelled_caught
    result = pair.read_in_thread()
    await pair.stream.write(b"after")
    await pair.stream.aclose()
    assert result() == large + b"after"


async def test_a_send_that_is_cancelled_before_it_begins_writes_nothing(pair: Pair) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await pair.stream.write(b"x")
    assert scope.cancelled_caught
    assert pair.received() == b""


async def test_the_thread_does_not_wait_for_a_stream_that_is_being_written_to(pair: Pair) -> None:
    pair.stream.allow_injection(True)
    with pair.stream._lock:
        watch = patience.Stopwatch()
        assert not await trio.to_thread.run_sync(pair.stream.inject_frame, b"x")
        assert watch.counted < 1
    assert pair.received() == b""


async def test_nothing_is_written_after_the_stream_was_closed_even_if_its_descriptor_is_used_again(
    pair: Pair,
) -> None:
    pair.stream.allow_injection(True)
    number = pair.plain.descriptor
    close = pair.plain.close

    def look_before_closing() -> None:
        # The last moment at which the descriptor is still there.
        injected: list[bool] = []
        thread = threading.Thread(target=lambda: injected.append(pair.stream.inject_frame(b"x")))
        thread.start()
        thread.join()
        assert injected == [False]
        close()

    pair.plain.close = look_before_closing  # type: ignore[method-assign]
    await pair.stream.aclose()
    assert pair.far.recv(1) == b""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert number in (ours.fileno(), theirs.fileno())
        assert not pair.stream.inject_frame(b"x")
        for each in (ours, theirs):
            with pytest.raises(BlockingIOError):
                each.recv(1, socket.MSG_DONTWAIT)
    with pytest.raises(trio.ClosedResourceError):
        await pair.stream.write(b"x")


async def test_a_stream_whose_other_end_is_gone_is_left_to_the_loop(pair: Pair) -> None:
    pair.far.close()
    with heartbeats_while_blocked(pair.stream, EVERY, frame, nothing):
        block(3 * EVERY)
        with pytest.raises(trio.BrokenResourceError):
            await pair.stream.write(b"x")


async def test_an_injectable_stream_reads_and_waits_as_the_stream_under_it(pair: Pair) -> None:
    pair.far.send(b"hello")
    assert await pair.stream.read(100) == b"hello"
    await pair.stream.wait_writable()
    pair.far.close()
    assert await pair.stream.read(100) == b""


# Who is to blame


def blame_during(function: Callable[[threading.Event], object]) -> str:
    """Return who gets the blame while ``function`` runs, in a thread of its own and until an event is set."""
    over = threading.Event()
    thread = threading.Thread(target=function, args=(over,))
    thread.start()
    try:
        assert thread.ident is not None
        end = time.monotonic() + 5
        while time.monotonic() < end:
            held = sys._current_frames().get(thread.ident)
            if held is not None and held.f_code is threading.Condition.wait.__code__:
                break
            time.sleep(0.001)
        return blocking_frame(thread.ident)
    finally:
        over.set()
        thread.join()


def compute(over: threading.Event) -> None:
    over.wait()


def test_the_innermost_place_that_is_in_no_library_gets_the_blame() -> None:
    line = compute.__code__.co_firstlineno + 1
    assert blame_during(compute) == f"test_watchdog.py:{line} in compute"


def test_a_frame_that_introduces_itself_is_named_first() -> None:
    def run(over: threading.Event) -> None:
        __traceback_info__ = "handler of 'm'"
        compute(over)

    line = compute.__code__.co_firstlineno + 1
    assert blame_during(run) == f"handler of 'm' (test_watchdog.py:{line} in compute)"


def test_a_handler_that_is_in_a_library_is_named_by_its_own_function(tmp_path: Path) -> None:
    path = f"{Path(asyncio.__file__).parent}/models.py"
    space: dict[str, Any] = {}
    source = "def outer(over):\n    inner(over)\n\n\ndef inner(over):\n    over.wait()\n"
    exec(compile(source, path, "exec"), space)

    def run(over: threading.Event) -> None:
        __traceback_info__ = "handler of 'm'"
        space["outer"](over)

    assert blame_during(run) == "handler of 'm' (models.py:2 in outer)"


def test_the_place_that_blocks_can_be_printed_whatever_characters_are_in_its_name() -> None:
    def run(over: threading.Event) -> None:
        __traceback_info__ = "handler of '\x1b[2J\n'"
        compute(over)

    assert blame_during(run).startswith("handler of '?[2J?' (")


def test_a_thread_that_is_gone_has_done_nothing() -> None:
    assert blocking_frame(-1) == "unknown code"


def test_the_line_that_started_the_loop_is_not_to_blame_for_what_a_library_does() -> None:
    blames: list[str] = []
    seen = threading.Event()

    def look(loop: int) -> None:
        time.sleep(0.1)
        blames.append(blocking_frame(loop))
        seen.set()

    async def main() -> None:
        watcher = threading.Thread(target=look, args=(threading.get_ident(),))
        watcher.start()
        # A function of the standard library, called by trio: no line of ours is in between.
        trio.lowlevel.current_trio_token().run_sync_soon(seen.wait)
        await wait_all_tasks_blocked()
        watcher.join()

    trio.run(main)
    assert blames[0].startswith("threading.py:")


# Lag


async def test_the_lag_is_the_longest_turn_since_it_was_last_asked_for(pair: Pair) -> None:
    assert take_max_lag() == 0.0
    with heartbeats_while_blocked(pair.stream, 10.0, frame, nothing):
        block(0.3)
        await trio.sleep(0.01)
        block(0.02)
        await trio.lowlevel.checkpoint()
        assert 0.3 <= take_max_lag() < 3
        await trio.sleep(0.05)
        assert take_max_lag() < 0.3
        block(0.3)
        assert 0.3 <= take_max_lag() < 3, "the turn that has not ended counts as well"


# Over a link


class Peer:
    """The other end of a link over a socket: a websocket without a program behind it."""

    link: Link

    def __init__(self, kind: wsproto.ConnectionType) -> None:
        ours, theirs = socket.socketpair()
        self.socket = theirs
        self.near = injectable(TcpStream(trio.SocketStream(trio.socket.from_stdlib_socket(ours))))
        self.protocol = wsproto.WSConnection(kind)

    def say(self, event: Any) -> None:
        self.socket.sendall(self.protocol.send(event))

    def hear(self) -> list[Any]:
        """Return the events that have come by now."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while piece := self.socket.recv(1 << 16, socket.MSG_DONTWAIT):
                data += piece
        self.protocol.receive_data(data)
        return list(self.protocol.events())

    def messages(self) -> list[Any]:
        return [
            message
            for event in self.hear()
            if isinstance(event, BytesMessage) and event.message_finished
            for message in decode(bytes(event.data))
        ]


@pytest.fixture
async def peers(nursery: trio.Nursery) -> AsyncIterator[Callable[[str], Any]]:
    """Opens one end of a link, as far as what the other end must say first."""
    opened: list[tuple[Peer, trio.CancelScope]] = []

    async def open_peer(role: str, every: float) -> tuple[Peer, Any]:
        times: dict[str, Any] = {"heartbeat_interval": every, "silence_timeout": 10.0}
        session: Any
        if role == "worker":
            peer = Peer(wsproto.ConnectionType.SERVER)
            session = WorkerSession("w", "1", trio.current_time(), **times)
            opener = dial(peer.near, "m")
        else:
            peer = Peer(wsproto.ConnectionType.CLIENT)
            session = MasterSession("m", "1", trio.current_time(), **times)
            opener = accept(peer.near, lambda *_: None)
            peer.say(Request(host="m", target="/cluster", subprotocols=["trio-cluster.1"]))
        scope = trio.CancelScope()
        opened.append((peer, scope))
        peer.link = link = Link(peer.near, session, on_events=lambda _: None, timeout=30)

        async def run() -> None:
            with scope, contextlib.suppress(LinkClosed):
                await link.run(opener)

        nursery.start_soon(run)
        await wait_all_tasks_blocked()
        if role == "worker":
            (asked,) = peer.hear()
            assert isinstance(asked, Request)
            peer.say(AcceptConnection(subprotocol=asked.subprotocols[0]))
        return peer, session

    yield open_peer
    for peer, scope in opened:
        scope.cancel()
        peer.socket.close()
    await wait_all_tasks_blocked()


@pytest.mark.parametrize("role", ["worker", "master"])
async def test_a_link_sends_heartbeats_in_whole_frames_while_it_is_blocked_and_at_once_afterwards(
    peers: Any, role: str
) -> None:
    peer, session = await peers(role, 0.2)
    session.load = (2, 1, 4)
    await wait_all_tasks_blocked()
    assert isinstance(peer.messages()[0], Handshake)
    heartbeats: list[Any] = []
    block_until(lambda: heartbeats.extend(peer.messages()) or len(heartbeats) >= 3)
    assert all(isinstance(heartbeat, Heartbeat) for heartbeat in heartbeats)
    told = [heartbeat for heartbeat in heartbeats if heartbeat.blocked]
    assert len(told) >= 2
    assert told[0].blocked.startswith("test_watchdog.py:")
    assert told[-1].lag > told[0].lag >= 0.2
    assert (told[0].running, told[0].waiting, told[0].capacity) == (2, 1, 4)
    await wait_all_tasks_blocked()
    after = peer.messages()[-1]
    assert isinstance(after, Heartbeat)
    assert after.blocked == ""
    assert after.lag >= told[-1].lag


async def test_the_first_word_on_a_link_is_the_handshake_even_if_the_loop_is_blocked_before(
    peers: Any,
) -> None:
    peer, session = await peers("worker", EVERY)
    say = session.next_message
    session.next_message = lambda: None
    await wait_all_tasks_blocked()
    block(6 * EVERY)
    assert peer.messages() == []
    session.next_message = say
    peer.link.wake()
    await wait_all_tasks_blocked()
    assert isinstance(peer.messages()[0], Handshake)


async def test_a_close_is_the_last_word_on_a_link(peers: Any) -> None:
    peer, session = await peers("worker", EVERY)
    await wait_all_tasks_blocked()
    peer.say(CloseConnection(code=1000, reason="enough"))
    await wait_all_tasks_blocked()
    block(6 * EVERY)
    assert isinstance(peer.hear()[-1], CloseConnection)
    assert session.close_reason


async def test_a_link_that_fails_after_a_block_ends_neither_the_event_loop_nor_the_heartbeats(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    def no_frame(lag: float, blamed: str) -> bytes:
        raise ZeroDivisionError("no frame")

    other = Pair()
    with other.far:
        with heartbeats_while_blocked(pair.stream, EVERY, frame, fails):
            block_until(lambda: len(lags(pair.received())) >= 2)
            await trio.sleep(0.05)
            assert "a link failed after its event loop was blocked" in caplog.text
            with heartbeats_while_blocked(other.stream, EVERY, no_frame, nothing):
                block(3 * EVERY)
            assert "no frame" in caplog.text
            before = len(lags(pair.received()))
            block_until(lambda: len(lags(pair.received())) > before)
        await other.stream.aclose()
