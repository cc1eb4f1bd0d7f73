"""Replicas that keep failing, or are stuck, are left alone for a while, and are tried again."""

from __future__ import annotations

import email.utils
import gc
import math
import time
import weakref
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

from trio_cluster import ApiError, ChatRequest
from trio_cluster.core.answer import Data, Done, Event, Failed, Head
from trio_cluster.core.call import Call
from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.outcome import outcome_of
from trio_cluster.core.request import Request
from trio_cluster.errors import HandlerFailed, LoopDetected, Overloaded, ShuttingDown, TooSlow, WorkerLost
from trio_cluster.options import ClusterServerOptions
from trio_cluster.routing.ejection import WINDOW, EjectionTable, Verdict, judge
from trio_cluster.routing.health import Health
from trio_cluster.routing.router import Router
from trio_cluster.testing import SimulatedCluster, open_cluster, settle, worker

REQUEST = Request(endpoint="chat.completions", kind="chat", model="m", body=b"{}")
T = ClusterServerOptions().server.default_timeout
LOST = WorkerLost("w1", "killed")
LATE = TooSlow("silent")


def ended(*events: Event, request: Request = REQUEST, cancelled: str = "", queued: bool = False) -> Call:
    call = Call(request, served_by="w1")
    for event in events:
        call.put(event)
    call.set_queued(queued)
    if cancelled == "overdue":
        call.expire("silent")
    elif cancelled:
        call.cancel(cancelled)
    return call


def limited(**limits: float) -> Request:
    return attrs.evolve(REQUEST, **limits)


def uploading() -> Request:
    return attrs.evolve(REQUEST, upload=ByteChannel())


FAILED, ANSWERED, NOTHING = "failed", "answered", None


@pytest.mark.parametrize(
    ("call", "judgement"),
    [
        pytest.param(ended(Head(), Data(b"x"), Done()), ANSWERED, id="an answer"),
        pytest.param(ended(Head(404), Done()), ANSWERED, id="an upstream's refusal"),
        pytest.param(ended(Failed(ApiError(429, "slow down", retry_after=9))), ANSWERED, id="429"),
        pytest.param(ended(Failed(ApiError(400, "no"))), ANSWERED, id="a refusal"),
        pytest.param(ended(Head(500), Done()), FAILED, id="an upstream's error"),
        pytest.param(ended(Failed(HandlerFailed())), FAILED, id="a handler that raises"),
        pytest.param(ended(Head(), Data(b"x"), Failed(HandlerFailed())), FAILED, id="fails in mid-stream"),
        pytest.param(ended(Failed(LOST, retryable=True)), "lost", id="a lost worker"),
        pytest.param(ended(Failed(Overloaded("busy"))), NOTHING, id="a busy node"),
        pytest.param(ended(Failed(ShuttingDown(), retryable=True)), NOTHING, id="a node that drains"),
        pytest.param(ended(Failed(LoopDetected("m"))), NOTHING, id="a circle"),
        pytest.param(ended(cancelled="client left"), NOTHING, id="a client that left"),
        pytest.param(ended(Head(), cancelled="client left"), NOTHING, id="a client that left in mid-stream"),
        pytest.param(ended(cancelled="overdue"), "silent", id="noticed by the master"),
        pytest.param(ended(Failed(LATE, timed_out=True)), "silent", id="noticed by its node"),
        pytest.param(
            ended(Failed(LATE, timed_out=True), request=limited(idle_timeout=1.0)),
            NOTHING,
            id="an impatient client",
        ),
        pytest.param(
            ended(cancelled="overdue", request=limited(total_timeout=1.0)), NOTHING, id="a client in a hurry"
        ),
        pytest.param(
            ended(cancelled="overdue", request=limited(total_timeout=2 * T)),
            "silent",
            id="silent for longer than T",
        ),
        pytest.param(
            ended(Head(), Failed(LATE, timed_out=True), request=limited(total_timeout=2 * T)),
            NOTHING,
            id="a client whose time was over in mid-stream",
        ),
        pytest.param(ended(cancelled="overdue", queued=True), NOTHING, id="waits for a slot"),
        pytest.param(
            ended(cancelled="overdue", request=uploading()), NOTHING, id="a client that sends no body"
        ),
    ],
)
def test_what_the_end_of_a_call_says_about_its_replica(call: Call, judgement: str | None) -> None:
    verdict = judge(call, outcome_of(call), T)
    assert (None if verdict is None else verdict.judgement) == judgement


