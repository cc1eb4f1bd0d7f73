"""Gates in front of listeners: while a gate is closed, connections are not accepted, and wait in the kernel's queue.

Two processes may have the same listening socket, when one takes it over from the other. The queue is that of the
socket, so a connection that waits at a closed gate of one process is accepted by the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from .streams import ByteStream, Listener

__all__ = ["Gate", "GatedListener", "gated"]


class Gate:
    """One gate for any number of listeners.

    Args:
        is_open: whether it is open at first.
    """

    def __init__(self, *, is_open: bool = True) -> None:
        self._opened = trio.Event()
        if is_open:
            self._opened.set()
        self._passing: set[trio.CancelScope] = set()

    @property
    def is_open(self) -> bool:
        """Whether connections are accepted."""
        return self._opened.is_set()

    def open(self) -> None:
        """Accept connections. Synchronous, idempotent."""
        self._opened.set()

    def close(self) -> None:
        """Accept no connections until :meth:`open`. Synchronous, idempotent."""
        if self.is_open:
            self._opened = trio.Event()
            for scope in self._passing:
                scope.cancel(reason="the gate was closed")

    async def accept(self, listener: Listener) -> ByteStream:
        """Wait until the gate is open and there is a connection. A checkpoint. See :meth:`Listener.accept`."""
        while True:
            await self._opened.wait()
            with trio.CancelScope() as scope:
                self._passing.add(scope)
                try:
                    return await listener.accept()
                finally:
                    self._passing.discard(scope)


class GatedListener(Listener):
    """A listener behind a gate.

    Args:
        listener: closed with this one.
        gate: is to be closed before ``listener`` itself is closed, if this one is still used.
    """

    def __init__(self, listener: Listener, gate: Gate) -> None:
        self.local_address = listener.local_address
        self.shares_descriptors = listener.shares_descriptors
        self._listener = listener
        self._gate = gate

    async def accept(self) -> ByteStream:
        """See ``Listener``."""
        return await self._gate.accept(self._listener)

    def accept_nowait(self) -> ByteStream:
        """See ``Listener``."""
        if not self._gate.is_open:
            raise trio.WouldBlock
        return self._listener.accept_nowait()

    def limit_unread_time(self, seconds: float) -> None:
        """See ``Listener``."""
        self._listener.limit_unread_time(seconds)

    def close(self) -> None:
        """See ``Listener``."""
        self._listener.close()


def gated(listeners: Sequence[Listener], gate: Gate) -> list[Listener]:
    """Return the listeners behind a gate."""
    return [GatedListener(listener, gate) for listener in listeners]
