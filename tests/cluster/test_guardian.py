"""What tells a master that a worker's process has ended: whom it believes, and what the guardian does with its pipe."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from certificates import authority, now, server_side
from memory_cluster import MemoryCluster, Worker, chat_request, echo, everything, forever
from test_resuming import begin, state_of, suspended
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.cluster.guardian import _PROGRAM, Guardian, Trust
from trio_cluster.core.answer import Failed
from trio_cluster.errors import WorkerLost
from trio_cluster.link.websocket import request_of_end
from trio_cluster.options import ClusterServerOptions
from trio_cluster.protocol import proof_of_end
from trio_cluster.security.authority import MASTER_NAME, make_request


@pytest.fixture
def cluster(nursery: trio.Nursery) -> MemoryCluster:
    return MemoryCluster(nursery, on_conflict="replicate")


async def tell(cluster: MemoryCluster, proof: str, token: str | None = None) -> int:
    """Tell the master that a process has ended, and return the status of its answer."""
    ours, _ = cluster.connect()
    await ours.write(request_of_end("master", proof, token))
    answer = b""
    while b"\n" not in answer:
        answer += await ours.read(4096)
    await ours.aclose()
    return int(answer.split()[1])


# Whom the master believes


async def test_who_has_the_proof_ends_a_session_that_is_suspended_at_once(
    cluster: MemoryCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    proof = proof_of_end(cluster.manager.sessions[0].session_id)
    await suspended(cluster, worker)
    start = trio.current_time()
    with caplog.at_level(logging.DEBUG, "trio_cluster"):
        assert await tell(cluster, proof) == 410
        last = (await everything(call))[-1]
    assert trio.current_time() == start
    assert isinstance(last, Failed)
    assert isinstance(last.error, WorkerLost)
    assert "as its guardian says" in str(last.error)
    assert call.released
    assert cluster.manager.status() == []
    assert cluster.router.catalog.names() == []
    assert "connection refused" not in caplog.text
    assert proof not in caplog.text


#: What may be shown in place of the proof of a session that is suspended.
WRONG: dict[str, Any] = {
    "another one": lambda session: proof_of_end("0" * 32),
    "of the worker's other session": lambda session: proof_of_end(session[::-1]),
    "the session itself": lambda session: session,
    "a part of it": lambda session: proof_of_end(session)[:31],
    "more than it": lambda session: proof_of_end(session) + "0",
    "in capitals": lambda session: proof_of_end(session).upper() + "A",
    "nothing": lambda session: "",
    "no ASCII": lambda session: "ÿ" * 32,
    "much": lambda session: "0" * 5000,
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_proof_that_is_none_changes_nothing(
    cluster: MemoryCluster, autojump_clock: MockClock, case: str
) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    session = cluster.manager.sessions[0].session_id
    await suspended(cluster, worker)
    assert await tell(cluster, WRONG[case](session)) == 409
    assert not call.ended
    assert state_of(cluster) == "suspended"


async def test_a_proof_counts_once_and_for_its_own_session_only(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    other = await cluster.start("w2", forever)
    proof = proof_of_end(cluster.manager.sessions[0].session_id)
    await suspended(cluster, worker)
    assert await tell(cluster, proof) == 410
    assert await tell(cluster, proof) == 409
    # The process has not ended, whoever said so: it comes back with another session.
    worker.find_way()
    await trio.sleep(20)
    assert state_of(cluster, "w1") == "ok"
    assert await tell(cluster, proof) == 409
    assert state_of(cluster, "w1") == state_of(cluster, "w2") == "ok"
    assert other.dials == 1


async def test_what_a_process_has_sent_before_its_end_is_received_if_its_end_is_told_first(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", echo)
    session = cluster.manager.sessions[0]
    call = cluster.router.open(chat_request("echo", content="some words"))
    # On its way to the master, which is told first.
    worker.streams[1].held = True
    await wait_all_tasks_blocked()
    assert await tell(cluster, proof_of_end(session.session_id)) == 410
    assert state_of(cluster) == "ok"
    worker.streams[1].release()
    events = await everything(call)
    assert not isinstance(events[-1], Failed)
    # It does not wait for the end of the connection, which a proxy may keep open.
    await trio.sleep(1.1)
    assert session.close_reason is not None
    assert "guardian" in session.close_reason


async def test_a_reset_after_the_end_was_told_is_not_taken_for_a_cut(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    assert await tell(cluster, proof_of_end(cluster.manager.sessions[0].session_id)) == 410
    worker.way_lost = True
    start = trio.current_time()
    worker.reset()
    await wait_all_tasks_blocked()
    assert call.ended
    assert trio.current_time() == start


async def test_an_end_that_is_told_in_the_moment_of_the_cut_counts(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    (connection,) = cluster.manager._connections
    worker.way_lost = True
    worker.reset()
    while not connection.session.suspended:
        await trio.lowlevel.checkpoint()
    # The tasks of the connection have not ended yet.
    start = trio.current_time()
    connection.link.peer_has_ended("its process has ended")
    assert call.ended
    await wait_all_tasks_blocked()
    assert trio.current_time() == start
    assert call.released
    assert cluster.manager.status() == []
    assert connection.over


@pytest.mark.parametrize("token", [None, "wrong"])
async def test_the_proof_does_not_replace_the_token(
    nursery: trio.Nursery, autojump_clock: MockClock, token: str | None
) -> None:
    cluster = MemoryCluster(nursery, cluster_token="right")
    worker = await cluster.start("w1", forever, cluster_token="right")
    proof = proof_of_end(cluster.manager.sessions[0].session_id)
    await suspended(cluster, worker)
    assert await tell(cluster, proof, token) == 401
    assert state_of(cluster) == "suspended"
    assert await tell(cluster, proof, "right") == 410


async def test_the_worker_keeps_its_guardian_informed(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    told: list[tuple[str, ...]] = []

    class Listener(Guardian):
        def tell_end_of(
            self,
            session: Any,
            host: str,
            address: Any,
            trust: Any,
            *,
            proxied: bool,
            process: int | None = None,
        ) -> None:
            told.append(("tell", session.session_id, host))

        def forget(self, session: Any) -> None:
            told.append(("forget", session.session_id))

    worker = Worker(cluster, "w1")
    worker.client.guardian = Listener(worker.options)
    cluster.nursery.start_soon(worker.run)
    await worker.registered.wait()
    first = cluster.manager.sessions[0].session_id
    worker.reset()
    await trio.sleep(2)
    assert told == [("tell", first, "master")] * 2
    # The link is over for good, and the worker lives.
    cluster.kill_master()
    await trio.sleep(1)
    assert told[2:] == [("forget", first)]
    cluster.restart()
    await trio.sleep(20)
    second = cluster.manager.sessions[0].session_id
    assert told[3:] == [("tell", second, "master")]
    # A worker that is cancelled drops its link, which may look like a cut. So that is to be told.
    worker.scope.cancel()
    await worker.over.wait()
    assert len(told) == 4


# The guardian's process, without a worker


class Server:
    """A port that writes down what it is asked, and answers with the given statuses."""

    def __init__(self, *statuses: int, tls: bool = False) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.asked: list[bytes] = []
        self.peers: list[Any] = []
        self._statuses = statuses
        self._tls = tls
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        for status in self._statuses:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            if self._tls:
                try:
                    connection = server_side().wrap_socket(connection, server_side=True)
                except ssl.SSLError:
                    # It does not trust this server.
                    continue
                self.peers.append(connection.getpeercert())
            with connection:
                self.asked.append(connection.recv(4096))
                if status:
                    connection.sendall(f"HTTP/1.1 {status} \r\n\r\n".encode())

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@pytest.fixture
def guardian() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-I", "-S", str(_PROGRAM), str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        yield process
        process.kill()


def command(
    key: str, port: int, *more: str, seconds: float = 5, many: int = 0, request: bytes = b"x"
) -> bytes:
    words = ("tell", key, f"{seconds:g}", str(many), "127.0.0.1", str(port), request.hex(), *more)
    return " ".join(words).encode() + b"\n"


def end_of(guardian: subprocess.Popen[bytes], *lines: bytes) -> int:
    """Give it commands, end its pipe, and return its exit code."""
    assert guardian.stdin is not None
    guardian.stdin.write(b"".join(lines))
    guardian.stdin.close()
    return guardian.wait(10)


@pytest.mark.processes
def test_all_that_is_told_at_the_end_is_what_was_told_last(guardian: subprocess.Popen[bytes]) -> None:
    server = Server(410, 410, 410)
    lines = [
        command("1", server.port, request=b"old"),
        command("1", server.port, request=b"new"),
        command("2", server.port, request=b"second"),
        command("3", server.port, request=b"third"),
        b"forget 3\n",
        b"forget 4\n",
        b"an unknown command\n",
        b"kill\n",
        b"tell 5 not a number\n",
        b"\xff\n",
        b"tell 6 1 0 127.0.0.1 1 7",
    ]
    assert end_of(guardian, *lines) == 0
    server.close()
    assert sorted(server.asked) == [b"new", b"second"]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("many", "statuses", "asked"),
    [
        (0, (410,), 1),
        (0, (409, 410), 1),
        (0, (401, 410), 1),
        # A proxy that has no master, and a connection that breaks.
        (0, (503, 0, 410), 3),
        # Several masters at one address.
        (1, (409, 409, 410), 3),
    ],
)
def test_it_asks_until_it_was_answered(
    guardian: subprocess.Popen[bytes], many: int, statuses: tuple[int, ...], asked: int
) -> None:
    server = Server(*statuses)
    assert end_of(guardian, command("1", server.port, many=many)) == 0
    server.close()
    assert len(server.asked) == asked


@pytest.mark.processes
@pytest.mark.parametrize("many", [0, 1])
def test_it_does_not_outlive_what_it_has_to_tell(guardian: subprocess.Popen[bytes], many: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert end_of(guardian, command("1", free.getsockname()[1], many=many, seconds=0.5)) == 0


@pytest.mark.processes
@pytest.mark.parametrize("trusted", [True, False])
def test_tls_with_the_authority_and_the_certificate_of_the_worker(
    guardian: subprocess.Popen[bytes], trusted: bool
) -> None:
    key, request = make_request("w1")
    certificate, _ = authority().worker_certificate(request, "w1", now())
    server = Server(*[410] * 50, tls=True)
    fields = [
        MASTER_NAME,
        authority().trusted.encode().hex() if trusted else "-",
        "-",
        (key + certificate).encode().hex(),
    ]
    ended = end_of(guardian, command("1", server.port, *fields, seconds=1))
    server.close()
    assert ended == 0
    assert server.asked == ([b"x"] if trusted else [])
    if trusted:
        assert "w1" in str(server.peers)


def ignores_signals(pid: int) -> bool:
    """Tell whether it has come so far that it ignores those that end a process."""
    with open(f"/proc/{pid}/status") as status:
        ignored = int(re.search(r"^SigIgn:\s+(\w+)", status.read(), re.M)[1], 16)  # type: ignore[index]
    return bool(ignored >> (signal.SIGHUP - 1) & 1)


WORKER = """
import os, subprocess, sys, time
guardian = subprocess.Popen([sys.executable, "-I", "-S", sys.argv[1], str(os.getpid())], stdin=subprocess.PIPE)
guardian.stdin.write(sys.argv[2].encode() + b"\\n")
guardian.stdin.flush()
if os.fork() == 0:
    # It has the other end of the pipe, too.
    time.sleep(float(sys.argv[3]))
    os._exit(0)