@pytest.mark.parametrize(
    ("said", "seconds"), [("7", 7.0), ("0.5", 0.5), ("soon", 0.0), ("-3", 0.0), ("nan", 0.0), ("", 0.0)]
)
def test_a_server_says_when_it_is_back(said: str, seconds: float) -> None:
    call = ended(Head(503, headers=(("Retry-After", said),)), Done())
    verdict = judge(call, outcome_of(call), T)
    assert verdict is not None
    assert verdict.retry_after == seconds


def test_a_server_says_on_which_date_it_is_back() -> None:
    call = ended(
        Head(503, headers=(("retry-after", email.utils.formatdate(time.time() + 100, usegmt=True)),)), Done()
    )
    verdict = judge(call, outcome_of(call), T)
    assert verdict is not None
    assert 95 < verdict.retry_after <= 100


# The table

ERROR = Verdict("failed", "status 500")
KEY = ("w1", "m")


def table(**options: Any) -> EjectionTable:
    return EjectionTable(ClusterServerOptions(**options))


def fail(
    one: EjectionTable, now: float, *, times: int = 1, others: tuple[str, ...] = ("w2",)
) -> float | None:
    """Fail so often, and return when the replica is tried if it is left alone."""
    until = None
    for _ in range(times):
        ejection = one.failed(KEY, ERROR, now, others)
        until = None if ejection is None else ejection.until
    return until


def test_failures_in_a_row_eject_and_an_answer_between_them_does_not() -> None:
    one = table()
    assert fail(one, 0.0, times=4) is None
    for _ in range(20):
        one.answered(KEY, 1.0)
    assert fail(one, 2.0, times=4) is None
    assert fail(one, 3.0) == 8.0
    assert one.ejected[KEY].reason == "status 500, 5 in a row"


def test_half_of_the_calls_eject() -> None:
    one = table()
    for second in range(4):
        assert fail(one, float(second)) is None
        one.answered(KEY, second + 0.5)
    assert fail(one, 4.0) is not None


def test_a_third_of_the_calls_does_not_eject() -> None:
    one = table()
    for second in range(50):
        assert fail(one, float(second)) is None
        for _ in range(2):
            one.answered(KEY, second + 0.5)


def test_failures_long_ago_do_not_count() -> None:
    one = table()
    for number in range(20):
        assert fail(one, number * (WINDOW + 2 * T + 1)) is None


def test_two_silences_eject() -> None:
    one = table()
    assert one.failed(KEY, Verdict("silent"), 0.0, ["w2"]) is None
    assert one.failed(KEY, Verdict("silent"), T + 2.0, ["w2"]) is not None


def test_calls_that_are_lost_together_count_once() -> None:
    one = table()
    for second in range(5):
        ejections = [
            one.failed(KEY, Verdict("lost"), second * 2.0 + call / 100, ["w2"]) for call in range(10)
        ]
        assert any(ejections) is (second == 4)


def test_the_back_off_doubles_up_to_its_bound_and_begins_anew_after_a_while() -> None:
    one, now = table(), 0.0
    assert fail(one, now, times=5) == 5.0
    for seconds in (10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0):
        now = one.ejected[KEY].until or 0.0
        call = Call(REQUEST)
        assert one.due(KEY, now)
        one.try_with(KEY, call)
        assert not one.due(KEY, now)
        ejection = one.failed(KEY, ERROR, now, ["w2"], call)
        assert ejection is not None
        assert ejection.seconds == seconds
    now += 300.0
    one.try_with(KEY, call)
    assert one.answered(KEY, now, call)
    one.answered(KEY, now + 301.0)
    assert not one.records
    assert fail(one, now + 302.0, times=5) == now + 307.0


def test_a_server_is_left_alone_for_as_long_as_it_says_and_no_longer_than_the_bound() -> None:
    for after, seconds in ((0.5, 0.5), (17.0, 17.0), (math.inf, 300.0)):
        ejection = table().failed(KEY, Verdict("failed", "status 503", after), 0.0, ["w2"])
        assert ejection is not None
        assert ejection.seconds == seconds


def test_a_probe_whose_client_leaves_is_followed_by_another_one() -> None:
    one = table()
    fail(one, 0.0, times=5)
    call = Call(REQUEST)
    one.try_with(KEY, call)
    one.ended_without_verdict(KEY, call)
    assert one.due(KEY, 5.0)


