"""Every knob of a node, with its unit and its default, on one screen.

Two attrs classes hold the options: :class:`ServerOptions` is what any serving process has,
:class:`ClusterServerOptions` adds what a cluster needs and contains the former. They are mutable, because a
running node may be retuned, and every assignment is checked like a constructor's argument. A value of a wrong
type is a ``TypeError``, one out of range an :class:`~trio_cluster.errors.OptionsError` (a ``ValueError``);
both begin with the name of the option. Where values come from besides code is the business of ``cli/settings.py``.
"""

from __future__ import annotations

import enum
import math
import typing
from typing import Any, Final, Literal, TypeAlias

import attrs

from .errors import OptionsError

__all__ = ["ClusterMode", "ClusterServerOptions", "ConflictRule", "ServerOptions", "parse_boolean"]

#: What happens to a model name that somebody already serves.
ConflictRule: TypeAlias = Literal["reject", "replicate"]


class ClusterMode(enum.StrEnum):
    """The part that a node plays."""

    MASTER = "master"
    WORKER = "worker"
    STANDALONE = "standalone"


_BOOLEANS: Final = {"yes": True, "true": True, "on": True, "1": True} | {
    "no": False, "false": False, "off": False, "0": False
}  # fmt: skip


def parse_boolean(text: str) -> bool:
    """Convert the text of a boolean option: an environment variable's, or an engine's.

    Args:
        text: ``yes``, ``true``, ``on``, ``1``, or ``no``, ``false``, ``off``, ``0``, in any case, with or without
            spaces around it.

    Raises:
        ValueError: it is none of these.
    """
    try:
        return _BOOLEANS[text.strip().lower()]
    except KeyError:
        raise ValueError(f"expected yes or no, got '{text}'") from None


# Validators. All but the last judge a value by itself; what loads settings asks them without an instance.

_Field: TypeAlias = "attrs.Attribute[Any]"


def _count(instance: object, field: _Field, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field.name}: expected a whole number, got {value!r}")
    if value < 1:
        raise OptionsError(f"{field.name}: must be at least 1, got {value}")


def _port(instance: object, field: _Field, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field.name}: expected a port number, got {value!r}")
    if not 0 <= value <= 65535:
        raise OptionsError(f"{field.name}: a port lies between 0 and 65535, got {value}")


