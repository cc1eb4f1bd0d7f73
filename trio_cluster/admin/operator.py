"""The routes for operators: list all calls, cancel those of a request, tell its story, drain a worker, load and unload
a model, reload the configuration.

These routes need a principal that is an operator. The gateway checks that before they are reached; see
``gateway/auth.py``. Those that change something refuse other web pages than the node's own; see
``gateway/origin.py``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import trio
from quart import request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from ..core.aliases import reachable
from ..core.answer import Done, Failed
from ..core.model_state import CONTROL, LOAD, UNLOAD, ModelState, ShownState
from ..core.request import Request
from ..errors import ApiError, ClusterError, InvalidRequest, ModelNotOnDemand, ModelUnavailable
from ..gateway.context import request_context
from ..gateway.node_context import NodeContext
from ..gateway.origin import refuse_foreign_pages
from ..gateway.response import json_reply
from ..openai import NO_PROXY_BUFFERING
from ..routing.backend import Backend
from .body import json_object
from .events import CLOCK_HEADER, Sampler, event_stream
from .story import story_view
from .views import CallsView, CancelView, ModelStateView, call_view, reload_view
from .web import respond, stream

__all__ = ["add_operator_routes"]

#: The maximum number of characters of the reason for a cancellation, which people read in an error or in a log.
_REASON_MAX: Final = 500
_NO_REASON: Final = "requested by an operator"


def add_operator_routes(app: QuartTrio, node_context: NodeContext) -> None:
    """Add the routes under ``/cluster`` that are for operators to an application."""
    router = node_context.router

    async def calls() -> TrioResponse:
        return respond(json_reply(CallsView([call_view(call) for call in router.live])))

    async def cancel(request_id: str) -> TrioResponse:
        context = request_context(request.scope)
        refuse_foreign_pages(context)
        reason = _reason((await json_object()).get("reason"))
        found = router.calls_of(request_id)
        if not found:
            raise ApiError(404, f"No call of a request '{request_id}' is in progress", code="call_not_found")
        wanted = [call for call in found if not call.ended]
        for call in wanted:
            call.cancel(reason, final=True, operator=context.principal.name or context.client or "local")
        node_context.audit.record(
            context.principal, context.client, "request.cancel", request_id, reason=reason, calls=len(wanted)
        )
        return respond(json_reply(CancelView(request_id, len(wanted))))

    async def story(request_id: str) -> TrioResponse:
        found = node_context.stories.find(request_id)
        if not found:
            hint = "" if node_context.options.stories else "; stories are switched off (option 'stories')"
            text = f"No request '{request_id}' is known here{hint}"
            raise ApiError(404, text, code="request_not_found")
        return respond(json_reply(story_view(found[-1], len(found) - 1)))

    sampler = Sampler(node_context)

    async def events() -> TrioResponse:
        # Items have times of this machine's clock, and the client may have another one.
        headers = [("content-type", "text/event-stream"), (CLOCK_HEADER, f"{time.time():.3f}")]
        return stream(event_stream(sampler), [*headers, *NO_PROXY_BUFFERING])

    async def drain(name: str) -> TrioResponse:
        context = request_context(request.scope)
        refuse_foreign_pages(context)
        worker = node_context.drain_worker(name)
        if worker is None:
            raise ApiError(404, f"No worker '{name}' is connected", code="worker_not_found")
        node_context.audit.record(context.principal, context.client, "worker.drain", name)
        return respond(json_reply(worker, 202))

    async def reload() -> TrioResponse:
        context = request_context(request.scope)
        refuse_foreign_pages(context)
        if node_context.reload is None:
            raise ApiError(
                409,
                "This node has no configuration file to read; start it with --config FILE",
                code="no_configuration_file",
            )
        try:
            reloaded = await node_context.reload()
        except ClusterError as error:
            raise ApiError(409, f"Nothing has changed: {error}", code="invalid_configuration") from error
        node_context.audit.record(
            context.principal,
            context.client,
            "configuration.reload",
            reloaded.source,
            applied=[change.option for change in reloaded.applied],
        )
        return respond(json_reply(reload_view(reloaded)))

    async def load(name: str) -> TrioResponse:
        context = request_context(request.scope)
        refuse_foreign_pages(context)
        replicas = _replicas(name, (await json_object()).get("worker"))
        replica = _first_ready(replicas, name)
        node_context.audit.record(context.principal, context.client, "model.load", name, node=replica.name)
        try:
            state = await _control(LOAD, name, replica)
        except ModelUnavailable:
            others = [each for each in router.catalog.replicas(name) if each.health.available]
            if replica in others or not others:
                raise
            # It stood in for a worker whose machine is awake now, and which may have to start the model.
            replica = _first_ready(others, name)
            state = "ready"
            if name in replica.health.model_states:
                state = await _control(LOAD, name, replica)
        return respond(json_reply(ModelStateView(name, state, [replica.name])))

    async def unload(name: str) -> TrioResponse:
        context = request_context(request.scope)
        refuse_foreign_pages(context)
        replicas = _replicas(name, (await json_object()).get("worker"))
        nodes = [replica.name for replica in replicas if _state(replica, name).state != "cold"]
        node_context.audit.record(context.principal, context.client, "model.unload", name, nodes=nodes)
        failure: ApiError | None = None

        async def unload_from(replica: Backend) -> None:
            nonlocal failure
            try:
                await _control(UNLOAD, name, replica)
            except ApiError as error:
                failure = error

        async with trio.open_nursery() as nursery:
            for replica in replicas:
                nursery.start_soon(unload_from, replica)
        if failure is not None:
            raise failure
        return respond(json_reply(ModelStateView(name, router.catalog.state(name), nodes)))

    def _replicas(name: str, worker: object) -> list[Backend]:
        """Return the replicas that run a model on demand, of one node or of all.

        Raises:
            ApiError: there are none.
        """
        replicas = [each for each in router.catalog.replicas(name) if each.health.available]
        if not replicas:
            aliases = router.catalog.aliases.table
            if name in aliases:
                models = ", ".join(reachable(aliases, name))
                text = f"'{name}' is an alias; name a model that it stands for: {models}"
                raise ApiError(409, text, code="not_on_demand")
            raise router.catalog.why_missing(name)
        if worker is not None:
            replicas = [each for each in replicas if each.name == worker]
            if not replicas:
                raise ApiError(404, f"No worker of this name serves '{name}'", code="worker_not_found")
        replicas = [each for each in replicas if name in each.health.model_states]
        if not replicas:
            raise ModelNotOnDemand(name)
        return replicas

    async def _control(endpoint: str, name: str, replica: Backend) -> ShownState:
        """Load or unload a model on one replica, and return its state then."""
        call = node_context.open_control(
            replica,
            Request(
                endpoint,
                CONTROL,  # type: ignore[arg-type]  # no model is of this kind
                name,
                b"",
                request_id=request_context(request.scope).request_id,
            ),
        )
        try:
            while True:
                event = await call.receive()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Done):
                    return _state(replica, name).state
        finally:
            call.cancel("the operator has left")

    add = app.add_url_rule
    add("/cluster/reload", "reload", reload, methods=["POST"])
    add("/cluster/calls", "calls", calls, methods=["GET"])
    add("/cluster/calls/<anything:request_id>/cancel", "cancel", cancel, methods=["POST"])
    add("/cluster/events", "events", events, methods=["GET"])
    add("/cluster/requests/<anything:request_id>", "story", story, methods=["GET"])
    add("/cluster/workers/<anything:name>/drain", "drain", drain, methods=["POST"])
    add("/cluster/models/<anything:name>/load", "load", load, methods=["POST"])
    add("/cluster/models/<anything:name>/unload", "unload", unload, methods=["POST"])


def _first_ready(replicas: Sequence[Backend], model: str) -> Backend:
    """Return the replica that can answer first: if one is ready, nothing is to be done to load the model."""
    now = trio.current_time()
    return min(replicas, key=lambda each: _state(each, model).ready_in(now))


def _state(replica: Backend, model: str) -> ModelState:
    return replica.health.model_states.get(model, ModelState("ready"))


def _reason(reason: object) -> str:
    """Return the reason that a request gives, or the default one.

    Raises:
        InvalidRequest: it is not valid.
    """
    if reason is None:
        return _NO_REASON
    if not isinstance(reason, str) or not 0 < len(reason) <= _REASON_MAX or not reason.isprintable():
        raise InvalidRequest(
            f"reason: expected one line of 1 to {_REASON_MAX} characters",
            param="reason",
            code="invalid_value",
        )
    return reason
