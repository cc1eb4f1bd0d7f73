"""Counts what a node does, and provides the other ends of its connections, which do only what a test makes them do.

The counts do not depend on the machine, nor on its load: how often tasks were scheduled, how many functions in Python
were called in them, and which system calls they made. The other ends are plain sockets in the test's own task, which is
not counted; so everything that is counted was done by the node.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from collections import Counter
from types import FrameType
from typing import Any, Final

import attrs
import pytest
import trio
import wsproto
from wsproto.events import AcceptConnection, Request

from trio_cluster.core.model import ModelInfo
from trio_cluster.link.frames import FrameReader, frame
from trio_cluster.link.websocket import PATH
from trio_cluster.protocol import SUBPROTOCOL, MasterSession, WorkerSession

__all__ = ["Client", "Counted", "Counting", "FarMaster", "FarWorker", "has_counters", "make_writes_visible"]

HOST: Final = "127.0.0.1"
#: Builtin functions and methods that are system calls, by module or class.
_SYSTEM_CALLS: Final = {
    "posix": {"read", "write", "readv", "writev"},
    "socket": {"send", "sendall", "sendmsg", "recv", "recv_into", "accept", "shutdown", "setsockopt"},
    "epoll": {"modify", "register", "unregister", "poll"},
    "kqueue": {"control"},
}


#: Functions of this module that are called while it counts, and are left out.
_OURS: Final = {"after_task_step", "visible_write"}


def make_writes_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the writes of a node visible to the profiler, which does not see builtins that builtins call.

    To be called before there are connections, since they keep a reference to the function.
    """
    write = os.write

    def visible_write(descriptor: int, data: bytes) -> int:
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", visible_write)


@attrs.define
class Counted:
    """What was counted.

    Attributes:
        steps: how often a task was scheduled.
        calls: how often a function or method in Python was called, or a generator or coroutine resumed.
        system_calls: those that tasks made. What the event loop waits with is not among them.
        functions: the calls, by name.
    """

    steps: int = 0
    calls: int = 0
    system_calls: Counter[str] = attrs.field(factory=Counter)
    functions: Counter[str] = attrs.field(factory=Counter)

    def explain(self, times: int = 1) -> str:
        """Return the most frequent functions and all system calls, with their counts divided by ``times``."""
        lines = [f"{self.steps / times:8.2f} steps, {self.calls / times:.2f} calls, of which"]
        lines += [f"{count / times:8.2f} {name}" for name, count in self.functions.most_common(60)]
        lines += [f"{count / times:8.2f} system call {name}" for name, count in self.system_calls.items()]
        return "\n".join(lines)


class Counting(trio.abc.Instrument):
    """Counts what is done within a ``with`` block, by all tasks but the one that the block is in."""

    def __init__(self) -> None:
        self.counted = Counted()

    def __enter__(self) -> Counted:
        self._own = trio.lowlevel.current_task()
        trio.lowlevel.add_instrument(self)
        return self.counted

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.remove_instrument(self)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is not self._own:
            self.counted.steps += 1
            sys.setprofile(self._note)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, what: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code.co_name not in _OURS:
                self.counted.calls += 1
                self.counted.functions[f"{code.co_qualname} ({code.co_filename.rpartition('/')[2]})"] += 1
        elif event == "c_call":
            owner = getattr(what, "__self__", None)
            place = getattr(owner, "__name__", None) or type(owner).__name__
            if what.__name__ in _SYSTEM_CALLS.get(place, ()):
                self.counted.system_calls[what.__name__] += 1


class _FarEnd:
    """The other end of a connection: a socket of the test, with a websocket on it once that is open."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.session: Any = None
        self._reader: FrameReader | None = None

    async def receive(self) -> bytes:
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(self.sock)
        return self.sock.recv(1 << 20)

    def send(self, data: bytes) -> None:
        """Send what the other end takes at once; the tests do not send more."""
        assert self.sock.send(data) == len(data)

    async def receive_events(self) -> list[Any]:
        """Return the events that have arrived, and wait for some."""
        while not (events := self._take_in(await self.receive())):
            pass
        return events

    def receive_events_nowait(self) -> list[Any]:
        """Return the events that have arrived; there may be none."""
        try:
            return self._take_in(self.sock.recv(1 << 20))
        except BlockingIOError:
            return []

    def _take_in(self, data: bytes) -> list[Any]:
        assert self._reader is not None
        self._reader.feed(data)
        events: list[Any] = []
        while (message := self._reader.next_message()) is not None:
            events += self.session.receive(message, trio.current_time())
        return events

    def flush(self) -> None:
        """Send the messages of the session."""
        while (batch := self.session.next_message()) is not None:
            self.send(frame(batch.data, masked=isinstance(self.session, WorkerSession)))

    def close(self) -> None:
        self.sock.close()


class FarWorker(_FarEnd):
    """A worker with one chat model, ``m``."""

    @classmethod
    async def connect(cls, port: int) -> FarWorker:
        self = cls(socket.create_connection((HOST, port)))
        protocol = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self.send(protocol.send(Request(host="m", target=PATH, subprotocols=[SUBPROTOCOL])))
        head = await self.receive()
        while b"\r\n\r\n" not in head:
            head += await self.receive()
        self.session = WorkerSession(
            "far", "1", trio.current_time(), heartbeat_interval=900, silence_timeout=1000, resume_window=15
        )
        self._reader = FrameReader(masked=False, limit=1 << 20, on_control=lambda _: None)
        self._reader.feed(head.partition(b"\r\n\r\n")[2])
        self.session.register(ModelInfo("m", "chat"))
        self.flush()
        while not any(hasattr(event, "name") for event in await self.receive_events()):
            pass
        return self


class FarMaster(_FarEnd):
    """A master that a worker connects to."""

    @classmethod
    async def accept(cls, listener: socket.socket) -> FarMaster:
        listener.setblocking(False)
        await trio.lowlevel.wait_readable(listener)
        self = cls(listener.accept()[0])
        protocol = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
        while not list(protocol.events()):
            protocol.receive_data(await self.receive())
        self.send(protocol.send(AcceptConnection(subprotocol=SUBPROTOCOL)))
        self.session = MasterSession(
            "far",
            "1",
            trio.current_time(),
            heartbeat_interval=900,
            silence_timeout=1000,
            resume_window=15,
            session_id="0123456789abcdef" * 2,
        )
        self.flush()
        self._reader = FrameReader(masked=True, limit=1 << 20, on_control=lambda _: None)
        while not any(hasattr(event, "owner") for event in await self.receive_events()):
            pass
        self.session.model_registered("m")
        self.flush()
        return self


class Client(_FarEnd):
    """A client with a connection of its own."""

    def __init__(self, port: int) -> None:
        super().__init__(socket.create_connection((HOST, port)))
        self.received = b""

    def ask(self, *, stream: bool, key: str = "") -> None:
        """Ask the model ``m`` for a chat completion, with an API key if there is one."""
        message = {"role": "user", "content": "hello"}
        body = json.dumps({"model": "m", "messages": [message], "stream": stream}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        if key:
            head += f"Authorization: Bearer {key}\r\n"
        self.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def receive_until(self, mark: bytes) -> bytes:
        """Return what arrives until ``mark`` is in it."""
        while mark not in self.received:
            self.received += await self.receive()
        received, self.received = self.received, b""
        return received


def has_counters() -> bool:
    """Return whether this interpreter and this system have what is needed for counting."""
    return sys.implementation.name == "cpython" and hasattr(select, "epoll") and sys.getprofile() is None
