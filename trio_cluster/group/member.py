"""A process of a group, from its own side: what it gets from the supervisor, and how it reaches the others.

A member is started with one end of a socket pair, whose number is in the environment (:data:`VARIABLE`). When the other
end is gone, the supervisor has ended, be it that it was killed. Then this process listens no more, so that another
group can take the ports, finishes its requests, and ends.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Final, NoReturn

import trio

from ..errors import ClusterError
from ..net.streams import Address, Listener, TcpListener, TcpStream, closed_here
from .channel import GroupChannel
from .messages import (
    Ask,
    AskState,
    Link,
    Look,
    Notice,
    Process,
    Replies,
    Reply,
    Request,
    Reserve,
    Reserved,
    Response,
    Settle,
    Start,
    Up,
)

__all__ = ["VARIABLE", "HandedListener", "Member", "socket_to_supervisor"]

logger = logging.getLogger("trio_cluster.group")

#: The variable of the environment with the descriptor of the socket to the supervisor. Not one that begins as the
#: options do.
VARIABLE: Final = "_TRIO_CLUSTER_GROUP_SOCKET"
#: Seconds that the supervisor may take to say what this process is: until the first one of the group serves.
_START_TIMEOUT: Final = 300.0


class HandedListener(Listener):
    """A listener whose connections were accepted by another process.

    Args:
        local_address: where that one listens.
    """

    shares_descriptors = True

    def __init__(self, local_address: Address) -> None:
        self.local_address = local_address
        self._handed: deque[socket.socket] = deque()
        self._changed = trio.lowlevel.ParkingLot()
        self._closed = False

    def hand(self, sock: socket.socket) -> None:
        """Let a connection come in. Synchronous."""
        if self._closed:
            sock.close()
            return
        sock.setblocking(False)
        self._handed.append(sock)
        self._changed.unpark_all()

    async def accept(self) -> TcpStream:
        """Wait for a connection, and return it."""
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return self.accept_nowait()
            except trio.WouldBlock:
                await self._changed.park()

    def accept_nowait(self) -> TcpStream:
        """See ``Listener``."""
        if self._closed:
            raise closed_here()
        if not self._handed:
            raise trio.WouldBlock
        return TcpStream(trio.SocketStream(trio.socket.from_stdlib_socket(self._handed.popleft())))

    def limit_unread_time(self, seconds: float) -> None:
        """See ``Listener``; without effect: the supervisor's listener would have to."""

    def close(self) -> None:
        """See ``Listener``."""
        self._closed = True
        while self._handed:
            self._handed.popleft().close()
        self._changed.unpark_all()


