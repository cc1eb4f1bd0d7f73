"""The types of the admin application's answers. The JSON is encoded from them, and ``/openapi.json`` describes them."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import attrs
from msgspec import UNSET, UnsetType

from ..core import clock
from ..core.call import Call, Phase
from ..core.model_state import ShownState
from ..core.principal import BudgetPeriod, Principal, Priority, Role
from ..core.status import (
    EjectedReplica,
    MasterStatus,
    OnDemandStatus,
    ProcessStatus,
    SlotStatus,
    WorkerStatus,
)
from ..gateway.auth import may_use
from ..gateway.node_context import NodeContext
from ..options import OptionChange, Reloaded

T = TypeVar("T")

__all__ = [
    "AuditEntryView",
    "AuditView",
    "CallCounters",
    "CallView",
    "CallsView",
    "CancelView",
    "HealthView",
    "IndexView",
    "KeyView",
    "KeysView",
    "ModelStateView",
    "ModelsView",
    "NewKeyView",
    "ReadyView",
    "ReloadView",
    "RevokedView",
    "SessionView",
    "StatusView",
    "UsageView",
    "call_view",
    "reload_view",
    "status_view",
]


@attrs.frozen
class IndexView:
    """What this server is, and its routes."""

    name: str
    about: str
    routes: list[str]
    page: str
    description: str
    health: str
    ready: str
    metrics: str
    status: str


@attrs.frozen
class HealthView:
    """Whether the node accepts requests."""

    status: Literal["ok", "draining"]
    mode: str


@attrs.frozen
class ReadyView:
    """Whether there is a node that could answer a request now, for any model or for the one that was named."""

    status: Literal["ready", "no_model", "starting", "draining"]
    model: str | None


@attrs.frozen
class SessionView:
    """Who the sender of a request is, and what the node is: what the page for people begins with."""

    name: str
    """The name of the key; empty if it was sent without one."""
    role: Role
    requires_key: bool
    """Whether requests for models need a key."""
    mode: str
    node_id: str
    version: str


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
    ejected: list[EjectedReplica] = attrs.field(factory=list)
    """The replicas that are left alone for a while, since they keep failing."""
    masters: list[MasterStatus] | UnsetType = UNSET
    connected: bool | UnsetType = UNSET
    rejected_models: dict[str, str] | UnsetType = UNSET
    processes: list[ProcessStatus] | UnsetType = UNSET
    """The processes that the master is, if there are several. What else is shown is that of all of them."""
    on_demand: OnDemandStatus | UnsetType = UNSET


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
    alias: str | UnsetType = UNSET
    """The name that the client asked for, if that is an alias of the model."""


@attrs.frozen
class CallsView:
    """The calls whose work has not stopped yet, oldest first."""

    calls: list[CallView]


@attrs.frozen
class OptionChangeView:
    """An option of which the configuration has another value now, without the values of keys and tokens."""

    option: str
    """Its name as in the file, such as ``server.keepalive``."""
    before: Any | UnsetType = UNSET
    after: Any | UnsetType = UNSET


@attrs.frozen
class ReloadView:
    """What has come of reading the configuration again."""

    file: str
    applied: list[OptionChangeView]
    """What has changed since it was read last, and applies from now on."""
    needs_restart: list[OptionChangeView]
    """What is different from the start of the process, and applies when it is started again."""
    certificates: bool
    """Whether the files of the certificate had changed, and were read again."""


@attrs.frozen
class ModelStateView:
    """A model that was loaded or unloaded."""

    model: str
    state: ShownState
    nodes: list[str]
    """Where it was loaded, or unloaded: the names of workers, or ``local``."""


@attrs.frozen
class CancelView:
    """The result of cancelling a request."""

    request_id: str
    cancelled: int
    """How many calls were cancelled, without those that had ended already."""


@attrs.frozen
class BudgetView:
    """How many tokens may be used in each calendar period (UTC)."""

    tokens: int
    per: BudgetPeriod


@attrs.frozen(kw_only=True)
class KeyView:
    """An API key, without the key itself. ``null`` stands for no limit."""

    name: str
    models: list[str]
    """Patterns of the names of the models that may be used; empty: all models."""
    role: Role
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrency: int | None
    budget: BudgetView | None
    priority: Priority
    weight: float
    expires_at: str | None
    """In the format of ISO 8601."""
    disabled: bool
    created_at: str
    """In the format of ISO 8601."""


@attrs.frozen(kw_only=True)
class NewKeyView(KeyView):
    """An API key that was just made, with the key itself, which is kept nowhere."""

    key: str = attrs.field(repr=False)


@attrs.frozen
class KeysView:
    """All API keys, sorted by name."""

    object: Literal["list"]
    data: list[KeyView]


@attrs.frozen
class RevokedView:
    """An API key was revoked."""

    name: str
    revoked: Literal[True]


@attrs.frozen
class UsageView:
    """The usage of each group: what it is grouped by, and counts."""

    object: Literal["list"]
    data: list[dict[str, Any]]


@attrs.frozen(kw_only=True)
class AuditEntryView:
    """One action of an operator or an admin."""

    time: str
    """In the format of ISO 8601."""
    principal: str
    """The name of the key; empty for a client on the same machine that needed none."""
    address: str
    action: str
    target: str
    details: dict[str, Any]


@attrs.frozen
class AuditView:
    """The last actions of operators and admins, newest first."""

    object: Literal["list"]
    data: list[AuditEntryView]


def _own_only(waiting_by: dict[str, int], principal: Principal) -> dict[str, int]:
    return {name: count for name, count in waiting_by.items() if name == principal.name}


def status_view(node_context: NodeContext, principal: Principal) -> StatusView:
    """Return the state of a node as it is now, without what is not for a principal.

    That is models that it may not use, and unless it is an operator, the names of others that wait.
    """
    router, own = node_context.router, node_context.status()
    catalog = router.catalog
    infos, workers, slots = catalog.infos(), own.workers, own.slots
    ejected, on_demand = router.ejections.status(), own.on_demand
    if principal.role == "inference":
        slots = attrs.evolve(slots, waiting_by=_own_only(slots.waiting_by, principal))
        workers = [
            attrs.evolve(each, waiting_by=_own_only(each.waiting_by, principal)) if each.waiting_by else each
            for each in workers
        ]
    if principal.models:
        infos = [info for info in infos if may_use(principal, info.name)]
        workers = [
            attrs.evolve(
                worker,
                models=[name for name in worker.models if may_use(principal, name)],
                model_states=_usable(worker.model_states, principal),
            )
            for worker in workers
        ]
        if on_demand is not UNSET:
            on_demand = attrs.evolve(on_demand, models=_usable(on_demand.models, principal))
        ejected = [each for each in ejected if may_use(principal, each.model)]
    if ejected:
        by_node: dict[str, dict[str, str]] = {}
        for each in ejected:
            by_node.setdefault(each.node, {})[each.model] = each.reason
        workers = [attrs.evolve(worker, ejected=by_node.get(worker.id, {})) for worker in workers]
    return StatusView(
        node_id=node_context.node_id,
        mode=node_context.mode,
        uptime=round(node_context.uptime, 3),
        draining=router.draining_reason is not None,
        models=[catalog.entry(info) | {"nodes": catalog.served_by(info.name)} for info in infos],
        calls=CallCounters(**router.stats.counters(), in_flight=len(router.live)),
        version=own.version,
        slots=slots,
        workers=workers,
        ejected=ejected,
        masters=own.masters,
        connected=own.connected,
        rejected_models=own.rejected_models,
        on_demand=on_demand,
    )


def _usable(by_model: dict[str, T], principal: Principal) -> dict[str, T]:
    return {name: value for name, value in by_model.items() if may_use(principal, name)}


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
        age=round(clock.now() - call.opened_at, 3),
        produced=call.produced,
        delivered=call.body.delivered,
        client=request.client or None,
        alias=request.alias or UNSET,
    )


def reload_view(reloaded: Reloaded) -> ReloadView:
    """Return what an operator is shown of a configuration that was read again."""
    return ReloadView(
        file=reloaded.source,
        applied=[_option_change_view(change) for change in reloaded.applied],
        needs_restart=[_option_change_view(change) for change in reloaded.needs_restart],
        certificates=reloaded.certificates,
    )


def _option_change_view(change: OptionChange) -> OptionChangeView:
    if change.is_secret:
        return OptionChangeView(change.option)
    return OptionChangeView(change.option, _json_value(change.before), _json_value(change.after))


def _json_value(value: object) -> object:
    # JSON has no infinity.
    return str(value) if value in (math.inf, -math.inf) else value
