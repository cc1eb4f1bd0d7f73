"""What a node says of its state, for people and dashboards: typed values, which are JSON objects in the admin API.

A field that is ``UNSET`` is left out of the JSON object.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs
from msgspec import UNSET, UnsetType

__all__ = ["WORKER_STATES", "NodeStatus", "SlotStatus", "WorkerState", "WorkerStatus"]

#: The state of a worker: well; all slots taken; alive, and unable to do anything; about to stop. The worst one that
#: holds is shown. A worker that is lost is no worker any more.
WorkerState: TypeAlias = Literal["ok", "busy", "stalled", "draining"]
WORKER_STATES: tuple[WorkerState, ...] = ("ok", "busy", "stalled", "draining")


@attrs.frozen
class SlotStatus:
    """The slots in which this process's handlers run."""

    running: int = 0
    """Handlers that hold a slot."""
    waiting: int = 0
    """Calls that wait for a slot."""
    capacity: int = 0
    """Handlers that may run at once."""


@attrs.frozen
class WorkerStatus:
    """A worker that is connected to a master."""

    id: str
    """Its name."""
    instance: str
    """Drawn by its process at the start; tells it from another process of the same name."""
    address: str
    """Where it connected from."""
    state: WorkerState
    draining: bool
    stalled: str
    """Why it can do nothing at the moment; empty if it can."""
    models: list[str]
    """The names of the models that it serves, sorted."""
    running: int
    """Handlers that run there, as it said last."""
    waiting: int
    """Calls that wait for a slot there, as it said last."""
    capacity: int
    """Handlers that may run there at once."""
    in_flight: int
    """Calls that this master has there."""
    lag: float
    """Seconds for which its event loop was busy with one thing, at most, since its last heartbeat."""
    connected_for: float
    """Seconds since it joined."""


@attrs.frozen
class NodeStatus:
    """What only the node itself knows of its state."""

    version: str = ""
    """The version of the package."""
    slots: SlotStatus = attrs.field(factory=SlotStatus)
    workers: list[WorkerStatus] = attrs.field(factory=list)
    """A master's workers, sorted by name."""
    connected: bool | UnsetType = UNSET
    """Of a worker: whether it has a link to its master, with all models registered."""
    rejected_models: dict[str, str] | UnsetType = UNSET
    """Of a worker: the models that its master refused, with the reasons."""
