"""The routes of the admin application that read the state of the node, and the list of models.

The routes that models answer come from the table of endpoints, and the gateway answers them; a new endpoint needs no
change here. A view returns a :class:`~trio_cluster.gateway.response.Reply`, made from one of the types in ``views.py``.
"""

from __future__ import annotations

from typing import Final

from quart import request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from ..core.model import KINDS
from ..errors import HandlerFailed, InvalidRequest
from ..gateway.auth import hide_models, may_use, require_model
from ..gateway.context import request_context
from ..gateway.node_context import NodeContext
from ..gateway.response import JSON, Reply, json_reply
from ..gateway.routes import MODEL_ROUTES, PREFIXES
from ..group.front import HIDDEN, SIBLING_KEY
from ..openai import ENDPOINTS
from .description import description
from .metrics import accepts_openmetrics, metrics_reply
from .request_metrics import KEY_PREFIX
from .views import HealthView, IndexView, ModelsView, ReadyView, status_view
from .web import respond

__all__ = ["add_routes"]

#: The kinds that come first in the list of models, in this order. A passthrough model is most likely a chat model.
_FIRST: Final = ("chat", "any")


def add_routes(app: QuartTrio, node_context: NodeContext) -> None:
    """Add the routes to an application."""
    _add_model_routes(app)
    _add_models(app, node_context)
    _add_node(app, node_context)


def _add_model_routes(app: QuartTrio) -> None:
    """Add the routes that the gateway answers, so that the framework can tell a wrong method from an unknown path."""

    async def answered_by_the_gateway() -> TrioResponse:
        raise HandlerFailed

    for path in MODEL_ROUTES:
        app.add_url_rule(path, f"POST {path}", answered_by_the_gateway, methods=["POST"])


def _add_models(app: QuartTrio, node_context: NodeContext) -> None:
    async def list_models() -> TrioResponse:
        catalog = node_context.router.catalog
        principal = request_context(request.scope).principal
        names = [name for name in catalog.listed_names() if may_use(principal, name)]
        infos = [info for info in map(catalog.listed, names) if info is not None]
        if (kind := request.args.get("kind")) is not None:
            if kind not in KINDS:
                raise InvalidRequest(
                    f"kind: expected one of {', '.join(KINDS)}; got {kind[:64]!r}",
                    param="kind",
                    code="invalid_value",
                )
            infos = [info for info in infos if info.is_listed_as(kind)]
        # Some clients take the first model for a chat. Models of the same rank stay sorted by name.
        infos.sort(key=lambda info: _FIRST.index(info.kind) if info.kind in _FIRST else len(_FIRST))
        entries = [catalog.entry(info) for info in infos]
        return respond(json_reply(ModelsView("list", entries)))

    async def retrieve_model(name: str) -> TrioResponse:
        principal = request_context(request.scope).principal
        require_model(principal, name)
        info = node_context.router.catalog.listed(name)
        if info is None:
            raise hide_models(principal, node_context.router.catalog.why_missing(name))
        return respond(json_reply(node_context.router.catalog.entry(info)))

    for prefix in PREFIXES:
        app.add_url_rule(f"{prefix}/models", f"{prefix}models", list_models, methods=["GET"])
        app.add_url_rule(f"{prefix}/models/<path:name>", f"{prefix}model", retrieve_model, methods=["GET"])


def _add_node(app: QuartTrio, node_context: NodeContext) -> None:
    async def index() -> TrioResponse:
        # A person who types the address into a browser is led to the page; relative, as in pages.py.
        if "text/html" in request.headers.get("accept", ""):
            return respond(Reply(302, [("location", "ui/"), ("vary", "accept")], b""))
        return respond(
            json_reply(
                IndexView(
                    name="trio_cluster",
                    about="an OpenAI-compatible API",
                    routes=["/v1/models", *(f"/v1{endpoint.path}" for endpoint in ENDPOINTS.values())],
                    page="/ui/",
                    description="/openapi.json",
                    health="/health",
                    ready="/ready",
                    metrics="/metrics",
                    status="/cluster/status",
                )
            )
        )

    async def described() -> TrioResponse:
        return respond(Reply(200, [JSON], description(node_context.requires_key)))

    async def health() -> TrioResponse:
        # 503 while the node drains, so that load balancers stop using it.
        draining = node_context.router.draining_reason is not None
        state = HealthView("draining" if draining else "ok", node_context.mode)
        return respond(json_reply(state, 503 if draining else 200))

    async def ready() -> TrioResponse:
        router, name = node_context.router, request.args.get("model")
        if router.draining_reason is not None:
            return respond(json_reply(ReadyView("draining", name), 503))
        # A model that a worker serves can be asked while the master itself is still starting.
        if node_context.starting and (name is None or not router.catalog.ready(name)):
            return respond(json_reply(ReadyView("starting", name), 503))
        if not router.catalog.ready(name):
            return respond(json_reply(ReadyView("no_model", name), 503))
        return respond(json_reply(ReadyView("ready", name)))

    async def metrics() -> TrioResponse:
        accept, principal = request.headers.get("accept", ""), request_context(request.scope).principal
        has_keys = node_context.requires_key or node_context.authenticator is not None
        to_operator = principal.role != "inference" or not has_keys
        is_sibling = SIBLING_KEY in request.scope
        reply = await metrics_reply(
            node_context, openmetrics=accepts_openmetrics(accept), to_operator=to_operator or is_sibling
        )
        if is_sibling and not to_operator:
            # The process that is asked leaves them out when it has added up those of all.
            reply.headers.append((HIDDEN, KEY_PREFIX))
        return respond(reply)

    async def status() -> TrioResponse:
        principal = request_context(request.scope).principal
        return respond(json_reply(status_view(node_context, principal)))

    app.add_url_rule("/", "index", index, methods=["GET"])
    app.add_url_rule("/openapi.json", "openapi", described, methods=["GET"])
    app.add_url_rule("/health", "health", health, methods=["GET"])
    app.add_url_rule("/ready", "ready", ready, methods=["GET"])
    app.add_url_rule("/metrics", "metrics", metrics, methods=["GET"])
    app.add_url_rule("/cluster/status", "status", status, methods=["GET"])
