"""The OpenAPI 3.1 description of the node's HTTP API, served as ``GET /openapi.json``.

The routes of models are described in ``openai/openapi.py``; the answers of the node's own routes are described by their
types in ``views.py``. The description shows no model, no worker and no other state of the node, so no API key is
required to read it.
"""

from __future__ import annotations

import inspect
import typing
from functools import cache
from typing import Any, Final

import msgspec

from .._version import __version__
from ..accounts.usage_row import COUNTS, GROUPS
from ..core.model import KINDS
from ..core.model_state import MODEL_STATES
from ..core.principal import BudgetPeriod, Priority, Role
from ..core.status import WorkerStatus
from ..openai import (
    ERROR,
    ERRORS,
    MESSAGE_ERROR_SCHEMA,
    MESSAGE_PREFIX,
    METADATA,
    describe_endpoints,
    error_responses,
)
from .story import StoryView
from .views import (
    AuditView,
    CallsView,
    CancelView,
    HealthView,
    IndexView,
    KeysView,
    KeyView,
    ModelStateView,
    ModelsView,
    NewKeyView,
    ReadyView,
    ReloadView,
    RevokedView,
    SessionView,
    StatusView,
    UsageView,
)

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
        "max_output_tokens": {"type": "integer"},
        "modalities": {
            "type": "object",
            "properties": {
                "input": {"type": "array", "items": {"type": "string"}},
                "output": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["input", "output"],
            "description": "What the model takes and what it gives, where that is known.",
        },
        "state": {
            "type": "string",
            "enum": list(MODEL_STATES),
            "description": "Whether a model that runs on demand is there; all others are ready.",
        },
        "trio_cluster_via": {
            "type": "array",
            "items": {"type": "string"},
            "description": "The ids of the clusters that the model comes through; the last one is this.",
        },
    },
    "required": ["id", "object", "created", "owned_by", "kind", "capabilities"],
}
_ONE_WORKER: Final = {
    "type": "object",
    "properties": {
        "worker": {
            "type": ["string", "null"],
            "description": "The worker where that is to be done; without it, the node chooses.",
        }
    },
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
_VIEWS: Final = (
    IndexView,
    HealthView,
    ModelsView,
    ReadyView,
    SessionView,
    StatusView,
    CallsView,
    CancelView,
    ReloadView,
    ModelStateView,
    StoryView,
    WorkerStatus,
    KeysView,
    KeyView,
    NewKeyView,
    RevokedView,
    UsageView,
    AuditView,
)
#: What is counted for each group of requests.
_COUNTS: Final = {"type": "object", "properties": {name: {"type": "integer"} for name in COUNTS}}

#: A time is given in one of these formats.
_TIMES: Final = [{"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}]

_COUNT: Final = {"type": ["integer", "null"], "minimum": 1, "maximum": 2**53 - 1}
_KEY_FIELDS: Final = {
    "models": {
        "type": ["array", "null"],
        "items": {"type": "string", "minLength": 1, "maxLength": 256, "pattern": "^[ -~]*$"},
        "maxItems": 100,
        "description": "Patterns of the names of the models that may be used; empty: all models.",
    },
    "role": {"type": "string", "enum": list(typing.get_args(Role))},
    "requests_per_minute": _COUNT,
    "tokens_per_minute": _COUNT,
    "max_concurrency": _COUNT,
    "budget": {
        "type": ["object", "null"],
        "properties": {
            "tokens": {"type": "integer", "minimum": 1, "maximum": 2**53 - 1},
            "per": {"type": "string", "enum": list(typing.get_args(BudgetPeriod))},
        },
        "required": ["tokens", "per"],
        "additionalProperties": False,
    },
    "priority": {"type": "string", "enum": list(typing.get_args(Priority))},
    "weight": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000},
    "expires_at": {
        "anyOf": [{"type": "null"}, {"type": "number", "minimum": 0, "maximum": 253402300799}, *_TIMES],
        "description": "A date or a time, or seconds since the epoch.",
    },
    "disabled": {"type": "boolean"},
}
_NEW_KEY: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}$"},
        **_KEY_FIELDS,
    },
    "required": ["name"],
    "additionalProperties": False,
}
_CHANGES: Final = {"type": "object", "properties": _KEY_FIELDS, "additionalProperties": False}
_GRACE: Final = {
    "type": "object",
    "properties": {
        "grace": {
            "type": ["number", "null"],
            "minimum": 0,
            "maximum": 366 * 86400,
            "description": "For how many seconds the old key is valid beside the new one; 0 by default.",
        }
    },
    "additionalProperties": False,
}

