"""The status of several processes as that of one node."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from ..core.model_state import MODEL_STATES
from .messages import Process

__all__ = ["merge_calls", "merge_models", "merge_status", "merge_workers"]

#: States of a worker in which a process is not linked to it, from the better to the worse; all others are 0.
_ABSENT: Final = {"suspended": 1, "waking": 2, "asleep": 3}


def merge_calls(bodies: Sequence[bytes]) -> bytes:
    """Return the calls of all processes, oldest first."""
    calls = [call for body in bodies for call in msgspec.json.decode(body)["calls"]]
    calls.sort(key=lambda call: -float(call["age"]))
    return msgspec.json.encode({"calls": calls})


def merge_status(own: bytes, answers: Mapping[int, bytes], processes: Collection[Process]) -> bytes:
    """Return the status of a group.

    Args:
        own: that of the process that was asked; what all of them have alike is taken from it.
        answers: those of all processes that have answered, by their numbers.
        processes: all processes of the group.
    """
    merged: dict[str, Any] = msgspec.json.decode(own)
    each = {number: msgspec.json.decode(body) for number, body in sorted(answers.items())}
    found = list(each.values())
    merged["uptime"] = max(status["uptime"] for status in found)
    merged["draining"] = all(status["draining"] for status in found)
    merged["calls"] = _sum([status["calls"] for status in found])
    slots = [status["slots"] for status in found]
    merged["slots"] = _sum([{**one, "waiting_by": {}} for one in slots])
    merged["slots"]["waiting_by"] = _sum([one["waiting_by"] for one in slots])
    merged["models"] = merge_models([status["models"] for status in found])
    merged["workers"] = merge_workers({number: status["workers"] for number, status in each.items()})
    merged["ejected"] = list(
        {(one["node"], one["model"]): one for status in found for one in status["ejected"]}.values()
    )
    # Each is called like the group, with its number. One that does not answer now is no other master either.
    number, answered = next(iter(each.items()))
    group = answered["node_id"].removesuffix(f"-{number}")
    own_ids = {f"{group}-{one.process}" for one in processes}
    merged["masters"] = _masters(found, own_ids)
    merged["processes"] = [
        {
            "process": one.process,
            "pid": one.pid,
            "restarts": one.restarts,
            "state": _state(one, each),
            "node_id": each[one.process]["node_id"] if one.process in each else "",
            "uptime": each[one.process]["uptime"] if one.process in each else 0.0,
            "in_flight": each[one.process]["calls"]["in_flight"] if one.process in each else 0,
        }
        for one in processes
    ]
    return msgspec.json.encode(merged)


def _state(process: Process, answered: Mapping[int, dict[str, Any]]) -> str:
    if process.process in answered:
        return "draining" if answered[process.process]["draining"] else "ok"
    if process.serves:
        return "silent"
    return "starting" if process.pid else "down"


def _sum(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summed: dict[str, Any] = {}
    for table in tables:
        for name, value in table.items():
            summed[name] = summed.get(name, 0) + value if isinstance(value, int | float) else value
    return summed


def merge_models(lists: Iterable[Sequence[dict[str, Any]]], *, live: bool = False) -> list[dict[str, Any]]:
    """Return the models that several processes serve, sorted by name.

    Args:
        lists: what each process shows of its models.
        live: in its events, which have more than its status.
    """
    seen: dict[str, list[dict[str, Any]]] = {}
    for models in lists:
        for model in models:
            seen.setdefault(model["id"], []).append(model)
    return [_model(seen[name], live) for name in sorted(seen)]


def _model(views: Sequence[dict[str, Any]], live: bool) -> dict[str, Any]:
    merged = dict(views[0])
    merged["nodes"] = sorted({name for view in views for name in view["nodes"]})
    if live:
        replicas: dict[str, list[dict[str, Any]]] = {}
        for view in views:
            for replica in view["replicas"]:
                replicas.setdefault(replica["node"], []).append(replica)
        merged["replicas"] = [_replica(replicas[node]) for node in sorted(replicas)]
        merged["in_flight"] = sum(view["in_flight"] for view in views)
        merged["prompt_tokens"] = sum(view["prompt_tokens"] for view in views)
        merged["cached_tokens"] = sum(view["cached_tokens"] for view in views)
        for measured in ("tokens_per_second", "bytes_per_token"):
            merged[measured] = _highest([view[measured] for view in views])
        merged["state"] = min((view["state"] for view in views), key=_readiness)
        merged["why"] = next((view["why"] for view in views if view["state"] == merged["state"]), "")
    return merged


def _replica(views: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged = dict(min(views, key=lambda view: (not view["available"], _readiness(view["state"]))))
    merged["in_flight"] = sum(view["in_flight"] for view in views)
    merged["tokens_per_second"] = _highest([view["tokens_per_second"] for view in views])
    return merged


def _readiness(state: str) -> int:
    return (*MODEL_STATES, "failed").index(state)


def _highest(values: Sequence[float | None]) -> float | None:
    """Return the highest of several speeds: each process has measured the same replicas, busy with its own requests."""
    return max((value for value in values if value is not None), default=None)


def merge_workers(lists: Mapping[int, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the workers that several processes are linked to, sorted by name.

    Args:
        lists: what each process shows of its workers, in its status or in its events, by its number.
    """
    seen: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, workers in lists.items():
        for worker in workers:
            seen.setdefault(worker["id"], []).append((number, worker))
    return [_worker(seen[name]) for name in sorted(seen)]


def _worker(views: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Return a worker as all processes see it that are linked to it."""
    # A link that is cut says nothing of the worker, if there is another one.
    best = min((view for _, view in views), key=lambda view: _ABSENT.get(view["state"], 0))
    in_flight = sum(view["in_flight"] for _, view in views)
    merged = dict(best)
    merged["in_flight"] = in_flight
    # To each process, the calls of the others are elsewhere.
    merged["in_flight_elsewhere"] = max(0, best["in_flight_elsewhere"] - (in_flight - best["in_flight"]))
    merged["draining"] = any(view["draining"] for _, view in views)
    if merged["draining"] and merged["state"] in ("ok", "busy"):
        merged["state"] = "draining"
    merged["models"] = sorted({name for _, view in views for name in view["models"]})
    merged["waiting_by"] = _sum([view["waiting_by"] for _, view in views])
    merged["ejected"] = {name: why for _, view in views for name, why in view["ejected"].items()}
    if "connected_for" in merged:
        merged["connected_for"] = max(view["connected_for"] for _, view in views)
    else:
        times = [view["connected_since"] for _, view in views if view["connected_since"] is not None]
        merged["connected_since"] = min(times, default=None)
    merged["processes"] = [number for number, _ in views]
    return merged


def _masters(found: Sequence[dict[str, Any]], own: Collection[str]) -> list[dict[str, Any]]:
    """Return the masters that are not of this group."""
    masters: dict[tuple[str, str], dict[str, Any]] = {}
    for status in found:
        for master in status.get("masters", ()):
            if master["id"] not in own:
                known = masters.setdefault((master["id"], master["address"]), master)
                known["workers"] = sorted({*known.get("workers", ()), *master.get("workers", ())})
    return [masters[key] for key in sorted(masters)]
