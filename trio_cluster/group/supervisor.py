"""The supervisor of a group: the process that ``trio-cluster master --processes N`` starts as, and N masters below it.

Theory of operation
===================

*Clients.* The supervisor opens the listening sockets, once, and gives them to its members, which all accept from them:
there is one queue of connections. So a connection is never lost with the process that would have accepted it, a member
that is stuck takes none, and a busy one takes fewer. (With a socket for each member, ``SO_REUSEPORT``, a member that
dies resets the connections that wait in its queue, and the kernel gives connections to members that are busy or stuck.)

*Workers.* A worker has a link to each member, all through one port. The supervisor accepts there. It looks at what a
connection sends first, without taking it (``MSG_PEEK``), finds out which member it is for (``net/addressing.py``), and
passes the socket to it. A connection that names none, such as a worker's first one, goes to one member after the other;
the master's handshake says which it has reached, and how many there are. The supervisor touches nothing that comes
afterwards.

*The end of a member* is noticed by the end of its process. It is started again, after a pause that grows if it does not
live long. Connections of workers that are for it wait meanwhile.

*The end of the supervisor* is noticed by the members by the end of their socket to it; they stop then (``member.py``).

*Signals.* The members have process groups of their own, so that Ctrl-C in a terminal reaches the supervisor alone. It
passes SIGTERM on: at the first signal to let the members drain, at the second one to end them at once.

*Limits of keys* are counted here for all members, unless they count in a Redis server (``limiter.py``).

*Members ask each other* through the supervisor, which has a socket to each: for ``/cluster/status``, ``/metrics``,
``/cluster/events`` (``live.py``) and what operators do (``front.py``). One that does not answer within
:data:`PATIENCE` seconds is left out.
"""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import attrs
import trio

from ..limits.memory import MemoryLimiter
from ..net.acceptor import accept_all
from ..net.addressing import HEAD_MAX, Incomplete, addressed_process
from ..net.sockets import Listeners
from ..net.streams import ByteStream, TcpStream, sockets_of
from .channel import GroupChannel
from .limiter import LimitCounter
from .member import VARIABLE
from .messages import (
    Ask,
    AskState,
    Link,
    Message,
    Process,
    Replies,
    Reply,
    Request,
    Reserve,
    Response,
    Settle,
    Start,
    Up,
)
from .metrics import RetiredCounters
from .restarts import Restarts

__all__ = ["PATIENCE", "Supervisor"]

logger = logging.getLogger("trio_cluster.group")

#: Seconds that a member has to answer another one.
PATIENCE: Final = 3.0
#: Seconds until a connection of a worker has to say which process it is for.
_HEAD_TIMEOUT: Final = 10.0
#: Connections of which that is not known. One more, and the oldest of them is closed.
_MOST_UNKNOWN: Final = 256
#: Seconds between two looks at a connection whose beginning is not complete.
_LOOK: Final = 0.01
#: Connections that wait for a member that is not there, and how long they do, in seconds.
_MOST_WAITING: Final = 256
_WAIT: Final = 20.0
#: Seconds from the second signal, or from the end of its socket, until a member is killed.
_KILL_AFTER: Final = 6.0


