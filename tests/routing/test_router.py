from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import pytest
import trio
from scripted_replica import Scripted
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.core import clock
from trio_cluster.core.answer import Done, Failed, Head
from trio_cluster.core.call import Call
from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.observer import Observer
from trio_cluster.core.outcome import Outcome
from trio_cluster.core.request import Request
from trio_cluster.errors import (
    ApiError,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    ShuttingDown,
    TooSlow,
    WorkerLost,
    WrongKind,
)
from trio_cluster.routing.backend import Backend
from trio_cluster.routing.catalog import NameTaken
from trio_cluster.routing.router import Router


def request(model: str = "m", kind: str = "chat") -> Request:
    return Request(endpoint="chat.completions", kind=kind, model=model, body=b"{}")  # type: ignore[arg-type]


CHAT = ModelInfo("m", "chat")


def test_a_model_that_is_added_can_be_asked() -> None:
    router, backend = Router(), Scripted("w1")
    router.catalog.add(CHAT, backend)
    call = router.open(request())
    assert backend.calls == [call]
    assert call.served_by == "w1"
    assert router.catalog.names() == ["m"]
    assert router.catalog.info("m") is CHAT
    assert router.catalog.served_by("m") == ["w1"]


def test_a_model_that_is_not_served_is_not_found_and_the_message_lists_those_that_are() -> None:
    router = Router()
    router.catalog.add(ModelInfo("b", "chat"), Scripted("w1"))
    router.catalog.add(ModelInfo("a", "chat"), Scripted("w1"))
    with pytest.raises(ModelNotFound, match="a, b") as caught:
        router.open(request("missing"))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_a_model_of_another_kind_is_a_bad_request() -> None:
    router = Router()
    router.catalog.add(CHAT, Scripted("w1"))
    with pytest.raises(WrongKind) as caught:
        router.open(request(kind="embedding"))
    assert caught.value.status == 400


def test_a_name_that_is_taken_is_refused_unless_replicas_are_wanted() -> None:
    router = Router()
    router.catalog.add(CHAT, Scripted("w1"))
    with pytest.raises(NameTaken, match="w1"):
        router.catalog.add(CHAT, Scripted("w2"))
    router.catalog.add(CHAT, Scripted("w2"), replicate=True)
    assert router.catalog.served_by("m") == ["w1", "w2"]


def test_a_replica_must_be_of_the_same_kind_and_from_another_node() -> None:
    router, backend = Router(), Scripted("w1")
    router.catalog.add(CHAT, backend)
    with pytest.raises(NameTaken, match="as chat, not embedding"):
        router.catalog.add(ModelInfo("m", "embedding"), Scripted("w2"), replicate=True)
    with pytest.raises(NameTaken, match="already serves"):
        router.catalog.add(CHAT, Scripted("w1"), replicate=True)


@pytest.mark.parametrize("any_first", [True, False])
def test_a_replica_of_kind_any_may_stand_beside_a_handler(any_first: bool) -> None:
    router, handler, upstream = Router(), Scripted("w1"), Scripted("w2")
    replicas = [(CHAT, handler), (ModelInfo("m", "any"), upstream)]
    for info, backend in replicas[::-1] if any_first else replicas:
        router.catalog.add(info, backend, replicate=True)
    catalog = router.catalog
    shown = catalog.info("m")
    assert shown is not None
    assert shown.kind == "chat"
    for _ in range(4):
        router.open(request())
    assert (len(handler.calls), len(upstream.calls)) == (2, 2)
    router.open(attrs.evolve(request(kind="embedding"), endpoint="embeddings"))
    assert len(upstream.calls) == 3, "only this one answers the route"
    assert catalog.takes_untouched("m", "chat", "chat.completions") is None
    assert catalog.takes_untouched("m", "embedding", "embeddings") is shown
    assert catalog.answers("/v1/own")
    with pytest.raises(NameTaken, match="as chat, not embedding"):
        catalog.add(ModelInfo("m", "embedding"), Scripted("w3"), replicate=True)


