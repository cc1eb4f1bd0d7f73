"""The limits of the fields of messages, as attrs validators.

The limits belong to the messages themselves and not to their decoding, so that one rule serves both ends: a message
that cannot be received cannot be made either. The sender learns where the bad value came from, by a ``ValueError``, and
does not lose its link; the receiver turns the same ``ValueError`` into a ``ProtocolError``. Types are checked by the
codec; a program that passes mypy cannot get them wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from trio_cluster.core.headers import HEADER_NAME, HEADER_VALUE, QUERY, QUERY_MAX

__all__ = [
    "CANCELLED_MAX",
    "HEADERS_MAX",
    "HEADER_COUNT_MAX",
    "JSON_DEPTH_MAX",
    "JSON_MAX",
    "NAMES_MAX",
    "NAME_MAX",
    "ON_DEMAND_MAX",
    "ON_DEMAND_TEXT_MAX",
    "OTHERS_MAX",
    "PROGRESS_MAX",
    "TEXT_MAX",
    "USAGE_MAX",
    "clip",
    "content_type",
    "headers",
    "integer",
    "json_object",
    "name",
    "names",
    "on_demand",
    "optional_text",
    "others",
    "progress",
    "query",
    "seconds",
    "session_id",
    "starts",
    "text",
]

#: Characters in the name of a model, a node, an endpoint.
NAME_MAX: Final = 512
#: Characters in a reason, or in an error message.
TEXT_MAX: Final = 8192
#: Names in one list.
NAMES_MAX: Final = 64
#: Calls whose progress one heartbeat reports.
PROGRESS_MAX: Final = 1024
#: Models, or calls, of which one heartbeat reports the state or what they wait for; and the characters of all of them.
ON_DEMAND_MAX: Final = 384
_STATE_MAX: Final = 16
ON_DEMAND_TEXT_MAX: Final = 16384
#: Other masters that a worker reports.
OTHERS_MAX: Final = 64
#: Calls that a handshake lists as cancelled.
CANCELLED_MAX: Final = 1024
#: Characters in all headers of a message, names and values together.
HEADERS_MAX: Final = 32768
#: The size of a JSON object: its characters, plus eight for each value.
JSON_MAX: Final = 32768

HEADER_COUNT_MAX: Final = 128
JSON_DEPTH_MAX: Final = 16
#: Entries of a usage report, and characters in the name of one.
USAGE_MAX: Final = 16
_USAGE_NAME_MAX: Final = 64

#: The id of a session: 128 bits in hexadecimal digits, or nothing.
_SESSION_ID: Final = re.compile(r"(?:[0-9a-f]{32})?")

Validator = Callable[[Any, Any, Any], None]


def clip(text: object, limit: int = TEXT_MAX) -> str:
    """Return ``text`` as a message may carry it: at most ``limit`` characters, all of them encodable."""
    clean = str(text)
    if len(clean) > limit:
        clean = clean[: limit - 1] + "…"
    # A lone surrogate has no encoding. One comes from a file name that is not UTF-8, for instance, in an exception.
    return clean.encode("utf-8", "replace").decode("utf-8")


def _check_encodable(name: str, value: str) -> None:
    # Lone surrogates have no encoding. No text that was received has any, and most texts are ASCII.
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}: contains a character that cannot be encoded") from None


def integer(lowest: int, highest: int) -> Validator:
    """Return a validator for an integer from ``lowest`` to ``highest``, both included."""

    def check(_: Any, attribute: Any, value: int) -> None:
        if not lowest <= value <= highest:
            raise ValueError(f"{attribute.name}: must be from {lowest} to {highest}, not {value}")

    return check


def name(_: Any, attribute: Any, value: str) -> None:
    """Validate a name. It has to be printable, since names end up in logs, in error messages and on terminals."""
    if not 0 < len(value) <= NAME_MAX:
        raise ValueError(f"{attribute.name}: must have 1 to {NAME_MAX} characters, not {len(value)}")
    if not value.isprintable():
        raise ValueError(f"{attribute.name}: contains characters that are not printable")


def names(instance: Any, attribute: Any, value: tuple[str, ...]) -> None:
    """Validate a short list of names."""
    if len(value) > NAMES_MAX:
        raise ValueError(f"{attribute.name}: more than {NAMES_MAX} names")
    for each in value:
        name(instance, attribute, each)


def others(instance: Any, attribute: Any, value: tuple[tuple[str, str], ...]) -> None:
    """Validate a short list of pairs of names."""
    if len(value) > OTHERS_MAX:
        raise ValueError(f"{attribute.name}: more than {OTHERS_MAX} masters")
    for pair in value:
        for each in pair:
            name(instance, attribute, each)


def text(limit: int = TEXT_MAX) -> Validator:
    """Return a validator for a text of at most ``limit`` characters, which may be empty."""

    def check(_: Any, attribute: Any, value: str) -> None:
        if len(value) > limit:
            raise ValueError(f"{attribute.name}: longer than {limit} characters")
        _check_encodable(attribute.name, value)

    return check


def optional_name(instance: Any, attribute: Any, value: str) -> None:
    """Validate a name, or an empty text."""
    if value:
        name(instance, attribute, value)


def optional_text(limit: int) -> Validator:
    """Return a validator for a text of at most ``limit`` characters, or ``None``."""
    bounded = text(limit)

    def check(instance: Any, attribute: Any, value: str | None) -> None:
        if value is not None:
            bounded(instance, attribute, value)

    return check


def seconds(_: Any, attribute: Any, value: float | None) -> None:
    """Validate a number of seconds, neither negative nor infinite. ``None`` means that there is no limit."""
    if value is not None and not (0.0 <= value < math.inf):
        raise ValueError(f"{attribute.name}: must be a finite number of seconds, not {value}")


def session_id(_: Any, attribute: Any, value: str) -> None:
    """Validate the id of a session: 32 hexadecimal digits; or empty."""
    if not _SESSION_ID.fullmatch(value):
        # Not repeated: it is a secret of two processes.
        raise ValueError(f"{attribute.name}: must be 32 hexadecimal digits")


def progress(_: Any, attribute: Any, value: tuple[tuple[int, int], ...]) -> None:
    """Validate pairs of a call's number and a count of bytes, or -1 in place of the count."""
    if len(value) > PROGRESS_MAX:
        raise ValueError(f"{attribute.name}: more than {PROGRESS_MAX} calls")
    if not all(0 < call < 1 << 63 and -1 <= count < 1 << 63 for call, count in value):
        raise ValueError(f"{attribute.name}: a number is out of range")


