"""One request between hypercorn and the application, without a connection."""

from __future__ import annotations

from typing import Any

import trio

from trio_cluster.http1.asgi import Message, Receive, Scope, Send
from trio_cluster.hypercorn_server.request import HypercornRequest

SCOPE = {"type": "http", "http_version": "1.1"}
START: Message = {"type": "http.response.start", "status": 200, "headers": []}
END: Message = {"type": "http.response.body", "body": b"x"}


async def no_body() -> Message:
    await trio.sleep_forever()
    raise AssertionError


async def test_what_is_sent_at_the_moment_of_a_cancellation_is_written_and_the_request_ends(
    autojump_clock: Any,
) -> None:
    written: list[Message] = []

    async def write(message: Message) -> None:
        await trio.lowlevel.checkpoint()
        written.append(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        # The task that writes is waiting for the next message, and is cancelled with everything else.
        around.cancel()
        await send(END)

    with trio.fail_after(10):
        with trio.CancelScope() as around:
            await HypercornRequest(app, SCOPE, no_body, write, lambda: None).run()
        assert around.cancelled_caught
    assert written == [START, END]
