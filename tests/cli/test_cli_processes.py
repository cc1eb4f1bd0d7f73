"""The command line in processes: its signals, its exit codes, and what it logs."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import fork_server
import pytest
from command_line import APP, one_line

processes = pytest.mark.processes


@attrs.define
class Process:
    """A running command, and what it has logged so far."""

    popen: fork_server.BlockingProcess
    errors: int
    logged: str = ""

    def read(self, timeout: float) -> bool:
        """Read more of the log. Return whether there was any before the timeout (seconds) or the end of the process."""
        ready, _, _ = select.select([self.errors], [], [], max(0.0, timeout))
        piece = os.read(self.errors, 65536) if ready else b""
        self.logged += piece.decode()
        return piece != b""

    def wait_for(self, pattern: str, timeout: float = 20.0) -> re.Match[str]:
        """Read the log until a whole line of it matches; fail after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(f"{pattern}.*\n", self.logged)):
            if not self.read(deadline - time.monotonic()):
                pytest.fail(f"nothing like {pattern!r} in:\n{self.logged}")
        return match

    def end(self, timeout: float = 20.0) -> tuple[int, str]:
        """Wait until the process has ended, for at most ``timeout`` seconds; return its exit code and its log."""
        deadline = time.monotonic() + timeout
        while self.read(deadline - time.monotonic()):
            pass
        return self.popen.wait(timeout=max(0.1, deadline - time.monotonic())), self.logged


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Process]]:
    (place / "app.py").write_text(APP)
    started: list[Process] = []

    def start(*argv: str, program: str | None = None) -> Process:
        words = [*(["-m", "trio_cluster"] if program is None else [program]), *argv]
        errors, written = os.pipe()
        try:
            with Path(os.devnull).open("w") as nothing:
                popen = fork_server.start_blocking(
                    words, cwd=place, env=os.environ, stdout=nothing.fileno(), stderr=written
                )
        finally:
            os.close(written)
        started.append(Process(popen, errors))
        return started[-1]

    yield start
    for process in started:
        process.popen.kill()
        process.popen.wait()
        os.close(process.errors)


def ask_slow(url: str) -> http.client.HTTPResponse:
    """Return a response that has begun, and that the model never ends."""
    body = {"model": "slow", "messages": [{"role": "user", "content": "x"}], "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=20)
    response.readline()
    return response


@processes
def test_the_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "trio_cluster", "worker"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert one_line(result.stderr).startswith("a worker needs something to serve")


@processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_gracefully_with_code_0(number: signal.Signals, start: Callable[..., Process]) -> None:
    process = start("master", "0", "--host", "127.0.0.1", "-a", "app:server")
    process.wait_for(r"serving .*url=http://127\.0\.0\.1:\d+.* mode=master models=echo,slow")
    process.popen.send_signal(number)
    code, log = process.end()
    assert code == 0
    assert f"signal={number.name}" in log
    assert "Traceback" not in log


@processes
def test_a_second_signal_stops_at_once(start: Callable[..., Process]) -> None:
    process = start("master", "0", "--host", "127.0.0.1", "-a", "app:server", "--drain-timeout", "1000")
    url = process.wait_for(r"serving .*url=(http://127\.0\.0\.1:\d+)")[1]
    with ask_slow(url):
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("stopping")
        with pytest.raises(subprocess.TimeoutExpired):
            process.popen.wait(timeout=0.3)
        process.popen.send_signal(signal.SIGTERM)
        code, log = process.end()
    assert code == 0
    assert "Traceback" not in log


@processes
def test_a_worker_joins_and_a_second_master_finds_its_port_taken(start: Callable[..., Process]) -> None:
    master = start("master", "0", "--host", "127.0.0.1")
    port = int(master.wait_for(r"serving .*url=http://127\.0\.0\.1:(\d+)")[1])
    worker = start(
        "worker", "127.0.0.1", str(port), "-a", "app:server", "--name", "w1", "--log-format", "json"
    )
    worker.wait_for(r'"message": "registered with the master", "models": \["echo", "slow"\]')
    status = subprocess.run(
        [sys.executable, "-m", "trio_cluster", "status", str(port)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"^w1 +127\.0\.0\.1", status.stdout, re.M)
    second = start("master", str(port), "--host", "127.0.0.1")
    code, log = second.end()
    assert code == 1
    assert re.fullmatch(rf"trio-cluster: error: port {port}: .+\n", log)
    for process in (worker, master):
        process.popen.send_signal(signal.SIGTERM)
        assert process.end()[0] == 0


@processes
def test_a_worker_without_a_master_can_be_stopped(start: Callable[..., Process]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        process = start(
            "worker", "127.0.0.1", "--internal-port", str(port), "-a", "app:server", "--log-level", "debug"
        )
        process.wait_for(r"127\.0\.0\.1")
        process.popen.send_signal(signal.SIGINT)
        code, log = process.end()
    assert code == 0
    assert "Traceback" not in log


@processes
def test_a_refused_worker_ends_with_code_1_and_one_line(start: Callable[..., Process]) -> None:
    master = start("master", "0", "--host", "127.0.0.1", "--cluster-token", "right")
    port = master.wait_for(r"serving .*url=http://127\.0\.0\.1:(\d+)")[1]
    worker = start(
        "worker", "127.0.0.1", port, "-a", "app:server", "--cluster-token", "wrong", "--log-level", "error"
    )
    code, log = worker.end()
    assert code == 1
    one_line(log)
    master.popen.send_signal(signal.SIGTERM)
    assert master.end()[0] == 0


@processes
def test_a_worker_leaves_no_lines_in_the_access_log_of_its_master(start: Callable[..., Process]) -> None:
    master = start("master", "0", "--host", "127.0.0.1", "--access-log")
    port = int(master.wait_for(r"serving .*url=http://127\.0\.0\.1:(\d+)")[1])
    start("worker", f"127.0.0.1:{port}", "-a", "app:server").wait_for("registered with the master")
    # The second request is answered behind everything that came before.
    for _ in range(2):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
            assert response.status == 200
    master.popen.send_signal(signal.SIGTERM)
    code, log = master.end()
    assert code == 0
    assert log.count("GET /health") == 2
    assert "/probe" not in log
    assert "not a valid HTTP request" not in log


@processes
def test_the_port_for_workers_given_by_mistake_is_noticed(start: Callable[..., Process]) -> None:
    master = start("master", "0", "--host", "127.0.0.1")
    port = int(master.wait_for(r"serving .*url=http://127\.0\.0\.1:(\d+)")[1])
    worker = start("worker", f"127.0.0.1:{port + 1000}", "-a", "app:server")
    code, log = worker.end()
    assert code == 1
    assert log.endswith(
        f"{port + 1000} is the master's port for workers; give the port of its API, which is {port},"
        f" or --internal-port {port + 1000}\n"
    )
    status = subprocess.run(
        [sys.executable, "-m", "trio_cluster", "status", f"127.0.0.1:{port + 1000}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert status.returncode == 1
    assert f"the API is on {port}" in one_line(status.stderr)
