"""A forked process does what an interpreter with the same arguments does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import fork_server
import pytest
import trio

pytestmark = pytest.mark.processes

PROGRAM: Final = """\
import atexit, os, signal, sys, threading, warnings

print(__name__, sys.argv, sys.path[0] == os.getcwd(), os.environ["WORD"], os.getsid(0) == os.getpid())
print(signal.getsignal(signal.SIGCHLD), signal.getsignal(signal.SIGINT), threading.active_count())
print(sorted(os.listdir("/proc/self/fd")) if sys.platform == "linux" else "", sys.stdin.read() == "")
print("beside", file=sys.stderr)
atexit.register(print, "over")
%s
"""

ENDS: Final = {
    "returns": "",
    "exits": "sys.exit(3)",
    "says why": "sys.exit('why')",
    "raises": "raise ValueError('no')",
    "warns": "warnings.warn('old', DeprecationWarning)",
    "leaves a file open": "file = open('left', 'w')",
    "is terminated": "os.kill(os.getpid(), signal.SIGTERM)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "is interrupted": "signal.raise_signal(signal.SIGINT)",
}


@pytest.mark.parametrize("end", ENDS)
async def test_a_forked_process_does_what_an_interpreter_does(end: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM % ENDS[end])
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environ["WORD"] = "word"
    for words in (["program.py", "a", "-b"], ["-m", "program", "a"]):
        started = await trio.run_process(
            [sys.executable, "-W", "error", *words],
            cwd=tmp_path,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            start_new_session=True,
        )
        forked = await fork_server.run(words, cwd=tmp_path, env=environ)
        assert forked.returncode == started.returncode
        assert forked.stdout == started.stdout
        assert without_frames(forked.stderr) == without_frames(started.stderr)


def without_frames(errors: bytes) -> list[bytes]:
    """Leave the frames out of tracebacks, for those of the server are among them."""
    return [line for line in errors.splitlines() if not line.startswith((b" ", b"Traceback"))]


async def test_processes_live_beside_each_other_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import sys\nprint('up', file=sys.stderr)\nsys.stdin.close()\nimport time\ntime.sleep(60)"
    )
    processes = [fork_server.start(["program.py"], cwd=tmp_path, env=os.environ) for _ in range(3)]
    for process in processes:
        assert await process.stderr.receive_some() == b"up\n"
        assert process.returncode is None
    processes[1].send_signal(signal.SIGTERM)
    assert await processes[1].wait() == -signal.SIGTERM
    assert processes[0].returncode is processes[2].returncode is None
    for process in processes:
        process.kill()
        await process.wait()
        assert await process.stderr.receive_some() == b""
        await process.stderr.aclose()
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert [process.returncode for process in processes] == [
        -signal.SIGKILL,
        -signal.SIGTERM,
        -signal.SIGKILL,
    ]
