"""The account of one key: reservations, settlements and budgets, against a model with every one of them."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given, strategies as st

from trio_cluster.core.principal import Limits
from trio_cluster.limits.account import Account, Demand, Grant, Refusal
from trio_cluster.limits.calendar import period_of

WINDOW = 60_000_000
#: The 27th of November 2026, a Friday, at noon.
NOON = datetime.datetime(2026, 11, 27, 12, tzinfo=datetime.UTC).timestamp()
DAY = 86_400.0


def demand(tokens: int, least: int = 0) -> Demand:
    return Demand(tokens, least, 0)


def reserve(account: Account, limits: Limits, tokens: int = 0, now: int = 0, wall: float = NOON) -> Grant:
    granted = account.reserve(limits, demand(tokens), now, wall)
    assert isinstance(granted, Grant), granted
    return granted


def refuse(
    account: Account, limits: Limits, tokens: int = 0, now: int = 0, wall: float = NOON, least: int = 0
) -> Refusal:
    refusal = account.reserve(limits, demand(tokens, least), now, wall)
    assert isinstance(refusal, Refusal), refusal
    return refusal


steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "end"]),
        st.one_of(st.integers(0, 20_000_000), st.sampled_from([0, WINDOW - 1, WINDOW])),
        st.integers(0, 400),
    ),
    max_size=60,
)


@given(steps, st.integers(1, 9), st.integers(1, 500), st.integers(1, 5))
def test_any_minute_any_number_of_slots_and_the_sums(
    steps: list[tuple[str, int, int]], per_minute: int, tokens_per_minute: int, slots: int
) -> None:
    limits = Limits(per_minute, tokens_per_minute, slots)
    account, now = Account(WINDOW), 0
    # For each reservation: when it was admitted, and what it counts as.
    booked: list[list[int]] = []
    more: list[list[int]] = []
    waiting: list[tuple[Grant, list[int]]] = []
    for what, pause, tokens in steps:
        now += pause
        if what == "ask":
            granted = account.reserve(limits, demand(tokens), now, NOON)
            if isinstance(granted, Grant):
                booked.append([now, granted.tokens])
                waiting.append((granted, booked[-1]))
        elif waiting:
            grant, line = waiting.pop(0)
            over = account.settle(grant, tokens, now)
            assert over == max(0, tokens - grant.tokens)
            line[1] = min(line[1], tokens)
            if over:
                more.append([now, over])
        assert len(waiting) <= slots
        assert account.slots == len(waiting)
        assert account.reserved == sum(grant.tokens for grant, _ in waiting)
        # What counts now is what the model says.
        assert account.log.tokens >= 0
        current = [each for each in [*booked, *more] if each[0] > now - WINDOW]
        account.log.advance(now)
        assert account.log.tokens == sum(each[1] for each in current)
    for begins, _ in booked:
        inside = [each for each in booked if begins <= each[0] < begins + WINDOW]
        assert len(inside) <= per_minute
        # As reserved, or as used; only what was used beyond a reservation comes on top.
        assert sum(each[1] for each in inside) <= tokens_per_minute


@given(st.lists(st.tuples(st.integers(0, 9_000_000), st.integers(1, 90)), min_size=1, max_size=30))
def test_trying_again_when_told_succeeds_and_a_millisecond_before_does_not(
    asked: list[tuple[int, int]],
) -> None:
    limits = Limits(requests_per_minute=3, tokens_per_minute=100)
    account, now = Account(WINDOW), 0
    for pause, tokens in asked:
        now += pause
        granted = account.reserve(limits, demand(tokens), now, NOON)
        if isinstance(granted, Refusal):
            if granted.wait > 1000:
                early = refuse(account, limits, tokens, now + granted.wait - 1000)
                assert early.wait == 1000
            now += granted.wait
            reserve(account, limits, tokens, now)


def test_what_is_used_beyond_the_reservation_counts_from_then_on() -> None:
    limits = Limits(tokens_per_minute=100)
    account = Account(WINDOW)
    grant = reserve(account, limits, 10)
    account.settle(grant, 150, 30_000_000)
    refusal = refuse(account, limits, 10, 31_000_000)
    assert (refusal.kind, refusal.wait) == ("tokens", 59_000_000)


def test_a_reservation_of_an_old_minute_frees_nothing_of_this_one() -> None:
    limits = Limits(tokens_per_minute=100)
    account = Account(WINDOW)
    old = reserve(account, limits, 100)
    reserve(account, limits, 100, WINDOW)
    account.settle(old, 0, WINDOW + 1)
    assert refuse(account, limits, 1, WINDOW + 2).kind == "tokens"


def test_a_refusal_names_the_limit_that_lasts_longest() -> None:
    limits = Limits(requests_per_minute=2, tokens_per_minute=100, max_concurrency=5)
    account = Account(WINDOW)
    reserve(account, limits, 90)
    reserve(account, limits, 5, 10_000_000)
    assert refuse(account, limits, 1, 20_000_000).kind == "requests"
    refusal = refuse(account, limits, 97, 20_000_000)
    assert (refusal.kind, refusal.wait) == ("tokens", 50_000_000)


def test_slots_are_free_when_they_are_settled() -> None:
    limits = Limits(max_concurrency=1)
    account = Account(WINDOW)
    grant = reserve(account, limits)
    assert refuse(account, limits).kind == "concurrency"
    account.settle(grant, 0, 1)
    reserve(account, limits, now=2)


def test_what_can_never_be_admitted_is_refused_as_such() -> None:
    limits = Limits(tokens_per_minute=100)
    account = Account(WINDOW)
    assert refuse(account, limits, 500, least=101).kind == "size"
    # A guess that is too high takes all that there is, when all is there.
    assert reserve(account, limits, 500).tokens == 100
    assert refuse(account, limits, 500, now=1).wait == WINDOW - 1


def test_a_request_that_was_not_begun_counts_as_none() -> None:
    limits = Limits(requests_per_minute=1, tokens_per_minute=10)
    account = Account(WINDOW)
    account.settle(reserve(account, limits, 10), 0, 0, counts=False)
    reserve(account, limits, 10)


def test_no_requests_at_all() -> None:
    refusal = refuse(Account(WINDOW), Limits(requests_per_minute=0))
    assert (refusal.kind, refusal.wait) == ("requests", WINDOW)


@pytest.mark.parametrize(
    ("per", "last", "first"),
    [
        ("day", "2026-11-27T23:59:59", "2026-11-28T00:00:00"),
        ("week", "2026-11-29T23:59:59", "2026-11-30T00:00:00"),
        ("month", "2026-11-30T23:59:59", "2026-12-01T00:00:00"),
        ("week", "2027-01-03T23:59:59", "2027-01-04T00:00:00"),
    ],
)
def test_a_budget_is_for_a_calendar_period(per: str, last: str, first: str) -> None:
    limits = Limits(budget_tokens=100, budget_per=per)  # type: ignore[arg-type]
    account = Account(WINDOW)
    end, begin = (datetime.datetime.fromisoformat(each + "+00:00").timestamp() for each in (last, first))
    reserve(account, limits, 100, 0, end)
    refusal = refuse(account, limits, 1, 1, end)
    assert (refusal.kind, refusal.wait) == ("budget", 0)
    reserve(account, limits, 100, 2, begin)


def test_a_budget_is_settled_in_the_period_of_its_reservation() -> None:
    limits = Limits(budget_tokens=100, budget_per="day")
    account = Account(WINDOW)
    first = reserve(account, limits, 60)
    second = reserve(account, limits, 40)
    account.settle(first, 10, 1)
    assert account.period_tokens == 50
    reserve(account, limits, 90, 2, NOON + DAY)
    account.settle(second, 0, 3)
    assert account.period_tokens == 90


def test_a_guess_takes_what_is_left_of_a_budget() -> None:
    limits = Limits(budget_tokens=100)
    account = Account(WINDOW)
    reserve(account, limits, 70)
    assert reserve(account, limits, 70).tokens == 30
    assert refuse(account, limits, 70).kind == "budget"


def test_what_is_left() -> None:
    limits = Limits(requests_per_minute=10, tokens_per_minute=100)
    account = Account(WINDOW)
    state = reserve(account, limits, 30, 5_000_000).state
    assert state.requests is not None
    assert state.tokens is not None
    assert (state.requests.limit, state.requests.remaining, state.requests.reset) == (10, 9, WINDOW)
    later = account.state(limits, 35_000_000)
    assert later.tokens is not None
    assert (later.tokens.limit, later.tokens.remaining, later.tokens.reset) == (100, 70, 30_000_000)
    assert account.state(Limits(max_concurrency=1), 0).requests is None


def test_an_account_is_empty_when_a_new_one_would_say_the_same() -> None:
    limits = Limits(requests_per_minute=10, budget_tokens=100, budget_per="day")
    account = Account(WINDOW)
    grant = reserve(account, limits, 30)
    assert not account.is_empty(2 * WINDOW, NOON)
    account.settle(grant, 30, WINDOW)
    assert not account.is_empty(2 * WINDOW, NOON)
    assert account.is_empty(2 * WINDOW, NOON + DAY)


def test_names_of_periods() -> None:
    assert period_of("day", NOON) == "2026-11-27"
    assert period_of("week", NOON) == "2026-W48"
    assert period_of("month", NOON) == "2026-11"
