"""A request for a model, as it flows through a node."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs

from .channel import ByteChannel
from .model import Kind
from .principal import ANONYMOUS, Principal

__all__ = ["Request"]


@attrs.frozen(eq=False)
class Request:
    """One request for one model, ready to be answered here or on any other node.

    ``body`` is what the client sent, byte for byte, and ``content_type`` says how to read it; nothing between the
    client and the handler rewrites them. A body that is still arriving is ``upload``, and ``body`` is empty then.
    """

    endpoint: str
    """The name of the route in the table of endpoints, for instance ``chat.completions``; of a route that is not in
    the table, its path."""
    kind: Kind
    """The kind of model that can answer."""
    model: str
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = attrs.field(factory=dict)
    """The client's headers that a handler may want, and the trace context; names in lower case."""
    request_id: str = ""
    idle_timeout: float = math.inf
    """Seconds that may pass before the first output, and between two outputs."""
    total_timeout: float = math.inf
    """Seconds from opening the call until the whole answer must be there."""
    parsed: Any = None
    """The body as the openai room has read it, if that was done on this node; it does not travel."""
    checked: bool = False
    """The body was validated by the master that forwarded it."""
    client: str = ""
    """The address that the request came from, for people; it does not travel."""
    upload: ByteChannel | None = None
    """The body, if it was not complete when the request was made."""
    principal: Principal = ANONYMOUS
    """Who asks. A worker knows the name only."""

    @property
    def size(self) -> int:
        """How many bytes the body has or will have; -1 if that is not known."""
        return len(self.body) if self.upload is None else self.upload.size

    @property
    def replayable(self) -> bool:
        """Whether the request can be sent a second time; a body that was streamed through is gone."""
        return self.upload is None
