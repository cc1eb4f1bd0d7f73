"""The errors of the package, in two families.

:class:`ApiError` and its subclasses are answers to a client: each has an HTTP status, and the ``type`` and ``code``
that the official OpenAI clients map to an exception class. A worker sends them to its master as plain fields, so that
an error reaches the client exactly as it was raised there. :class:`ClusterError` and its subclasses are for the person
who starts a node: the ``run*`` methods raise them, and the command line prints them as one line.
"""

from __future__ import annotations

from heapq import nsmallest
from typing import Any, Final

__all__ = [
    "UNAVAILABLE_STATUSES",
    "ApiError",
    "CallCancelled",
    "ClusterError",
    "ClusterPortError",
    "HandlerFailed",
    "HandshakeRefused",
    "InvalidRequest",
    "LoopDetected",
    "ModelNotFound",
    "ModelNotOnDemand",
    "ModelStartFailed",
    "ModelUnavailable",
    "NotSupported",
    "OptionsError",
    "Overloaded",
    "QuotaExceeded",
    "RateLimited",
    "ShuttingDown",
    "TooSlow",
    "UpstreamBusy",
    "UpstreamLost",
    "WorkerLost",
    "WrongKind",
]

# The default ``type`` for a status, as the OpenAI API names it.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An error as the client gets it. A handler that raises it answers the client with exactly this.

    Args:
        status: the HTTP status, 400 to 599.
        message: for people; sent to the client as it is.
        code: a short machine-readable word, for instance ``"context_length_exceeded"``.
        type: the family of the error; ``None``: the one that the OpenAI API uses for the status.
        param: the field of the request that is at fault.
        retry_after: seconds after which the client may try again; sent as ``Retry-After``.

    All arguments are attributes, too.

    Attributes:
        final: the client should not repeat the request; sent as ``x-should-retry: false``.

    Raises:
        ValueError: the status is not an error status.
    """

    # The status alone makes the official clients send some requests again.
    final: bool = False

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        type: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        if not 400 <= status <= 599:
            raise ValueError(f"the status of an error must be 400 to 599, not {status}")
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.type = type if type is not None else _TYPES.get(status, "server_error")
        self.param = param
        self.retry_after = retry_after

    def envelope(self) -> dict[str, Any]:
        """Return the error as the OpenAI API's JSON object: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.status}, {self.message!r}, code={self.code!r})"


class InvalidRequest(ApiError):
    """The request is not valid; ``param`` names the field that is at fault."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(status, message, param=param, code=code)


#: Models that the message of a 404 lists at most.
_LISTED_MODELS: Final = 50


class ModelUnavailable(ApiError):
    """No node serves the model now, and one did a short while ago: it is likely to be back soon.

    Args:
        name: the model, or the alias; an attribute, too.
        retry_after: seconds after which clients should try again.
    """

    def __init__(self, name: str, *, retry_after: float = 3.0) -> None:
        self.name = name
        # With two retries, clients wait for longer than workers take to reconnect.
        super().__init__(
            503,
            f"The model '{name}' is not available at the moment; try again shortly",
            param="model",
            code="model_unavailable",
            retry_after=retry_after,
        )


class ModelStartFailed(ApiError):
    """A model that runs on demand could not be started, or could not a short while ago."""

    def __init__(self, name: str, why: str, retry_after: float) -> None:
        super().__init__(
            503, f"{name} could not be started: {why}", code="model_start_failed", retry_after=retry_after
        )


class ModelNotOnDemand(ApiError):
    """A model was to be loaded or unloaded that always runs."""

    def __init__(self, name: str) -> None:
        super().__init__(409, f"The model '{name}' does not run on demand", code="not_on_demand")


class ModelNotFound(ApiError):
    """No backend serves a model of this name, nor did one a short while ago; the message lists the available models.

    Args:
        name: the model, or the alias.
        available: the names of all models and aliases.
        alias: it is an alias, and none of the models is served that it stands for.

    All are attributes, too.
    """

    def __init__(self, name: str, available: list[str], *, alias: bool = False) -> None:
        self.name = name
        self.available = available
        self.alias = alias
        names = ", ".join(nsmallest(_LISTED_MODELS, available)) or "none"
        if len(available) > _LISTED_MODELS:
            names += f", and {len(available) - _LISTED_MODELS} more"
        super().__init__(
            404,
            f"No model that '{name}' is an alias of is served. Available models: {names}"
            if alias
            else f"The model '{name}' does not exist. Available models: {names}",
            param="model",
            code="model_not_found",
        )


class LoopDetected(ApiError):
    """The request has passed this cluster already, or there is no way on that does not lead back to one it passed."""

    def __init__(self, name: str) -> None:
        super().__init__(
            508,
            f"The request for the model '{name}' goes in a circle: clusters serve each other's model of this name",
            param="model",
            code="loop_detected",
        )


class EndpointNotFound(ApiError):
    """The node does not know a route, which a newer node has forwarded to it."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(404, f"This node does not know the route '{endpoint}'", code="endpoint_not_found")


