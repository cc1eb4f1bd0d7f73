"""What ``trio-cluster status``, ``calls``, ``why``, ``reload``, ``keys list``, ``usage`` and ``audit`` print of a
node's JSON.

The JSON was written by another machine, so nothing in it is trusted to be there, to be of the right type, or to be fit
for a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .admin_client import printable

__all__ = [
    "describe_audit",
    "describe_calls",
    "describe_keys",
    "describe_reload",
    "describe_status",
    "describe_story",
    "describe_usage",
]


def describe_status(status: Mapping[str, Any]) -> str:
    """Return the tables for ``GET /cluster/status``, without a line break at the end."""
    workers, models = _rows(status, "workers"), _rows(status, "models")
    head = ["trio_cluster"]
    if "version" in status:
        head[0] += f" {_cell(status['version'])}"
    head.append(_cell(status.get("mode")))
    if "node_id" in status:
        head.append(f"node {_cell(status['node_id'])}")
    if "uptime" in status:
        head.append(f"up {_duration(status['uptime'])}")
    if status.get("draining"):
        head.append("draining")
    if status.get("connected") is False:
        head.append("without a master")
    lines = [", ".join(head)]
    for title in ("slots", "calls"):
        counts = status.get(title)
        if isinstance(counts, Mapping) and counts:
            shown = [
                f"{_cell(count)} {_cell(name).replace('_', ' ')}"
                for name, count in counts.items()
                if not isinstance(count, Mapping)
            ]
            lines.append(f"{title}: {', '.join(shown)}")
            waiting = counts.get("waiting_by")
            if isinstance(waiting, Mapping) and waiting:
                by_key = (
                    f"{_cell(key) if key else 'without a key'} {_cell(count)}"
                    for key, count in waiting.items()
                )
                lines.append(f"waiting by key: {', '.join(by_key)}")
    sections = ["\n".join(lines)]
    if status.get("mode") == "master" or workers:
        sections.append(_worker_table(workers) if workers else "no workers")
    if processes := _rows(status, "processes"):
        sections.append(_process_table(processes))
    if masters := _rows(status, "masters"):
        sections.append(_master_table(masters, own=status.get("mode") == "worker"))
    stalled = [(_cell(w.get("id")), _cell(w.get("stalled"))) for w in workers if w.get("stalled")]
    if stalled:
        sections.append(_table(("STALLED", "WHY"), stalled))
    ejected = _rows(status, "ejected")
    if ejected:
        rows = [
            (
                *(_cell(each.get(key)) for key in ("node", "model", "reason")),
                f"in {_duration(each.get('seconds'))}" if each.get("seconds") else "now",
            )
            for each in ejected
        ]
        sections.append(_table(("EJECTED", "MODEL", "WHY", "TRIED"), rows))
    failed = _failed_models(status, workers)
    if failed:
        rows = [(model, node, why) for (model, node), why in sorted(failed.items())]
        sections.append(_table(("CANNOT START", "NODE", "WHY"), rows))
    sections.append(_model_table(models, failed) if models else "no models")
    rejected = status.get("rejected_models")
    if isinstance(rejected, Mapping) and rejected:
        sections.append(_table(("REJECTED", "REASON"), [(_cell(k), _cell(v)) for k, v in rejected.items()]))
    return "\n\n".join(sections)


def _process_table(processes: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the processes that a master is."""
    rows = [
        (
            *(_cell(each.get(key)) for key in ("process", "state", "pid", "in_flight")),
            _duration(each.get("uptime")),
            _cell(each.get("restarts")),
        )
        for each in processes
    ]
    return _table(("PROCESS", "STATE", "PID", "IN FLIGHT", "UP", "RESTARTS"), rows)


def describe_reload(reloaded: Mapping[str, Any]) -> str:
    """Return what has come of ``POST /cluster/reload``, without a line break at the end."""
    lines = [f"{_cell(reloaded.get('file'))} was read again"]
    for field, title in (("applied", "applied"), ("needs_restart", "needs a restart")):
        lines += [f"{title}: {_change(change)}" for change in _rows(reloaded, field)]
    if reloaded.get("certificates"):
        lines.append("applied: new certificates")
    return "\n".join(lines if len(lines) > 1 else [f"{lines[0]}: nothing has changed"])


