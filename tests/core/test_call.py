from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_cluster.core.answer import Data, Done, Event, Failed, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.limits import WINDOW
from trio_cluster.core.model_state import ModelWait
from trio_cluster.core.outcome import outcome_of
from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError, CallCancelled
from trio_cluster.protocol import WINDOW as WIRE_WINDOW

REQUEST = Request(endpoint="chat.completions", kind="chat", model="m", body=b"{}")


def test_the_window_of_a_call_is_the_window_of_the_wire() -> None:
    assert WINDOW == WIRE_WINDOW


async def test_events_are_received_in_the_order_in_which_they_were_put() -> None:
    call = Call(REQUEST)
    events: list[Event] = [Head(), Data(b"a"), Data(b"b"), Done()]
    for event in events:
        call.put(event)
    assert [await call.receive() for _ in events] == events
    with pytest.raises(trio.EndOfChannel):
        await call.receive()
    with pytest.raises(trio.EndOfChannel):
        call.receive_nowait()


async def test_receiving_waits_for_what_is_not_there_yet(nursery: trio.Nursery) -> None:
    call = Call(REQUEST)
    got: list[Event] = []

    async def consume() -> None:
        got.append(await call.receive())

    nursery.start_soon(consume)
    await wait_all_tasks_blocked()
    with pytest.raises(trio.WouldBlock):
        call.receive_nowait()
    call.put(Head())
    await wait_all_tasks_blocked()
    assert got == [Head()]


async def test_a_cancelled_receive_loses_nothing() -> None:
    call = Call(REQUEST)
    with trio.move_on_after(0) as scope:
        await call.receive()
    assert scope.cancelled_caught
    call.put(Head())
    with trio.move_on_after(0):
        await call.receive()
    assert call.receive_nowait() == Head()


@pytest.mark.parametrize(
    "events",
    [
        [Data(b"early")],
        [Done()],
        [Head(), Head()],
        [Head(), Done(), Data(b"late")],
        [Head(), Done(), Done()],
        [Failed(ApiError(500, "x")), Head()],
    ],
    ids=["data first", "done first", "two heads", "data after done", "done twice", "head after failed"],
)
def test_an_answer_that_does_not_fit_the_grammar_is_refused(events: list[Event]) -> None:
    call = Call(REQUEST)
    for event in events[:-1]:
        call.put(event)
    with pytest.raises(RuntimeError):
        call.put(events[-1])


def test_a_cancel_ends_the_answer_at_once_and_asks_the_producer_once() -> None:
    asked: list[str] = []
    call = Call(REQUEST, on_cancel=asked.append)
    call.put(Head())
    call.put(Data(b"never taken"))
    call.cancel("client left")
    call.cancel("again")
    event = call.receive_nowait()
    assert isinstance(event, Failed)
    assert isinstance(event.error, CallCancelled)
    assert "client left" in event.error.message
    assert asked == ["client left"]
    assert call.ended
    assert not call.released
    assert call.body.waiting_bytes == 0


def test_events_that_are_put_after_a_cancel_are_dropped() -> None:
    call = Call(REQUEST)
    call.cancel("client left")
    call.put(Head())
    call.put(Data(b"x"))
    call.put(Done())
    assert isinstance(call.receive_nowait(), Failed)
    with pytest.raises(trio.EndOfChannel):
        call.receive_nowait()


def test_a_cancel_after_the_end_does_nothing() -> None:
    asked: list[str] = []
    call = Call(REQUEST, on_cancel=asked.append)
    call.put(Head())
    call.put(Done())
    call.cancel("too late")
    assert asked == []
    assert call.cancelled is None


def test_the_phase_of_a_call() -> None:
    call = Call(REQUEST)
    assert call.phase == "waiting"
    call.queued = True
    assert call.phase == "queued"
    call.queued = False
    call.put(Head())
    assert call.phase == "streaming"
    call.put(Done())
    assert call.phase == "stopping"


@pytest.mark.parametrize("final", [False, True])
def test_a_cancellation_decides_whether_the_client_should_try_again(final: bool) -> None:
    call = Call(REQUEST)
    call.cancel("enough", final=final)
    assert isinstance(call.end, Failed)
    assert isinstance(call.end.error, CallCancelled)
    assert call.end.error.final is final


def test_sinks_get_first_what_waited_and_then_everything_as_it_is_put_and_say_what_has_gone_on() -> None:
    sunk: list[Event | bytes | memoryview] = []
    taken: list[int] = []

    def take(data: bytes | memoryview, last: bool) -> bool:
        sunk.append(data)
        return gone

    call = Call(REQUEST, on_consumed=taken.append)
    call.put(Head())
    call.put(Data(b"1"))
    gone = True
    call.redirect(sunk.append, take)
    assert (sunk, taken, call.body.waiting_bytes) == ([Head(), b"1"], [1], 0)
    call.body.put(b"22")
    assert (taken, call.body.waiting_bytes, call.body.delivered) == ([1, 2], 0, 3)
    gone = False
    call.put(Data(b"333"))
    assert (taken, call.body.waiting_bytes, call.body.delivered) == ([1, 2], 3, 3)
    call.body.consumed(3)
    assert (taken, call.body.waiting_bytes, call.body.delivered) == ([1, 2, 3], 0, 6)
    call.put(Done())
    assert sunk == [Head(), b"1", b"22", b"333", Done()]


