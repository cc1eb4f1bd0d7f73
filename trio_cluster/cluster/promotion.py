"""Promotion: a process of auto mode whose master has gone takes its ports, and is the master from then on.

There is no election: the ports are the lock. When nothing listens any more where the master was, each of its workers on
this machine tries to listen on both ports. The system lets one of them. That one leaves its role as a worker, and
serves on these listeners; the others find it where the old master was. Both ports are got, or neither.

A master that is frozen has its ports still, and the system goes on accepting connections for it. So the others wait,
and say so.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import trio

from ..errors import ClusterPortError
from ..net.sockets import Listeners, why_not_connected
from ..net.streams import ByteStream
from .dialer import Dialer
from .guardian import Trust

__all__ = ["Contender", "Ports"]

logger = logging.getLogger("trio_cluster.node")

#: The listeners of a master: for clients, and for workers.
Ports = tuple[Listeners, Listeners]

#: How often a process that was too late for the ports looks for the one that has them, and the seconds in between.
_TRIES: Final = 5
_PAUSE: Final = 0.02
#: Seconds after which a master that has accepted a connection, and has not answered, is said to be silent.
_PATIENCE: Final = 5.0


class Contender(Dialer):
    """Connects to the master of this machine, and takes its ports if nothing listens there any more.

    Args:
        dialer: connects to the master.
        listen: listens on the ports of a master, on both or on none; raises ``ClusterPortError``.
        answers: tells whether the link to the master is alive.
        on_won: called once, when the ports are got. It has to cancel what connects. Synchronous.

    Attributes:
        ports: the listeners, if they were got; to be closed by the caller.
    """

    def __init__(
        self,
        dialer: Dialer,
        listen: Callable[[], Awaitable[Ports]],
        answers: Callable[[], bool],
        on_won: Callable[[], None],
    ) -> None:
        # Not that of the superclass: there is no address but that of the dialer.
        self.host = dialer.host
        self.ports: Ports | None = None
        self._dialer = dialer
        self._listen = listen
        self._answers = answers
        self._on_won = on_won
        # A link that is resumed, and one that is silent, may be dialled at the same time.
        self._contending = trio.Lock()
        self._connected = trio.Event()

    @property
    def label(self) -> str:
        """See ``Dialer``."""
        return self._dialer.label

    @property
    def trust(self) -> Trust | None:
        """See ``Dialer``."""
        return self._dialer.trust

    async def connect_to_process(self, process: int | None) -> ByteStream:
        """Return a new connection. A checkpoint. It does not return if this process has got the ports.

        Raises:
            OSError: it cannot be made; the message says why.
        """
        for tries_left in reversed(range(_TRIES)):
            try:
                dialer = self._dialer
                stream = await (dialer.connect() if process is None else dialer.connect_to_process(process))
            except OSError as error:
                why = why_not_connected(error)
            else:
                self._connected.set()
                return stream
            refused = await self._contend()
            if tries_left:
                # Another process was faster; or the old master has not closed both of its ports yet.
                await trio.sleep(_PAUSE)
        raise OSError(f"{why}; its ports cannot be taken: {refused}")

    async def run(self) -> NoReturn:
        """Do what the dialer has to do meanwhile, and say when the master is silent. Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._dialer.run)
            while True:
                await self._connected.wait()
                await trio.sleep(_PATIENCE)
                self._connected = trio.Event()
                if not self._answers():
                    text = "the master does not answer, and has its ports still: waiting until it answers, or ends"
                    logger.warning(text, extra={"fields": {"master": self.host}})

    async def _contend(self) -> ClusterPortError:
        """Try to take the ports, and return why they cannot be got. If they are, this does not return. A checkpoint."""
        async with self._contending:
            if self.ports is None:
                try:
                    self.ports = await self._listen()
                except ClusterPortError as error:
                    return error
                self._on_won()
            await trio.sleep_forever()
        raise AssertionError("unreachable: this sleeps until it is cancelled")
