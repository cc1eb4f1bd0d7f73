"""How fast a replica has been, and how much work is left: values with explicit time."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from trio_cluster.routing.speed import Rate, Workload


def test_a_rate_is_usual_until_something_was_measured() -> None:
    rate = Rate()
    assert rate.value(5.0, usual=0.25) == 0.25
    rate.add(3.0, 6.0, now=5.0)
    assert rate.value(5.0, usual=0.25) == 0.5


def test_the_last_samples_count_by_their_units() -> None:
    rate = Rate()
    rate.add(1.0, 1.0, 0.0)
    rate.add(10.0, 100.0, 0.0)
    assert rate.value(0.0, 9.0) == pytest.approx((0.9 + 10) / (0.9 + 100))
    for _ in range(60):
        rate.add(2.0, 1.0, 0.0)
    assert rate.value(0.0, 9.0) == pytest.approx(2.0, rel=0.02)


def test_half_of_what_was_measured_counts_after_a_minute() -> None:
    rate = Rate()
    rate.add(8.0, 1.0, 0.0)
    assert rate.value(60.0, usual=2.0) == pytest.approx(5.0)
    assert rate.value(6000.0, usual=2.0) == pytest.approx(2.0)


def test_a_sample_of_no_units_is_no_measurement() -> None:
    rate = Rate()
    rate.add(0.0, 0.0, 1.0)
    assert rate.value(1.0, usual=3.0) == 3.0


def test_work_is_done_while_there_are_calls() -> None:
    work = Workload()
    work.begin(10.0, now=0.0)
    assert work.left(4.0) == 6.0
    work.begin(5.0, now=4.0)
    assert work.left(5.0) == 10.0
    # What takes longer than expected is not finished.
    assert work.left(100.0) == pytest.approx(1.5)
    work.finish(10.0, 100.0, ended=True)
    assert work.left(100.0) == pytest.approx(0.5)
    work.finish(5.0, 101.0, ended=True)
    assert (work.left(101.0), work.calls, work.last_end) == (0.0, 0, 101.0)


def test_what_ends_early_leaves_nothing() -> None:
    work = Workload()
    work.begin(10.0, 0.0)
    work.begin(1.0, 0.0)
    work.finish(10.0, 0.5, ended=True)
    assert work.left(0.5) == 1.0


@given(st.lists(st.tuples(st.sampled_from(["begin", "part", "end"]), st.floats(0, 100), st.floats(0, 10))))
def test_the_work_left_lies_between_nothing_and_what_is_open(steps: list[tuple[str, float, float]]) -> None:
    work, now, calls = Workload(), 0.0, list[float]()
    for step, seconds, passed in steps:
        now += passed
        if step == "begin":
            work.begin(seconds, now)
            calls.append(seconds)
        elif calls and step == "part":
            part = min(seconds, calls[0])
            work.finish(part, now)
            calls[0] -= part
        elif calls:
            work.finish(calls.pop(0), now, ended=True)
        assert -1e-9 <= work.left(now) <= sum(calls) * (1 + 1e-9) + 1e-6
        assert work.calls == len(calls)
        if not calls:
            assert work.left(now) == 0.0
