"""One protocol for every kind of connection: the HTTP server, the links and the watchdog know nothing else.

Theory of operation
===================

A :class:`ByteStream` is a connection that can also be used *without a task*. Waking a task costs more than everything
else that happens to a token, so what is called for each token reads and writes synchronously:
:meth:`ByteStream.try_write` and :meth:`ByteStream.read_nowait` do what can be done now. Tasks wait only where there is
something to wait for.

*What TLS needs.* Nothing here says that a byte of the stream is a byte on the socket; ``tls.py`` puts an
``ssl.SSLObject`` under this protocol, and three of its rules are there for that:

- Bytes may be ready although the descriptor is not readable, since a record that was read holds more of them than were
  asked for. That is :attr:`ByteStream.pending`, which is to be checked before waiting for the descriptor.
- Reading may have to write (a key update). What the socket does not take then is kept, and goes out before anything
  that is written later; the reader does not wait for it.
- Bytes that were encrypted cannot be taken back. So what :meth:`ByteStream.try_write` has not taken must come first in
  the next write: the stream may have encrypted it already, and counts it when its last ciphertext is with the kernel.

*What another thread may do.* While the event loop is blocked, the watchdog's thread writes to a link (``watchdog.py``).
It calls :meth:`ByteStream.try_write` under a lock that it shares with all other writers of that stream. A stream on
which reading and writing touch the same state, as a TLS stream does, needs a lock of its own between the two.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import attrs
import trio

__all__ = [
    "Address",
    "ByteStream",
    "DirectStream",
    "Listener",
    "PeerCertificate",
    "TcpListener",
    "TcpStream",
    "TlsSession",
    "closed_here",
    "sockets_of",
]

#: A host, numeric unless the network is simulated, and a port. What IPv6 adds to these two is left out.
Address: TypeAlias = tuple[str, int]

_NO_LINGER: Final = struct.pack("ii", 1, 0)
_CLOSED: Final = -1


@attrs.frozen
class PeerCertificate:
    """A certificate that was shown in a TLS handshake, and is from an authority that is trusted."""

    name: str
    """The common name of its subject."""
    serial: str
    """Its serial number, in lower case hexadecimal digits."""


@attrs.frozen
class TlsSession:
    """What a TLS handshake has agreed on."""

    version: str
    """For instance ``"TLSv1.3"``."""
    alpn: str | None
    """The protocol that was negotiated (ALPN); ``None``: the client offered none that the server speaks."""
    peer: PeerCertificate | None
    """The certificate that the peer has shown, verified; ``None``: it has shown none."""


class ByteStream(trio.abc.AsyncResource):
    """A connection over which bytes go in both directions.

    At most one task reads at a time, and at most one writes.

    Attributes:
        descriptor: becomes readable when there is something to read, so that many streams can be waited for together;
            ``None`` if only :meth:`read` can wait. Valid until the stream is closed.
        writes_directly: whether a fast path may be built on :meth:`try_write`, past the task that writes otherwise. The
            simulated network can turn this off.
        injectable: whether another thread may call :meth:`try_write` while the event loop is blocked.
        virtual_time: whether the time on this connection is the event loop's own, as in a simulation: no time passes
            for the peer while the loop is blocked.
        needs_handshake: whether :meth:`handshake` has to be awaited before the stream is used.
        tls: what a TLS handshake has agreed on; ``None`` on a connection without TLS, and before the handshake.
    """

    descriptor: int | None
    writes_directly: bool
    injectable: bool
    virtual_time: bool
    tls: TlsSession | None = None
    needs_handshake: bool = False

    @property
    @abstractmethod
    def pending(self) -> bool:
        """Whether :meth:`read_nowait` has something although the descriptor may not be readable."""

    async def handshake(self) -> None:
        """Do what has to be done before the first byte of content, if :attr:`needs_handshake`. A checkpoint then.

        Raises:
            trio.BrokenResourceError: it failed, or the connection broke; the stream is to be closed.
            trio.ClosedResourceError: this end was closed.
        """

    @property
    @abstractmethod
    def local_address(self) -> Address:
        """The address of this end.

        Raises:
            OSError: the connection is over.
        """

    @property
    @abstractmethod
    def peer_address(self) -> Address:
        """The address of the other end.

        Raises:
            OSError: the connection is over.
        """

    @abstractmethod
    async def read(self, limit: int) -> bytes:
        """Wait until there is something to read, and return it. A checkpoint. Cancelled, it loses nothing.

        Args:
            limit: bytes that may be returned at most; at least 1.

        Returns:
            What has arrived; empty at the end of the stream, and again and again after it.

        Raises:
            trio.BrokenResourceError: the connection is broken.
            trio.ClosedResourceError: this end was closed, before or while it waited.
            trio.BusyResourceError: another task reads.
        """

    @abstractmethod
    def read_nowait(self, limit: int) -> bytes:
        """Return what can be read now, as :meth:`read` does. Synchronous.

        Raises:
            trio.WouldBlock: nothing has arrived.
            trio.BrokenResourceError, trio.ClosedResourceError: as :meth:`read`.
        """

    @abstractmethod
    def try_write(self, data: bytes | bytearray | memoryview) -> int:
        """Write as much as can be written now. Synchronous.

        Args:
            data: must not be empty. It may be written even if :meth:`write` is waiting in a task; the two must not be
                mixed by the caller.

        Returns:
            How many bytes were taken, perhaps none. The rest must be what is written next, or nothing more.

        Raises:
            trio.BrokenResourceError: the connection is broken.
            trio.ClosedResourceError: this end was closed.
        """

    @abstractmethod
    async def wait_writable(self) -> None:
        """Wait until :meth:`try_write` can take something, or would raise an error. A checkpoint.

        Raises:
            trio.ClosedResourceError: this end was closed.
            trio.BusyResourceError: another task waits for the same.
        """

    @abstractmethod
    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data``. A checkpoint. Cancelled, it has written an unknown part of it.

        Raises:
            trio.BrokenResourceError: the connection is broken.
            trio.ClosedResourceError: this end was closed, or has sent its end of file.
            trio.BusyResourceError: another task writes.
        """

    @abstractmethod
    async def write_eof(self) -> None:
        """Let an end of file follow what was written; reading goes on. A checkpoint.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError: as :meth:`write`.
        """

    @abstractmethod
    def close(self) -> None:
        """Close this end. Synchronous, idempotent.

        What was written is still delivered; tasks that wait get ``trio.ClosedResourceError``.
        """

    @abstractmethod
    def abort(self) -> None:
        """Close this end so that the peer gets an error instead of an end of file. Synchronous, idempotent.

        The peer may not get all that was written.
        """

    async def aclose(self) -> None:
        """Close this end. A checkpoint, after closing."""
        self.close()
        await trio.lowlevel.checkpoint()


