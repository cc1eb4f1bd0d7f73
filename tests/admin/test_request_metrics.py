"""The metrics of requests: what a played schedule did, bounds of labels, both formats, several processes."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text
from test_story import ENDINGS, attempt, cancelled, failed, story
from trio.testing import MockClock

from trio_cluster import ApiError, ChatRequest, ClusterServerOptions, OutputChunk
from trio_cluster.admin.metrics import accepts_openmetrics, metrics_reply
from trio_cluster.core import clock
from trio_cluster.core.answer import Usage
from trio_cluster.core.clock import NEVER
from trio_cluster.core.principal import Principal
from trio_cluster.core.story import StoryFacts
from trio_cluster.gateway import request_stats
from trio_cluster.gateway.auth import key_of
from trio_cluster.gateway.context import RequestContext
from trio_cluster.gateway.node_context import NodeContext
from trio_cluster.gateway.request_stats import RequestStats
from trio_cluster.gateway.story_ending import ending_of
from trio_cluster.group.messages import Response
from trio_cluster.group.metrics import RetiredCounters, merge_metrics
from trio_cluster.routing.router import Router
from trio_cluster.testing import SimulatedCluster, open_cluster, settle, worker

Values = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


class Metrics:
    """The values of one scrape."""

    def __init__(self, text: bytes, *, openmetrics: bool = False) -> None:
        self.text = text.decode()
        self.families = list((read_openmetrics if openmetrics else read_text)(self.text))
        samples = [sample for family in self.families for sample in family.samples]
        self.values: Values = {
            (sample.name, frozenset(sample.labels.items())): sample.value for sample in samples
        }
        assert len(self.values) == len(samples), "a sample is there twice"
        self.exemplars = {
            (sample.name, frozenset(sample.labels.items())): sample.exemplar
            for sample in samples
            if sample.exemplar is not None
        }

    def of(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """Return the values of a metric that have these labels, by the values of their other ones."""
        found = {}
        for (sample, its), value in self.values.items():
            rest = dict(its)
            if sample == "trio_cluster_" + name and all(rest.pop(key, None) == labels[key] for key in labels):
                found[tuple(rest[key] for key in sorted(rest))] = value
        return found

    def one(self, name: str, **labels: str) -> float:
        """Return the value of a metric with just these labels."""
        return self.of(name, **labels)[()]


async def scrape(stats: RequestStats, *, openmetrics: bool = False, to_operator: bool = True) -> Metrics:
    context = NodeContext(Router(), ClusterServerOptions())
    context.request_stats = stats
    reply = await metrics_reply(context, openmetrics=openmetrics, to_operator=to_operator)
    assert isinstance(reply.body, bytes)
    return Metrics(reply.body, openmetrics=openmetrics)


def counted(stories: Iterable[StoryFacts], **options: Any) -> RequestStats:
    stats = RequestStats(**options)
    stats.pending += stories
    return stats


# A schedule that is played


@attrs.define
class Keys:
    """An authenticator whose keys are the names of principals."""

    roles: dict[str, Any]

    async def authenticate(self, context: RequestContext) -> Principal:
        name = (key_of(context) or b"").decode()
        if name not in self.roles:
            raise ApiError(401, "unknown key", code="invalid_api_key")
        return Principal(name, role=self.roles[name])


async def answer(request: ChatRequest) -> AsyncIterator[Any]:
    """Take 0.3 s to the first of five tokens, and 0.2 s to each of the others, or what the request says."""
    if "fails" in request.last_text:
        raise ApiError(502, "broken", code="engine_broken")
    await trio.sleep(0.3)
    for number in range(5):
        if number:
            await trio.sleep(float(request.last_text))
        yield "token "
    yield OutputChunk.usage(7, 5)


@asynccontextmanager
async def played(**options: Any) -> AsyncIterator[SimulatedCluster]:
    keys = Keys({"alice": "inference", "bob": "inference", "prometheus": "operator"})
    async with open_cluster(authenticator=keys, aliases={"short": "m"}, **options) as cluster:
        cluster.master.kill()
        await cluster.master.over.wait()
        await cluster.start_master()
        back = worker("w1", max_concurrency=1)
        back.register_chat("m", answer)
        await cluster.start_worker(back)
        yield cluster
        await settle(cluster)


async def scrape_of(cluster: SimulatedCluster, key: str = "prometheus", accept: str = "") -> Metrics:
    headers = {"authorization": f"Bearer {key}", "accept": accept}
    response = await cluster.client("watcher", **headers).get("/metrics")
    assert response.status == 200
    return Metrics(response.body, openmetrics="openmetrics" in response.headers["content-type"])


def buckets(metrics: Metrics, name: str, **labels: str) -> list[str]:
    """Return the upper bounds of the buckets that something is in, each as often as there is something in it."""
    found, below = [], 0.0
    for (bound,), count in metrics.of(f"{name}_bucket", **labels).items():
        found += [bound] * int(count - below)
        below = count
    return found


@pytest.mark.parametrize("options", [{}, {"stories": 0}, {"stories": 1}], ids=["stories", "none", "one"])
async def test_a_schedule_is_counted_as_it_was_played(
    options: dict[str, Any], autojump_clock: MockClock
) -> None:
    async with played(**options) as cluster:
        alice = cluster.client(authorization="Bearer alice")
        bob = cluster.client(authorization="Bearer bob")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alice.chat, "m", "0.2")
            await trio.sleep(0.1)
            # It waits until the other one has its slot no longer, for a second.
            nursery.start_soon(bob.chat, "short", "0.5")
        assert (await bob.chat("m", "0.2", stream=False)).status == 200
        assert (await alice.chat("m", "fails")).status == 502
        assert (await alice.chat("what-a-client-chose")).status == 404
        assert (await cluster.client(authorization="Bearer eve").chat("m")).status == 401
        async with bob.open_chat("m", "9") as response:
            await response.receive_until(b"token ")
        await settle(cluster)
        metrics = await scrape_of(cluster)
        assert metrics.of("requests_total") == {
            # The model, the outcome, and the class of the status.
            ("m", "completed", "2xx"): 3,
            ("m", "failed", "5xx"): 1,
            ("m", "cancelled", "2xx"): 1,
            ("", "refused", "4xx"): 2,
        }
        assert metrics.of("request_errors_total") == {
            ("engine_broken", "m", "502"): 1,
            ("model_not_found", "", "404"): 1,
            ("invalid_api_key", "", "401"): 1,
        }
        assert metrics.of("key_requests_total", key="bob") == {
            ("completed", "2xx"): 2,
            ("cancelled", "2xx"): 1,
        }
        assert metrics.of("worker_calls_total", worker="w1") == {
            ("completed",): 3,
            ("failed",): 1,
            ("cancelled",): 1,
        }
        assert metrics.of("worker_call_errors_total") == {("engine_broken", "502", "w1"): 1}
        for labels, answers in (({"model": "m"}, 3), ({"key": "bob"}, 2), ({"worker": "w1"}, 3)):
            (label,) = labels
            prefix = {"model": "request", "key": "key_request", "worker": "worker_call"}[label]
            assert metrics.one(f"{prefix}_input_tokens_total", **labels) == 7 * answers
            assert metrics.one(f"{prefix}_output_tokens_total", **labels) == 5 * answers
            assert metrics.one(f"{prefix}_cached_tokens_total", **labels) == 0
        # Streams alone; the second has waited for a second more.
        first = "request_time_to_first_token_seconds"
        assert buckets(metrics, first, model="m") == ["0.5", "0.5", "2.5"]
        assert metrics.one(f"{first}_sum", model="m") == pytest.approx(0.3 + 1.3 + 0.3)
        between = "request_time_between_tokens_seconds"
        assert buckets(metrics, between, model="m") == ["0.2", "0.5"]
        assert metrics.one(f"{between}_sum", model="m") == pytest.approx(0.2 + 0.5)
        assert metrics.one("request_duration_seconds_sum", model="m") == pytest.approx(1.1 + 3.3 + 1.1 + 0.3)
        assert metrics.one("request_queue_seconds_sum", model="m") == pytest.approx(1.0, abs=1e-4)
        assert buckets(metrics, "request_queue_seconds", model="m") == ["0.001"] * 4 + ["1.0"]
        assert metrics.one("key_request_queue_seconds_sum", key="bob") == pytest.approx(1.0, abs=1e-4)
        assert metrics.one("worker_call_queue_seconds_sum", worker="w1") == pytest.approx(1.0, abs=1e-4)
        assert metrics.one("key_request_queue_seconds_sum", key="alice") == pytest.approx(0.0)
        # Requests that were refused have lasted, too, and have no histogram of the tokens that they did not get.
        assert metrics.one("request_duration_seconds_count", model="") == 1
        assert not metrics.of(f"{first}_count", model="")
        # Nothing of this counts twice, and what was counted stays when the worker and its model are gone.
        cluster.workers["w1"].stop()
        await cluster.workers["w1"].over.wait()
        again = await scrape_of(cluster)
        assert again.of("requests_total") == metrics.of("requests_total")
        assert again.of("worker_calls_total") == metrics.of("worker_calls_total")
        assert (await alice.chat("m")).status in (404, 503)
        assert ("m", "refused", "5xx") in (await scrape_of(cluster)).of("requests_total")


async def test_a_model_that_is_started_for_a_request_has_a_cold_start() -> None:
    waited = attempt(times={"queued": 250_000, "queued_model": 250_000, "cold": 1_500_000})
    metrics = await scrape(counted([story(waited), story(attempt())]))
    assert metrics.one("request_cold_start_seconds_count", model="m") == 1
    assert metrics.one("request_cold_start_seconds_sum", model="m") == pytest.approx(1.5)
    assert metrics.one("request_queue_seconds_count", model="m") == 2
    assert metrics.one("request_queue_seconds_sum", model="m") == pytest.approx(0.5)


async def test_a_call_that_never_got_its_slot_has_waited_all_the_same() -> None:
    facts = cancelled("client left", waiting=True, queued_at=100.2)
    metrics = await scrape(counted([story(facts, left=True, delivered=False, status=0, answered_at=NEVER)]))
    assert metrics.one("request_queue_seconds_sum", model="m") == pytest.approx(2.8)
    assert metrics.of("requests_total", model="m") == {("cancelled", "none"): 1}
    assert not metrics.of("request_errors_total")


async def test_a_retry_is_one_request_and_two_calls() -> None:
    lost = failed(503, "worker_lost", lost=True, retryable=True, node="w2", queued_for=0.5, ended_at=100.4)
    metrics = await scrape(counted([story(lost, attempt(opened_at=100.5, queued_for=0.25))]))
    assert metrics.of("requests_total") == {("m", "completed", "2xx"): 1}
    assert metrics.of("worker_calls_total") == {("worker_lost", "w2"): 1, ("completed", "w1"): 1}
    assert metrics.of("worker_call_errors_total") == {("worker_lost", "503", "w2"): 1}
    assert metrics.one("request_queue_seconds_sum", model="m") == pytest.approx(0.75)


async def test_of_a_hedge_the_attempt_that_has_lost_adds_no_waiting() -> None:
    slow = cancelled("another attempt has answered", superseded=True, node="w2", queued_for=2.0)
    metrics = await scrape(counted([story(slow, attempt())]))
    assert metrics.one("request_queue_seconds_sum", model="m") == 0
    assert metrics.one("worker_call_queue_seconds_sum", worker="w2") == pytest.approx(2.0)


@pytest.mark.parametrize("number", range(len(ENDINGS)))
async def test_the_outcome_is_the_one_of_the_story(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: 1000.0)
    facts = ENDINGS[number][0]
    if facts.ended_at < 0:
        return
    metrics = await scrape(counted([facts]))
    assert [outcome for (outcome, _) in metrics.of("key_requests_total", key="team")] == [
        ending_of(facts).outcome
    ]


# Errors


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        (story(attempt()), None),
        (story(attempt(), status=429), ("", "m", "429")),
        (story(failed(502, "broken"), error=(502, "broken", "b"), status=502), ("broken", "m", "502")),
        # In the middle of a stream, there is no other error than that of the attempt.
        (story(failed(500, "handler_failed", begun_at=101.0)), ("handler_failed", "m", "500")),
        (story(cancelled("late", overdue=True)), ("timeout", "m", "504")),
        (story(cancelled("client left"), left=True, delivered=False), None),
        (story(status=413, error=(413, "", "Too large"), model=""), ("", "", "413")),
    ],
)
async def test_errors_count_by_status_and_code(
    facts: StoryFacts, error: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "now", lambda: 1000.0)
    metrics = await scrape(counted([facts]))
    assert metrics.of("request_errors_total") == ({error: 1} if error else {})


# Bounds


async def test_labels_are_bounded_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_stats, "LABELS_MAX", 5)
    stories = [
        story(attempt(model=f"m{number}", node=f"w{number}", usage=Usage(2, 1)), key=f"k{number}")
        for number in range(20)
    ]
    metrics = await scrape(counted(stories * 2))
    for name, label in (
        ("requests_total", "model"), ("key_requests_total", "key"), ("worker_calls_total", "worker"),
    ):  # fmt: skip
        names = Counter({key: int(sum(metrics.of(name, **{label: key}).values())) for key in (
            *(f"{label[0]}{number}" for number in range(20)), "other",
        )})  # fmt: skip
        assert names == Counter({f"{label[0]}{number}": 2 for number in range(5)} | {"other": 30})
    assert metrics.one("request_input_tokens_total", model="other") == 60


async def test_names_that_clients_choose_are_no_labels() -> None:
    refused = {"status": 404, "error": (404, "model_not_found", "")}
    asked = [story(model=f"guess{number}", **refused) for number in range(1000)]
    stats = counted([*asked, story(model="served", **refused)], is_model=lambda name: name == "served")
    metrics = await scrape(stats)
    assert metrics.of("requests_total") == {("", "refused", "4xx"): 1000, ("served", "refused", "4xx"): 1}
    assert "guess" not in metrics.text


async def test_codes_are_bounded_since_handlers_choose_them() -> None:
    errors = [(500, f"c{number}", "") for number in range(request_stats.ERRORS_MAX + 10)]
    stories = [story(failed(*error), error=error, status=500) for error in errors]
    metrics = await scrape(counted(stories))
    found = metrics.of("request_errors_total", model="m")
    assert len(found) == request_stats.ERRORS_MAX + 1
    assert found["other", "500"] == 10


def test_stories_are_counted_without_a_scrape() -> None:
    context = NodeContext(Router(), ClusterServerOptions(stories=0))
    for _ in range(1000):
        ended = RequestContext([], path="/v1/chat/completions")
        context.stories.live[ended] = None
        context.stories.end(ended, left=True)
    assert len(context.request_stats.pending) < 64
    assert context.stories.over == type(context.stories.over)()


# Work that goes on after its request


async def test_what_is_known_later_is_waited_for_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 103.5
    monkeypatch.setattr(clock, "now", lambda: now)
    stopping = [story(attempt(released_at=NEVER)), story(attempt(released_at=NEVER))]
    stats = counted([story(attempt(usage=Usage(1, 1))), *stopping])
    assert (await scrape(stats)).one("requests_total", model="m", outcome="completed", status="2xx") == 1
    stopping[0].attempts[0].released_at, stopping[0].attempts[0].usage = 103.6, Usage(10, 4)
    metrics = await scrape(stats)
    assert metrics.one("requests_total", model="m", outcome="completed", status="2xx") == 2
    assert metrics.one("request_input_tokens_total", model="m") == 11
    # The handler of the other one does not stop.
    now = 103.5 + request_stats.LATE_FOR
    for _ in range(3):
        metrics = await scrape(stats)
        assert metrics.one("requests_total", model="m", outcome="completed", status="2xx") == 3


def test_those_that_are_waited_for_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: 103.5)
    stats = RequestStats()
    for _ in range(3 * request_stats.LATE_MAX):
        stats.pending.append(story(attempt(released_at=NEVER)))
        if len(stats.pending) >= 64:
            stats.count()
    models, _, _ = stats.read()
    assert sum(models["m"].ended.values()) >= 2 * request_stats.LATE_MAX - 64


# Formats


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0", True),
        # What Prometheus sends.
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
            "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,*/*;q=0.2",
            True,
        ),
        ("text/plain;version=0.0.4;q=0.9,application/openmetrics-text;q=0.5", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=much", False),
        ("application/json", False),
    ],
)
def test_openmetrics_is_given_to_those_who_prefer_it(accept: str, openmetrics: bool) -> None:
    assert accepts_openmetrics(accept) == openmetrics


def schedule() -> list[StoryFacts]:
    return [
        story(
            attempt(model=f"m{number % 3}", node=f"w{number % 2}", begun_at=100.1 + number / 7,
                    usage=Usage(10 + number, 3, number)),
            key=f"k{number % 4}", request_id=f"r{number}", streamed=True,
        )
        for number in range(20)
    ]  # fmt: skip


async def test_both_formats_have_the_same_values_and_one_has_the_ids_of_requests() -> None:
    stats = counted(schedule())
    text, openmetrics = await scrape(stats), await scrape(stats, openmetrics=True)
    uptime = ("trio_cluster_uptime_seconds", frozenset[tuple[str, str]]())
    assert {**text.values, uptime: 0} == {**openmetrics.values, uptime: 0}
    assert not text.exemplars
    assert "request_id" not in text.text
    exemplars = {
        dict(labels)["le"]: exemplar
        for (name, labels), exemplar in openmetrics.exemplars.items()
        if name == "trio_cluster_request_time_to_first_token_seconds_bucket" and ("model", "m1") in labels
    }
    # The last of each bucket, of r1, r4, r7, r10, r13, r16 and r19.
    assert {bound: exemplar.labels for bound, exemplar in exemplars.items()} == {
        "0.25": {"request_id": "r1"},
        "0.75": {"request_id": "r4"},
        "2.5": {"request_id": "r16"},
        "5.0": {"request_id": "r19"},
    }
    assert exemplars["0.75"].value == pytest.approx(0.1 + 4 / 7)
    assert float(exemplars["0.75"].timestamp) == pytest.approx(time.time() - clock.now() + 103.0, abs=5)


@pytest.mark.parametrize(
    ("request_id", "shown"),
    [
        ("req_a-1.b:c/d@e+f=g~", True),
        ("x" * 118, True),
        ("x" * 119, False),
        ('a"b\\c', False),
        ("a # {}", False),
    ],
)
async def test_an_id_that_does_not_fit_into_an_exemplar_is_left_out(request_id: str, shown: bool) -> None:
    metrics = await scrape(counted([story(attempt(), request_id=request_id)]), openmetrics=True)
    found = {exemplar.labels["request_id"] for exemplar in metrics.exemplars.values()}
    assert found == ({request_id} if shown else set())


async def test_names_are_escaped() -> None:
    name = 'a"b\\c\nd # {e} f'
    metrics = await scrape(counted([story(attempt(model=name, node=name), key=name)]), openmetrics=True)
    assert metrics.of("requests_total", model=name) == {("completed", "2xx"): 1}
    merged = Metrics(merge_metrics([metrics.text.encode()] * 2, openmetrics=True), openmetrics=True)
    assert merged.of("requests_total", model=name) == {("completed", "2xx"): 2}


# Who may see what


async def test_the_names_of_keys_and_the_ids_of_requests_are_for_operators(autojump_clock: MockClock) -> None:
    async with played() as cluster:
        await cluster.client(authorization="Bearer alice").chat("m", "0.2")
        for key, accept in itertools.product(("alice", "wrong"), ("", "application/openmetrics-text")):
            metrics = await scrape_of(cluster, key, accept)
            assert not metrics.exemplars
            assert metrics.of("requests_total")
            assert "alice" not in metrics.text
            assert not metrics.of("key_requests_total")
        assert (await scrape_of(cluster)).of("key_requests_total", key="alice") == {("completed", "2xx"): 1}
        with_exemplars = await scrape_of(cluster, accept="application/openmetrics-text")
        assert with_exemplars.exemplars


async def test_where_no_key_is_required_all_is_shown(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        await cluster.client().chat("m")
        metrics = Metrics((await cluster.client().get("/metrics")).body)
        assert metrics.of("key_requests_total", key="") == {("refused", "4xx"): 1}


# Several processes


@pytest.mark.parametrize("openmetrics", [False, True])
async def test_the_metrics_of_processes_are_added_up_for_each_label(openmetrics: bool) -> None:
    stories = schedule()
    parts = [await scrape(counted(stories[part::3]), openmetrics=openmetrics) for part in range(3)]
    whole = await scrape(counted(stories), openmetrics=openmetrics)
    merged = Metrics(
        merge_metrics([part.text.encode() for part in parts], openmetrics=openmetrics),
        openmetrics=openmetrics,
    )
    uptime = ("trio_cluster_uptime_seconds", frozenset[tuple[str, str]]())
    approximately = pytest.approx({**whole.values, uptime: 0})
    assert {**merged.values, uptime: 0} == approximately
    # The later one of two exemplars, and none in the format that has none.
    assert bool(merged.exemplars) == openmetrics
    types = {family.name: family.type for family in whole.families}
    assert {family.name: family.type for family in merged.families} == types


async def test_what_a_process_has_counted_stays_in_either_format_when_it_ends() -> None:
    one, other = (await scrape(counted(schedule()), openmetrics=which) for which in (True, False)), None
    texts = [part.text.encode() async for part in one]
    assert other is None
    retired = RetiredCounters()
    retired.note({number: Response(200, [], text) for number, text in enumerate(texts)})
    before = Metrics(merge_metrics(texts))
    retired.retire(1)
    after = Metrics(merge_metrics(texts[:1], retired.text({0: Response(200, [], texts[0])})))
    for name in ("requests_total", "request_duration_seconds_bucket", "worker_call_queue_seconds_sum"):
        assert after.of(name) == before.of(name) != {}


async def test_what_a_client_may_not_see_is_left_out_after_all_was_added_up() -> None:
    text = (await scrape(counted(schedule()), openmetrics=True)).text.encode()
    hidden = merge_metrics([text], text, openmetrics=True, hidden="trio_cluster_key_")
    merged = Metrics(hidden, openmetrics=True)
    assert not merged.exemplars
    assert not merged.of("key_requests_total")
    assert not [family for family in merged.families if family.name.startswith("trio_cluster_key_")]
    assert sum(merged.of("requests_total").values()) == 40
