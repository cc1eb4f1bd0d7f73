"""The items of ``GET /cluster/events``: a request that runs, a worker, a model, as they are now.

An item is sent again when any of its values has changed. So values that always change, such as the time since something
has happened, are not in it: times are those of the clock, in seconds since the epoch, and measured values are rounded.
A node without requests sends nothing.

A request is looked at several times per second, with thousands of others. So an item costs a few microseconds, most of
them for its encoding, and has no texts that are long. Requests and attempts are not tracked by the garbage collector
(``gc=False``): they are in no circle, and thousands of them in each look would set it off.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from ..core import clock
from ..core.aliases import reachable, shown_target
from ..core.answer import Failed
from ..core.call import Call
from ..core.model_state import ShownState
from ..core.principal import Limits
from ..core.status import Admission, SleepingStatus, WorkerStatus
from ..gateway.context import RequestContext
from ..gateway.request_stats import RequestStats
from ..routing.cost import LeastCost
from ..routing.router import Router
from .views import StatusView

__all__ = [
    "ConnectionTimes",
    "LiveAttempt",
    "LiveReplica",
    "LiveRequest",
    "LiveWorker",
    "live_models",
    "live_request",
    "live_workers",
]

_encode: Final = msgspec.json.encode
_NO_LIMITS: Final = Limits()
#: A lag in seconds below which an event loop is as quick as any other.
_LEAST_LAG: Final = 0.05


class LiveAttempt(msgspec.Struct, frozen=True, gc=False):
    """An attempt at a request: a call."""

    attempt: int
    """Its number, from 1 on."""
    kind: str
    """``first``, ``retry``, ``hedge`` or ``next_name``; see the story of a request."""
    node: str
    """The worker that is asked, or ``local``."""
    model: str
    phase: str
    """That of ``/cluster/calls``, or ``over``: its work has stopped."""
    waits_for: str
    """What it waits for; empty if it waits for its model's next output, or for nothing any more."""
    began: float
    """When it was opened, in seconds since the epoch."""
    first_output: float | None
    """When its answer began, in seconds since the epoch; ``null``: not yet."""
    delivered: int
    """Bytes of its answer that the client has taken."""
    error: str
    """The code of the error with which it has failed; empty if it has not."""


class LiveRequest(msgspec.Struct, frozen=True, gc=False):
    """A request that runs."""

    id: str
    """Unique among the requests of this node: clients may use one ``x-request-id`` repeatedly."""
    request_id: str
    endpoint: str
    model: str
    """The model that is asked; of several attempts, that of the one that counts. Empty until the body was read."""
    alias: str
    """The name that the client asked for, if that is an alias; otherwise empty."""
    key: str
    """The name of the API key; empty if none is required."""
    client: str
    began: float
    """When it arrived, in seconds since the epoch."""
    phase: str
    """``admitting``, or that of the attempt that counts."""
    waits_for: str
    """What it waits for, in words; empty if it waits for its model's next output."""
    ready_at: float | None
    """If its model is being started or its machine woken: when that is expected to be done, in seconds since the epoch.
    ``null``: it is not, or that is not known."""
    node: str
    """The worker that is asked, or ``local``; empty if none is yet."""
    attempts: int
    first_output: float | None
    """When the answer began, in seconds since the epoch; ``null``: not yet."""
    produced: int
    """Bytes of the answer that exist by now, as far as this node knows."""
    delivered: int
    """Bytes of the answer that the client has taken. Their difference between two updates gives the rate."""
    deadline: float | None
    """When its client's total timeout is over, in seconds since the epoch; ``null``: there is none."""
    calls: list[LiveAttempt]
    """The attempts, oldest first."""


class LiveWorker(msgspec.Struct, frozen=True):
    """A worker that is connected, or that is away and whose machine can be woken. See ``WorkerStatus``."""

    id: str
    instance: str
    address: str
    version: str
    state: str
    """That of ``WorkerStatus``; or ``asleep``, or ``waking``: its machine is being woken."""
    draining: bool
    stalled: str
    admitted: Admission | None
    connected_since: float | None
    """When it has joined, in seconds since the epoch."""
    lag: float
    """Tenths of a second; 0 if it is short."""
    running: int
    waiting: int
    capacity: int
    in_flight: int
    in_flight_elsewhere: int
    waiting_by: dict[str, int]
    models: list[str]
    model_states: dict[str, ShownState]
    failed_models: list[str]
    ejected: dict[str, str]


