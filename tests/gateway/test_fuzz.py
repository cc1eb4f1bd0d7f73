"""Nothing that a client sends makes the server fail, hang, lose a call, or answer in an unexpected form.

The models never fail here, so there is no excuse for a 500. The clients send what ``drawn`` draws, to models that are
at home or in a worker; most of that in virtual time, where a request that hangs is found at once.

The same requests are drawn each time, so that an unrelated change does not fail here. ``FUZZ=N`` draws 2N times as
many, and others each time; ``nox -s fuzz`` does that.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Final, TypeAlias

import pytest
import trio
from drawn import LARGEST, Sent, requests
from http_node import Answer, Wire
from hypothesis import HealthCheck, given, settings, strategies as st
from obliging import Placement, add_models, open_obliging
from trio.testing import MockClock

from trio_cluster.gateway import body, parse
from trio_cluster.testing import assert_stats_balance, open_cluster, read_stream, settle, worker

Connect: TypeAlias = Callable[[], AbstractAsyncContextManager["_Patient"]]

TIMES: Final = int(os.environ.get("FUZZ", "0"))


def examples(count: int) -> settings:
    return settings(
        max_examples=count * TIMES if TIMES else count // 2,
        derandomize=not TIMES,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


#: Bytes of a form that are looked at before it is passed on: so few here that most of them are passed on.
PEEKED: Final = 1000

#: Virtual seconds after which a request hangs: well over what a body and the silence of a model may take.
HANGS: Final = 1000.0

CONTINUE: Final = b"HTTP/1.1 100 "

#: Virtual seconds that answers in pieces take, so that whatever outlives a client that has left is seen; and in which
#: everything has to be at rest when nobody asks for anything any more, which is less.
PAUSE: Final = 40.0
SETTLES: Final = 20.0

#: Statuses of refusals. Others are never right: models do not fail, workers are not lost, and there is room for all.
REFUSALS: Final = frozenset({400, 403, 404, 405, 408, 409, 413, 415, 431, 501, 504, 505})
CLIENTS_FAULT: Final = frozenset({400, 404, 405, 413, 415})
#: The types of such errors on the routes of the Messages API, where they are not the usual one.
MESSAGES_FAULT: Final = {404: "not_found_error", 413: "request_too_large"}


@pytest.fixture(autouse=True)
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (parse, body):
        monkeypatch.setattr(room, "SPOOL_THRESHOLD", PEEKED)


class _Patient(Wire):
    """A client's end of a connection, which waits for as long as it takes."""

    async def receive(self) -> bool:
        try:
            data = await self.stream.receive_some()
        except trio.BrokenResourceError:
            data = b""
        self._buffer += data
        return bool(data)

    async def send_pieces(self, pieces: list[bytes]) -> None:
        try:
            for piece in pieces:
                await self.stream.send_all(piece)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # a server that refuses a request need not read all of it

    async def final_answer(self, *, bodiless: bool = False) -> Answer:
        """Return the final answer, after all interim ones."""
        while True:
            while len(self._buffer) < len(CONTINUE):
                assert await self.receive(), f"closed with no answer but {bytes(self._buffer)!r}"
            if not self._buffer.startswith(CONTINUE):
                return await self.answer(bodiless=bodiless)
            await self.until(b"\r\n\r\n")

    async def ends_after_interim_answers(self) -> bool:
        """Wait for a final answer to begin; whether there is none, but interim ones."""
        while self._buffer.startswith(CONTINUE):
            await self.until(b"\r\n\r\n")
            while len(self._buffer) < len(CONTINUE) and await self.receive():
                pass
            if not self._buffer:
                return True
        return False

    async def receive_some(self, size: int) -> None:
        """Receive so many bytes, or what there is until the next pause."""
        with trio.move_on_after(0.01):
            while len(self._buffer) < size and await self.receive():
                pass

    async def ended(self) -> bool:
        """Wait for more; whether there is no more, and nothing has been left."""
        return not self._buffer and not await self.receive()


def check(answer: Answer, sent: Sent, *, bodiless: bool) -> None:
    """Fail if ``sent`` must not be answered with this."""
    shown = (sent.data[:300], answer.status, answer.body[:300])
    assert answer.status in (sent.allowed or REFUSALS | {200, 202, 204}), shown
    assert answer.whole or sent.is_impatient, shown
    request_id = answer.headers["x-request-id"]
    # An id in a head that is not valid is ignored, and then the connection ends.
    assert sent.request_id in (None, request_id) or answer.headers.get("connection") == "close", shown
    if answer.status >= 400 and not bodiless:
        assert answer.headers["content-type"] == "application/json", shown
        assert answer.error["message"], shown
        usual = "invalid_request_error"
        if json.loads(answer.body).get("type") == "error":
            assert json.loads(answer.body)["request_id"] == answer.headers["request-id"] == request_id, shown
            usual = MESSAGES_FAULT.get(answer.status, usual)
        assert answer.error["type"] == usual or answer.status not in CLIENTS_FAULT, shown
    elif answer.headers.get("content-type", "").startswith("text/event-stream") and answer.whole:
        blocks = answer.body.split(b"\n\n")
        assert blocks[-1] == b"", shown
        assert not any(block.startswith(b'data: {"error"') for block in blocks), shown
        if b"/images/" not in sent.data[:100] and b"/speech" not in sent.data[:100]:
            assert read_stream(answer.body).ending == "finished", shown
    elif answer.headers.get("content-type") == "application/json" and not bodiless:
        json.loads(answer.body)