def test_a_sink_gets_the_end_of_a_cancelled_call() -> None:
    call = Call(REQUEST)
    sunk: list[Event] = []
    call.redirect(sunk.append, lambda data, last: False)
    call.cancel("client left")
    assert [type(event) for event in sunk] == [Failed]


@pytest.mark.parametrize("window", [WINDOW, 1])
async def test_a_producer_waits_while_a_window_of_bytes_is_untaken(
    window: int, nursery: trio.Nursery
) -> None:
    call = Call(REQUEST)
    assert call.body.window == WINDOW
    call.body.window = window
    call.put(Head())
    call.put(Data(bytes(window)))
    went_on = trio.Event()

    async def produce() -> None:
        await call.body.wait_room()
        went_on.set()

    nursery.start_soon(produce)
    await wait_all_tasks_blocked()
    assert not went_on.is_set()
    assert call.receive_nowait() == Head()
    call.receive_nowait()
    await wait_all_tasks_blocked()
    assert went_on.is_set()


async def test_a_producer_behind_a_sink_waits_until_the_bytes_have_gone_on(nursery: trio.Nursery) -> None:
    call = Call(REQUEST)
    call.redirect(lambda _: None, lambda data, last: False)
    call.put(Head())
    call.put(Data(bytes(WINDOW + 10)))
    went_on = trio.Event()

    async def produce() -> None:
        await call.body.wait_room()
        went_on.set()

    nursery.start_soon(produce)
    call.body.consumed(10)
    await wait_all_tasks_blocked()
    assert not went_on.is_set()
    call.body.consumed(1)
    await wait_all_tasks_blocked()
    assert went_on.is_set()


async def test_a_cancel_frees_a_producer_that_waits_for_room(nursery: trio.Nursery) -> None:
    call = Call(REQUEST)
    call.put(Head())
    call.put(Data(bytes(WINDOW)))
    nursery.start_soon(call.body.wait_room)
    await wait_all_tasks_blocked()
    call.cancel("client left")


def test_the_producer_gets_credit_when_bytes_are_taken_and_not_when_they_are_put() -> None:
    taken: list[int] = []
    call = Call(REQUEST, on_consumed=taken.append)
    call.put(Head())
    call.put(Data(b"12345"))
    assert taken == []
    call.receive_nowait()
    call.receive_nowait()
    assert taken == [5]
    assert call.body.delivered == 5


def test_release_calls_each_callback_once() -> None:
    call = Call(REQUEST)
    called: list[str] = []
    call.on_release(lambda: called.append("first"))
    call.put(Head())
    call.put(Done())
    assert called == []
    call.release()
    call.release()
    call.on_release(lambda: called.append("late"))
    assert called == ["first", "late"]


def test_work_that_stops_without_an_answer_has_failed() -> None:
    call = Call(REQUEST)
    call.put(Head())
    call.release()
    assert call.receive_nowait() == Head()
    assert isinstance(call.receive_nowait(), Failed)


# A consumer that has the whole answer


def test_a_satisfied_call_is_complete_and_its_producer_is_asked_to_stop() -> None:
    reasons: list[str] = []
    call = Call(REQUEST, on_cancel=reasons.append)
    call.put(Head())
    call.put(Data(b"all"))
    call.satisfy("client left")
    call.satisfy("again")
    call.cancel("too late")
    assert (call.end, call.cancelled, reasons) == (Done(), None, ["client left"])
    assert (call.satisfied, call.released, outcome_of(call)) == (True, False, "completed")
    assert call.receive_nowait() == Done()
    call.release()
    assert outcome_of(call) == "completed"


@pytest.mark.parametrize(
    ("late", "end"),
    [
        ([Done(Usage(3, 4))], Done(Usage(3, 4))),
        ([Done(Usage(3, 4)), Done()], Done(Usage(3, 4))),
        ([Done(), Failed(ApiError(500, "no"))], Done()),
        ([Data(b"more"), Failed(ApiError(500, "no"))], Done()),
    ],
)
def test_what_follows_can_only_add_the_usage(late: list[Event], end: Event) -> None:
    call = Call(REQUEST)
    call.put(Head())
    call.satisfy("client left")
    for event in late:
        call.put(event)
    call.release()
    assert (call.end, outcome_of(call)) == (end, "completed")


def test_without_a_beginning_nobody_is_satisfied() -> None:
    call = Call(REQUEST)
    call.satisfy("client left")
    assert (call.satisfied, outcome_of(call)) == (False, "cancelled")


def test_an_answer_that_has_ended_stays_as_it_is() -> None:
    call = Call(REQUEST)
    call.put(Head())
    call.put(Failed(ApiError(500, "no")))
    call.satisfy("client left")
    assert (call.satisfied, outcome_of(call)) == (False, "failed")


@pytest.mark.parametrize("ended", [True, False])
async def test_an_answer_that_has_begun_or_ended_waits_for_no_model_any_more(ended: bool) -> None:
    call = Call(REQUEST)
    call.set_model_wait(ModelWait("starting m"))
    assert call.model_wait == ModelWait("starting m")
    if ended:
        call.cancel("client left")
    else:
        call.put(Head())
    assert call.model_wait is None
    ready_since, cold_since = call.ready_since, call.cold_since
    # Its producer has not noticed that yet.
    call.set_model_wait(ModelWait("waiting for memory"))
    assert call.model_wait is None
    call.set_model_wait(None)
    assert (call.ready_since, call.cold_since) == (ready_since, cold_since)
