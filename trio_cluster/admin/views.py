"""The types of the admin application's answers. The JSON is encoded from them, and ``/openapi.json`` describes them."""

from __future__ import annotations

import time
from typing import Any, Literal

import attrs
from msgspec import UNSET, UnsetType

from ..core.call import Call, Phase
from ..core.status import SlotStatus, WorkerStatus
from ..gateway.node_context import NodeContext

__all__ = [
    "CallCounters",
    "CallView",
    "CallsView",
    "CancelView",
    "HealthView",
    "IndexView",
    "ModelsView",
    "StatusView",
    "call_view",
    "status_view",
]


@attrs.frozen
class IndexView:
    """What this server is, and its routes."""

    name: str
    about: str
    routes: list[str]
    description: str
    health: str
    metrics: str
    status: str


@attrs.frozen
class HealthView:
    """Whether the node accepts requests."""

    status: Literal["ok", "draining"]
    mode: str


@attrs.frozen
class ModelsView:
    """The models that are available on this node, as objects of the OpenAI API."""

    object: Literal["list"]
    data: list[dict[str, Any]]


@attrs.frozen
class CallCounters:
    """The number of calls since the node started, by outcome.

    ``admitted`` is always the sum of ``completed``, ``cancelled``, ``timed_out``, ``worker_lost``, ``failed`` and
    ``in_flight``.
    """

    admitted: int
    completed: int
    cancelled: int
    timed_out: int
    worker_lost: int
    failed: int
    retried: int
    in_flight: int


@attrs.frozen
class StatusView:
    """The state of a node."""

    node_id: str
    mode: str
    uptime: float
    """Seconds since the node started."""
    draining: bool
    """Whether new calls are refused, because the node is about to stop."""
    models: list[dict[str, Any]]
    """The entries of ``/v1/models``, each with ``nodes``: the names of the nodes that serve the model."""
    calls: CallCounters
    version: str
    slots: SlotStatus
    workers: list[WorkerStatus]
    connected: bool | UnsetType = UNSET
    rejected_models: dict[str, str] | UnsetType = UNSET


@attrs.frozen
class CallView:
    """A call whose work has not stopped yet."""

    request_id: str
    model: str
    kind: str
    endpoint: str
    node: str
    """The node that does the work: the name of a worker, or ``local``."""
    phase: Phase
    age: float
    """Seconds since the call was opened."""
    produced: int
    """Bytes of the answer that were produced, as far as this node knows."""
    delivered: int
    """Bytes of the answer that the client has taken."""
    client: str | None
    """The address from which the request came."""


@attrs.frozen
class CallsView:
    """The calls whose work has not stopped yet, oldest first."""

    calls: list[CallView]


@attrs.frozen
class CancelView:
    """The result of cancelling a request."""

    request_id: str
    cancelled: int
    """How many calls were cancelled, without those that had ended already."""


def status_view(node_context: NodeContext) -> StatusView:
    """Return the state of a node as it is now."""
    router, own = node_context.router, node_context.status()
    catalog = router.catalog
    return StatusView(
        node_id=node_context.node_id,
        mode=node_context.mode,
        uptime=round(node_context.uptime, 3),
        draining=router.draining_reason is not None,
        models=[info.entry() | {"nodes": catalog.served_by(info.name)} for info in catalog.infos()],
        calls=CallCounters(**router.stats.counters(), in_flight=len(router.live)),
        version=own.version,
        slots=own.slots,
        workers=own.workers,
        connected=own.connected,
        rejected_models=own.rejected_models,
    )


def call_view(call: Call) -> CallView:
    """Return the state of a call as it is now."""
    request = call.request
    return CallView(
        request_id=request.request_id,
        model=request.model,
        kind=request.kind,
        endpoint=request.endpoint,
        node=call.served_by,
        phase=call.phase,
        age=round(time.monotonic() - call.opened_at, 3),
        produced=call.produced,
        delivered=call.body.delivered,
        client=request.client or None,
    )