async def converse(connect: Connect, course: list[Sent], *, half_close: bool = False) -> None:
    """Send all of it, on as few connections as possible, and check each answer.

    Args:
        connect: opens a connection.
        course: what is sent.
        half_close: close the sending side at the end, instead of waiting until the server times out.
    """
    left = list(course)
    while left:
        async with connect() as wire:
            while left and await _ask(wire, left.pop(0), half_close):
                pass


async def _ask(wire: _Patient, sent: Sent, half_close: bool) -> bool:
    """Send one request and check its answer; return whether the connection can be used for more."""
    if sent.leaves_after is not None:
        await wire.send_pieces([sent.data[: sent.leaves_after]])
        return False
    if sent.is_raw:
        await _ask_raw(wire, sent, half_close)
        return False
    if sent.reads is not None:
        await wire.send_pieces(sent.pieces())
        await wire.receive_some(sent.reads)
        return False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.send_pieces, sent.pieces())
        answer = await wire.final_answer(bodiless=sent.bodiless)
        nursery.cancel_scope.cancel()
    check(answer, sent, bodiless=sent.bodiless)
    if not answer.whole:
        return False
    if answer.headers.get("connection") == "close":
        # A head that makes no sense is refused with a body, whatever method it may have meant.
        assert sent.bodiless or await wire.ended(), sent
        return False
    await wire.request("GET", "/health")
    probe = await wire.answer()
    assert (probe.status, json.loads(probe.body)["status"]) == (200, "ok"), sent
    return True


async def _ask_raw(wire: _Patient, sent: Sent, half_close: bool) -> None:
    """Send what need not be HTTP, and nothing more; check whatever is answered, and that the connection ends."""
    await wire.send_pieces(sent.pieces())
    if half_close:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await wire.stream.send_eof()
    while not await wire.ended():
        if b"HEAD" in sent.data:
            # One of them is an answer without a body, and it cannot be known which.
            return
        # A client that was told to go on, and ends in the middle of its body, has left.
        if half_close and await wire.ends_after_interim_answers():
            return
        answer = await wire.final_answer()
        check(answer, sent, bodiless=False)


# In virtual time


@asynccontextmanager
async def simulated(placement: Placement) -> AsyncIterator[Connect]:
    """Open a cluster, and check in the end that nothing is left of any request."""
    async with open_cluster(seed=0, max_body_size=LARGEST, worker_timeout=600.0) as cluster:
        if placement == "local":
            add_models(cluster.master.server, pause=PAUSE)
        else:
            server = worker("w1")
            add_models(server, pause=PAUSE)
            await cluster.start_worker(server)
        host = cluster.network.host("client")

        @asynccontextmanager
        async def connect() -> AsyncIterator[_Patient]:
            stream = await host.connect("master", 8080)
            try:
                yield _Patient(stream)
            finally:
                stream.close()
            assert_stats_balance(cluster)

        yield connect
        await settle(cluster, within=SETTLES)


@pytest.mark.parametrize("placement", ["local", "forwarded"])
@given(course=st.lists(requests(), min_size=1, max_size=6))
@examples(150)
def test_whatever_is_sent_is_answered_in_time_and_in_form_and_leaves_nothing(
    placement: Placement, course: list[Sent]
) -> None:
    async def main() -> None:
        async with simulated(placement) as connect:
            with trio.fail_after(HANGS * len(course)):
                await converse(connect, course)

    trio.run(main, clock=MockClock(autojump_threshold=0))


# On real sockets


@pytest.mark.parametrize("placement", ["local", "forwarded"])
@given(course=st.lists(requests(), min_size=10, max_size=20))
@examples(10)
def test_the_same_holds_on_real_sockets(
    placement: Placement, course: list[Sent], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some say that there is more to come of their body than there is, and here that takes time.
    monkeypatch.setattr(body, "BODY_IDLE_TIMEOUT", 0.1)

    async def main() -> None:
        async with open_obliging(placement, max_body_size=LARGEST) as front:

            @asynccontextmanager
            async def connect() -> AsyncIterator[_Patient]:
                assert front.port is not None
                async with await trio.open_tcp_stream("127.0.0.1", front.port) as stream:
                    yield _Patient(stream)

            with trio.fail_after(60):
                await converse(connect, course, half_close=True)

    trio.run(main)
