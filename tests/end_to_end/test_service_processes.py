"""A master as the main process of a service: a real datagram socket is told what it does, and who comes next."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import fork_server
import httpx
import patience
import pytest
import trio
from nodes import Nodes, free_pair
from test_rolling_restart import Load

import trio_cluster

pytestmark = pytest.mark.processes


class Manager:
    """Receives what a service tells its manager, and from which process the kernel says that it is."""

    def __init__(self, path: Path) -> None:
        self.variables = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "600000"}
        self.received: list[tuple[int, str]] = []
        self._seen = 0
        self._news = trio.Event()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.bind(str(path))
        self._sock.setblocking(False)

    async def run(self) -> None:
        with self._sock:
            while True:
                await trio.lowlevel.wait_readable(self._sock)
                data, ancillary, _, _ = self._sock.recvmsg(4096, 1024)
                (credentials,) = [found[2] for found in ancillary if found[1] == socket.SCM_CREDENTIALS]
                pid = int.from_bytes(credentials[:4], "little")
                self.received += [(pid, line) for line in data.decode().split("\n")]
                self._news.set()

    async def next(self, wanted: str) -> tuple[int, str]:
        """Wait for a line that begins so; return who has sent it, and the line. What came before is skipped."""
        with patience.fail_after(10):
            while True:
                for pid, line in self.received[self._seen :]:
                    self._seen += 1
                    if line.startswith(wanted):
                        return pid, line
                self._news = trio.Event()
                await self._news.wait()


@pytest.fixture
async def manager(tmp_path: Path, nursery: trio.Nursery) -> Manager:
    opened = Manager(tmp_path / "notify")
    nursery.start_soon(opened.run)
    return opened


async def replace(nodes: Nodes, port: int, state: Path) -> tuple[int, str, str]:
    """Run `trio-cluster replace`, as `systemctl reload` does."""
    environ = dict(os.environ) | {"PYTHONPATH": str(Path(trio_cluster.__file__).parents[1])}
    done = await fork_server.run(
        ["-m", "trio_cluster", "replace", str(port), "--state-dir", str(state)],
        cwd=nodes.directory,
        env=environ,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_a_service_goes_over_to_another_process_under_load(
    nodes: Nodes, nursery: trio.Nursery, tmp_path: Path, manager: Manager
) -> None:
    port, state = free_pair(), tmp_path / "state"
    # So that connections without a request are not kept for long.
    arguments = (port, "--state-dir", str(state), "--drain-timeout", "3")
    old = await nodes.start("master", *arguments, variables=manager.variables)
    await nodes.worker(old, "w", models="m")
    assert (await manager.next("READY=1"))[0] == old.process.pid
    load = Load(old.url)
    async with trio.open_nursery() as asking:
        for streams in (True, False):
            asking.start_soon(load.ask, streams)
        await load.go_on(4)
        code, out, err = await replace(nodes, port, state)
        assert (code, err) == (0, "")
        pid, line = await manager.next("MAINPID=")
        new = int(line.removeprefix("MAINPID="))
        try:
            assert pid == old.process.pid != new
            assert out == (
                f"the new process {new} serves on port {port}; the one before finishes its answers and ends\n"
            )
            # The new one shows that it lives, and its predecessor has nothing more to say.
            handed_over = len(manager.received)
            for _ in range(2):
                assert (await manager.next("WATCHDOG=1"))[0] == new
            await load.go_on(4)
            with patience.fail_after(20):
                assert await old.process.wait() == 0
            await load.go_on(4)
            load.over = True
            assert {pid for pid, _ in manager.received[handed_over:]} == {new}
        finally:
            os.kill(new, signal.SIGTERM)
    assert load.failures == []
    assert (await manager.next("STOPPING=1"))[0] == new
    # It has the standard error of its predecessor, which ends with it.
    assert await old.exit_code() == 0


async def test_a_successor_that_fails_is_a_failed_reload(
    nodes: Nodes, tmp_path: Path, manager: Manager
) -> None:
    port, state = free_pair(), tmp_path / "state"
    config = tmp_path / "c.toml"
    config.write_text("")
    arguments = (port, "--state-dir", str(state), "--config", str(config))
    master = await nodes.start("master", *arguments, variables=manager.variables)
    config.write_text("nonsense = 1\n")
    code, out, err = await replace(nodes, port, state)
    assert (code, out) == (1, "")
    assert err.startswith(
        "trio-cluster: error: the running master goes on: the new process has ended before it"
    )
    # Its last line is in the log of the service.
    assert [line for line in master.noise if "nonsense: unknown key" in line]
    master.noise.clear()
    config.write_text("")
    # It is asked to read it, and says when that begins and ends.
    await manager.next("READY=1")
    master.send(signal.SIGHUP)
    await manager.next("RELOADING=1")
    assert (await manager.next("READY=1"))[0] == master.process.pid
    async with httpx.AsyncClient(base_url=master.url, trust_env=False) as client:
        assert (await client.get("/health")).status_code == 200


async def test_a_master_without_a_manager_is_not_replaced_by_itself(nodes: Nodes, tmp_path: Path) -> None:
    port, state = free_pair(), tmp_path / "state"
    await nodes.start("master", port, "--state-dir", str(state))
    code, _, err = await replace(nodes, port, state)
    assert code == 1
    assert "it was not started by a service manager" in err


async def test_a_worker_is_up_before_it_has_a_master(nodes: Nodes, manager: Manager) -> None:
    worker = await nodes.start(
        "worker", "127.0.0.1", free_pair(), models="m", ready=False, variables=manager.variables
    )
    assert (await manager.next("READY=1"))[0] == worker.process.pid
    assert (await manager.next("WATCHDOG=1"))[0] == worker.process.pid
    worker.send(signal.SIGTERM)
    assert await worker.exit_code() == 0