class Supervisor:
    """Starts the processes of a group, keeps them running, and connects them.

    Args:
        processes: how many there are.
        name: of the group.
        command: starts a member.
        environ: the environment of the members.
        clients: the listeners for clients, which are not used here.
        workers: those for workers.
        limiter: counts the requests of keys that have limits, for all members; ``None``: they count elsewhere.

    Attributes:
        reloader: has all members read their configuration again; ``None``: they have none.
    """

    def __init__(
        self,
        processes: int,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        clients: Listeners,
        workers: Listeners,
        limiter: MemoryLimiter | None = None,
    ) -> None:
        self.reloader: Callable[[], Awaitable[None]] | None = None
        self._counter = None if limiter is None else LimitCounter(limiter)
        self._name = name
        self._command = command
        self._environ = environ
        self._clients = sockets_of(clients)
        self._workers = workers
        self._slots = [_Slot(number) for number in range(processes)]
        self._next = 0
        self._stopping = trio.Event()
        self._failure: int | None = None
        self._unknown: dict[trio.CancelScope, None] = {}
        self._asked: dict[int, _Question] = {}
        self._ids = 0
        self._retired = RetiredCounters()
        self._first_up = trio.Event()
        self._all_up = False
        self._nursery: trio.Nursery | None = None

    @property
    def is_running(self) -> bool:
        """Whether all processes serve, or have done so."""
        return self._all_up

    def stop(self) -> None:
        """Let all members finish their requests and end. Synchronous, idempotent."""
        self._stopping.set()
        for slot in self._slots:
            slot.send_signal(signal.SIGTERM)

    async def reload_members(self) -> None:
        """Have each member read its configuration again, which says in its log what has come of it. A checkpoint."""
        for slot in self._slots:
            slot.reload()
        await trio.lowlevel.checkpoint()

    async def run(self, started: Callable[[Up], object]) -> int:
        """Run the group until it is stopped. A checkpoint. When cancelled, the members are ended at once.

        Args:
            started: called with what the first member says, when all of them serve. Synchronous.

        Returns:
            The exit code: that of a member that has ended before it served for the first time, otherwise 0.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery

            def admit(stream: ByteStream) -> None:
                assert isinstance(stream, TcpStream)
                nursery.start_soon(self._pass_on, stream.detach())

            for listener in self._workers:
                nursery.start_soon(accept_all, listener, admit)
            async with trio.open_nursery() as members:
                for slot in self._slots:
                    members.start_soon(self._keep, slot, started)
            nursery.cancel_scope.cancel(reason="the group has ended")
        for slot in self._slots:
            slot.close_waiting()
        return self._failure or 0

    async def _keep(self, slot: _Slot, started: Callable[[Up], object]) -> None:
        """Run a member again and again, until the group is stopped."""
        was_up = False

        def on_up() -> None:
            nonlocal was_up
            was_up = True
            if slot.number == 0:
                self._first_up.set()
            first = self._slots[0].up
            if not self._all_up and first is not None and all(each.up for each in self._slots):
                self._all_up = True
                started(first)

        while not self._stopping.is_set():
            began = trio.current_time()
            code = await self._run_once(slot, on_up)
            if self._stopping.is_set():
                break
            if not was_up:
                # It has said why.
                self._failure = code if code > 0 else 1
                self.stop()
                break
            pause = slot.restarts.ended(trio.current_time() - began)
            how = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
            fields = {"process": slot.number, "pid": slot.last_pid, "retry_in": pause}
            logger.error(
                "a process of this master has ended (%s); it is started again", how, extra={"fields": fields}
            )
            with trio.move_on_after(pause):
                await self._stopping.wait()

    async def _run_once(self, slot: _Slot, on_up: Callable[[], None]) -> int:
        """Run a member, and return the exit code of its process. A checkpoint."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await trio.lowlevel.open_process(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env={**self._environ, VARIABLE: str(theirs.fileno())},
                    process_group=0,
                )
            except OSError as error:
                ours.close()
                logger.error("a process cannot be started: %s", error.strerror or error)
                return 1
            except BaseException:
                ours.close()
                raise
        channel = GroupChannel(ours)
        slot.process, slot.channel = process, channel
        start = Start(
            slot.number, len(self._slots), self._name, len(self._clients), self._workers[0].local_address
        )
        if self._stopping.is_set():
            slot.send_signal(signal.SIGTERM)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.write)
                nursery.start_soon(self._listen, slot, channel, on_up)

                async def let_start() -> None:
                    if slot.number > 0:
                        # What is made at the first start, such as an authority, is made once. The others have loaded
                        # the program meanwhile.
                        await self._first_up.wait()
                    channel.post(start, self._clients, keep=True)

                nursery.start_soon(let_start)
                await process.wait()
                nursery.cancel_scope.cancel(reason="the process has ended")
        finally:
            slot.up = None
            with trio.CancelScope(shield=True):
                if process.returncode is None:
                    # The second signal of the member, which ends what it still does.
                    process.terminate()
                    with trio.move_on_after(_KILL_AFTER):
                        await process.wait()
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            channel.close()
            slot.process = slot.channel = None
            slot.last_pid = process.pid
            self._retired.retire(slot.number)
            if self._counter is not None:
                self._counter.lost(slot.number)
            for question in list(self._asked.values()):
                question.lost(slot.number)
        assert process.returncode is not None
        return process.returncode

    async def _listen(self, slot: _Slot, channel: GroupChannel, on_up: Callable[[], None]) -> None:
        while True:
            try:
                received = await channel.receive()
            except ValueError as error:
                logger.error("a process of this master is not understood: %s", error)
                received = None
            if received is None:
                break
            message, _ = received
            self._on_message(slot, channel, message, on_up)
        # Its process is ending. One that goes on without the connection is of no use.
        await trio.sleep(_KILL_AFTER + 60)
        if slot.process is not None:
            slot.process.kill()

    def _on_message(
        self, slot: _Slot, channel: GroupChannel, message: Message, on_up: Callable[[], None]
    ) -> None:
        match message:
            case Up():
                if self._all_up:
                    logger.info(
                        "a process of this master serves again",
                        extra={"fields": {"process": slot.number, "pid": slot.pid}},
                    )
                slot.serves(message)
                on_up()
            case Ask():
                self._ask(slot, channel, message)
            case Reply():
                question = self._asked.get(message.id)
                if question is not None:
                    question.answered(slot.number, message.response)
            case Reserve() | AskState() | Settle() if self._counter is not None:
                answer = self._counter.receive(slot.number, message)
                if answer is not None:
                    channel.post(answer)
            case _:
                logger.error("a process of this master sends what it should not: %s", type(message).__name__)

    # Members that ask each other

    def _ask(self, asking: _Slot, channel: GroupChannel, ask: Ask) -> None:
        running = [slot for slot in self._slots if slot.up is not None]
        if ask.first:
            asked = running[:1]
        elif ask.to >= 0:
            asked = [slot for slot in running if slot.number == ask.to]
        else:
            asked = [slot for slot in running if slot is not asking] if ask.what is not None else []
        self._ids += 1
        number = self._ids
        is_scrape = isinstance(ask.what, Request) and ask.what.path == "/metrics"
        ends = self._retired.ends()

        def on_over(responses: dict[int, Response]) -> None:
            self._asked.pop(number, None)
            if ask.own is not None:
                responses[asking.number] = ask.own
            if is_scrape:
                responses = self._retired.without_ended(responses, ends)
                self._retired.note(responses)
            processes = [
                Process(
                    slot.number,
                    slot.pid,
                    slot.up is not None,
                    slot.restarts.count,
                    responses.get(slot.number),
                )
                for slot in self._slots
            ]
            channel.post(Replies(ask.id, processes, self._retired.text(responses) if is_scrape else b""))

        question = _Question({slot.number for slot in asked}, on_over)
        self._asked[number] = question
        for slot in asked:
            assert slot.channel is not None
            slot.channel.post(Ask(number, ask.what))
        question.check()
        if not question.over:
            assert self._nursery is not None
            self._nursery.start_soon(question.time_out)

    # Connections of workers

    async def _pass_on(self, sock: socket.socket) -> None:
        """Find out for which member a connection is, and pass it on. A checkpoint."""
        passed = False
        try:
            with trio.move_on_after(_HEAD_TIMEOUT) as scope:
                self._unknown[scope] = None
                for oldest in list(self._unknown)[: max(0, len(self._unknown) - _MOST_UNKNOWN)]:
                    oldest.cancel(reason="there are too many connections that say nothing")
                try:
                    process = await _addressed(sock)
                finally:
                    self._unknown.pop(scope, None)
                # From here on there is no checkpoint.
                passed = True
                self._slot_for(process).pass_link(sock)
        except (OSError, EOFError):
            pass
        finally:
            if not passed:
                sock.close()

    def _slot_for(self, process: int | None) -> _Slot:
        if process is not None and process < len(self._slots):
            return self._slots[process]
        # One after the other, of those that run. A process that there is not is refused by the one that gets it.
        running = [slot for slot in self._slots if slot.up is not None] or self._slots
        self._next += 1
        return running[self._next % len(running)]


