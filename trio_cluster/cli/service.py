"""A node as a service: what it tells its service manager, and how it starts the process that takes its place.

``systemctl reload`` runs ``trio-cluster replace``, which asks the running master over the socket in its state directory
to start a successor, and waits for the outcome, so that the exit code is that of the reload. The master starts it
itself, since only the main process of a unit has its credentials, its watchdog and its place in the sandbox; what
``ExecReload=`` starts has not, on some versions of systemd. The command is the one of the running master, with
``--take-over``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import trio

from ..core.state_dir import default_state_dir, path_of
from ..net.handover import UnixHandovers
from ..net.service_manager import LAUNCHER, ServiceManager

__all__ = ["ServiceSuccessorStarter", "replace"]


class _StartedProcess:
    """See ``StartedSuccessor``. It is not a child of this process, which so cannot wait for it.

    Args:
        pid: its number.
        alive: a descriptor whose other end it has, and nobody else.
    """

    def __init__(self, pid: int, alive: int) -> None:
        self._pid = pid
        self._alive: int | None = alive

    @property
    def pid(self) -> int:
        return self._pid

    async def wait_ended(self) -> None:
        assert self._alive is not None
        await trio.lowlevel.wait_readable(self._alive)

    def close(self) -> None:
        if self._alive is not None:
            os.close(self._alive)
            self._alive = None


class ServiceSuccessorStarter:
    """See ``SuccessorStarter``.

    Args:
        manager: of the service.
        command: of this process, which its successor gets, too.
    """

    def __init__(self, manager: ServiceManager, command: Sequence[str]) -> None:
        self._manager = manager
        self._command = list(command)
        if "--take-over" not in self._command:
            self._command.append("--take-over")

    async def start(self) -> _StartedProcess:
        """See ``SuccessorStarter``. A checkpoint."""
        alive, other_end = os.pipe()
        try:
            try:
                await trio.run_process(
                    [sys.executable, "-c", LAUNCHER, str(other_end), *self._command],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(other_end,),
                    env={**os.environ, **self._manager.variables},
                )
            except subprocess.CalledProcessError as error:
                raise OSError(None, f"exit code {error.returncode}") from error
            finally:
                os.close(other_end)
            # It was written before the launcher ended.
            return _StartedProcess(int(os.read(alive, 32)), alive)
        except BaseException:
            os.close(alive)
            raise

    def hand_over(self, pid: int) -> None:
        """See ``SuccessorStarter``. Synchronous."""
        self._manager.hand_over(pid)


def replace(state_dir: str | None, port: int) -> int:
    """Have the running master on a port of this machine start a process that takes its place.

    Args:
        state_dir: the option.
        port: of its API.

    Raises:
        TakeOverFailed: it goes on, or there is none.
        StateDirError: it is not known where it would be.
    """
    from ..cluster.replacement import SOCKET_NAME, ask_to_replace

    directory = path_of(state_dir) or default_state_dir(os.environ, f"master-{port}")
    pid = trio.run(ask_to_replace, UnixHandovers(), directory / SOCKET_NAME)
    print(f"the new process {pid} serves on port {port}; the one before finishes its answers and ends")
    return 0
