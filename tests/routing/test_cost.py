"""The policy ``cost``, with the real router: where requests go, and what is learned from their answers."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter

import attrs
import pytest

from trio_cluster.core.answer import Done, Failed, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.model import ChatModelOptions, ModelInfo
from trio_cluster.core.model_state import ModelState, ModelWait
from trio_cluster.core.request import Request
from trio_cluster.errors import HandlerFailed
from trio_cluster.routing import cost as cost_module
from trio_cluster.routing.cost import LeastCost, Placement
from trio_cluster.routing.health import Health
from trio_cluster.routing.prompt import Prompt
from trio_cluster.routing.router import Router

ANSWER = Usage(prompt_tokens=1000, completion_tokens=100)


@attrs.define(eq=False)
class Replica:
    """A backend whose calls do what the test says."""

    name: str
    capacity: int = 4
    elsewhere: int = 0
    health: Health = attrs.field(factory=Health)
    calls: list[Call] = attrs.field(factory=list)

    @property
    def load(self) -> float:
        return sum(not call.released for call in self.calls) / self.capacity

    def open(self, request: Request) -> Call:
        call = Call(request, served_by=self.name)
        self.calls.append(call)
        return call


class Master:
    """A router with replicas of one model, and a clock."""

    def __init__(self, *names: str, cache_tokens: int | None = None) -> None:
        self.now = 1000.0
        self.router = Router()
        self.policy = LeastCost(self.router.catalog.cache_tokens, clock=lambda: self.now)
        self.router.policy = self.policy
        self.info = ModelInfo("m", "chat", options=ChatModelOptions(cache_tokens=cache_tokens))
        for name in names:
            self.add(Replica(name))

    def add(self, replica: Replica) -> Replica:
        self.router.catalog.add(self.info, replica, replicate=True)
        return replica

    def ask(self, text: str = "", *, conversation: str = "", max_tokens: int = 0) -> Call:
        body = json.dumps({"model": "m", "messages": text}).encode()
        headers = {"session-id": conversation} if conversation else {}
        return self.router.open(
            Request("chat.completions", "chat", "m", body, headers=headers, max_tokens=max_tokens)
        )

    def answer(
        self, call: Call, *, reading: float = 0.0, saying: float = 1.0, usage: Usage | None = ANSWER
    ) -> None:
        """Answer a call, which takes so many seconds."""
        self.now += reading
        call.put(Head())
        self.now += saying
        call.put(Done(usage))
        call.release()

    def placement(self, call: Call) -> Placement:
        assert isinstance(call.tracker, Placement)
        return call.tracker


@pytest.fixture
def pair() -> Master:
    return Master("w1", "w2")


def test_equal_replicas_take_turns(pair: Master) -> None:
    served = []
    for _ in range(4):
        call = pair.ask()
        pair.answer(call)
        served.append(call.served_by)
    assert served == ["w1", "w2", "w1", "w2"]


def test_requests_at_once_are_spread(pair: Master) -> None:
    assert Counter(pair.ask("x" * number).served_by for number in range(8)) == {"w1": 4, "w2": 4}


def test_a_conversation_stays_where_its_cache_is(pair: Master) -> None:
    text = "begin" * 1000
    first = pair.ask(text)
    pair.answer(first)
    for turn in range(6):
        pair.answer(pair.ask(f"{turn} something else, for a while"))
        text += f"turn {turn} " * 100
        call = pair.ask(text)
        assert call.served_by == first.served_by
        assert pair.placement(call).cached > 0.8 * (len(text) - 1000)
        pair.answer(call)


def test_it_leaves_when_waiting_costs_more_than_reading_again(pair: Master) -> None:
    text = "begin" * 4000
    first = pair.ask(text)
    pair.answer(first, reading=1.0)
    served = [pair.ask(text + str(number)).served_by for number in range(4)]
    # Reading it costs a second, and each answer another one: two wait, and the third is better off elsewhere.
    assert served[0] == first.served_by
    assert set(served) == {"w1", "w2"}


def test_a_prompt_that_all_have_in_common_is_read_by_more_replicas_as_the_load_needs_it() -> None:
    master = Master("w1", "w2", "w3", "w4")
    system = "You are helpful. " * 500
    master.answer(master.ask(system), reading=0.4, saying=0.1, usage=Usage(2000, 10))
    used = set()
    for number in range(20):
        call = master.ask(system + f"question {number}")
        used.add(call.served_by)
        master.answer(call, reading=0.02, saying=0.1, usage=Usage(2000, 10, cached_tokens=1900))
    assert len(used) == 1
    served = Counter(master.ask(system + f"question {number}").served_by for number in range(40))
    assert len(served) == 4
    assert max(served.values()) <= 16


def test_siblings_in_a_burst_go_together_although_none_has_filled_the_cache(pair: Master) -> None:
    for _ in range(6):
        pair.answer(pair.ask("warm up"), reading=0.1, saying=0.1, usage=Usage(100, 10))
    siblings = [pair.ask("new beginning " * 3000 + str(number)) for number in range(3)]
    assert len({call.served_by for call in siblings}) == 1
    assert pair.placement(siblings[2]).cached > 40_000


def test_a_slow_machine_gets_less() -> None:
    master = Master("fast", "slow")
    served: Counter[str] = Counter()
    running: list[tuple[float, Call]] = []
    speed = {"fast": 1.0, "slow": 3.0}
    free_at = {"fast": master.now, "slow": master.now}
    for number in range(120):
        call = master.ask(f"{number} " * 300)
        served[call.served_by] += 1
        begins = max(master.now, free_at[call.served_by])
        free_at[call.served_by] = begins + speed[call.served_by]
        running.append((free_at[call.served_by], call))
        master.now += 0.8
        for end, each in [
            pair for pair in sorted(running, key=lambda pair: pair[0]) if pair[0] <= master.now
        ]:
            running.remove((end, each))
            now, master.now = master.now, end
            master.answer(each, saying=0.0)
            master.now = now
    assert served["fast"] > 2 * served["slow"]
    assert served["slow"] > 10


def test_a_replica_that_was_slow_once_is_tried_again(pair: Master) -> None:
    slow = pair.ask("x" * 2000)
    pair.answer(slow, reading=30.0)
    other = pair.ask("y" * 2000)
    assert other.served_by != slow.served_by
    pair.answer(other, reading=0.1)
    for _ in range(3):
        call = pair.ask("z" * 2000)
        assert call.served_by == other.served_by
        pair.answer(call, reading=0.1)
    pair.now += 1200
    served = set()
    for number in range(2):
        call = pair.ask(f"{number} " * 900)
        served.add(call.served_by)
        pair.answer(call, reading=0.1)
    assert served == {"w1", "w2"}


def test_what_is_reported_corrects_what_is_expected(pair: Master) -> None:
    text = "t" * 30_000
    first = pair.ask(text)
    pair.answer(first, usage=Usage(7500, 10, cached_tokens=100))
    for _ in range(40):
        call = pair.ask(text)
        pair.answer(call, usage=Usage(7500, 10))
    counts = pair.policy.counts["m"]
    assert counts.total == 7500 * 41
    assert counts.reported == 100
    assert 0 < counts.predicted < counts.total
    # Its cache holds far less than it was believed to.
    assert pair.placement(pair.ask(text)).cached <= 16 * 1024


def test_a_server_that_reports_no_cached_tokens_is_believed_to_have_a_cache(pair: Master) -> None:
    text = "t" * 30_000
    for _ in range(20):
        pair.answer(pair.ask(text), usage=Usage(7500, 10))
    assert pair.placement(pair.ask(text)).cached > 28_000
    assert pair.policy.counts["m"].total == 0


def test_a_worker_that_was_restarted_has_nothing_cached_and_is_forgotten(pair: Master) -> None:
    text = "t" * 30_000
    first = pair.ask(text)
    pair.answer(first)
    for replica in pair.router.catalog.replicas("m"):
        pair.router.catalog.remove("m", replica)
        again = pair.add(Replica(replica.name))
        del replica
        assert again.calls == []
    call = pair.ask(text)
    assert {cached for _, _, cached in pair.placement(call).candidates} == {0}
    del first, call, again
    gc.collect()
    assert len(pair.policy._workloads) == 2


def test_a_named_conversation_stays_even_if_its_text_does_not_tell(pair: Master) -> None:
    first = pair.ask("long " * 4000, conversation="c")
    pair.answer(first, reading=1.0)
    summary = "summary " * 2000
    call = pair.ask(summary, conversation="c")
    assert call.served_by == first.served_by
    assert pair.placement(call).cached > 15_000
    assert pair.placement(pair.ask(summary, conversation="d")).cached < 16_500


def test_the_declared_size_of_a_cache_holds() -> None:
    master = Master("w1", "w2", cache_tokens=8000)
    call = master.ask("x" * 100_000)
    master.answer(call)
    assert master.placement(master.ask("x" * 100_000)).cached <= 32_000


@pytest.mark.parametrize(
    "usage", [None, Usage(), Usage(10, 0), Usage(0, 10, cached_tokens=5), Usage(1, 1, 900)]
)
def test_any_usage_is_learned_from(pair: Master, usage: Usage | None) -> None:
    for _ in range(4):
        pair.answer(pair.ask("x" * 5000), usage=usage)
    _, cost, _ = pair.placement(pair.ask()).candidates[0]
    assert 0 < cost < math.inf


def test_calls_that_fail_leave_nothing_behind(pair: Master) -> None:
    for begun in (False, True):
        call = pair.ask("x" * 5000)
        if begun:
            call.put(Head())
        pair.now += 50
        call.put(Failed(HandlerFailed("broken")))
        call.release()
    cancelled = pair.ask()
    cancelled.cancel("gone")
    assert pair.router.live
    cancelled.release()
    assert not pair.router.live
    assert all(work.calls == 0 and work.left(pair.now) == 0 for work in pair.policy._workloads.values())
    # Nothing was measured.
    assert {round(cost, 6) for _, cost, _ in pair.placement(pair.ask()).candidates} == {1.0129}


def test_a_short_answer_costs_what_it_may_have(pair: Master) -> None:
    for _ in range(4):
        pair.answer(pair.ask(), saying=10.0, usage=Usage(10, 1000))
    _, usual, _ = pair.placement(pair.ask()).candidates[0]
    pair = Master("w1", "w2")
    for _ in range(4):
        pair.answer(pair.ask(), saying=10.0, usage=Usage(10, 1000))
    _, short, _ = pair.placement(pair.ask(max_tokens=10)).candidates[0]
    assert short < usual / 20


def test_with_one_replica_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(request: Request) -> Prompt:
        raise AssertionError

    monkeypatch.setattr(cost_module, "read_prompt", never)
    master = Master("w1")
    call = master.ask("x" * 5000)
    assert call.tracker is None
    assert master.policy.why == "the only one"
    assert not master.policy.counts
    assert master.policy.pick([], call.request) is None


def test_a_decision_is_explained(pair: Master) -> None:
    text = "begin" * 1000
    pair.answer(pair.ask(text))
    call = pair.ask(text)
    placement = pair.placement(call)
    assert [name for name, _, _ in placement.candidates] == ["w2", "w1"]
    assert [cached for _, _, cached in placement.candidates] == [0, 4096]
    assert pair.policy.why == "1.00 s expected, 4096 of 5002 bytes cached; 2 replicas"


def test_models_that_are_remembered_are_bounded(pair: Master, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "_MODELS", 3)
    replicas = pair.router.catalog.replicas("m")
    for number in range(10):
        pair.policy.pick(replicas, Request("chat.completions", "chat", f"m{number}", b"{}"))
    assert list(pair.policy.counts) == ["m7", "m8", "m9"]


def test_an_answer_that_has_begun_when_the_call_is_opened_is_followed(pair: Master) -> None:
    class Hasty(Replica):
        def open(self, request: Request) -> Call:
            call = super().open(request)
            call.put(Head())
            return call

    pair.add(Hasty("w0"))
    for _ in range(3):
        call = pair.ask()
        if not call.begun:
            call.put(Head())
        call.put(Done(Usage(10, 10)))
        call.release()
    assert all(work.calls == 0 for work in pair.policy._workloads.values())


# Several masters


def test_calls_of_other_masters_are_work_that_a_replica_has() -> None:
    pair = Master()
    first, second = pair.add(Replica("w1")), pair.add(Replica("w2"))
    first.elsewhere = 5
    assert [pair.ask("x" * number).served_by for number in range(2)] == ["w2", "w2"]
    first.elsewhere, second.elsewhere = 0, 5
    assert [pair.ask("y" * number).served_by for number in range(2)] == ["w1", "w1"]


# Models that run on demand


def test_a_cold_replica_is_started_when_the_ready_one_would_take_longer(pair: Master) -> None:
    cold = next(each for each in pair.router.catalog.replicas("m") if each.name == "w1")
    cold.health.model_states = {"m": ModelState("cold", start_seconds=10.0)}
    for _ in range(3):
        call = pair.ask()
        assert call.served_by == "w2"
        pair.answer(call, saying=2.0)
    # Each takes about two seconds more; after five, a start of ten seconds is no worse.
    served = [pair.ask(str(number)).served_by for number in range(8)]
    assert served[:4] == ["w2"] * 4
    assert "w1" in served[4:]


def test_of_two_that_are_not_ready_the_one_that_starts_is_chosen(pair: Master) -> None:
    first, second = pair.router.catalog.replicas("m")
    first.health.model_states = {"m": ModelState("cold", start_seconds=10.0)}
    second.health.model_states = {"m": ModelState("starting", ready_at=pair.now + 3.0)}
    assert pair.ask().served_by == second.name


async def test_the_time_of_a_start_is_not_taken_for_that_of_reading(pair: Master) -> None:
    pair.answer(pair.ask("a" * 1000), reading=0.1)
    pair.answer(pair.ask("b" * 1000), reading=0.1)
    call = pair.ask("c" * 1000)
    call.set_model_wait(ModelWait("starting m"))
    pair.now += 60.0
    call.set_model_wait(None)
    pair.answer(call, reading=0.1)
    placement = pair.placement(pair.ask("d" * 1000))
    assert max(cost for _, cost, _ in placement.candidates) < 5.0


def test_the_state_of_a_model_is_that_of_the_replica_that_can_answer_first(pair: Master) -> None:
    catalog = pair.router.catalog
    first, second = catalog.replicas("m")
    assert catalog.state("m") == "ready"
    first.health.model_states = {"m": ModelState("cold")}
    assert catalog.state("m") == "ready"
    second.health.model_states = {"m": ModelState("starting")}
    assert catalog.state("m") == "starting"
    assert catalog.entry(pair.info)["state"] == "starting"
    second.health.model_states = {"m": ModelState("cold")}
    assert catalog.state("m") == "cold"
