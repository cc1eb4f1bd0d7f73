"""Clients that leave at the last event of a stream: the request is complete, though the answer has not ended."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from http_node import CHAT, EVENTS, HttpNode, Served, Wire, open_http_node
from test_access_log import lines

from trio_cluster.core.answer import Done, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.observer import Observer
from trio_cluster.core.outcome import Outcome

DONE = b"data: [DONE]\n\n"
#: For each route: its path, its body, and events that are its last one.
ROUTES: dict[str, tuple[str, dict[str, object], list[bytes]]] = {
    "chat": (
        "/v1/chat/completions",
        CHAT,
        [DONE, b"data: [DONE]\r\n\r\n", b'data: {"error":{"code":1}}\n\n'],
    ),
    "completions": ("/v1/completions", {"model": "m", "prompt": "x"}, [DONE]),
    "responses": (
        "/v1/responses",
        {"model": "m", "input": "x", "store": False},
        [
            b'event: response.%b\ndata: {"type":"response.%b","response":{}}\n\n' % (kind, kind)
            for kind in (b"completed", b"incomplete", b"failed")
        ],
    ),
    "messages": (
        "/v1/messages",
        CHAT | {"max_tokens": 9},
        [b'event: message_stop\ndata: {"type":"message_stop"}\n\n'],
    ),
}
LAST = [(route, event) for route, (_, _, events) in ROUTES.items() for event in events]
TOKEN = (
    b'data: {"type":"x","choices":[{"index":0,"delta":{"content":"[DONE] response.completed error"}}]}\n\n'
)


class Ends(Observer):
    """How calls have ended."""

    def __init__(self) -> None:
        self.rows: list[tuple[Outcome, object]] = []

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        self.rows.append((outcome, call.end))


@asynccontextmanager
async def streaming(
    route: str, caplog: pytest.LogCaptureFixture, **server: object
) -> AsyncIterator[tuple[HttpNode, Wire, Served, Ends]]:
    """Have a stream that has begun; at the end, its client has left, and its request is over."""
    caplog.set_level(logging.INFO, "trio_cluster.access")
    path, body, _ = ROUTES[route]
    ends = Ends()
    async with open_http_node(None, access_log=True, **server) as node:
        node.router.observers.add(ends)
        async with node.connect() as wire:
            await wire.request("POST", path, json.dumps(body | {"stream": True}).encode())
            served = await node.backend.next()
            served.head(EVENTS).data(TOKEN)
            await wire.until(TOKEN)
            yield node, wire, served, ends
            # A write that has not returned is not known to be complete.
            await trio.testing.wait_all_tasks_blocked(0.01)
        await served.wait_cancelled()
        with trio.fail_after(5):
            while not lines(caplog):  # noqa: ASYNC110
                await trio.sleep(0.01)


@pytest.mark.parametrize("http", ["lean", "hypercorn"])
@pytest.mark.parametrize(("route", "last"), LAST)
async def test_the_request_is_completed_everywhere(
    route: str, last: bytes, http: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with streaming(route, caplog, http=http) as (_, wire, served, ends):
        served.data(TOKEN).data(last)
        await wire.until(last)
        # A comment changes nothing.
        served.data(b": still here\n\n")
        await wire.until(b": still here\n\n")
    assert served.call.cancelled is None
    assert served.reason == "client left after the last event"
    assert ends.rows == [("completed", Done())]
    ((_, fields),) = lines(caplog)
    assert "ended" not in fields


async def test_the_usage_that_comes_after_that_counts(caplog: pytest.LogCaptureFixture) -> None:
    async with streaming("chat", caplog) as (_, wire, served, ends):
        call = served.call
        call._on_cancel = lambda reason: (served.cancelled.set(), call.put(Done(Usage(3, 4))), call.release())
        served.data(DONE)
        await wire.until(DONE)
    assert ends.rows == [("completed", Done(Usage(3, 4)))]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("more", [b"", TOKEN, b"data: {"])
async def test_before_the_last_event_it_is_cancelled(
    route: str, more: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with streaming(route, caplog) as (_, _, served, ends):
        served.data(more)
    assert (served.call.cancelled, ends.rows[0][0]) == ("client left", "cancelled")
    assert lines(caplog)[0][1]["ended"] == "client left"


async def test_the_beginning_of_the_last_event_is_not_the_last_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with streaming("chat", caplog) as (_, _, served, ends):
        served.data(DONE[:-1])
    assert ends.rows[0][0] == "cancelled"


async def test_a_last_event_that_is_followed_by_others_is_none(caplog: pytest.LogCaptureFixture) -> None:
    error = b'data: {"error":{"message":"a hiccup"}}\n\n'
    async with streaming("chat", caplog) as (_, wire, served, ends):
        served.data(error).data(TOKEN)
        await wire.until(TOKEN)
    assert ends.rows[0][0] == "cancelled"


@pytest.mark.parametrize("http", ["lean", "hypercorn"])
async def test_a_last_event_that_was_not_written_is_not_had(
    http: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with streaming("chat", caplog, http=http) as (_, _, served, ends):
        # More than the kernel takes for a client that does not read.
        for _ in range(40):
            served.data(b"data: {" + b" " * 500_000 + b"}\n\n")
        served.data(DONE)
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert ends.rows[0][0] == "cancelled"
    assert lines(caplog)[0][1]["ended"] == "client left"


async def test_images_have_no_event_that_is_certain_to_be_the_last(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.access")
    last = b'event: image_generation.completed\ndata: {"type":"image_generation.completed"}\n\n'
    async with open_http_node(None) as node:
        node.add("pictures", "image_generation")
        async with node.connect() as wire:
            body = {"model": "pictures", "prompt": "x", "stream": True}
            await wire.request("POST", "/v1/images/generations", json.dumps(body).encode())
            served = await node.backend.next()
            served.head(EVENTS).data(last)
            await wire.until(last)
        await served.wait_cancelled()
        assert served.call.cancelled == "client left"
