"""The routes of the OpenAI API and of the node itself, as views of a Quart-trio application.

The routes for models come from the table of endpoints; a new endpoint needs nothing here. What a view returns
is a :class:`~trio_cluster.http._reply.Reply`, and :func:`respond` turns that into a response of the
framework. A body that is still coming becomes a response body *object*: an async generator that is never
started never ends either.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType

import attrs
import trio
from quart import request
from quart.wrappers.response import ResponseBody
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from .._errors import ModelNotFound
from ..openai import ENDPOINTS, Endpoint
from ._exchange import exchange_of
from ._metrics import metrics_reply, open_collectors
from ._relay import relay
from ._reply import Body, Reply, json_reply
from ._site import Site

__all__ = ["add_routes", "respond"]

#: Every route of the OpenAI API is served under each of these.
_PREFIXES = ("/v1", "")


def add_routes(app: QuartTrio, site: Site) -> None:
    """Add all routes to ``app``."""
    for endpoint in ENDPOINTS.values():
        _add_endpoint(app, site, endpoint)
    _add_models(app, site)
    _add_node(app, site)


def respond(reply: Reply) -> TrioResponse:
    """Return ``reply`` as a response of the framework."""
    body = reply.body
    response = TrioResponse(body if isinstance(body, bytes) else _ComingBody(body), reply.status)
    # Not passed to the constructor, which would add a charset of its own.
    del response.headers["content-type"]
    for name, value in reply.headers:
        response.headers.add(name, value)
    return response


class _ComingBody(ResponseBody):
    """A body that is still coming, as the framework wants it. What it comes from is held by the exchange."""

    def __init__(self, body: Body) -> None:
        self._body = body

    async def __aenter__(self) -> AsyncIterator[bytes]:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException], exc_value: BaseException, tb: TracebackType
    ) -> None:
        pass

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._body.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


def _add_endpoint(app: QuartTrio, site: Site, endpoint: Endpoint) -> None:
    async def view() -> TrioResponse:
        return respond(await relay(site, endpoint, exchange_of(request.scope)))

    for prefix in _PREFIXES:
        app.add_url_rule(prefix + endpoint.path, f"{prefix}{endpoint.name}", view, methods=["POST"])


def _add_models(app: QuartTrio, site: Site) -> None:
    async def list_models() -> TrioResponse:
        entries = [info.entry() for info in site.registry.infos()]
        return respond(json_reply({"object": "list", "data": entries}))

    async def retrieve_model(name: str) -> TrioResponse:
        info = site.registry.info(name)
        if info is None:
            raise ModelNotFound(name, site.registry.names())
        return respond(json_reply(info.entry()))

    for prefix in _PREFIXES:
        app.add_url_rule(f"{prefix}/models", f"{prefix}models", list_models, methods=["GET"])
        app.add_url_rule(f"{prefix}/models/<path:name>", f"{prefix}model", retrieve_model, methods=["GET"])


def _add_node(app: QuartTrio, site: Site) -> None:
    collectors = open_collectors(site)

    async def index() -> TrioResponse:
        return respond(
            json_reply(
                {
                    "name": "trio_cluster",
                    "about": "an OpenAI-compatible API",
                    "routes": ["/v1/models", *(f"/v1{endpoint.path}" for endpoint in ENDPOINTS.values())],
                    "health": "/health",
                    "metrics": "/metrics",
                    "status": "/cluster/status",
                }
            )
        )

    async def health() -> TrioResponse:
        # Who balances load over several nodes must see a node that drains as one not to be used.
        draining = site.registry.closed_to is not None
        state = {"status": "draining" if draining else "ok", "mode": site.mode}
        return respond(json_reply(state, 503 if draining else 200))

    async def metrics() -> TrioResponse:
        return respond(metrics_reply(collectors))

    async def status() -> TrioResponse:
        registry = site.registry
        models = [info.entry() | {"nodes": registry.served_by(info.name)} for info in registry.infos()]
        return respond(
            json_reply(
                {
                    "node_id": site.node_id,
                    "mode": site.mode,
                    "uptime": round(site.uptime, 3),
                    "draining": registry.closed_to is not None,
                    "models": models,
                    "calls": attrs.asdict(registry.books) | {"in_flight": len(registry.live)},
                }
                | dict(site.status())
            )
        )

    app.add_url_rule("/", "index", index, methods=["GET"])
    app.add_url_rule("/health", "health", health, methods=["GET"])
    app.add_url_rule("/metrics", "metrics", metrics, methods=["GET"])
    app.add_url_rule("/cluster/status", "status", status, methods=["GET"])