def test_a_model_is_shown_as_what_its_remaining_replicas_are() -> None:
    router, handler, upstream = Router(), Scripted("w1"), Scripted("w2")
    catalog = router.catalog
    catalog.add(CHAT, handler)
    catalog.add(ModelInfo("m", "any"), upstream, replicate=True)
    catalog.remove("m", handler)
    info = catalog.info("m")
    assert info is not None
    assert info.kind == "any"
    assert catalog.takes_untouched("m", "chat", "chat.completions") is info
    catalog.add(CHAT, handler, replicate=True)
    catalog.remove("m", upstream)
    info = catalog.info("m")
    assert info is not None
    assert info.kind == "chat"
    assert catalog.passthrough == set()
    with pytest.raises(WrongKind):
        router.open(attrs.evolve(request(kind="embedding"), endpoint="embeddings"))


def test_a_model_that_changes_its_kind_lets_others_try_again() -> None:
    catalog, first, tries = Router().catalog, Scripted("w1"), list[str]()
    catalog.add(CHAT, first)
    catalog.retry_when_changed("m", Scripted("w2"), lambda: tries.append("w2"))
    catalog.update(attrs.evolve(CHAT, owner="other"), first)
    assert tries == []
    catalog.update(ModelInfo("m", "embedding"), first)
    assert tries == ["w2"]


async def test_a_model_that_has_left_is_unavailable_for_two_minutes_and_then_unknown(
    autojump_clock: MockClock,
) -> None:
    router, backend = Router(), Scripted("w1")
    catalog = router.catalog
    catalog.add(CHAT, backend)
    catalog.add(CHAT, Scripted("w2"), replicate=True)
    for replica in catalog.replicas("m"):
        catalog.remove("m", replica)
    await trio.sleep(119)
    with pytest.raises(ModelUnavailable) as caught:
        router.open(request())
    assert (caught.value.status, caught.value.code) == (503, "model_unavailable")
    assert caught.value.retry_after is not None
    with pytest.raises(WrongKind):
        router.open(request(kind="embedding"))
    with pytest.raises(ModelNotFound):
        router.open(request("never"))
    await trio.sleep(2)
    with pytest.raises(ModelNotFound):
        router.open(request())
    assert not catalog.absent


async def test_a_model_that_comes_back_counts_anew(autojump_clock: MockClock) -> None:
    router, backend = Router(), Scripted("w1")
    router.catalog.add(CHAT, backend)
    router.catalog.remove("m", backend)
    await trio.sleep(100)
    router.catalog.add(CHAT, backend)
    router.open(request())
    assert not router.catalog.absent
    router.catalog.remove("m", backend)
    await trio.sleep(100)
    with pytest.raises(ModelUnavailable):
        router.open(request())


async def test_the_routes_of_a_model_that_has_left_are_still_routes(autojump_clock: MockClock) -> None:
    catalog, backend = Router().catalog, Scripted("w1")
    catalog.add(ModelInfo("m", "custom", extra_endpoints=("/v1/own",)), backend)
    catalog.remove("m", backend)
    assert catalog.answers("/v1/own")
    with pytest.raises(ModelUnavailable):
        catalog.check("m", "custom", "/v1/own")
    await trio.sleep(121)
    assert not catalog.answers("/v1/own")


OWN = ModelInfo("m", "chat", extra_endpoints=("/v1/own",))
ANY = ModelInfo("m", "any")


@pytest.mark.parametrize("left", [OWN, ANY, attrs.evolve(OWN, kind="custom")], ids=["more", "any", "custom"])
async def test_an_endpoint_whose_replicas_have_left_is_unavailable_although_the_model_is_there(
    left: ModelInfo, autojump_clock: MockClock
) -> None:
    router, gone, stays = Router(), Scripted("w1"), Scripted("w2")
    catalog = router.catalog
    catalog.add(left, gone)
    other = ModelInfo("m", "custom", extra_endpoints=("/v1/other",))
    stays_as = other if left.kind == "custom" else CHAT
    catalog.add(stays_as, stays, replicate=True)
    catalog.remove("m", gone)
    own = attrs.evolve(request(kind="custom"), endpoint="/v1/own")
    for seconds in (0, 119):
        await trio.sleep(seconds)
        assert catalog.answers("/v1/own")
        with pytest.raises(ModelUnavailable):
            catalog.check("m", "custom", "/v1/own")
        with pytest.raises(ModelUnavailable):
            router.open(own)
    await trio.sleep(2)
    assert not catalog.answers("/v1/own")
    with pytest.raises(WrongKind):
        router.open(own)
    catalog.check("m", stays_as.kind, "/v1/other")