def _flag(instance: object, field: _Field, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{field.name}: expected true or false, got {value!r}")


def _number(field: _Field, value: object) -> float:
    # NaN compares false with everything, so it is refused here and not in each of the comparisons.
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


def _duration_or_inf(instance: object, field: _Field, value: object) -> None:
    if not _number(field, value) > 0:
        raise OptionsError(f"{field.name}: must be more than 0 seconds; got {value}")


def _text(instance: object, field: _Field, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{field.name}: expected text, got {value!r}")
    if not value or not value.isprintable() or value != value.strip():
        raise OptionsError(f"{field.name}: must be printable text without spaces around it, got {value!r}")


def _secret(instance: object, field: _Field, value: object) -> None:
    # It travels in a header, where neither spaces nor letters beyond ASCII arrive as they were sent. An empty
    # one is nearly always a variable that was not filled in, and would leave the door open without a word.
    if not isinstance(value, str):
        raise TypeError(f"{field.name}: expected text")
    if not value:
        raise OptionsError(f"{field.name}: is empty; leave it out to need none")
    if not all("!" <= character <= "~" for character in value):
        raise OptionsError(f"{field.name}: may only have visible ASCII characters, and no spaces")


def _conflict_rule(instance: object, field: _Field, value: object) -> None:
    if value not in typing.get_args(ConflictRule):
        raise OptionsError(f'{field.name}: must be "reject" or "replicate", got {value!r}')


def _outlasts_heartbeats(instance: ClusterServerOptions | None, field: _Field, value: float) -> None:
    if instance is None:
        return
    worker_timeout = value if field.name == "worker_timeout" else instance.worker_timeout
    heartbeat_interval = value if field.name == "heartbeat_interval" else instance.heartbeat_interval
    if worker_timeout <= heartbeat_interval:
        raise OptionsError(
            f"worker_timeout ({worker_timeout:g} s) must be longer than heartbeat_interval "
            f"({heartbeat_interval:g} s), or every worker would be given up between two signs of life"
        )


def _seconds(value: float) -> float:
    """Make whole numbers floats; leave what is no number to the validator."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**53 else (math.inf if value > 0 else -math.inf)
    return value


def _none_if_empty(value: str | None) -> str | None:
    return None if value == "" else value


_optional = attrs.validators.optional


@attrs.define
class ServerOptions:
    """What any serving process has. Durations are seconds.

    Raises:
        TypeError: a value, given or assigned later, has a wrong type.
        OptionsError: a value is out of range.
    """

    host: str = attrs.field(default="0.0.0.0", validator=_text)
    """The address that the OpenAI API listens on."""
    port: int = attrs.field(default=8080, validator=_port)
    """The port of the OpenAI API; 0 picks a free one."""
    max_concurrency: int = attrs.field(default=10, validator=_count)
    """How many requests this process's own handlers run at once."""
    queue_timeout: float = attrs.field(default=5.0, converter=_seconds, validator=_duration_or_zero)
    """How long a request over that limit waits for a place; 0 refuses it at once."""
    default_timeout: float = attrs.field(default=60.0, converter=_seconds, validator=_duration_or_inf)
    """The longest silence: to the first output, and between outputs. ``math.inf`` sets no limit."""
    api_key: str | None = attrs.field(default=None, validator=_optional(_secret), repr=False)
    """What clients must show as a bearer token; without it, nothing."""
    worker_id: str | None = attrs.field(default=None, converter=_none_if_empty, validator=_optional(_text))
    """The stable name of a worker; generated when empty."""
    owner: str = attrs.field(default="trio-cluster", validator=_text)
    """What ``/v1/models`` gives as ``owned_by``."""
    max_body_size: int = attrs.field(default=512 * 1024 * 1024, validator=_count)
    """How many bytes the body of a request may have; a larger one gets 413."""
    max_json_size: int = attrs.field(default=64 * 1024 * 1024, validator=_count)
    """How many bytes a body may have that is kept in memory: every one but a form, which streams to its worker."""
    cors_origins: str | None = attrs.field(default=None, converter=_none_if_empty, validator=_optional(_text))
    """Whose web pages may use the API: ``"*"``, or origins with commas between them; without it, nobody's."""

    allowed_hosts: str | None = attrs.field(default=None, converter=_none_if_empty, validator=_optional(_text))
    """Names under which clients reach a server without a key, beside addresses and ``localhost``: with commas between
    them, or ``"*"`` for any."""


@attrs.define
class ClusterServerOptions:
    """What a node of a cluster has. Durations are seconds.

    Raises:
        TypeError: a value, given or assigned later, has a wrong type.
        OptionsError: a value is out of range.
    """

    server: ServerOptions = attrs.field(
        factory=ServerOptions, validator=attrs.validators.instance_of(ServerOptions)
    )
    enable_cluster: bool = attrs.field(default=True, validator=_flag)
    """Whether ``run`` may be a master or a worker; otherwise it is a standalone server."""
    worker_timeout: float = attrs.field(
        default=30.0, converter=_seconds, validator=[_duration, _outlasts_heartbeats]
    )
    """How long the other end of a link may be silent before it is given up."""
    heartbeat_interval: float = attrs.field(
        default=5.0, converter=_seconds, validator=[_duration, _outlasts_heartbeats]
    )
    """How often each end of a link gives a sign of life."""
    internal_host: str | None = attrs.field(default=None, validator=_optional(_text))
    """The address that workers connect to on a master; without it, the same as ``server.host``."""
    internal_port: int | None = attrs.field(default=None, validator=_optional(_port))
    """The port that workers connect to; without it, ``server.port + 1000``."""
    cluster_token: str | None = attrs.field(default=None, validator=_optional(_secret), repr=False)
    """What workers must show to be let in; without it, nothing."""
    on_conflict: ConflictRule = attrs.field(default="reject", validator=_conflict_rule)
    """``"reject"``: a name that is served stays with who has it. ``"replicate"``: both serve it."""
    batch_wait: float = attrs.field(default=0.001, converter=_seconds, validator=_moment)
    """How long a token may wait for others while its link is busy; it never does on an idle one."""
    drain_timeout: float = attrs.field(default=30.0, converter=_seconds, validator=_duration_or_zero)
    """How long a node that stops lets its requests finish before it cancels them."""