class LiveReplica(msgspec.Struct, frozen=True):
    """What serves a model: a worker, or this node."""

    node: str
    """The worker, or ``local``."""
    state: str
    """``ready``; of a model that runs on demand also ``starting``, ``cold`` or ``failed``: it could not be started."""
    why: str
    """Why it has failed; empty if it has not."""
    on_demand: bool
    """Whether it can be loaded and unloaded."""
    available: bool
    """Whether it may be given requests: it does not drain, and the connection to it is not cut."""
    in_flight: int
    tokens_per_second: float | None
    """What routing has measured, all of its answers together; ``null``: nothing yet."""


class ConnectionTimes:
    """When workers have joined: the same time in each look, whatever the clocks do."""

    def __init__(self) -> None:
        # By instance: for how long it was connected at the last look, and since when it is.
        self._times: dict[str, tuple[float, float]] = {}

    def since(self, workers: Sequence[WorkerStatus]) -> dict[str, float]:
        """Return when each of the workers has joined, in seconds since the epoch, by their instances. Synchronous."""
        now = time.time()
        found: dict[str, tuple[float, float]] = {}
        for each in workers:
            known = self._times.get(each.instance)
            # One that was connected for longer before has joined again.
            at = round(now - each.connected_for, 1)
            if known is not None and known[0] <= each.connected_for:
                at = known[1]
            found[each.instance] = each.connected_for, at
        self._times = found
        return {instance: at for instance, (_, at) in found.items()}


def live_request(context: RequestContext, number: str, began: float) -> LiveRequest:
    """Return a request as it is now. Synchronous.

    Args:
        context: of the request.
        number: its id.
        began: when it arrived, in seconds since the epoch.
    """
    request, call = getattr(context, "request", None), getattr(context, "call", None)
    endpoint = "" if context.endpoint is None else context.endpoint.name
    key, client = context.principal.name, context.client
    if call is None:
        waits_for = _admission(context)
        model, alias = ("", "") if request is None else (request.model, request.alias)
        return LiveRequest(
            number, context.request_id, endpoint, model, alias, key, client, began, "admitting", waits_for,
            None, "", 0, None, 0, 0, None, [],
        )  # fmt: skip
    calls = context.calls
    # The difference between the clock of the calls and the epoch.
    epoch = began - context.began
    if len(calls) == 1:
        counting = _attempt(calls, 0, epoch)
        attempts = [counting]
    else:
        attempts = [_attempt(calls, index, epoch) for index in range(len(calls))]
        counting = attempts[calls.index(call)]
    wait, deadline, ready_at = call.model_wait, None, None
    if wait is not None and (seconds := wait.seconds) is not None:
        ready_at = float(round(epoch + clock.now() + seconds))
    if request is not None and request.total_timeout < math.inf:
        deadline = round(epoch + calls[0].opened_at + request.total_timeout, 3)
    return LiveRequest(
        number, context.request_id, endpoint, counting.model, call.request.alias, key, client, began,
        counting.phase, counting.waits_for, ready_at, counting.node, len(calls), counting.first_output,
        call.produced, counting.delivered, deadline, attempts,
    )  # fmt: skip


def _admission(context: RequestContext) -> str:
    if not hasattr(context, "request"):
        return "its body"
    return "the limits of its key" if context.principal.limits != _NO_LIMITS else ""


def _attempt(calls: Sequence[Call], index: int, epoch: float) -> LiveAttempt:
    call = calls[index]
    kind = "first"
    if index:
        before = calls[index - 1]
        if call.request.model != before.request.model:
            kind = "next_name"
        else:
            kind = "retry" if 0 <= before.ended_at <= call.opened_at else "hedge"
    phase: str = "over" if call.released else call.phase
    waits_for, wait, node, body = "", call.model_wait, call.served_by, call.body
    if phase == "streaming":
        if body.waiting_bytes >= body.window:
            waits_for = "its client, which reads slowly"
    elif wait is not None:
        waits_for = wait.what
    elif phase == "queued":
        waits_for = f"a slot of {node}"
    elif phase == "stopping":
        waits_for = "the end of its work"
    elif phase == "uploading":
        waits_for = "the rest of its body"
    end = call.end
    return LiveAttempt(
        index + 1,
        kind,
        node,
        call.request.model,
        phase,
        waits_for,
        round(epoch + call.opened_at, 3),
        round(epoch + call.begun_at, 3) if call.begun else None,
        body.delivered,
        str(end.error.code or end.error.status) if type(end) is Failed else "",
    )


