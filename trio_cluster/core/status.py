"""The state of a node, for people and dashboards: typed values, which the admin API encodes as JSON objects.

A field whose value is ``UNSET`` is left out of the JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import nsmallest
from typing import Final, Literal, TypeAlias

import attrs
from msgspec import UNSET, UnsetType

from .model_state import ShownState

__all__ = [
    "WORKER_STATES",
    "Admission",
    "EjectedReplica",
    "MasterStatus",
    "NodeStatus",
    "OnDemandStatus",
    "ProcessState",
    "ProcessStatus",
    "ResidentStatus",
    "SleepingStatus",
    "SlotStatus",
    "WorkerState",
    "WorkerStatus",
    "most_waiting",
]

#: Principals that are listed.
_MOST_PRINCIPALS: Final = 20

#: The state of a worker. ``ok``; ``busy``: all slots are taken; ``stalled``: it is connected, and cannot do anything;
#: ``draining``: it takes no new calls, and stops when it has finished those that it has; ``suspended``: its link was
#: cut, and may be resumed. Of several that apply, suspended is shown first, then stalled, then draining. A worker that
#: is lost is not listed any more.
WorkerState: TypeAlias = Literal["ok", "busy", "stalled", "draining", "suspended"]
WORKER_STATES: tuple[WorkerState, ...] = ("ok", "busy", "stalled", "draining", "suspended")

#: The state of a process of a master. ``ok``; ``draining``: it takes no new calls; ``silent``: it serves, and does not
#: answer; ``starting``: it does not serve yet; ``down``: it does not run.
ProcessState: TypeAlias = Literal["ok", "draining", "silent", "starting", "down"]

#: How a worker was admitted.
Admission: TypeAlias = Literal["certificate", "token", "open"]


@attrs.frozen
class SlotStatus:
    """The slots of this process."""

    running: int = 0
    """Handlers that hold a slot."""
    waiting: int = 0
    """Calls that wait for a slot."""
    capacity: int = 0
    """Handlers that may run at once."""
    waiting_by: dict[str, int] = attrs.field(factory=dict)
    """How many of the calls that wait each principal has, by the names of their keys; empty for requests without one.
    The 20 principals with the most."""


def most_waiting(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the largest of the counts of principals, the largest first; those that are equal by name."""
    return dict(nsmallest(_MOST_PRINCIPALS, counts.items(), key=lambda item: (-item[1], item[0])))


@attrs.frozen
class EjectedReplica:
    """A replica that is left alone for a while, since it keeps failing."""

    node: str
    """The node that serves the model: a worker's name, or ``local``."""
    model: str
    reason: str
    """How it has failed last."""
    until: str
    """When the next request tries it, in the format of ISO 8601."""
    seconds: float
    """The seconds until then; 0: the next request does, or one is doing so."""


@attrs.frozen
class WorkerStatus:
    """A worker that is connected to a master."""

    id: str
    """The worker's name."""
    instance: str
    """A random id that its process drew at its start; different for another process of the same name."""
    address: str
    """The address from which it connected."""
    state: WorkerState
    draining: bool
    """Whether it takes no new calls, because it is about to stop."""
    stalled: str
    """Why it cannot do anything at the moment; empty if it can."""
    models: list[str]
    """The names of the models that it serves, sorted."""
    running: int
    """Handlers that run there, as of its last heartbeat."""
    waiting: int
    """Calls that wait for a slot there, as of its last heartbeat."""
    capacity: int
    """Handlers that may run there at once."""
    in_flight: int
    """Calls that this master has forwarded to it and whose work has not stopped."""
    lag: float
    """The longest time in seconds for which its event loop was blocked, as of its last heartbeat."""
    connected_for: float
    """Seconds since it joined."""
    admitted: Admission
    """How it was admitted: by its certificate, by the cluster token, or without either."""
    waiting_by: dict[str, int] = attrs.field(factory=dict)
    """How many of this master's calls wait for a slot there, by the names of their keys, as of its last heartbeat. The
    20 principals with the most."""
    ejected: dict[str, str] = attrs.field(factory=dict)
    """The models of which this worker's replica is left alone for a while, since it keeps failing; with the reasons."""
    in_flight_elsewhere: int = 0
    """Calls that other masters have forwarded to it and whose work has not stopped, at most half a second old."""
    processes: list[int] | UnsetType = UNSET
    """Of a master that is several processes: those that it is linked to."""
    model_states: dict[str, ShownState] = attrs.field(factory=dict)
    """The states of those of its models that run on demand: ``ready``, ``starting`` or ``cold``."""
    version: str = ""
    """The version of this package there."""
    failed_models: list[str] = attrs.field(factory=list)
    """Those of the cold ones whose last start has failed, sorted."""


