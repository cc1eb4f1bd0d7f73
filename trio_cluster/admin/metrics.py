"""The metrics of a node, in the Prometheus text format.

Nothing is counted here: the router has the counters, and a scrape reads them. So all values are of one instant and add
up, and counting adds nothing to the cost of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ..core.stats import Histogram
from ..core.threads import NoThread, run_in_thread
from ..gateway.node_context import NodeContext
from ..gateway.response import Reply
from ..routing.cost import LeastCost

__all__ = ["metrics_reply"]

_PREFIX = "trio_cluster_"
_OUTCOMES = ("completed", "cancelled", "timed_out", "worker_lost", "failed")

#: From this many samples on, the text is written in a thread, since it would delay other requests; a worker has eleven.
_MANY: Final = 500


async def metrics_reply(node_context: NodeContext) -> Reply:
    """Return the answer to a scrape; all values are of one instant."""
    snapshot = _Snapshot(_Metrics(node_context).families())
    if sum(len(family.samples) for family in snapshot.collect()) < _MANY:
        text = generate_latest(snapshot)
    else:
        try:
            text = await run_in_thread(generate_latest, snapshot, abandon_on_cancel=True)
        except NoThread:
            # What is wrong is looked for just then.
            text = generate_latest(snapshot)
    return Reply(200, [("content-type", CONTENT_TYPE_LATEST)], text)


class _Snapshot(Collector):
    """Metrics that were read before. Those that other code of this process registers with Prometheus are not in it."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        return self._families


class _Metrics:
    """Reads the metrics of a node."""

    def __init__(self, node_context: NodeContext) -> None:
        self._node_context = node_context

    def families(self) -> Iterator[Metric]:
        router = self._node_context.router
        stats = router.stats.counters()
        yield CounterMetricFamily(
            _PREFIX + "calls_admitted", "Calls that were opened.", value=stats["admitted"]
        )
        ended = CounterMetricFamily(
            _PREFIX + "calls_ended", "Calls whose work has stopped, by outcome.", labels=["outcome"]
        )
        for outcome in _OUTCOMES:
            ended.add_metric([outcome], stats[outcome])
        yield ended
        yield CounterMetricFamily(
            _PREFIX + "calls_retried", "Calls that were retried on another replica.", value=stats["retried"]
        )
        yield CounterMetricFamily(
            _PREFIX + "hedges",
            "Second attempts at requests whose answer was late.",
            value=router.hedging.sent,
        )
        yield CounterMetricFamily(
            _PREFIX + "hedges_won", "Second attempts that have answered first.", value=router.hedging.won
        )
        yield GaugeMetricFamily(
            _PREFIX + "calls_in_flight", "Calls whose work has not stopped.", value=len(router.live)
        )
        yield _histogram(
            "cancel_seconds",
            "Time from cancelling a call until its work had really stopped.",
            router.stats.cancel_durations,
        )
        models = GaugeMetricFamily(_PREFIX + "models", "Models that are served, by kind.", labels=["kind"])
        kinds = [info.kind for info in router.catalog.infos()]
        for kind in sorted(set(kinds)):
            models.add_metric([kind], kinds.count(kind))
        yield models
        yield CounterMetricFamily(
            _PREFIX + "ejections",
            "How often a replica was left alone for a while, since it kept failing.",
            value=router.ejections.table.total,
        )
        yield GaugeMetricFamily(
            _PREFIX + "draining", "1 while new calls are refused.", value=router.draining_reason is not None
        )
        yield GaugeMetricFamily(
            _PREFIX + "uptime_seconds", "Seconds since the node started.", value=self._node_context.uptime
        )
        policy = router.policy
        if isinstance(policy, LeastCost):
            yield from _prompts(policy)
        yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for sample in self._node_context.gauges():
            family = families.get(sample.name)
            if family is None:
                family = families[sample.name] = GaugeMetricFamily(
                    _PREFIX + sample.name, sample.help, labels=list(sample.labels)
                )
            family.add_metric(list(sample.labels.values()), sample.value)
        yield from families.values()


def _prompts(policy: LeastCost) -> Iterator[CounterMetricFamily]:
    """Return how well routing knows the prompt caches of the replicas."""
    counted = sorted(policy.counts.items())
    for field, name, about in (
        ("total", "prompt_tokens", "Tokens of the prompts that the next two are parts of"),
        (
            "predicted",
            "prompt_tokens_expected_cached",
            "Those that routing expected in the cache of the replica",
        ),
        ("reported", "prompt_tokens_reported_cached", "Those that were in its cache, by its answers"),
    ):
        family = CounterMetricFamily(_PREFIX + name, f"{about}, by model.", labels=["model"])
        for model, counts in counted:
            family.add_metric([model], round(getattr(counts, field)))
        yield family


def _histogram(name: str, about: str, durations: Histogram) -> HistogramMetricFamily:
    bounds = [*map(str, durations.BOUNDS), "+Inf"]
    buckets = list(zip(bounds, accumulate(durations.counts), strict=True))
    return HistogramMetricFamily(_PREFIX + name, about, buckets=buckets, sum_value=durations.total)
