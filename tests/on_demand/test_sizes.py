"""Amounts of memory: as they are written, what the machine has, and what processes take."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from trio_cluster.core.sizes import format_size, parse_size
from trio_cluster.on_demand import memory
from trio_cluster.on_demand.memory import available_memory, group_memory, own_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 << 30),
        ("20 GiB", 20 << 30),
        ("20gib", 20 << 30),
        ("1.5GB", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("3kB", 3000),
        ("2TiB", 2 << 40),
        ("1024", 1024),
        (1024, 1024),
        ("7b", 7),
    ],
)
def test_sizes_are_parsed(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "20G", "GiB", "-1GiB", "0", 0, -5, True, 1.5, None, "20GiB5", "1e9", "99999TiB9"]
)
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="expected an amount of memory such as 20GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(5, "5 bytes"), (20 << 30, "20 GiB"), (1536, "1.5 KiB"), (3 << 40, "3 TiB")]
)
def test_sizes_are_shown(size: int, text: str) -> None:
    assert format_size(size) == text


def test_the_machine_has_memory_and_this_process_takes_some_of_it() -> None:
    size, where = available_memory()
    assert where == "RAM"
    assert 0 < own_memory() < size


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", limit)
    limit.write_text("max\n")
    total, _ = available_memory()
    limit.write_text("1000000\n")
    assert available_memory() == (900_000, "RAM")
    assert total > 900_000


def test_a_system_that_does_not_tell_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", fail)
    assert available_memory() == (math.inf, "RAM")


def test_the_processes_of_a_group_are_measured_together() -> None:
    program = "import subprocess, sys, time; print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert (1 << 20) < group_memory(process.pid) < (1 << 30)
        process.communicate()
    assert group_memory(process.pid) == 0


def test_gpus_come_first_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = types.ModuleType("pynvml")
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetCount = lambda: 2
    library.nvmlDeviceGetHandleByIndex = lambda index: index
    library.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=1000)
    library.nvmlDeviceGetComputeRunningProcesses = lambda handle: [
        types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=300),
        types.SimpleNamespace(pid=-1, usedGpuMemory=500),
    ]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert available_memory() == (2000, "GPU")
    assert group_memory(os.getpgrp()) == 600


def test_a_driver_that_fails_means_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = types.ModuleType("pynvml")
    library.nvmlInit = lambda: None

    def fail() -> int:
        raise RuntimeError("driver")

    library.nvmlDeviceGetCount = fail
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert available_memory()[1] == "RAM"
    assert group_memory(os.getpgrp()) > 0
