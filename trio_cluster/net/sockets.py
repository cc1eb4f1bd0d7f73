"""The network as a node uses it: ports to listen on, and connections to make.

Ports are bound before anything else happens, so that a port that is in use is reported at once. A master needs two
ports that lie 1000 apart. Both are bound, and listen, before the first request is served. So a second process that
finds the first port taken may take the answer on the second one as final.

A node uses a :class:`Network`; :class:`Sockets` is the real one, and tests use another, whose time and failures they
control. The listeners and connections that a network returns are in ``streams.py``.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import trio

from ..core import randomness
from ..core.threads import thread_shortage
from ..errors import ClusterPortError
from .handover import Handovers, UnixHandovers
from .streams import ByteStream, Listener, TcpListener, TcpStream

__all__ = [
    "INTERNAL_OFFSET",
    "HandsOver",
    "Listeners",
    "Network",
    "Sockets",
    "check_addresses",
    "close_all",
    "is_refused",
    "local_address",
    "open_pair",
    "outward_address",
    "port_of",
    "receive_when_ready",
    "resolve",
    "shown_address",
    "why_not_connected",
]

#: The workers' port is the API's port plus this.
INTERNAL_OFFSET: Final = 1000

#: All listeners of one port: one for each address.
Listeners: TypeAlias = Sequence[Listener]

#: Clients that may connect at once; those over it try again after a second. The system may allow fewer.
_BACKLOG: Final = 4096
#: Seconds after which a machine that does not answer is asked anew. The bounds differ, so that workers whose master has
#: returned do not connect in the same instant.
_PATIENCE: Final = (2.0, 4.0)
#: How often it is asked at most: about two minutes, as long as the system would try.
_ATTEMPTS: Final = 40
#: Pairs of ports that are tried when both may be picked.
_TRIES: Final = 50


class Network(Protocol):
    """What a node needs of a network."""

    async def listen(self, host: str, port: int) -> Listeners:
        """Listen on every address of ``host``. A checkpoint.

        Args:
            host: a name or a numeric address; ``0.0.0.0`` and ``::`` are all addresses of their family.
            port: 0 picks a free one, the same for all addresses.

        Raises:
            ClusterPortError: the port cannot be opened; nothing is left open.
        """
        ...

    async def connect(self, host: str, port: int) -> ByteStream:
        """Connect to a listener. A checkpoint.

        Raises:
            ConnectionRefusedError: nothing listens there, on any of its addresses.
            OSError: it failed for another reason.
        """
        ...


@runtime_checkable
class HandsOver(Protocol):
    """A network whose listeners can be handed over to another process of the machine."""

    @property
    def handovers(self) -> Handovers:
        """How that is done."""
        ...


class Sockets:
    """The real network.

    Attributes:
        handovers: how listeners are handed over to another process.
    """

    handovers = UnixHandovers()

    async def listen(self, host: str, port: int) -> Listeners:
        """See ``Network``."""
        try:
            found = await trio.socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise ClusterPortError(port, f"cannot listen on '{host}': {error.strerror or error}") from error
        except RuntimeError as error:
            # Names are resolved in a thread.
            if thread_shortage(error) is None:
                raise
            raise ClusterPortError(port, f"cannot listen on '{host}': {error}") from error
        listeners: list[TcpListener] = []
        try:
            for family, kind, proto, _, address in dict.fromkeys(found):
                where: tuple[Any, ...] = address
                if port == 0 and listeners:
                    where = (address[0], port_of(listeners), *address[2:])
                listeners.append(TcpListener(_listen(family, kind, proto, where)))
        except OSError as error:
            close_all(listeners)
            taken = error.errno == errno.EADDRINUSE
            why = "in use by another process" if taken else os.strerror(error.errno or 0)
            raise ClusterPortError(port, f"cannot listen on '{host}': {why}", taken=taken) from error
        return listeners

    async def connect(self, host: str, port: int) -> ByteStream:
        """See ``Network``."""
        began = trio.current_time()
        try:
            # A name may take longer than the patience below, and would never be resolved if that counted.
            await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            resolving = trio.current_time() - began
            # A machine that is off does not answer, and the system asks it again after 1, 2, 4, 8 ... seconds. When it
            # is back, that would be noticed late. So this asks anew.
            for _ in range(_ATTEMPTS):
                with trio.move_on_after(resolving + randomness.uniform(*_PATIENCE)):
                    return TcpStream(await trio.open_tcp_stream(host, port))
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        except OSError as error:
            group = error.__cause__
            if isinstance(group, ExceptionGroup) and group.split(ConnectionRefusedError)[1] is None:
                # Trio's own error does not say what all of those have in common that it has gathered.
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)) from group
            raise
        except RuntimeError as error:
            # Names are resolved in a thread.
            if thread_shortage(error) is None:
                raise
            raise OSError(errno.EAGAIN, str(error)) from None


async def resolve(host: str) -> list[str]:
    """Return all numeric addresses of a host. A checkpoint.

    Raises:
        OSError: it has none, or they cannot be found out now.
    """
    try:
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except RuntimeError as error:
        # Names are resolved in a thread.
        if thread_shortage(error) is None:
            raise
        raise OSError(errno.EAGAIN, str(error)) from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def open_pair(
    network: Network, host: str, port: int, internal_host: str, internal_port: int | None
) -> tuple[Listeners, Listeners]:
    """Open a master's two ports. A checkpoint.

    Args:
        network: where to listen. host: the address of the API. port: the port of the API; 0 picks a free one.
        internal_host: the address for workers. internal_port: the port for workers. ``None`` is the API's port plus
        1000; if ``port`` is 0, both are picked again
            until a free pair is found.

    Raises:
        ClusterPortError: one of the ports cannot be opened; its ``port`` tells which, and nothing is left open.
    """
    last = port + INTERNAL_OFFSET
    if internal_port is None and last > 65535:
        raise ClusterPortError(last, f"no such port; choose one up to {65535 - INTERNAL_OFFSET} for the API")
    for attempts_left in reversed(range(_TRIES)):
        external = await network.listen(host, port)
        picked = port_of(external)
        try:
            if internal_port is not None:
                return external, await network.listen(internal_host, internal_port)
            if picked + INTERNAL_OFFSET <= 65535:
                return external, await network.listen(internal_host, picked + INTERNAL_OFFSET)
        except ClusterPortError:
            close_all(external)
            if port != 0 or internal_port is not None or not attempts_left:
                raise
        except BaseException:
            close_all(external)
            raise
        else:
            close_all(external)
    raise ClusterPortError(0, f"no two free ports that lie {INTERNAL_OFFSET} apart")


def port_of(listeners: Listeners) -> int:
    """Return the port that all of the listeners have."""
    return listeners[0].local_address[1]


async def check_addresses(sockets: Sequence[socket.socket], host: str, port: int) -> None:
    """Make sure that listening sockets from elsewhere are those that would be opened here. A checkpoint.

    Raises:
        ClusterPortError: they are not.
    """
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ClusterPortError(port, f"cannot listen on '{host}': {error.strerror or error}") from error
    wanted = {address[:2] for *_, address in found}
    given = {sock.getsockname()[:2] for sock in sockets}
    if wanted != given:
        shown = " and ".join(shown_address(*address) for address in sorted(given))
        raise ClusterPortError(
            port,
            f"the running process listens on {shown}, and this one is to listen on '{host}', port {port}; "
            "addresses cannot be changed by a take-over",
        )


def close_all(listeners: Listeners) -> None:
    """Close all listeners. Synchronous; harmless for those that are closed."""
    for listener in listeners:
        listener.close()


def why_not_connected(error: Exception) -> str:
    """Return in a few words why a connection could not be made.

    Args:
        error: what the attempt raised.
    """
    if isinstance(error, trio.TooSlowError):
        return "it does not answer"
    cause: BaseException = error
    # Trio tries several addresses, and raises the errors of all of them together. The first one is enough.
    if isinstance(cause, OSError) and cause.__cause__ is not None:
        cause = cause.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    reason = cause.strerror if isinstance(cause, OSError) else None
    return reason or str(cause) or type(cause).__name__


def is_refused(error: BaseException) -> bool:
    """Tell whether a connection could not be made because nothing listens there, on any address of the host.

    Args:
        error: what the attempt raised. Trio raises an error that was caused by those of all addresses.
    """
    if isinstance(error, BaseExceptionGroup):
        return all(is_refused(each) for each in error.exceptions)
    if isinstance(error, OSError) and error.__cause__ is not None:
        return is_refused(error.__cause__)
    return isinstance(error, ConnectionRefusedError)


def shown_address(host: str, port: int) -> str:
    """Return an address for people, logs and URLs: an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def local_address(host: str) -> str:
    """Return the host at which a process on this machine reaches a server that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def outward_address() -> str:
    """Return the address under which other machines most likely reach this one; its name if there is no network.

    It is the address that this machine would send from. Nothing is sent.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            # An address for documentation (RFC 5737), so that it is never in the same network.
            sock.connect(("192.0.2.1", 9))
            address: str = sock.getsockname()[0]
        except OSError:
            return socket.gethostname()
        return address


def _listen(family: int, kind: int, proto: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Otherwise "::" would take the port for IPv4 too, and "0.0.0.0" beside it would find it in use.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


async def receive_when_ready(sock: trio.socket.SocketType, most: int) -> bytes:
    """Wait until a socket has something to read, and return it. A checkpoint. Cancelled, it loses nothing.

    It waits first and reads then. That is one system call, and one turn of the scheduler, less than trio's streams
    need, which try first: what arrives token by token is hardly ever there already.

    Args:
        sock: the socket.
        most: bytes that may be returned at most.

    Returns:
        What has arrived; empty at the end of the stream.

    Raises:
        OSError: the connection is broken.
        trio.ClosedResourceError, ValueError: the socket was closed, while this waited or before.
    """
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            return os.read(sock.fileno(), most)
        except BlockingIOError:
            continue
