"""The cluster protocol without IO: messages, their encoding, and the sessions at the two ends of a link.

No module here knows a socket, a task or a clock. Start reading at ``state.py``, for the messages that are allowed in
each state of a call, and at ``session.py``, for how a session is used.
"""

from __future__ import annotations

from .bounds import NAME_MAX, OTHERS_MAX, TEXT_MAX
from .codec import MAX_MESSAGE, decode, encode
from .errors import HandshakeError, PeerSilent, ProtocolError, ResumptionRefused
from .master import MasterEvent, MasterSession
from .messages import (
    MAGIC,
    PIECE,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    SUBPROTOCOL,
    WINDOW,
    Ack,
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
    Message,
    ModelRegistered,
    ModelRejected,
    OtherMasters,
    RegisterModel,
    Shutdown,
    UnregisterModel,
)
from .outbox import Batch
from .proof import proof_of_end
from .session import MAX_BACKLOG, MAX_CALLS, Session
from .state import (
    RECEIVE_TRANSITIONS,
    SEND_TRANSITIONS,
    SESSION_TRANSITIONS,
    Role,
    SessionState,
    State,
    markdown,
    session_markdown,
)
from .worker import WorkerEvent, WorkerSession

__all__ = [
    "MAGIC",
    "MAX_BACKLOG",
    "MAX_CALLS",
    "MAX_MESSAGE",
    "NAME_MAX",
    "OTHERS_MAX",
    "PIECE",
    "PROTOCOL_MAX",
    "PROTOCOL_MIN",
    "RECEIVE_TRANSITIONS",
    "SEND_TRANSITIONS",
    "SESSION_TRANSITIONS",
    "SUBPROTOCOL",
    "TEXT_MAX",
    "WINDOW",
    "Ack",
    "Batch",
    "Cancel",
    "Data",
    "Done",
    "Drain",
    "Failed",
    "ForwardRequest",
    "ForwardResponse",
    "Grant",
    "Handshake",
    "HandshakeError",
    "Heartbeat",
    "MasterEvent",
    "MasterSession",
    "Message",
    "ModelRegistered",
    "ModelRejected",
    "OtherMasters",
    "PeerSilent",
    "ProtocolError",
    "RegisterModel",
    "ResumptionRefused",
    "Role",
    "Session",
    "SessionState",
    "Shutdown",
    "State",
    "UnregisterModel",
    "WorkerEvent",
    "WorkerSession",
    "decode",
    "encode",
    "markdown",
    "proof_of_end",
    "session_markdown",
]