async def test_an_endpoint_that_returns_is_not_remembered_and_one_that_does_not_is(
    autojump_clock: MockClock,
) -> None:
    catalog = Router().catalog
    backends = [Scripted("w1"), Scripted("w2")]
    infos = [OWN, attrs.evolve(OWN, extra_endpoints=("/v1/other",))]
    for info, backend in zip(infos, backends, strict=True):
        catalog.add(info, backend, replicate=True)
    for backend in backends:
        catalog.remove("m", backend)
    # As after a restart of the master: one replica is back, and the other one is not.
    catalog.add(infos[0], backends[0])
    catalog.check("m", "custom", "/v1/own")
    with pytest.raises(ModelUnavailable):
        catalog.check("m", "custom", "/v1/other")
    catalog.add(infos[1], backends[1], replicate=True)
    catalog.check("m", "custom", "/v1/other")
    assert not catalog.absent


async def test_a_replica_that_comes_and_goes_does_not_keep_alive_what_another_one_answered(
    autojump_clock: MockClock,
) -> None:
    catalog, stays, gone, flaps = Router().catalog, Scripted("w1"), Scripted("w2"), Scripted("w3")
    other = attrs.evolve(OWN, extra_endpoints=("/v1/other",))
    catalog.add(CHAT, stays)
    catalog.add(OWN, gone, replicate=True)
    catalog.remove("m", gone)
    for _ in range(3):
        await trio.sleep(41)
        catalog.add(other, flaps, replicate=True)
        catalog.remove("m", flaps)
    with pytest.raises(WrongKind):
        catalog.check("m", "custom", "/v1/own")
    with pytest.raises(ModelUnavailable):
        catalog.check("m", "custom", "/v1/other")


async def test_a_replica_of_which_others_answer_everything_leaves_no_trace() -> None:
    catalog, backends, changes = Router().catalog, [Scripted("w1"), Scripted("w2")], list[str]()
    for backend in backends:
        catalog.add(OWN, backend, replicate=True)
    catalog.on_names_changed = lambda: changes.append("changed")
    catalog.remove("m", backends[0])
    assert not catalog.absent
    assert changes == []
    catalog.update(attrs.evolve(OWN, extra_endpoints=("/v1/own", "/v1/new")), backends[1])
    assert changes == ["changed"]


async def test_names_that_are_remembered_are_bounded() -> None:
    catalog, backend = Router().catalog, Scripted("w1")
    for number in range(10_050):
        info = ModelInfo(f"m{number}", "chat", created=0)
        catalog.add(info, backend)
        catalog.remove(info.name, backend)
    assert len(list(catalog.absent)) == 10_000
    assert catalog.absent.find("m0") is None


async def test_another_run_does_not_know_what_left_in_the_one_before() -> None:
    router, backend = Router(), Scripted("w1")
    router.catalog.add(CHAT, backend)
    router.catalog.remove("m", backend)
    router.accept()
    with pytest.raises(ModelNotFound):
        router.open(request())


def test_a_node_is_ready_if_a_replica_can_be_given_calls() -> None:
    catalog, first, second = Router().catalog, Scripted("w1"), Scripted("w2")
    assert not catalog.ready()
    catalog.add(CHAT, first)
    assert catalog.ready()
    assert catalog.ready("m")
    assert not catalog.ready("other")
    first.health.stall("blocked")
    assert not catalog.ready()
    catalog.add(CHAT, second, replicate=True)
    assert catalog.ready("m")


def test_the_least_busy_replica_serves() -> None:
    router, busy, idle = Router(), Scripted("w1", load=0.5), Scripted("w2", load=0.1)
    router.catalog.add(CHAT, busy)
    router.catalog.add(CHAT, idle, replicate=True)
    for _ in range(3):
        router.open(request())
    assert (len(busy.calls), len(idle.calls)) == (0, 3)


