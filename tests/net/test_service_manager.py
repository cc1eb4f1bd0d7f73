"""What a node tells systemd, as it arrives at a real datagram socket; time is virtual."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import patience
import pytest
import trio
from trio.testing import MockClock

from trio_cluster.net.service_manager import LAUNCHER, PREDECESSOR, ServiceManager


class Inbox:
    """The manager's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._sock.setblocking(False)

    def take(self) -> list[list[str]]:
        """Return the lines of all messages that have come since the last time."""
        found = []
        while True:
            try:
                found.append(self._sock.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._sock.close()


async def next_ping(inbox: Inbox) -> None:
    with patience.fail_after(10):
        while ["WATCHDOG=1"] not in inbox.take():  # noqa: ASYNC110  (a socket of the manager, which is no task here)
            await trio.sleep(0.01)


@pytest.fixture(params=["path", "abstract"])
def inbox(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Inbox]:
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("names without a file exist on Linux only")
    address = str(tmp_path / "notify") if request.param == "path" else f"@{tmp_path}"
    opened = Inbox(address)
    yield opened
    opened.close()


def test_the_variables_are_taken_out_of_the_environment(inbox: Inbox) -> None:
    environ = {"NOTIFY_SOCKET": inbox.address, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7", "HOME": "/"}
    manager = ServiceManager.from_environ(environ, 7)
    assert manager is not None
    assert environ == {"HOME": "/"}
    assert manager.variables == {
        "NOTIFY_SOCKET": inbox.address,
        "WATCHDOG_USEC": "30000000",
        PREDECESSOR: str(os.getpid()),
    }


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative"])
def test_without_a_socket_that_is_understood_there_is_no_manager(address: str) -> None:
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1"}
    assert ServiceManager.from_environ(environ, 1) is None
    assert environ == {}


@pytest.mark.parametrize(
    ("microseconds", "pid"), [("30000000", "8"), ("0", "7"), ("", "7"), ("soon", "7"), ("-5", "7")]
)
async def test_a_watchdog_for_another_process_or_of_no_time_does_not_count(
    inbox: Inbox, autojump_clock: MockClock, microseconds: str, pid: str
) -> None:
    environ = {"NOTIFY_SOCKET": inbox.address, "WATCHDOG_USEC": microseconds, "WATCHDOG_PID": pid}
    manager = ServiceManager.from_environ(environ, 7)
    assert manager is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        manager.ready("up")
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert inbox.take() == [["READY=1", "STATUS=up"]]


async def test_the_event_loop_pings_three_times_in_the_time_from_readiness_on(
    inbox: Inbox, autojump_clock: MockClock
) -> None:
    manager = ServiceManager(inbox.address, watchdog=30)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        await trio.sleep(100)
        assert inbox.take() == []
        manager.ready("up")
        await trio.sleep(0.5)
        assert inbox.take() == [["READY=1", "STATUS=up"], ["WATCHDOG=1"]]
        for _ in range(5):
            await trio.sleep(10)
            assert inbox.take() == [["WATCHDOG=1"]]
        nursery.cancel_scope.cancel()


async def test_a_loop_that_is_blocked_does_not_ping(inbox: Inbox) -> None:
    """In real time, since virtual time stands still in a loop that is blocked."""
    manager = ServiceManager(inbox.address, watchdog=0.15)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        manager.ready("up")
        await next_ping(inbox)
        time.sleep(0.5)  # noqa: ASYNC251  (that is the point)
        assert inbox.take() == []
        await next_ping(inbox)
        nursery.cancel_scope.cancel()


async def test_reload_and_stop_are_told(inbox: Inbox, autojump_clock: MockClock) -> None:
    manager = ServiceManager(inbox.address)
    manager.reloading()
    manager.reloaded()
    assert inbox.take() == []
    manager.ready("serving")
    before = time.monotonic_ns() // 1000
    manager.reloading()
    manager.reloaded()
    manager.stopping()
    ready, reloading, again, stopping = inbox.take()
    assert again == ready == ["READY=1", "STATUS=serving"]
    assert reloading[0] == "RELOADING=1"
    name, _, value = reloading[1].partition("=")
    assert (name, int(value) >= before) == ("MONOTONIC_USEC", True)
    assert stopping[0] == "STOPPING=1"


async def test_a_process_that_is_replaced_names_the_next_one_and_is_silent(
    inbox: Inbox, autojump_clock: MockClock
) -> None:
    manager = ServiceManager(inbox.address, watchdog=30)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        manager.ready("up")
        await trio.sleep(1)
        inbox.take()
        manager.hand_over(4711)
        assert not manager.is_main
        assert inbox.take() == [["MAINPID=4711"]]
        manager.stopping()
        await trio.sleep(100)
        assert inbox.take() == []
        nursery.cancel_scope.cancel()


async def test_a_successor_is_silent_until_the_manager_knows_it(
    inbox: Inbox, autojump_clock: MockClock
) -> None:
    predecessor = ServiceManager(inbox.address, watchdog=30)
    environ = dict(predecessor.variables)
    manager = ServiceManager.from_environ(environ, os.getpid())
    assert manager is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        await trio.sleep(100)
        manager.ready("up")
        await trio.sleep(0.5)
        assert inbox.take() == []
        await trio.sleep(1)
        assert inbox.take() == [["READY=1", "STATUS=up"], ["WATCHDOG=1"]]
        nursery.cancel_scope.cancel()
    manager.close()


async def test_a_manager_that_is_busy_is_told_later(inbox: Inbox, autojump_clock: MockClock) -> None:
    manager = ServiceManager(inbox.address)
    for number in range(2000):
        manager.ready(str(number))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        found = []
        for _ in range(2000):
            found += inbox.take()
            if len(found) == 2000:
                break
            await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert [lines[1] for lines in found] == [f"STATUS={number}" for number in range(2000)]


async def test_a_manager_that_is_busy_is_told_who_comes_next_within_a_second_and_not_of_every_ping(
    inbox: Inbox, autojump_clock: MockClock
) -> None:
    manager = ServiceManager(inbox.address, watchdog=1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        manager.ready("up")
        await trio.sleep(1)
        # The queue of the socket is full before that.
        for _ in range(2000):
            manager.reloading()
        manager.hand_over(4711)
        found = []
        # Less than a third of the time of the watchdog, whatever the system keeps for a socket (10, at least).
        for _ in range(300):
            await trio.sleep(1.01)
            found += inbox.take()
            if found[-1] == ["MAINPID=4711"]:
                break
        nursery.cancel_scope.cancel()
    assert found[-1] == ["MAINPID=4711"]
    assert len([lines for lines in found if lines[0] == "RELOADING=1"]) == 2000
    assert found.count(["WATCHDOG=1"]) == 1


async def test_pings_are_not_kept_for_a_manager_that_is_busy(inbox: Inbox, autojump_clock: MockClock) -> None:
    manager = ServiceManager(inbox.address, watchdog=3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        manager.ready("up")
        await trio.sleep(5000)
        kept = len(inbox.take())
        await trio.sleep(1.5)
        assert len(inbox.take()) <= 2 < kept
        nursery.cancel_scope.cancel()


def test_a_manager_that_is_gone_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        manager = ServiceManager(str(tmp_path / "nothing"))
        manager.ready("up")
        manager.stopping()

    trio.run(main)
    assert [record.getMessage() for record in caplog.records] == [
        "the service manager cannot be told anything: No such file or directory"
    ]


async def test_the_end_of_the_predecessor_is_waited_for() -> None:
    if not hasattr(os, "pidfd_open"):
        pytest.skip("there are no process descriptors on this system")
    with subprocess.Popen(["sleep", "1000"]) as process:  # noqa: ASYNC220  (it takes no time)
        manager = ServiceManager("/nowhere", predecessor=process.pid)
        with trio.move_on_after(0.05) as waiting:
            await manager.wait_predecessor()
        assert waiting.cancelled_caught
        process.kill()
        with patience.fail_after(5):
            await manager.wait_predecessor()
        manager.close()
        manager.close()
        await manager.wait_predecessor()


def test_what_the_launcher_starts_is_not_its_child(tmp_path: Path) -> None:
    """The manager asks whose child a process is when it is named; it has to be the manager's by then."""
    alive, other_end = os.pipe()
    program = [sys.executable, "-c", "import os; print(os.getppid(), os.getsid(0) == os.getpid())"]
    launched = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(other_end), *program],
        pass_fds=(other_end,),
        stdout=subprocess.PIPE,
        text=True,
        timeout=10,
        check=True,
    )
    os.close(other_end)
    with open(alive, "rb") as pipe:
        pid = int(pipe.readline())
        # It has ended when the other end is closed.
        assert pipe.read() == b""
    parent, leads = launched.stdout.split()
    assert pid > 0
    assert int(parent) != os.getpid()
    assert leads == "True"
