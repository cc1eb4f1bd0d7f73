"""Listening sockets that systemd has opened before it started this process (socket activation, ``sd_listen_fds``).

systemd keeps the sockets while the service is restarted, so clients that connect meanwhile wait and are not refused.
Each socket is used for the port that it listens on; ports without one are opened as usual.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from ..errors import OptionsError
from .sockets import Listeners, Sockets
from .streams import TcpListener

__all__ = ["ActivatedNetwork", "activated_sockets"]

#: The number of the first descriptor that systemd passes.
_FIRST: Final = 3


def activated_sockets(environ: Mapping[str, str], pid: int) -> list[socket.socket]:
    """Return the sockets that were passed to this process. To be called once. Synchronous.

    Args:
        environ: the environment: ``LISTEN_PID`` and ``LISTEN_FDS`` count. ``LISTEN_FDNAMES`` does not: a socket is
            known by its port.
        pid: of this process. Variables for another process, such as the parent of this one, do not count.

    Raises:
        OptionsError: one of them is not a listening TCP socket.
    """
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(pid) or not count.isdecimal():
        return []
    sockets: list[socket.socket] = []
    for number in range(_FIRST, _FIRST + int(count)):
        try:
            os.set_inheritable(number, False)
            sock = socket.socket(fileno=number)
        except OSError as error:
            raise OptionsError(f"LISTEN_FDS: descriptor {number}: {error.strerror}") from error
        internet = sock.family in (socket.AF_INET, socket.AF_INET6)
        if not (internet and sock.type == socket.SOCK_STREAM):
            raise OptionsError(f"LISTEN_FDS: descriptor {number} is not a TCP socket (ListenStream=PORT)")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OptionsError(f"LISTEN_FDS: descriptor {number} does not listen (Accept=no is needed)")
        sock.setblocking(False)
        sockets.append(sock)
    return sockets


class ActivatedNetwork(Sockets):
    """The real network, on which some ports are open already.

    Args:
        sockets: those that listen; closed with the listeners that are made of them.
        ports: the ports that are going to be used; 0 is any.

    Raises:
        OptionsError: a socket is for another port.
    """

    def __init__(self, sockets: Sequence[socket.socket], ports: Collection[int]) -> None:
        self._sockets = list(sockets)
        for port in [sock.getsockname()[1] for sock in sockets]:
            if port not in ports:
                for sock in sockets:
                    sock.close()
                known = " and ".join(map(str, ports))
                raise OptionsError(
                    f"LISTEN_FDS: a socket listens on port {port}; the ports of this node are {known}"
                )

    async def listen(self, host: str, port: int) -> Listeners:
        """See ``Network``. Of a port that is open already, ``host`` is what it was opened with."""
        found = [sock for sock in self._sockets if sock.getsockname()[1] == port]
        if not found:
            return await super().listen(host, port)
        self._sockets = [sock for sock in self._sockets if sock not in found]
        return [TcpListener(sock) for sock in found]
