"""What is sent back: a status, headers, and a body that is there or still coming.

No web framework is known here. A failure becomes a reply in one place, so that a refusal by the gate, an
unknown path and a model that failed all look the same to a client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Protocol

import attrs
import msgspec

from .._errors import ApiError
from ..openai import error_body

__all__ = ["Body", "Reply", "error_reply", "json_reply"]

_JSON: Final = ("content-type", "application/json")
_UNAUTHORIZED: Final = 401


class Body(Protocol):
    """A body that is still coming."""

    async def receive(self) -> bytes:
        """Return the next piece, never an empty one.

        Raises:
            trio.EndOfChannel: there are no more.
        """
        ...


@attrs.frozen
class Reply:
    """An answer to one HTTP request. Header names are in lower case; the content type is one of them."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes | Body


def json_reply(value: Mapping[str, Any], status: int = 200) -> Reply:
    """Return a reply that carries ``value`` as JSON."""
    return Reply(status, [_JSON], msgspec.json.encode(value))


def error_reply(error: ApiError) -> Reply:
    """Return the reply that an error is, with the headers that clients act on."""
    headers = [_JSON]
    if error.retry_after is not None:
        headers.append(("retry-after", str(max(1, math.ceil(error.retry_after)))))
    if error.status == _UNAUTHORIZED:
        headers.append(("www-authenticate", "Bearer"))
    return Reply(error.status, headers, error_body(error))