def test_equally_busy_replicas_take_turns() -> None:
    router = Router()
    backends = [Scripted(f"w{number}") for number in range(3)]
    for backend in backends:
        router.catalog.add(CHAT, backend, replicate=True)
    for _ in range(9):
        router.open(request())
    assert [len(backend.calls) for backend in backends] == [3, 3, 3]


def test_a_replica_that_drains_gets_nothing_new() -> None:
    router, draining, staying = Router(), Scripted("w1"), Scripted("w2", load=1)
    draining.health.drain()
    router.catalog.add(CHAT, draining)
    router.catalog.add(CHAT, staying, replicate=True)
    router.open(request())
    assert len(staying.calls) == 1
    staying.health.stall("blocked")
    with pytest.raises(Overloaded):
        router.open(request())


def test_a_model_is_gone_when_its_last_replica_is() -> None:
    router, first, second = Router(), Scripted("w1"), Scripted("w2")
    router.catalog.add(CHAT, first)
    router.catalog.add(CHAT, second, replicate=True)
    assert router.catalog.remove("m", first)
    assert router.catalog.names() == ["m"]
    assert router.catalog.remove("m", second)
    assert router.catalog.names() == []
    assert not router.catalog.remove("m", second)


def test_a_draining_router_refuses_with_503() -> None:
    router = Router()
    router.catalog.add(CHAT, Scripted("w1"))
    router.drain("closing")
    with pytest.raises(ShuttingDown, match="closing"):
        router.open(request())


@pytest.mark.parametrize(
    ("end", "entry"),
    [
        (Done(), "completed"),
        (Failed(ApiError(500, "x")), "failed"),
        (Failed(ApiError(429, "x")), "failed"),
        (Failed(TooSlow("x"), timed_out=True), "timed_out"),
        (Failed(ApiError(504, "a handler's own"), timed_out=False), "failed"),
        (Failed(WorkerLost("w1", "killed")), "worker_lost"),
        (None, "cancelled"),
    ],
)
def test_every_call_is_counted_once_under_its_outcome(end: Done | Failed | None, entry: str) -> None:
    router, backend = Router(), Scripted("w1")
    router.catalog.add(CHAT, backend)
    call = router.open(request())
    stats = router.stats
    assert (stats.admitted, len(router.live)) == (1, 1)
    if end is None:
        call.cancel("client left")
    else:
        call.put(Head())
        call.put(end)
    assert len(router.live) == 1
    call.release()
    call.release()
    assert len(router.live) == 0
    outcomes = {name: value for name, value in stats.counters().items() if value}
    assert outcomes == {"admitted": 1, entry: 1}


@pytest.mark.parametrize("error", [WorkerLost("w1", "killed"), ShuttingDown()])
def test_a_call_whose_worker_went_away_is_opened_once_more_on_another_one(error: ApiError) -> None:
    router, first, second = Router(), Scripted("w1"), Scripted("w2", load=1)
    router.catalog.add(CHAT, first)
    router.catalog.add(CHAT, second, replicate=True)
    call = router.open(request())
    router.catalog.remove("m", first)
    call.put(Failed(error, retryable=True))
    call.release()
    again = router.reopen(call)
    assert again is not None
    assert again.served_by == "w2"
    assert router.stats.retried == 1


def test_a_call_is_not_opened_again_where_it_was_lost() -> None:
    router, only = Router(), Scripted("w1")
    router.catalog.add(CHAT, only)
    call = router.open(request())
    call.put(Failed(WorkerLost("w1", "killed"), retryable=True))
    assert router.reopen(call) is None


def test_a_call_is_opened_again_with_what_is_left_of_its_time_and_not_when_nothing_is() -> None:
    router = Router()
    for name in ("w1", "w2"):
        router.catalog.add(CHAT, Scripted(name), replicate=True)
    call = router.open(attrs.evolve(request(), total_timeout=10.0))
    call.put(Failed(WorkerLost("w1", "killed"), retryable=True))
    assert router.reopen(call, 0.0) is None
    assert router.stats.retried == 0
    again = router.reopen(call, 2.5)
    assert again is not None
    assert again.request.total_timeout == 2.5
    assert call.request.total_timeout == 10.0