class WrongKind(ApiError):
    """The model exists, but does not answer this route.

    Args:
        name: the model.
        kind: its kind.
        wanted: the kind that the route needs, or the path of the route if it is a custom one.
    """

    def __init__(self, name: str, kind: str, wanted: str) -> None:
        message = f"The model '{name}' is of kind {kind}; this route needs one of kind {wanted}"
        if wanted.startswith("/"):
            message = f"The model '{name}' does not answer {wanted}"
        super().__init__(400, message, param="model", code="model_kind_mismatch")


class NotSupported(ApiError):
    """The model answers its other routes, and not this one; nor will it when the client tries again.

    Args:
        name: the model.
        what: what it cannot do.
    """

    final = True

    def __init__(self, name: str, what: str) -> None:
        super().__init__(501, f"The model '{name}' cannot {what}", code="not_supported")


class Overloaded(ApiError):
    """No slot became free in time, or too many calls wait for one already."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(503, message, code="over_capacity", retry_after=retry_after)


class RateLimited(ApiError):
    """The key of the request has reached one of its limits.

    Args:
        message: for people.
        kind: the limit: ``requests``, ``tokens`` or ``concurrency``; sent as the ``type`` of the error.
        retry_after_ms: milliseconds after which the client may try again; ``None``: the request can never be admitted.

    Attributes:
        retry_after_ms: as given; sent as ``retry-after-ms``, and rounded up to seconds as ``Retry-After``.
    """

    def __init__(self, message: str, *, kind: str, retry_after_ms: int | None = None) -> None:
        super().__init__(
            429,
            message,
            code="rate_limit_exceeded",
            type=kind,
            retry_after=None if retry_after_ms is None else retry_after_ms / 1000,
        )
        self.retry_after_ms = retry_after_ms
        self.final = retry_after_ms is None


class QuotaExceeded(ApiError):
    """The key of the request has used up its budget for the calendar period."""

    final = True

    def __init__(self, message: str) -> None:
        super().__init__(429, message, code="insufficient_quota", type="insufficient_quota")


class ShuttingDown(ApiError):
    """The node is about to stop and accepts no new requests."""

    def __init__(
        self, message: str = "The server is shutting down; try again shortly", *, retry_after: float = 5.0
    ) -> None:
        super().__init__(503, message, code="shutting_down", retry_after=retry_after)


class WorkerLost(ApiError):
    """The master lost the worker that had this call: it was killed, was silent for too long, or its link broke."""

    def __init__(self, worker: str, why: str) -> None:
        super().__init__(502, f"The worker '{worker}' was lost before it finished: {why}", code="worker_lost")


class UpstreamLost(ApiError):
    """The server behind a model cannot be reached, or broke off before its answer was complete."""

    def __init__(self, model: str, why: str) -> None:
        super().__init__(502, f"The server behind the model '{model}' was lost: {why}", code="upstream_lost")


#: Statuses with which a server says that it, or what is behind it, cannot take a request now. 529 is Anthropic's.
UNAVAILABLE_STATUSES: Final = frozenset({429, 502, 503, 504, 529})


class UpstreamBusy(ApiError):
    """The server behind a model cannot take the request now; status and message are its own."""


class TooSlow(ApiError):
    """The idle timeout or the total timeout of the request has passed."""

    def __init__(self, message: str) -> None:
        super().__init__(504, message, code="timeout", type="timeout_error")


class HandlerFailed(ApiError):
    """The handler raised an error that is not an ``ApiError``; the client is shown nothing of it."""

    def __init__(self, message: str = "The model failed to answer this request") -> None:
        super().__init__(500, message, code="handler_failed")


class CallCancelled(ApiError):
    """The call was cancelled. A client sees this error only if the call was cancelled by something else than itself.

    Args:
        reason: who cancelled the call and why.
        final: the client should not repeat the request; sent as ``x-should-retry: false``.

    Attributes:
        final: as given.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(503, f"The request was cancelled: {reason}", code="cancelled")
        self.final = final


class ClusterError(Exception):
    """A node cannot start, or cannot go on. The message is one line for the person who runs it."""


class ClusterPortError(ClusterError):
    """The node cannot listen on a port that it needs.

    Attributes:
        port: the port.
        taken: whether another process has the port.
    """

    def __init__(self, port: int, why: str, *, taken: bool = False) -> None:
        super().__init__(f"port {port}: {why}")
        self.port = port
        self.taken = taken


class HandshakeRefused(ClusterError):
    """The master refused this worker, or what listens at its address is not a master. Trying again would not help."""


class OptionsError(ClusterError, ValueError):
    """An option is unknown, or has a wrong value; the message names it."""