async def _addressed(sock: socket.socket) -> int | None:
    """Return the process that a connection is for, without taking anything from it. A checkpoint.

    Raises:
        OSError, EOFError: the connection is over.
    """
    seen = 0
    while True:
        await trio.lowlevel.wait_readable(sock)
        data = sock.recv(HEAD_MAX, socket.MSG_PEEK)
        try:
            return addressed_process(data)
        except Incomplete:
            if not data:
                raise EOFError from None
            if len(data) == seen:
                # It is readable all the time, and cannot be waited for.
                await trio.sleep(_LOOK)
            seen = len(data)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@attrs.define(eq=False)
class _Slot:
    """The place of one process of the group."""

    number: int
    process: trio.Process | None = None
    channel: GroupChannel | None = None
    up: Up | None = None
    """What it has said when it began to serve; ``None``: it does not serve."""
    restarts: Restarts = attrs.field(factory=Restarts)
    last_pid: int = 0
    _reload_when_up: bool = False
    _waiting: deque[tuple[float, socket.socket]] = attrs.field(factory=deque)

    @property
    def pid(self) -> int:
        """The number of its process; 0: it does not run."""
        return 0 if self.process is None else self.process.pid

    def send_signal(self, number: int) -> None:
        """Send its process a signal, if it runs. Synchronous."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    def reload(self) -> None:
        """Have its process read its configuration again: as soon as it serves, if it does not yet. Synchronous.

        Until then SIGHUP would end it; and it may have read the file already.
        """
        if self.up is not None:
            self.send_signal(signal.SIGHUP)
        else:
            self._reload_when_up = True

    def serves(self, up: Up) -> None:
        """Its process has begun to serve. Synchronous."""
        self.up = up
        if self._reload_when_up:
            self._reload_when_up = False
            self.reload()
        self.pass_waiting()

    def pass_link(self, sock: socket.socket) -> None:
        """Pass a connection to the process, as soon as it serves; or close it. Synchronous."""
        if self.up is not None and self.channel is not None:
            self.channel.post(Link(), [sock])
            return
        self._waiting.append((trio.current_time() + _WAIT, sock))
        while len(self._waiting) > _MOST_WAITING or self._waiting[0][0] < trio.current_time():
            self._waiting.popleft()[1].close()

    def close_waiting(self) -> None:
        """Close the connections that wait for the process. Synchronous."""
        for _, sock in self._waiting:
            sock.close()
        self._waiting.clear()

    def pass_waiting(self) -> None:
        """Pass the connections that have waited for the process. Synchronous."""
        waiting, self._waiting = self._waiting, deque()
        for until, sock in waiting:
            if until < trio.current_time():
                sock.close()
            else:
                self.pass_link(sock)


class _Question:
    """What some members are asked, until all of them have answered or have taken too long.

    Args:
        asked: their numbers.
        on_over: called once, with the answers. Synchronous.
    """

    def __init__(self, asked: set[int], on_over: Callable[[dict[int, Response]], None]) -> None:
        self.over = False
        self._missing = asked
        self._on_over = on_over
        self._responses: dict[int, Response] = {}

    def answered(self, process: int, response: Response | None) -> None:
        """A member has answered. Synchronous."""
        if response is not None and process in self._missing:
            self._responses[process] = response
        self.lost(process)

    def lost(self, process: int) -> None:
        """A member will not answer any more. Synchronous."""
        self._missing.discard(process)
        self.check()

    def check(self) -> None:
        """End it if no answer is missing. Synchronous."""
        if not self._missing:
            self._end()

    async def time_out(self) -> None:
        """End it after :data:`PATIENCE` seconds, with the answers that there are then. A checkpoint."""
        await trio.sleep(PATIENCE)
        self._end()

    def _end(self) -> None:
        if not self.over:
            self.over = True
            self._on_over(self._responses)
