"""The messages of the cluster protocol: frozen values, one class for each message.

Most of them are also the events that a session returns. Fields have limits, which are checked whenever a message is
made; see ``bounds.py``.

A later version of this package may add fields with defaults without a new protocol version; a node ignores fields that
it does not know. Messages cannot be added that way: an unknown message ends the session.
"""

from __future__ import annotations

import math
from typing import Any, Final, TypeAlias

import attrs
import msgspec

from trio_cluster.core.answer import Usage
from trio_cluster.core.limits import PROCESSES_MAX, WINDOW
from trio_cluster.core.model import ChatModelOptions, ModelInfo
from trio_cluster.core.story import WorkerTimes
from trio_cluster.errors import ApiError

from . import bounds as bounds

__all__ = [
    "MAGIC",
    "PIECE",
    "PROTOCOL_MAX",
    "PROTOCOL_MIN",
    "SUBPROTOCOL",
    "WINDOW",
    "Ack",
    "Cancel",
    "Data",
    "Done",
    "Drain",
    "Failed",
    "ForwardRequest",
    "ForwardResponse",
    "Grant",
    "Handshake",
    "Heartbeat",
    "Message",
    "ModelRegistered",
    "ModelRejected",
    "OtherMasters",
    "RegisterModel",
    "Shutdown",
    "UnregisterModel",
]

#: The first field of the first message, by which each end knows that the other is a trio_cluster node and not some
#: other websocket service.
MAGIC: Final = int.from_bytes(b"trioclus", "big")
#: The versions of the protocol that this package supports.
PROTOCOL_MIN: Final = 1
PROTOCOL_MAX: Final = 1
#: The websocket subprotocol for these versions.
SUBPROTOCOL: Final = "trio-cluster.1"

#: Bytes of a body in one ``Data`` at most. Larger pieces are slower to send, and all other calls wait meanwhile.
PIECE: Final = 64 * 1024

_CALL: Final = bounds.integer(1, (1 << 63) - 1)
_USAGE_FIELDS: Final = frozenset(field.name for field in attrs.fields(Usage))
_COUNT: Final = bounds.integer(0, (1 << 31) - 1)


@attrs.frozen
class Handshake:
    """Both ways, first: who the sender is, and which versions of the protocol it supports."""

    magic: int
    protocol_min: int = attrs.field(validator=_COUNT)
    protocol_max: int = attrs.field(validator=_COUNT)
    node_id: str = attrs.field(validator=bounds.name)
    version: str = attrs.field(validator=bounds.name)
    """The version of the package, for people; nothing depends on it."""
    instance: str = attrs.field(default="", validator=bounds.text(bounds.NAME_MAX))
    """Drawn by each process at its start: tells a worker that reconnects from another process that uses its name."""
    resume_window: float = attrs.field(default=0.0, validator=bounds.seconds)
    """Seconds for which the sender would wait for another connection of this session; 0: it does not. The smaller of
    both holds. Above 0, the sender knows ``Ack``."""
    session: str = attrs.field(default="", validator=bounds.session_id)
    """From a master: the id of the session, which it has drawn. From a worker: the session that is to be resumed; empty
    for a new one."""
    received: int = attrs.field(default=0, validator=bounds.integer(0, (1 << 63) - 1))
    """How many batches of that session the sender has processed."""
    proxied: bool = False
    """The connection goes through a proxy, as the master sees from headers, or the sender's options say. Its end need
    not be the end of a process, then."""
    cancelled: tuple[int, ...] = attrs.field(default=(), validator=bounds.cancelled)
    """From a master that resumes: calls that it has cancelled. The worker does not begin those that it has not received
    yet. If there are very many, some are left out, and are begun and stopped at once."""
    linked: tuple[str, ...] = attrs.field(default=(), validator=bounds.names)
    """From a worker: the instances of the masters that it has a link to. One that finds itself there does not take the
    new connection for the worker's return."""
    process: int = attrs.field(default=0, validator=bounds.integer(0, PROCESSES_MAX - 1))
    """From a master of several processes: which of them this is. A worker has a link to each."""
    processes: int = attrs.field(default=1, validator=bounds.integer(1, PROCESSES_MAX))
    """From a master: how many processes it is, behind one address."""


