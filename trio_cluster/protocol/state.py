"""The states of a call, and which message is allowed in which of them.

Theory of operation
===================

A call is one request and one answer on a link. Both ends keep a state for it, and move it by the messages that they
*send* and *receive*. The states have the same names at both ends, but at any moment the two may differ, because
messages take time to arrive:

``IDLE``        the call has not been opened
``UPLOADING``   the request's body is being sent, the answer has not begun
``WAITING``     the request's body is complete, the answer has not begun
``EARLY``       the answer has begun while the request's body is still being sent
``ANSWERING``   the request's body is complete, the answer is being sent
``CANCELLING``  the master has cancelled the call, the worker has not stopped yet
``ENDED``       ``Done`` or ``Failed``: the work has stopped, and the worker sends nothing more

To send means to put into the outbox, not to write to a socket: the body of a request that has been sent completely may
still wait there for credit. Messages are received in the order in which they were sent, with one exception, which is
intended: ``Cancel`` overtakes a body, and the rest of that body is then never written.

There are four tables: for each role, what it sends and what it receives. A pair that is not in the table is an error.
If it was received, it is an error of the peer, and the session ends with ``ProtocolError``; if it was to be sent, it is
an error of the local caller, and ``RuntimeError`` is raised. The tables for sending are strict. Those for receiving
have to allow for messages that crossed each other:

- A master that has cancelled a call still receives its answer, until ``Done`` or ``Failed`` arrives. The answer is
  dropped, and no credit is granted for it. The last message always arrives, and frees the slot.
- A worker that has ended a call still receives its body, credit for its answer, and a ``Cancel``. All are ignored,
  except that the ``Cancel`` drops what still waits in the outbox.

After ``Done`` or ``Failed`` a worker never refers to the call again; after ``Cancel`` a master never does. So a
master's ``ENDED`` and a worker's ``CANCELLING`` receive nothing at all.

Ended calls take no memory. The number of each call is greater than all before it on the link; a number that is not open
is ``ENDED`` if it is not greater than the greatest so far, else ``IDLE``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, TypeAlias

from .messages import (
    Cancel,
    Data,
    Done,
    Drain,
    Failed,
    ForwardRequest,
    ForwardResponse,
    Grant,
    Heartbeat,
    ModelRegistered,
    ModelRejected,
    OtherMasters,
    RegisterModel,
    Shutdown,
    UnregisterModel,
)

__all__ = [
    "LINK_MESSAGES",
    "RECEIVE_TRANSITIONS",
    "SEND_TRANSITIONS",
    "SESSION_TRANSITIONS",
    "LastData",
    "MessageKind",
    "Role",
    "SessionEvent",
    "SessionState",
    "State",
    "Table",
    "markdown",
    "session_markdown",
]


class Role(enum.Enum):
    """The two ends of a link."""

    MASTER = "master"
    WORKER = "worker"


# Strings, since they are hashed in C: the tables are read for every message.
class State(enum.StrEnum):
    """The state of a call at one end. See the top of this module."""

    IDLE = "IDLE"
    UPLOADING = "UPLOADING"
    WAITING = "WAITING"
    EARLY = "EARLY"
    ANSWERING = "ANSWERING"
    CANCELLING = "CANCELLING"
    ENDED = "ENDED"


class LastData:
    """``Data`` with ``last`` set; a message of its own in the tables."""


#: A column of the tables.
MessageKind: TypeAlias = type[
    ForwardRequest | ForwardResponse | Data | LastData | Done | Failed | Cancel | Grant
]
Table: TypeAlias = Mapping[tuple[State, MessageKind], State]

_IDLE, _UPLOADING, _WAITING, _EARLY, _ANSWERING, _CANCELLING, _ENDED = State

_MASTER_SENDS: Final[Table] = {
    (_IDLE, ForwardRequest): _UPLOADING,
    (_UPLOADING, Data): _UPLOADING,
    (_UPLOADING, LastData): _WAITING,
    (_UPLOADING, Cancel): _CANCELLING,
    (_WAITING, Cancel): _CANCELLING,
    (_EARLY, Data): _EARLY,
    (_EARLY, LastData): _ANSWERING,
    (_EARLY, Cancel): _CANCELLING,
    (_EARLY, Grant): _EARLY,
    (_ANSWERING, Cancel): _CANCELLING,
    (_ANSWERING, Grant): _ANSWERING,
}

_MASTER_RECEIVES: Final[Table] = {
    (_UPLOADING, ForwardResponse): _EARLY,
    (_UPLOADING, Failed): _ENDED,
    (_UPLOADING, Grant): _UPLOADING,
    (_WAITING, ForwardResponse): _ANSWERING,
    (_WAITING, Failed): _ENDED,
    (_WAITING, Grant): _WAITING,
    (_EARLY, Data): _EARLY,
    (_EARLY, Done): _ENDED,
    (_EARLY, Failed): _ENDED,
    (_EARLY, Grant): _EARLY,
    (_ANSWERING, Data): _ANSWERING,
    (_ANSWERING, Done): _ENDED,
    (_ANSWERING, Failed): _ENDED,
    (_ANSWERING, Grant): _ANSWERING,
    (_CANCELLING, ForwardResponse): _CANCELLING,
    (_CANCELLING, Data): _CANCELLING,
    (_CANCELLING, Done): _ENDED,
    (_CANCELLING, Failed): _ENDED,
    (_CANCELLING, Grant): _CANCELLING,
}

_WORKER_SENDS: Final[Table] = {
    (_UPLOADING, ForwardResponse): _EARLY,
    (_UPLOADING, Failed): _ENDED,
    (_UPLOADING, Grant): _UPLOADING,
    (_WAITING, ForwardResponse): _ANSWERING,
    (_WAITING, Failed): _ENDED,
    (_EARLY, Data): _EARLY,
    (_EARLY, Done): _ENDED,
    (_EARLY, Failed): _ENDED,
    (_EARLY, Grant): _EARLY,
    (_ANSWERING, Data): _ANSWERING,
    (_ANSWERING, Done): _ENDED,
    (_ANSWERING, Failed): _ENDED,
    (_CANCELLING, Done): _ENDED,
    (_CANCELLING, Failed): _ENDED,
}

_WORKER_RECEIVES: Final[Table] = {
    (_IDLE, ForwardRequest): _UPLOADING,
    (_UPLOADING, Data): _UPLOADING,
    (_UPLOADING, LastData): _WAITING,
    (_UPLOADING, Cancel): _CANCELLING,
    (_WAITING, Cancel): _CANCELLING,
    (_EARLY, Data): _EARLY,
    (_EARLY, LastData): _ANSWERING,
    (_EARLY, Cancel): _CANCELLING,
    (_EARLY, Grant): _EARLY,
    (_ANSWERING, Cancel): _CANCELLING,
    (_ANSWERING, Grant): _ANSWERING,
    (_ENDED, Data): _ENDED,
    (_ENDED, LastData): _ENDED,
    (_ENDED, Cancel): _ENDED,
    (_ENDED, Grant): _ENDED,
}

SEND_TRANSITIONS: Final[Mapping[Role, Table]] = {Role.MASTER: _MASTER_SENDS, Role.WORKER: _WORKER_SENDS}
RECEIVE_TRANSITIONS: Final[Mapping[Role, Table]] = {
    Role.MASTER: _MASTER_RECEIVES,
    Role.WORKER: _WORKER_RECEIVES,
}

#: The messages that concern no call: each role may receive them in any order after the handshake.
LINK_MESSAGES: Final[Mapping[Role, frozenset[type]]] = {
    Role.MASTER: frozenset({RegisterModel, UnregisterModel, Heartbeat, OtherMasters, Drain}),
    Role.WORKER: frozenset({ModelRegistered, ModelRejected, Heartbeat, Drain, Shutdown}),
}


class SessionState(enum.StrEnum):
    """The state of a session at one end."""

    OPENING = "OPENING"
    """The peer's handshake has not been received."""
    OPEN = "OPEN"
    SUSPENDED = "SUSPENDED"
    """There is no connection, and another one may come."""
    RESUMING = "RESUMING"
    """At a worker: the session was named on a new connection, and the master has not answered."""
    CLOSED = "CLOSED"


