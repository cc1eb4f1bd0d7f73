"""All options of a node, with their units and defaults.

Two attrs classes hold the options: :class:`ServerOptions` has those of every serving process, and
:class:`ClusterServerOptions` contains it and adds those of a cluster. They are mutable, because options of a running
node may be changed, and every assignment is validated like an argument of the constructor. A value of a wrong type
raises ``TypeError``, one out of range :class:`~trio_cluster.errors.OptionsError` (a ``ValueError``); both messages
begin with the name of the option. ``cli/settings.py`` reads options from files, environment variables and flags.

All parts of a node share the one :class:`ClusterServerOptions` object of its server, so a changed value reaches
whatever reads it at the time of use. What reads a value only once, such as the port, does not see the change. Each
option therefore declares when a new value applies: at once, or after a restart (``applies`` in its metadata). When the
configuration is read again, only options of the first kind are assigned, by ``ClusterServer.apply_changes``.
"""

from __future__ import annotations

import enum
import json
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import attrs

from .core.aliases import AliasTargets, read_aliases
from .core.limits import PROCESSES_MAX
from .core.sizes import parse_size
from .core.wake_target import WAKE_PATTERN, read_wake_target
from .errors import OptionsError

__all__ = [
    "Applies",
    "ClusterMode",
    "ClusterServerOptions",
    "ConflictRule",
    "HttpServer",
    "LimitsFailure",
    "OptionChange",
    "Otel",
    "Reloaded",
    "Routing",
    "ServerOptions",
    "StreamFailure",
    "TlsMode",
    "assign_option",
    "changed_options",
    "is_secret",
    "option_schema",
    "parse_boolean",
    "when_applied",
]

#: When a new value of an option applies: to a running node, or to a process that is started with it.
Applies: TypeAlias = Literal["at once", "after a restart"]

#: What happens if a second node registers a model under a name that is served already.
ConflictRule: TypeAlias = Literal["reject", "replicate"]

#: How a replica is chosen for a request.
Routing: TypeAlias = Literal["cost", "least-busy"]

#: The HTTP server that serves the API.
HttpServer: TypeAlias = Literal["lean", "hypercorn"]
#: Where a node's certificate comes from: there is none; or the node makes an authority and a certificate of its own.
TlsMode: TypeAlias = Literal["off", "auto"]
#: What happens to requests of keys with limits while the server that counts them is away.
LimitsFailure: TypeAlias = Literal["allow", "refuse"]
#: Whether traces and metrics are exported: as the environment says, in any case, or not at all.
Otel: TypeAlias = Literal["auto", "on", "off"]
#: What follows the error event of a stream that has failed.
StreamFailure: TypeAlias = Literal["end", "abort"]


class ClusterMode(enum.StrEnum):
    """The role of a node in a cluster. The values are strings, so that ``mode == "master"`` holds, too."""

    MASTER = "master"
    WORKER = "worker"
    STANDALONE = "standalone"


_BOOLEANS: Final = {"yes": True, "true": True, "on": True, "1": True} | {
    "no": False, "false": False, "off": False, "0": False
}  # fmt: skip


def parse_boolean(text: str) -> bool:
    """Return the value of a boolean option that is given as text: by an environment variable, or to an engine.

    Args:
        text: ``yes``, ``true``, ``on``, ``1``, or ``no``, ``false``, ``off``, ``0``, in upper or lower case, with or
            without spaces around it.

    Raises:
        ValueError: it is none of these.
    """
    try:
        return _BOOLEANS[text.strip().lower()]
    except KeyError:
        raise ValueError(f"expected yes or no, got '{text}'") from None


# Validators. All but the last one need only the value; `cli/settings.py` calls them without an instance.

_Field: TypeAlias = "attrs.Attribute[Any]"


def _count(instance: object, field: _Field, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field.name}: expected a whole number, got {value!r}")
    if value < 1:
        raise OptionsError(f"{field.name}: must be at least 1, got {value}")


def _count_or_zero(instance: object, field: _Field, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field.name}: expected a whole number, got {value!r}")
    if value < 0:
        raise OptionsError(f"{field.name}: must be 0 or more, got {value}")


def _processes(instance: object, field: _Field, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field.name}: expected a whole number, got {value!r}")
    if not 1 <= value <= PROCESSES_MAX:
        raise OptionsError(f"{field.name}: must be 1 to {PROCESSES_MAX}, got {value}")


