"""How a new process takes the place of a running master: the protocol of the two, without IO.

The *predecessor* runs, the *successor* wants its ports. They have a connection of their own (``net/handover.py``), and
this conversation on it:

======================  =============================================================================================
successor               predecessor
======================  =============================================================================================
``Hello``
..                      ``Offer``, with the listening sockets. The predecessor serves as before
reads its options, loads its models, runs its hooks
``Ready``
..                      writes down its state, accepts no more workers, ``Begin``, tells its workers to connect anew
accepts workers, and waits until they have joined
``Linked``
..                      accepts no more clients, ``Yours``
accepts clients
``Serving``
..                      closes the listening sockets, finishes its answers, and ends
======================  =============================================================================================

Requests are accepted by the predecessor until the workers have joined the successor, so none has to wait for a worker.
Both processes have the sockets, and a connection that is accepted by neither waits in the kernel's queue. So at every
step exactly one process accepts clients, or is about to:

- If the successor fails before ``Serving`` (it ends, says something that is not understood, or is silent for too long),
  the predecessor accepts again and goes on as before. It says ``Refused``, in case the successor is only slow.
- If the predecessor ends, the successor has the sockets, and serves alone as soon as it can.
- A successor that is told ``Refused`` ends.

A third process may ask the predecessor to start the successor itself: ``Replace``, on a connection of its own. It is
answered when that is decided, with ``Replaced`` or ``Refused``. A service manager asks so (``trio-cluster replace``):
what it has given the master, such as credentials, only the master can pass on.

Both are values here: they are given what was received and what has happened, and say what is accepted, what is to be
sent, and how long the present state may take.
"""

from __future__ import annotations

import enum
import math
from typing import Final, TypeAlias

import msgspec

__all__ = [
    "LINK_TIMEOUT",
    "VERSION",
    "Begin",
    "Change",
    "Hello",
    "Linked",
    "Message",
    "Offer",
    "Predecessor",
    "PredecessorState",
    "Ready",
    "Refused",
    "Replace",
    "Replaced",
    "Serving",
    "Successor",
    "SuccessorState",
    "Unexpected",
    "Yours",
    "decode",
    "encode",
]

#: The version of this conversation. A predecessor refuses a successor that speaks another one.
VERSION: Final = 1

#: Seconds for which a successor waits for the workers to join.
LINK_TIMEOUT: Final = 5.0


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """From the successor, first."""

    version: int
    pid: int


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """From the predecessor, with its listening sockets: first those for clients, then those for workers."""

    pid: int
    clients: int
    workers: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """From the successor: it could serve now."""


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """From the predecessor: accept workers. What is kept in the state directory is complete, and the successor's."""

    models: dict[str, list[str]]
    """The names of the workers, with their models."""


class Linked(msgspec.Struct, frozen=True, tag="linked"):
    """From the successor: the workers have joined."""


