"""Handlers that keep their promises pass, and the error names the promise that a handler breaks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ApiError, ChatRequest, OutputChunk
from trio_cluster.testing import (
    BrokenPromise,
    DoesNotAnswer,
    DoesNotStop,
    FakeModel,
    HidesErrors,
    LeavesWorkBehind,
    MissesDeadline,
    MixesAnswers,
    ThreadedFakeModel,
    check_handler,
)

KINDS = [
    "chat", "embedding", "asr", "tts", "image_generation", "image_edit", "rerank", "moderation", "custom"
]  # fmt: skip
PHASES = ["before the first output", "in the middle of a stream", "held up by a slow client"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fake", [FakeModel, ThreadedFakeModel])
async def test_a_good_model_of_any_kind_keeps_all_promises(
    kind: Any, fake: type[FakeModel], autojump_clock: MockClock
) -> None:
    model = fake(first_after=2, interval=1, marked=True)
    report = await check_handler(model, kind=kind)
    assert (report.kind, report.replayable, report.first_output) == (kind, True, 2)
    reached = PHASES if kind in ("chat", "asr", "tts") else PHASES[:1]
    assert report.stopped == dict.fromkeys(reached, 0)
    assert report.not_reached == tuple(PHASES[len(reached) :])
    assert model.running == 0
    assert model.started == model.cleaned_up
    assert report.answer


async def test_a_chat_model_keeps_them_on_the_messages_api_too(autojump_clock: MockClock) -> None:
    report = await check_handler(FakeModel(first_after=2, interval=1, marked=True), endpoint="messages")
    assert report.stopped == dict.fromkeys(PHASES, 0)
    assert json.loads(report.answer)["type"] == "message"

    async def one_call(request: Any) -> Any:
        return OutputChunk.tool_call("f", {"said": request.last_text})

    assert (await check_handler(one_call, endpoint="messages")).replayable


async def test_passthrough_models_are_not_checked() -> None:
    with pytest.raises(ValueError, match="kind any are not checked"):
        await check_handler(FakeModel(), kind="any")
    with pytest.raises(ValueError, match="endpoint 'messages'"):
        await check_handler(FakeModel(), kind="embedding", endpoint="messages")


@pytest.mark.parametrize("fake", [FakeModel, ThreadedFakeModel])
async def test_a_good_model_passes_in_real_time_too(fake: type[FakeModel]) -> None:
    report = await check_handler(fake(first_after=0.01, interval=0.01), bound=5)
    assert list(report.stopped) == PHASES
    assert report.duration >= 0.03


async def test_all_signatures_are_accepted(autojump_clock: MockClock) -> None:
    async def yields(request: ChatRequest) -> AsyncIterator[str]:
        for word in request.last_text.split():
            yield word

    async def returns(request: ChatRequest) -> str:
        return request.last_text

    def thread(request: ChatRequest) -> Iterator[str]:
        yield from request.last_text.split()

    for handler in (yields, returns, thread):
        report = await check_handler(handler)
        assert report.replayable
        # A window of one byte stops even a handler that never waits in the middle of its output.
        assert set(report.stopped) >= set(PHASES[1:])
    with pytest.raises(TypeError):
        await check_handler(lambda: "")


async def test_a_response_of_tool_calls_alone_is_a_response(autojump_clock: MockClock) -> None:
    async def calls(request: ChatRequest) -> AsyncIterator[dict[str, Any]]:
        call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        yield {"tool_calls": [call]}

    await check_handler(calls)


async def nothing(request: ChatRequest) -> AsyncIterator[str]:
    for each in ():
        yield each


async def too_late(request: ChatRequest) -> str:
    await trio.sleep(100)
    return "late"


async def broken(request: ChatRequest) -> str:
    raise ApiError(418, "I am a teapot")


async def no_text(request: ChatRequest) -> AsyncIterator[bytes]:
    yield b"bytes"


@pytest.mark.parametrize(
    ("handler", "why"),
    [(nothing, "empty"), (too_late, "timed out|produced nothing|within"), (broken, "418"), (no_text, "500")],
)
async def test_no_response_is_a_broken_promise(handler: Any, why: str, autojump_clock: MockClock) -> None:
    with pytest.raises(DoesNotAnswer, match=why):
        await check_handler(handler, patience=50)


@pytest.mark.parametrize("phase", PHASES)
async def test_not_stopping_is_a_broken_promise(phase: str, autojump_clock: MockClock) -> None:
    model = FakeModel(first_after=1, interval=1)
    stubborn = iter([0.0] * PHASES.index(phase) + [10.0] + [0.0] * 20)

    async def handler(request: ChatRequest, provider: Any) -> None:
        try:
            await model(request, provider)
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.sleep(next(stubborn))
            raise

    with pytest.raises(DoesNotStop, match=f"{phase}, it still runs 1 s later"):
        await check_handler(handler)


async def test_a_thread_that_does_not_check_for_cancellation_does_not_stop() -> None:
    def handler(request: ChatRequest) -> str:
        time.sleep(0.3)
        return "done"

    with pytest.raises(DoesNotStop, match="before the first output"):
        await check_handler(handler, bound=0.1)


async def test_continuing_after_the_deadline_is_a_broken_promise(autojump_clock: MockClock) -> None:
    model = FakeModel(interval=1)

    async def handler(request: ChatRequest, provider: Any) -> None:
        hurried = trio.current_effective_deadline() - trio.current_time() < 1
        with trio.CancelScope(shield=hurried):
            await model(request, provider)

    with pytest.raises(MissesDeadline, match="after its deadline"):
        await check_handler(handler)


async def test_a_thread_that_is_left_running_is_work_left_behind() -> None:
    asked = 0
    over = threading.Event()

    async def handler(request: ChatRequest) -> AsyncIterator[str]:
        nonlocal asked
        asked += 1
        yield "a"
        if asked > 2:
            await trio.to_thread.run_sync(over.wait, abandon_on_cancel=True)

    try:
        with pytest.raises(LeavesWorkBehind, match="1 threads more"):
            await check_handler(handler, bound=0.2)
    finally:
        over.set()


async def test_a_task_that_is_left_running_is_work_left_behind(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async def handler(request: ChatRequest) -> AsyncIterator[str]:
        nursery.start_soon(trio.sleep_forever)
        yield "a"

    with pytest.raises(LeavesWorkBehind, match="1 tasks more than before"):
        await check_handler(handler)
    nursery.cancel_scope.cancel()


async def test_what_a_handler_keeps_from_its_first_call_on_is_not_left_behind(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    engine: list[str] = []

    async def handler(request: ChatRequest) -> AsyncIterator[str]:
        if not engine:
            engine.append("started")
            nursery.start_soon(trio.sleep_forever)
        yield "a"

    await check_handler(handler)
    nursery.cancel_scope.cancel()


async def test_mixing_up_two_responses_is_a_broken_promise(autojump_clock: MockClock) -> None:
    last = [""]

    async def handler(request: ChatRequest) -> AsyncIterator[str]:
        last[0] = request.last_text
        yield "about "
        await trio.sleep(1)
        yield last[0]

    with pytest.raises(MixesAnswers, match="beside another call"):
        await check_handler(handler)


async def test_failing_beside_another_call_is_a_broken_promise(autojump_clock: MockClock) -> None:
    running = 0

    async def handler(request: ChatRequest) -> AsyncIterator[str]:
        nonlocal running
        running += 1
        try:
            if running > 1:
                raise RuntimeError("one at a time")
            yield "a"
            await trio.sleep(1)
        finally:
            running -= 1

    with pytest.raises(MixesAnswers, match="one had no response"):
        await check_handler(handler)


async def test_a_model_with_random_output_is_reported_as_not_replayable(autojump_clock: MockClock) -> None:
    count = 0

    async def handler(request: ChatRequest) -> OutputChunk:
        nonlocal count
        count += 1
        return OutputChunk.text_delta(str(count))

    assert not (await check_handler(handler)).replayable


BOOM = {"messages": [{"role": "user", "content": "boom"}]}


async def test_an_error_that_becomes_a_response_is_a_broken_promise(autojump_clock: MockClock) -> None:
    async def handler(request: ChatRequest) -> str:
        try:
            if request.last_text == "boom":
                raise RuntimeError("boom")
        except RuntimeError:
            return "sorry"
        return "fine"

    async def honest(request: ChatRequest) -> str:
        if request.last_text == "boom":
            raise RuntimeError("boom")
        return "fine"

    with pytest.raises(HidesErrors, match="looks complete"):
        await check_handler(handler, failing=BOOM)
    await check_handler(honest, failing=BOOM)


async def test_given_requests_are_sent(autojump_clock: MockClock) -> None:
    model = FakeModel(marked=True)
    one = {"messages": [{"role": "user", "content": "one"}], "temperature": 0.5}
    two = {"messages": [{"role": "user", "content": "two"}]}
    report = await check_handler(model, request=one, other=two)
    assert b"onet0" in report.answer
    assert {request.last_text for request in model.requests} == {"one", "two"}  # type: ignore[attr-defined]
    sound = {"file": b"RIFF....WAVE", "language": "en"}
    await check_handler(heard := FakeModel(), kind="asr", request=sound)
    assert {(each.audio, each.language) for each in heard.requests} == {(b"RIFF....WAVE", "en")}  # type: ignore[attr-defined]
    with pytest.raises(ApiError, match="messages"):
        await check_handler(model, request={"messages": []})


async def test_all_broken_promises_are_failed_assertions() -> None:
    for each in BrokenPromise.__subclasses__():
        assert issubclass(each, AssertionError)
        assert each.__doc__
