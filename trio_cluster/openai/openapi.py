"""What clients may read about the routes of models: OpenAPI 3.1, made from the tables that check their requests.

An endpoint that names its table is described field by field; one that does not, as taking any object. What a field is
when it is not there comes from the class that the route's reader returns. Nothing is written down here that the code
does not go by.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from .endpoints import ENDPOINTS, Endpoint
from .requests.schemas import Schema, members_of

__all__ = ["ERROR", "ERRORS", "describe_endpoints", "error_responses"]

#: The object that every error is.
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

#: The statuses that errors of the house have, and when.
ERRORS: Final[Mapping[int, str]] = {
    400: "The request cannot be served as it is; `param` names the field.",
    401: "The key is missing or wrong.",
    403: "A page of the web may not do this.",
    404: "There is no such route, model, call or worker.",
    405: "The route does not take this method.",
    408: "The body of the request did not arrive in time.",
    413: "The body of the request is too large.",
    415: "The content type is not the one that the route takes.",
    429: "The model says that there are too many requests.",
    500: "The model failed.",
    502: "The worker was lost before it had answered.",
    503: "Nobody has room for the request, the server is being stopped, or the request was given up.",
    504: "Nothing came for too long, or the time of the request is used up.",
}

#: What a request for a model may end in. A handler may answer with other errors as well.
_OF_MODELS: Final = (400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504)

_ANY_OBJECT: Final[Schema] = members_of({"model": {"type": "string", "minLength": 1}}, ("model",))
_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"


def describe_endpoints() -> dict[str, Any]:
    """Return the ``paths`` of all routes of models."""
    return {f"/v1{endpoint.path}": {"post": _describe(endpoint)} for endpoint in ENDPOINTS.values()}


def error_responses(statuses: Iterable[int]) -> dict[str, Any]:
    """Return the ``responses`` for errors of these statuses, and for whatever else may go wrong."""
    named = {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}
    return named | {"default": {"$ref": "#/components/responses/error"}}


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
            **error_responses(_OF_MODELS),
        },
    }


def _content(media_type: str) -> dict[str, Any]:
    # How events are described, this version of OpenAPI does not say.
    if media_type == _EVENTS:
        return {}
    return {"schema": {"type": "object" if media_type == _JSON else "string"}}


def _defaults(endpoint: Endpoint) -> dict[str, Any]:
    """Return what the fields are that a client leaves out, where that is something."""
    read: Any = typing.get_type_hints(endpoint.parse)["return"]
    plain = (bool, int, float, str)
    return {field.name: field.default for field in attrs.fields(read) if isinstance(field.default, plain)}