class Yours(msgspec.Struct, frozen=True, tag="yours"):
    """From the predecessor: accept clients."""


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """From the successor: it accepts clients. There is no way back from here."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """From the predecessor: it goes on, and the successor is to end."""

    reason: str


class Change(msgspec.Struct, frozen=True, tag="change"):
    """From the predecessor, after ``Begin``: what a key has used there since, as a line of ``limits/ledger.py``."""

    line: str


class Replace(msgspec.Struct, frozen=True, tag="replace"):
    """From a third process: start the successor."""


class Replaced(msgspec.Struct, frozen=True, tag="replaced"):
    """To that process: the successor serves."""

    pid: int


Message: TypeAlias = (
    Hello | Offer | Ready | Begin | Linked | Yours | Serving | Refused | Change | Replace | Replaced
)

_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


class Unexpected(Exception):
    """The other process said something that it must not say now, or that is no message."""


def encode(message: Message) -> bytes:
    """Return a message as a line, without the line break."""
    return msgspec.json.encode(message)


def decode(line: bytes) -> Message:
    """Return the message in a line.

    Raises:
        Unexpected: there is none.
    """
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, ValueError) as error:
        # ValueError: text that is not UTF-8.
        raise Unexpected(f"not a message: {error}") from error


class PredecessorState(enum.StrEnum):
    """The state of a take-over at the process that runs."""

    WAITING = "WAITING"
    """for ``Hello``"""
    PREPARING = "PREPARING"
    """the successor has the sockets; waiting for ``Ready``"""
    LINKING = "LINKING"
    """the successor accepts workers; waiting for ``Linked``"""
    LEAVING = "LEAVING"
    """the successor may accept clients; waiting for ``Serving``"""
    REPLACED = "REPLACED"
    KEPT = "KEPT"
    """the take-over has failed, and this process goes on"""


#: Seconds for which the predecessor waits in each state. Start-up hooks, which may load models, are in the second one.
_PREDECESSOR_WAITS: Final = {
    PredecessorState.WAITING: 10.0,
    PredecessorState.PREPARING: 300.0,
    PredecessorState.LINKING: 3 * LINK_TIMEOUT,
    PredecessorState.LEAVING: 10.0,
}


class Predecessor:
    """The process that runs, for the length of one attempt to take it over.

    Attributes:
        state: see ``PredecessorState``.
        why: why the take-over has failed, for people; empty as long as it has not.
    """

    def __init__(self) -> None:
        self.state = PredecessorState.WAITING
        self.why = ""

    @property
    def accepts_clients(self) -> bool:
        """Whether this process accepts clients."""
        return self.state not in (PredecessorState.LEAVING, PredecessorState.REPLACED)

    @property
    def accepts_workers(self) -> bool:
        """Whether this process accepts workers, and keeps its state in the state directory."""
        return self.accepts_clients and self.state is not PredecessorState.LINKING

    @property
    def is_over(self) -> bool:
        """Whether the attempt has ended, one way or the other."""
        return self.state in (PredecessorState.REPLACED, PredecessorState.KEPT)

    @property
    def wait(self) -> float:
        """Seconds that the present state may take from its beginning; then :meth:`fail` is to be called."""
        return _PREDECESSOR_WAITS.get(self.state, math.inf)

    def receive(self, message: Message) -> None:
        """Take a message. What is to be sent follows from the new state.

        Raises:
            Unexpected: it must not come now. The state is unchanged.
        """
        match self.state, message:
            case PredecessorState.WAITING, Hello(version=version):
                if version != VERSION:
                    raise Unexpected(
                        f"it takes over in version {version} of the protocol, and this master in {VERSION}"
                    )
                self.state = PredecessorState.PREPARING
            case PredecessorState.PREPARING, Ready():
                self.state = PredecessorState.LINKING
            case PredecessorState.LINKING, Linked():
                self.state = PredecessorState.LEAVING
            case PredecessorState.LEAVING, Serving():
                self.state = PredecessorState.REPLACED
            case _:
                raise Unexpected(f"{type(message).__name__} in state {self.state}")

    def fail(self, why: str) -> None:
        """End the attempt: the successor has ended, or is not understood. Without effect once it is over."""
        if not self.is_over:
            self.state = PredecessorState.KEPT
            self.why = why


class SuccessorState(enum.StrEnum):
    """The state of a take-over at the new process."""

    ASKING = "ASKING"
    """waiting for the sockets"""
    PREPARING = "PREPARING"
    """not ready to serve yet"""
    READY = "READY"
    """waiting for ``Begin``"""
    LINKING = "LINKING"
    """accepts workers, and waits for them"""
    ARRIVING = "ARRIVING"
    """waiting for ``Yours``"""
    SERVING = "SERVING"
    FAILED = "FAILED"


#: Seconds for which the successor waits in each state. A predecessor that does not answer any more is not replaced: it
#: may only be stopped, and would go on later.
_SUCCESSOR_WAITS: Final = {
    SuccessorState.ASKING: 10.0,
    SuccessorState.READY: 30.0,
    SuccessorState.ARRIVING: 30.0,
}


class Successor:
    """The new process.

    Attributes:
        state: see ``SuccessorState``.
        alone: whether the predecessor is gone.
        why: why the take-over has failed, for people; empty as long as it has not.
    """

    def __init__(self) -> None:
        self.state = SuccessorState.ASKING
        self.alone = False
        self.why = ""

    @property
    def accepts_clients(self) -> bool:
        """Whether this process accepts clients."""
        return self.state is SuccessorState.SERVING

    @property
    def accepts_workers(self) -> bool:
        """Whether this process accepts workers, and keeps its state in the state directory."""
        return self.state in (SuccessorState.LINKING, SuccessorState.ARRIVING, SuccessorState.SERVING)

    @property
    def wait(self) -> float:
        """Seconds that the present state may take from its beginning; then :meth:`fail` is to be called."""
        return _SUCCESSOR_WAITS.get(self.state, math.inf)

    def receive(self, message: Message) -> None:
        """Take a message. What is to be sent follows from the new state.

        Raises:
            Unexpected: it must not come now. The state is unchanged.
        """
        match self.state, message:
            case SuccessorState.FAILED, _:
                pass
            case _, Refused(reason=reason):
                self.fail(reason)
            case SuccessorState.ASKING, Offer():
                self.state = SuccessorState.PREPARING
            case SuccessorState.READY, Begin():
                self.state = SuccessorState.LINKING
            case SuccessorState.ARRIVING, Yours():
                self.state = SuccessorState.SERVING
            case ((SuccessorState.LINKING | SuccessorState.ARRIVING | SuccessorState.SERVING), Change()):
                pass
            case _:
                raise Unexpected(f"{type(message).__name__} in state {self.state}")

    def ready(self) -> None:
        """This process could serve now. To be called once, in state ``PREPARING``."""
        if self.state is SuccessorState.PREPARING:
            self.state = SuccessorState.SERVING if self.alone else SuccessorState.READY

    def linked(self) -> None:
        """The workers have joined."""
        if self.state is SuccessorState.LINKING:
            self.state = SuccessorState.ARRIVING

    def lost(self) -> None:
        """The predecessor has ended, without having refused."""
        if self.alone:
            return
        if self.state is SuccessorState.ASKING:
            self.fail("the running master has closed the connection")
            return
        self.alone = True
        if self.state in (SuccessorState.READY, SuccessorState.LINKING, SuccessorState.ARRIVING):
            self.state = SuccessorState.SERVING

    def fail(self, why: str) -> None:
        """End the attempt: this process is not going to serve, or no longer. Idempotent; the first reason counts."""
        if self.state is not SuccessorState.FAILED:
            self.state = SuccessorState.FAILED
            self.why = why
