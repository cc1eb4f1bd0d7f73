"""How a worker connects to its master: with or without TLS, and as a member of the cluster if it has joined."""

from __future__ import annotations

import datetime
import errno
import logging
import math
import os
import ssl
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import attrs
import trio

from ..core.state_dir import StateDir
from ..core.threads import run_in_thread
from ..net.sockets import INTERNAL_OFFSET, Listeners, Network
from ..net.streams import ByteStream
from ..net.tls import connect_tls
from ..security.contexts import client_context
from .guardian import Trust

if TYPE_CHECKING:
    from ..security.membership import Membership

__all__ = ["Dialer", "MemberDialer", "NeighbourDialer", "SiblingDialer", "TlsNetwork"]

logger = logging.getLogger("trio_cluster.tls")

#: Seconds between two looks at whether the certificate is to be renewed; and after a failure.
_RENEWAL: Final = 6 * 3600.0
_RENEWAL_RETRY: Final = 600.0
#: Seconds for one of several addresses, with the resolution of its name and the handshake of TLS.
_SILENCE: Final = 8.0


class TlsNetwork:
    """A network on which connections to others are made with TLS. See ``Network``.

    Args:
        network: what is below.
        context: says whom to trust.
        server_name: what the server's certificate must be for; ``None``: the host that is connected to.
        process: which process of a master connections are for; ``None``: it is not said.
    """

    def __init__(
        self,
        network: Network,
        context: ssl.SSLContext,
        server_name: str | None = None,
        process: int | None = None,
    ) -> None:
        self._process = process
        self._network = network
        self._context = context
        self._server_name = server_name

    @property
    def trust(self) -> Trust:
        """What another process needs to connect, too."""
        return Trust(self._server_name)

    async def listen(self, host: str, port: int) -> Listeners:
        """See ``Network``; without TLS, which is a matter of who serves the connections."""
        return await self._network.listen(host, port)

    def for_process(self, process: int) -> TlsNetwork:
        """Return the same network, on which connections are for a certain process of a master."""
        return TlsNetwork(self._network, self._context, self._server_name, process)

    async def connect(self, host: str, port: int) -> ByteStream:
        """See ``Network``."""
        stream = await self._network.connect(host, port)
        return await connect_tls(stream, self._context, self._server_name or host, process=self._process)


class Dialer:
    """Connects to a master.

    Args:
        network: opens connections, with TLS if the master speaks it.
        host, port: where the master listens for workers.
        label: what people call the master; ``None``: its host.

    Attributes:
        host: the master's name, for its ``Host`` header and for logs.
        process: which process of the master it connects to; ``None``: any, and it names none.
    """

    process: int | None = None

    def __init__(self, network: Network, host: str, port: int, label: str | None = None) -> None:
        self.host = host
        self._network = network
        self._port = port
        self._label = label

    @property
    def label(self) -> str:
        """What people call the master. It tells several from each other."""
        return self._label or self.host

    @property
    def trust(self) -> Trust | None:
        """What another process needs to connect there, too; ``None``: there is no TLS."""
        network = self._network
        return network.trust if isinstance(network, TlsNetwork | _MemberNetwork) else None

    async def connect(self) -> ByteStream:
        """Return a new connection. A checkpoint.

        Raises:
            OSError: it cannot be made; the message says why.
        """
        return await self.connect_to_process(self.process)

    async def connect_to_process(self, process: int | None) -> ByteStream:
        """Return a new connection for a certain process of the master; ``None``: for any. See :meth:`connect`."""
        network = self._network
        if process is not None and isinstance(network, TlsNetwork | _MemberNetwork):
            network = network.for_process(process)
        return await network.connect(self.host, self._port)

    async def run(self) -> NoReturn:
        """Do what has to be done meanwhile, until cancelled."""
        await trio.sleep_forever()


class SiblingDialer(Dialer):
    """Connects to another process of a master that is several.

    Args:
        dialer: connects to the master. What has to be done meanwhile is done by that one.
        process: the number of the process.
    """

    def __init__(self, dialer: Dialer, process: int) -> None:
        self.host = dialer.host
        self.process = process
        self._dialer = dialer

    @property
    def label(self) -> str:
        """See ``Dialer``."""
        return f"{self._dialer.label}, process {self.process}"

    @property
    def trust(self) -> Trust | None:
        """See ``Dialer``."""
        return self._dialer.trust

    async def connect_to_process(self, process: int | None) -> ByteStream:
        """See ``Dialer``."""
        stream = await self._dialer.connect_to_process(process)
        self.host = self._dialer.host
        return stream