def test_what_a_cancel_took_is_measured_until_the_work_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(clock, "now", lambda: now)
    router = Router()
    router.catalog.add(CHAT, Scripted("w1"))
    calls = [router.open(request()) for _ in range(4)]
    calls[0].put(Head())
    calls[0].put(Done())
    calls[0].release()
    for call, seconds in zip(calls[1:], (0.004, 0.006, 60.0), strict=True):
        now = 100.0
        call.cancel("enough")
        now += seconds
        call.release()
    classes = dict(
        zip(
            (*router.stats.cancel_durations.BOUNDS, math.inf),
            router.stats.cancel_durations.counts,
            strict=True,
        )
    )
    assert {bound: count for bound, count in classes.items() if count} == {0.005: 1, 0.01: 1, math.inf: 1}
    assert router.stats.cancel_durations.total == pytest.approx(60.01)


@pytest.mark.parametrize(
    "error",
    [
        ApiError(500, "x"),
        TooSlow("x"),
        Overloaded("x"),
        # What a handler may raise for reasons of its own.
        ApiError(429, "this user's quota is used up", code="shutting_down"),
        ApiError(502, "x", code="upstream_lost"),
        ApiError(404, "x", code="model_not_found"),
        WorkerLost("w1", "x"),
    ],
)
def test_a_call_that_failed_for_another_reason_is_not_opened_again(error: ApiError) -> None:
    router = Router()
    router.catalog.add(CHAT, Scripted("w1"))
    router.catalog.add(CHAT, Scripted("w2"), replicate=True)
    call = router.open(request())
    call.put(Failed(error))
    assert router.reopen(call) is None


def test_the_live_calls_of_a_request_are_found_by_its_id() -> None:
    router, backend = Router(), Scripted("w1")
    router.catalog.add(CHAT, backend)
    twin, other, again = (
        router.open(attrs.evolve(request(), request_id=each)) for each in ("twin", "other", "twin")
    )
    assert router.calls_of("twin") == [twin, again]
    assert router.calls_of("nobody") == []
    twin.cancel("enough")
    assert router.calls_of("twin") == [twin, again]
    twin.release()
    assert router.calls_of("twin") == [again]
    assert router.calls_of("other") == [other]


async def test_idle_is_when_the_work_of_every_call_has_stopped(nursery: trio.Nursery) -> None:
    router = Router()
    router.catalog.add(CHAT, Scripted("w1"))
    calls = [router.open(request()) for _ in range(2)]
    idle = trio.Event()

    async def watch() -> None:
        await router.wait_idle()
        idle.set()

    nursery.start_soon(watch)
    router.cancel_all("stop")
    calls[0].release()
    await wait_all_tasks_blocked()
    assert not idle.is_set()
    calls[1].release()
    await wait_all_tasks_blocked()
    assert idle.is_set()


def test_the_catalogue_knows_its_passthrough_models() -> None:
    router, one, two = Router(), Scripted("w1"), Scripted("w2")
    untouched = ModelInfo("raw", "any")
    router.catalog.add(CHAT, one)
    assert not router.catalog.passthrough
    router.catalog.add(untouched, one, replicate=True)
    router.catalog.add(untouched, two, replicate=True)
    router.catalog.remove("raw", one)
    assert router.catalog.passthrough
    router.catalog.remove("raw", two)
    assert not router.catalog.passthrough
    router.catalog.update(ModelInfo("m", "any"), one)
    assert router.catalog.passthrough
    router.catalog.update(CHAT, one)
    assert not router.catalog.passthrough


# What a model answers beside its kind


def test_an_update_replaces_the_description_of_a_model() -> None:
    router, backend = Router(), Scripted("w1")
    router.catalog.add(CHAT, backend)
    assert not router.catalog.answers("/v1/x")
    router.catalog.update(attrs.evolve(CHAT, extra_endpoints=("/v1/x",), owner="me"), backend)
    assert router.catalog.answers("/v1/x")
    assert (router.catalog.infos()[0].owner, router.catalog.infos()[0].extra_endpoints) == (
        "me",
        ("/v1/x",),
    )
    assert router.catalog.check("m", "custom", "/v1/x").name == "m"
    with pytest.raises(WrongKind):
        router.catalog.check("m", "custom", "/v1/y")