class Listener(trio.abc.Listener[ByteStream]):
    """A place where connections come in.

    Attributes:
        local_address: where that is.
        shares_descriptors: whether the streams have a ``descriptor``.
    """

    local_address: Address
    shares_descriptors: bool

    @abstractmethod
    def accept_nowait(self) -> ByteStream:
        """Return a connection that has come in already. Synchronous.

        Raises:
            trio.WouldBlock: none has.
            OSError: as ``accept`` does, which is to be called for a decision.
            trio.ClosedResourceError: the listener was closed.
        """

    @abstractmethod
    def limit_unread_time(self, seconds: float) -> None:
        """Have connections that are accepted from now on broken when the peer leaves bytes unread for so long.

        Where the system has such a limit; otherwise without effect. Synchronous.
        """

    @abstractmethod
    def close(self) -> None:
        """Listen no more. Synchronous, idempotent."""

    async def aclose(self) -> None:
        """Listen no more. A checkpoint, after closing."""
        self.close()
        await trio.lowlevel.checkpoint()


class DirectStream(ByteStream):
    """A stream whose waiting :meth:`write` is made of :meth:`try_write` and :meth:`wait_writable`."""

    def __init__(self) -> None:
        self._writing = False
        self._eof_sent = False

    @abstractmethod
    def _is_closed(self) -> bool:
        """Return whether this end was closed."""

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """See ``ByteStream``."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_writer()
        if self._eof_sent:
            raise trio.ClosedResourceError("this connection has sent its end of file")
        self._writing = True
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self.try_write(rest) :]
                if rest:
                    await self.wait_writable()
        finally:
            self._writing = False
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _check_writer(self) -> None:
        if self._is_closed():
            raise closed_here()
        if self._writing:
            raise trio.BusyResourceError("another task writes to this connection")


class TcpStream(DirectStream):
    """A TCP connection, or any other connected stream socket.

    Args:
        stream: closed with this one, and must not be used in any other way.
    """

    pending = False
    writes_directly = True
    injectable = True
    virtual_time = False

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__()
        self._socket = stream.socket
        # Kept, since asking a socket for its number costs a call each time.
        self.descriptor: int = self._socket.fileno()

    @property
    def local_address(self) -> Address:
        """See ``ByteStream``."""
        return _address(self._socket.getsockname())

    @property
    def peer_address(self) -> Address:
        """See ``ByteStream``."""
        return _address(self._socket.getpeername())

    async def read(self, limit: int) -> bytes:
        """See ``ByteStream``.

        It waits first and reads then: that is one system call, and one turn of the scheduler, less than to try first,
        and what comes token by token is hardly ever there already.
        """
        while True:
            if self.descriptor == _CLOSED:
                raise closed_here()
            await trio.lowlevel.wait_readable(self.descriptor)
            try:
                return os.read(self.descriptor, limit)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._failure(error) from error

    def read_nowait(self, limit: int) -> bytes:
        """See ``ByteStream``."""
        try:
            return os.read(self.descriptor, limit)
        except BlockingIOError:
            raise trio.WouldBlock from None
        except OSError as error:
            raise self._failure(error) from error

    def try_write(self, data: bytes | bytearray | memoryview) -> int:
        """See ``ByteStream``."""
        try:
            return os.write(self.descriptor, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._failure(error) from error

    async def wait_writable(self) -> None:
        """See ``ByteStream``."""
        if self.descriptor == _CLOSED:
            raise closed_here()
        await trio.lowlevel.wait_writable(self.descriptor)

    async def write_eof(self) -> None:
        """See ``ByteStream``."""
        await trio.lowlevel.checkpoint()
        self._check_writer()
        self._eof_sent = True
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise self._failure(error) from error

    def detach(self) -> socket.socket:
        """Return the socket, which is the caller's from now on; this stream is closed. Synchronous."""
        family, kind = self._socket.family, self._socket.type
        self.descriptor = _CLOSED
        return socket.socket(family, kind, fileno=self._socket.detach())

    def close(self) -> None:
        """See ``ByteStream``."""
        # The number may soon be another connection's.
        self.descriptor = _CLOSED
        self._socket.close()

    def abort(self) -> None:
        """See ``ByteStream``."""
        if self.descriptor != _CLOSED:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self.close()

    def _is_closed(self) -> bool:
        return self.descriptor == _CLOSED

    def _failure(self, error: OSError) -> Exception:
        if self.descriptor == _CLOSED:
            return closed_here()
        return trio.BrokenResourceError(f"socket connection broken: {error}")