def _port(instance: object, field: _Field, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field.name}: expected a port number, got {value!r}")
    if not 0 <= value <= 65535:
        raise OptionsError(f"{field.name}: a port lies between 0 and 65535, got {value}")


def _flag(instance: object, field: _Field, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{field.name}: expected true or false, got {value!r}")


def _number(field: _Field, value: object) -> float:
    # NaN compares false with everything; refusing it here saves a check in each of the comparisons.
    if not isinstance(value, float) or math.isnan(value):
        raise TypeError(f"{field.name}: expected a number of seconds, got {value!r}")
    return value


def _duration(instance: object, field: _Field, value: object) -> None:
    if not 0 < _number(field, value) < math.inf:
        raise OptionsError(f"{field.name}: must be more than 0 seconds, and not infinite; got {value}")


def _duration_or_zero(instance: object, field: _Field, value: object) -> None:
    if not 0 <= _number(field, value) < math.inf:
        raise OptionsError(f"{field.name}: must be 0 or more seconds, and not infinite; got {value}")


def _moment(instance: object, field: _Field, value: object) -> None:
    if not 0 <= _number(field, value) <= 0.1:
        raise OptionsError(f"{field.name}: must be 0 to 0.1 seconds; got {value}")


def _share(instance: object, field: _Field, value: object) -> None:
    if not isinstance(value, float) or not 0 <= value <= 1:
        raise OptionsError(f"{field.name}: must be 0 to 1, got {value!r}")


def _duration_or_inf(instance: object, field: _Field, value: object) -> None:
    if not _number(field, value) > 0:
        raise OptionsError(f"{field.name}: must be more than 0 seconds; got {value}")


def _text(instance: object, field: _Field, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{field.name}: expected text, got {value!r}")
    if not value or not value.isprintable() or value != value.strip():
        raise OptionsError(f"{field.name}: must be printable text without spaces around it, got {value!r}")


def _secret(instance: object, field: _Field, value: object) -> None:
    # Secrets are sent in a header, where neither spaces nor characters beyond ASCII arrive as they were sent. An empty
    # one is nearly always an environment variable that was not filled in; accepting it would switch authentication off
    # without a warning.
    if not isinstance(value, str):
        raise TypeError(f"{field.name}: expected text")
    if not value:
        raise OptionsError(f"{field.name}: must not be empty; leave it out to require none")
    if not all("!" <= character <= "~" for character in value):
        raise OptionsError(f"{field.name}: may only have visible ASCII characters, and no spaces")


def _database(instance: object, field: _Field, value: object) -> None:
    # The URL may have a password in it, so no message repeats it.
    if not isinstance(value, str):
        raise TypeError(f"{field.name}: expected text")
    if not value.isprintable() or not value.startswith(("postgresql://", "postgres://", "sqlite:///")):
        raise OptionsError(f"{field.name}: must be postgresql://USER@HOST/NAME, or sqlite:///PATH")


def _conflict_rule(instance: object, field: _Field, value: object) -> None:
    if value not in typing.get_args(ConflictRule):
        raise OptionsError(f'{field.name}: must be "reject" or "replicate", got {value!r}')


def _routing(instance: object, field: _Field, value: object) -> None:
    if value not in typing.get_args(Routing):
        raise OptionsError(f'{field.name}: must be "cost" or "least-busy", got {value!r}')


def _otel(instance: object, field: _Field, value: object) -> None:
    if value not in typing.get_args(Otel):
        raise OptionsError(f'{field.name}: must be "auto", "on" or "off", got {value!r}')


def _http_server(instance: object, field: _Field, value: object) -> None:
    if value not in typing.get_args(HttpServer):
        raise OptionsError(f'{field.name}: must be "lean" or "hypercorn", got {value!r}')


def _redis_url(instance: object, field: _Field, value: object) -> None:
    # The URL may have a password in it, so no message repeats it.
    if not isinstance(value, str):
        raise TypeError(f"{field.name}: expected text")
    if not value.isprintable() or not value.startswith(("redis://", "rediss://")):
        raise OptionsError(f"{field.name}: must be redis://HOST:PORT/NUMBER, or rediss:// for TLS")


def _limits_failure(instance: object, field: _Field, value: object) -> None:
    if value not in typing.get_args(LimitsFailure):
        raise OptionsError(f'{field.name}: must be "allow" or "refuse", got {value!r}')


def _size(instance: object, field: _Field, value: object) -> None:
    try:
        parse_size(value)
    except ValueError as error:
        raise OptionsError(f"{field.name}: {error}") from None


def _stream_failure(instance: object, field: _Field, value: object) -> None:
    if value not in typing.get_args(StreamFailure):
        raise OptionsError(f'{field.name}: must be "end" or "abort", got {value!r}')


def _tls_mode(instance: object, field: _Field, value: object) -> None:
    if value not in typing.get_args(TlsMode):
        raise OptionsError(f'{field.name}: must be "off" or "auto", got {value!r}')


def _aliases(instance: object, field: _Field, value: object) -> None:
    try:
        read_aliases(value)
    except ValueError as error:
        raise OptionsError(f"{field.name}: {error}") from None
    except TypeError as error:
        raise TypeError(f"{field.name}: {error}") from None


def _wake_table(instance: object, field: _Field, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{field.name}: expected a table of workers and hardware addresses, got {value!r}")
    for name, target in value.items():
        if not isinstance(name, str) or not isinstance(target, str):
            raise TypeError(f"{field.name}: expected a name and a hardware address, got {name!r}: {target!r}")
        try:
            read_wake_target(target)
        except ValueError as error:
            raise OptionsError(f"{field.name}: {name}: {error}") from None


def _link_duration(instance: ClusterServerOptions | None, field: _Field, value: float) -> None:
    _duration(instance, field, value)
    if instance is None:
        return
    worker_timeout = value if field.name == "worker_timeout" else instance.worker_timeout
    heartbeat_interval = value if field.name == "heartbeat_interval" else instance.heartbeat_interval
    if worker_timeout <= heartbeat_interval:
        raise OptionsError(
            f"worker_timeout ({worker_timeout:g} s) must be longer than heartbeat_interval "
            f"({heartbeat_interval:g} s), or every worker would time out between two heartbeats"
        )


def _seconds(value: float) -> float:
    """Convert whole numbers to floats; anything else is left to the validator."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**53 else (math.inf if value > 0 else -math.inf)
    return value


def _json_table(value: Any) -> Any:
    """Return a table that is given as JSON; anything else is left to the validator."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _size_text(value: Any) -> Any:
    """Return a number of bytes as text; anything else is left to the validator."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value == "" else value


def _none_if_empty(value: str | None) -> str | None:
    return None if value == "" else value


_optional = attrs.validators.optional

# What a validator accepts, in the words of JSON Schema. Options that are one of several texts have these in their type.
_SCHEMAS: Final[Mapping[object, Mapping[str, Any]]] = {
    _count: {"type": "integer", "minimum": 1},
    _count_or_zero: {"type": "integer", "minimum": 0},
    _processes: {"type": "integer", "minimum": 1, "maximum": PROCESSES_MAX},
    _port: {"type": "integer", "minimum": 0, "maximum": 65535},
    _size: {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"const": ""},
            {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([kKmMgGtT][iI]?)?[bB]?\s*$"},
        ]
    },
    _flag: {"type": "boolean"},
    _duration: {"type": "number", "exclusiveMinimum": 0},
    _link_duration: {"type": "number", "exclusiveMinimum": 0},
    _duration_or_zero: {"type": "number", "minimum": 0},
    _duration_or_inf: {"type": "number", "exclusiveMinimum": 0},
    _moment: {"type": "number", "minimum": 0, "maximum": 0.1},
    _share: {"type": "number", "minimum": 0, "maximum": 1},
    _text: {"type": "string", "pattern": r"^\S(.*\S)?$"},
    _secret: {"type": "string", "pattern": "^[!-~]+$"},
    _wake_table: {"type": "object", "additionalProperties": {"type": "string", "pattern": WAKE_PATTERN}},
    _database: {"type": "string", "pattern": "^(postgres(ql)?://|sqlite:///)"},
    _redis_url: {"type": "string", "pattern": "^rediss?://"},
    _aliases: {
        "type": "object",
        "additionalProperties": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                {"type": "object", "additionalProperties": {"type": "number"}, "minProperties": 1},
            ]
        },
    },
}

# The metadata of the options. Only an option whose value is read at each use, or that `ClusterServer.apply_changes`
# takes care of, may have the first one.
_AT_ONCE: Final[dict[str, Applies]] = {"applies": "at once"}
_RESTART: Final[dict[str, Applies]] = {"applies": "after a restart"}


@attrs.define
class ServerOptions:
    """The options of every serving process. Durations are in seconds.

    Raises:
        TypeError: a value, given or assigned later, has a wrong type.
        OptionsError: a value is out of range.
    """

    host: str = attrs.field(default="0.0.0.0", validator=_text, metadata=_RESTART)
    """The address on which the OpenAI API listens."""
    port: int = attrs.field(default=8080, validator=_port, metadata=_RESTART)
    """The port of the OpenAI API; 0 picks a free one."""
    max_concurrency: int = attrs.field(default=10, validator=_count, metadata=_AT_ONCE)
    """How many requests the handlers of this process run at once."""
    queue_timeout: float = attrs.field(
        default=5.0, converter=_seconds, validator=_duration_or_zero, metadata=_AT_ONCE
    )
    """How long a request over that limit waits for a slot; 0: it is refused at once."""
    default_timeout: float = attrs.field(
        default=60.0, converter=_seconds, validator=_duration_or_inf, metadata=_AT_ONCE
    )
    """The idle timeout: how long a model may take to its first output, and between outputs. ``math.inf``: no limit."""
    api_key: str | None = attrs.field(
        default=None, validator=_optional(_secret), repr=False, metadata=_AT_ONCE
    )
    """The API key that clients must send, as a bearer token; ``None``: none is required."""
    operator_key: str | None = attrs.field(
        default=None, validator=_optional(_secret), repr=False, metadata=_AT_ONCE
    )
    """The key that operators must send to see calls, cancel them and drain workers; ``None``: they must be on the same
    machine."""
    worker_id: str | None = attrs.field(
        default=None, converter=_none_if_empty, validator=_optional(_text), metadata=_RESTART
    )
    """The name of this node, which should not change when it is restarted; generated if it is not given."""
    owner: str = attrs.field(default="trio-cluster", validator=_text, metadata=_RESTART)
    """What ``/v1/models`` shows as ``owned_by``."""
    max_body_size: int = attrs.field(default=512 * 1024 * 1024, validator=_count, metadata=_AT_ONCE)
    """How many bytes the body of a request may have; a larger one is refused with 413."""
    max_json_size: int = attrs.field(default=64 * 1024 * 1024, validator=_count, metadata=_AT_ONCE)
    """How many bytes a body may have that is kept in memory. All bodies are, except forms, which are streamed."""
    cors_origins: str | None = attrs.field(
        default=None, converter=_none_if_empty, validator=_optional(_text), metadata=_AT_ONCE
    )
    """The origins of the web pages that may use the API: ``"*"``, or a list with commas; ``None``: no web page may."""
    access_log: bool = attrs.field(default=False, validator=_flag, metadata=_AT_ONCE)
    """Whether to log one line for each request, with its status and duration."""
    http: HttpServer = attrs.field(default="lean", validator=_http_server, metadata=_RESTART)
    """The server of the API: ``"lean"``: the package's own, for HTTP/1.1; ``"hypercorn"``: for HTTP/1.1 and HTTP/2."""
    stream_failure: StreamFailure = attrs.field(default="end", validator=_stream_failure, metadata=_AT_ONCE)
    """What follows the error event of a stream that has failed. ``"end"``: the proper end of the body. ``"abort"``: the
    connection is broken off, for clients that do not know error events and must not take the stream for complete."""
    keepalive: float = attrs.field(
        default=10.0, converter=_seconds, validator=_duration_or_zero, metadata=_AT_ONCE
    )
    """After how long a silence a comment is sent to the client of a stream, also before the answer has begun; 0: never.
    It should be shorter than what the proxies in front of the node wait for."""

    tls: TlsMode = attrs.field(default="off", validator=_tls_mode, metadata=_RESTART)
    """Whether both ports speak TLS. ``"auto"``: with a certificate that the node makes and renews, by an authority of
    its own in ``state_dir``. With ``tls_cert``, they speak TLS in any case."""
    tls_cert: str | None = attrs.field(
        default=None, converter=_none_if_empty, validator=_optional(_text), metadata=_RESTART
    )
    """A PEM file with the certificate to show, and those between it and its authority. Read again when it changes."""
    tls_key: str | None = attrs.field(
        default=None, converter=_none_if_empty, validator=_optional(_text), metadata=_RESTART
    )
    """A PEM file with the private key of ``tls_cert``; ``None``: it is in the same file."""
    tls_name: str | None = attrs.field(
        default=None, converter=_none_if_empty, validator=_optional(_text), metadata=_RESTART
    )
    """Names and addresses, with commas, that a certificate of the node's own is for, besides those of the machine."""
    allowed_hosts: str | None = attrs.field(
        default=None, converter=_none_if_empty, validator=_optional(_text), metadata=_AT_ONCE
    )
    """Names under which clients reach a server without a key, beside addresses and ``localhost``: with commas between
    them, or ``"*"`` for any."""

    @property
    def has_tls(self) -> bool:
        """Whether the ports of this process speak TLS."""
        return self.tls != "off" or self.tls_cert is not None

    @property
    def tls_names(self) -> list[str]:
        """The names in ``tls_name``."""
        return [name.strip() for name in (self.tls_name or "").split(",") if name.strip()]


@attrs.define
class ClusterServerOptions:
    """The options of a node. Durations are in seconds.

    Raises:
        TypeError: a value, given or assigned later, has a wrong type.
        OptionsError: a value is out of range.
    """

    server: ServerOptions = attrs.field(
        factory=ServerOptions, validator=attrs.validators.instance_of(ServerOptions)
    )
    """Those of every serving process."""
    enable_cluster: bool = attrs.field(default=True, validator=_flag, metadata=_RESTART)
    """Whether ``run`` may become a master or a worker; otherwise it is a standalone server."""
    worker_timeout: float = attrs.field(
        default=30.0, converter=_seconds, validator=_link_duration, metadata=_RESTART
    )
    """How long the other end of a link may be silent before the link is closed. Longer than ``heartbeat_interval``."""
    heartbeat_interval: float = attrs.field(
        default=5.0, converter=_seconds, validator=_link_duration, metadata=_RESTART
    )
    """The time between two heartbeats, which each end of a link sends."""
    resume_window: float = attrs.field(
        default=15.0, converter=_seconds, validator=_duration_or_zero, metadata=_RESTART
    )
    """How long a link that was cut may be resumed by the same two processes. 0: it is lost at once. The smaller value
    of both ends holds."""
    through_proxy: bool = attrs.field(default=False, validator=_flag, metadata=_RESTART)
    """Whether links go through a proxy that adds no headers, such as a TCP proxy. The end of a connection then counts
    as a cut, and not as the end of a process. One of the two ends has to say so."""
    guardian: bool | None = attrs.field(default=None, validator=_optional(_flag), metadata=_RESTART)
    """Whether a small process beside a worker tells its masters at once when the worker's process dies; ``None``: on
    the command line it does, in other programs there is none."""
    internal_host: str | None = attrs.field(default=None, validator=_optional(_text), metadata=_RESTART)
    """The address on which a master listens for workers; ``None``: ``server.host``."""
    internal_port: int | None = attrs.field(default=None, validator=_optional(_port), metadata=_RESTART)
    """The port on which a master listens for workers; ``None``: ``server.port + 1000``."""
    cluster_token: str | None = attrs.field(
        default=None, validator=_optional(_secret), repr=False, metadata=_AT_ONCE
    )
    """The secret that workers must send to join; ``None``: none is required."""
    on_conflict: ConflictRule = attrs.field(default="reject", validator=_conflict_rule, metadata=_AT_ONCE)
    """What happens if a model is registered under a name that is served already. ``"reject"``: it is refused.
    ``"replicate"``: it becomes a further replica of that model."""
    routing: Routing = attrs.field(default="cost", validator=_routing, metadata=_AT_ONCE)
    """How a master chooses among the replicas of a model. ``"cost"``: the one that is expected to answer first, by what
    each has to do, how fast it has been and what of the prompt it has cached. ``"least-busy"``: the one with the
    fewest requests for its capacity."""
    aliases: AliasTargets | None = attrs.field(
        default=None, converter=_json_table, validator=_optional(_aliases), metadata=_AT_ONCE
    )
    """Other names for models: each with the name of a model, a list of names that are tried in this order, or a table
    of names with their weights. A text is JSON. ``ClusterServer.set_aliases`` replaces them while a node runs."""
    start_patience: float = attrs.field(
        default=30.0, converter=_seconds, validator=_duration_or_inf, metadata=_AT_ONCE
    )
    """How long a request for an alias with several names waits for a model to be started, or for a machine to be woken,
    before the next name is tried. ``math.inf``: until it is there."""
    wake: Mapping[str, str] | None = attrs.field(
        default=None, converter=_json_table, validator=_optional(_wake_table), metadata=_RESTART
    )
    """Workers whose machines may sleep, by name, each with the hardware address (MAC) that wakes it, perhaps followed
    by ``@`` and the broadcast address of its network. A text is JSON. A request for a model that only such a worker
    has wakes its machine, and waits."""
    wake_timeout: float = attrs.field(
        default=180.0, converter=_seconds, validator=_duration, metadata=_AT_ONCE
    )
    """How long a request waits for a machine that is woken."""
    ejection_failures: int = attrs.field(default=5, validator=_count_or_zero, metadata=_AT_ONCE)
    """After how many failures in a row a replica is left alone for a while (ejected), if its model has others.
    0: never."""
    ejection_time: float = attrs.field(
        default=5.0, converter=_seconds, validator=_duration, metadata=_AT_ONCE
    )
    """How long a replica is left alone before one request tries it; twice as long each time that follows."""
    ejection_time_max: float = attrs.field(
        default=300.0, converter=_seconds, validator=_duration, metadata=_AT_ONCE
    )
    """How long it is left alone at most, also if the server behind it asks for more with ``Retry-After``."""
    ejection_share: float = attrs.field(default=0.5, converter=_seconds, validator=_share, metadata=_AT_ONCE)
    """Which part of a model's replicas may be left alone at once, 0 to 1. The last one that is available never is."""
    batch_wait: float = attrs.field(default=0.001, converter=_seconds, validator=_moment, metadata=_RESTART)
    """The linger: how long a token may wait on a busy link for others, to be sent together. On an idle link: 0."""
    memory: str | None = attrs.field(
        default=None, converter=_size_text, validator=_optional(_size), metadata=_RESTART
    )
    """How much memory there is for the models that run on demand, such as ``"24GiB"``; ``None``: that of the GPUs, or
    nine tenths of that of the machine."""
    drain_timeout: float = attrs.field(
        default=30.0, converter=_seconds, validator=_duration_or_zero, metadata=_AT_ONCE
    )
    """How long a node that stops lets its requests finish before it cancels them."""
    limits: str | None = attrs.field(
        default=None, converter=_none_if_empty, validator=_optional(_redis_url), repr=False, metadata=_RESTART
    )
    """Where the requests and tokens of keys with limits are counted: ``redis://...`` or ``rediss://...``, which several
    masters may share; ``None``: in the memory of the master, and in its state directory over a restart."""
    limits_failure: LimitsFailure = attrs.field(default="allow", validator=_limits_failure, metadata=_RESTART)
    """What happens to requests of keys with limits while the server of ``limits`` is away. ``"allow"``: each master
    counts them in its own memory. ``"refuse"``: they are refused with 503."""
    processes: int = attrs.field(default=1, validator=_processes, metadata=_RESTART)
    """How many processes a master is, behind its two ports; only ``trio-cluster master`` starts several."""
    state_dir: str | None = attrs.field(
        default=None, converter=_none_if_empty, validator=_optional(_text), metadata=_RESTART
    )
    """The directory for what a master keeps over a restart; without it, one below ``$XDG_STATE_HOME`` that its port
    names, or ``~/.local/state``."""
    database: str | None = attrs.field(
        default=None, converter=_none_if_empty, validator=_optional(_database), repr=False, metadata=_RESTART
    )
    """Where keys, usage, the audit log and stored responses are kept: ``postgresql://...``, which several masters may
    share, or ``sqlite:///PATH``; ``None``: in SQLite in the state directory, and stored responses in memory."""
    usage_days: int = attrs.field(default=90, validator=_count, metadata=_AT_ONCE)
    """How many days the row of each request is kept. The sums of days are kept for ever."""
    stored_responses: int = attrs.field(default=10_000, validator=_count_or_zero, metadata=_AT_ONCE)
    """How many responses of ``/v1/responses``, and conversations, are stored; the oldest ones make room for new ones.
    0: none are, and what refers to a stored one is refused. In the database if ``database`` is set, in memory if not.
    """
    stored_responses_size: int = attrs.field(default=64 * 1024 * 1024, validator=_count, metadata=_AT_ONCE)
    """How many bytes they may take together, with their input."""
    stored_responses_lifetime: float = attrs.field(
        default=86_400.0, converter=_seconds, validator=_duration, metadata=_AT_ONCE
    )
    """How long each of them is kept."""
    stories: int = attrs.field(default=10_000, validator=_count_or_zero, metadata=_AT_ONCE)
    """How many requests that are over a master keeps the story of, in memory: ``trio-cluster why`` shows it. 64 MiB at
    most. 0: none is kept."""
    otel: Otel = attrs.field(default="auto", validator=_otel, metadata=_RESTART)
    """Whether traces and metrics are exported by OpenTelemetry, with the extra ``otel``. ``"auto"``: what a variable
    ``OTEL_...`` names an endpoint or an exporter for. ``"on"``: both, or the node does not start. ``"off"``: none."""
    ca_file: str | None = attrs.field(
        default=None, converter=_none_if_empty, validator=_optional(_text), metadata=_RESTART
    )
    """A PEM file with the authorities that a worker, or a command, trusts besides those of the system."""
    allow_anonymous_workers: bool = attrs.field(default=False, validator=_flag, metadata=_AT_ONCE)
    """Whether a master with TLS admits workers that have neither a certificate nor the ``cluster_token``."""

    @property
    def memory_size(self) -> int | None:
        """The bytes of :attr:`memory`; ``None``: not said."""
        return None if self.memory is None else parse_size(self.memory)


# What has changed between two sets of options


@attrs.frozen
class OptionChange:
    """An option that has two values in two sets of options."""

    option: str
    """Its name as in a file, such as ``server.keepalive``."""
    before: object
    after: object
    applies: Applies
    is_secret: bool = False
    """Whether the values must not be shown."""


@attrs.frozen
class Reloaded:
    """What has come of reading the configuration of a running node again."""

    source: str
    """The file."""
    changes: Sequence[OptionChange]
    """What was changed since it was read last, and what is different since the start and needs a restart."""
    certificates: bool = False
    """Whether the files of the certificate had changed, and were read again."""

    @property
    def applied(self) -> list[OptionChange]:
        """The changes that apply from now on."""
        return [change for change in self.changes if change.applies == "at once"]

    @property
    def needs_restart(self) -> list[OptionChange]:
        """The changes that apply when the process is started again."""
        return [change for change in self.changes if change.applies != "at once"]


def when_applied(field: _Field) -> Applies:
    """Return when a new value of an option applies."""
    applies: Applies = field.metadata["applies"]
    return applies


def option_schema(field: _Field, kind: Any) -> dict[str, Any]:
    """Return a JSON Schema of the values that an option may have in a file.

    It is for editors: rules between several options, and inside of some texts, are not part of it.

    Args:
        field: the option.
        kind: its type, with all names resolved.
    """
    schema: dict[str, Any] = {}
    for member in (kind, *typing.get_args(kind)):
        if typing.get_origin(member) is Literal:
            schema = {"type": "string", "enum": list(typing.get_args(member))}
    # Of an optional one, what is checked if there is a value. TOML has none for "none".
    schema = schema or dict(_SCHEMAS.get(getattr(field.validator, "validator", field.validator), {}))
    converter: object = field.converter
    if converter is _none_if_empty:
        schema = {"anyOf": [schema, {"const": ""}]}
    return schema


def is_secret(field: _Field) -> bool:
    """Tell whether the value of an option must not be shown."""
    return not field.repr


def changed_options(before: ClusterServerOptions, after: ClusterServerOptions) -> list[OptionChange]:
    """Return the options that differ between two sets of options, in the order of the classes."""
    return [*_differing("server.", before.server, after.server), *_differing("", before, after)]


def _differing(prefix: str, before: Any, after: Any) -> list[OptionChange]:
    return [
        OptionChange(f"{prefix}{field.name}", old, new, when_applied(field), is_secret(field))
        for field in attrs.fields(type(before))
        if field.name != "server"
        and (old := getattr(before, field.name)) != (new := getattr(after, field.name))
    ]


def assign_option(options: ClusterServerOptions, option: str, value: object) -> None:
    """Assign a value to an option that is named as in a file. Synchronous.

    Raises:
        TypeError, OptionsError: see the classes.
    """
    table, _, name = option.rpartition(".")
    setattr(options.server if table else options, name, value)