def _change(change: Mapping[str, Any]) -> str:
    option = _cell(change.get("option"))
    if "after" not in change:
        return option
    before, after = (_setting(change.get(side)) for side in ("before", "after"))
    return f"{option}, {before} -> {after}"


def _setting(value: object) -> str:
    if value is None:
        return "none"
    return printable(value if isinstance(value, str) else json.dumps(value))


def describe_calls(content: Mapping[str, Any]) -> str:
    """Return the table for ``GET /cluster/calls``, without a line break at the end."""
    calls = _rows(content, "calls")
    if not calls:
        return "no calls"
    return _table(
        ("REQUEST", "MODEL", "ENDPOINT", "NODE", "PHASE", "AGE", "BYTES", "CLIENT"),
        [
            (
                *(_cell(call.get(key)) for key in ("request_id", "model", "endpoint", "node", "phase")),
                _duration(call.get("age")),
                *(_cell(call.get(key)) for key in ("delivered", "client")),
            )
            for call in calls
        ],
    )


def describe_story(story: Mapping[str, Any]) -> str:
    """Return the story of ``GET /cluster/requests/ID``, a line for each step, without a line break at the end."""
    outcome, seconds = _cell(story.get("outcome")).replace("_", " "), _seconds(story.get("seconds"))
    since = "for" if outcome == "running" else "after"
    steps = [(_seconds(step.get("at")), step) for step in _rows(story, "steps")]
    width = max((len(at) for at, _ in steps), default=0)
    lines = [
        f"{_cell(story.get('request_id'))}: {outcome} {since} {seconds} s; it began at {_cell(story.get('began'))}",
        *(f"+{at.rjust(width)} s  {_cell(step.get('text'))}" for at, step in steps),
        f"most of the time: {_cell(story.get('slowest'))}",
    ]
    earlier = story.get("earlier")
    if isinstance(earlier, int) and earlier > 0:
        lines.append(f"earlier requests with this id: {earlier}")
    return "\n".join(lines)


def _seconds(seconds: object) -> str:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e10:
        return "-"
    return f"{seconds:.3f}"


def describe_keys(content: Mapping[str, Any]) -> str:
    """Return the table for ``GET /cluster/keys``, without a line break at the end."""
    keys = _rows(content, "data")
    if not keys:
        return "no keys"
    titles = "NAME", "ROLE", "MODELS", "REQUESTS/MIN", "TOKENS/MIN", "CONCURRENCY", "BUDGET", "PRIORITY"
    return _table(
        (*titles, "WEIGHT", "EXPIRES", "DISABLED"),
        [
            (
                _cell(key.get("name")),
                _cell(key.get("role")),
                _cell(key.get("models") or "all"),
                _cell(key.get("requests_per_minute")),
                _cell(key.get("tokens_per_minute")),
                _cell(key.get("max_concurrency")),
                _budget(key.get("budget")),
                _cell(key.get("priority")),
                _cell(key.get("weight")),
                _cell(key.get("expires_at")),
                "yes" if key.get("disabled") else "no",
            )
            for key in keys
        ],
    )


def describe_usage(content: Mapping[str, Any], groups: Sequence[str]) -> str:
    """Return the table for ``GET /cluster/usage``, without a line break at the end."""
    rows = _rows(content, "data")
    if not rows:
        return "no requests"
    counts = "requests", "completed", "failed", "cancelled", "prompt_tokens", "completion_tokens"
    columns = [*groups, *counts, "cached_tokens", "usage_unknown"]
    titles = [column.upper().replace("_", " ") for column in columns]
    return _table(titles, [[_cell(row.get(column)) for column in columns] for row in rows])


def describe_audit(content: Mapping[str, Any]) -> str:
    """Return the table for ``GET /cluster/audit``, without a line break at the end."""
    entries = _rows(content, "data")
    if not entries:
        return "no entries"
    return _table(
        ("TIME", "WHO", "FROM", "ACTION", "TARGET", "DETAILS"),
        [
            (
                *(_cell(entry.get(key)) for key in ("time", "principal", "address", "action", "target")),
                _details(entry.get("details")),
            )
            for entry in entries
        ],
    )


