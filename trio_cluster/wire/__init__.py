"""The cluster protocol without IO: messages, their encoding, and the two ends of a link's conversation.

No module here knows a socket, a task or a clock. Start reading at ``_state.py`` for what may be said when,
and at ``_session.py`` for how a session is used.
"""

from __future__ import annotations

from ._bounds import NAME_MAX, TEXT_MAX
from ._codec import MAX_MESSAGE, decode, encode
from ._errors import HandshakeError, PeerSilent, ProtocolError
from ._frames import FrameReader, frame
from ._master import MasterEvent, MasterSession
from ._messages import (
    MAGIC,
    PIECE,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    SUBPROTOCOL,
    WINDOW,
    Cancel,
    Data,
    Done,
    Drain,
    Failed,
    ForwardRequest,
    ForwardResponse,
    Grant,
    Handshake,
    Heartbeat,
    Leave,
    Message,
    ModelRegistered,
    ModelRejected,
    RegisterModel,
    UnregisterModel,
)
from ._outbox import Batch
from ._session import MAX_BACKLOG, MAX_CALLS, Session
from ._state import HEARS, SAYS, Role, State, markdown
from ._worker import WorkerEvent, WorkerSession

__all__ = [
    "HEARS",
    "MAGIC",
    "MAX_BACKLOG",
    "MAX_CALLS",
    "MAX_MESSAGE",
    "NAME_MAX",
    "PIECE",
    "PROTOCOL_MAX",
    "PROTOCOL_MIN",
    "SAYS",
    "SUBPROTOCOL",
    "TEXT_MAX",
    "WINDOW",
    "Batch",
    "Cancel",
    "Data",
    "Done",
    "Drain",
    "Failed",
    "ForwardRequest",
    "ForwardResponse",
    "FrameReader",
    "Grant",
    "Handshake",
    "HandshakeError",
    "Heartbeat",
    "Leave",
    "MasterEvent",
    "MasterSession",
    "Message",
    "ModelRegistered",
    "ModelRejected",
    "PeerSilent",
    "ProtocolError",
    "RegisterModel",
    "Role",
    "Session",
    "State",
    "UnregisterModel",
    "WorkerEvent",
    "WorkerSession",
    "decode",
    "encode",
    "frame",
    "markdown",
]