class Member:
    """This process, as one of a group.

    Args:
        channel: reads and writes the socket to the supervisor; closed with this.
        start: what this process is.
        clients: the listening sockets for clients.

    Attributes:
        process, processes: its number, and how many there are.
        name: of the group.
        clients: the listeners for clients.
        workers: that for workers.
    """

    def __init__(self, channel: GroupChannel, start: Start, clients: list[socket.socket]) -> None:
        self.process = start.process
        self.processes = start.processes
        self.name = start.name
        self.clients = [TcpListener(sock, shared=True) for sock in clients]
        self.workers = [HandedListener(start.workers)]
        self._channel = channel
        self._asked: dict[int, tuple[trio.Event, list[Replies]]] = {}
        self._reserving: dict[int, tuple[trio.Event, list[Reserved]]] = {}
        self._ids = 0
        self._orphaned = False

    @classmethod
    async def join(cls, sock: socket.socket) -> Member:
        """Return this process as a member of its group. A checkpoint.

        Args:
            sock: from :func:`socket_to_supervisor`.

        Raises:
            ClusterError: there is no supervisor.
        """
        channel = GroupChannel(sock)
        received = None
        with trio.move_on_after(_START_TIMEOUT):
            received = await channel.receive()
        if received is None or not isinstance(received[0], Start):
            channel.close()
            raise ClusterError("there is no supervisor that has started this process")
        return cls(channel, received[0], received[1])

    async def run(
        self,
        answer: Callable[[Request], Awaitable[Response]],
        on_notice: Callable[[Notice], Awaitable[None]],
        on_orphaned: Callable[[], None],
        on_look: Callable[[Look], Response] | None = None,
    ) -> NoReturn:
        """Talk with the supervisor until cancelled.

        Args:
            answer: answers a request of another process, from what this one knows alone.
            on_notice: called when another process has changed what all share.
            on_orphaned: called once, if the supervisor has ended. Synchronous.
            on_look: returns what has changed in what this process shows live. Synchronous. ``None``: it shows nothing.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._channel.write)

            async def serve(ask: Ask) -> None:
                response = None
                try:
                    if isinstance(ask.what, Request):
                        response = await answer(ask.what)
                    elif isinstance(ask.what, Look):
                        response = None if on_look is None else on_look(ask.what)
                    elif ask.what is not None:
                        await on_notice(ask.what)
                except Exception:
                    logger.exception("another process of this master gets no answer")
                self._channel.post(Reply(ask.id, response))

            while True:
                try:
                    received = await self._channel.receive()
                except ValueError as error:
                    logger.error("the supervisor is not understood: %s", error)
                    received = None
                if received is None:
                    break
                message, sockets = received
                if isinstance(message, Link):
                    for sock in sockets:
                        self.workers[0].hand(sock)
                elif isinstance(message, Ask):
                    nursery.start_soon(serve, message)
                elif isinstance(message, Reserved) and message.id in self._reserving:
                    reserved, answers = self._reserving[message.id]
                    answers.append(message)
                    reserved.set()
                elif isinstance(message, Replies) and message.id in self._asked:
                    over, replies = self._asked[message.id]
                    replies.append(message)
                    over.set()
            self._orphaned = True
            for over in [
                *(each[0] for each in self._asked.values()),
                *(e[0] for e in self._reserving.values()),
            ]:
                over.set()
            on_orphaned()
            await trio.sleep_forever()
        raise AssertionError("unreachable: it runs until it is cancelled")

    def announce(self, url: str, models: list[str]) -> None:
        """Tell the supervisor that this process serves. Synchronous."""
        self._channel.post(Up(url, models))

    async def ask(
        self, what: Request | Notice | None, *, first: bool = False, own: Response | None = None
    ) -> tuple[list[Process], bytes]:
        """Ask the other processes, and return all of the group, in their order, with their answers. A checkpoint.

        Args:
            what: to ask them; ``None``: only which there are is of interest.
            first: only the running process with the smallest number is asked, be it this one.
            own: the answer of this process.

        Returns:
            The processes, and what processes have counted that have ended, if ``/metrics`` was asked for. No processes
            if the supervisor has ended.
        """
        replies = await self._ask(Ask(self._next_id(), what, first, own))
        return ([], b"") if replies is None else (replies.processes, replies.retired)

    async def ask_one(self, process: int, what: Look) -> Process | None:
        """Ask one other process. A checkpoint.

        Returns:
            The process, whether it runs or not, with its answer; ``None`` if the supervisor has ended.
        """
        replies = await self._ask(Ask(self._next_id(), what, to=process))
        if replies is None:
            return None
        return next((each for each in replies.processes if each.process == process), None)

    def tell_one(self, process: int, what: Look) -> None:
        """Tell one other process something that it need not answer. Synchronous."""
        if not self._orphaned:
            self._channel.post(Ask(self._next_id(), what, to=process))

    def _next_id(self) -> int:
        self._ids += 1
        return self._ids

    async def _ask(self, ask: Ask) -> Replies | None:
        if self._orphaned:
            await trio.lowlevel.checkpoint()
            return None
        over, replies = trio.Event(), list[Replies]()
        self._asked[ask.id] = over, replies
        try:
            self._channel.post(ask)
            await over.wait()
        finally:
            del self._asked[ask.id]
        return replies[0] if replies else None

    async def reserve(self, message: Reserve | AskState) -> Reserved | None:
        """Ask the supervisor for a reservation, and return its answer; ``None`` if it has ended. A checkpoint."""
        if self._orphaned:
            await trio.lowlevel.checkpoint()
            return None
        over, answers = trio.Event(), list[Reserved]()
        self._reserving[message.id] = over, answers
        try:
            self._channel.post(message)
            await over.wait()
        finally:
            del self._reserving[message.id]
        return answers[0] if answers else None

    def settle(self, message: Settle) -> None:
        """Tell the supervisor that a reservation is over. Synchronous."""
        self._channel.post(message)

    def close(self) -> None:
        """Close the socket to the supervisor. Synchronous, idempotent."""
        self._channel.close()


def socket_to_supervisor(environ: MutableMapping[str, str]) -> socket.socket | None:
    """Return the socket to the supervisor that has started this process; ``None`` if none has. To be called once.

    The variable is removed, so that processes which this one starts do not take it for theirs.

    Raises:
        ClusterError: there is none, although the environment names one.
    """
    number = environ.pop(VARIABLE, "")
    if not number.isdecimal():
        return None
    try:
        os.set_inheritable(int(number), False)
        return socket.socket(fileno=int(number))
    except OSError as error:
        raise ClusterError(f"{VARIABLE}: {error.strerror}; it is not to be set by hand") from error
