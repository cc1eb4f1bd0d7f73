"""Observers are called for the steps that they override, and for no others."""

from __future__ import annotations

import pytest

from trio_cluster.core.answer import Done, Head
from trio_cluster.core.call import Call
from trio_cluster.core.observer import Observer, Observers
from trio_cluster.core.outcome import Outcome
from trio_cluster.core.request import Request

REQUEST = Request(endpoint="chat.completions", kind="chat", model="m", body=b"{}")


class Ends(Observer):
    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def test_a_step_that_no_observer_overrides_has_no_listeners() -> None:
    observers = Observers()
    observers.add(Ends())
    observers.add(Observer())
    assert len(observers.ended) == 1
    steps = ("admitted", "routed", "queued", "forwarded", "first_byte", "retried")
    assert [getattr(observers, step) for step in steps] == [()] * len(steps)


def test_an_observer_that_was_removed_is_not_called_any_more() -> None:
    observers, first, second = Observers(), Ends(), Ends()
    observers.add(first)
    observers.add(second)
    observers.remove(first)
    for listener in observers.ended:
        listener(Call(REQUEST), "completed")
    assert (first.outcomes, second.outcomes) == ([], ["completed"])
    with pytest.raises(ValueError, match="not in list"):
        observers.remove(first)


def test_observers_are_called_when_a_call_waits_for_a_slot_and_when_its_answer_begins() -> None:
    called: list[str] = []

    class Steps(Observer):
        def on_queued(self, call: Call) -> None:
            called.append("queued")

        def on_first_byte(self, call: Call) -> None:
            called.append("first byte")

    call = Call(REQUEST)
    call.observers = Observers()
    call.observers.add(Steps())
    call.set_queued(True)
    call.set_queued(False)
    # What a worker reports repeatedly is passed on once.
    for _ in range(2):
        call.report(queued=True, produced=0)
    call.report(queued=False, produced=0)
    call.put(Head())
    call.body.put(b"x")
    call.put(Done())
    assert called == ["queued", "queued", "first byte"]