@attrs.frozen
class RegisterModel:
    """Worker to master: the worker serves this model. Answered by ``ModelRegistered`` or ``ModelRejected``."""

    name: str = attrs.field(validator=bounds.name)
    kind: str = attrs.field(validator=bounds.name)
    owner: str = attrs.field(validator=bounds.name)
    created: int = attrs.field(validator=bounds.integer(0, (1 << 53) - 1))
    """Seconds since the epoch."""
    options: dict[str, Any] = attrs.field(factory=dict, validator=bounds.json_object)
    """The fields of ``ChatModelOptions``."""
    also: tuple[str, ...] = attrs.field(default=(), validator=bounds.names)
    """What it answers beside the routes of its kind: ``extra_endpoints`` of ``ModelInfo``."""
    via: tuple[str, ...] = attrs.field(default=(), validator=bounds.names)
    """The ids of the other clusters through which it comes: ``via`` of ``ModelInfo``."""
    hedge: bool = False
    """A request whose answer is late may be sent to another replica as well."""

    @classmethod
    def of(cls, info: ModelInfo) -> RegisterModel:
        """Return the message that announces ``info``.

        Raises:
            ValueError: a field, for instance one in ``extra_fields``, cannot be sent; the message names it.
        """
        options = attrs.asdict(info.options, recurse=False)
        also, via = info.extra_endpoints, info.via
        return cls(info.name, info.kind, info.owner, info.created, options, also, via, info.hedge)

    def info(self) -> ModelInfo:
        """Return the model. Options that this version does not know are left out.

        Raises:
            ValueError: an option has a value of the wrong type, or the name is not valid for a model; the text can be
                the reason of a ``ModelRejected``. The kind is not checked.
        """
        known = {field.name for field in attrs.fields(ChatModelOptions)}
        try:
            options = ChatModelOptions(**{key: self.options[key] for key in known & self.options.keys()})
        except TypeError as exc:
            # Only the first argument of the error that attrs raises is for people.
            raise ValueError(f"options: {exc.args[0]}") from exc
        return ModelInfo(
            self.name,
            self.kind,  # type: ignore[arg-type]
            self.owner,
            self.created,
            options,
            self.also,
            self.via,
            self.hedge is True,
        )


@attrs.frozen
class ModelRegistered:
    """Master to worker: from now on, requests for this model may come."""

    name: str = attrs.field(validator=bounds.name)


@attrs.frozen
class ModelRejected:
    """Master to worker: the master does not offer this model, or not from this worker."""

    name: str = attrs.field(validator=bounds.name)
    reason: str = attrs.field(validator=bounds.text())


@attrs.frozen
class UnregisterModel:
    """Worker to master: send no new requests for this model. Open calls go on."""

    name: str = attrs.field(validator=bounds.name)


@attrs.frozen
class Heartbeat:
    """Both ways: the sender lives. A worker reports how busy it is; a master sends zeros."""

    running: int = attrs.field(default=0, validator=_COUNT)
    waiting: int = attrs.field(default=0, validator=_COUNT)
    capacity: int = attrs.field(default=0, validator=_COUNT)
    lag: float = attrs.field(default=0.0, validator=bounds.seconds)
    """The longest time, in seconds, for which the sender's event loop did only one thing since its last heartbeat."""
    blocked: str = attrs.field(default="", validator=bounds.text(bounds.NAME_MAX))
    """What blocks the sender's event loop right now: it lives, but neither reads nor answers. Empty if nothing does."""
    progress: tuple[tuple[int, int], ...] = attrs.field(default=(), validator=bounds.progress)
    """For each call its number, and how many bytes of its answer exist by now, sent or not; -1 while it waits for a
    slot.

    If there are very many calls, some are left out.
    """
    replaced: bool = False
    """From a master: another process takes its place at its address. The worker opens a link to that one, beside this
    one, which goes on until the master ends. It may be taken back by a later heartbeat."""
    on_demand: tuple[tuple[str, str, float], ...] = attrs.field(default=(), validator=bounds.on_demand)
    """From a worker: for each of its models that runs on demand its name, its state (``ready``, ``starting``,
    ``cold``, or ``failed``: cold, since it could not be started), and the seconds until it can answer, by expectation.
    Any other state counts as cold. If there are very many, some are left out."""
    starts: tuple[tuple[int, str, float], ...] = attrs.field(default=(), validator=bounds.starts)
    """From a worker: for each call that waits for its model to run its number, what happens (``starting NAME``), and
    the seconds until that is over, by expectation; -1 if that is not known."""