def on_demand(_: Any, attribute: Any, value: tuple[tuple[str, str, float], ...]) -> None:
    """Validate triples of a model's name, its state, and seconds."""
    _check_reports(attribute, [(name, seconds) for name, _, seconds in value])
    if not all(len(state) <= _STATE_MAX for _, state, _ in value):
        raise ValueError(f"{attribute.name}: a state is too long")


def starts(_: Any, attribute: Any, value: tuple[tuple[int, str, float], ...]) -> None:
    """Validate triples of a call's number, a text, and seconds, or -1 in place of the seconds."""
    _check_reports(attribute, [(what, seconds) for _, what, seconds in value])
    if not all(0 < call < 1 << 63 for call, _, _ in value):
        raise ValueError(f"{attribute.name}: a number is out of range")


def _check_reports(attribute: Any, value: list[tuple[str, float]]) -> None:
    if len(value) > ON_DEMAND_MAX or sum(len(text) for text, _ in value) > ON_DEMAND_TEXT_MAX:
        raise ValueError(f"{attribute.name}: too much")
    # Both are shown to people.
    if not all(text.isprintable() for text, _ in value):
        raise ValueError(f"{attribute.name}: contains characters that are not printable")
    if not all(-1.0 <= seconds < math.inf for _, seconds in value):
        raise ValueError(f"{attribute.name}: seconds are out of range")


