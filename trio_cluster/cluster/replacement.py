"""A master that is replaced by another process, and the process that replaces it: ``take_over.py`` with its IO.

Every master with a state directory waits there for a successor (:class:`HandOver`). A process that is to take over
connects to it (:class:`Succession`) before it opens any port.

What the two have in common, besides the sockets, is the state directory. It belongs to one of them at a time: the
predecessor writes down what it keeps there before the successor reads it, and writes nothing more; what keys use of
their limits after that is sent to the successor. The database is used by both, as by several masters.

A master that a service manager watches starts its successor itself when it is asked to (:class:`SuccessorStarter`,
:func:`ask_to_replace`), and says who the manager is to watch from then on.

The workers are told by their heartbeats. Each opens a link to the same address, where the successor accepts it now,
and keeps the old one until its calls have ended. An old link that is cut then cannot be resumed: the worker would
reach the successor. So it is over at once, and its calls are those of a lost worker. One that was cut before is waited
for, before the workers are told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, Protocol

import trio

from ..errors import ClusterError
from ..limits.limiter import Limiter
from ..net.gate import Gate
from ..net.handover import Channel, Handle, Handovers, OtherUser, Waiting
from ..security.master_tls import MasterTls
from .master import WorkerManager
from .model_memory import ModelMemory
from .take_over import (
    LINK_TIMEOUT,
    VERSION,
    Begin,
    Change,
    Hello,
    Linked,
    Offer,
    Predecessor,
    PredecessorState,
    Ready,
    Refused,
    Replace,
    Replaced,
    Serving,
    Successor,
    SuccessorState,
    Unexpected,
    Yours,
    decode,
    encode,
)

__all__ = [
    "SOCKET_NAME",
    "HandOver",
    "StartedSuccessor",
    "Succession",
    "SuccessorStarter",
    "TakeOverFailed",
    "ask_to_replace",
    "wait_for_workers",
]

logger = logging.getLogger("trio_cluster.node")

#: The name of the Unix socket in the state directory.
SOCKET_NAME: Final = "take-over.sock"

#: Seconds that the last words to a process may take that may not listen any more.
_LAST_WORDS: Final = 1.0
#: Seconds for which links that are cut are waited for; less than a successor waits for ``Begin``.
_CUT_WAIT: Final = 10.0
#: Seconds between two looks at whether the workers have joined.
_LOOK: Final = 0.02


class TakeOverFailed(ClusterError):
    """This process does not take the place of the running master, which goes on."""


class StartedSuccessor(Protocol):
    """A process that was started to take the place of this one."""

    @property
    def pid(self) -> int:
        """Its number."""
        ...

    async def wait_ended(self) -> None:
        """Wait until it has ended. A checkpoint."""
        ...

    def close(self) -> None:
        """Watch it no more. Synchronous, idempotent."""
        ...


class SuccessorStarter(Protocol):
    """Starts a process with the command of this one that takes its place, and knows whom to tell."""

    async def start(self) -> StartedSuccessor:
        """Start it. A checkpoint. Raises ``OSError``."""
        ...

    def hand_over(self, pid: int) -> None:
        """That process serves from now on, and this one finishes its answers. Synchronous."""
        ...


class HandOver:
    """Lets another process take the place of this master.

    Args:
        handovers: how that process is reached.
        path: at which it is waited for.
        clients, workers: the listening sockets.
        clients_gate, workers_gate: in front of them.
        manager: the workers, which are told.
        limiter, memory, tls: write into the state directory.
        starter: starts the process that takes over, when that is asked for; ``None``: it has to be started elsewhere.

    Attributes:
        replaced: set when another process serves, and this one is to end.
    """

    def __init__(
        self,
        handovers: Handovers,
        path: Path,
        clients: Sequence[Handle],
        workers: Sequence[Handle],
        clients_gate: Gate,
        workers_gate: Gate,
        manager: WorkerManager,
        limiter: Limiter,
        memory: ModelMemory | None,
        tls: MasterTls | None,
        starter: SuccessorStarter | None = None,
    ) -> None:
        self.replaced = trio.Event()
        self._starter = starter
        self._started: StartedSuccessor | None = None
        self._why_kept = ""
        # The process that takes over at present.
        self._successor_pid = 0
        self._handovers = handovers
        self._path = path
        self._clients = clients
        self._workers = workers
        self._clients_gate = clients_gate
        self._workers_gate = workers_gate
        self._manager = manager
        self._limiter = limiter
        self._memory = memory
        self._tls = tls
        self._attempt: Predecessor | None = None
        self._serving = trio.CancelScope()
        # What keys have used that was not sent to the successor.
        self._changes: list[bytes] = []
        self._changed = trio.lowlevel.ParkingLot()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Wait for successors, until :meth:`stop` or cancelled. A checkpoint.

        That this is not possible is logged: the master serves as it would otherwise.

        Args:
            task_status: started as soon as a successor can connect, or it is clear that none ever can.
        """
        try:
            waiting = self._handovers.listen(self._path)
        except OSError as error:
            logger.warning("this master cannot be taken over: %s: %s", self._path, error.strerror or error)
            task_status.started()
            return
        task_status.started()
        with closing(waiting), self._serving:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept, waiting, nursery)

    async def _accept(self, waiting: Waiting, nursery: trio.Nursery) -> None:
        while True:
            try:
                channel = await waiting.accept()
            except OtherUser as error:
                logger.warning("a process may not take over: %s", error.strerror)
                continue
            except OSError as error:
                logger.warning("this master cannot be taken over any more: %s", error)
                return
            nursery.start_soon(self._serve_connection, channel)

    def stop(self) -> None:
        """Wait for no successor any more: this master is being stopped. Synchronous.

        One that has the sockets already serves from now on, so this process accepts nothing more.
        """
        attempt = self._attempt
        if attempt is not None and attempt.state is not PredecessorState.WAITING and not attempt.is_over:
            logger.info("stopping; the process that was about to take over serves")
            self._clients_gate.close()
            self._workers_gate.close()
        if not self.replaced.is_set():
            self._serving.cancel(reason="the master is being stopped")

    async def flush(self) -> None:
        """Wait until the successor was told what keys have used, but not for long. A checkpoint."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(_LAST_WORDS):
            while self._changes:
                await self._changed.park()

    async def _serve_connection(self, channel: Channel) -> None:
        with closing(channel):
            if self._attempt is not None:
                with suppress(OSError), trio.move_on_after(_LAST_WORDS):
                    await channel.send(encode(Refused("another process takes over at this moment")))
                return
            self._attempt = attempt = Predecessor()
            is_request = await self._converse(channel, attempt)
            if is_request:
                # The attempt is that of the process that is started now.
                self._attempt = None
                await self._replace(channel)
            elif attempt.state is PredecessorState.REPLACED:
                await self._send_changes(channel)
            else:
                self._attempt = None

    async def _replace(self, channel: Channel) -> None:
        """Start a process that takes over, and say what has come of it. A checkpoint."""
        answer: Replaced | Refused
        if self._starter is None:
            answer = Refused(
                "it was not started by a service manager; start the new process yourself, with --take-over"
            )
        elif self._started is not None:
            answer = Refused("a process that takes over was started already")
        else:
            answer = await self._start_successor(self._starter)
        with suppress(OSError), trio.move_on_after(_LAST_WORDS):
            await channel.send(encode(answer))

    async def _start_successor(self, starter: SuccessorStarter) -> Replaced | Refused:
        try:
            started = await starter.start()
        except OSError as error:
            return Refused(f"no process could be started: {error.strerror or error}")
        self._started, self._why_kept = started, ""
        logger.info("started the process that takes over", extra={"fields": {"successor": started.pid}})
        try:
            async with trio.open_nursery() as nursery:

                async def wait_ended() -> None:
                    await started.wait_ended()
                    nursery.cancel_scope.cancel(reason="the process has ended")

                nursery.start_soon(wait_ended)
                await self.replaced.wait()
                nursery.cancel_scope.cancel(reason="the process serves")
        finally:
            started.close()
            self._started = None
        if self.replaced.is_set():
            return Replaced(self._successor_pid)
        return Refused(
            self._why_kept or "the new process has ended before it could take over; its log says why"
        )

    def _has_started(self, pid: int) -> bool:
        return self._started is not None and self._started.pid == pid

    async def _converse(self, channel: Channel, attempt: Predecessor) -> bool:
        """Talk with a successor until the attempt is over. A checkpoint.

        Returns:
            Whether it is none, but a process that asks for one.
        """
        while not attempt.is_over:
            try:
                with trio.fail_after(attempt.wait):
                    received = await channel.receive()
                    if received is None:
                        raise Unexpected("it has ended")
                    line, sockets = received
                    for sock in sockets:
                        sock.close()
                    message = decode(line)
                    if isinstance(message, Replace) and attempt.state is PredecessorState.WAITING:
                        return True
                    attempt.receive(message)
                    if isinstance(message, Hello):
                        self._successor_pid = message.pid
                    await self._follow(channel, attempt)
            except trio.TooSlowError:
                attempt.fail("it took too long")
            except (Unexpected, OSError) as error:
                attempt.fail(str(error))
        if attempt.state is PredecessorState.KEPT:
            await self._go_on(channel, attempt)
        return False

    async def _follow(self, channel: Channel, attempt: Predecessor) -> None:
        """Do what the new state demands. A checkpoint.

        Raises:
            OSError: the successor cannot be told.
        """
        match attempt.state:
            case PredecessorState.PREPARING:
                logger.info("another process is about to take over")
                offer = Offer(self._handovers.pid, len(self._clients), len(self._workers))
                await channel.send(encode(offer), [*self._clients, *self._workers])
            case PredecessorState.LINKING:
                # A link that is cut is resumed in a moment, usually. From here on it could not be.
                await self._manager.wait_uncut(_CUT_WAIT)
                self._workers_gate.close()
                if self._memory is not None:
                    self._memory.suspend()
                if self._tls is not None:
                    await self._tls.suspend()
                await self._limiter.release(self._forward)
                models = self._manager.models()
                self._manager.announce_successor(coming=True)
                await channel.send(encode(Begin(models)))
            case PredecessorState.LEAVING:
                self._clients_gate.close()
                await channel.send(encode(Yours()))
            case PredecessorState.REPLACED:
                # If the successor ends, too, nobody listens any more, and clients are to see that.
                for sock in (*self._clients, *self._workers):
                    sock.close()
                if self._starter is not None and self._has_started(self._successor_pid):
                    self._starter.hand_over(self._successor_pid)
                self.replaced.set()

    async def _go_on(self, channel: Channel, attempt: Predecessor) -> None:
        """Be the master that this process was before the attempt. A checkpoint."""
        logger.warning("the process that was about to take over has failed: %s", attempt.why)
        self._why_kept = attempt.why
        self._clients_gate.open()
        self._workers_gate.open()
        self._manager.announce_successor(coming=False)
        self._changes.clear()
        self._limiter.retake()
        if self._memory is not None:
            self._memory.resume()
        if self._tls is not None:
            self._tls.resume()
        with suppress(OSError), trio.move_on_after(_LAST_WORDS):
            await channel.send(encode(Refused(attempt.why)))

    def _forward(self, line: bytes) -> None:
        self._changes.append(line)
        self._changed.unpark_all()

    async def _send_changes(self, channel: Channel) -> None:
        """Tell the successor what keys use, until cancelled or it has ended."""
        with suppress(OSError):
            while True:
                while not self._changes:
                    await self._changed.park()
                await channel.send(encode(Change(self._changes[0].decode())))
                del self._changes[0]
                self._changed.unpark_all()


class Succession:
    """This process takes the place of a running master. Made by :meth:`ask`.

    Attributes:
        clients, workers: the listening sockets, which are this process's to close.
        pid: of the predecessor.
    """

    def __init__(self, channel: Channel, own_pid: int) -> None:
        self.clients: list[Handle] = []
        self.workers: list[Handle] = []
        self.pid = 0
        self._own_pid = own_pid
        self._channel = channel
        self._successor = Successor()
        self._models: dict[str, list[str]] = {}
        self._changed = trio.lowlevel.ParkingLot()
        # This process has begun to accept clients.
        self._arrived = False

    @classmethod
    async def ask(cls, handovers: Handovers, path: Path) -> Succession | None:
        """Ask the running master for its sockets. A checkpoint.

        Args:
            handovers: how it is reached.
            path: at which it waits.

        Returns:
            ``None`` if no process waits there.

        Raises:
            TakeOverFailed: it refuses, or does not answer.
        """
        try:
            channel = await handovers.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise TakeOverFailed(f"cannot take over: {path}: {error.strerror or error}") from error
        succession = cls(channel, handovers.pid)
        try:
            await succession.receive_sockets()
        except BaseException:
            succession.close()
            raise
        return succession

    async def receive_sockets(self) -> None:
        """See :meth:`ask`, which has to be called instead."""
        successor, sockets = self._successor, list[Handle]()
        try:
            with trio.fail_after(successor.wait):
                await self._channel.send(encode(Hello(VERSION, self._own_pid)))
                received = await self._channel.receive()
            if received is None:
                successor.lost()
            else:
                line, handles = received
                sockets = list(handles)
                message = decode(line)
                successor.receive(message)
                if isinstance(message, Offer):
                    if len(sockets) != message.clients + message.workers or not sockets:
                        raise Unexpected("the sockets did not come with the offer")
                    self.pid = message.pid
                    self.clients = sockets[: message.clients]
                    self.workers = sockets[message.clients :]
                    return
        except trio.TooSlowError:
            successor.fail("the running master does not answer")
        except (Unexpected, OSError) as error:
            successor.fail(f"the running master is not understood: {error}")
        for sock in sockets:
            sock.close()
        raise TakeOverFailed(f"cannot take over: {successor.why}")

    async def run(
        self,
        on_change: Callable[[bytes], None],
        on_refused: Callable[[], None],
    ) -> None:
        """Listen to the predecessor until it has ended. A checkpoint.

        Args:
            on_change: called with what a key has used there. Synchronous.
            on_refused: called if the predecessor serves on after this process has begun to. Synchronous.
        """
        successor = self._successor
        while True:
            try:
                received = await self._channel.receive()
                if received is None:
                    break
                line, sockets = received
                for sock in sockets:
                    sock.close()
                message = decode(line)
                successor.receive(message)
            except trio.ClosedResourceError:
                # By :meth:`close`: it is decided.
                return
            except (Unexpected, OSError) as error:
                if successor.state is not SuccessorState.SERVING:
                    successor.fail(f"the running master is not understood: {error}")
                break
            if isinstance(message, Begin):
                self._models = message.models
            elif isinstance(message, Change):
                on_change(message.line.encode())
            elif isinstance(message, Refused) and self._arrived:
                on_refused()
            self._changed.unpark_all()
        successor.lost()
        self._changed.unpark_all()

    async def begin(self) -> Mapping[str, Sequence[str]]:
        """Tell the predecessor that this process could serve, and wait until it may accept workers. A checkpoint.

        Returns:
            The workers that are linked to the predecessor, with their models; empty if it has ended meanwhile.

        Raises:
            TakeOverFailed: the predecessor goes on.
        """
        self._successor.ready()
        if self._successor.state is SuccessorState.READY:
            await self._tell(Ready())
        await self._wait(lambda: self._successor.accepts_workers)
        return self._models

    async def arrive(self) -> None:
        """Tell the predecessor that the workers have joined, and wait until this may accept clients. A checkpoint.

        Raises:
            TakeOverFailed: the predecessor goes on.
        """
        self._successor.linked()
        if self._successor.state is SuccessorState.ARRIVING:
            await self._tell(Linked())
        await self._wait(lambda: self._successor.accepts_clients)

    async def serve(self) -> None:
        """Tell the predecessor that this process accepts clients. A checkpoint."""
        self._arrived = True
        if not self._successor.alone:
            await self._tell(Serving())

    @property
    def alone(self) -> bool:
        """Whether the predecessor has ended."""
        return self._successor.alone

    def close(self) -> None:
        """Close the connection to the predecessor, which goes on if this process does not serve. Synchronous."""
        self._channel.close()

    async def _tell(self, message: Ready | Linked | Serving) -> None:
        # What is broken is found by the task that receives.
        with suppress(OSError, trio.ClosedResourceError):
            await self._channel.send(encode(message))

    async def _wait(self, is_so: Callable[[], bool]) -> None:
        successor = self._successor
        with trio.move_on_after(successor.wait) as waiting:
            while not is_so() and successor.state is not SuccessorState.FAILED:
                await self._changed.park()
        if waiting.cancelled_caught:
            successor.fail("the running master does not answer")
        if successor.state is SuccessorState.FAILED:
            raise TakeOverFailed(f"cannot take over: {successor.why}")


async def ask_to_replace(handovers: Handovers, path: Path) -> int:
    """Have a running master start a process that takes its place, and wait until that serves. A checkpoint.

    Args:
        handovers: how the master is reached.
        path: at which it waits.

    Returns:
        The number of the new process.

    Raises:
        TakeOverFailed: no master waits there; or it goes on, and the message says why.
    """
    try:
        channel = await handovers.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        raise TakeOverFailed(f"no running master to replace: none waits at {path}") from None
    except OSError as error:
        raise TakeOverFailed(f"no running master to replace: {path}: {error.strerror or error}") from error
    with closing(channel):
        try:
            await channel.send(encode(Replace()))
            received = await channel.receive()
            message = None if received is None else decode(received[0])
        except (Unexpected, OSError) as error:
            raise TakeOverFailed(f"the running master is not understood: {error}") from error
    match message:
        case Replaced(pid=pid):
            return pid
        case Refused(reason=reason):
            raise TakeOverFailed(f"the running master goes on: {reason}")
        case _:
            raise TakeOverFailed("the running master has ended, or does not know how to be replaced")


async def wait_for_workers(manager: WorkerManager, models: Mapping[str, Collection[str]]) -> None:
    """Wait until workers have joined with their models, but not longer than ``LINK_TIMEOUT``. A checkpoint.

    Args:
        manager: of the successor.
        models: the names of the workers, with their models.

    Raises:
        TakeOverFailed: none has.
    """
    wanted = {name: set(names) for name, names in models.items()}

    def present() -> dict[str, list[str]]:
        return {name: names for name, names in manager.models().items() if name in wanted}

    with trio.move_on_after(LINK_TIMEOUT):
        while any(  # noqa: ASYNC110  (only a master that takes over waits, and workers do not have to tell it)
            not names <= set(present().get(name, ())) or name not in present()
            for name, names in wanted.items()
        ):
            await trio.sleep(_LOOK)
    if wanted and not present():
        raise TakeOverFailed(
            f"cannot take over: none of the {len(wanted)} workers has joined within {LINK_TIMEOUT:g} s"
        )
    missing = sorted(name for name in wanted if name not in present())
    if missing:
        logger.warning("workers have not joined yet", extra={"fields": {"workers": missing}})
