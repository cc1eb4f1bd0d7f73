"""A guardian, from the side of the process that it guards: starts it, and keeps it informed what it has to do.

The guardian is a process of its own (``guardian_process.py``, which has the theory). It gets no descriptor of the
worker but the pipe of its commands, no directory, and no environment but what Python needs to start. It has a session
of its own, so that signals for the group of the worker do not reach it. A worker goes on without one if it cannot be
started.

Secrets go through the pipe, not through arguments, which everybody on the machine can read. What the guardian gets to
know is the proof that a session's process has ended, which cannot be used for anything else.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import attrs
import trio

from ..core.state_dir import path_of
from ..core.threads import thread_shortage
from ..link.websocket import request_of_end
from ..net.addressing import protocol_for
from ..net.streams import Address
from ..options import ClusterServerOptions
from ..protocol import WorkerSession, proof_of_end

__all__ = ["GroupGuardian", "Guardian", "Trust"]

logger = logging.getLogger("trio_cluster.guardian")

_PROGRAM: Final = Path(__file__).with_name("guardian_process.py")
#: What of the environment the guardian gets: where libraries are, and which authorities the system trusts.
_ENVIRONMENT: Final = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR")
#: Seconds that the guardian has to end with the worker. It does not need them, unless it has masters to tell.
_PATIENCE: Final = 1.0


@attrs.frozen
class Trust:
    """What a connection to a master needs besides its address, if it has TLS."""

    server_name: str | None = None
    """The name that the master's certificate must be for; ``None``: its host."""
    authority: str = ""
    """The authorities to trust in place of those of the system, in PEM."""
    certificate: str = attrs.field(default="", repr=False)
    """The private key and the certificate of the worker, in PEM."""


class _GuardianProcess:
    """The process of a guardian, and the commands that it has got. All methods but :meth:`run` are synchronous."""

    #: What follows if there is no guardian, for the log.
    _without: str

    def __init__(self) -> None:
        # By key, also until the guardian runs.
        self._commands: dict[str, str] = {}
        self._process: trio.Process | None = None
        self._failed = False

    @property
    def pid(self) -> int | None:
        """The number of its process; ``None`` while there is none."""
        return None if self._process is None else self._process.pid

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the guardian, and end it when this is cancelled, which leaves nothing of it behind. A checkpoint.

        What was not forgotten by then is done: links that were dropped, and not closed, are told, for instance.

        Args:
            task_status: ``started()`` is called when it runs, or cannot be started.
        """
        try:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-I", "-S", str(_PROGRAM), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,
            )
        except (OSError, RuntimeError, ValueError) as error:
            # Processes are started in a thread.
            if isinstance(error, RuntimeError) and thread_shortage(error) is None:
                raise
            self._fail(f"it cannot be started: {error}")
            task_status.started()
            return
        self._process = process
        try:
            for command in self._commands.values():
                self._write(command)
            task_status.started()
            await process.wait()
            self._fail("it has ended")
        finally:
            # Commands that come while it ends are too late, and are no failure.
            self._process = None
            self._pipe_of(process).close()
            with trio.CancelScope(shield=True):
                with trio.move_on_after(_PATIENCE):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    def _set(self, key: str, command: str) -> None:
        self._commands[key] = command
        self._write(command)

    def _forget(self, key: str) -> None:
        if self._commands.pop(key, None) is not None:
            self._write(f"forget {key}")

    def _write(self, command: str) -> None:
        if self._process is None or self._failed:
            return
        line = command.encode() + b"\n"
        try:
            # It does not block. A pipe holds some of the longest commands, and the guardian reads at once.
            written = os.write(self._pipe_of(self._process).fileno(), line)
        except OSError as error:
            self._fail(f"it does not read: {error.strerror}")
        else:
            if written < len(line):
                self._fail("it does not read")

    @staticmethod
    def _pipe_of(process: trio.Process) -> trio.lowlevel.FdStream:
        assert isinstance(process.stdin, trio.lowlevel.FdStream)
        return process.stdin

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("no guardian: %s; %s", why, self._without)


class GroupGuardian(_GuardianProcess):
    """A guardian that ends the processes of groups when this process has ended. See ``_GuardianProcess``."""

    _without = "if this process is killed, the programs that it has started may go on"

    def end_with_us(self, group: int, seconds: float) -> None:
        """Let a group of processes be ended when this process ends.

        Args:
            group: its number.
            seconds: after which those that do not end are killed.
        """
        self._set(f"g{group}", f"end g{group} {group} {seconds:g}")

    def forget(self, group: int) -> None:
        """Leave a group alone from now on, since it has ended."""
        self._forget(f"g{group}")


class Guardian(_GuardianProcess):
    """The guardian of a worker, which tells its masters when this process has ended. See ``_GuardianProcess``.

    Args:
        options: read at the time of use.
    """

    _without = "if this process dies, masters may wait for it until resume_window is over"

    def __init__(self, options: ClusterServerOptions) -> None:
        super().__init__()
        self._options = options

    def tell_end_of(
        self,
        session: WorkerSession,
        host: str,
        address: Address,
        trust: Trust | None,
        *,
        proxied: bool,
        process: int | None = None,
    ) -> None:
        """Let a master be told when this process ends; replaces what was to be told for the same session.

        Args:
            session: with the master; nothing is to be told for one that cannot be resumed.
            host: the master's name, for the handshake.
            address: where the present connection leads to.
            trust: of a connection with TLS; ``None``: it has none.
            proxied: the way goes through a proxy.
            process: which process of the master has the session; ``None``: it is only one.
        """
        if not session.session_id:
            return
        proof = proof_of_end(session.session_id)
        request = request_of_end(host, proof, self._options.cluster_token, process)
        fields = [
            _key(session),
            f"{session.resume_window:g}",
            str(int(proxied)),
            address[0],
            str(address[1]),
            request.hex(),
        ]
        if trust is not None:
            ca_file = path_of(self._options.ca_file) if not trust.authority else None
            fields += [
                trust.server_name or host,
                _hex(trust.authority),
                _hex("" if ca_file is None else str(ca_file.absolute())),
                _hex(trust.certificate),
                _hex("" if process is None else protocol_for(process)),
            ]
        self._set(_key(session), " ".join(("tell", *fields)))

    def forget(self, session: WorkerSession) -> None:
        """Let nothing be told for a session: it is over, and its master knows."""
        self._forget(_key(session))


def _key(session: WorkerSession) -> str:
    return f"{id(session):x}"


def _hex(text: str) -> str:
    return text.encode().hex() or "-"
