"""The OpenAPI 3.1 description of the node's HTTP API, served as ``GET /openapi.json``.

The routes of models are described in ``openai/openapi.py``; the answers of the node's own routes are described by their
types in ``views.py``. The description shows no model, no worker and no other state of the node, so no API key is
required to read it.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, Final

import msgspec

from .._version import __version__
from ..core.model import KINDS
from ..core.status import WorkerStatus
from ..openai import ERROR, ERRORS, describe_endpoints, error_responses
from .views import CallsView, CancelView, HealthView, IndexView, ModelsView, StatusView

__all__ = ["description"]

_ABOUT: Final = """\
The OpenAI API, served by a cluster of machines. Every route under `/v1` is also served without that prefix. Fields that
are not described here are passed to the model unchanged.
"""

_MODEL: Final = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"type": "string", "enum": ["model"]},
        "created": {"type": "integer", "description": "Seconds since the epoch."},
        "owned_by": {"type": "string"},
        "kind": {"type": "string", "enum": list(KINDS)},
        "capabilities": {
            "type": "object",
            "properties": {"vision": {"type": "boolean"}},
            "required": ["vision"],
        },
        "context_window": {"type": "integer"},
    },
    "required": ["id", "object", "created", "owned_by", "kind", "capabilities"],
}
_REASON: Final = {
    "type": "object",
    "properties": {
        "reason": {
            "type": ["string", "null"],
            "minLength": 1,
            "maxLength": 500,
            "pattern": "^[ -~]*$",
            "description": "Why the request is cancelled: one line, for the client and the log.",
        }
    },
}

#: The types of the answers. Types that they refer to are added automatically.
_VIEWS: Final = (IndexView, HealthView, ModelsView, StatusView, CallsView, CancelView, WorkerStatus)
_REFERENCE: Final = "#/components/schemas/{name}"

#: Headers of errors by status, besides those that every answer has.
_HEADERS: Final = {
    401: ("www-authenticate",),
    405: ("allow",),
    429: ("retry-after",),
    503: ("retry-after", "x-should-retry"),
}


@cache
def description(needs_key: bool) -> bytes:
    """Return the description as JSON.

    Args:
        needs_key: this node requires an API key.
    """
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "trio_cluster", "version": __version__, "description": _ABOUT},
            "servers": [{"url": "/"}],
            "security": [{"key": []}] if needs_key else [{}, {"key": []}],
            "paths": describe_endpoints() | _node_paths(),
            "components": {
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
                "schemas": {"Error": ERROR, "Model": _MODEL} | _view_schemas(),
                "headers": _headers(),
                "responses": _error_responses(),
            },
        }
    )


def _node_paths() -> dict[str, Any]:
    model = _parameter("model", "The name of a model. It may contain slashes.")
    call = _parameter("request_id", "The `x-request-id` of the request.")
    worker = _parameter("name", "The name of a worker.")
    cancel = _operation("cancel", "Cancel all calls of a request", _view(CancelView), 400, 401, 403, 404, 413)
    cancel["requestBody"] = {"content": {"application/json": {"schema": _REASON}}}
    drain = _operation(
        "drain", "Drain a worker: it finishes its requests and stops", _view(WorkerStatus), 401, 403, 404
    )
    drain["responses"]["202"] = drain["responses"].pop("200")
    health = _open("health", "Check whether the node accepts requests", _view(HealthView))
    health["responses"]["503"] = _answer(_view(HealthView), about="The node is shutting down.")
    metrics = _open("metrics", "Get metrics in the Prometheus text format", {"type": "string"})
    metrics["responses"]["200"] = _answer({"type": "string"}, "text/plain")
    model_ref = {"$ref": "#/components/schemas/Model"}
    models = {"allOf": [_view(ModelsView), {"properties": {"data": {"items": model_ref}}}]}
    return {
        "/v1/models": {"get": _operation("models", "List all models", models, 401)},
        "/v1/models/{model}": {
            "parameters": [model],
            "get": _operation("model", "Retrieve a model", model_ref, 401, 404),
        },
        "/": {"get": _open("index", "Get information about this server", _view(IndexView))},
        "/health": {"get": health},
        "/metrics": {"get": metrics},
        "/openapi.json": {"get": _open("openapi", "Get this OpenAPI description", {"type": "object"})},
        "/cluster/status": {"get": _operation("status", "Get the state of the node", _view(StatusView), 401)},
        "/cluster/calls": {"get": _operation("calls", "List the calls in progress", _view(CallsView), 401)},
        "/cluster/calls/{request_id}/cancel": {"parameters": [call], "post": cancel},
        "/cluster/workers/{name}/drain": {"parameters": [worker], "post": drain},
    }


def _view(view: type) -> dict[str, Any]:
    """Return the reference to the schema of an answer."""
    return {"$ref": _REFERENCE.format(name=view.__name__)}


def _view_schemas() -> dict[str, Any]:
    """Return the schemas of the types of all answers, by name."""
    _, schemas = msgspec.json.schema_components(_VIEWS, ref_template=_REFERENCE)
    for schema in schemas.values():
        if about := schema.get("description"):
            schema["description"] = " ".join(inspect.cleandoc(about).split())
    return schemas


def _operation(name: str, summary: str, schema: dict[str, Any], *errors: int) -> dict[str, Any]:
    return {
        "operationId": name,
        "tags": ["node"],
        "summary": summary,
        "responses": {"200": _answer(schema), **error_responses(errors)},
    }


def _open(name: str, summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Describe a route that requires no API key."""
    return _operation(name, summary, schema) | {"security": [{}]}


def _answer(
    schema: dict[str, Any], kind: str = "application/json", about: str = "Success."
) -> dict[str, Any]:
    return {
        "description": about,
        "headers": _refer(["x-request-id"]),
        "content": {kind: {"schema": schema}},
    }


def _parameter(name: str, about: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": about,
        "schema": {"type": "string", "minLength": 1},
    }


def _refer(names: list[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _headers() -> dict[str, Any]:
    text = {"type": "string"}
    return {
        "x-request-id": {
            "description": "The id of the request: the one that the client sent, or a generated one.",
            "required": True,
            "schema": text,
        },
        "retry-after": {
            "description": "Seconds after which the request may be repeated.",
            "schema": {"type": "integer", "minimum": 1},
        },
        "x-should-retry": {
            "description": "`false`: the request should not be repeated.",
            "schema": {"type": "string", "enum": ["false"]},
        },
        "www-authenticate": {"description": "How to send an API key.", "required": True, "schema": text},
        "allow": {"description": "The methods that the route allows.", "required": True, "schema": text},
    }


def _error_responses() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}

    def response(about: str, *headers: str) -> dict[str, Any]:
        return {
            "description": about,
            "headers": _refer(["x-request-id", *headers]),
            "content": content,
        }

    named = {str(status): response(about, *_HEADERS.get(status, ())) for status, about in ERRORS.items()}
    return named | {"error": response("Any other error, for instance one that a handler raises.")}
