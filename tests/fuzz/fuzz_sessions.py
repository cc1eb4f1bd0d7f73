"""Fuzz target: a master's and a worker's session, the link between them, and what the peer should not send.

An input is a program: what the two local sides do, when messages are written and read, and, in the second part of the
target, which other messages arrive between them. Checked at each step:

- The local side gets nothing but the documented exceptions, and the session is then as it was.
- The peer's messages raise nothing but ``ProtocolError``, which closes the session. Without foreign messages there is
  none, but for a peer that does not read.
- Each call has the events that are documented, in their order, and exactly one end. ``open_calls`` has the calls that
  began and have not ended.
- The number of open calls is bounded, and so is what is received of a call and not taken.
- Neither end writes more of a body than it has credit for, and ``Batch.sent`` counts what it has written.

At the end of a program all calls are ended, everything is delivered, and both sessions are idle; or they are closed,
and the worker has no calls any more. The CPU time is proportional to the steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import attrs
from fuzz_input import Bytecode, Input, seed, timed
from fuzz_messages import EXAMPLES

from trio_cluster.core.answer import Usage
from trio_cluster.core.model import ModelInfo
from trio_cluster.errors import ApiError, InvalidRequest, Overloaded, WorkerLost
from trio_cluster.protocol import (
    PIECE,
    WINDOW,
    Cancel,
    Data,
    Done,
    Failed,
    ForwardRequest,
    ForwardResponse,
    Grant,
    Handshake,
    MasterSession,
    Message,
    PeerSilent,
    ProtocolError,
    State,
    WorkerSession,
    decode,
    encode,
    master as master_module,
    session as session_module,
    worker as worker_module,
)

__all__ = ["FINDINGS", "SEEDS", "check"]

#: Bounds that a program can reach, in place of the real ones.
_CALLS_MAX: Final = 12
_BACKLOG_MAX: Final = 64 * 1024
#: Steps of a program.
_STEPS_MAX: Final = 600
#: Bytes of all bodies that a program queues. What is queued is bounded by the local side, which here is the program.
_BODIES_MAX: Final = 4 * 1024 * 1024
_NOISE: Final = bytes(range(251)) * 1100
_SIZES: Final = [0, 1, 7, 200, 5000, PIECE - 1, PIECE, PIECE + 1, 100_000, WINDOW, WINDOW + 7]
_LIMITS: Final = [1, 300, PIECE, 1 << 30]
_LOCAL: Final = (RuntimeError, ValueError, InvalidRequest, Overloaded, WorkerLost)
_NOT_READING: Final = "the peer sends but does not read"


def check(encoded: bytes) -> None:
    """Check one input."""
    given = Input.of(encoded)
    before = session_module.MAX_CALLS, session_module.MAX_BACKLOG
    _set_bounds(_CALLS_MAX, _BACKLOG_MAX)
    try:
        # What a program costs beside its bytes is more than a piece for each step.
        timed(lambda: _Program(given).run(), len(given.data), 8 * min(_STEPS_MAX, len(given.data)) + 400)
    finally:
        _set_bounds(*before)


def _set_bounds(calls: int, backlog: int) -> None:
    for module in (session_module, master_module, worker_module):
        for name, value in (("MAX_CALLS", calls), ("MAX_BACKLOG", backlog)):
            if hasattr(module, name):
                setattr(module, name, value)


@attrs.define(eq=False)
class _Call:
    """What one end knows of a call by its events and its actions."""

    cancelled: bool = False
    complete: bool = False
    begun: bool = False
    untaken: int = 0


class _End:
    """One end of the link: its session, the calls that should be open, and the messages on their way to it."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.calls: dict[int, _Call] = {}
        self.arriving: deque[bytes] = deque()
        # What has been sent and not been granted, by call; while all messages are from the other session.
        self.outstanding: dict[int, int] = {}

    def state(self) -> tuple[Any, ...]:
        session = self.session
        return (
            session.open_calls,
            [session.state(call) for call in session.open_calls],
            [session.queued(call) for call in session.open_calls],
            session.close_reason,
            session.sendable,
            session.urgent,
            session.unsent,
            session.idle,
        )

    def check_bounds(self) -> None:
        assert set(self.session.open_calls) == self.calls.keys(), (
            f"{self.session.open_calls}, not {set(self.calls)}"
        )
        assert len(self.calls) <= _CALLS_MAX
        assert all(0 <= call.untaken <= WINDOW for call in self.calls.values()), (
            "more than the window is unread"
        )


