"""What is started and stopped, and who waits: cases, and what holds in all of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trio_cluster.on_demand.schedule import (
    FIRST_BACKOFF,
    MAX_BACKOFF,
    MAX_STAY,
    MIN_STAY,
    Decisions,
    Resident,
    Schedule,
    Waiter,
)


class Node:
    """A schedule with a clock, whose starts and stops take no time unless a test says so."""

    def __init__(self, budget: float = math.inf, **said: int | None) -> None:
        self.now = 100.0
        self.schedule = Schedule(budget)
        self.residents = {name: Resident(name, size) for name, size in said.items()}
        for resident in self.residents.values():
            self.schedule.add(resident)
        self.log: list[str] = []
        self.failed: list[tuple[Waiter, float]] = []

    def __getitem__(self, name: str) -> Resident:
        return self.residents[name]

    def decide(self, *, runs: bool = True) -> Decisions:
        """Decide; with ``runs``, stop and start what was decided at once, until nothing more is."""
        first = decisions = self.schedule.decide(self.now)
        while True:
            self.log += [f"stop {each.name}" for each in decisions.stop]
            self.log += [f"start {each.name}" for each in decisions.start]
            self.failed += decisions.fail
            if not runs or not (decisions.start or decisions.stop):
                return first
            for resident in decisions.stop:
                self.schedule.ended(resident, self.now)
            for resident in decisions.start:
                self.schedule.is_ready(resident, self.now)
            decisions = self.schedule.decide(self.now)

    def ask(self, name: str, *, runs: bool = True) -> Waiter:
        waiter = self.schedule.want(self[name])
        self.decide(runs=runs)
        return waiter

    def answer(self, waiter: Waiter, *, completed: bool = True) -> None:
        self.schedule.leave(waiter, self.now, completed=completed)
        self.decide()

    def use(self, name: str) -> None:
        """One request, which takes no time."""
        waiter = self.ask(name)
        assert waiter.admitted
        self.answer(waiter)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.decide()


def test_one_start_for_all_that_wait() -> None:
    node = Node(100, a=10)
    waiters = [node.ask("a", runs=False) for _ in range(3)]
    assert node.log == ["start a"]
    node.schedule.is_ready(node["a"], node.now)
    assert node.schedule.decide(node.now).admit == waiters
    assert node["a"].answering == 3


def test_residents_that_fit_run_side_by_side() -> None:
    node = Node(100, a=50, b=50)
    node.ask("a")
    node.ask("b")
    assert node.log == ["start a", "start b"]


def test_a_resident_of_unknown_size_runs_alone_until_it_was_measured() -> None:
    node = Node(100, a=None, b=10)
    node.ask("a")
    waiter = node.ask("b")
    assert not waiter.admitted
    node.schedule.takes(node["a"], 30)
    node.decide()
    assert waiter.admitted
    assert node["a"].reserved == 30


def test_what_was_learned_outlasts_the_stop() -> None:
    node = Node(100, a=None)
    node.use("a")
    node.schedule.takes(node["a"], 30)
    node.schedule.unload(node["a"])
    node.decide()
    assert (node["a"].state, node["a"].reserved) == ("cold", 0)
    assert node.schedule.need(node["a"]) == 30


def test_what_was_said_holds_whatever_is_measured() -> None:
    node = Node(100, a=40)
    node.ask("a")
    node.schedule.takes(node["a"], 90)
    assert node["a"].reserved == 40


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="a needs 200 bytes of memory, and there are 100 bytes"):
        Node(100, a=200)


def test_a_resident_that_grows_beyond_the_budget_costs_one_that_is_idle() -> None:
    node = Node(100, a=50, b=None)
    node.use("a")
    node.schedule.takes(node["b"], 40)
    node.ask("b")
    node.schedule.takes(node["b"], 60)
    node.pass_time(MAX_STAY)
    assert node["a"].state == "cold"
    assert node["b"].state == "ready"


def test_the_one_that_was_idle_longest_makes_room() -> None:
    node = Node(100, a=40, b=40, c=40)
    node.use("a")
    node.pass_time(MAX_STAY)
    node.use("b")
    node.pass_time(MAX_STAY)
    node.use("c")
    assert node.log == ["start a", "start b", "stop a", "start c"]


def test_the_one_that_is_cheaper_to_start_again_makes_room() -> None:
    node = Node(100, slow=40, quick=40, c=40)
    node["slow"].start_seconds, node["quick"].start_seconds = 60.0, 1.0
    node.use("slow")
    node.use("quick")
    node.schedule.leave(node.ask("slow"), node.now - 5)
    node["slow"].start_seconds, node["quick"].start_seconds = 60.0, 1.0
    node.pass_time(MAX_STAY * 2)
    node.use("c")
    assert node.log[-2:] == ["stop quick", "start c"]


def test_only_as_many_stop_as_are_needed() -> None:
    node = Node(100, small=10, big=60, other=30, c=60)
    for name in ("small", "other", "big"):
        node.use(name)
        node.pass_time(MAX_STAY)
    node.use("c")
    assert node.log[3:] == ["stop big", "start c"]


def test_none_is_stopped_if_that_is_not_enough() -> None:
    node = Node(100, a=50, b=50, c=100)
    node.use("a")
    busy = node.ask("b")
    node.pass_time(MAX_STAY)
    waiter = node.ask("c")
    assert node["a"].state == "ready"
    node.answer(busy)
    assert waiter.admitted
    assert sorted(node.log[2:4]) == ["stop a", "stop b"]


def test_what_answers_is_not_stopped() -> None:
    node = Node(100, a=80, b=80)
    answering = node.ask("a")
    waiter = node.ask("b")
    node.pass_time(10 * MAX_STAY)
    assert not waiter.admitted
    assert node["a"].state == "ready"
    node.answer(answering)
    assert waiter.admitted


def test_a_resident_that_is_to_make_room_takes_no_further_requests_and_gets_its_turn_again() -> None:
    node = Node(100, a=80, b=80)
    first = node.ask("a")
    node.pass_time(MAX_STAY)
    waiter = node.ask("b")
    second = node.ask("a")
    assert not second.admitted
    node.answer(first)
    assert waiter.admitted
    node.pass_time(MAX_STAY)
    node.answer(waiter)
    assert second.admitted
    assert node.log == ["start a", "stop a", "start b", "stop b", "start a"]


def test_it_takes_requests_again_if_the_one_that_waits_leaves() -> None:
    node = Node(100, a=80, b=80)
    node.ask("a")
    node.pass_time(MAX_STAY)
    waiter = node.ask("b")
    second = node.ask("a")
    node.answer(waiter)
    assert second.admitted


def test_a_resident_stays_for_a_while_although_another_is_wanted() -> None:
    node = Node(100, a=80, b=80)
    node.use("a")
    waiter = node.ask("b")
    assert not waiter.admitted
    again = node.ask("a")
    assert again.admitted
    node.pass_time(MIN_STAY)
    node.answer(again)
    assert waiter.admitted


def test_it_stays_for_a_shorter_time_if_it_is_idle() -> None:
    node = Node(100, a=80, b=80)
    node.use("a")
    waiter = node.ask("b")
    wakes = node.schedule.wakes_at(node["a"], node.now)
    assert node.now < wakes < node.now + MIN_STAY / 2
    node.now = wakes
    node.decide()
    assert waiter.admitted


def test_a_long_start_has_a_longer_stay() -> None:
    assert Resident("a").stay == MIN_STAY
    assert Resident("a", start_seconds=12.0).stay == 24.0
    assert Resident("a", start_seconds=500.0).stay == MAX_STAY


def test_a_smaller_one_that_was_asked_for_later_takes_only_what_the_first_does_not_need() -> None:
    for name, size, fits in (("small", 8, True), ("middle", 20, False)):
        node = Node(100, busy=60, large=90, **{name: size})
        node.ask("busy")
        node.ask("large")
        assert node.ask(name).admitted is fits


def wait_for_large(**others: int) -> tuple[Node, Waiter, Waiter]:
    """One of 60 has just begun its stay of 32 s, and one of 90 waits for it; the others have a full turn of 30 s."""
    node = Node(100, busy=60, large=90, **others)
    node["busy"].start_seconds = 32.0
    for name in others:
        node[name].start_seconds = 10.0
    busy = node.ask("busy")
    assert node["busy"].stay == 32
    return node, busy, node.ask("large")


@pytest.mark.parametrize(("seconds", "starts"), [(0.0, True), (1.9, True), (2.1, False), (40.0, False)])
def test_a_smaller_one_borrows_the_memory_that_the_first_cannot_use_before_its_turn_is_over(
    seconds: float, starts: bool
) -> None:
    node, _, _ = wait_for_large(small=30)
    node.pass_time(seconds)
    assert node.ask("small").admitted is starts


def test_memory_that_is_kept_is_lent_once() -> None:
    node, _, _ = wait_for_large(small=30, other=20)
    waiters = [node.schedule.want(node[name]) for name in ("small", "other")]
    node.decide()
    assert [waiter.admitted for waiter in waiters] == [True, False]
    assert node.schedule.reserved == 90


def test_memory_is_lent_while_the_one_that_is_to_make_room_starts() -> None:
    node = Node(100, busy=60, large=90, small=30)
    node["busy"].start_seconds, node["small"].start_seconds = 32.0, 10.0
    for name in ("busy", "large", "small"):
        node.ask(name, runs=False)
    assert node.log == ["start busy", "start small"]


def test_the_first_gets_its_turn_although_its_memory_was_lent() -> None:
    node, busy, large = wait_for_large(small=30)
    small = node.ask("small")
    node.pass_time(32)
    later = [node.ask("small"), node.ask("busy")]
    node.answer(small)
    assert not large.admitted
    node.answer(busy)
    assert large.admitted
    assert not any(waiter.admitted for waiter in later)


def test_a_start_for_which_no_request_waits_is_given_up() -> None:
    node = Node(100, a=10)
    waiters = [node.ask("a", runs=False) for _ in range(2)]
    node.schedule.leave(waiters[0], node.now)
    assert node.schedule.decide(node.now).stop == []
    node.schedule.leave(waiters[1], node.now)
    assert node.schedule.decide(node.now).stop == [node["a"]]
    assert node["a"].reserved == 10
    node.schedule.ended(node["a"], node.now)
    assert (node["a"].state, node["a"].reserved) == ("cold", 0)


def test_what_was_given_up_is_started_again_when_it_has_stopped() -> None:
    node = Node(100, a=60)
    node.schedule.leave(node.ask("a", runs=False), node.now)
    node.decide(runs=False)
    waiter = node.ask("a", runs=False)
    assert node.log == ["start a", "stop a"]
    node.schedule.ended(node["a"], node.now)
    node.decide()
    assert waiter.admitted


def test_an_idle_resident_is_stopped_in_time() -> None:
    node = Node(100, a=10)
    node["a"].idle = 600.0
    node.use("a")
    node.pass_time(599)
    node.use("a")
    node.pass_time(599)
    assert node["a"].state == "ready"
    assert node.schedule.wakes_at(node["a"], node.now) == node.now + 1
    node.pass_time(1)
    assert node["a"].state == "cold"


def test_a_resident_without_an_idle_time_stays() -> None:
    node = Node(100, a=10)
    node.use("a")
    node.pass_time(1e6)
    assert node["a"].state == "ready"
    assert node.schedule.wakes_at(node["a"], node.now) == math.inf


def test_those_that_wait_fail_with_the_start_and_later_ones_until_the_backoff_is_over() -> None:
    node = Node(100, a=10)
    node.ask("a", runs=False)
    node.schedule.ended(node["a"], node.now, "no such file")
    node.decide()
    assert [seconds for _, seconds in node.failed] == [FIRST_BACKOFF]
    assert node["a"].why == "no such file"
    node.now += FIRST_BACKOFF / 2
    node.ask("a")
    assert [seconds for _, seconds in node.failed] == [FIRST_BACKOFF, FIRST_BACKOFF / 2]
    node.now += FIRST_BACKOFF / 2
    assert node.ask("a").admitted


def test_the_backoff_doubles() -> None:
    node = Node(100, a=10)
    waits = []
    for _ in range(12):
        node.ask("a", runs=False)
        node.schedule.ended(node["a"], node.now, "no such file")
        node.decide()
        waits.append(node["a"].retry_at - node.now)
        node.now = node["a"].retry_at
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert waits[-1] == MAX_BACKOFF


def test_one_that_has_worked_and_dies_is_started_again_at_once() -> None:
    node = Node(100, a=10)
    node.use("a")
    node.schedule.dies(node["a"], node.now, "killed")
    waiter = node.ask("a", runs=False)
    assert node.log == ["start a"]
    node.schedule.ended(node["a"], node.now)
    assert node["a"].state == "failed"
    node.decide()
    assert waiter.admitted
    # It has not worked since.
    node.schedule.dies(node["a"], node.now, "killed")
    node.schedule.ended(node["a"], node.now)
    node.ask("a")
    assert len(node.failed) == 1


def test_an_unloaded_resident_finishes_its_answers_first() -> None:
    node = Node(100, a=10)
    answering = node.ask("a")
    node.schedule.unload(node["a"])
    later = node.ask("a")
    assert not later.admitted
    node.answer(answering)
    assert node.log == ["start a", "stop a", "start a"]
    assert later.admitted


def test_an_unload_while_it_starts_lets_those_in_that_wait() -> None:
    node = Node(100, a=10)
    waiter = node.ask("a", runs=False)
    node.schedule.unload(node["a"])
    node.schedule.is_ready(node["a"], node.now)
    node.decide()
    assert waiter.admitted
    node.answer(waiter)
    assert node["a"].state == "cold"


def test_a_load_uses_nothing() -> None:
    node = Node(100, a=10)
    waiter = node.schedule.want(node["a"], uses=False)
    node.decide()
    assert node["a"].state == "ready"
    assert not node["a"].answering
    assert not node.schedule.waiting_for(node["a"])
    node.schedule.leave(waiter, node.now)
    assert not node["a"].answering


def test_a_removed_resident_gives_back_those_that_wait() -> None:
    node = Node(100, a=60, b=60)
    node.ask("a")
    waiter = node.ask("b")
    assert node.schedule.remove(node["b"]) == [waiter]
    assert node.schedule.residents == [node["a"]]


def test_the_time_to_readiness_is_learned() -> None:
    node = Node(100, a=10)
    node.ask("a", runs=False)
    node.now += 20
    node.schedule.is_ready(node["a"], node.now)
    assert node["a"].start_seconds == 20
    assert node["a"].ready_in(node.now) == 0
    node.schedule.ended(node["a"], node.now)
    assert node["a"].ready_in(node.now) == 20
    node.ask("a", runs=False)
    node.now += 5
    assert node["a"].ready_in(node.now) == 15
    node.now += 50
    assert node["a"].ready_in(node.now) == 0


class Anything(RuleBasedStateMachine):
    """Requests, starts, stops, deaths and time in any order."""

    @initialize(
        budget=st.integers(50, 100),
        residents=st.lists(
            st.tuples(
                st.one_of(st.none(), st.integers(0, 50)),
                st.sampled_from([0.0, 3.0, 60.0]),
                st.integers(1, 40),
            ),
            min_size=1,
            max_size=4,
        ),
    )
    def set_up(self, budget: int, residents: list[tuple[int | None, float, int]]) -> None:
        self.now = 0.0
        self.schedule = Schedule(budget)
        self.sizes: dict[Resident, int] = {}
        for number, (said, idle, size) in enumerate(residents):
            resident = Resident(f"r{number}", said, idle)
            self.schedule.add(resident)
            self.sizes[resident] = size
        self.waiting: list[Waiter] = []
        self.answering: list[Waiter] = []
        self.starting: list[Resident] = []
        self.stopping: list[Resident] = []

    def decide(self) -> None:
        before = {each: each.answering for each in self.schedule.residents}
        decisions = self.schedule.decide(self.now)
        for resident in decisions.stop:
            assert before[resident] == 0
            assert resident not in decisions.start
            if resident in self.starting:
                self.starting.remove(resident)
            self.stopping.append(resident)
        self.starting += decisions.start
        for waiter in decisions.admit:
            assert waiter.resident.state == "ready"
            self.waiting.remove(waiter)
            self.answering.append(waiter)
        for waiter, _ in decisions.fail:
            self.waiting.remove(waiter)
        # A second decision at the same time finds nothing left to do.
        assert self.schedule.decide(self.now) == Decisions()

    @rule(which=st.integers(0, 3))
    def ask(self, which: int) -> None:
        residents = self.schedule.residents
        self.waiting.append(self.schedule.want(residents[which % len(residents)]))
        self.decide()

    @precondition(lambda self: self.waiting or self.answering)
    @rule(which=st.integers(0, 9), completed=st.booleans())
    def leave(self, which: int, completed: bool) -> None:
        everyone = self.waiting + self.answering
        waiter = everyone[which % len(everyone)]
        (self.waiting if waiter in self.waiting else self.answering).remove(waiter)
        self.schedule.leave(waiter, self.now, completed=completed)
        self.decide()

    @precondition(lambda self: self.starting)
    @rule(fails=st.booleans())
    def finish_start(self, fails: bool) -> None:
        resident = self.starting.pop(0)
        if fails:
            self.schedule.ended(resident, self.now, "it fails")
        else:
            self.schedule.is_ready(resident, self.now)
            self.schedule.takes(resident, self.sizes[resident])
        self.decide()

    @precondition(lambda self: self.stopping)
    @rule()
    def finish_stop(self) -> None:
        self.schedule.ended(self.stopping.pop(0), self.now)
        self.decide()

    @rule(which=st.integers(0, 3))
    def die(self, which: int) -> None:
        residents = self.schedule.residents
        resident = residents[which % len(residents)]
        if resident.state == "ready":
            for waiter in [each for each in self.answering if each.resident is resident]:
                self.answering.remove(waiter)
                self.schedule.leave(waiter, self.now)
            self.schedule.dies(resident, self.now, "it died")
            self.stopping.append(resident)
            self.decide()

    @rule(which=st.integers(0, 3))
    def unload(self, which: int) -> None:
        residents = self.schedule.residents
        self.schedule.unload(residents[which % len(residents)])
        self.decide()

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 5.0, 61.0]))
    def pass_time(self, seconds: float) -> None:
        # As the tasks of the residents do: a decision at each time at which one may follow.
        until = self.now + seconds
        while (wakes := min(self.schedule.wakes_at(each, self.now) for each in self.sizes)) <= until:
            assert wakes > self.now
            self.now = wakes
            self.decide()
        self.now = until
        self.decide()

    @invariant()
    def the_budget_is_never_exceeded(self) -> None:
        if hasattr(self, "schedule"):
            assert self.schedule.reserved <= self.schedule.budget

    @invariant()
    def what_runs_has_its_memory_and_what_does_not_has_none(self) -> None:
        for resident in self.schedule.residents if hasattr(self, "schedule") else ():
            if resident.state in ("cold", "failed"):
                assert resident.reserved == 0
            elif resident.said is not None:
                assert resident.reserved == resident.said

    @invariant()
    def every_request_is_counted_once(self) -> None:
        for resident in self.schedule.residents if hasattr(self, "schedule") else ():
            assert resident.answering == sum(each.resident is resident for each in self.answering)
            assert self.schedule.waiting_for(resident) == sum(
                each.resident is resident for each in self.waiting
            )
            if resident.answering:
                assert resident.state == "ready"

    def teardown(self) -> None:
        """Everyone who waits is served, in a bounded number of turns, if what answers comes to an end."""
        if not hasattr(self, "schedule"):
            return
        for _ in range(6 * (len(self.waiting) + len(self.sizes)) + 10):
            if not self.waiting:
                break
            while self.stopping:
                self.finish_stop()
            while self.starting:
                self.finish_start(False)
            for waiter in self.answering[:]:
                self.answering.remove(waiter)
                self.schedule.leave(waiter, self.now, completed=True)
            self.decide()
            self.pass_time(MAX_STAY)
        assert not self.waiting


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