def live_workers(
    workers: Sequence[WorkerStatus], sleeping: Sequence[SleepingStatus], times: ConnectionTimes
) -> dict[str, bytes]:
    """Return the workers of a master as they are now, encoded, by their names. Synchronous.

    Args:
        workers: those that are connected.
        sleeping: those that are away, and whose machines can be woken.
        times: remembers when they have joined.
    """
    since = times.since(workers)
    items = {
        away.id: _encode(
            LiveWorker(
                away.id, "", "", "", "waking" if away.waking else "asleep", False, "", None, None, 0.0, 0,
                away.waiting, 0, away.waiting, 0, {}, away.models, {}, [], {},
            )
        )
        for away in sleeping
    }  # fmt: skip
    for each in workers:
        items[each.id] = _encode(
            LiveWorker(
                each.id,
                each.instance,
                each.address,
                each.version,
                each.state,
                each.draining,
                each.stalled,
                each.admitted,
                since[each.instance],
                round(each.lag, 1) if each.lag >= _LEAST_LAG else 0.0,
                each.running,
                each.waiting,
                each.capacity,
                each.in_flight,
                each.in_flight_elsewhere,
                each.waiting_by,
                each.models,
                each.model_states,
                each.failed_models,
                each.ejected,
            )
        )
    return items


def live_models(status: StatusView, router: Router, stats: RequestStats) -> dict[str, bytes]:
    """Return the models of a node as they are now, encoded, by their names. Synchronous.

    Args:
        status: of the node, as an operator sees it.
        router: knows the replicas.
        stats: of the requests that are over.
    """
    stats.catch_up()
    aliases: dict[str, list[dict[str, object]]] = {}
    table = router.catalog.aliases.table
    for alias, target in sorted(table.items()):
        for name in reachable(table, alias):
            aliases.setdefault(name, []).append({"id": alias, "alias_of": shown_target(target)})
    in_flight = Counter((call.request.model, call.served_by) for call in router.live)
    policy = router.policy if isinstance(router.policy, LeastCost) else None
    items = {}
    for model in status.models:
        name = str(model["id"])
        usual, speeds = (None, {}) if policy is None else policy.speeds(name)
        replicas = []
        for backend in router.catalog.replicas(name):
            state = backend.health.model_states.get(name)
            shown, why = ("ready", "") if state is None else (str(state.state), state.why)
            if why:
                # It is cold, and was to be started.
                shown = "failed"
            replicas.append(
                LiveReplica(
                    backend.name,
                    shown,
                    why,
                    state is not None,
                    backend.health.available,
                    in_flight[name, backend.name],
                    _rounded(speeds.get(backend.name)),
                )
            )
        replicas.sort(key=lambda replica: replica.node)
        tokens = stats.tokens_of(name)
        failed = bool(replicas) and all(replica.state == "failed" for replica in replicas)
        items[name] = _encode(
            model
            | {
                "state": "failed" if failed else model["state"],
                "why": replicas[0].why if failed else "",
                "replicas": replicas,
                "in_flight": sum(replica.in_flight for replica in replicas),
                # Routing only measures where there is a choice.
                "tokens_per_second": _rounded(tokens.tokens_per_second if usual is None else usual),
                "bytes_per_token": _rounded(tokens.bytes_per_token, digits=2),
                "prompt_tokens": tokens.input_tokens,
                "cached_tokens": tokens.cached_tokens,
                "aliases": aliases.get(name, []),
            }
        )
    return items


def _rounded(value: float | None, digits: int = 3) -> float | None:
    """Round to some digits that count, so that what is measured anew each time does not always change."""
    return None if value is None else float(f"{value:.{digits}g}")
