"""How long auto mode is without an answer when its master is killed, and whether there are ever two masters.

Four processes of ``trio-cluster run`` serve the same model on one port. The master is killed with SIGKILL, again and
again; a client asks until it has an answer from another process. Each process that was killed is started anew. The
master is who answers at ``/cluster/status`` with ``"mode": "master"``; a process says in its log when it has taken the
ports, which must be exactly one after each kill.

    python bench/heal.py [--kills 100] [--processes 4] [--quick] [--save FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

APP = """\
import os
from trio_cluster import ClusterServer
server = ClusterServer()
server.register_chat("who", lambda request: str(os.getpid()))
"""
PROMOTED = "the master has gone"


def free_port() -> int:
    while True:
        port = random.randrange(12_000, 31_000)
        try:
            for each in (port, port + 1000):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", each))
        except OSError:
            continue
        return port


class Processes:
    """The processes on one port, each with a log of its own."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory, self.port = directory, port
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.logs: list[Path] = []
        (directory / "app.py").write_text(APP)

    def start(self) -> None:
        log = self.directory / f"{len(self.logs)}.log"
        self.logs.append(log)
        words = [sys.executable, "-m", "trio_cluster", "run", str(self.port), "--host", "127.0.0.1"]
        words += [
            "--app",
            "app:server",
            "--on-conflict",
            "replicate",
            "--state-dir",
            str(self.directory / "state"),
        ]
        with log.open("wb") as stream:
            process = subprocess.Popen(words, cwd=self.directory, stderr=stream, stdin=subprocess.DEVNULL)
        self.running[process.pid] = process

    def promotions(self) -> int:
        return sum(log.read_text(errors="replace").count(PROMOTED) for log in self.logs)

    def get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON of an answer; ``None`` if there was none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return json.load(response)
        except (OSError, urllib.error.URLError, ValueError):
            return None

    def ask(self) -> int | None:
        body = {"model": "who", "messages": [{"role": "user", "content": "?"}]}
        answer = self.get("/v1/chat/completions", body)
        return None if answer is None else int(answer["choices"][0]["message"]["content"])

    def master(self) -> int:
        """Wait until all processes are together, and return the process that has the ports."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            status = self.get("/cluster/status")
            if status is not None and len(status["workers"]) == len(self.running) - 1:
                workers = {worker["id"].split("-")[-2] for worker in status["workers"]}
                (pid,) = [pid for pid in self.running if str(pid) not in workers]
                return pid
            time.sleep(0.02)
        raise SystemExit("the processes do not find each other")


def measure(kills: int, count: int) -> list[float]:
    """Return, for each kill, the seconds until the next answer."""
    times = []
    with tempfile.TemporaryDirectory() as directory:
        processes = Processes(Path(directory), free_port())
        try:
            for _ in range(count):
                processes.start()
            for number in range(kills):
                master = processes.master()
                victim = processes.running.pop(master)
                before = processes.promotions()
                began = time.monotonic()
                os.kill(master, signal.SIGKILL)
                while processes.ask() in (None, master):
                    time.sleep(0.002)
                times.append(time.monotonic() - began)
                victim.wait()
                processes.master()
                promoted = processes.promotions() - before
                if promoted != 1:
                    raise SystemExit(f"kill {number}: {promoted} processes have taken the ports")
                processes.start()
        finally:
            for process in processes.running.values():
                process.kill()
                process.wait()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    times = sorted(measure(3 if arguments.quick else arguments.kills, arguments.processes))
    row = {
        "kills": len(times),
        "p50 ms": round(statistics.median(times) * 1000),
        "p99 ms": round(times[min(len(times) - 1, int(len(times) * 0.99))] * 1000),
        "max ms": round(times[-1] * 1000),
    }
    print(f"{row['kills']} kills of the master: the next answer after {row['p50 ms']} ms (p50), "
          f"{row['p99 ms']} ms (p99), {row['max ms']} ms (max); never two masters")  # fmt: skip
    if arguments.save:
        arguments.save.write_text(json.dumps({"heal": [row]}))


if __name__ == "__main__":
    main()
