"""Checks whether a master accepts workers at an address: connect, read its handshake, and close.

It needs no token, and does not make the master believe that a worker has joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from .._version import __version__
from ..link.link import Link, LinkClosed
from ..link.websocket import PROBE_PATH, dial
from ..net.sockets import Network, Sockets
from ..net.watchdog import injectable
from ..protocol import Handshake, WorkerEvent, WorkerSession
from ..security.contexts import unverified_context
from .dialer import TlsNetwork

__all__ = ["check_is_cluster_server", "is_master"]


# The name of the last argument is part of the public contract.
async def check_is_cluster_server(host: str, internal_port: int, timeout: float = 2.0) -> bool:  # noqa: ASYNC109
    """Return whether a trio_cluster master accepts workers at this address. A checkpoint. Needs no token.

    Args:
        host: a name or a numeric address.
        internal_port: the port for workers: the port of the API plus 1000, unless it was configured otherwise.
        timeout: seconds that the check may take; after that the result is ``False``.

    Returns:
        ``True`` if a peer there completed the handshake of the cluster protocol.
    """
    # A port that speaks TLS ends a connection without it at once.
    encrypted = TlsNetwork(Sockets(), unverified_context())
    with trio.move_on_after(timeout):
        return await is_master(Sockets(), host, internal_port, timeout) or await is_master(
            encrypted, host, internal_port, timeout
        )
    return False


async def is_master(network: Network, host: str, internal_port: int, patience: float) -> bool:
    """Do what :func:`check_is_cluster_server` does, on any network. A checkpoint."""
    found = False

    def on_events(events: Sequence[WorkerEvent]) -> None:
        nonlocal found
        if any(isinstance(event, Handshake) for event in events):
            found = True
            link.end("probed")

    with trio.move_on_after(patience):
        try:
            stream = injectable(await network.connect(host, internal_port))
            session = WorkerSession("probe", __version__, trio.current_time())
            link = Link(stream, session, on_events=on_events, timeout=patience)
            await link.run(dial(stream, host, path=PROBE_PATH))
        except (OSError, LinkClosed):
            pass
    return found