_ANY: Final[dict[str, Any]] = {}
_ITEM: Final = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "type": {"type": "string"}},
    "required": ["id", "type"],
}
_ITEMS: Final = {
    "type": "object",
    "properties": {
        "object": {"type": "string", "enum": ["list"]},
        "data": {"type": "array", "items": _ITEM},
        "first_id": {"type": ["string", "null"]},
        "last_id": {"type": ["string", "null"]},
        "has_more": {"type": "boolean"},
    },
    "required": ["object", "data", "first_id", "last_id", "has_more"],
}
_ADDED: Final = {"type": "array", "items": {"type": "object"}, "maxItems": 20}
_CHANGED_CONVERSATION: Final = {
    "type": "object",
    "properties": {"metadata": {"anyOf": [METADATA.schema(), {"type": "null"}]}},
}
_NEW_CONVERSATION: Final = {
    "type": "object",
    "properties": {
        "items": {"anyOf": [_ADDED, {"type": "null"}]},
        "metadata": {"anyOf": [METADATA.schema(), {"type": "null"}]},
    },
}
_NEW_ITEMS: Final = {"type": "object", "properties": {"items": _ADDED}, "required": ["items"]}

_REFERENCE: Final = "#/components/schemas/{name}"

#: Headers of errors by status, besides those that every answer has.
_HEADERS: Final = {
    401: ("www-authenticate",),
    405: ("allow",),
    429: ("retry-after",),
    501: ("x-should-retry",),
    503: ("retry-after", "x-should-retry"),
    529: ("retry-after", "x-should-retry"),
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
                "schemas": {"Error": ERROR, "MessagesError": MESSAGE_ERROR_SCHEMA, "Model": _MODEL}
                | _view_schemas(),
                "headers": _headers(),
                "responses": _error_responses("Error") | _error_responses("MessagesError", MESSAGE_PREFIX),
            },
        }
    )