class SessionEvent(enum.StrEnum):
    """What moves a session from one state to another."""

    HANDSHAKE = "handshake"
    CUT = "cut"
    DIALLED = "dialled again"
    RESUMED = "resumed"
    OVER = "over"


#: A pair that is not in the table does not occur. A cut in ``OPENING`` is the end: nothing is agreed yet to be resumed.
SESSION_TRANSITIONS: Final[Mapping[tuple[SessionState, SessionEvent], SessionState]] = {
    (SessionState.OPENING, SessionEvent.HANDSHAKE): SessionState.OPEN,
    (SessionState.OPENING, SessionEvent.OVER): SessionState.CLOSED,
    (SessionState.OPEN, SessionEvent.CUT): SessionState.SUSPENDED,
    (SessionState.OPEN, SessionEvent.OVER): SessionState.CLOSED,
    (SessionState.SUSPENDED, SessionEvent.DIALLED): SessionState.RESUMING,
    (SessionState.SUSPENDED, SessionEvent.RESUMED): SessionState.OPEN,
    (SessionState.SUSPENDED, SessionEvent.OVER): SessionState.CLOSED,
    (SessionState.RESUMING, SessionEvent.CUT): SessionState.SUSPENDED,
    (SessionState.RESUMING, SessionEvent.RESUMED): SessionState.OPEN,
    (SessionState.RESUMING, SessionEvent.OVER): SessionState.CLOSED,
}

_COLUMNS: Final[tuple[MessageKind, ...]] = (
    ForwardRequest,
    ForwardResponse,
    Data,
    LastData,
    Done,
    Failed,
    Cancel,
    Grant,
)


def markdown(table: Table) -> str:
    """Return ``table`` as a Markdown table: a row for each state, a column for each message, "·" for an error.

    Messages and states that do not occur in ``table`` are left out.
    """
    columns = [column for column in _COLUMNS if any(column is message for _, message in table)]
    rows = [state for state in State if any(state is before for before, _ in table)]
    lines = [
        "| | " + " | ".join(column.__name__ for column in columns) + " |",
        "|" + " --- |" * (len(columns) + 1),
    ]
    for state in rows:
        cells = [table[state, column].value if (state, column) in table else "·" for column in columns]
        lines.append(f"| **{state.value}** | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def session_markdown() -> str:
    """Return the table of the states of a session as Markdown, in the form of :func:`markdown`."""
    lines = ["| | " + " | ".join(SessionEvent) + " |", "|" + " --- |" * (len(SessionEvent) + 1)]
    for state in SessionState:
        cells = [SESSION_TRANSITIONS.get((state, event), "·") for event in SessionEvent]
        if state is not SessionState.CLOSED:
            lines.append(f"| **{state}** | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
