"""The benchmarks run: in their quick form, which measures nothing but that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif("BENCHMARKS" not in os.environ, reason="the benchmarks are run by `nox -s bench`"),
]

BENCH = Path(__file__).parent.parent / "bench"

#: What is printed that nothing else prints.
PROGRAMS = {
    "relay": "a pipe on trio",
    "linger": "it adds",
    "cancellation": "live streams",
    "upstream": "x pipe",
    "bulk": "forwarded, down: vectors, from lists",
    "scale": "with replicas us",
    "limits": "limits, in memory and on disk",
    "on_demand": "all models together",
    "killed": "master killed 3 times, resume_window 15",
    "heal": "never two masters",
    "paper_scale": "on paper",
    "cuts": "client errors with cuts: 0",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_benchmark_runs(program: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    command = [sys.executable, str(BENCH / f"{program}.py"), "--quick", "--save", str(kept)]
    # Not what else this machine has: that is not ours to test.
    environment = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert PROGRAMS[program] in done.stdout
    assert json.loads(kept.read_text())


def test_the_plot_is_drawn_from_the_figures_that_are_kept(tmp_path: Path) -> None:
    rows = [
        {"streams": 1, "token us": 50.0, "KB/stream": 20.0},
        {"streams": 1000, "token us": 20.0, "KB/stream": 25.0},
    ]
    kept, picture = tmp_path / "kept.json", tmp_path / "picture.svg"
    kept.write_text(json.dumps({"streams": rows}))
    subprocess.run([sys.executable, str(BENCH / "plot.py"), str(kept), str(picture)], check=True, timeout=30)
    drawn = picture.read_text()
    assert drawn.startswith("<svg")
    assert "1000" in drawn