def _node_paths() -> dict[str, Any]:
    model = _parameter("model", "The name of a model. It may contain slashes.")
    call = _parameter("request_id", "The `x-request-id` of the request.")
    worker = _parameter("name", "The name of a worker.")
    cancel = _operation("cancel", "Cancel all calls of a request", _view(CancelView), 400, 401, 403, 404, 413)
    cancel["requestBody"] = {"content": {"application/json": {"schema": _REASON}}}
    story = _operation("story", "Tell what has become of a request", _view(StoryView), 401, 403, 404)
    events = _operation("events", "Follow requests, workers and models", {"type": "string"}, 401, 403)
    events["responses"]["200"] = _answer({"type": "string"}, "text/event-stream")
    drain = _operation(
        "drain", "Drain a worker: it finishes its requests and stops", _view(WorkerStatus), 401, 403, 404
    )
    drain["responses"]["202"] = drain["responses"].pop("200")
    load = _operation(
        "load", "Start a model that runs on demand", _view(ModelStateView), 400, 401, 403, 404, 409, 413, 503
    )
    unload = _operation(
        "unload", "Stop a model that runs on demand", _view(ModelStateView), 400, 401, 403, 404, 409, 413, 503
    )
    load["requestBody"] = unload["requestBody"] = {"content": {"application/json": {"schema": _ONE_WORKER}}}
    health = _open("health", "Check whether the node accepts requests", _view(HealthView))
    health["responses"]["503"] = _answer(_view(HealthView), about="The node is shutting down.")
    ready = _open("ready", "Check whether a model can be asked now", _view(ReadyView))
    ready["parameters"] = [
        {
            "name": "model",
            "in": "query",
            "description": "The name of a model; without it, any model counts.",
            "schema": {"type": "string"},
        }
    ]
    ready["responses"]["503"] = _answer(
        _view(ReadyView), about="No model, or not this one, can be asked now."
    )
    metrics = _open("metrics", "Get metrics in the Prometheus text format", {"type": "string"})
    metrics["responses"]["200"] = _answer({"type": "string"}, "text/plain")
    model_ref = {"$ref": "#/components/schemas/Model"}
    models = {"allOf": [_view(ModelsView), {"properties": {"data": {"items": model_ref}}}]}
    list_models = _operation("models", "List all models", models, 400, 401)
    list_models["parameters"] = [
        _query(
            "kind",
            "Only models that answer the routes of this kind.",
            {"type": "string", "enum": list(KINDS)},
        )
    ]
    usage = {"allOf": [_view(UsageView), {"properties": {"data": {"items": _COUNTS}}}]}
    key = _parameter("name", "The name of a key.")
    create_key = _operation("create_key", "Make an API key", _view(NewKeyView), 400, 401, 403, 409, 413, 503)
    create_key["requestBody"] = {"required": True, "content": {"application/json": {"schema": _NEW_KEY}}}
    create_key["responses"]["201"] = create_key["responses"].pop("200")
    change_key = _operation(
        "change_key", "Change an API key", _view(KeyView), 400, 401, 403, 404, 409, 413, 503
    )
    change_key["requestBody"] = {"content": {"application/json": {"schema": _CHANGES}}}
    rotate_key = _operation(
        "rotate_key", "Replace an API key by a new one", _view(NewKeyView), 400, 401, 403, 404, 409, 413, 503
    )
    rotate_key["requestBody"] = {"content": {"application/json": {"schema": _GRACE}}}
    groups = "|".join(GROUPS)
    all_usage = _operation("usage", "Sum up the usage of all keys", usage, 400, 401, 403, 409, 503)
    own_usage = _operation("own_usage", "Sum up the usage of this key", usage, 400, 401, 409, 503)
    all_usage["parameters"] = own_usage["parameters"] = [
        _query("since", "Requests from this date or time on.", {"anyOf": _TIMES}),
        _query("until", "Requests before this date or time.", {"anyOf": _TIMES}),
        _query(
            "group_by",
            "What to group by, with commas between them.",
            {"type": "string", "pattern": f"^(({groups})(,({groups}))*)?$"},
        ),
    ]
    audit = _operation(
        "audit", "List what operators and admins have done", _view(AuditView), 400, 401, 403, 409, 503
    )
    audit["parameters"] = [
        _query(
            "limit",
            "Entries at most, from 1 to 10000; 100 by default.",
            {"type": "integer", "minimum": 1, "maximum": 10_000},
        )
    ]
    return {
        "/cluster/keys": {
            "get": _operation("keys", "List the API keys", _view(KeysView), 401, 403, 409, 503),
            "post": create_key,
        },
        "/cluster/keys/{name}": {
            "parameters": [key],
            "get": _operation("key", "Retrieve an API key", _view(KeyView), 401, 403, 404, 409, 503),
            "patch": change_key,
            "delete": _operation(
                "revoke_key", "Revoke an API key", _view(RevokedView), 401, 403, 404, 409, 503
            ),
        },
        "/cluster/keys/{name}/rotate": {"parameters": [key], "post": rotate_key},
        "/cluster/usage": {"get": all_usage},
        "/v1/usage": {"get": own_usage},
        "/cluster/audit": {"get": audit},
        **_stored_paths(),
        "/v1/models": {"get": list_models},
        "/v1/models/{model}": {
            "parameters": [model],
            "get": _operation("model", "Retrieve a model", model_ref, 401, 403, 404, 503),
        },
        "/": {"get": _open("index", "Get information about this server", _view(IndexView))},
        "/health": {"get": health},
        "/ready": {"get": ready},
        "/metrics": {"get": metrics},
        "/openapi.json": {"get": _open("openapi", "Get this OpenAPI description", {"type": "object"})},
        "/ui/session": {"get": _operation("session", "Get who the key belongs to", _view(SessionView), 401)},
        "/cluster/status": {"get": _operation("status", "Get the state of the node", _view(StatusView), 401)},
        "/cluster/calls": {
            "get": _operation("calls", "List the calls in progress", _view(CallsView), 401, 403)
        },
        "/cluster/calls/{request_id}/cancel": {"parameters": [call], "post": cancel},
        "/cluster/reload": {
            "post": _operation(
                "reload", "Read the configuration file again", _view(ReloadView), 401, 403, 409
            )
        },
        "/cluster/events": {"get": events},
        "/cluster/requests/{request_id}": {"parameters": [call], "get": story},
        "/cluster/workers/{name}/drain": {"parameters": [worker], "post": drain},
        "/cluster/models/{model}/load": {"parameters": [model], "post": load},
        "/cluster/models/{model}/unload": {"parameters": [model], "post": unload},
    }


