"""The sliding window, against a model that keeps every admission for ever."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st

from trio_cluster.limits.window import EXACT, SlidingLog

WINDOW = 60_000_000
MS = 1000


class Model:
    """Every admission there ever was."""

    def __init__(self) -> None:
        self.all: list[tuple[int, int, int]] = []

    def add(self, time: int, requests: int, tokens: int) -> None:
        self.all.append((time, requests, tokens))

    def most(self, window: int = WINDOW) -> tuple[int, int]:
        """Return the most requests and tokens that are in any window: one that begins with an admission."""
        requests = tokens = 0
        for begins, _, _ in self.all:
            inside = [each for each in self.all if begins <= each[0] < begins + window]
            requests = max(requests, sum(each[1] for each in inside))
            tokens = max(tokens, sum(each[2] for each in inside))
        return requests, tokens


pauses = st.one_of(
    st.integers(0, 5),
    st.integers(0, WINDOW // 10),
    st.sampled_from([WINDOW - 1, WINDOW, WINDOW + 1, WINDOW // 2]),
)


@given(
    st.lists(st.tuples(pauses, st.integers(0, 120)), max_size=60),
    st.integers(1, 8),
    st.integers(100, 300),
)
def test_no_window_has_more_than_the_limit(
    asked: list[tuple[int, int]], per_minute: int, tokens_per_minute: int
) -> None:
    log, model, now = SlidingLog(WINDOW), Model(), 0
    for pause, tokens in asked:
        now += pause
        waits = (
            log.wait_for_requests(per_minute, 1, now),
            log.wait_for_tokens(tokens_per_minute, tokens, now),
        )
        if waits == (0, 0):
            log.add(now, 1, tokens)
            model.add(now, 1, tokens)
    requests, used = model.most()
    assert requests <= per_minute
    assert used <= tokens_per_minute


@given(
    st.lists(st.tuples(pauses, st.integers(1, 120)), min_size=1, max_size=40),
    st.integers(1, 8),
    st.integers(120, 300),
)
def test_what_is_told_to_wait_is_exact(
    asked: list[tuple[int, int]], per_minute: int, tokens_per_minute: int
) -> None:
    log, now = SlidingLog(WINDOW), 0
    for pause, tokens in asked:
        now += pause
        wait = log.wait_for_requests(per_minute, 1, now)
        more = log.wait_for_tokens(tokens_per_minute, tokens, now)
        assert wait is not None
        assert more is not None
        wait = max(wait, more)
        if wait:
            # A microsecond before it is too early, and then it is not.
            now += wait - 1
            assert (
                max(
                    log.wait_for_requests(per_minute, 1, now) or 0,
                    log.wait_for_tokens(tokens_per_minute, tokens, now) or 0,
                )
                == 1
            )
            now += 1
            assert log.wait_for_requests(per_minute, 1, now) == 0
            assert log.wait_for_tokens(tokens_per_minute, tokens, now) == 0
        log.add(now, 1, tokens)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(EXACT, 6 * EXACT))
def test_a_log_is_bounded_and_counts_too_long_if_anything(seed: int, per_minute: int) -> None:
    rng, log, now = random.Random(seed), SlidingLog(WINDOW), 0
    admitted: list[int] = []
    first = most = 0
    for _ in range(4 * EXACT):
        now += rng.choice([0, 1, 100, 20 * MS, 70 * MS])
        if log.wait_for_requests(per_minute, 1, now) == 0:
            log.add(now, 1, rng.randrange(5))
            admitted.append(now)
        while first < len(admitted) and admitted[first] <= now - WINDOW:
            first += 1
        assert len(admitted) - first <= log.requests
        # What counts too long is what was admitted in the last 1024th before the window.
        early = sum(now - WINDOW - WINDOW // EXACT <= each <= now - WINDOW for each in admitted[:first])
        assert log.requests <= len(admitted) - first + early
        most = max(most, len(log))
    assert most <= 2 * EXACT + 1


def test_entries_leave_after_exactly_one_window() -> None:
    log = SlidingLog(WINDOW)
    log.add(1000, 1, 7)
    log.advance(1000 + WINDOW - 1)
    assert (log.requests, log.tokens) == (1, 7)
    log.advance(1000 + WINDOW)
    assert (log.requests, log.tokens) == (0, 0)


def test_what_has_left_the_window_is_not_changed() -> None:
    log = SlidingLog(WINDOW)
    entry = log.add(0, 1, 7)
    log.advance(WINDOW)
    log.change(entry, -1, -7)
    assert (log.requests, log.tokens) == (0, 0)


def test_a_clock_that_goes_backwards_stands_still() -> None:
    log = SlidingLog(WINDOW)
    log.add(5 * WINDOW, 1, 1)
    log.add(0, 1, 1)
    log.advance(5 * WINDOW + WINDOW - 1)
    assert log.requests == 2


@pytest.mark.parametrize("count", [11, 1000])
def test_more_than_the_limit_is_never_within_it(count: int) -> None:
    log = SlidingLog(WINDOW)
    assert log.wait_for_tokens(10, count, 0) is None
    assert log.wait_for_requests(10, count, 0) is None


def test_the_reset_is_when_the_last_one_leaves() -> None:
    log = SlidingLog(WINDOW)
    assert log.reset_of_requests(0) == log.reset_of_tokens(0) == 0
    log.add(0, 1, 5)
    log.add(10, 1, 0)
    assert log.reset_of_requests(10) == WINDOW
    assert log.reset_of_tokens(10) == WINDOW - 10