@attrs.frozen
class ForwardRequest:
    """Master to worker: a new call. Its body follows in ``Data`` messages, the last of which is marked."""

    call: int = attrs.field(validator=_CALL)
    """Chosen by the master; each is greater than all before it on this link."""
    endpoint: str = attrs.field(validator=bounds.name)
    kind: str = attrs.field(validator=bounds.name)
    model: str = attrs.field(validator=bounds.name)
    content_type: str = attrs.field(validator=bounds.content_type)
    headers: dict[str, str] = attrs.field(validator=bounds.headers)
    request_id: str = attrs.field(validator=bounds.text(bounds.NAME_MAX))
    timeout: float | None = attrs.field(validator=bounds.seconds)
    """Idle timeout: the longest silence, in seconds; ``None`` is no limit."""
    budget: float | None = attrs.field(validator=bounds.seconds)
    """Total timeout: seconds from now until the whole answer must be there; ``None`` is no limit."""
    size: int = attrs.field(validator=bounds.integer(-1, (1 << 63) - 1))
    """Bytes of body that will follow; -1 if that is not known yet."""
    once: bool = False
    """The body is streamed through the master and cannot be replayed: the worker must not give the call back."""
    checked: bool = False
    """The master has validated the whole body: the worker need not do so again."""
    principal: str = attrs.field(default="", validator=bounds.optional_name)
    """The name of the key that the client sent; empty where no key is required."""
    # These have no validators: every value is taken for the nearest one that means something, where it is used.
    weight: float = 1.0
    """The principal's share of a node that is busy, relative to the weights of others that wait."""
    priority: int = 0
    """The principal's priority: 1 is high, 0 normal, -1 low."""
    max_tokens: int = 0
    """Tokens that the answer may have, as far as the request says so; 0: it does not. It is part of the cost by which
    waiting requests are served."""
    query: str = attrs.field(default="", validator=bounds.query)
    """The query of the URL, without the question mark; empty if there is none."""
    alias: str = ""
    """The name that the client asked for, if that is an alias of the model: answers have it as their model. Without a
    validator, since that would cost every request: what is no name is taken for none."""


@attrs.frozen
class ForwardResponse:
    """Worker to master: the head of the answer."""

    call: int = attrs.field(validator=_CALL)
    status: int = attrs.field(validator=bounds.integer(200, 599))
    content_type: str = attrs.field(validator=bounds.content_type)
    headers: tuple[tuple[str, str], ...] = attrs.field(default=(), validator=bounds.headers)


# A struct of msgspec, since an instance of an attrs class takes three to five times as long to create, and there are
# very many of these. Nothing in it can refer back to it, so the garbage collector need not track it (`gc=False`).
class Data(msgspec.Struct, frozen=True, gc=False):
    """Both ways: the next bytes of a body.

    ``last`` ends the body of a request. It is never set in an answer, which ends with ``Done`` or ``Failed``.
    """

    call: int
    data: bytes
    """At most ``PIECE`` bytes. Empty, it is a sign of life: the handler works, and there is nothing to send yet."""
    last: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.call < 1 << 63:
            raise ValueError(f"call: must be from 1 to {(1 << 63) - 1}, not {self.call}")
        if len(self.data) > PIECE:
            raise ValueError(f"data: longer than {PIECE} bytes")


@attrs.frozen
class Done:
    """Worker to master: the answer is complete, and the work for it has stopped."""

    call: int = attrs.field(validator=_CALL)
    usage: dict[str, int] = attrs.field(factory=dict, validator=bounds.usage)
    """The tokens of the answer, by the names of the fields of ``Usage``; empty if none were reported. Names that the
    master does not know are ignored."""
    times: dict[str, int] = attrs.field(factory=dict)
    """What the worker has measured of the call, in microseconds, by the names of ``core/story.py``; for people. Without
    a validator: names that are not known are ignored, and so are values that make no sense."""
    finish: str = ""
    """Why the choices of a text ended, in their order, with commas; for people, and likewise without a validator. The
    master uses the first ``NAME_MAX`` characters, if they are printable."""

    @classmethod
    def of(cls, call: int, usage: Usage | None, times: WorkerTimes, finish: str = "") -> Done:
        """Return the message that ends a call with this usage, these times, and these reasons of its choices."""
        finish = finish[: bounds.NAME_MAX] if finish.isascii() else ""
        return cls(call, {} if usage is None else attrs.asdict(usage), times, finish)

    def tokens(self) -> Usage | None:
        """Return the reported usage."""
        if not self.usage:
            return None
        return Usage(**{name: self.usage[name] for name in _USAGE_FIELDS & self.usage.keys()})