def test_what_was_opened_before_neither_prolongs_an_ejection_nor_ends_it() -> None:
    one = table()
    fail(one, 0.0, times=5)
    assert fail(one, 1.0, times=5) is None
    assert not one.answered(KEY, 2.0, Call(REQUEST))
    assert one.ejected[KEY].until == 5.0


def test_an_answer_that_begins_and_then_fails_ejects_again() -> None:
    one, call = table(), Call(REQUEST)
    fail(one, 0.0, times=5)
    one.try_with(KEY, call)
    one.readmit(KEY, 5.0)
    assert not one.ejected
    ejection = one.failed(KEY, ERROR, 6.0, ["w2"], call)
    assert ejection is not None
    assert ejection.seconds == 10.0


@pytest.mark.parametrize(
    ("others", "already", "share", "ejected"),
    [
        ([], [], 1.0, False),
        (["w2"], [], 0.5, True),
        (["w2"], [], 0.4, False),
        (["w2"], ["w2"], 1.0, False),
        (["w2", "w3"], ["w2"], 0.5, False),
        (["w2", "w3", "w4"], ["w2"], 0.5, True),
        (["w2", "w3", "w4"], ["w2", "w3"], 0.5, False),
        (["w2", "w3", "w4"], ["w2", "w3"], 0.75, True),
        (["w2", "w3", "w4"], ["w2", "w3", "w4"], 1.0, False),
    ],
)
def test_a_part_of_the_replicas_stays(
    others: list[str], already: list[str], share: float, ejected: bool
) -> None:
    one = table(ejection_share=1.0)
    for name in already:
        for _ in range(5):
            one.failed((name, "m"), ERROR, 0.0, ["x", "y", "z", "a"])
    assert len(one.ejected) == len(already)
    one.options.ejection_share = share
    assert (fail(one, 0.0, times=5, others=tuple(others)) is not None) is ejected


def test_it_can_be_switched_off() -> None:
    one = table(ejection_failures=0)
    assert fail(one, 0.0, times=100) is None
    assert not one.records


def test_what_is_kept_is_bounded() -> None:
    one = table()
    for number in range(10_500):
        one.failed((f"w{number}", "m"), ERROR, 0.0, ["w2"])
    assert len(one.records) == 10_000


# The router


class WatchedCall(Call):
    """A call of which a test can see whether it is kept: others can have no weak references."""


@attrs.define(eq=False)
class Scripted:
    name: str
    load: float = 0.0
    health: Health = attrs.field(factory=Health)

    def open(self, request: Request) -> Call:
        return WatchedCall(request, served_by=self.name)


def routers(count: int, **options: Any) -> tuple[Router, list[Scripted]]:
    router = Router(options=ClusterServerOptions(**options))
    replicas = [Scripted(f"w{number}") for number in range(1, count + 1)]
    for replica in replicas:
        router.catalog.add(ModelInfo("m", "chat"), replica, replicate=True)
    return router, replicas


def finish(call: Call, error: ApiError | None = None) -> None:
    if error is None:
        call.put(Head())
        call.put(Done())
    else:
        call.put(Failed(error))
    call.release()


def eject(router: Router, name: str) -> None:
    for _ in range(20):
        if (name, "m") in router.ejections.ejected:
            return
        call = router.open(REQUEST)
        finish(call, HandlerFailed() if call.served_by == name else None)
    raise AssertionError


async def test_one_live_request_tries_a_replica_when_its_time_is_over(autojump_clock: MockClock) -> None:
    router, _ = routers(2)
    eject(router, "w1")
    assert [(each.node, each.model, each.seconds) for each in router.ejections.status()] == [("w1", "m", 5.0)]
    for _ in range(10):
        assert router.open(REQUEST).served_by == "w2"
    await trio.sleep(5)
    # Neither a request whose body cannot be sent again, nor one that has failed elsewhere.
    for request in (attrs.evolve(REQUEST, retried=True), attrs.evolve(REQUEST, upload=ByteChannel())):
        assert router.open(request).served_by == "w2"
    probe = router.open(REQUEST)
    assert probe.served_by == "w1"
    for _ in range(10):
        assert router.open(REQUEST).served_by == "w2"
    probe.put(Head())
    assert not router.ejections.ejected
    assert {router.open(REQUEST).served_by for _ in range(2)} == {"w1", "w2"}
    assert router.observers.first_byte == ()


