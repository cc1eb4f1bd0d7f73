"""The lifespan of an application: told in order, failed with a reason, or not known at all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster.http1.lifespan import LifespanError, open_lifespan


class Application:
    """An application that answers each message of the lifespan with what it was made with."""

    def __init__(self, **answers: dict[str, Any]) -> None:
        self.received: list[str] = []
        self.answers = answers
        self.cancelled = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert (scope["type"], scope["asgi"]["version"]) == ("lifespan", "3.0")
        try:
            while True:
                message = await receive()
                self.received.append(message["type"].partition(".")[2])
                scope["state"]["latest"] = self.received[-1]
                await send(self.answers.get(self.received[-1], {"type": message["type"] + ".complete"}))
        except trio.Cancelled:
            self.cancelled = True
            raise


def failed(step: str, message: str) -> dict[str, Any]:
    return {"type": f"lifespan.{step}.failed", "message": message}


def lifespan_error(match: str) -> Any:
    return pytest.RaisesGroup(pytest.RaisesExc(LifespanError, match=match))


async def test_an_application_starts_before_the_block_and_shuts_down_after_it() -> None:
    app = Application()
    state: dict[str, Any] = {}
    async with open_lifespan(app, state):
        assert app.received == ["startup"]
        assert state == {"latest": "startup"}
    assert app.received == ["startup", "shutdown"]


async def test_an_application_that_cannot_start_is_an_error_before_the_block() -> None:
    app, entered = Application(startup=failed("startup", "no disk")), False
    with lifespan_error("failed to start: no disk"):
        async with open_lifespan(app, {}):
            entered = True
    assert not entered
    assert app.received == ["startup"]


async def test_an_application_that_cannot_shut_down_is_an_error_after_the_block() -> None:
    app, left = Application(shutdown=failed("shutdown", "still busy")), False
    with lifespan_error("failed to shut down: still busy"):
        async with open_lifespan(app, {}):
            left = True
    assert left


async def test_a_block_that_fails_or_is_cancelled_shuts_nothing_down() -> None:
    app = Application()
    with pytest.RaisesGroup(ValueError):
        async with open_lifespan(app, {}):
            raise ValueError
    with trio.CancelScope() as scope:
        async with open_lifespan(other := Application(), {}):
            scope.cancel()
            await trio.lowlevel.checkpoint()
    for each in (app, other):
        assert each.received == ["startup"]
        assert each.cancelled


async def test_an_application_is_not_waited_for_longer_than_a_minute(autojump_clock: MockClock) -> None:
    async def mute(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep_forever()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        await trio.sleep_forever()

    with lifespan_error("did not start within 60 s"):
        async with open_lifespan(mute, {}):
            raise AssertionError("it has not started")
    assert trio.current_time() == 60
    with lifespan_error("did not shut down within 60 s"):
        async with open_lifespan(slow, {}):
            pass
    assert trio.current_time() == 120


async def unknown(scope: Any, receive: Any, send: Any) -> None:
    raise NotImplementedError(scope["type"])


async def returns(scope: Any, receive: Any, send: Any) -> None:
    return


async def misspells(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "lifespan.started"})


@pytest.mark.parametrize(
    ("app", "told"), [(unknown, "NotImplemented"), (returns, ""), (misspells, "lifespan.started")]
)
async def test_an_application_without_a_lifespan_is_served_without(
    app: Callable[..., Any], told: str, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with open_lifespan(app, {}):
        pass
    assert trio.current_time() == 0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(told)
    assert all(told in message for message in messages)


async def test_a_lifespan_that_fails_in_the_middle_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    failing = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        await failing.wait()
        raise RuntimeError("a bug")

    async with open_lifespan(app, {}):
        failing.set()
        await trio.testing.wait_all_tasks_blocked()
    (record,) = caplog.records
    assert (record.levelno, record.message) == (logging.ERROR, "the lifespan of the application failed")
