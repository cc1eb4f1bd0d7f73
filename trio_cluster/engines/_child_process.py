"""A program that runs beside this process: its group, its output, its end.

Theory of operation
===================

*No process is left behind.* The program gets a session and a process group of its own. Leaving the context ends the
whole group: SIGTERM, and SIGKILL for what is still there after the grace. If this process is killed, a guardian does
the same (``cluster/guardian.py``). The program is not executed before the guardian knows of its group: it is a shell
at first that waits for one line on its standard input, and ends if there is none because this process was killed.

*Output.* Standard output and standard error go into the log, a line each; of many lines at once some are left out. The
last ones are kept, for the error of a program that does not come up.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from trio_cluster.cluster.guardian import GroupGuardian
from trio_cluster.core.threads import thread_shortage
from trio_cluster.errors import ClusterError

__all__ = ["ChildProcess", "open_child"]

#: Executes the program, which is in its arguments, when it has read a line.
_LAUNCHER: Final = ("/bin/sh", "-c", 'read -r line || exit 125; exec "$@" </dev/null', "sh")
#: Lines of output that are kept, the characters of one at most, and what an error shows of them.
_KEPT_LINES: Final = 20
_LINE: Final = 400
_SHOWN_LINES: Final = 8
#: Lines of output in the log: at once after a quiet time, and in a second in the long run.
_BURST: Final = 50
_LINES_PER_SECOND: Final = 10
#: Seconds between two looks whether a group has ended.
_LOOK: Final = 0.05
_UNPRINTABLE: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[^\x20-\x7e\x80-\U0010ffff]")


class ChildProcess:
    """A program that runs. Made by :func:`open_child`.

    Attributes:
        pid: the number of the process, and of its group.
        ended: it has ended.
        output_ended: all of its output was read.
        how: how it has ended; empty before.
        on_end: called when it ends, with ``how``; may be replaced. Synchronous.
    """

    def __init__(self, process: trio.Process, name: str, logger: logging.Logger) -> None:
        self.pid = process.pid
        self.ended = trio.Event()
        self.output_ended = trio.Event()
        self.how = ""
        self.on_end: Callable[[str], None] = lambda how: None
        self._process = process
        self._name = name
        self._logger = logger
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._left = float(_BURST)
        self._counted = trio.current_time()
        self._dropped = 0

    def last_lines(self) -> str:
        """Return the last lines of its output, in one line. Synchronous."""
        return " | ".join(list(self._lines)[-_SHOWN_LINES:])

    async def wait(self) -> None:
        """Wait until it has ended, and report that. A checkpoint."""
        code = await self._process.wait()
        self.how = f"it has ended with code {code}" if code >= 0 else f"it was ended by {_signal_name(-code)}"
        self.ended.set()
        self.on_end(self.how)

    async def read_output(self) -> None:
        """Log its output until the end of it. A checkpoint."""
        stream, rest = self._process.stdout, b""
        assert stream is not None
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while piece := await stream.receive_some(65536):
                # Progress bars end their lines with a carriage return.
                *lines, rest = re.split(rb"[\r\n]+", rest + piece)
                for line in lines:
                    self._take(line)
                if len(rest) > 4 * _LINE:
                    self._take(rest)
                    rest = b""
        self._take(rest)
        self.output_ended.set()

    def _take(self, line: bytes) -> None:
        text = _UNPRINTABLE.sub("", line.decode("utf-8", "replace")).strip()
        if not text:
            return
        if len(text) > _LINE:
            text = text[:_LINE] + "..."
        self._lines.append(text)
        now = trio.current_time()
        self._left = min(_BURST, self._left + (now - self._counted) * _LINES_PER_SECOND)
        self._counted = now
        if self._left < 1:
            self._dropped += 1
            return
        self._left -= 1
        if self._dropped:
            self._logger.info("%s: (%d lines left out)", self._name, self._dropped)
            self._dropped = 0
        self._logger.info("%s: %s", self._name, text)

    async def end(self, grace: float) -> None:
        """End its whole group. A checkpoint; to be shielded from cancellation by the caller.

        Args:
            grace: seconds after which what is still there is killed.
        """
        if self._signal(signal.SIGTERM):
            with trio.move_on_after(grace):
                await self._process.wait()
                while self._signal(0):  # noqa: ASYNC110  (there is no event for the end of a group)
                    await trio.sleep(_LOOK)
            self._signal(signal.SIGKILL)
        await self._process.wait()

    def _signal(self, number: int) -> bool:
        """Send a signal to the group, and return whether it has processes."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@asynccontextmanager
async def open_child(
    command: Sequence[str],
    name: str,
    *,
    environment: Mapping[str, str],
    grace: float,
    logger: logging.Logger,
) -> AsyncIterator[ChildProcess]:
    """Run a program inside the context; leaving it ends the program and all processes of its group.

    A checkpoint. Cancellation ends them too.

    Args:
        command: the program and its arguments.
        name: for the log.
        environment: all of its environment.
        grace: seconds that it has to end when it is asked to.
        logger: where its output goes.

    Raises:
        ClusterError: it cannot be run; the message is one line.
    """
    guardian = GroupGuardian()
    # A cancellation does not reach the guardian: the program may take all of its grace to end, and this process may be
    # killed meanwhile.
    guarding = trio.CancelScope(shield=True)

    async def guard(*, task_status: trio.TaskStatus[None]) -> None:
        with guarding:
            await guardian.run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        try:
            with trio.CancelScope(shield=True):
                await nursery.start(guard)
            try:
                # Not interrupted by a cancellation before there is something that can be ended.
                process = await trio.lowlevel.open_process(
                    [*_LAUNCHER, *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except (OSError, RuntimeError, ValueError) as error:
                if isinstance(error, RuntimeError) and thread_shortage(error) is None:
                    raise
                raise ClusterError(f"{command[0]} cannot be run: {error}") from error
            guardian.end_with_us(process.pid, grace)
            child = ChildProcess(process, name, logger)
            try:
                nursery.start_soon(child.read_output)
                nursery.start_soon(child.wait)
                assert process.stdin is not None
                with suppress(trio.BrokenResourceError):
                    await process.stdin.send_all(b"\n")
                await process.stdin.aclose()
                yield child
            finally:
                with trio.CancelScope(shield=True):
                    await child.end(grace)
                guardian.forget(process.pid)
        finally:
            guarding.cancel(reason="the program has ended")
            nursery.cancel_scope.cancel(reason="the program has ended")
