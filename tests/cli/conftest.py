"""Fixtures for the tests of the command line: a place to run it in, and a server that only records what it is asked."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from command_line import Main, Ran

from trio_cluster.cli import commands
from trio_cluster.options import ClusterMode
from trio_cluster.server import ClusterServer


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_logging: None) -> Iterator[Path]:
    """An empty current directory, an environment without this package's variables; undone afterwards."""
    for variable in [name for name in os.environ if name.startswith("TRIO_CLUSTER_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    interrupt = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, interrupt)
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def main(place: Path, capsys: pytest.CaptureFixture[str]) -> Main:
    def run(*argv: str) -> tuple[int, str, str]:
        code = commands.main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Ran]:
    """Replace the ``run*`` methods: they only record that they were called."""
    calls: list[Ran] = []

    def fake(method: str) -> Any:
        async def run(
            self: ClusterServer, *arguments: Any, tls: bool = False, task_status: Any, **named: Any
        ) -> ClusterMode:
            calls.append(Ran(method, arguments, self, tls, named))
            await trio.lowlevel.checkpoint()
            return ClusterMode.MASTER

        return run

    for method in ("run", "run_as_master", "run_as_worker", "run_as_member"):
        monkeypatch.setattr(ClusterServer, method, fake(method))
    return calls
