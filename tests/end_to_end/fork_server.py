"""A fork server for Python programs that tests start as real processes.

The imports of a node take half a second of computing, and tests start hundreds of nodes. So the first of these tests
starts a server, one for each pytest process: an interpreter that has imported the package, has run nothing, and has one
thread. It forks a copy of itself for every process that a test starts. The copy leads its own session, has the
directory, the environment and the standard streams that the test gives it, runs what ``python -W error`` would run with
the same arguments, and ends as an interpreter does: signals, exit codes, what it warns about when it ends, all of that
is real. Only imports have happened earlier. So this module's own tests, and a few in ``tests/cli``, start interpreters.

A request is a line of JSON on a socket, and three files with it (standard output, standard error, and a pipe). The
server writes the id of the new process into the pipe, and later its exit code, for only a parent can wait for a
process. The server ends when its socket is closed.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

__all__ = ["BlockingProcess", "ForkedProcess", "run", "start", "start_blocking"]

#: What a node would import: all that the command and programs import first, and what a master imports later.
_IMPORTS: Final = (
    "trio_cluster.cli.commands",
    "trio_cluster.cluster.probe",
    "trio_cluster.local.asyncio_handler",
    "trio_cluster.server_thread",
    "sqlalchemy.dialects.sqlite",
)
_NUMBER: Final = struct.Struct("i")


# In the test


class _Forked:
    """What is known of a process that the server has forked.

    Attributes:
        pid: its id.
    """

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self._status: int | None = status
        self._returncode: int | None = None

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; ``None`` while it runs."""
        self._poll(0)
        return self._returncode

    def _poll(self, timeout: float | None) -> None:
        """Wait until the server has written down the exit code, for at most so many seconds."""
        if self._status is not None and select.select([self._status], [], [], timeout)[0]:
            self._returncode = _read_number(self._status)
            os.close(self._status)
            self._status = None

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None:
            # The server may have waited for it already, and not have written down its exit code yet.
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


class ForkedProcess(_Forked):
    """A process that the server has forked: what tests use of ``trio.Process``.

    Attributes:
        stdout: a stream of its standard output, if the test asked for one.
        stderr: a stream of its standard error.
    """

    def __init__(self, pid: int, status: int, stdout: Any, stderr: Any) -> None:
        super().__init__(pid, status)
        self.stdout = stdout
        self.stderr = stderr

    async def wait(self) -> int:
        """Wait until it has ended, and return its exit code."""
        # The server itself imports no more than a node does, and this module is its program.
        import trio

        while (code := self.returncode) is None:
            assert self._status is not None
            await trio.lowlevel.wait_readable(self._status)
        return code


class BlockingProcess(_Forked):
    """A process that the server has forked: what tests without an event loop use of ``subprocess.Popen``."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, for at most so many seconds, and return its exit code."""
        self._poll(timeout)
        if self._returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self._returncode


