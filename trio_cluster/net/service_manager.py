"""What a node tells the service manager that has started it, over the protocol of systemd (``sd_notify``).

Theory of operation
===================

The manager names a datagram socket in ``NOTIFY_SOCKET``. A message is one datagram of lines ``NAME=value``. Messages
count only if they come from the service's *main process* (``NotifyAccess=main``, the strictest setting that there is),
which the manager knows by the credentials that the kernel puts beside each datagram.

*Liveness.* If the unit has ``WatchdogSec``, ``WATCHDOG_USEC`` says how long the service may be silent. The pings are
sent by a task of the event loop, and not by a thread: a loop that is stuck is to be noticed, and a thread would go on.
They are sent three times in that time, from :meth:`ServiceManager.ready` on, since the manager counts from there.

*Another process takes over.* The manager watches one process. So the one that it watches says which one comes next
(``MAINPID``), and is silent from then on; messages of the new one that arrive before count for nothing, so it waits for
a moment before it sends the first. The manager hears of the end of a process that is not its child only if it is the
reaper of orphans for it, and asks whose child it is when it is named. So a successor is started through a process
between, which ends at once (:data:`LAUNCHER`), and is the manager's child by then.

The variables are taken out of the environment, so that programs that a node starts, such as model servers, do not take
them for their own. A successor is given them again (:meth:`ServiceManager.variables`).
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Final

import trio

__all__ = ["LAUNCHER", "PREDECESSOR", "ServiceManager"]

logger = logging.getLogger("trio_cluster.service")

#: The variable with the number of the process that has started this one to take its place. Not one that begins as the
#: options do.
PREDECESSOR: Final = "_TRIO_CLUSTER_PREDECESSOR"

#: A program that starts another one, which is then nobody's child, and writes its number to a descriptor. Its
#: arguments: the descriptor, which the other program has open, too, and the command.
LAUNCHER: Final = """\
import os, sys
pid = os.fork()
if pid:
    os.write(int(sys.argv[1]), b"%d\\n" % pid)
    os._exit(0)
os.setsid()
os.execv(sys.argv[2], sys.argv[2:])
"""

#: Pings in the time in which one is needed.
_PINGS: Final = 3
#: Seconds between two tries to send what the manager had no room for.
_RETRY: Final = 1.0
#: Seconds that a successor waits until the manager knows that it is the main process.
_SETTLE: Final = 1.0


class ServiceManager:
    """The manager of the service of which this process is the main one.

    Args:
        address: of its socket: a path, or a name that begins with ``@``.
        watchdog: seconds for which this process may be silent; ``None``: as long as it likes.
        predecessor: the process whose place this one takes, and which is the main process until then; ``None``: there
            is none.
    """

    def __init__(self, address: str, watchdog: float | None = None, predecessor: int | None = None) -> None:
        self._address = address
        self._watchdog = watchdog
        self._predecessor: int | None = None
        if predecessor is not None and hasattr(os, "pidfd_open"):
            # Opened now, while it certainly runs: its number may be another process's later.
            with suppress(OSError):
                self._predecessor = os.pidfd_open(predecessor)
        self._succeeds = predecessor is not None
        self._unsent: deque[str] = deque()
        self._ready = trio.Event()
        # Set when something is left to be sent.
        self._wake = trio.Event()
        self._status = ""
        self._is_main = True
        self._has_failed = False

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str], pid: int) -> ServiceManager | None:
        """Return the manager that the environment names, and take its variables out of it. Synchronous.

        Args:
            environ: ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` count, and :data:`PREDECESSOR`.
            pid: of this process; a watchdog for another one does not count.

        Returns:
            ``None`` if there is no manager, or its socket is of a kind that is not supported.
        """
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds = environ.pop("WATCHDOG_USEC", "")
        watched = environ.pop("WATCHDOG_PID", str(pid))
        predecessor = environ.pop(PREDECESSOR, "")
        if not address.startswith(("/", "@")):
            return None
        is_watched = microseconds.isdecimal() and int(microseconds) > 0 and watched == str(pid)
        return cls(
            address,
            int(microseconds) / 1_000_000 if is_watched else None,
            int(predecessor) if predecessor.isdecimal() else None,
        )

    @property
    def variables(self) -> Mapping[str, str]:
        """What a process needs in its environment that is going to take the place of this one."""
        found = {"NOTIFY_SOCKET": self._address, PREDECESSOR: str(os.getpid())}
        if self._watchdog is not None:
            found["WATCHDOG_USEC"] = str(round(self._watchdog * 1_000_000))
        return found

    @property
    def is_main(self) -> bool:
        """Whether this process is still the main one, as far as it knows."""
        return self._is_main

    async def run(self) -> None:
        """Show that the event loop runs, from :meth:`ready` on, until cancelled."""
        await self._ready.wait()
        if self._succeeds:
            await trio.sleep(_SETTLE)
            self._succeeds = False
            self._flush()
        while self._is_main or self._unsent:
            if self._watchdog is not None and not self._unsent:
                self._send("WATCHDOG=1")
            self._flush()
            self._wake = trio.Event()
            pause = math.inf if self._watchdog is None else self._watchdog / _PINGS
            if self._unsent:
                await trio.sleep(min(_RETRY, pause))
            else:
                with trio.move_on_after(pause):
                    await self._wake.wait()
        await trio.sleep_forever()

    def ready(self, status: str) -> None:
        """The service is up. Synchronous.

        Args:
            status: one line for people.
        """
        self._status = status
        self._send(f"READY=1\nSTATUS={status}")
        self._ready.set()

    def reloading(self) -> None:
        """The service reads its configuration again, until :meth:`reloaded`. Synchronous."""
        if self._ready.is_set():
            # The time is what `Type=notify-reload` asks for.
            now = time.monotonic_ns() // 1000
            self._send(f"RELOADING=1\nMONOTONIC_USEC={now}\nSTATUS=reading the configuration")

    def reloaded(self) -> None:
        """The service has done so. Synchronous."""
        if self._ready.is_set():
            self.ready(self._status)

    def stopping(self) -> None:
        """The service is being stopped. Synchronous."""
        self._send("STOPPING=1\nSTATUS=finishing requests")

    def hand_over(self, pid: int) -> None:
        """Another process is the main one from now on, and this one says nothing more. Synchronous."""
        self._send(f"MAINPID={pid}")
        self._is_main = False

    async def wait_predecessor(self) -> None:
        """Wait until the process has ended whose place this one has taken. A checkpoint."""
        if self._predecessor is None:
            await trio.lowlevel.checkpoint()
            return
        # A process descriptor is readable when its process has ended.
        await trio.lowlevel.wait_readable(self._predecessor)

    def close(self) -> None:
        """Give back what is open. Synchronous, idempotent."""
        if self._predecessor is not None:
            os.close(self._predecessor)
            self._predecessor = None

    def _send(self, message: str) -> None:
        if self._is_main:
            self._unsent.append(message)
            self._flush()

    def _flush(self) -> None:
        if self._succeeds or not self._unsent:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                while self._unsent:
                    sock.sendto(self._unsent[0].encode(), address)
                    self._unsent.popleft()
        except BlockingIOError:
            # The manager is busy; `run` tries again.
            self._wake.set()
        except OSError as error:
            self._unsent.clear()
            if not self._has_failed:
                self._has_failed = True
                logger.warning("the service manager cannot be told anything: %s", error.strerror or error)
