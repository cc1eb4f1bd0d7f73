"""The metrics of several processes as those of one: what is counted is added up, gauges as it fits each.

Counters must not fall when a process ends, or what watches them takes that for a restart of all. So the supervisor
keeps the last answers of each process, and adds what those have counted that have ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from .messages import Response

__all__ = ["RetiredCounters", "merge_metrics"]

_PREFIX: Final = "trio_cluster_"
#: Gauges of which each process has a part. Of the others, each process knows the same, or the largest value counts.
_ADDED: Final = frozenset(
    _PREFIX + name
    for name in ("calls_in_flight", "slots_running", "slots_waiting", "slots_capacity", "worker_in_flight")
)
#: The gauge whose samples belong together: of a worker, those of one process count.
_STATE: Final = _PREFIX + "worker_state"
_LEAST: Final = _PREFIX + "draining"


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        return self._families


def merge_metrics(texts: Sequence[bytes], retired: bytes = b"", more: Iterable[Metric] = ()) -> bytes:
    """Return the metrics of several processes as those of one.

    Args:
        texts: what each of them shows.
        retired: what processes have counted that have ended.
        more: further metrics.
    """
    merged: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in (*texts, retired):
        for family in text_string_to_metric_families(text.decode()):
            if text is retired and family.type == "gauge":
                continue
            found = merged.get(family.name)
            if found is None:
                found = merged[family.name] = Metric(family.name, family.documentation, family.type)
                values[family.name] = {}
            known = values[family.name]
            before = {dict(labels).get("worker") for _, labels in known} if family.name == _STATE else set()
            for sample in family.samples:
                key = sample.name, tuple(sample.labels.items())
                if family.name == _STATE and sample.labels.get("worker") in before:
                    continue
                known[key] = _merge(family, known.get(key), sample.value)
    for name, family in merged.items():
        family.samples = [Sample(key[0], dict(key[1]), value) for key, value in values[name].items()]
    return generate_latest(_Families([*merged.values(), *more]))


def _merge(family: Metric, one: float | None, other: float) -> float:
    if one is None:
        return other
    if family.type in ("counter", "histogram", "summary") or family.name in _ADDED:
        return one + other
    return min(one, other) if family.name == _LEAST else max(one, other)


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
        return merge_counters([*self._retired, *silent])


def merge_counters(texts: Sequence[bytes]) -> bytes:
    """Return the counters of several processes, without their gauges."""
    return merge_metrics([merge_metrics([], text) for text in texts])