def test_what_any_replica_answers_the_model_answers_and_only_that_replica_is_asked() -> None:
    router, plain, more = Router(), Scripted("w1"), Scripted("w2", load=0.9)
    router.catalog.add(CHAT, plain, replicate=True)
    router.catalog.add(attrs.evolve(CHAT, extra_endpoints=("/v1/x",)), more, replicate=True)
    route = Request("/v1/x", "custom", "m", b"{}")
    assert {router.open(route).served_by for _ in range(3)} == {"w2"}
    assert router.open(request()).served_by == "w1"
    more.health.stall("blocked")
    with pytest.raises(Overloaded):
        router.open(route)
    assert router.catalog.remove("m", more)
    with pytest.raises(WrongKind):
        router.open(route)


def test_a_replica_that_does_not_answer_a_route_is_not_asked_when_another_one_is_lost() -> None:
    router, plain, more = Router(), Scripted("w1"), Scripted("w2")
    router.catalog.add(CHAT, plain, replicate=True)
    router.catalog.add(attrs.evolve(CHAT, extra_endpoints=("/v1/x",)), more, replicate=True)
    call = router.open(Request("/v1/x", "custom", "m", b"{}"))
    call.put(Failed(WorkerLost("w2", "gone")))
    assert router.reopen(call, math.inf) is None


def test_an_update_may_not_part_replicas() -> None:
    router, first, second = Router(), Scripted("w1"), Scripted("w2")
    router.catalog.add(CHAT, first, replicate=True)
    router.catalog.add(CHAT, second, replicate=True)
    with pytest.raises(NameTaken, match="as chat, not tts"):
        router.catalog.update(attrs.evolve(CHAT, kind="tts"), second)
    router.catalog.remove("m", first)
    router.catalog.update(attrs.evolve(CHAT, kind="tts"), second)
    assert router.catalog.infos()[0].kind == "tts"


def test_a_call_whose_body_has_passed_through_is_not_opened_again() -> None:
    router = Router()
    for name in ("w1", "w2"):
        router.catalog.add(CHAT, Scripted(name), replicate=True)
    call = router.open(attrs.evolve(request(), upload=ByteChannel()))
    call.put(Failed(WorkerLost(call.served_by, "gone"), retryable=True))
    assert router.reopen(call, math.inf) is None


class LastOne:
    """A policy of its own: the replica that was added last."""

    why = "it came last"

    def pick(self, replicas: Sequence[Backend], request: Request) -> Backend | None:
        return replicas[-1] if replicas else None


class Steps(Observer):
    """Records every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, ...]] = []

    def on_routed(self, call: Call, why: str) -> None:
        self.steps.append(("routed", call.served_by, why))

    def on_first_byte(self, call: Call) -> None:
        self.steps.append(("first byte", call.served_by))

    def on_retried(self, lost: Call, again: Call) -> None:
        self.steps.append(("retried", lost.served_by, again.served_by))

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        self.steps.append(("ended", call.served_by, outcome))


def test_another_policy_chooses_among_available_replicas_and_observers_get_its_reason() -> None:
    router, steps = Router(LastOne()), Steps()
    router.observers.add(steps)
    replicas = [Scripted(name) for name in ("w1", "w2", "w3")]
    for replica in replicas:
        router.catalog.add(CHAT, replica, replicate=True)
    replicas[2].health.drain()
    call = router.open(request())
    call.put(Failed(WorkerLost("w2", "killed"), retryable=True))
    call.release()
    again = router.reopen(call)
    assert again is not None
    again.put(Head())
    again.put(Done())
    again.release()
    assert steps.steps == [
        ("routed", "w2", "it came last"),
        ("ended", "w2", "worker_lost"),
        ("routed", "w1", "it came last"),
        ("retried", "w2", "w1"),
        ("first byte", "w1"),
        ("ended", "w1", "completed"),
    ]


def test_an_answer_that_begins_while_the_call_is_opened_is_observed_behind_the_choice() -> None:
    class AtOnce(Scripted):
        def open(self, request: Request) -> Call:
            call = super().open(request)
            call.put(Head())
            return call

    router, steps = Router(), Steps()
    router.observers.add(steps)
    router.catalog.add(CHAT, AtOnce("w1"))
    router.open(request())
    assert steps.steps == [("routed", "w1", "least busy"), ("first byte", "w1")]