def _details(details: object) -> str:
    if not isinstance(details, Mapping) or not details:
        return "-"
    return ", ".join(f"{_cell(name)}={_cell(value)}" for name, value in details.items())


def _budget(budget: object) -> str:
    if not isinstance(budget, Mapping):
        return "-"
    return f"{_cell(budget.get('tokens'))}/{_cell(budget.get('per'))}"


def _worker_table(workers: Iterable[Mapping[str, Any]]) -> str:
    return _table(
        ("WORKER", "ADDRESS", "STATE", "RUNNING", "WAITING", "CONNECTED", "MODELS"),
        [
            (
                _cell(worker.get("id")),
                _cell(worker.get("address")),
                _cell(worker.get("state")),
                f"{_cell(worker.get('running'))}/{_cell(worker.get('capacity'))}",
                _cell(worker.get("waiting")),
                _duration(worker.get("connected_for")),
                _cell(worker.get("models")),
            )
            for worker in workers
        ],
    )


def _master_table(masters: Iterable[Mapping[str, Any]], *, own: bool) -> str:
    """Return the table of a worker's own masters, or of the other masters that the workers of a master have."""
    if not own:
        return _table(
            ("OTHER MASTER", "ADDRESS", "WORKERS"),
            [tuple(_cell(master.get(key)) for key in ("id", "address", "workers")) for master in masters],
        )
    return _table(
        ("MASTER", "ADDRESS", "CONNECTED", "IN FLIGHT", "WHY NOT"),
        [
            (
                *(_cell(master.get(key)) for key in ("id", "address")),
                "yes" if master.get("connected") is True else "no",
                *(_cell(master.get(key)) for key in ("in_flight", "why")),
            )
            for master in masters
        ],
    )


def _failed_models(
    status: Mapping[str, Any], workers: Iterable[Mapping[str, Any]]
) -> dict[tuple[str, str], str]:
    """Return why models could not be started: by the names of the model and of the node."""
    failed = {}
    for worker in workers:
        names = worker.get("failed_models")
        for name in names if isinstance(names, list) else ():
            failed[_cell(name), _cell(worker.get("id"))] = "see the log of the worker"
    on_demand = status.get("on_demand")
    own = on_demand.get("models") if isinstance(on_demand, Mapping) else None
    for name, resident in own.items() if isinstance(own, Mapping) else ():
        if isinstance(resident, Mapping) and resident.get("state") == "failed":
            failed[_cell(name), "local"] = _cell(resident.get("why"))
    return failed


def _model_table(
    models: Collection[Mapping[str, Any]], failed: Collection[tuple[str, str]] = frozenset()
) -> str:
    columns = {"MODEL": "id", "KIND": "kind", "OWNER": "owned_by", "SERVED BY": "nodes"}
    if any(model.get("state") not in (None, "ready") for model in models):
        columns["STATE"] = "state"
    # One that is cold and can be started somewhere is cold.
    models = [
        {**model, "state": "failed"}
        if model.get("state") == "cold"
        and (nodes := model.get("nodes"))
        and isinstance(nodes, list)
        and all((_cell(model.get("id")), _cell(node)) in failed for node in nodes)
        else model
        for model in models
    ]
    return _table(
        tuple(columns), [tuple(_cell(model.get(key)) for key in columns.values()) for model in models]
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (titles, *rows)
    )
    return "\n".join(lines)


def _rows(status: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    rows = status.get(key)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _cell(value: object) -> str:
    """Return ``value`` as the text of one cell: one line, without control characters, ``-`` if there is nothing."""
    if value is None or value in ("", []):
        return "-"
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    return printable(value)


def _duration(seconds: object) -> str:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e10:
        return "-"
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86400
    if minutes == 0:
        return f"{int(seconds)} s"
    if hours == 0:
        return f"{minutes} min {int(seconds) % 60} s"
    if days == 0:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"
