"""Clients that leave at the last event of a stream, while the upstream server is still about to end its response."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from clusters import Clusters, Running, served_by, until
from raw_server import RawServer, Visit, open_raw_server
from test_chat_only import BODY, CHUNKS, events
from test_openai_engine import CHUNKED, Upstream, chunk, engine_with, posts, released, request
from test_usage import DONE, NEWER, STREAM, TOKEN, event

from trio_cluster.core.answer import Data, Done, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.observer import Observer
from trio_cluster.core.outcome import Outcome, outcome_of
from trio_cluster.engines import _upstream_calls

COUNTS = {"prompt_tokens": 9, "completion_tokens": 4}
CREATED = event({"type": "response.created", "response": {"usage": None}}, "response.created")

#: For each route: what is sent before the last event, that event, and the usage.
STREAMS: dict[str, tuple[str, bytes, bytes, Usage | None]] = {
    "chat": (
        "chat.completions",
        event(TOKEN) + event({"choices": [], "usage": COUNTS}),
        DONE,
        Usage(9, 4),
    ),
    "completions": ("completions", event(TOKEN), DONE, None),
    **{
        kind: (
            "responses",
            CREATED,
            event({"type": f"response.{kind}", "response": {"usage": NEWER}}, f"response.{kind}"),
            Usage(9, 4, 8, 2),
        )
        for kind in ("completed", "incomplete", "failed")
    },
    "messages": (
        "messages",
        event({"type": "message_start", "message": {"usage": {"input_tokens": 9}}}, "message_start")
        + event({"type": "message_delta", "usage": {"output_tokens": 4}}, "message_delta"),
        event({"type": "message_stop"}, "message_stop"),
        Usage(9, 4),
    ),
}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a time to end a response that does not pass, however busy the machine is."""
    monkeypatch.setattr(_upstream_calls, "_LAST_WAIT", 30.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a time to end a response that passes soon."""
    monkeypatch.setattr(_upstream_calls, "_LAST_WAIT", 0.1)


async def received(call: Call, end: bytes) -> bytes:
    """Return the body of a call up to ``end``, as soon as that has come."""
    data = b""
    with trio.fail_after(10):
        while end not in data:
            piece = await call.receive()
            data += bytes(piece.data) if isinstance(piece, Data) else b""
    return data


@pytest.mark.parametrize("route", STREAMS)
async def test_its_usage_is_known_and_the_connection_is_used_again(route: str, patient: None) -> None:
    endpoint, before, last, usage = STREAMS[route]
    left = [trio.Event(), trio.Event()]

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED + chunk(before) + chunk(last))
        await left[len(posts(raw)) - 1].wait()
        await visit.send(chunk(b"\n") + b"0\r\n\r\n")

    async with engine_with(script, ",usage=observe") as (server, raw, _):
        for number in range(2):
            call = server.router.open(request(STREAM, endpoint))
            assert await received(call, last) == before + last
            call.satisfy("client left")
            assert not call.released
            left[number].set()
            await released(call)
            assert (call.end, outcome_of(call)) == (Done(usage), "completed")
        check_connections(raw, reused=True)


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("rest", ["silent", "comments", "much", "cut"])
async def test_a_server_that_does_not_end_its_response_is_not_waited_for(
    rest: str, leaves: bool, impatient: None
) -> None:
    closed = trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED + chunk(event(TOKEN | {"usage": COUNTS}) + DONE))
        if rest != "cut":
            try:
                while rest != "silent":
                    await visit.send(chunk(b": ping\n\n" * (20_000 if rest == "much" else 1)))
                    await trio.sleep(0.01)
                await visit.closed(10)
            except trio.BrokenResourceError:
                pass
        closed.set()

    async with engine_with(script, ",usage=observe") as (server, _, _):
        call = server.router.open(request(STREAM))
        await received(call, DONE)
        with trio.fail_after(10):
            if leaves:
                call.satisfy("client left")
            else:
                while not isinstance(await call.receive(), Done):
                    pass
            await closed.wait()
        await released(call)
        assert (call.end, outcome_of(call)) == (Done(Usage(9, 4)), "completed")


async def test_what_follows_the_last_event_soon_is_forwarded(patient: None) -> None:
    taken = trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED + chunk(event(TOKEN) + DONE))
        await taken.wait()
        await visit.send(chunk(b": bye\n\n") + b"0\r\n\r\n")

    async with engine_with(script, ",usage=observe") as (server, _, _):
        call = server.router.open(request(STREAM))
        assert await received(call, DONE) == event(TOKEN) + DONE
        taken.set()
        assert await received(call, b": bye\n\n") == b": bye\n\n"


async def test_an_error_that_is_not_the_last_event_ends_nothing(impatient: None) -> None:
    sent = event({"error": {"message": "a hiccup"}}), event(TOKEN)

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED + b"".join(map(chunk, sent)))
        # Longer than the time in which a response would have to end.
        await trio.sleep(0.4)
        await visit.send(chunk(DONE) + b"0\r\n\r\n")

    async with engine_with(script, ",usage=observe") as (server, _, _):
        call = server.router.open(request(STREAM))
        assert await received(call, DONE) == b"".join(sent) + DONE


async def test_before_the_last_event_a_client_that_leaves_cancels(patient: None) -> None:
    closed = trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED + chunk(event(TOKEN)))
        await visit.closed(10)
        closed.set()

    async with engine_with(script) as (server, _, _):
        call = server.router.open(request(STREAM))
        await received(call, event(TOKEN))
        call.cancel("client left")
        await released(call)
        with trio.fail_after(10):
            await closed.wait()
        assert outcome_of(call) == "cancelled"


async def test_a_translated_message_ends_with_the_last_event_of_the_chat(patient: None) -> None:
    left = trio.Event()

    async def script(visit: Visit) -> None:
        received = await visit.request()
        if received.target != "/v1/chat/completions":
            await visit.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        await visit.send(CHUNKED + chunk(events(*CHUNKS)))
        await left.wait()
        await visit.send(b"0\r\n\r\n")

    async with engine_with(script) as (server, _, _):
        body = json.dumps(BODY | {"stream": True}).encode()
        call = server.router.open(request(body, "messages", content_type="application/json"))
        assert b"message_start" in await received(call, b'data: {"type":"message_stop"}\n\n')
        call.satisfy("client left")
        assert not call.released
        left.set()
        await released(call)
        assert call.end == Done(Usage(9, 2, 4))


# Through a master and a worker, from a client's socket


class Ends(Observer):
    """How the calls of a node have ended."""

    def __init__(self, node: Running) -> None:
        self.rows: list[tuple[Outcome, Any]] = []
        node.server.router.observers.add(self)

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        self.rows.append((outcome, call.end))


async def leave_at(port: int, path: str, body: bytes, mark: bytes) -> None:
    """Send a request, and close the connection when ``mark`` has come."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        await stream.send_all(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        data = b""
        while mark not in data:
            piece = await stream.receive_some()
            assert piece, data
            data += piece


BODY_TO_LEAVE = b'{"model":"m","input":"x","stream":true}'


@pytest.mark.parametrize("ends", [True, False])
async def test_the_call_is_completed_on_the_master_and_on_the_worker(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_upstream_calls, "_LAST_WAIT", 30.0 if ends else 0.1)
    left = [trio.Event(), trio.Event()]

    async def script(visit: Visit) -> None:
        await visit.request()
        _, before, last, _ = STREAMS["completed"]
        await visit.send(CHUNKED + chunk(before) + chunk(last))
        if ends:
            await left[len(posts(raw)) - 1].wait()
            await visit.send(b"0\r\n\r\n")
        else:
            await visit.closed(10)

    upstream = Upstream(script)
    async with open_raw_server(upstream.script) as raw, trio.open_nursery() as nursery:
        clusters = Clusters(nursery)
        master = await clusters.master()
        worker = await clusters.worker(master, f"openai:{raw.url}")
        await until(lambda: served_by(master) == 1)
        both = Ends(master), Ends(worker)
        for number in range(2):
            with trio.fail_after(10):
                port = int(master.url.rpartition(":")[2])
                await leave_at(port, "/v1/responses", BODY_TO_LEAVE, b"response.completed")
            if ends:
                # The client is known to have left, on both nodes, and nothing has ended.
                await until(
                    lambda: all(
                        any(call.satisfied for call in node.server.router.live) for node in (master, worker)
                    )
                )
                assert [len(node.rows) for node in both] == [number, number]
            left[number].set()
            await until(lambda: min(len(node.rows) for node in both) > number)  # noqa: B023
        for node in both:
            assert node.rows == [("completed", Done(Usage(9, 4, 8, 2)))] * 2
        check_connections(raw, reused=ends)
        for running in (master, worker):
            await running.end()


def check_connections(raw: RawServer, *, reused: bool) -> None:
    """Check how many connections two calls have needed, beside that of the polls."""
    assert len(posts(raw)) == 2
    assert len(raw.visits) <= 2 if reused else len(raw.visits) >= 2
