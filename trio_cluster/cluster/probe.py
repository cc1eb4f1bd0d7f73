"""Finding out whether a master takes workers at an address: connect, read its handshake, and leave.

No token is needed for that, and no worker is announced by it.
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

__all__ = ["check_is_cluster_server", "is_master"]


# The name of the last argument is part of the public contract.
async def check_is_cluster_server(host: str, internal_port: int, timeout: float = 2.0) -> bool:  # noqa: ASYNC109
    """Find out whether a trio_cluster master takes workers at this address.

    Args:
        host: a name or a numeric address.
        internal_port: the port for workers, which is the external one plus 1000 unless somebody chose otherwise.
        timeout: seconds that finding out may take; past it the answer is no.

    Returns:
        True if something there gave the cluster's magic number. No token is needed for that.
    """
    return await is_master(Sockets(), host, internal_port, timeout)


async def is_master(network: Network, host: str, internal_port: int, patience: float) -> bool:
    """Be :func:`check_is_cluster_server` on any network."""
    found = False

    def look(events: Sequence[WorkerEvent]) -> None:
        nonlocal found
        if any(isinstance(event, Handshake) for event in events):
            found = True
            link.end("probed")

    with trio.move_on_after(patience):
        try:
            stream = injectable(await network.connect(host, internal_port))
            session = WorkerSession("probe", __version__, trio.current_time())
            link = Link(stream, session, on_events=look, timeout=patience)
            await link.run(dial(stream, host, path=PROBE_PATH))
        except (OSError, LinkClosed):
            pass
    return found
