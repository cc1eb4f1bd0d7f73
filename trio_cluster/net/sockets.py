"""The network as a node uses it: ports to listen on, and connections to make.

Ports are bound before anything else happens, so that one that cannot be had is known at once. A master needs two that
lie 1000 apart. Both are bound, and listen, before the first request is served; a second process that finds the first
port taken may therefore take the answer on the second one as final.

A node talks to a :class:`Network`, and only :class:`Sockets` knows that there are sockets. Tests give it another one,
whose time and failures they control. What a network hands out is in ``streams.py``.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeAlias

import trio

from ..errors import ClusterPortError
from .streams import ByteStream, Listener, TcpListener, TcpStream

__all__ = [
    "INTERNAL_OFFSET",
    "Listeners",
    "Network",
    "Sockets",
    "close_all",
    "local_address",
    "open_pair",
    "port_of",
    "receive_when_ready",
    "shown_address",
    "why_not_connected",
]

#: The workers' port is the API's port plus this.
INTERNAL_OFFSET: Final = 1000

Listeners: TypeAlias = Sequence[Listener]

#: Clients that may come at once; those that find no place here try again after a second. Systems may allow fewer.
_BACKLOG: Final = 4096
_TRIES: Final = 50


class Network(Protocol):
    """What a node asks of its surroundings."""

    async def listen(self, host: str, port: int) -> Listeners:
        """Listen on every address that ``host`` stands for. A checkpoint.

        Args:
            host: a name or a numeric address; ``0.0.0.0`` and ``::`` are all addresses of their family.
            port: 0 picks a free one, the same for all addresses.

        Raises:
            ClusterPortError: it cannot be had; nothing is left open.
        """
        ...

    async def connect(self, host: str, port: int) -> ByteStream:
        """Connect to a listener. A checkpoint.

        Raises:
            OSError: nothing listens there.
        """
        ...


class Sockets:
    """The real network."""

    async def listen(self, host: str, port: int) -> Listeners:
        """See ``Network``."""
        try:
            found = await trio.socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise ClusterPortError(port, f"cannot listen on '{host}': {error.strerror or error}") from error
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
        return TcpStream(await trio.open_tcp_stream(host, port))


async def open_pair(
    network: Network, host: str, port: int, internal_host: str, internal_port: int | None
) -> tuple[Listeners, Listeners]:
    """Open a master's two ports.

    Args:
        network: where.
        host: where the API listens.
        port: 0 picks a free one.
        internal_host: where workers are let in.
        internal_port: ``None`` is the API's port plus 1000, both picked anew until a free pair is found if ``port``
            is 0.

    Raises:
        ClusterPortError: one of them cannot be had; its ``port`` says which, and nothing is left open.
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
    """Return the port that they listen on."""
    return listeners[0].local_address[1]


def close_all(listeners: Listeners) -> None:
    """Close them at once. Harmless for those that are closed."""
    for listener in listeners:
        listener.close()


def why_not_connected(error: Exception) -> str:
    """Say in a few words why a connection could not be made, given what the attempt raised."""
    if isinstance(error, trio.TooSlowError):
        return "it does not answer"
    cause: BaseException = error
    # Trio tries several addresses, and joins what went wrong with each of them. One reason is enough.
    if isinstance(cause, OSError) and cause.__cause__ is not None:
        cause = cause.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    reason = cause.strerror if isinstance(cause, OSError) else None
    return reason or str(cause) or type(cause).__name__


def shown_address(host: str, port: int) -> str:
    """Return an address as people, logs and URLs have it: an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def local_address(host: str) -> str:
    """Return where a process on this machine reaches a server that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


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
    """Return what has come on a socket, at most so many bytes, waiting for it if need be; empty at its end.

    First waiting and then reading is one system call, and one turn of the scheduler, less than a stream needs, which
    has to try first: what comes token by token is hardly ever there.

    Raises:
        OSError: the connection is broken.
        trio.ClosedResourceError, ValueError: the socket was closed while it was waited for, or before.
    """
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            return os.read(sock.fileno(), most)
        except BlockingIOError:
            continue