def cancelled(_: Any, attribute: Any, value: tuple[int, ...]) -> None:
    """Validate a list of the numbers of calls."""
    if len(value) > CANCELLED_MAX:
        raise ValueError(f"{attribute.name}: more than {CANCELLED_MAX} calls")
    if not all(0 < call < 1 << 63 for call in value):
        raise ValueError(f"{attribute.name}: a number is out of range")


def usage(_: Any, attribute: Any, value: dict[str, int]) -> None:
    """Validate numbers of tokens, by name."""
    if len(value) > USAGE_MAX:
        raise ValueError(f"{attribute.name}: more than {USAGE_MAX} entries")
    for key, count in value.items():
        if not 0 <= count < 1 << 53 or len(key) > _USAGE_NAME_MAX:
            raise ValueError(f"{attribute.name}: a number is out of range, or a name is too long")


def content_type(_: Any, attribute: Any, value: str) -> None:
    """Validate the value of a ``Content-Type`` header, which may be empty."""
    if len(value) > NAME_MAX:
        raise ValueError(f"{attribute.name}: longer than {NAME_MAX} characters")
    if not HEADER_VALUE.fullmatch(value):
        raise ValueError(f"{attribute.name}: not a valid header value")


def headers(_: Any, attribute: Any, value: dict[str, str] | tuple[tuple[str, str], ...]) -> None:
    """Validate HTTP headers, in both forms in which messages carry them: they are forwarded unchanged."""
    pairs: Iterable[tuple[str, str]] = value.items() if isinstance(value, dict) else value
    if len(value) > HEADER_COUNT_MAX:
        raise ValueError(f"{attribute.name}: more than {HEADER_COUNT_MAX} headers")
    room = HEADERS_MAX
    for key, content in pairs:
        room -= len(key) + len(content)
        if room < 0:
            raise ValueError(f"{attribute.name}: longer than {HEADERS_MAX} characters in all")
        if not HEADER_NAME.fullmatch(key):
            raise ValueError(f"{attribute.name}: not a valid header name: {key[:40]!r}")
        if not HEADER_VALUE.fullmatch(content):
            raise ValueError(f"{attribute.name}: the value of {key[:40]!r} is not a valid header value")


def query(_: Any, attribute: Any, value: str) -> None:
    """Validate the query of a URL. It becomes part of a request line, so it may contain nothing that ends one."""
    if value and (len(value) > QUERY_MAX or not QUERY.fullmatch(value)):
        raise ValueError(f"{attribute.name}: longer than {QUERY_MAX} characters, or not the query of a URL")


def json_object(_: Any, attribute: Any, value: dict[str, Any]) -> None:
    """Validate a JSON object of limited size and depth."""
    room = JSON_MAX
    level: list[Any] = [value]
    # Level by level and not recursively: the depth is chosen by the peer.
    for _depth in range(JSON_DEPTH_MAX):
        below: list[Any] = []
        for node in level:
            room -= 8
            if isinstance(node, dict):
                for key in node:
                    if not isinstance(key, str):
                        raise ValueError(f"{attribute.name}: contains a key that is not a string")
                    _check_encodable(attribute.name, key)
                    room -= len(key)
                below.extend(node.values())
            elif isinstance(node, list | tuple):
                below.extend(node)
            elif isinstance(node, str):
                _check_encodable(attribute.name, node)
                room -= len(node)
            elif isinstance(node, float):
                if not math.isfinite(node):
                    raise ValueError(f"{attribute.name}: contains a number that JSON cannot represent")
            elif isinstance(node, int):
                if not -(1 << 63) <= node < 1 << 64:
                    raise ValueError(f"{attribute.name}: contains an integer of more than 64 bits")
            elif node is not None:
                raise ValueError(
                    f"{attribute.name}: contains a {type(node).__name__}, which JSON cannot represent"
                )
            # Checked inside the loop: the levels of a list that contains another list many times grow exponentially.
            if room < 8 * len(below):
                raise ValueError(f"{attribute.name}: too large")
        if not below:
            return
        level = below
    raise ValueError(f"{attribute.name}: nested deeper than {JSON_DEPTH_MAX}")