async def test_the_only_one_that_is_left_gets_requests_although_it_fails(autojump_clock: MockClock) -> None:
    router, replicas = routers(2)
    eject(router, "w1")
    replicas[1].health.stall("blocked")
    assert router.open(REQUEST).served_by == "w1"
    assert router.ejections.status() == []
    router.catalog.remove("m", replicas[1])
    for _ in range(30):
        call = router.open(REQUEST)
        assert call.served_by == "w1"
        finish(call, HandlerFailed())


async def test_a_worker_that_dies_of_requests_is_known_when_it_returns(autojump_clock: MockClock) -> None:
    router, replicas = routers(2)
    for _ in range(5):
        await trio.sleep(1)
        # It is the least recently used one, since it has just returned.
        call = next(call for call in (router.open(REQUEST), router.open(REQUEST)) if call.served_by == "w1")
        router.catalog.remove("m", replicas[0])
        finish(call, LOST)
        router.catalog.add(ModelInfo("m", "chat"), replicas[0], replicate=True)
    assert [each.node for each in router.ejections.status()] == ["w1"]


async def test_another_run_forgets_all(autojump_clock: MockClock) -> None:
    router, _ = routers(2)
    eject(router, "w1")
    router.accept()
    assert not router.ejections.ejected
    assert not router.ejections.table.records


async def test_nothing_is_kept_while_nothing_fails(autojump_clock: MockClock) -> None:
    router, _ = routers(2)
    for _ in range(10):
        finish(router.open(REQUEST))
        finish(router.open(REQUEST), ApiError(400, "no"))
        router.open(REQUEST).cancel("client left")
    assert not router.ejections.table.records


async def test_nothing_is_kept_of_a_call_that_was_over_before_it_replaced_another_one(
    autojump_clock: MockClock,
) -> None:
    """A second attempt may end before the task runs that learns of its answer; the first one was lost before."""
    router, _ = routers(2)
    for is_over in (False, True):
        lost, again = router.open(REQUEST), router.open(REQUEST)
        finish(lost, LOST)
        if is_over:
            finish(again)
        router.tell_replaced(lost, again)
        if not is_over:
            finish(again)
        kept = weakref.ref(again)
        del lost, again
        gc.collect()
        assert kept() is None


#: What a client can do to a call.
CLIENT_FAULTS = st.sampled_from(["leaves", "hurries", "is refused", "waits too long", "uploads nothing"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["fail", "answer", "client", "silent", "lost", "sleep", "stall", "recover"]),
        st.integers(0, 3),
        CLIENT_FAULTS,
    ),
    max_size=60,
)


@given(replicas=st.integers(1, 4), steps=STEPS, share=st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None, max_examples=150)
def test_never_are_all_left_alone_and_each_is_tried_when_its_time_is_over(
    replicas: int, steps: list[tuple[str, int, str]], share: float
) -> None:
    async def main() -> None:
        router, nodes = routers(replicas, ejection_share=share)
        guilty: set[str] = set()
        for step, number, what in steps:
            node = nodes[number % replicas]
            available = [each for each in nodes if each.health.available]
            if step == "sleep":
                await trio.sleep([0.1, 2.0, 20.0, 400.0][number])
            elif step == "stall":
                node.health.stall("blocked")
            elif step == "recover":
                node.health.stall("")
            elif available:
                call = router.open(client_request(what) if step == "client" else REQUEST)
                due = [
                    each.name
                    for each in available
                    if (record := router.ejections.ejected.get((each.name, "m"))) is not None
                    and record.until is not None
                    and record.until <= trio.current_time()
                ]
                well = [each for each in available if (each.name, "m") not in router.ejections.ejected]
                if due and well and call.request.replayable:
                    assert call.served_by in due, "one whose time is over is tried by the next request"
                elif well:
                    assert (call.served_by, "m") not in router.ejections.ejected
                if step == "client":
                    end_by_client(call, what)
                elif step == "answer":
                    finish(call)
                else:
                    guilty.add(call.served_by)
                    finish_badly(call, step)
            ejected = {name for name, _ in router.ejections.ejected}
            assert ejected <= guilty, "clients have ejected a replica"
            assert not ejected or len(ejected) < replicas, "all are left alone"
            if any(each.health.available for each in nodes):
                # Nobody is refused because of an ejection.
                router.open(REQUEST).cancel("client left")
                for call in list(router.live):
                    call.release()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def client_request(what: str) -> Request:
    return {
        "hurries": attrs.evolve(REQUEST, total_timeout=0.1),
        "waits too long": attrs.evolve(REQUEST, idle_timeout=1.0),
        "uploads nothing": attrs.evolve(REQUEST, upload=ByteChannel()),
    }.get(what, REQUEST)