@attrs.frozen
class Failed:
    """Worker to master: the answer will not be completed, and the work for it has stopped."""

    call: int = attrs.field(validator=_CALL)
    status: int = attrs.field(validator=bounds.integer(400, 599))
    message: str = attrs.field(validator=bounds.text())
    type: str = attrs.field(validator=bounds.text(bounds.NAME_MAX))
    code: str | None = attrs.field(validator=bounds.optional_text(bounds.NAME_MAX))
    param: str | None = attrs.field(validator=bounds.optional_text(bounds.NAME_MAX))
    retry_after: float | None = attrs.field(validator=bounds.seconds)
    retryable: bool = False
    """The worker is at fault and not the request, so the master may try another replica. Never derived from the code or
    the status, which belong to the handler."""
    timed_out: bool = False
    """A deadline of the request has passed."""
    over_capacity: bool = False
    """The worker had no room for the call, and did not begin it. Like ``retryable`` never derived from the code."""
    times: dict[str, int] = attrs.field(factory=dict)
    """As in ``Done``."""

    @classmethod
    def of(
        cls,
        call: int,
        error: ApiError,
        *,
        retryable: bool = False,
        timed_out: bool = False,
        over_capacity: bool = False,
        times: WorkerTimes | None = None,
    ) -> Failed:
        """Return the message that carries ``error``.

        Never raises. Errors come from handlers, and a call whose error cannot be sent would never end; so what is too
        long is truncated, and what is not valid is left out.
        """
        after = error.retry_after
        if not isinstance(after, int | float) or not 0.0 <= after < math.inf:
            after = None
        return cls(
            call,
            error.status if isinstance(error.status, int) and 400 <= error.status <= 599 else 500,
            bounds.clip(error.message),
            bounds.clip(error.type, bounds.NAME_MAX),
            None if error.code is None else bounds.clip(error.code, bounds.NAME_MAX),
            None if error.param is None else bounds.clip(error.param, bounds.NAME_MAX),
            None if after is None else float(after),
            retryable,
            timed_out,
            over_capacity,
            {} if times is None else times,
        )

    def error(self) -> ApiError:
        """Return the error as it was raised on the worker."""
        return ApiError(
            self.status,
            self.message,
            code=self.code,
            type=self.type,
            param=self.param,
            retry_after=self.retry_after,
        )


@attrs.frozen
class Cancel:
    """Master to worker: the answer is not wanted any more. A ``Done`` or ``Failed`` is still due."""

    call: int = attrs.field(validator=_CALL)
    reason: str = attrs.field(validator=bounds.text())
    complete: bool = False
    """The client has the whole answer, so the call is counted as completed."""


@attrs.frozen
class Grant:
    """Both ways: the receiver's consumer has taken so many bytes of this call's body; as many more may be sent."""

    call: int = attrs.field(validator=_CALL)
    credit: int = attrs.field(validator=bounds.integer(1, WINDOW))


@attrs.frozen
class Drain:
    """Both ways: the sender is about to stop. Open calls go on; a worker wants no new ones, a master opens none."""

    reason: str = attrs.field(validator=bounds.text())


@attrs.frozen
class Shutdown:
    """Master to worker: stop. Finish the open calls, close the link, and do not reconnect."""

    reason: str = attrs.field(validator=bounds.text())


@attrs.frozen
class Ack:
    """Both ways, if both have a ``resume_window``: how much of the session the sender has processed."""

    received: int = attrs.field(validator=bounds.integer(0, (1 << 63) - 1))
    """Batches since the session began, without those that begin with ``Handshake``, ``Heartbeat`` or ``Ack``."""


@attrs.frozen
class OtherMasters:
    """Worker to master, if that one has sent an ``instance``: what of the worker's slots is not at this master's call.

    It is sent when that changes, at most four times a second, and holds until the next one.
    """

    calls: int = attrs.field(validator=_COUNT)
    """Calls that did not come from this master and whose work has not stopped."""
    masters: tuple[tuple[str, str], ...] = attrs.field(default=(), validator=bounds.others)
    """The other masters that the worker is linked to: their names, and the addresses at which it has found them."""


Message: TypeAlias = (
    Handshake
    | RegisterModel
    | ModelRegistered
    | ModelRejected
    | UnregisterModel
    | Heartbeat
    | ForwardRequest
    | ForwardResponse
    | Data
    | Done
    | Failed
    | Cancel
    | Grant
    | Drain
    | Shutdown
    | Ack
    | OtherMasters
)
