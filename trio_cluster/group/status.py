"""The status of several processes as that of one node."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from .messages import Process

__all__ = ["merge_calls", "merge_status"]


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
    merged["models"] = _models(found)
    merged["workers"] = _workers(each)
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


def _models(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {}
    for status in found:
        for model in status["models"]:
            known = models.setdefault(model["id"], model)
            known["nodes"] = sorted({*known["nodes"], *model["nodes"]})
    return [models[name] for name in sorted(models)]


def _workers(each: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    seen: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, status in each.items():
        for worker in status["workers"]:
            seen.setdefault(worker["id"], []).append((number, worker))
    return [_worker(seen[name]) for name in sorted(seen)]


def _worker(views: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Return a worker as all processes see it that are linked to it."""
    # A link that is cut says nothing of the worker, if there is another one.
    best = min((view for _, view in views), key=lambda view: view["state"] == "suspended")
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
    merged["connected_for"] = max(view["connected_for"] for _, view in views)
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
