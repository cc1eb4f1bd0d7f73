"""A worker in another network joins a master by the lines that the commands print: real network namespaces."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import APP

pytestmark = pytest.mark.processes

#: Addresses for documentation (RFC 5737), in networks that the test makes.
MASTER, GATEWAY_OUTSIDE, GATEWAY_INSIDE, WORKER = "192.0.2.1", "192.0.2.2", "198.51.100.1", "198.51.100.2"
PROGRAM = [sys.executable, "-m", "trio_cluster"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Networks:
    """Three hosts: the master's, the worker's, and a gateway between them that does NAT if the system can."""

    def __init__(self) -> None:
        mark = f"tc{os.getpid()}"
        self.master, self.gateway, self.worker = (f"{mark}{name}" for name in ("m", "g", "w"))

    def make(self) -> None:
        for name in (self.master, self.gateway, self.worker):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        self._connect(self.master, MASTER, self.gateway, GATEWAY_OUTSIDE)
        self._connect(self.worker, WORKER, self.gateway, GATEWAY_INSIDE)
        ip("-n", self.worker, "route", "add", "default", "via", GATEWAY_INSIDE)
        self.run(self.gateway, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        masquerade = ("iptables", "-t", "nat", "-A", "POSTROUTING", "-d", f"{MASTER}/32", "-j", "MASQUERADE")
        try:
            self.run(self.gateway, *masquerade)
        except subprocess.CalledProcessError:
            # The master can answer all the same; that it never connects to the worker is not enforced then.
            ip("-n", self.master, "route", "add", "default", "via", GATEWAY_OUTSIDE)

    def _connect(self, one: str, address: str, other: str, its_address: str) -> None:
        end = f"e{one[-1]}{os.getpid()}"[:15]
        ip("link", "add", end, "netns", one, "type", "veth", "peer", "name", end, "netns", other)
        for name, own in ((one, address), (other, its_address)):
            ip("-n", name, "address", "add", f"{own}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")

    def run(self, name: str, *words: str) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", name, *words], check=True, capture_output=True, text=True, timeout=30
        )
        return done.stdout

    def start(self, name: str, log: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", name, *PROGRAM, *words],
                stdout=subprocess.DEVNULL,
                stderr=file,
                cwd=log.parent,
                env=os.environ | environment,
            )

    def remove(self) -> None:
        for name in (self.master, self.gateway, self.worker):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def networks() -> Iterator[Networks]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    made = Networks()
    try:
        made.make()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield made
    made.remove()


def wait_for(log: Path, pattern: str, *, times: int = 1, within: float = 20) -> None:
    """Return when so many lines of a log match."""
    # ``tail`` waits for the file, so that nothing is polled here.
    found = subprocess.run(
        [
            "timeout",
            str(within),
            "sh",
            "-c",
            f"tail -n +1 -F {log} 2>/dev/null | grep -m{times} -E '{pattern}'",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.count("\n") == times, (
        f"{pattern!r} is not in the log:\n{log.read_text() if log.exists() else ''}"
    )


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait(20)


def test_one_line_on_each_machine_joins_a_worker_behind_nat(networks: Networks, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    master_log, worker_log = tmp_path / "master.log", tmp_path / "worker.log"
    state = ("--state-dir", str(tmp_path / "master"))
    url = f"https://{MASTER}:8080"
    ca = ("--ca-file", str(tmp_path / "master" / "ca.pem"))
    master = networks.start(networks.master, master_log, "master", "8080", "--tls", "auto", *state)
    processes = [master]
    try:
        wait_for(master_log, "serving")
        line = networks.run(
            networks.master, *PROGRAM, "invite", "https://127.0.0.1:8080", "--name", "home", *state
        )
        assert re.fullmatch(r"trio-cluster worker --join tcj-[\w-]+\n", line)
        join = line.split()[1:]
        own = ("--app", "app:server", "--state-dir", str(tmp_path / "worker"))
        worker = networks.start(networks.worker, worker_log, *join, *own, MODELS="who")
        processes.append(worker)
        wait_for(worker_log, "registered with the master")
        body = '{"model": "who", "messages": [{"role": "user", "content": "?"}]}'
        # From the network of the worker, as a client there would ask.
        program = (
            "import ssl, sys, urllib.request as u; c = ssl.create_default_context(cafile=sys.argv[1]); "
            "r = u.Request(sys.argv[2], sys.argv[3].encode(), {'content-type': 'application/json'}); "
            "print(u.urlopen(r, context=c, timeout=10).read().decode())"
        )
        api_address = ("-c", program, str(tmp_path / "master" / "ca.pem"), f"{url}/v1/chat/completions", body)
        answer = networks.run(networks.worker, sys.executable, *api_address)
        assert f'"content":"{worker.pid}"' in answer.replace(" ", "")
        # The link is lost without a word, and comes back with what the worker keeps.
        worker.kill()
        worker.wait(10)
        again = networks.start(networks.worker, worker_log, "worker", *own, MODELS="who")
        processes.append(again)
        wait_for(worker_log, "connected to the master", times=2)
        end_state = networks.run(networks.master, *PROGRAM, "status", url, "--json", *ca)
        assert '"admitted": "certificate"' in end_state
        networks.run(networks.master, *PROGRAM, "revoke", "home", "https://127.0.0.1:8080", *state)
        assert again.wait(20) == 1
        assert "was revoked" in worker_log.read_text()
    finally:
        for process in reversed(processes):
            end(process)
    for secret in join[2], (tmp_path / "worker" / "membership.json").read_text():
        assert secret not in master_log.read_text() + worker_log.read_text()
