"""The states of a call, and which message is allowed in which of them.

Theory of operation
===================

A call is one request and one answer on a link. Both ends keep a state for it, and move it by what they
themselves *say* and by what they *hear*. The words for the states are the same at both ends, but at any
instant the two states may differ, because messages need time to get across:

``IDLE``        the call has not been opened
``UPLOADING``   the request's body is under way, no answer yet
``WAITING``     the request's body is complete, no answer yet
``EARLY``       the answer has begun while the request's body is still under way
``ANSWERING``   the request's body is complete, the answer is under way
``CANCELLING``  the master has given the call up, the worker has not stopped yet
``ENDED``       ``Done`` or ``Failed``: the work has stopped, and no more will be said by the worker

Saying is meant as handing to the outbox, not as writing to a socket: the body of a request that has been said
completely may still wait there for credit. What an end says it says in order, so the other end hears it in
order, with one exception, which is the point of it: ``Cancel`` goes ahead of a body, and then the rest of
that body is never sent.

There are four tables, for each role what it says and what it hears. A pair that is not in the table is a
mistake: of the peer's, if heard, and then the session ends with ``ProtocolError``; of the local user's, if
said, and then it raises ``RuntimeError``. What each end says is strict. What it hears has to allow for
messages that crossed:

- a master that has cancelled still hears an answer, until ``Done`` or ``Failed`` comes. It is dropped, and no
  credit is given for it. That last message always comes, and is what frees the slot;
- a worker that has ended a call still hears its body, credit for its answer, and a ``Cancel``. All are
  ignored, except that the ``Cancel`` drops what still waits in the outbox.

After its ``Done`` or ``Failed`` a worker never names the call again; after its ``Cancel`` a master never
does. So a master's ``ENDED`` and a worker's ``CANCELLING`` hear nothing at all.

Ended calls need no memory. Each call's number is greater than all before it on the link; a number that is not
open is ``ENDED`` if it is not greater than the greatest, else ``IDLE``.
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
    RegisterModel,
    Shutdown,
    UnregisterModel,
)

__all__ = [
    "LINK_MESSAGES",
    "RECEIVE_TRANSITIONS",
    "SEND_TRANSITIONS",
    "LastData",
    "MessageKind",
    "Role",
    "State",
    "Table",
    "markdown",
]


class Role(enum.Enum):
    """The two ends of a link."""

    MASTER = "master"
    WORKER = "worker"


# Of strings, which are hashed in C: the tables are asked for every message.
class State(enum.StrEnum):
    """What has become of a call, seen from one end. See the top of this module."""

    IDLE = "IDLE"
    UPLOADING = "UPLOADING"
    WAITING = "WAITING"
    EARLY = "EARLY"
    ANSWERING = "ANSWERING"
    CANCELLING = "CANCELLING"
    ENDED = "ENDED"


class LastData:
    """``Data`` with ``last`` set; the tables treat it as a message of its own."""


#: What may stand in a table's column.
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

#: What each role may hear about the link itself, once the handshake is over and in any order.
LINK_MESSAGES: Final[Mapping[Role, frozenset[type]]] = {
    Role.MASTER: frozenset({RegisterModel, UnregisterModel, Heartbeat, Drain}),
    Role.WORKER: frozenset({ModelRegistered, ModelRejected, Heartbeat, Drain, Shutdown}),
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
    """Return ``table`` as a Markdown table: a row for each state, a column for each message, "·" for a
    mistake.

    Messages and states of which the whole table says nothing are left out.
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
