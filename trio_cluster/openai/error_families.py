"""Error families: how the errors of a route look, in one place.

Clients of different APIs expect different errors: another envelope, other types, for some errors another status, and
other headers beside. Which family a route belongs to is a property of the route (``Endpoint.errors``). Whatever refuses
a request or fails later (the gateway before it has read the body, a check of the body, a model, a stream in its middle)
raises the same :class:`~trio_cluster.ApiError`, and its family writes it.

:data:`OPENAI_ERRORS` is the family of all routes of the OpenAI API and of the server's own, :data:`MESSAGE_ERRORS` that
of the Messages API (Anthropic), whose errors look like this::

    {"type": "error", "error": {"type": "not_found_error", "message": "...", "code": "..."}, "request_id": "..."}

``code`` is this server's own word for the error; Anthropic's API has none.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import attrs

from trio_cluster.errors import ApiError

from .json_values import dumps
from .sse import error_body

__all__ = ["MESSAGE_ERRORS", "OPENAI_ERRORS", "ErrorFamily", "message_envelope"]

#: Error types of the Anthropic API, by status.
_MESSAGE_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}

#: Where the Anthropic API has another status for the same: it is overloaded with 529.
_MESSAGE_STATUSES: Final = {503: 529}


@attrs.frozen
class ErrorFamily:
    """How the errors of some routes are written, and which headers their answers have.

    Attributes:
        body: ``body(error, request_id)`` returns the body of the answer. Never fails.
        limit_headers: ``limit_headers(name, limit, remaining, reset, now)`` returns the headers that say what is left
            of a limit: ``requests`` or ``tokens`` a minute, how many there may be and how many are left, in how many
            microseconds all of it is there again, and the time in seconds since the epoch.
        statuses: the statuses of errors that have another status in this family.
        request_id: the name of a further header with the id of the request; empty: only ``x-request-id`` has it.
        limit_prefixes: the beginnings of the names of ``limit_headers``.
    """

    body: Callable[[ApiError, str], bytes]
    limit_headers: Callable[[bytes, int, int, int, float], list[tuple[bytes, bytes]]]
    statuses: Mapping[int, int] = attrs.field(factory=dict)
    request_id: bytes = b""
    limit_prefixes: tuple[bytes, ...] = (b"x-ratelimit-",)

    def status(self, error: ApiError) -> int:
        """Return the HTTP status of an error."""
        return self.statuses.get(error.status, error.status)


# The OpenAI API


def _openai_body(error: ApiError, request_id: str) -> bytes:
    return error_body(error)


def _openai_limit_headers(
    name: bytes, limit: int, remaining: int, reset: int, now: float
) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit-" + name, b"%d" % limit),
        (b"x-ratelimit-remaining-" + name, b"%d" % remaining),
        (b"x-ratelimit-reset-" + name, _duration(reset)),
    ]


# Cached, since most answers have the whole minute.
@lru_cache(maxsize=64)
def _duration(microseconds: int) -> bytes:
    """Return a duration as the OpenAI API writes it: ``12ms``, ``1s``, ``1.5s``, ``6m0s``."""
    milliseconds = -(-microseconds // 1000)
    if milliseconds < 1000:
        return b"%dms" % milliseconds if milliseconds else b"0s"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return (f"{minutes}m" if minutes else "").encode() + f"{seconds}s".encode()


OPENAI_ERRORS: Final = ErrorFamily(_openai_body, _openai_limit_headers)


# The Messages API


def message_envelope(error: ApiError) -> dict[str, Any]:
    """Return an error as the JSON object of the Messages API, without the id of the request."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _MESSAGE_TYPES.get(error.status, default)
    inner = {"type": kind, "message": error.message, "code": error.code}
    if error.param is not None:
        inner["param"] = error.param
    return {"type": "error", "error": inner}


def _message_body(error: ApiError, request_id: str) -> bytes:
    envelope = message_envelope(error) | {"request_id": request_id or None}
    try:
        return dumps(envelope)
    except (TypeError, ValueError):
        return json.dumps(envelope, default=str, skipkeys=True).encode("ascii")


def _message_limit_headers(
    name: bytes, limit: int, remaining: int, reset: int, now: float
) -> list[tuple[bytes, bytes]]:
    prefix = b"anthropic-ratelimit-" + name
    return [
        *_openai_limit_headers(name, limit, remaining, reset, now),
        (prefix + b"-limit", b"%d" % limit),
        (prefix + b"-remaining", b"%d" % remaining),
        (prefix + b"-reset", _time(now + reset / 1_000_000)),
    ]


def _time(seconds: float) -> bytes:
    """Return a time as RFC 3339 writes it, rounded up to a second, so that a client does not come too early."""
    whole = datetime.datetime.fromtimestamp(-(-seconds // 1), datetime.UTC)
    return whole.strftime("%Y-%m-%dT%H:%M:%SZ").encode("ascii")


MESSAGE_ERRORS: Final = ErrorFamily(
    _message_body,
    _message_limit_headers,
    _MESSAGE_STATUSES,
    b"request-id",
    (b"x-ratelimit-", b"anthropic-ratelimit-"),
)
