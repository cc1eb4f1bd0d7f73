"""How large a field of a message may be: attrs validators, and what makes a text fit.

The bounds belong to the messages themselves, not to their decoding, so that one rule serves both ends: a
message that cannot be received cannot be made either. The sender finds out where the bad value came from,
with a ``ValueError``, and not by losing its link; the receiver turns the same ``ValueError`` into a
``ProtocolError``. Types are the codec's concern; a program that passes mypy cannot get them wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Final

from trio_cluster.core.headers import HEADER_NAME, HEADER_VALUE

__all__ = [
    "HEADERS_MAX",
    "JSON_MAX",
    "NAMES_MAX",
    "NAME_MAX",
    "PROGRESS_MAX",
    "TEXT_MAX",
    "clip",
    "content_type",
    "headers",
    "integer",
    "json_object",
    "name",
    "names",
    "optional_text",
    "progress",
    "seconds",
    "text",
]

#: Characters in the name of a model, a node, an endpoint.
NAME_MAX: Final = 512
#: Characters in a reason or an error message.
TEXT_MAX: Final = 8192
#: Names in one list of them.
NAMES_MAX: Final = 64
#: Calls of which one heartbeat tells how far they are.
PROGRESS_MAX: Final = 1024
#: Characters in all headers of a message together, names and values.
HEADERS_MAX: Final = 32768
#: The weight of a JSON object: its characters, and eight for each value.
JSON_MAX: Final = 32768

_HEADER_COUNT_MAX: Final = 128
_JSON_DEPTH_MAX: Final = 16


#: Numbers in a report of usage, and characters in the name of one.
_USAGE_MAX: Final = 16
_USAGE_NAME_MAX: Final = 64

Validator = Callable[[Any, Any, Any], None]


def clip(text: object, limit: int = TEXT_MAX) -> str:
    """Return ``text`` as a message may carry it: at most ``limit`` characters, all of them encodable."""
    clean = str(text)
    if len(clean) > limit:
        clean = clean[: limit - 1] + "…"
    # A lone surrogate (a file name that is not UTF-8, in somebody's exception) has no encoding.
    return clean.encode("utf-8", "replace").decode("utf-8")


def _check_encodable(name: str, value: str) -> None:
    # Lone surrogates are in no encoding. Nothing that was received has any, and most texts are ASCII.
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name}: has a character that cannot be encoded")


def integer(lowest: int, highest: int) -> Validator:
    """Both bounds are allowed values."""

    def check(_: Any, attribute: Any, value: int) -> None:
        if not lowest <= value <= highest:
            raise ValueError(f"{attribute.name}: lies outside {lowest} to {highest}")

    return check


def name(_: Any, attribute: Any, value: str) -> None:
    """Something printable: names end up in logs, in error messages and on terminals."""
    if not 0 < len(value) <= NAME_MAX:
        raise ValueError(f"{attribute.name}: must have 1 to {NAME_MAX} characters, not {len(value)}")
    if not value.isprintable():
        raise ValueError(f"{attribute.name}: has characters that cannot be printed")


def names(instance: Any, attribute: Any, value: tuple[str, ...]) -> None:
    """A few of what :func:`name` takes."""
    if len(value) > NAMES_MAX:
        raise ValueError(f"{attribute.name}: more than {NAMES_MAX} of them")
    for each in value:
        name(instance, attribute, each)


def text(limit: int = TEXT_MAX) -> Validator:
    """Any text, even an empty one, of at most ``limit`` characters."""

    def check(_: Any, attribute: Any, value: str) -> None:
        if len(value) > limit:
            raise ValueError(f"{attribute.name}: longer than {limit} characters")
        _check_encodable(attribute.name, value)

    return check


def optional_name(instance: Any, attribute: Any, value: str) -> None:
    """What :func:`name` takes, or an empty text."""
    if value:
        name(instance, attribute, value)


def optional_text(limit: int) -> Validator:
    """As :func:`text`, or ``None``."""
    bounded = text(limit)

    def check(instance: Any, attribute: Any, value: str | None) -> None:
        if value is not None:
            bounded(instance, attribute, value)

    return check


def seconds(_: Any, attribute: Any, value: float | None) -> None:
    """A span of time that is neither negative nor endless; ``None`` says that there is no bound."""
    if value is not None and not (0.0 <= value < math.inf):
        raise ValueError(f"{attribute.name}: must be a finite number of seconds, not {value}")


def progress(_: Any, attribute: Any, value: tuple[tuple[int, int], ...]) -> None:
    """Pairs of a call's number and a count, or -1 in the place of the count."""
    if len(value) > PROGRESS_MAX:
        raise ValueError(f"{attribute.name}: more than {PROGRESS_MAX} calls")
    if not all(0 < call < 1 << 63 and -1 <= count < 1 << 63 for call, count in value):
        raise ValueError(f"{attribute.name}: a number is out of bounds")


