"""Server-sent events, as far as the OpenAI API uses them: ``data`` lines, comments, and names on some routes.

There are no ``id`` lines: the official clients fail on an id next to a comment. A stream that is complete ends with
:data:`DONE`, or, where events have names, with an event whose name marks the end. A stream that failed ends with an
error event instead; this difference is all that tells a client the two apart.
"""

from __future__ import annotations

import json
from typing import Final

from trio_cluster.errors import ApiError

from .json_values import dumps

__all__ = [
    "DONE",
    "KEEPALIVE",
    "NO_PROXY_BUFFERING",
    "comment_with",
    "error_body",
    "error_event",
    "event",
    "named_event",
]

#: Ends a stream that is complete.
DONE: Final = b"data: [DONE]\n\n"

#: A comment, sent while there is nothing else to send. Clients ignore it.
KEEPALIVE: Final = b": keepalive\n\n"

#: Headers of a stream: proxies on the way must neither keep it nor collect more of it before they pass it on.
NO_PROXY_BUFFERING: Final = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))


def event(data: bytes) -> bytes:
    """Return one event that carries ``data``, which must not contain line breaks. Compact JSON contains none."""
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    """Return one event with a name, for routes whose clients read the names."""
    return b"event: " + name.encode("ascii") + b"\n" + event(data)


def comment_with(keepalive: bytes, text: str) -> bytes:
    """Return a comment with a text, in the place of ``keepalive``, or in front of it if that is an event."""
    comment = b": " + " ".join(text.split()).encode() + b"\n\n"
    return comment if keepalive == KEEPALIVE else comment + keepalive


def error_body(error: ApiError) -> bytes:
    """Return the JSON text of an error's envelope. Never fails: values without a JSON form are written as text."""
    envelope = error.envelope()
    try:
        return dumps(envelope)
    except (TypeError, ValueError):
        return json.dumps(envelope, default=str, skipkeys=True).encode("ascii")


def error_event(error: ApiError) -> bytes:
    """Return the event that ends a stream which has begun and failed."""
    return event(error_body(error))
