"""What the supervisor of a group and its members tell each other: lines of JSON on a Unix socket.

Both ends are of the same version of this package, since the supervisor starts the members. So there is no negotiation,
and a line that cannot be read is a bug, which ends the connection.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ..core.principal import Limits
from ..limits.account import Demand, LimitState, Refusal

__all__ = [
    "Ask",
    "AskState",
    "Link",
    "Look",
    "Message",
    "Notice",
    "Process",
    "Replies",
    "Reply",
    "Request",
    "Reserve",
    "Reserved",
    "Response",
    "Settle",
    "Start",
    "Up",
    "decode",
    "encode",
]


class Start(msgspec.Struct, frozen=True, tag=True):
    """To a member, first, with the listening sockets for clients: what it is."""

    process: int
    """Its number."""
    processes: int
    """How many processes the group has."""
    name: str
    """The name of the group."""
    clients: int
    """The number of the sockets."""
    workers: tuple[str, int]
    """Where the supervisor listens for workers."""


class Up(msgspec.Struct, frozen=True, tag=True):
    """From a member: it serves."""

    url: str
    models: list[str]


class Link(msgspec.Struct, frozen=True, tag=True):
    """To a member, with a socket: a connection of a worker, of which nothing has been read."""


class Request(msgspec.Struct, frozen=True, tag=True):
    """A request to the API that one process passes to another."""

    method: str
    path: str
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = []
    body: bytes = b""
    scheme: str = "http"
    client: tuple[str, int] | None = None


class Response(msgspec.Struct, frozen=True):
    """The answer to a request."""

    status: int
    headers: list[tuple[bytes, bytes]] = []
    body: bytes = b""


class Process(msgspec.Struct, frozen=True):
    """A process of the group, and what it has answered."""

    process: int
    pid: int
    """0: it does not run at the moment."""
    serves: bool
    """Whether it has said that it serves."""
    restarts: int
    """How often it was started again."""
    response: Response | None = None
    """``None``: it was not asked, or it did not answer in time."""


class Notice(msgspec.Struct, frozen=True, tag=True):
    """What a member has changed in what all processes share."""

    kind: str
    """``keys``: the API keys; ``members``: the authority, invitations and certificates of workers."""
    worker: str = ""
    """The worker whose link is to end."""


class Look(msgspec.Struct, frozen=True, tag=True):
    """What has changed in what a process shows live? See ``live.py``."""

    process: int
    """The number of the process that asks."""
    seen: int = 0
    """The number of the last answer that it has got; 0: it has none."""
    over: bool = False
    """It will not ask again soon; no answer is expected."""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """From a member: ask other members, and answer with ``Replies``. To a member: answer with ``Reply``."""

    id: int
    what: Request | Notice | Look | None = None
    """``None``: only which processes there are."""
    first: bool = False
    """Only the running process with the smallest number is asked, which may be the one that asks."""
    own: Response | None = None
    """The own answer of the member that asks."""
    to: int = -1
    """The number of the only process that is asked; -1: all others are."""


class Reply(msgspec.Struct, frozen=True, tag=True):
    """From a member that was asked."""

    id: int
    response: Response | None = None


class Replies(msgspec.Struct, frozen=True, tag=True):
    """To the member that has asked."""

    id: int
    processes: list[Process] = []
    """All processes of the group, in the order of their numbers, with the own one."""
    retired: bytes = b""
    """With the answers to ``GET /metrics``: what processes have counted that have ended, in the same format."""


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """From a member: a request wants to reserve what it may use of the limits of its key."""

    id: int
    key: str
    limits: Limits
    demand: Demand


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """To a member: the request is within the limits, or not."""

    id: int
    tokens: int = 0
    state: LimitState | None = None
    refusal: Refusal | None = None


class Settle(msgspec.Struct, frozen=True, tag=True):
    """From a member: a reservation is over."""

    id: int
    tokens: int | None
    """That were used; ``None``: those that were reserved."""
    counts: bool
    """Whether it counts as a request."""


class AskState(msgspec.Struct, frozen=True, tag=True):
    """From a member: how much is left of the limits of a key? Answered with ``Reserved``."""

    id: int
    key: str
    limits: Limits


Message: TypeAlias = Start | Up | Link | Ask | Reply | Replies | Reserve | Reserved | Settle | AskState

_decoder = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return the line for a message, without its end."""
    return msgspec.json.encode(message)


def decode(line: bytes) -> Message:
    """Return the message of a line.

    Raises:
        ValueError: it is none.
    """
    message: Message = _decoder.decode(line)
    return message
