"""The guardian of a process: a small process beside it, which notices when that one has ended, and does what is left.

For a worker, that is to tell its masters; for a node that has started other programs, to end these.

Theory of operation
===================

A worker that is killed with unread bytes leaves resets behind, as a link does that was cut. So its masters would wait
for it (``resume_window``). This program notices the end at once, and tells them.

It is run by its path (``python -I -S guardian_process.py PID``), imports nothing of this package, and of the standard
library as little as it can: it is there once for each guarded process, and does nothing for most of its life. Its
standard input is a pipe that only that process writes to. The process has ended when that pipe does; where a child of
it has inherited the other end, because it was forked without ``exec``, a descriptor of the process tells (a pidfd), or
that the guardian has another parent.

The lines of the pipe are commands, with fields between spaces. A field that may have any content is in hexadecimal
digits, and ``-`` if it is empty. A command that is not known is ignored.

- ``tell KEY SECONDS MANY HOST PORT REQUEST [NAME AUTHORITY FILE CERTIFICATE PROTOCOL]``: at the end, connect to an
  address and send a request, until it was answered or so many seconds have passed. ``MANY`` is 1 if different servers
  may answer there. The last five fields are there if the connection has TLS: the name of the server, the authorities to
  trust in place of those of the system, a file with authorities to trust besides, a private key with its certificate,
  and a protocol to ask for before HTTP.
- ``end KEY GROUP SECONDS``: at the end, end the processes of a group: ask them to end (SIGTERM), and kill those that
  are still there after so many seconds.
- ``forget KEY``: nothing is to be done any more.

Signals that end a process are ignored, so that Ctrl-C in a terminal, or a service manager that stops all processes of a
service, ends the guarded process first, and the guardian by that.
"""

from __future__ import annotations

import _socket
import _thread
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from typing import Any

__all__ = ["main"]

#: Seconds that one attempt may take.
PATIENCE = 3.0
#: Seconds between two attempts: at first, and at most.
PAUSE, LONGEST_PAUSE = 0.1, 1.0
#: Statuses after which another attempt makes no sense: the master has taken note, or it refuses to.
NOTED, REFUSED = 410, (400, 401, 403, 404, 405, 426)
#: The session is not known there. Where several servers may answer, another one may know it.
UNKNOWN, ATTEMPTS = 409, 8
#: Seconds between two looks at a group that is to end.
ENDING = 0.05
#: Seconds between two looks at the parent, where the end of a process cannot be waited for.
LOOK = 1.0


class Group:
    """A group of processes that must end.

    Args:
        fields: of the command, without its name and key.
    """

    def __init__(self, fields: list[str]) -> None:
        self.number = int(fields[0])
        self.seconds = float(fields[1])
        if self.number <= 1:
            raise ValueError(fields[0])

    def do(self) -> None:
        """End it. Blocks until that is done."""
        until = time.monotonic() + self.seconds
        try:
            os.killpg(self.number, signal.SIGTERM)
            while time.monotonic() < until:
                time.sleep(ENDING)
                os.killpg(self.number, 0)
            os.killpg(self.number, signal.SIGKILL)
        except OSError:
            # It has no processes any more.
            pass