class _Program:
    """A program, and the two ends that it runs on."""

    def __init__(self, given: Input) -> None:
        self.code = Bytecode(given.data[: 16 * 1024])
        self.foreign = given.part % 2 == 1
        self.spoiled = False
        self.room = _BODIES_MAX
        self.now = 0.0
        self.master = _End(MasterSession("m", "1", 0.0))
        self.worker = _End(WorkerSession("w", "1", 0.0))
        self.actions: list[Callable[[], None]] = [
            self.write,
            self.read,
            self.open,
            self.send_body,
            self.cancel,
            self.respond,
            self.send,
            self.done,
            self.fail,
            self.take,
            self.talk,
            self.pass_time,
            self.exchange,
            self.close,
        ]
        if self.foreign:
            self.actions += [self.insert, self.insert, self.repeat, self.lose]

    def run(self) -> None:
        self.exchange()
        for _ in range(_STEPS_MAX):
            if self.code.over:
                break
            self.code.pick(self.actions)()
            self.master.check_bounds()
            self.worker.check_bounds()
        self.finish()

    # What the program is made of

    def end(self) -> _End:
        return self.code.pick([self.master, self.worker])

    def some_call(self) -> int:
        """Return the number of a call, mostly of one that was opened."""
        highest = max(1, *self.master.calls, *self.worker.calls, 1)
        return 1 + self.code.byte() % (highest + 1) if self.code.byte() < 224 else self.code.byte() - 3

    def some_size(self) -> int:
        """Return a number of bytes to send. All of a program's bodies together have a limit."""
        size = min(self.code.pick(_SIZES), self.room)
        self.room -= size
        return size

    def local(self, end: _End, action: Callable[[], Any]) -> Any:
        """Do something at one end, which is refused without effect, or done. Return the result."""
        before = end.state()
        try:
            return action()
        except _LOCAL as error:
            assert end.state() == before, f"{error!r} has changed the session from {before} to {end.state()}"
            return error

    # The network

    def write(self) -> None:
        self._write(self.end(), self.code.pick(_LIMITS))

    def _write(self, end: _End, limit: int = PIECE) -> bool:
        sendable = end.session.sendable
        batch = end.session.next_message(limit)
        assert (batch is not None) == sendable
        if batch is None:
            return False
        other = self.other(end)
        other.arriving.append(batch.data)
        carried: dict[int, int] = {}
        for message in decode(batch.data):
            if isinstance(message, Data):
                carried[message.call] = carried.get(message.call, 0) + len(message.data)
        assert dict(batch.sent) == {call: count for call, count in carried.items() if count}
        for call, count in carried.items():
            end.outstanding[call] = end.outstanding.get(call, 0) + count
            assert self.spoiled or end.outstanding[call] <= WINDOW, f"call {call}: sent beyond the credit"
        return True

    def read(self) -> None:
        self._read(self.end())

    def _read(self, end: _End) -> bool:
        if not end.arriving:
            return False
        data = end.arriving.popleft()
        closed = end.session.close_reason is not None
        if not self.spoiled:
            for message in decode(data):
                if isinstance(message, Grant):
                    end.outstanding[message.call] -= message.credit
        try:
            events = end.session.receive(data, self.now)
        except ProtocolError as error:
            assert end.session.close_reason is not None
            assert closed or self.spoiled or error.reason == _NOT_READING, f"a peer is refused: {error}"
            return True
        assert not closed
        for event in events:
            self.on_event(end, event)
        return True

    def other(self, end: _End) -> _End:
        return self.worker if end is self.master else self.master

    def exchange(self) -> None:
        """Deliver everything that can be delivered."""
        while (
            self._write(self.master)
            or self._write(self.worker)
            or self._read(self.worker)
            or self._read(self.master)
        ):
            pass

    def pass_time(self) -> None:
        self.now += self.code.pick([0.1, 5.0, 31.0])
        for end in (self.master, self.worker):
            try:
                end.session.tick(self.now)
            except PeerSilent:
                assert end.session.close_reason is not None

    def close(self) -> None:
        if self.code.byte() >= 240:
            self.end().session.close("cut")

    # Foreign messages

    def insert(self) -> None:
        """Let something arrive that the other end has not sent."""
        self.spoiled = True
        end = self.end()
        messages = [self.foreign_message() for _ in range(1 + self.code.byte() % 3)]
        data = encode(messages)
        if self.code.byte() % 8 == 0:
            at = self.code.byte() % len(data)
            data = data[:at] + bytes((self.code.byte(),)) + data[at + 1 :]
        end.arriving.appendleft(data)

    def foreign_message(self) -> Message:
        kind = self.code.byte() % 12
        call = max(1, self.some_call())
        if kind == 0:
            return ForwardRequest(call, "e", "chat", "m", "", {}, "", None, None, self.code.byte() - 1)
        if kind == 1:
            return ForwardResponse(call, 200, "text/plain")
        if kind in (2, 3):
            return Data(call, _NOISE[: min(PIECE, self.code.pick(_SIZES))], self.code.byte() % 4 == 0)
        if kind == 4:
            return Done(call)
        if kind == 5:
            return Failed.of(call, ApiError(500, "broke"))
        if kind == 6:
            return Cancel(call, "enough")
        if kind == 7:
            return Grant(call, self.code.pick([1, PIECE, WINDOW]))
        return self.code.pick(list(EXAMPLES))

    def repeat(self) -> None:
        """Let a message arrive twice."""
        end = self.end()
        if end.arriving:
            self.spoiled = True
            end.arriving.append(end.arriving[0])

    def lose(self) -> None:
        """Lose a message."""
        end = self.end()
        if end.arriving:
            self.spoiled = True
            end.arriving.popleft()

    # Events

    def on_event(self, end: _End, event: Any) -> None:
        assert not isinstance(event, Grant)
        if not isinstance(event, ForwardRequest | ForwardResponse | Data | Done | Failed | Cancel):
            assert (event is end.session.peer) == isinstance(event, Handshake)
            return
        if isinstance(event, ForwardRequest):
            assert end is self.worker
            assert event.call not in end.calls
            end.calls[event.call] = _Call()
            return
        call = end.calls[event.call]
        if isinstance(event, Done | Failed):
            assert end is self.master
            del end.calls[event.call]
            return
        assert not call.cancelled, "an event of a call that was cancelled"
        if isinstance(event, Cancel):
            assert end is self.worker
            assert end.session.state(event.call) is State.CANCELLING
            assert end.session.queued(event.call) == 0
            call.cancelled = True
        elif isinstance(event, ForwardResponse):
            assert end is self.master
            assert not call.begun
            call.begun = True
        else:
            assert isinstance(event, Data)
            assert not (call.complete and end is self.worker)
            assert call.begun or end is self.worker
            call.complete = event.last
            assert not (event.last and end is self.master)
            call.untaken += len(event.data)

    # The local side of the master

    def open(self) -> None:
        size = self.code.pick([-1, -1, -1, 0, 7, 200])
        model = self.code.pick(["m", "m", "m", "", "x" * 513, "\n"])
        call = self.local(
            self.master,
            lambda: self.master.session.open(endpoint="e", kind="chat", model=model, size=size, budget=-1.0),
        )
        if isinstance(call, int):
            assert call not in self.master.calls
            self.master.calls[call] = _Call()

    def send_body(self) -> None:
        call, size, last = self.some_call(), self.some_size(), self.code.byte() % 4 == 0
        self.local(self.master, lambda: self.master.session.send_body(call, _NOISE[:size], last=last))

    def cancel(self) -> None:
        number = self.some_call()
        refused = self.local(self.master, lambda: self.master.session.cancel(number, "no more"))
        call = self.master.calls.get(number)
        if call is not None and refused is None and self.master.session.close_reason is None:
            call.cancelled = True
            assert self.master.session.state(number) is State.CANCELLING

    # The local side of the worker

    def respond(self) -> None:
        call, status = self.some_call(), self.code.pick([200, 200, 404, 599, 99, 600])
        kind = self.code.pick(["text/plain", "", "a\r\nb", "ä"])
        self.local(self.worker, lambda: self.worker.session.respond(call, status, kind, [("a", "b")]))

    def send(self) -> None:
        call, size = self.some_call(), self.some_size()
        self.local(self.worker, lambda: self.worker.session.send(call, memoryview(_NOISE)[:size]))

    def done(self) -> None:
        usage = self.code.pick([None, Usage(1, 2), Usage(-1, 2)])
        self._end_call(lambda call: self.worker.session.done(call, usage))

    def fail(self) -> None:
        error = self.code.pick(
            [ApiError(500, "x"), ApiError(599, "x" * 9000, code="\ud800", retry_after=float("nan"))]
        )
        self._end_call(lambda call: self.worker.session.fail(call, error, retryable=True))

    def _end_call(self, end: Callable[[int], None]) -> None:
        call = self.some_call()
        known = call in self.worker.calls
        if self.local(self.worker, lambda: end(call)) is None:
            assert known or self.worker.session.close_reason is not None
            self.worker.calls.pop(call, None)

    # Both

    def take(self) -> None:
        end, number = self.end(), self.some_call()
        call = end.calls.get(number, _Call())
        count = self.code.pick([call.untaken, call.untaken // 3, 0, call.untaken + 1, -1])
        refused = self.local(end, lambda: end.session.grant(number, count))
        if (
            not isinstance(refused, Exception)
            and end.session.close_reason is None
            and 0 <= count <= call.untaken
        ):
            call.untaken -= count

    def talk(self) -> None:
        end = self.end()
        session = end.session
        common = [
            lambda: session.drain("soon" * self.code.byte() * 20),
            lambda: session.queue_heartbeat(),
            lambda: setattr(session, "load", (self.code.byte() - 1, 0, 1)),
            lambda: session.report_progress((call, 7) for call in range(self.code.byte(), 1200)),
            lambda: session.heartbeat_while_blocked(1.5, "x" * 4 * self.code.byte()),
        ]
        own: list[Callable[[], Any]] = [
            lambda: session.model_registered("m"),
            lambda: session.model_rejected("", "x" * 100 * self.code.byte()),
            lambda: session.shut_down("now"),
        ]
        if end is self.worker:
            model = ModelInfo("m", "chat", "o", 1)
            own = [lambda: session.register(model), lambda: session.unregister("x" * 4 * self.code.byte())]
        self.local(end, self.code.pick([*common, *own]))

    # The end

    def finish(self) -> None:
        ends = (self.master, self.worker)
        if not self.spoiled and all(end.session.close_reason is None for end in ends):
            self.finish_quietly()
        if any(end.session.close_reason is not None for end in ends) or self.spoiled:
            for end in ends:
                end.session.close("over")
                end.check_bounds()
                assert end.session.next_message() is None
                assert not end.session.unsent
            for call in tuple(self.worker.calls):
                self.worker.session.fail(call, ApiError(500, "over"))
            assert self.worker.session.idle
            return
        assert self.master.session.idle, "the master is not idle"
        assert self.worker.session.idle, "the worker is not idle"
        assert not self.master.calls
        assert not self.worker.calls

    def finish_quietly(self) -> None:
        """End all calls, and deliver everything, for which bodies may have to wait for credit many times."""
        for _ in range(100):
            for end in (self.master, self.worker):
                for number, call in end.calls.items():
                    if not call.cancelled:
                        end.session.grant(number, call.untaken)
                        call.untaken = 0
            for number in self.worker.calls:
                self.worker.session.fail(number, ApiError(500, "over"))
            self.worker.calls.clear()
            self.exchange()
            if any(end.session.close_reason is not None for end in (self.master, self.worker)):
                return
            if self.master.session.idle and self.worker.session.idle:
                return


(
    _WRITE,
    _READ,
    _OPEN,
    _BODY,
    _CANCEL,
    _RESPOND,
    _SEND,
    _DONE,
    _FAIL,
    _TAKE,
    _TALK,
    _TIME,
    _EXCHANGE,
    _CLOSE,
) = range(14)
_INSERT, _REPEAT, _LOSE = 14, 16, 17
_A_CALL: Final = bytes((_OPEN, 0, 0, _EXCHANGE, _BODY, 0, 0, 3, 1, _BODY, 0, 0, 4, 0, _EXCHANGE))
_AN_ANSWER: Final = bytes(
    (_RESPOND, 0, 0, 0, 0, _SEND, 0, 0, 9, _SEND, 0, 0, 10, _EXCHANGE, _TAKE, 0, 0, 0, 0)
)
_AN_END: Final = bytes((_DONE, 1, 0, 0, _EXCHANGE))

SEEDS: Final = [
    seed(_A_CALL + _AN_ANSWER + _AN_END),
    seed(_A_CALL + _AN_ANSWER + bytes((_CANCEL, 0, 0, _EXCHANGE)) + _AN_END),
    seed(_A_CALL + bytes((_FAIL, 1, 0, 0, _OPEN, 0, 0, _CANCEL, 1, 0))),
    seed(_A_CALL, times=256, start=0, length=4),
    seed(bytes((_OPEN, 3, 0, _BODY, 0, 0, 9, 0, _BODY, 0, 0, 0, 0, _WRITE, 0, 0, _READ, 1, _CANCEL, 0, 0))),
    seed(bytes((_OPEN, 0, 3, _OPEN, 0, 4, _OPEN, 0, 5, _TIME, 1, _TIME, 2, _OPEN, 0, 0))),
    seed(bytes((_TALK, 1, 1, 0, _EXCHANGE)) * 3 + bytes((_TALK, 0, 0, 200)), times=1024, start=15, length=4),
    *[seed(bytes((_TALK, end, kind, 40, _EXCHANGE))) for end in (0, 1) for kind in range(8)],
    seed(_A_CALL + bytes((_CLOSE, 255, 0)) + _AN_ANSWER),
    *[
        seed(_A_CALL + bytes((_INSERT, end, 0, kind, 0, 0, 1, 1)) + _AN_ANSWER + _AN_END, part=1)
        for end in (0, 1)
        for kind in range(12)
    ],
    seed(_A_CALL + _AN_ANSWER + bytes((_WRITE, 1, 2, _REPEAT, 0, _EXCHANGE)), part=1),
    seed(bytes((_WRITE, 0, 0, _LOSE, 1)) + _A_CALL + _AN_ANSWER, part=1),
    seed(bytes((_INSERT, 1, 0, 0, 0, 0, 0, 1)), part=1, times=1024, start=0, length=8),
]

#: What was found once, and must not come back.
FINDINGS: Final[list[bytes]] = []