class TcpListener(Listener):
    """A listening socket.

    Args:
        sock: closed with this listener.
        shared: other processes accept from the same socket. Then connections are taken one at a time, and each process
            gets its share of a crowd.

    Attributes:
        socket: as given.
    """

    shares_descriptors = True

    def __init__(self, sock: socket.socket, *, shared: bool = False) -> None:
        self._shared = shared
        self.local_address = _address(sock.getsockname())
        self.socket = self._socket = sock
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))

    async def accept(self) -> TcpStream:
        """Wait for a connection, and return it.

        Raises:
            OSError: there is no room for another connection, or the listener is broken.
            trio.ClosedResourceError: the listener was closed.
        """
        return TcpStream(await self._listener.accept())

    def accept_nowait(self) -> TcpStream:
        """See ``Listener``."""
        if self._shared:
            raise trio.WouldBlock
        # Trio's own socket gives all others a turn after each connection.
        try:
            accepted, _ = self._socket.accept()
        except BlockingIOError:
            raise trio.WouldBlock from None
        except OSError:
            if self._socket.fileno() == _CLOSED:
                raise closed_here() from None
            raise
        return TcpStream(trio.SocketStream(trio.socket.from_stdlib_socket(accepted)))

    def limit_unread_time(self, seconds: float) -> None:
        """See ``Listener``."""
        # Linux lets accepted sockets inherit it.
        if self._socket.family in (socket.AF_INET, socket.AF_INET6) and hasattr(socket, "TCP_USER_TIMEOUT"):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))

    def close(self) -> None:
        """See ``Listener``."""
        self._listener.socket.close()


def sockets_of(listeners: Sequence[Listener]) -> list[socket.socket]:
    """Return the listening sockets of TCP listeners; they still belong to these."""
    return [listener.socket for listener in listeners if isinstance(listener, TcpListener)]


def _address(name: tuple[Any, ...] | str | bytes) -> Address:
    if isinstance(name, (str, bytes)):
        # A socket of another family, which has a path or nothing.
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    host, port = name[:2]
    return host, port


def closed_here() -> trio.ClosedResourceError:
    """Return the error of what is done with a connection that was closed at this end."""
    return trio.ClosedResourceError("this connection has been closed")
