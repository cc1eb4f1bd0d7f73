"""A Unix socket between two processes of one user, over which listening sockets are handed over.

A process waits at a path (:func:`listen_at`), another one connects to it (:func:`connect_to`). Both ends check that
the other one belongs to the same user: the path is in a directory of that user, the socket may be connected to by its
owner only, and the kernel says who is at the other end (``SO_PEERCRED``, on Linux).

What is sent are lines of JSON; a line may have open sockets with it, which the receiver owns from then on. The sender
keeps its own, so both processes have the same sockets then, with one queue of connections.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from .streams import Listener, TcpListener, sockets_of

__all__ = [
    "Channel",
    "Handle",
    "HandoverChannel",
    "Handovers",
    "OtherUser",
    "UnixHandovers",
    "Waiting",
    "connect_to",
    "listen_at",
]

#: Bytes of a line. The longest one names all models of all workers.
_LINE_MAX: Final = 16 * 1024 * 1024
#: Sockets that may come with one piece of what is received.
_SOCKETS_MAX: Final = 64
_RECEIVE: Final = 64 * 1024
_INT: Final = struct.calcsize("i")
#: Bytes of a path that fit into the address of a Unix socket on every system.
_PATH_MAX: Final = 100


class Handle(Protocol):
    """What stands for a listener while it is handed over: its socket."""

    def close(self) -> None:
        """Listen no more, in this process. Synchronous, idempotent."""
        ...


class Channel(Protocol):
    """One end of a connection between two processes; see :class:`HandoverChannel`."""

    async def send(self, line: bytes, handles: Sequence[Any] = (), /) -> None:
        """Send a line, and handles with it. A checkpoint. Raises ``OSError`` if the connection is broken."""
        ...

    async def receive(self) -> tuple[bytes, Sequence[Handle]] | None:
        """Return the next line, and the handles that came with it; ``None`` at the end. A checkpoint."""
        ...

    def close(self) -> None:
        """Close this end. Synchronous, idempotent."""
        ...


class Waiting(Protocol):
    """A process that waits for others, at a path."""

    async def accept(self) -> Channel:
        """Wait for a process, and return a connection to it. A checkpoint.

        Raises:
            OtherUser: a process has come that is not let in.
            OSError: no process can come any more.
        """
        ...

    def close(self) -> None:
        """Wait no more. Synchronous."""
        ...


class Handovers(Protocol):
    """How the processes of a machine hand over what they listen with."""

    @property
    def directory(self) -> Path | None:
        """Where they meet if they have no state directory; ``None``: then they do not."""
        ...

    @property
    def pid(self) -> int:
        """The number of this process."""
        ...

    def listen(self, path: Path) -> Waiting:
        """Wait for others at a path, in the place of whatever was there. Synchronous. Raises ``OSError``."""
        ...

    async def connect(self, path: Path) -> Channel:
        """Connect to the process that waits at a path; see :func:`connect_to`. A checkpoint."""
        ...

    def handles_of(self, listeners: Sequence[Listener]) -> Sequence[Handle]:
        """Return what can be handed over of listeners, which still belongs to them. Synchronous."""
        ...

    def listeners_of(self, handles: Sequence[Any]) -> Sequence[Listener]:
        """Return listeners with handles from another process, which belong to them from then on. Synchronous."""
        ...


class UnixHandovers:
    """Over Unix sockets. See :class:`Handovers`."""

    directory: Path | None = None

    @property
    def pid(self) -> int:
        """See ``Handovers``."""
        return os.getpid()

    def listen(self, path: Path) -> Waiting:
        """See ``Handovers``."""
        return _UnixWaiting(listen_at(path))

    async def connect(self, path: Path) -> Channel:
        """See ``Handovers``."""
        return await connect_to(path)

    def handles_of(self, listeners: Sequence[Listener]) -> Sequence[socket.socket]:
        """See ``Handovers``."""
        return sockets_of(listeners)

    def listeners_of(self, handles: Sequence[socket.socket]) -> Sequence[Listener]:
        """See ``Handovers``."""
        return [TcpListener(sock) for sock in handles]


class _UnixWaiting:
    """See :class:`Waiting`."""

    def __init__(self, sock: socket.socket) -> None:
        self._listener = trio.socket.from_stdlib_socket(sock)

    async def accept(self) -> Channel:
        accepted, _ = await self._listener.accept()
        try:
            return HandoverChannel(accepted)
        except OtherUser:
            accepted.close()
            raise
        except OSError as error:
            accepted.close()
            raise OtherUser(error.errno, error.strerror or str(error)) from error

    def close(self) -> None:
        self._listener.close()


class OtherUser(OSError):
    """The process at the other end belongs to another user."""


def listen_at(path: Path) -> socket.socket:
    """Wait for connections at a path, in the place of whatever was there. Synchronous.

    Raises:
        OSError: that is not possible.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        sock.setblocking(False)
        with suppress(FileNotFoundError):
            temporary.unlink()
        with _short(temporary) as short:
            sock.bind(short)
        temporary.chmod(0o600)
        sock.listen(8)
        # The place is never empty, and what was there before is not disturbed: its owner may have been replaced.
        temporary.replace(path)
    except BaseException:
        sock.close()
        with suppress(OSError):
            temporary.unlink()
        raise
    return sock