class _Server:
    """A server of this pytest process.

    Args:
        root: the folder that the package is imported from.
        imports: what the server imports.
        warnings: the option ``-W`` of its interpreter.
    """

    def __init__(self, root: Path, imports: Sequence[str], warnings: str) -> None:
        self._socket, other = socket.socketpair()
        with other:
            environ = {
                name: value for name, value in os.environ.items() if not name.startswith("TRIO_CLUSTER_")
            }
            environ["PYTHONPATH"] = str(root)
            self._process = subprocess.Popen(
                [sys.executable, "-W", warnings, __file__, str(other.fileno()), *imports],
                pass_fds=[other.fileno()],
                env=environ,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def fork(
        self, words: Sequence[str], cwd: Path, environ: Mapping[str, str], output: int, errors: int
    ) -> tuple[int, int]:
        """Fork a process; return its id, and where its exit code will be read."""
        status, written = os.pipe()
        try:
            request = json.dumps([list(words), str(cwd), dict(environ)]).encode() + b"\n"
            socket.send_fds(self._socket, [request], [output, errors, written])
        finally:
            os.close(written)
        return _read_number(status), status

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


#: By the folder that each imports the package from.
_servers: dict[Path, _Server] = {}


def _fork(
    words: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    output: int,
    errors: int,
    old_package: Path | None = None,
) -> tuple[int, int]:
    """Have a server fork, which is started when it is first needed."""
    if old_package is None:
        import trio_cluster

        root, imports, warnings = Path(trio_cluster.__file__).parents[1], _IMPORTS, "error"
    else:
        # It is older than its libraries, so what these deprecate is no error there.
        root, imports, warnings = old_package, ("trio_cluster.cli",), "ignore"
    server = _servers.get(root)
    if server is None:
        server = _servers[root] = _Server(root, imports, warnings)
        atexit.register(server.close)
    return server.fork(words, cwd, env, output, errors)


def start_blocking(
    words: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: int, stderr: int
) -> BlockingProcess:
    """Start ``python -W error`` with these arguments, from a test without an event loop.

    Args:
        words: ``-m``, a module and its arguments, or a file and its arguments.
        cwd: the directory that it runs in.
        env: its whole environment.
        stdout: the file descriptor of its standard output; the caller's own stays open.
        stderr: the same for its standard error.
    """
    return BlockingProcess(*_fork(words, cwd, env, stdout, stderr))


def start(
    words: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    capture_stdout: bool = False,
    old_package: Path | None = None,
) -> ForkedProcess:
    """Start ``python -W error`` with these arguments.

    Args:
        words: ``-m``, a module and its arguments, or a file and its arguments.
        cwd: the directory that it runs in.
        env: its whole environment.
        capture_stdout: give it a pipe for its standard output, too, and not that of this process.
        old_package: the folder with the package of another version, which is run instead; its warnings are no errors.
    """
    import trio

    errors, written_errors = os.pipe()
    output, written_output = os.pipe() if capture_stdout else (None, os.dup(1))
    try:
        pid, status = _fork(words, cwd, env, written_output, written_errors, old_package)
    finally:
        os.close(written_output)
        os.close(written_errors)
    stdout = None if output is None else trio.lowlevel.FdStream(output)
    return ForkedProcess(pid, status, stdout, trio.lowlevel.FdStream(errors))


async def run(
    words: Sequence[str], *, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """Run ``python -W error`` with these arguments to its end, and return what it has written."""
    import trio

    process = start(words, cwd=cwd, env=env, capture_stdout=True)
    written: dict[str, bytes] = {}

    async def read(name: str, stream: Any) -> None:
        async with stream:
            written[name] = b"".join([data async for data in stream])

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "stdout", process.stdout)
            nursery.start_soon(read, "stderr", process.stderr)
        code = await process.wait()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
    return subprocess.CompletedProcess(list(words), code, written["stdout"], written["stderr"])


def _read_number(status: int) -> int:
    data = os.read(status, _NUMBER.size)
    assert len(data) == _NUMBER.size, "the fork server has ended"
    number: int = _NUMBER.unpack(data)[0]
    return number


# In the server


def serve(requests: socket.socket) -> list[str] | None:
    """Fork a process for each request; return the arguments in such a process, ``None`` in the server at its end."""
    statuses: dict[int, int] = {}
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    poll = select.poll()
    for each in (woken, requests.fileno()):
        poll.register(each, select.POLLIN)
    while True:
        ready = {number for number, _ in poll.poll()}
        if woken in ready:
            os.read(woken, 4096)
            _reap(statuses)
        if requests.fileno() not in ready:
            continue
        data, files, _, _ = socket.recv_fds(requests, 65536, 3)
        while data and not data.endswith(b"\n"):
            data += requests.recv(65536)
        if not data:
            return None
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            words, cwd, environ = json.loads(data)
            os.setsid()
            os.dup2(files[0], 1)
            os.dup2(files[1], 2)
            highest = max(wake, requests.detach(), *files, *statuses.values())
            os.closerange(3, highest + 1)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environ)
            arguments: list[str] = words
            return arguments
        output, errors, status = files
        os.close(output)
        os.close(errors)
        os.write(status, _NUMBER.pack(pid))
        statuses[pid] = status


def _reap(statuses: dict[int, int]) -> None:
    """Write down the exit codes of the processes that have ended."""
    while statuses:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        written = statuses.pop(pid)
        try:
            os.write(written, _NUMBER.pack(os.waitstatus_to_exitcode(status)))
        except BrokenPipeError:
            pass  # No test waits for it any more.
        finally:
            os.close(written)


def become(words: list[str]) -> None:
    """Run what an interpreter with these arguments runs."""
    sys.path[0] = os.getcwd()
    # The streams of the server have kept what kind of file they were opened on.
    sys.stdout = sys.__stdout__ = _opened_again(sys.stdout, 1, buffering=-1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _opened_again(sys.stderr, 2, buffering=1)  # type: ignore[misc]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _opened_again(stream: Any, number: int, buffering: int) -> Any:
    return open(number, "w", buffering, encoding=stream.encoding, errors=stream.errors, closefd=False)


if __name__ == "__main__":
    for _name in sys.argv[2:]:
        __import__(_name)
    # Otherwise each of the processes would go through all that was imported when it ends, and copy it by doing so.
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as _requests:
        _words = serve(_requests)
    if _words is not None:
        become(_words)
