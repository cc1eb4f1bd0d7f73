"""Fair queueing: the order in which principals are served, and the bound on what anyone waits for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from hypothesis import example, given, settings, strategies as st

from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.fair_queue import (
    DEFAULT_ANSWER,
    LARGEST_PART,
    QUANTUM,
    FairQueue,
    QueueFull,
    estimated_cost,
    share_of,
)
from trio_cluster.core.principal import Principal
from trio_cluster.core.request import Request

COSTS = st.integers(1, 2 * LARGEST_PART)
SHARES = st.sampled_from([0.00025, 0.0025, 0.25, 1.0, 2.0, 3.5, 4.0, 400.0, 4000.0])


def drain(queue: FairQueue[Any]) -> Iterator[Any]:
    while len(queue):
        yield queue.pop()


@given(st.lists(COSTS), SHARES)
def test_one_principal_is_served_in_the_order_of_coming(costs: list[int], share: float) -> None:
    queue: FairQueue[int] = FairQueue(1024)
    for number, cost in enumerate(costs):
        queue.push(number, "a", share, cost)
    assert list(drain(queue)) == list(range(len(costs)))


def test_two_principals_with_equal_requests_take_turns_however_many_one_has() -> None:
    queue: FairQueue[str] = FairQueue(1024)
    for _ in range(10):
        queue.push("a", "a", 1, 1000)
    for _ in range(3):
        queue.push("b", "b", 1, 1000)
    assert "".join(drain(queue)) == "ababab" + "a" * 7


def test_costs_are_shared_and_not_requests() -> None:
    queue: FairQueue[str] = FairQueue(2000)
    for _ in range(100):
        queue.push("a", "a", 1, 4000)
        for _ in range(10):
            queue.push("b", "b", 1, 400)
    first = Counter(queue.pop() for _ in range(220))
    assert first == {"a": 20, "b": 200}


def test_a_principal_is_served_by_its_weight() -> None:
    queue: FairQueue[str] = FairQueue(1024)
    for _ in range(200):
        queue.push("a", "a", 3, 1000)
        queue.push("b", "b", 1, 1000)
    served = Counter(queue.pop() for _ in range(80))
    assert abs(served["a"] - 60) <= 1


def test_an_empty_queue_has_nothing_to_take() -> None:
    with pytest.raises(IndexError):
        FairQueue(1).pop()


# The bound


@attrs.define(eq=False)
class Ask:
    """A request that waits, and the bound on what others may be served until it is."""

    name: str
    cost: int
    due: float
    """Its cost, the costs of what waited before it of the same principal, and what that principal owed."""
    charged_before: Counter[str]
    """What each principal had been charged when it came, in units of cost."""
    owed_before: float
    """What its principal had been charged for more than estimated."""


class Scheduler:
    """A queue, and what each principal was charged. Time is what was charged: there is one slot.

    Args:
        shares: of the principals, by name.
    """

    def __init__(self, shares: dict[str, float]) -> None:
        self.queue: FairQueue[Ask] = FairQueue(1 << 20)
        self.shares = shares
        self.charged: Counter[str] = Counter()
        self.owed: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.waiting: list[Any] = []

    def push(self, name: str, cost: int) -> None:
        due: float = cost + sum(each.cost for each in self.waiting if each.item.name == name)
        ask = Ask(name, cost, due, self.charged.copy(), self.owed[name])
        waiting, dropped = self.queue.push(ask, name, self.shares[name], cost)
        assert dropped is None
        ask.due -= min(0.0, waiting.flow.deficit)
        self.waiting.append(waiting)
        self.largest[name] = max(self.largest[name], cost)

    def cancel(self, index: int) -> None:
        if self.waiting:
            waiting = self.waiting.pop(index % len(self.waiting))
            self.queue.discard(waiting)
            self.queue.discard(waiting)

    def settle(self, name: str, difference: int) -> None:
        """Charge a principal for a request that was more expensive than estimated, or less."""
        flow = next((each.flow for each in self.waiting if each.item.name == name), None)
        before = 0.0 if flow is None else flow.deficit
        self.queue.settle(name, difference)
        charge = 0.0 if flow is None else before - flow.deficit
        assert abs(charge) <= abs(difference) + 1e-6
        self.charged[name] += charge  # type: ignore[assignment]
        self.owed[name] += max(0.0, charge)  # type: ignore[assignment]

    def pop(self) -> Ask | None:
        """Serve the next request, and check the bound for all that wait; return it."""
        if not self.waiting:
            return None
        ask = self.queue.pop()
        mine = [each for each in self.waiting if each.item.name == ask.name]
        assert mine[0].item is ask
        self.waiting.remove(mine[0])
        self.charged[ask.name] += ask.cost
        share = self.shares[ask.name]
        for each in self.waiting:
            other: Ask = each.item
            if other.name != ask.name:
                charged = self.charged[ask.name] - other.charged_before[ask.name]
                due = other.due + self.owed[other.name] - other.owed_before
                allowed = due * share / self.shares[other.name] + 2 * QUANTUM * share + self.largest[ask.name]
                assert charged <= allowed * (1 + 1e-9) + 1e-6, (ask, charged, allowed, other)
        return ask


NAMES = "abcde"
STEPS = st.lists(
    st.tuples(st.just("push"), st.integers(0, 4), COSTS | st.integers(1, 1000))
    | st.tuples(st.just("flood"), st.integers(0, 4), COSTS | st.integers(1, 1000))
    | st.tuples(st.just("pop"), st.integers(0, 20), st.just(0))
    | st.tuples(st.just("settle"), st.integers(0, 4), st.integers(-LARGEST_PART, 4 * LARGEST_PART))
    | st.tuples(st.just("cancel"), st.integers(0, 1 << 10), st.just(0)),
    max_size=80,
)


@given(st.tuples(*[SHARES] * 5), STEPS)
@settings(max_examples=400, deadline=None)
@example((1.0,) * 5, [("flood", 0, 32768), ("pop", 3, 0), ("push", 1, 1), ("flood", 2, 5), ("pop", 20, 0)])
def test_no_principal_waits_for_more_than_its_share_and_one_request(
    shares: tuple[float, ...], steps: list[tuple[str, int, int]]
) -> None:
    """The bound at the top of ``fair_queue.py``, whatever comes, is cancelled and is served in between."""
    scheduler = Scheduler(dict(zip(NAMES, shares, strict=True)))
    for step, number, cost in steps:
        match step:
            case "push":
                scheduler.push(NAMES[number], cost)
            case "flood":
                for _ in range(10):
                    scheduler.push(NAMES[number], cost)
            case "pop":
                for _ in range(number):
                    scheduler.pop()
            case "settle":
                scheduler.settle(NAMES[number], cost)
            case "cancel":
                scheduler.cancel(number)
        assert len(scheduler.queue) == len(scheduler.waiting)
        assert scheduler.queue.counts() == Counter(each.item.name for each in scheduler.waiting)
    while scheduler.waiting:
        scheduler.pop()
    with pytest.raises(IndexError):
        scheduler.queue.pop()


@given(st.integers(2, 40), COSTS, st.integers(1, 2000))
@settings(deadline=None)
def test_a_single_request_among_many_that_flood_waits_for_one_request_of_each(
    floods: int, cost: int, mine: int
) -> None:
    names = [str(number) for number in range(floods)]
    scheduler = Scheduler(dict.fromkeys([*names, "me"], 1.0))
    for name in names:
        for _ in range(5):
            scheduler.push(name, cost)
    for _ in range(3):
        scheduler.pop()
    before = scheduler.charged.total()
    scheduler.push("me", mine)
    while (ask := scheduler.pop()) is not None and ask.name != "me":
        pass
    waited = scheduler.charged.total() - mine - before
    assert waited <= floods * (max(mine, cost) + mine + 2 * QUANTUM)


def test_a_low_priority_is_not_starved_by_a_high_one() -> None:
    high, low = (share_of(Principal(priority=each)) for each in ("high", "low"))  # type: ignore[arg-type]
    assert (high, low) == (4.0, 0.25)
    scheduler = Scheduler({"high": high, "low": low})
    scheduler.push("low", 1000)
    served = 0
    while True:
        scheduler.push("high", 1000)
        scheduler.push("high", 1000)
        ask = scheduler.pop()
        assert ask is not None
        if ask.name == "low":
            break
        served += 1
    assert 14 <= served <= 18


def test_what_was_granted_for_a_cancelled_request_is_not_for_others() -> None:
    queue: FairQueue[str] = FairQueue(1024)
    large, _ = queue.push("large", "a", 1, 30_000)
    for _ in range(100):
        queue.push("a", "a", 1, 100)
        queue.push("b", "b", 1, 900)
    for _ in range(30):
        assert queue.pop() == "b"
    queue.discard(large)
    taken = "".join(queue.pop() for _ in range(40))
    assert taken.index("b") <= 12


def test_who_takes_more_than_estimated_is_charged_for_it() -> None:
    queue: FairQueue[str] = FairQueue(1024)
    for _ in range(300):
        queue.push("a", "a", 1, 500)
        queue.push("b", "b", 1, 500)
    served: Counter[str] = Counter()
    for _ in range(200):
        served[name := queue.pop()] += 1
        # Of `a`, every answer is four times as long as estimated; of `b`, half as long.
        queue.settle(name, 1500 if name == "a" else -250)
    assert served["b"] / served["a"] == pytest.approx(8, rel=0.1)


def test_debts_and_credits_are_bounded_and_those_of_an_absent_principal_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue(1024)
    queue.settle("a", 10**9)
    waiting, _ = queue.push("a", "a", 1, 500)
    assert waiting.flow.deficit == 0
    queue.settle("a", 10**9)
    assert waiting.flow.deficit == -2 * LARGEST_PART
    queue.settle("a", -(10**9))
    assert waiting.flow.deficit == 500


@pytest.mark.parametrize("share", [0.00025, 0.0025, 400.0, 4000.0])
def test_a_request_is_taken_in_a_few_steps_whatever_it_costs(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue: FairQueue[str] = FairQueue(1024)
    for name in "abc":
        queue.push(name, name, share, 32_768)
    skipped = []
    skip_rounds = FairQueue._skip_rounds

    def count(self: FairQueue[str]) -> None:
        skipped.append(1)
        skip_rounds(self)

    monkeypatch.setattr(FairQueue, "_skip_rounds", count)
    assert sorted(drain(queue)) == ["a", "b", "c"]
    assert len(skipped) <= 3


# A full queue


def test_one_principal_may_fill_the_queue_and_is_refused_then() -> None:
    queue: FairQueue[int] = FairQueue(3)
    for number in range(3):
        assert queue.has_room("a", 1)
        queue.push(number, "a", 1, 1)
    assert not queue.has_room("a", 1)
    with pytest.raises(QueueFull):
        queue.push(3, "a", 1, 1)
    assert list(drain(queue)) == [0, 1, 2]


def test_another_principal_takes_the_place_of_the_latest_request_of_the_one_with_most() -> None:
    queue: FairQueue[str] = FairQueue(5)
    for item in ("a1", "a2", "a3", "b1", "b2"):
        queue.push(item, item[0], 1, 1)
    assert queue.has_room("c", 1)
    assert queue.push("c1", "c", 1, 1)[1] == "a3"
    # Each has its share now.
    assert not queue.has_room("c", 1)
    assert sorted(drain(queue)) == ["a1", "a2", "b1", "b2", "c1"]


def test_at_a_tie_the_newcomer_is_refused() -> None:
    queue: FairQueue[str] = FairQueue(2)
    queue.push("a", "a", 1, 1)
    queue.push("b", "b", 1, 1)
    for name in ("a", "b", "c"):
        assert not queue.has_room(name, 1)
        with pytest.raises(QueueFull):
            queue.push(name, name, 1, 1)
    # One of a larger share has room.
    assert queue.push("d", "d", 2, 1)[1] in ("a", "b")


@given(st.lists(st.tuples(st.sampled_from("abc"), SHARES, st.booleans()), max_size=60), st.integers(1, 8))
def test_a_queue_is_never_longer_than_its_bound(steps: list[tuple[str, float, bool]], bound: int) -> None:
    queue: FairQueue[int] = FairQueue(bound)
    expected: set[int] = set()
    for number, (name, share, take) in enumerate(steps):
        room = queue.has_room(name, share)
        try:
            _, dropped = queue.push(number, name, share, 1)
        except QueueFull:
            assert not room
        else:
            assert room
            expected.add(number)
            expected -= {dropped}  # type: ignore[arg-type]
        if take:
            expected.remove(queue.pop())
        assert len(queue) == len(expected) <= bound
    assert set(drain(queue)) == expected


# Shares and costs


@pytest.mark.parametrize(
    ("principal", "share"),
    [
        (Principal(), 1.0),
        (Principal(weight=3, priority="high"), 12.0),
        (Principal(weight=2, priority="low"), 0.5),
        (Principal(weight=0), 0.001),
        (Principal(weight=-math.inf), 0.001),
        (Principal(weight=math.nan), 0.001),
        (Principal(weight=math.inf), 1000.0),
    ],
)
def test_the_share_of_a_principal(principal: Principal, share: float) -> None:
    assert share_of(principal) == share


@pytest.mark.parametrize(
    ("kind", "size", "max_tokens", "cost"),
    [
        ("chat", 400, 0, 100 + DEFAULT_ANSWER),
        ("chat", 400, 7, 107),
        ("chat", 0, 1, 1),
        ("chat", 10**9, 10**9, 2 * LARGEST_PART),
        ("embedding", 400, 0, 100),
        ("embedding", 0, 0, 1),
        ("embedding", -1, 0, LARGEST_PART),
        ("chat", 400, -5, 100 + DEFAULT_ANSWER),
    ],
)
def test_the_cost_of_a_request(kind: Any, size: int, max_tokens: int, cost: int) -> None:
    request = Request("e", kind, "m", b"", upload=ByteChannel(size), max_tokens=max_tokens)
    assert estimated_cost(request) == cost
