"""When a request gets a second attempt: measured lateness, and the budget."""

from __future__ import annotations

from trio_cluster.routing.hedging import ENOUGH, MARGIN, Hedging


def learned(*durations: float) -> Hedging:
    hedging = Hedging()
    for duration in durations:
        hedging.late_after("m")
        hedging.record("m", duration)
    return hedging


def test_nothing_is_late_before_enough_answers_were_seen() -> None:
    assert learned(*[1.0] * (ENOUGH - 1)).late_after("m") is None
    assert learned(*[1.0] * ENOUGH).late_after("m") == MARGIN
    assert learned(*[1.0] * ENOUGH).late_after("other") is None


def test_late_is_later_than_95_of_100() -> None:
    assert learned(*[float(each) for each in range(1, 101)]).late_after("m") == 95.0 * MARGIN


def test_what_is_late_follows_the_last_answers() -> None:
    assert learned(*[1.0] * 300, *[3.0] * 200).late_after("m") == 3.0 * MARGIN
    assert learned(*[3.0] * 300, *[1.0] * 200).late_after("m") == MARGIN


def test_one_of_twenty_requests_pays_for_a_second_attempt_and_few_are_saved_up() -> None:
    hedging = Hedging()
    assert not hedging.allows("m")
    for _ in range(19):
        hedging.late_after("m")
    assert not hedging.allows("m")
    hedging.late_after("m")
    assert hedging.allows("m")
    hedging.spend("m")
    assert not hedging.allows("m")
    for _ in range(1000):
        hedging.late_after("m")
    spent = 0
    while hedging.allows("m"):
        hedging.spend("m")
        spent += 1
    assert spent == 5
    assert hedging.sent == 6


def test_the_models_that_are_remembered_are_bounded() -> None:
    hedging = Hedging()
    for number in range(2000):
        hedging.late_after(f"m{number}")
    for _ in range(20):
        hedging.late_after("m1999")
    assert hedging.allows("m1999")
    assert not hedging.allows("m0")