print(guardian.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.processes
def test_it_notices_the_death_of_a_worker_whose_child_has_the_pipe_and_is_not_ended_by_signals() -> None:
    server = Server(410)
    words = [sys.executable, "-c", WORKER, str(_PROGRAM), command("1", server.port).decode().strip(), "3"]
    worker = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    with worker.stdout:
        guardian = int(worker.stdout.readline())
    while not ignores_signals(guardian):
        time.sleep(0.01)
    # What Ctrl-C, a service manager and a closed terminal send to all processes.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guardian, number)
    assert server.asked == []
    worker.kill()
    server.thread.join(2)
    assert server.asked == [b"x"]
    worker.wait()
    server.listener.close()


# The guardian of a worker


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def processes_of(parent: int) -> list[str]:
    """Return the states of the processes that a process has started, and not waited for."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat:
                    state, ppid = stat.read().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(ppid) == parent:
                found.append(state)
    return found


@pytest.mark.processes
async def test_it_runs_as_long_as_it_is_wanted_and_nothing_is_left_of_it() -> None:
    before = processes_of(os.getpid())
    guardian = Guardian(ClusterServerOptions())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guardian.run)
        await until(lambda: guardian.pid is not None)
        pid = guardian.pid
        assert pid is not None
        await until(lambda: ignores_signals(pid))
        assert os.getsid(pid) == pid
        assert os.getcwd() != os.readlink(f"/proc/{pid}/cwd") == "/"
        descriptors = {
            os.readlink(f"/proc/{pid}/fd/{number}").partition(":")[0]
            for number in os.listdir(f"/proc/{pid}/fd")
        }
        assert descriptors <= {"pipe", "/dev/null", "anon_inode"}
        nursery.cancel_scope.cancel()
    assert processes_of(os.getpid()) == before


@pytest.mark.processes
async def test_a_worker_goes_on_without_a_guardian_that_was_killed(caplog: pytest.LogCaptureFixture) -> None:
    before = processes_of(os.getpid())
    guardian = Guardian(ClusterServerOptions())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guardian.run)
        await until(lambda: guardian.pid is not None)
        assert guardian.pid is not None
        os.kill(guardian.pid, signal.SIGKILL)
        await until(lambda: guardian.pid is None)
    assert len(re.findall("no guardian: it has ended", caplog.text)) == 1
    assert processes_of(os.getpid()) == before


async def test_a_worker_goes_on_without_a_guardian_that_cannot_be_started(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    await Guardian(ClusterServerOptions()).run()
    assert len(caplog.records) == 1
    assert "no guardian: it cannot be started" in caplog.text


@pytest.mark.processes
async def test_what_was_not_forgotten_is_told_when_the_worker_is_cancelled() -> None:
    server = Server(410)

    class Session:
        session_id = "1" * 32
        resume_window = 5.0

    session: Any = Session()
    guardian = Guardian(ClusterServerOptions(cluster_token="secret"))
    # Before it runs: the link may be faster.
    guardian.tell_end_of(session, "master", ("127.0.0.1", server.port), None, proxied=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guardian.run)
        await until(lambda: guardian.pid is not None)
        nursery.cancel_scope.cancel()
    server.close()
    (asked,) = server.asked
    assert proof_of_end(session.session_id).encode() in asked
    assert session.session_id.encode() not in asked
    assert b"Authorization: Bearer secret\r\n" in asked
    assert "secret" not in repr(Trust(certificate="secret"))
