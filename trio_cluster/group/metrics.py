"""The metrics of several processes as those of one: what is counted is added up, gauges as it fits each.

Counters must not fall when a process ends, or what watches them takes that for a restart of all. So the supervisor
keeps the last answers of each process, and adds what those have counted that have ended.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import attrs
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .messages import Response

__all__ = ["RetiredCounters", "is_openmetrics", "merge_metrics"]

_PREFIX: Final = "trio_cluster_"
#: Gauges of which each process has a part. Of the others, each process knows the same, or the largest value counts.
_ADDED: Final = frozenset(
    _PREFIX + name
    for name in ("calls_in_flight", "slots_running", "slots_waiting", "slots_capacity", "worker_in_flight")
)
#: The gauge whose samples belong together: of a worker, those of one process count.
_STATE: Final = _PREFIX + "worker_state"
_LEAST: Final = _PREFIX + "draining"

#: The end of a text in the format OpenMetrics.
_END: Final = b"# EOF\n"
#: One label, with its value in quotes; the value of the label ``worker``; a line, and its exemplar.
_LABEL: Final = re.compile(r'[A-Za-z_][A-Za-z0-9_]*="(?:[^"\\]|\\.)*"')
_WORKER: Final = re.compile(r'(?:^|,)worker="((?:[^"\\]|\\.)*)"')
_WITH_EXEMPLAR: Final = re.compile(r'([^\s{]+(?:\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})? \S+) (# .*)')


@attrs.define
class _Family:
    """One metric: its type and its help text, and its samples by name and labels, with the exemplars that they have."""

    kind: str
    about: str = ""
    values: dict[tuple[str, str], float] = attrs.field(factory=dict)
    exemplars: dict[tuple[str, str], str] = attrs.field(factory=dict)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        return self._families


def is_openmetrics(text: bytes) -> bool:
    """Tell whether metrics are in the format OpenMetrics, and not in the older one."""
    return text.endswith(_END)


def merge_metrics(
    texts: Sequence[bytes],
    retired: bytes = b"",
    more: Iterable[Metric] = (),
    *,
    openmetrics: bool = False,
    hidden: str = "",
) -> bytes:
    """Return the metrics of several processes as those of one.

    Args:
        texts: what each of them shows, in either format.
        retired: what processes have counted that have ended.
        more: further metrics.
        openmetrics: return them in the format OpenMetrics, with exemplars.
        hidden: leave out the exemplars, and the metrics whose names begin like this; empty: leave out nothing.
    """
    merger = _Merger()
    for text in texts:
        merger.add(text)
    merger.add(retired, counted_only=True)
    merger.add(generate_latest(_Families(more)))
    return merger.text(openmetrics=openmetrics, hidden=hidden)


class _Merger:
    """Adds up texts. The lines are taken apart here, since the library of Prometheus takes ten times as long."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}
        #: By the name and the labels as they stand in a text: the name, and the labels as they are compared, sorted.
        self._keys: dict[str, tuple[str, str]] = {}

    def add(self, text: bytes, *, counted_only: bool = False) -> None:
        """Add the metrics of one process.

        Args:
            text: its metrics.
            counted_only: leave out gauges.
        """
        family, name, skips, about = _Family("unknown"), "", True, ""
        seen: set[str] = set()
        for line in text.decode().split("\n"):
            if line.startswith("# HELP "):
                about = line.split(" ", 3)[3]
            elif line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ", 3)
                if kind == "counter":
                    name = name.removesuffix("_total")
                skips = counted_only and kind == "gauge"
                if not skips:
                    family = self._families.setdefault(name, _Family(kind, about))
                    if name == _STATE:
                        seen = {found for _, labels in family.values for found in _WORKER.findall(labels)}
            elif line and not skips and not line.startswith("#"):
                exemplar = ""
                if " # " in line and (match := _WITH_EXEMPLAR.fullmatch(line)):
                    line, exemplar = match.groups()
                series, _, value = line.rpartition(" ")
                key = self._keys.get(series) or self._key(series)
                if name == _STATE and not seen.isdisjoint(_WORKER.findall(key[1])):
                    continue
                family.values[key] = _merge(name, family.kind, family.values.get(key), float(value))
                if exemplar and _time_of(exemplar) >= _time_of(family.exemplars.get(key, "")):
                    family.exemplars[key] = exemplar

    def text(self, *, openmetrics: bool, hidden: str) -> bytes:
        """Return the sums of all that was added."""
        lines = []
        for name, family in self._families.items():
            if hidden and name.startswith(hidden):
                continue
            shown = name + "_total" if family.kind == "counter" and not openmetrics else name
            lines += [f"# HELP {shown} {family.about}\n", f"# TYPE {shown} {family.kind}\n"]
            for key, value in family.values.items():
                labels = f"{{{key[1]}}}" if key[1] else ""
                exemplar = (
                    f" {family.exemplars[key]}"
                    if openmetrics and not hidden and key in family.exemplars
                    else ""
                )
                number = repr(value).replace("inf", "Inf").replace("nan", "NaN")
                lines.append(f"{key[0]}{labels} {number}{exemplar}\n")
        return "".join(lines).encode() + (_END if openmetrics else b"")

    def _key(self, series: str) -> tuple[str, str]:
        name, _, labels = series.partition("{")
        found = self._keys[series] = name, ",".join(sorted(_LABEL.findall(labels)))
        return found


def _time_of(exemplar: str) -> float:
    return float(exemplar.rpartition(" ")[2]) if exemplar else -math.inf


def _merge(name: str, kind: str, one: float | None, other: float) -> float:
    if one is None:
        return other
    if kind in ("counter", "histogram", "summary") or name in _ADDED:
        return one + other
    return min(one, other) if name == _LEAST else max(one, other)


class RetiredCounters:
    """What the processes of a group had counted when they were asked last, kept for when they have ended."""

    def __init__(self) -> None:
        self._last: dict[int, bytes] = {}
        self._retired: list[bytes] = []
        self._ends: Counter[int] = Counter()

    def ends(self) -> Counter[int]:
        """Return how often each process has ended until now. Synchronous."""
        return self._ends.copy()

    def without_ended(self, responses: Mapping[int, Response], since: Counter[int]) -> dict[int, Response]:
        """Return the answers of those processes that have not ended since they were asked. Synchronous.

        What the others had counted would otherwise count twice: it is among that of processes that have ended.

        Args:
            responses: by the numbers of the processes.
            since: what :meth:`ends` returned when they were asked.
        """
        return {
            process: response
            for process, response in responses.items()
            if self._ends[process] == since[process]
        }

    def note(self, responses: Mapping[int, Response]) -> None:
        """Keep what processes have answered. Synchronous."""
        for process, response in responses.items():
            if response.status == 200:
                self._last[process] = response.body

    def retire(self, process: int) -> None:
        """A process has ended. Synchronous."""
        self._ends[process] += 1
        last = self._last.pop(process, None)
        if last is not None:
            self._retired = [merge_counters([*self._retired, last])]

    def text(self, responses: Mapping[int, Response]) -> bytes:
        """Return what processes have counted that have ended, or do not answer at the moment. Synchronous.

        Args:
            responses: of those that have answered.
        """
        silent = [last for process, last in self._last.items() if process not in responses]
        if not silent and self._retired:
            return self._retired[0]
        return merge_counters([*self._retired, *silent])


def merge_counters(texts: Sequence[bytes]) -> bytes:
    """Return the counters of several processes, without their gauges."""
    merger = _Merger()
    for text in texts:
        merger.add(text, counted_only=True)
    return merger.text(openmetrics=True, hidden="")