def _stored_paths() -> dict[str, Any]:
    response = _parameter("response_id", "The `id` of a response.")
    conversation = _parameter("conversation_id", "The `id` of a conversation.")
    item = _parameter("item_id", "The `id` of an item.")
    listed = [
        _query(
            "limit",
            "Items at most, from 1 to 100; 20 by default.",
            {"type": "integer", "minimum": 1, "maximum": 100},
        ),
        _query("order", "`desc` by default: newest first.", {"type": "string", "enum": ["asc", "desc"]}),
        _query("after", "The `id` of the item after which the list begins.", {"type": "string"}),
    ]
    errors = (400, 401, 404, 503)
    list_input = _operation("input_items", "List the input of a stored response", _ITEMS, *errors)
    list_items = _operation("conversation_items", "List the items of a conversation", _ITEMS, *errors)
    list_input["parameters"] = list_items["parameters"] = listed
    retrieve = _operation("response", "Retrieve a stored response", _object("response"), *errors)
    retrieve["parameters"] = [_query("stream", "Must be false.", {"type": "boolean", "enum": [False]})]
    cancel = _operation("cancel_response", "Refused: no response outlives its request", _ANY, *errors)
    del cancel["responses"]["200"]
    of_conversation = _object("conversation")
    create = _operation("create_conversation", "Make a conversation", of_conversation, 400, 401, 413, 503)
    create["requestBody"] = {"content": {"application/json": {"schema": _NEW_CONVERSATION}}}
    change = _operation(
        "change_conversation", "Change the metadata of a conversation", of_conversation, *errors, 413
    )
    change["requestBody"] = {"content": {"application/json": {"schema": _CHANGED_CONVERSATION}}}
    add = _operation("add_conversation_items", "Add items to a conversation", _ITEMS, *errors, 413)
    add["requestBody"] = {"required": True, "content": {"application/json": {"schema": _NEW_ITEMS}}}
    return {
        "/v1/responses/{response_id}": {
            "parameters": [response],
            "get": retrieve,
            "delete": _operation(
                "delete_response", "Delete a stored response", _object("response", deleted=True), *errors
            ),
        },
        "/v1/responses/{response_id}/input_items": {"parameters": [response], "get": list_input},
        "/v1/responses/{response_id}/cancel": {"parameters": [response], "post": cancel},
        "/v1/conversations": {"post": create},
        "/v1/conversations/{conversation_id}": {
            "parameters": [conversation],
            "get": _operation("conversation", "Retrieve a conversation", of_conversation, *errors),
            "post": change,
            "delete": _operation(
                "delete_conversation",
                "Delete a conversation",
                _object("conversation.deleted", deleted=True),
                *errors,
            ),
        },
        "/v1/conversations/{conversation_id}/items": {
            "parameters": [conversation],
            "get": list_items,
            "post": add,
        },
        "/v1/conversations/{conversation_id}/items/{item_id}": {
            "parameters": [conversation, item],
            "get": _operation("conversation_item", "Retrieve an item of a conversation", _ITEM, *errors),
            "delete": _operation(
                "delete_conversation_item", "Delete an item of a conversation", of_conversation, *errors
            ),
        },
    }


def _object(name: str, *, deleted: bool = False) -> dict[str, Any]:
    """Return the schema of an object of the OpenAI API, of which only the kind is described."""
    properties = {"id": {"type": "string"}, "object": {"type": "string", "enum": [name]}}
    if deleted:
        properties["deleted"] = {"type": "boolean"}
    return {"type": "object", "properties": properties, "required": list(properties)}


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


def _query(name: str, about: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": about, "schema": schema}


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


def _error_responses(schema: str, prefix: str = "") -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}

    def response(about: str, *headers: str) -> dict[str, Any]:
        return {
            "description": about,
            "headers": _refer(["x-request-id", *headers]),
            "content": content,
        }

    named = {
        f"{prefix}{status}": response(about, *_HEADERS.get(status, ())) for status, about in ERRORS.items()
    }
    return named | {f"{prefix}error": response("Any other error, for instance one that a handler raises.")}
