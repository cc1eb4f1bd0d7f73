"""The answer to something that never became a request, so that no application can answer it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import attrs

__all__ = ["HttpRefusal", "RenderRefusal", "render_as_text"]


@attrs.frozen
class HttpRefusal:
    """Why what came in is not a request.

    Attributes:
        status: the HTTP status of the answer, 400 to 599.
        message: for the person who reads the answer.
        headers: what came of the headers before that, names in lower case.
        client: the address and the port of the client, if they are known.
    """

    status: int
    message: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    client: tuple[str, int] | None = None


#: Returns the headers and the body of the answer to what was refused. The server adds the status line and the headers
#: ``content-length``, ``connection`` and ``date``. Synchronous; must not raise.
RenderRefusal: TypeAlias = Callable[[HttpRefusal], tuple[Sequence[tuple[str, str]], bytes]]


def render_as_text(refusal: HttpRefusal) -> tuple[Sequence[tuple[str, str]], bytes]:
    """Return the answer as plain text. See :data:`RenderRefusal`."""
    return [("content-type", "text/plain; charset=utf-8")], f"{refusal.message}\n".encode()
