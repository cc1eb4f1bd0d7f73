"""When a reservation is settled, and for what: exactly once, when no work is left and no other call can come."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from trio_cluster import ApiError
from trio_cluster.core.answer import Data, Done, Failed, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.request import Request
from trio_cluster.errors import Overloaded, WorkerLost
from trio_cluster.limits.account import Demand, LimitState
from trio_cluster.limits.reservation import Reservation

RESERVED, PROMPT = 1000, 100


class Booked:
    """A reservation, and how it was settled."""

    def __init__(self) -> None:
        self.settled: list[tuple[int | None, bool]] = []
        self.learnt: list[Usage] = []
        self.reservation = Reservation(
            Demand(RESERVED, 0, PROMPT), RESERVED, LimitState(), self._settle, self._learn
        )

    def _settle(self, tokens: int | None, counts: bool) -> None:
        self.settled.append((tokens, counts))

    def _learn(self, _: Call, usage: Usage) -> None:
        self.learnt.append(usage)

    def open(self) -> Call:
        call = Call(Request("chat.completions", "chat", "m", b"{}"))
        self.reservation.follow(call)
        return call


LOST = Failed(WorkerLost("w", "it was killed"), retryable=True)


def test_a_complete_answer_counts_as_it_reports() -> None:
    booked = Booked()
    call = booked.open()
    call.put(Head())
    call.put(Done(Usage(30, 20, cached_tokens=10)))
    assert booked.settled == []
    call.release()
    assert booked.settled == [(50, True)]
    assert booked.learnt == [Usage(30, 20, cached_tokens=10)]
    booked.reservation.end_request()
    assert len(booked.settled) == 1


def test_a_complete_answer_that_reports_nothing_counts_as_reserved() -> None:
    booked = Booked()
    call = booked.open()
    call.put(Head())
    call.put(Done())
    call.release()
    assert booked.settled == [(None, True)]


def test_an_error_of_the_server_behind_a_model_counts_as_nothing() -> None:
    booked = Booked()
    call = booked.open()
    call.put(Head(429))
    call.put(Data(b"no"))
    call.put(Done())
    call.release()
    assert booked.settled == [(0, True)]


@pytest.mark.parametrize("how", ["cancelled", "failed", "released"])
def test_nothing_before_the_first_byte(how: str) -> None:
    booked = Booked()
    call = booked.open()
    if how == "cancelled":
        call.cancel("client left")
    elif how == "failed":
        call.put(Failed(ApiError(500, "no")))
    assert booked.settled == []
    call.release()
    assert booked.settled == [(0, True)]


@pytest.mark.parametrize(("size", "counts"), [(0, PROMPT), (100, PROMPT + 50), (10_000, RESERVED)])
def test_what_was_broken_off_counts_as_its_prompt_and_its_bytes(size: int, counts: int) -> None:
    booked = Booked()
    call = booked.open()
    call.put(Head())
    call.put(Data(bytes(size)))
    call.body.receive_nowait()
    call.cancel("client left")
    call.release()
    assert booked.settled == [(counts, True)]


def test_a_retry_keeps_the_reservation() -> None:
    booked = Booked()
    lost = booked.open()
    lost.put(LOST)
    lost.release()
    assert booked.settled == []
    again = booked.open()
    again.put(Head())
    again.put(Done(Usage(1, 2)))
    again.release()
    assert booked.settled == [(3, True)]


def test_what_is_not_retried_after_all_is_settled_with_the_request() -> None:
    booked = Booked()
    lost = booked.open()
    lost.put(LOST)
    lost.release()
    booked.reservation.end_request()
    assert booked.settled == [(0, True)]


def test_work_that_goes_on_after_the_request_holds_the_reservation() -> None:
    booked = Booked()
    call = booked.open()
    call.cancel("client left")
    booked.reservation.end_request()
    assert booked.settled == []
    call.release()
    assert booked.settled == [(0, True)]


def test_the_work_of_a_lost_call_that_goes_on_holds_it_too() -> None:
    booked = Booked()
    lost = booked.open()
    lost.put(LOST)
    again = booked.open()
    again.put(Head())
    again.put(Done(Usage(1, 2)))
    again.release()
    assert booked.settled == []
    lost.release()
    booked.reservation.end_request()
    assert booked.settled == [(3, True)]


def test_a_request_without_a_call_counts_as_none() -> None:
    booked = Booked()
    booked.reservation.end_request()
    assert booked.settled == [(0, False)]


events = st.sampled_from(
    ["open", "head", "data", "done", "usage", "fail", "lose", "cancel", "release", "end"]
)


@given(st.lists(events, max_size=25), st.randoms())
def test_whatever_happens_it_is_settled_once_and_never_too_early(steps: list[str], rng: Any) -> None:
    booked = Booked()
    calls: list[Call] = []
    over = False
    for step in steps:
        live = [call for call in calls if not call.released]
        if step == "open":
            # A second call is opened only for one that was lost, and none after the request.
            if not over and not booked.reservation.settled and len(calls) < 3:
                calls.append(booked.open())
        elif step == "end":
            over = True
            booked.reservation.end_request()
        elif live:
            call = rng.choice(live)
            if step == "release":
                call.release()
            elif step == "cancel":
                call.cancel("why")
            elif call.ended:
                continue
            elif step == "head" and not call.begun:
                call.put(Head())
            elif step == "data" and call.begun:
                call.put(Data(b"some"))
            elif step in ("done", "usage") and call.begun:
                call.put(Done(Usage(5, 5) if step == "usage" else None))
            elif step in ("fail", "lose"):
                call.put(LOST if step == "lose" else Failed(ApiError(500, "no")))
        assert len(booked.settled) <= 1
        if booked.settled:
            assert all(call.released for call in calls)
    booked.reservation.end_request()
    for call in calls:
        call.release()
    assert len(booked.settled) == 1
    assert booked.settled[0][1] == bool(calls)


def test_a_call_that_found_no_room_may_be_followed_by_one_for_the_next_model() -> None:
    booked = Booked()
    full = booked.open()
    full.put(Failed(Overloaded("full"), over_capacity=True))
    full.release()
    assert booked.settled == []
    following = booked.open()
    following.put(Head())
    following.put(Done(Usage(3, 4)))
    following.release()
    assert booked.settled == [(7, True)]