def end_by_client(call: Call, what: str) -> None:
    if what == "leaves":
        call.cancel("client left")
    elif what == "is refused":
        call.put(Failed(ApiError(422, "no")))
    elif what == "waits too long":
        call.put(Failed(LATE, timed_out=True))
    else:
        call.expire("late")
    call.release()


def finish_badly(call: Call, step: str) -> None:
    if step == "silent":
        call.expire("late")
        call.release()
    else:
        finish(call, LOST if step == "lost" else HandlerFailed())


# A cluster


async def start(cluster: SimulatedCluster, name: str, handler: Any) -> None:
    node = worker(name, on_conflict="replicate")
    node.register_chat("m", handler)
    await cluster.start_worker(node)


async def well(request: ChatRequest) -> str:
    await trio.sleep(0.1)
    return "well"


class Ill:
    """A handler that fails, or hangs, until it is well."""

    def __init__(self, *, hangs: bool) -> None:
        self.hangs, self.recovered, self.runs = hangs, trio.Event(), 0

    async def answer(self, request: ChatRequest) -> str:
        self.runs += 1
        if self.recovered.is_set():
            return "well"
        if self.hangs:
            # It cannot even be cancelled.
            with trio.CancelScope(shield=True):
                await self.recovered.wait()
        raise ValueError


async def test_a_replica_is_not_blamed_for_the_silence_of_the_one_before_it(
    autojump_clock: MockClock,
) -> None:
    async def hang(request: ChatRequest) -> str:
        await trio.sleep_forever()
        raise AssertionError

    async with open_cluster(default_timeout=3.0, resume_window=0.0, on_conflict="replicate") as cluster:
        for name in ("w1", "w2"):
            await start(cluster, name, hang)
        router = cluster.master.server.router
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(cluster.client().chat, "m"))
            await trio.sleep(2.5)
            (call,) = router.live
            first, second = call.served_by, {"w1": "w2", "w2": "w1"}[call.served_by]
            cluster.workers[first].link.reset()
        # The client's time was over after five seconds, of which the second replica had half.
        assert trio.current_time() < 5.2
        await settle(cluster)
        assert router.stats.counters()["worker_lost"] == router.stats.counters()["retried"] == 1
        assert set(router.ejections.table.records) == {(first, "m")}
        assert second in cluster.workers


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "is stuck"])
async def test_a_replica_is_left_alone_and_returns(cluster: SimulatedCluster, hangs: bool) -> None:
    ill = Ill(hangs=hangs)
    cluster.master.server.options.on_conflict = "replicate"
    await start(cluster, "ill", ill.answer)
    await start(cluster, "well", well)
    client = cluster.client()
    statuses: list[int] = []

    async def ask() -> int:
        answer = await client.post(
            "/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        )
        statuses.append(answer.status)
        return answer.status

    while not (shown := (await client.get("/cluster/status")).json()["ejected"]):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(ask)
    failures = [status for status in statuses if status != 200]
    # Those in a row, and one that it had besides.
    assert len(failures) <= 6
    assert shown[0] | {"until": "", "seconds": 0} == {
        "node": "ill",
        "model": "m",
        "reason": "timed out, 2 in a row" if hangs else "status 500, handler_failed, 5 in a row",
        "until": "",
        "seconds": 0,
    }
    status = (await client.get("/cluster/status")).json()
    assert {each["id"]: bool(each["ejected"]) for each in status["workers"]} == {"ill": True, "well": False}
    metrics = (await client.get("/metrics")).body.decode()
    assert 'trio_cluster_worker_ejected{worker="ill"} 1.0' in metrics
    assert "trio_cluster_ejections_total 1.0" in metrics
    runs = ill.runs
    for _ in range(20):
        assert await ask() == 200
    assert ill.runs == runs
    ill.recovered.set()
    await trio.sleep(5)
    for _ in range(4):
        assert await ask() == 200
    assert ill.runs > runs
    assert (await client.get("/cluster/status")).json()["ejected"] == []
