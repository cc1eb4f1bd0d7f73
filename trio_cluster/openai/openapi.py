"""The description of the routes of models: OpenAPI 3.1, made from the tables that check their requests.

An endpoint with a table is described field by field, and one without as taking any object. The default of a field comes
from the class that the route's reader returns. So the description follows the code, and repeats nothing of it.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from .endpoints import ENDPOINTS, Endpoint
from .error_families import MESSAGE_ERRORS
from .requests.schemas import Schema, members_of

__all__ = [
    "ERROR",
    "ERRORS",
    "MESSAGE_ERROR_SCHEMA",
    "MESSAGE_PREFIX",
    "describe_endpoints",
    "error_responses",
]

#: The schema of every error, except on the routes of the Messages API.
ERROR: Final[Schema] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}

#: The schema of every error on the routes of the Messages API.
MESSAGE_ERROR_SCHEMA: Final[Schema] = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": ["error"]},
        "error": {
            "type": "object",
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["type", "message", "code"],
        },
        "request_id": {"type": ["string", "null"]},
    },
    "required": ["type", "error", "request_id"],
}

#: What stands before the status in the names of the responses with these errors.
MESSAGE_PREFIX: Final = "messages-"

#: The statuses of the server's own errors, and when they are used.
ERRORS: Final[Mapping[int, str]] = {
    400: "The request cannot be served as it is; `param` names the field.",
    401: "The key is missing or wrong.",
    403: "It is for operators, the key may not use the model, or it comes from a web page, which may not do this.",
    404: "There is no such route, model, call, worker or key.",
    405: "The route does not take this method.",
    408: "The body of the request did not arrive in time.",
    409: "The name is taken, or this node does not do that.",
    413: "The body of the request is too large.",
    415: "The content type is not the one that the route takes.",
    429: "The model reports too many requests.",
    500: "The model failed.",
    501: "The model does not answer this route.",
    502: "The worker was lost before it had answered.",
    503: "No replica has capacity for the request, the server is being stopped, or the request was cancelled.",
    504: "There was no output for too long, or the time of the request has passed.",
    508: "The request has passed this cluster already.",
    529: "The same as 503, on the routes of the Messages API.",
}

#: The error statuses of routes of models. A handler may answer with others as well.
_MODEL_ERRORS: Final = (400, 401, 403, 404, 408, 413, 415, 429, 500, 502, 503, 504, 508)

_ANY_OBJECT: Final[Schema] = members_of({"model": {"type": "string", "minLength": 1}}, ("model",))
_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"


def describe_endpoints() -> dict[str, Any]:
    """Return the ``paths`` of all routes of models."""
    return {f"/v1{endpoint.path}": {"post": _describe(endpoint)} for endpoint in ENDPOINTS.values()}


def error_responses(statuses: Iterable[int], prefix: str = "") -> dict[str, Any]:
    """Return the ``responses`` for errors of these statuses, and a default for all others.

    Args:
        statuses: the statuses.
        prefix: what stands before the status in the names of the responses.
    """
    named = {str(status): {"$ref": f"#/components/responses/{prefix}{status}"} for status in statuses}
    return named | {"default": {"$ref": f"#/components/responses/{prefix}error"}}


def _errors_of(endpoint: Endpoint) -> dict[str, Any]:
    statuses = [endpoint.errors.statuses.get(status, status) for status in _MODEL_ERRORS]
    if endpoint.optional is not None:
        statuses.append(501)
    return error_responses(sorted(statuses), MESSAGE_PREFIX if endpoint.errors is MESSAGE_ERRORS else "")


def _describe(endpoint: Endpoint) -> dict[str, Any]:
    table = endpoint.table
    sent = "multipart/form-data" if table is not None and table.is_form else _JSON
    schema = _ANY_OBJECT if table is None else table.schema(_defaults(endpoint))
    answer = {media_type: _content(media_type) for media_type in endpoint.answers}
    request_id = {"x-request-id": {"$ref": "#/components/headers/x-request-id"}}
    return {
        "operationId": endpoint.name,
        "tags": [endpoint.kind],
        "summary": f"Ask a model of kind {endpoint.kind}",
        "requestBody": {"required": True, "content": {sent: {"schema": schema}}},
        "responses": {
            "200": {"description": "The model's answer.", "headers": request_id, "content": answer},
            **_errors_of(endpoint),
        },
    }


def _content(media_type: str) -> dict[str, Any]:
    # This version of OpenAPI has no way to describe a stream of events.
    if media_type == _EVENTS:
        return {}
    return {"schema": {"type": "object" if media_type == _JSON else "string"}}


def _defaults(endpoint: Endpoint) -> dict[str, Any]:
    """Return the defaults of the fields that have a plain value as their default."""
    read: Any = typing.get_type_hints(endpoint.parse)["return"]
    plain = (bool, int, float, str)
    return {field.name: field.default for field in attrs.fields(read) if isinstance(field.default, plain)}