async def connect_to(path: Path) -> HandoverChannel:
    """Connect to the process that waits at a path. A checkpoint.

    Raises:
        FileNotFoundError, ConnectionRefusedError: no process waits there.
        OtherUser: it belongs to another user.
        OSError: it cannot be reached for another reason.
    """
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as short:
            await sock.connect(short)
        return HandoverChannel(sock)
    except BaseException:
        sock.close()
        raise


class HandoverChannel:
    """One end of a connection between two processes.

    Args:
        sock: connected; closed with this.

    Raises:
        OtherUser: the process at the other end belongs to another user. The socket is not closed.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        _check_user(sock)
        self._socket = sock
        self._received = bytearray()
        self._sockets: list[socket.socket] = []
        self._sending = trio.Lock()

    async def send(self, line: bytes, sockets: Sequence[socket.socket] = ()) -> None:
        """Send a line. A checkpoint. Cancelled, it may have sent a part, and nothing more may be sent.

        Args:
            line: without the line break.
            sockets: go with it.

        Raises:
            OSError: the connection is broken.
        """
        data = memoryview(line + b"\n")
        async with self._sending:
            if sockets:
                handles = [sock.fileno() for sock in sockets]
                rights = struct.pack(f"{len(handles)}i", *handles)
                data = data[
                    await self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]) :
                ]
            while data:
                data = data[await self._socket.send(data) :]

    async def receive(self) -> tuple[bytes, list[socket.socket]] | None:
        """Return the next line, and the sockets that came with it or before it; ``None`` at the end. A checkpoint.

        Raises:
            OSError: the connection is broken, or the line is too long.
        """
        while True:
            line, found, rest = self._received.partition(b"\n")
            if found:
                self._received = rest
                sockets, self._sockets = self._sockets, []
                return bytes(line), sockets
            if len(self._received) > _LINE_MAX:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            room = socket.CMSG_SPACE(_SOCKETS_MAX * _INT)
            data, ancillary, _, _ = await self._socket.recvmsg(_RECEIVE, room)
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    count = len(content) // _INT
                    handles = struct.unpack(f"{count}i", content[: count * _INT])
                    self._sockets += [socket.socket(fileno=handle) for handle in handles]
            if not data:
                return None
            self._received += data

    def close(self) -> None:
        """Close this end, and sockets that were received and not returned. Synchronous, idempotent."""
        self._socket.close()
        for sock in self._sockets:
            sock.close()
        self._sockets = []


def _check_user(sock: trio.socket.SocketType) -> None:
    """Make sure that the other end belongs to the user of this process.

    Where the kernel does not say, the rights of the socket's file have to do.
    """
    if hasattr(socket, "SO_PEERCRED"):
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 3 * _INT)
        _, user, _ = struct.unpack("3i", credentials)
        if user != os.geteuid():
            raise OtherUser(errno.EPERM, f"the process at the other end belongs to user {user}")


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """Give a path in a form that fits into the address of a Unix socket, within a block."""
    if len(os.fsencode(path)) <= _PATH_MAX or not Path("/proc/self/fd").exists():
        yield str(path)
        return
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}/{path.name}"
    finally:
        os.close(handle)
