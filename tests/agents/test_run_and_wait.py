"""What an agent runs does not end before its output has been read."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("run_and_wait.py")


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_program_ends_when_its_output_has_been_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text("print('all is well')\n")
    if kind == "pipe":
        ours, theirs = os.pipe()
    else:
        ours, theirs = (end.detach() for end in socket.socketpair())
    with subprocess.Popen([sys.executable, PROGRAM, "said.py"], cwd=tmp_path, stdout=theirs) as process:
        os.close(theirs)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        assert os.read(ours, 100) == b"all is well\n"
        assert process.wait(timeout=30) == 0
    os.close(ours)
