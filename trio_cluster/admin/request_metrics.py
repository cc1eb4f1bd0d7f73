"""The text of the metrics of requests: by model, by key and by worker, in both formats that Prometheus reads.

This does what the library of Prometheus does for the other metrics. With hundreds of models there are ten thousands of
lines, for which the library takes a quarter of a second.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from ..core import clock
from ..gateway.request_stats import RequestSums, SumsByName, Timings

__all__ = ["KEY_PREFIX", "count_samples", "request_metrics"]

_PREFIX: Final = "trio_cluster_"
#: What the names of the metrics by key begin with.
KEY_PREFIX: Final = _PREFIX + "key_"

#: What is counted: the beginning of its names, its label, and what it is called in the help texts.
_BY_MODEL: Final = (_PREFIX + "request", "model", "Requests", "by the model that answered")
_BY_KEY: Final = (KEY_PREFIX + "request", "key", "Requests", "by API key")
_BY_WORKER: Final = (_PREFIX + "worker_call", "worker", "Calls", "by worker")

_TIMINGS: Final = (
    ("time_to_first_token_seconds", "From the beginning to the first token of answers that were streamed"),
    ("time_between_tokens_seconds", "Between the tokens of an answer that was streamed, on average of each"),
    ("duration_seconds", "From the beginning to the end"),
    ("queue_seconds", "In queues for slots"),
    ("cold_start_seconds", "Waiting for a model or a machine to start, of those that had to wait"),
)
_TOKENS: Final = (
    ("input_tokens", "Tokens of the input"),
    ("cached_tokens", "Tokens of the input that were read from a prompt cache"),
    ("output_tokens", "Tokens of the output"),
)
#: Ids of requests that are exemplars. An exemplar's label and its value may have 128 characters together; and clients
#: may choose ids with characters that some readers of the format stumble over.
_REQUEST_ID: Final = "request_id"
_SHOWN: Final = re.compile(rf"[A-Za-z0-9_.:/@+=~-]{{1,{128 - len(_REQUEST_ID)}}}")

_ESCAPES: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def count_samples(tables: Iterable[SumsByName]) -> int:
    """Return how many lines these statistics have, at most about."""
    return sum(80 * len(table) for table in tables)


def request_metrics(
    models: SumsByName, keys: SumsByName, workers: SumsByName, *, openmetrics: bool, exemplars: bool
) -> Iterator[str]:
    """Yield the lines of the metrics of requests.

    Args:
        models, keys, workers: the statistics; a name without statistics has no lines.
        openmetrics: in the format OpenMetrics; otherwise in the older text format.
        exemplars: with exemplars, which only OpenMetrics has.
    """
    # Exemplars have the time of day.
    offset = time.time() - clock.now()
    for table, (prefix, label, what, by) in ((models, _BY_MODEL), (keys, _BY_KEY), (workers, _BY_WORKER)):
        rows = [(f'{label}="{name.translate(_ESCAPES)}"', sums) for name, sums in sorted(table.items())]
        yield from _family(f"{prefix}s", "counter", f"{what} that are over, {by} and outcome.", openmetrics)
        for labels, sums in rows:
            for (outcome, status), count in sums.ended.items():
                more = f',status="{status}"' if status else ""
                yield f'{prefix}s_total{{{labels},outcome="{outcome}"{more}}} {count}\n'
        yield from _family(
            f"{prefix}_errors", "counter", f"{what} that ended with an error, {by}.", openmetrics
        )
        for labels, sums in rows:
            for (number, code), count in sums.errors.items():
                code = code.translate(_ESCAPES)
                yield f'{prefix}_errors_total{{{labels},status="{number}",code="{code}"}} {count}\n'
        for name, about in _TOKENS:
            yield from _family(f"{prefix}_{name}", "counter", f"{about}, {by}.", openmetrics)
            for labels, sums in rows:
                yield f"{prefix}_{name}_total{{{labels}}} {getattr(sums, name)}\n"
        for index, (name, about) in enumerate(_TIMINGS):
            yield from _family(f"{prefix}_{name}", "histogram", f"{about}, {by}.", openmetrics)
            yield from _histograms(
                f"{prefix}_{name}", rows, index, offset if openmetrics and exemplars else None
            )


def _family(name: str, kind: str, about: str, openmetrics: bool) -> tuple[str, str]:
    if kind == "counter" and not openmetrics:
        name += "_total"
    return f"# HELP {name} {about}\n", f"# TYPE {name} {kind}\n"


def _histograms(
    name: str, rows: list[tuple[str, RequestSums]], index: int, offset: float | None
) -> Iterator[str]:
    for labels, sums in rows:
        timings = sums.timings[index]
        counts = list(accumulate(timings.counts))
        if not counts[-1]:
            continue
        bounds = (*timings.bounds, "+Inf")
        if offset is None:
            for bound, count in zip(bounds, counts, strict=True):
                yield f'{name}_bucket{{{labels},le="{bound}"}} {count}\n'
        else:
            for bound, count, shown in zip(bounds, counts, _exemplars(timings, offset), strict=True):
                yield f'{name}_bucket{{{labels},le="{bound}"}} {count}{shown}\n'
        yield f"{name}_count{{{labels}}} {counts[-1]}\n{name}_sum{{{labels}}} {timings.total!r}\n"


def _exemplars(timings: Timings, offset: float) -> Iterator[str]:
    for exemplar in timings.exemplars:
        if exemplar is None or not _SHOWN.fullmatch(exemplar[1]):
            yield ""
        else:
            seconds, request_id, ended_at = exemplar
            yield f' # {{{_REQUEST_ID}="{request_id}"}} {seconds!r} {ended_at + offset:.3f}'
