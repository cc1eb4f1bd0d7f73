"""What can go wrong, and how each failure looks to a client.

Two families. :class:`ApiError` and its subclasses are answers: each knows the HTTP status, the ``type`` and the
``code`` that the official OpenAI clients map to an exception class. They travel over the cluster's wire as plain
fields, so that a failure on a worker reaches the client exactly as it was raised there. :class:`ClusterError` and
its subclasses are for the person who starts a node: they come out of ``run*`` and end up as one line on a terminal.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ApiError",
    "CallCancelled",
    "ClusterError",
    "ClusterPortError",
    "HandlerFailed",
    "HandshakeRefused",
    "InvalidRequest",
    "LoopDetected",
    "ModelNotFound",
    "ModelUnavailable",
    "OptionsError",
    "Overloaded",
    "ShuttingDown",
    "TooSlow",
    "UpstreamLost",
    "WorkerLost",
    "WrongKind",
]

# The ``type`` that goes with a status when nothing better is said; the words are the OpenAI API's own.
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
    """An answer that is an error; raise it in a handler to give the client exactly this.

    Args:
        status: the HTTP status, 400 to 599.
        message: for the person who reads it; shown to the client as it is.
        code: a short machine-readable word, for instance ``"context_length_exceeded"``.
        type: the family of the error; without it, the OpenAI API's usual one for the status.
        param: the request field that is at fault.
        retry_after: seconds after which trying again makes sense; sent as ``Retry-After``.

    Raises:
        ValueError: the status is not an error status.
    """

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
            raise ValueError(f"an error's status lies between 400 and 599, not {status}")
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.type = type if type is not None else _TYPES.get(status, "server_error")
        self.param = param
        self.retry_after = retry_after

    def envelope(self) -> dict[str, Any]:
        """Return the JSON object that every error of the OpenAI API is: ``{"error": {...}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.status}, {self.message!r}, code={self.code!r})"


class InvalidRequest(ApiError):
    """The client sent something that cannot be served; ``param`` names the field."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(status, message, param=param, code=code)


class ModelUnavailable(ApiError):
    """No node serves the model now, and one did a short while ago: it is likely to be back soon."""

    def __init__(self, name: str, *, retry_after: float = 3.0) -> None:
        # With two retries, clients wait for longer than workers take to reconnect.
        super().__init__(
            503,
            f"The model '{name}' is not available at the moment; try again shortly",
            param="model",
            code="model_unavailable",
            retry_after=retry_after,
        )


class ModelNotFound(ApiError):
    """No node serves a model of this name, nor did one a short while ago; the message lists what there is."""

    def __init__(self, name: str, available: list[str]) -> None:
        there = ", ".join(sorted(available)) or "none"
        super().__init__(
            404,
            f"The model '{name}' does not exist. Available models: {there}",
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


class WrongKind(ApiError):
    """The model exists, but it is not one for this route; ``wanted`` is a kind, or the path of a route of its own."""

    def __init__(self, name: str, kind: str, wanted: str) -> None:
        message = f"The model '{name}' is of kind {kind}; this route needs one of kind {wanted}"
        if wanted.startswith("/"):
            message = f"The model '{name}' does not answer {wanted}"
        super().__init__(400, message, param="model", code="model_kind_mismatch")


class Overloaded(ApiError):
    """No slot became free in time, or too many already wait for one."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(503, message, code="over_capacity", retry_after=retry_after)


class ShuttingDown(ApiError):
    """The node is being stopped and takes no new work."""

    def __init__(
        self, message: str = "The server is shutting down; try again shortly", *, retry_after: float = 5.0
    ) -> None:
        super().__init__(503, message, code="shutting_down", retry_after=retry_after)


class WorkerLost(ApiError):
    """The worker that had this call is gone: killed, silent for too long, or cut off."""

    def __init__(self, worker: str, why: str) -> None:
        super().__init__(502, f"The worker '{worker}' was lost before it finished: {why}", code="worker_lost")


class UpstreamLost(ApiError):
    """The server behind a model cannot be reached, or broke off before its answer was complete."""

    def __init__(self, model: str, why: str) -> None:
        super().__init__(502, f"The server behind the model '{model}' was lost: {why}", code="upstream_lost")


class TooSlow(ApiError):
    """Nothing came for longer than the request may be silent, or its whole time is used up."""

    def __init__(self, message: str) -> None:
        super().__init__(504, message, code="timeout", type="timeout_error")


class HandlerFailed(ApiError):
    """The handler raised something that was not meant for the client; shows no internals."""

    def __init__(self, message: str = "The model failed to answer this request") -> None:
        super().__init__(500, message, code="handler_failed")


class CallCancelled(ApiError):
    """The call was given up; its reason says by whom. A client sees it only if it is not the one who left.

    Attributes:
        final: whoever gave it up does not want to see it again; clients that repeat failed requests are told so.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(503, f"The request was cancelled: {reason}", code="cancelled")
        self.final = final


class ClusterError(Exception):
    """A node cannot start, or cannot go on. The message is one clear line for the person who runs it."""


class ClusterPortError(ClusterError):
    """A port that the node needs cannot be had.

    Attributes:
        port: which one.
        taken: whether another process has it.
    """

    def __init__(self, port: int, why: str, *, taken: bool = False) -> None:
        super().__init__(f"port {port}: {why}")
        self.port = port
        self.taken = taken


class HandshakeRefused(ClusterError):
    """The other end will not have us, or is not what we took it for; trying again would not help."""


class OptionsError(ClusterError, ValueError):
    """A configuration value is unknown or wrong; the message names the key."""
