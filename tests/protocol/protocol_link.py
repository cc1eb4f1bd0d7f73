"""Two sessions and the link between them, which moves only when a test says so."""

from __future__ import annotations

from collections import deque
from typing import Any

from trio_cluster.protocol import (
    WINDOW,
    Batch,
    Cancel,
    Data,
    Done,
    Failed,
    Grant,
    MasterSession,
    Message,
    WorkerSession,
    decode,
)


class Spy:
    """Checks the order and the credit of everything that one end sends."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.outstanding: dict[int, int] = {}
        self.over: set[int] = set()

    def wrote(self, batch: Batch) -> None:
        carried: dict[int, int] = {}
        for message in decode(batch.data):
            self.messages.append(message)
            if isinstance(message, Data):
                assert message.call not in self.over, "data after the end"
                carried[message.call] = carried.get(message.call, 0) + len(message.data)
                used = self.outstanding.get(message.call, 0) + len(message.data)
                assert used <= WINDOW, "sent beyond the credit"
                self.outstanding[message.call] = used
            elif isinstance(message, Cancel | Done | Failed):
                assert message.call not in self.over, "a second end"
                self.over.add(message.call)
        assert {call: count for call, count in carried.items() if count} == dict(batch.sent)

    def received(self, data: bytes) -> None:
        for message in decode(data):
            if isinstance(message, Grant):
                self.outstanding[message.call] -= message.credit


class Link:
    """A master and a worker, and the messages that are on their way between them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.master = MasterSession("m", "1.0", self.now)
        self.worker = WorkerSession("w", "1.0", self.now)
        self.to_worker: deque[bytes] = deque()
        self.to_master: deque[bytes] = deque()
        self.master_spy = Spy()
        self.worker_spy = Spy()

    def master_writes(self, limit: int = 65536) -> Batch | None:
        """Put the master's next websocket message on its way."""
        batch = self.master.next_message(limit)
        if batch is not None:
            self.master_spy.wrote(batch)
            self.to_worker.append(batch.data)
        return batch

    def worker_writes(self, limit: int = 65536) -> Batch | None:
        """Put the worker's next websocket message on its way."""
        batch = self.worker.next_message(limit)
        if batch is not None:
            self.worker_spy.wrote(batch)
            self.to_master.append(batch.data)
        return batch

    def master_reads(self) -> list[Any]:
        """Deliver the oldest message on its way to the master."""
        if not self.to_master:
            return []
        data = self.to_master.popleft()
        self.master_spy.received(data)
        return list(self.master.receive(data, self.now))

    def worker_reads(self) -> list[Any]:
        """Deliver the oldest message on its way to the worker."""
        if not self.to_worker:
            return []
        data = self.to_worker.popleft()
        self.worker_spy.received(data)
        return list(self.worker.receive(data, self.now))

    def settle(self) -> tuple[list[Any], list[Any]]:
        """Move everything that can move; return the events of the master and those of the worker."""
        events: tuple[list[Any], list[Any]] = ([], [])
        while True:
            while self.master_writes() is not None:
                pass
            while self.worker_writes() is not None:
                pass
            if not self.to_master and not self.to_worker:
                return events
            while self.to_worker:
                events[1].extend(self.worker_reads())
            while self.to_master:
                events[0].extend(self.master_reads())

    def open(self, body: bytes | None = b"") -> int:
        """Open a call at the master, with its whole body, or with none of it yet."""
        call = self.master.open(endpoint="chat.completions", kind="chat", model="echo")
        if body is not None:
            self.master.send_body(call, body, last=True)
        return call


def open_link() -> Link:
    """Return a link after the handshakes."""
    link = Link()
    link.settle()
    return link
