"""A request for a model, as the gateway, the router and the backends see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from .call_trace import CallTrace
from .channel import ByteChannel
from .model import Kind
from .principal import ANONYMOUS, Principal

__all__ = ["Request"]


@attrs.frozen(eq=False)
class Request:
    """One request for one model. It can be answered on this node or on any other.

    ``body`` and ``content_type`` are what the client sent, byte for byte; nothing between the gateway and the handler
    rewrites them. The gateway does if the path names the model, for aliases, and for stored responses. If the body is
    still arriving, it is in ``upload``, and ``body`` is empty.
    """

    endpoint: str
    """The name of the endpoint, for instance ``chat.completions``; for a custom route, its path."""
    kind: Kind
    """The kind of model that can answer."""
    model: str
    """The name of the model; if the client asked for an alias, of the model that it stands for."""
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = attrs.field(factory=dict)
    """The client's headers that a handler may want, and the trace context; names in lower case."""
    request_id: str = ""
    """The ``x-request-id`` of the request."""
    idle_timeout: float = math.inf
    """Seconds that may pass before the first output, and between two outputs."""
    total_timeout: float = math.inf
    """Seconds from opening the call until the whole answer must be complete."""
    parsed: Any = None
    """The parsed body, if it was parsed on this node; not forwarded."""
    checked: bool = False
    """The body was validated already: by the gateway of this node, or by the master that forwarded the request."""
    client: str = ""
    """The address from which the request came, for display; not forwarded."""
    upload: ByteChannel | None = None
    """The body, if it was still arriving when the request was made."""
    principal: Principal = ANONYMOUS
    """Who sends the request. The name, the weight and the priority are forwarded to a worker."""
    max_tokens: int = 0
    """Tokens that the answer may have, as far as the request says so; 0: it does not. For the order in which requests
    are served, and for nothing else."""
    query: str = ""
    """The query of the URL, without the question mark, percent-encoded as the client sent it; empty if there is none.
    Keys in it are left out."""

    alias: str = ""
    """The name that the client asked for, if that is an alias; empty if it is the name of the model."""
    otherwise: Callable[[], Request | None] | None = None
    """Returns the request for the next name of the alias, which is tried if this one cannot be answered; ``None``, or
    a function that returns ``None``: there is none. Synchronous. Not forwarded."""
    retried: bool = False
    """It was opened on another replica before, which failed. There is no further retry of
    this model. Not forwarded."""
    trace: CallTrace | None = None
    """The trace of the call that answers it; ``None``: there is no tracing. Its context is in the headers. Not
    forwarded."""

    @property
    def key_name(self) -> str:
        """The name of the API key that the request has; empty where no key is required."""
        return self.principal.name

    @property
    def size(self) -> int:
        """The size of the body in bytes, including what has not arrived yet; -1 if it is not known."""
        return len(self.body) if self.upload is None else self.upload.size

    @property
    def replayable(self) -> bool:
        """Whether the request can be sent a second time. A body that was streamed through is not kept."""
        return self.upload is None