def usage(_: Any, attribute: Any, value: dict[str, int]) -> None:
    """Numbers of tokens by name."""
    if len(value) > _USAGE_MAX:
        raise ValueError(f"{attribute.name}: more than {_USAGE_MAX} numbers")
    for key, count in value.items():
        if not 0 <= count < 1 << 53 or len(key) > _USAGE_NAME_MAX:
            raise ValueError(f"{attribute.name}: a number or a name is out of bounds")


def content_type(_: Any, attribute: Any, value: str) -> None:
    """The value of a ``Content-Type`` header, or nothing."""
    if len(value) > NAME_MAX:
        raise ValueError(f"{attribute.name}: longer than {NAME_MAX} characters")
    if not HEADER_VALUE.fullmatch(value):
        raise ValueError(f"{attribute.name}: is not a header value")


def headers(_: Any, attribute: Any, value: dict[str, str] | tuple[tuple[str, str], ...]) -> None:
    """HTTP headers that can be sent on as they are, in both of the forms in which messages carry them."""
    pairs: Iterable[tuple[str, str]] = value.items() if isinstance(value, dict) else value
    if len(value) > _HEADER_COUNT_MAX:
        raise ValueError(f"{attribute.name}: more than {_HEADER_COUNT_MAX} of them")
    room = HEADERS_MAX
    for key, content in pairs:
        room -= len(key) + len(content)
        if room < 0:
            raise ValueError(f"{attribute.name}: longer than {HEADERS_MAX} characters together")
        if not HEADER_NAME.fullmatch(key):
            raise ValueError(f"{attribute.name}: a name that is not one: {key[:40]!r}")
        if not HEADER_VALUE.fullmatch(content):
            raise ValueError(f"{attribute.name}: the value of {key[:40]!r} is not a header value")


def json_object(_: Any, attribute: Any, value: dict[str, Any]) -> None:
    """Something that JSON can say, of a bounded size and depth."""
    room = JSON_MAX
    level: list[Any] = [value]
    # Level by level and not recursively: how deep it is comes from the peer.
    for _depth in range(_JSON_DEPTH_MAX):
        below: list[Any] = []
        for node in level:
            room -= 8
            if isinstance(node, dict):
                for key in node:
                    if not isinstance(key, str):
                        raise ValueError(f"{attribute.name}: a key that is not a string")
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
                    raise ValueError(f"{attribute.name}: has a number that JSON does not have")
            elif isinstance(node, int):
                if not -(1 << 63) <= node < 1 << 64:
                    raise ValueError(f"{attribute.name}: has an integer of more than 64 bits")
            elif node is not None:
                raise ValueError(
                    f"{attribute.name}: has a value that JSON does not have: {type(node).__name__}"
                )
            # Inside the loop: a list that holds itself many times would otherwise explode from level to
            # level.
            if room < 8 * len(below):
                raise ValueError(f"{attribute.name}: too large")
        if not below:
            return
        level = below
    raise ValueError(f"{attribute.name}: nested deeper than {_JSON_DEPTH_MAX}")