class Target:
    """Whom to tell.

    Args:
        fields: of the command, without its name and key.
    """

    def __init__(self, fields: list[str]) -> None:
        self.seconds = float(fields[0])
        self.many = fields[1] == "1"
        self.address = (fields[2], int(fields[3]))
        self.request = bytes.fromhex(fields[4])
        self.server_name = ""
        self.context: ssl.SSLContext | None = None
        if len(fields) > 5:
            self.server_name = fields[5]
            self.context = make_context(*map(text_of, fields[6:10]))

    def do(self) -> None:
        """Tell it. Blocks until that is done, or hopeless."""
        until, pause, attempts = time.monotonic() + self.seconds, PAUSE, 0
        while True:
            try:
                status = self.ask()
            except ConnectionRefusedError:
                # No master listens there any more, unless a proxy is in front of it.
                status = 0 if self.many else UNKNOWN
            except (OSError, ValueError):
                status = 0
            attempts += 1
            if status == NOTED or status in REFUSED:
                return
            if status == UNKNOWN and (not self.many or attempts >= ATTEMPTS):
                return
            if time.monotonic() + pause > until:
                return
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def ask(self) -> int:
        """Send the request, and return the status of the answer."""
        family = _socket.AF_INET6 if ":" in self.address[0] else _socket.AF_INET
        connection: Any = None
        plain = _socket.socket(family, _socket.SOCK_STREAM)
        try:
            plain.settimeout(PATIENCE)
            plain.connect(self.address)
            connection = plain
            if self.context is not None:
                import socket

                # The descriptor belongs to the new object.
                plain = socket.socket(fileno=plain.detach())
                plain.settimeout(PATIENCE)
                connection = self.context.wrap_socket(plain, server_hostname=self.server_name)
            connection.sendall(self.request)
            answer = b""
            while b"\n" not in answer and len(answer) < 1024:
                piece = connection.recv(1024)
                if not piece:
                    break
                answer += piece
            words = answer.split(b"\n", 1)[0].split()
            return int(words[1]) if len(words) > 1 else 0
        finally:
            (connection or plain).close()


def text_of(field: str) -> str:
    """Return what is in a field; see above."""
    return "" if field == "-" else bytes.fromhex(field).decode()


def make_context(authority: str, ca_file: str, certificate: str, protocol: str = "") -> ssl.SSLContext:
    """Return what verifies a master, as ``security/contexts.py`` does for the worker.

    OpenSSL reads private keys from files only; this one is never on a disk where the system has files in memory.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authority:
        context.load_verify_locations(cadata=authority)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if ca_file:
        context.load_verify_locations(cafile=ca_file)
    if certificate:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("certificate")
            path = f"/proc/self/fd/{descriptor}"
        else:
            import tempfile

            descriptor, path = tempfile.mkstemp()
        try:
            os.write(descriptor, certificate.encode())
            context.load_cert_chain(path)
        finally:
            os.close(descriptor)
            if not path.startswith("/proc/"):
                os.unlink(path)
    context.set_alpn_protocols([protocol, "http/1.1"] if protocol else ["http/1.1"])
    return context


def obey(line: bytes, targets: dict[str, Target | Group]) -> None:
    """Obey one command. What cannot be read is ignored: there is nobody whom it could be reported to."""
    try:
        command, key, *fields = line.decode().split()
        if command == "tell":
            targets[key] = Target(fields)
        elif command == "end":
            targets[key] = Group(fields)
        elif command == "forget":
            targets.pop(key, None)
    except (OSError, ValueError, IndexError):
        pass


def watch(guarded: int) -> dict[str, Target | Group]:
    """Wait until the guarded process has ended, and return what is to be done."""
    targets: dict[str, Target | Group] = {}
    os.set_blocking(0, False)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    process = -1
    if hasattr(os, "pidfd_open"):
        try:
            process = os.pidfd_open(guarded)
            poll.register(process, select.POLLIN)
        except OSError:
            # It has ended already, or this system has none.
            process = -1
    rest = b""
    while True:
        ready = [descriptor for descriptor, _ in poll.poll(None if process >= 0 else LOOK * 1000)]
        ended = process in ready or os.getppid() != guarded
        # Also what it has written last.
        while True:
            try:
                data = os.read(0, 65536)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                return targets
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                obey(line, targets)
        if ended:
            return targets


def main() -> None:
    """Be the guardian of the process that is the argument."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    waiting = []
    for target in watch(int(sys.argv[1])).values():
        over = _thread.allocate_lock()
        over.acquire()

        def do(target: Target | Group = target, over: _thread.LockType = over) -> None:
            try:
                target.do()
            finally:
                over.release()

        try:
            _thread.start_new_thread(do, ())
        except RuntimeError:
            # There can be no further thread now.
            do()
        waiting.append(over)
    for over in waiting:
        over.acquire()


if __name__ == "__main__":
    main()