class MemberDialer(Dialer):
    """Connects as a worker that was invited, and renews its certificate.

    Args:
        network: opens connections, without TLS.
        state: where the membership is kept.
        membership: as it is kept.
        certificate: the file with its key and certificate.
        addresses: where the API of the master is. They are tried in turn, the one that was connected to last first; one
            that does not answer does not keep the worker from the others.
        internal_port: the port for workers; ``None``: 1000 above that of the API.
    """

    def __init__(
        self,
        network: Network,
        state: StateDir,
        membership: Membership,
        certificate: Path,
        addresses: Sequence[tuple[str, int]],
        internal_port: int | None,
    ) -> None:
        super().__init__(network, *addresses[0])
        self._state = state
        self._membership = membership
        self._certificate = certificate
        self._addresses = deque(addresses)
        self._internal_port = internal_port
        self._context = self._make_context(membership)

    def _make_context(self, membership: Membership) -> ssl.SSLContext:
        return client_context(authority=membership.authority, certificate=self._certificate)

    async def connect_to_process(self, process: int | None) -> ByteStream:
        """See ``Dialer``."""
        failure: OSError | None = None
        for _ in range(len(self._addresses)):
            host, port = self._addresses[0]
            # Before the attempt: if nothing answers there until the caller gives up, the next one is elsewhere.
            self._addresses.rotate(-1)
            try:
                with trio.fail_after(_SILENCE if len(self._addresses) > 1 else math.inf):
                    internal_port = self._internal_port or port + INTERNAL_OFFSET
                    stream = await self.connect_to(host, internal_port, process)
            except OSError as error:
                failure = failure or error
            except trio.TooSlowError:
                failure = failure or TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            else:
                self.host = host
                self._addresses.rotate(1)
                return stream
        assert failure is not None
        raise failure

    @property
    def network(self) -> Network:
        """A network on which this worker connects to any master of its cluster, with the certificate that it has then.

        Its certificate is renewed only while :meth:`run` runs.
        """
        return _MemberNetwork(self)

    async def connect_to(self, host: str, port: int, process: int | None = None) -> ByteStream:
        """Return a new connection to the port for workers of any master of the cluster. A checkpoint.

        Raises:
            OSError: it cannot be made; the message says why.
        """
        # Only a worker that has joined needs the package that makes certificates.
        from ..security.authority import MASTER_NAME

        return await TlsNetwork(self._network, self._context, MASTER_NAME, process).connect(host, port)

    @property
    def trust(self) -> Trust:
        """See ``Dialer``."""
        from ..security.authority import MASTER_NAME

        member = self._membership
        return Trust(MASTER_NAME, member.authority, member.key + member.certificate)

    async def run(self) -> NoReturn:
        """Renew the certificate in time, until cancelled."""
        while True:
            pause = await self._renew()
            await trio.sleep(pause)

    async def _renew(self) -> float:
        """Renew the certificate if that is due. Return the seconds until the next look."""
        try:
            renewed = await run_in_thread(
                self._renewed, self._state, self._membership, abandon_on_cancel=True
            )
        except Exception as error:
            # The old certificate is used until the next attempt.
            logger.warning("the certificate of this worker could not be checked: %s", error)
            return _RENEWAL_RETRY
        if renewed is not None:
            self._membership, self._context = renewed
            logger.info("the certificate of this worker was renewed")
        return _RENEWAL

    def _renewed(self, state: StateDir, membership: Membership) -> tuple[Membership, ssl.SSLContext] | None:
        """Renew the membership if that is due; ``None``: it is not. Blocks."""
        from ..security.joining import renew_if_due

        renewed = renew_if_due(state, membership)
        return None if renewed == membership else (renewed, self._make_context(renewed))


class NeighbourDialer(MemberDialer):
    """Connects as another process of the master's machine, which makes its certificates itself: it may read the key.

    Args:
        network: opens connections, without TLS.
        state: the master's.
        membership, certificate: as ``security.membership.neighbour`` returns them; the file is not read again.
        address: where the API of the master is.
        internal_port: the port for workers.
    """

    def __init__(
        self,
        network: Network,
        state: StateDir,
        membership: Membership,
        certificate: Path,
        address: tuple[str, int],
        internal_port: int,
    ) -> None:
        super().__init__(network, state, membership, certificate, [address], internal_port)

    def _renewed(self, state: StateDir, membership: Membership) -> tuple[Membership, ssl.SSLContext] | None:
        from ..security.membership import renewed_neighbour

        made = renewed_neighbour(state, datetime.datetime.now(datetime.UTC), membership)
        if made is None:
            return None
        renewed, certificate = made
        try:
            return renewed, client_context(authority=renewed.authority, certificate=certificate)
        finally:
            certificate.unlink(missing_ok=True)


@attrs.frozen
class _MemberNetwork:
    """See ``MemberDialer.network``."""

    _dialer: MemberDialer
    _process: int | None = None

    def for_process(self, process: int) -> _MemberNetwork:
        """See ``TlsNetwork``."""
        return _MemberNetwork(self._dialer, process)

    @property
    def trust(self) -> Trust:
        """See ``MemberDialer``."""
        return self._dialer.trust

    async def listen(self, host: str, port: int) -> Listeners:
        """See ``Network``; nothing listens on this one."""
        raise NotImplementedError

    async def connect(self, host: str, port: int) -> ByteStream:
        """See ``Network``."""
        return await self._dialer.connect_to(host, port, self._process)