@attrs.frozen
class SleepingStatus:
    """A worker that is away, and whose machine can be woken."""

    id: str
    """The worker's name."""
    waking: bool
    """Whether it is being woken."""
    models: list[str]
    """The names of the models that it served, sorted."""
    waiting: int
    """Calls that wait for it."""


@attrs.frozen
class MasterStatus:
    """A master: to a master, another one that its workers are linked to; to a worker, one that it serves."""

    id: str
    """The master's name; empty if a worker has no link to it."""
    address: str
    """The address at which its workers connect to it."""
    workers: list[str] | UnsetType = UNSET
    """On a master only: the workers of this master that are linked to that one, sorted."""
    connected: bool | UnsetType = UNSET
    """On a worker only: whether it has a link to it and has registered its models there."""
    in_flight: int | UnsetType = UNSET
    """On a worker only: calls of this master that have not ended."""
    why: str | UnsetType = UNSET
    """On a worker only: why there is no link; empty if there is one."""


@attrs.frozen
class ProcessStatus:
    """One of the processes that a master is."""

    process: int
    """Its number, from 0 on."""
    pid: int
    """Its process id; 0: it does not run at the moment."""
    restarts: int
    """How often it has ended and was started again."""
    state: ProcessState
    node_id: str
    """Its name; empty if it does not answer."""
    uptime: float
    """Seconds since it started."""
    in_flight: int
    """Its calls whose work has not stopped."""


@attrs.frozen
class ResidentStatus:
    """What serves a model that runs on demand in this process."""

    name: str
    """Its name; models that are served by the same one have the same name here."""
    state: Literal["cold", "starting", "ready", "stopping", "failed"]
    memory: int
    """The bytes that are reserved for it."""
    start_seconds: float | None
    """How long its start usually takes; ``null``: not known yet."""
    answering: int
    """Requests that use it."""
    waiting: int
    """Requests that wait for it."""
    why: str = ""
    """Why it has failed; empty if it has not."""


@attrs.frozen
class OnDemandStatus:
    """The models of this process that run on demand, and their memory."""

    memory: int | None
    """The bytes that there are for them; ``null``: not known."""
    reserved: int
    """The bytes of these that are reserved."""
    models: dict[str, ResidentStatus]
    """What serves each of them."""


@attrs.frozen
class NodeStatus:
    """The part of a node's state that only the node itself knows."""

    version: str = ""
    """The version of the package."""
    slots: SlotStatus = attrs.field(factory=SlotStatus)
    workers: list[WorkerStatus] = attrs.field(factory=list)
    """The workers that are connected to this master, sorted by name."""
    masters: list[MasterStatus] | UnsetType = UNSET
    """On a master: the other masters that its workers are linked to, sorted. On a worker: its masters."""
    connected: bool | UnsetType = UNSET
    """On a worker only: whether it has a link to a master and has registered its models there."""
    rejected_models: dict[str, str] | UnsetType = UNSET
    """On a worker only: the models that a master refused, with the reasons."""
    on_demand: OnDemandStatus | UnsetType = UNSET
    """The models of this process that run on demand, if there are any."""
    sleeping: list[SleepingStatus] = attrs.field(factory=list)
    """On a master only: the workers that are away, and whose machines can be woken."""
