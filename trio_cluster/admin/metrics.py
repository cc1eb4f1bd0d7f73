"""The metrics of a node, in the text format of Prometheus or, if that is asked for, as OpenMetrics.

Nothing is counted here: the router and the statistics of requests have the counters, and a scrape reads them. So all
values are of one instant and add up, and counting adds nothing to the cost of a request.

What is counted by API key, and the ids of requests, which clients may choose, are for operators. Others get the rest.
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
from prometheus_client.openmetrics.exposition import (
    CONTENT_TYPE_LATEST as CONTENT_TYPE_OPENMETRICS,
    generate_latest as generate_openmetrics,
)
from prometheus_client.registry import Collector

from ..core.stats import Histogram
from ..core.threads import NoThread, run_in_thread
from ..gateway.node_context import NodeContext
from ..gateway.response import Reply
from ..routing.cost import LeastCost
from .request_metrics import count_samples, request_metrics

__all__ = ["accepts_openmetrics", "metrics_reply"]

_PREFIX = "trio_cluster_"
_OUTCOMES = ("completed", "cancelled", "timed_out", "worker_lost", "failed")

#: From this many samples on, the text is written in a thread, since it would delay other requests; a worker has eleven.
_MANY: Final = 500


_OPENMETRICS: Final = "application/openmetrics-text"
_END: Final = b"# EOF\n"


def accepts_openmetrics(accept: str) -> bool:
    """Tell whether a client prefers OpenMetrics to the older text format, by its header ``Accept``."""
    weights = {"text/plain": 0.0, "text/*": 0.0, _OPENMETRICS: 0.0}
    for each in accept.split(","):
        media_type, *parameters = (part.strip() for part in each.lower().split(";"))
        weight = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        if media_type in weights:
            weights[media_type] = max(weights[media_type], weight)
    return weights.pop(_OPENMETRICS) > max(weights.values())


async def metrics_reply(
    node_context: NodeContext, *, openmetrics: bool = False, to_operator: bool = False
) -> Reply:
    """Return the answer to a scrape; all values are of one instant.

    Args:
        node_context: the node.
        openmetrics: answer in the format OpenMetrics.
        to_operator: with what is counted by API key and, as exemplars of OpenMetrics, ids of requests.
    """
    snapshot = _Snapshot(_Metrics(node_context).families())
    models, keys, workers = node_context.request_stats.read()
    tables = models, keys if to_operator else {}, workers

    def text() -> bytes:
        lines = "".join(request_metrics(*tables, openmetrics=openmetrics, exemplars=to_operator)).encode()
        if not openmetrics:
            return generate_latest(snapshot) + lines
        return bytes(generate_openmetrics(snapshot)).removesuffix(_END) + lines + _END  # type: ignore[no-untyped-call]

    if sum(len(family.samples) for family in snapshot.collect()) + count_samples(tables) < _MANY:
        content = text()
    else:
        try:
            content = await run_in_thread(text, abandon_on_cancel=True)
        except NoThread:
            # What is wrong is looked for just then.
            content = text()
    content_type = CONTENT_TYPE_OPENMETRICS if openmetrics else CONTENT_TYPE_LATEST
    return Reply(200, [("content-type", content_type)], content)


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
