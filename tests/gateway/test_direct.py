"""The fast path of a token: only when it changes nothing, and with the same accounting."""

from __future__ import annotations

import json

import pytest
import trio
from http_node import EVENTS, STREAM, open_http_node
from trio.testing import MockClock

from trio_cluster.core.answer import Data, Done, Failed, Head
from trio_cluster.core.call import Call
from trio_cluster.core.limits import WINDOW
from trio_cluster.core.request import Request
from trio_cluster.gateway.direct import DirectWriter
from trio_cluster.gateway.sse_buffer import EventBuffer

PATH = "/v1/chat/completions"
STREAM_BODY = json.dumps(STREAM).encode()
REQUEST = Request(endpoint="chat.completions", kind="chat", model="m", body=b"{}")


class Wire:
    """A connection that takes what the test lets it take."""

    def __init__(self) -> None:
        self.ready = True
        self.gone = False
        self.takes_all = True
        self.sent: list[bytes] = []

    def send_nowait(self, body: bytes | memoryview, *, droppable: bool = False) -> bool:
        if not self.ready:
            raise trio.WouldBlock
        self.sent.append(bytes(body))
        self.ready = self.takes_all
        return self.takes_all

    def reset(self) -> None:
        raise AssertionError


def begun() -> Call:
    call = Call(REQUEST)
    call.put(Head())
    call.receive_nowait()
    return call


async def test_pieces_go_at_once_and_count_as_taken() -> None:
    taken: list[int] = []
    call = Call(REQUEST, on_consumed=taken.append)
    call.put(Head())
    call.receive_nowait()
    wire = Wire()
    DirectWriter(call.body, wire, None)
    call.put(Data(b"one"))
    call.put(Data(b"three"))
    assert wire.sent == [b"one", b"three"]
    assert taken == [3, 5]
    assert call.body.waiting_bytes == 0


async def test_what_cannot_go_waits_and_holds_back_everything_after_it() -> None:
    call, wire = begun(), Wire()
    DirectWriter(call.body, wire, None)
    wire.ready = False
    call.put(Data(b"one"))
    wire.ready = True
    call.put(Data(b"two"))
    assert wire.sent == []
    assert call.body.waiting_bytes == 6
    assert [call.receive_nowait(), call.receive_nowait()] == [Data(b"one"), Data(b"two")]
    assert call.body.waiting_bytes == 0
    with pytest.raises(trio.WouldBlock):
        call.receive_nowait()
    call.put(Data(b"three"))
    assert wire.sent == [b"three"]


async def test_what_is_not_whole_goes_the_slow_path() -> None:
    call, wire = begun(), Wire()
    DirectWriter(call.body, wire, EventBuffer())
    call.put(Data(b"data: half"))
    call.put(Data(b"whole\n\n"))
    assert wire.sent == []
    assert call.receive_nowait() == Data(b"data: half")


async def test_a_piece_that_went_in_part_asks_for_an_slow_write() -> None:
    call, wire = begun(), Wire()
    writer = DirectWriter(call.body, wire, None)
    wire.takes_all = False
    call.put(Data(b"one"))
    assert writer.has_unsent
    call.put(Data(b"two"))
    assert wire.sent == [b"one"]
    assert await call.receive() == Data(b"two")


async def test_a_reader_that_waits_is_woken_for_the_rest_of_a_piece(nursery: trio.Nursery) -> None:
    call, wire = begun(), Wire()
    writer = DirectWriter(call.body, wire, None)
    woken = trio.Event()

    async def read() -> None:
        await call.body.reader.park()
        woken.set()

    nursery.start_soon(read)
    await trio.testing.wait_all_tasks_blocked()
    call.put(Data(b"one"))
    await trio.testing.wait_all_tasks_blocked()
    assert not woken.is_set()
    wire.takes_all = False
    call.put(Data(b"two"))
    await trio.testing.wait_all_tasks_blocked()
    assert woken.is_set()
    assert writer.has_unsent


async def test_the_end_always_goes_the_slow_path() -> None:
    call, wire = begun(), Wire()
    DirectWriter(call.body, wire, None)
    call.put(Data(b"one"))
    call.put(Done())
    assert call.receive_nowait() == Done()
    with pytest.raises(trio.EndOfChannel):
        call.receive_nowait()


async def test_a_cancelled_call_sends_nothing_more() -> None:
    call, wire = begun(), Wire()
    DirectWriter(call.body, wire, None)
    call.cancel("client left")
    call.put(Data(b"late"))
    assert wire.sent == []
    assert isinstance(call.receive_nowait(), Failed)


async def test_a_sign_of_life_is_heard_and_not_sent(autojump_clock: MockClock) -> None:
    call, wire = begun(), Wire()
    writer = DirectWriter(call.body, wire, None)
    await trio.sleep(5)
    call.put(Data(b""))
    assert wire.sent == []
    assert writer.last_sign_of_life == trio.current_time()
    assert writer.last_output < trio.current_time()


async def test_a_client_that_does_not_read_holds_its_handler_back_and_loses_nothing() -> None:
    async with open_http_node(None) as node, node.connect(receive_buffer=4096) as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS).data(b"data: begun\n\n")
        await wire.head()
        assert await wire.chunk() == b"data: begun\n\n"
        event = b"data: " + bytes(1000).replace(b"\0", b"x") + b"\n\n"
        put = 0
        while served.call.body.waiting_bytes < WINDOW:
            served.data(event)
            put += 1
        served.data(b"data: [DONE]\n\n").done()
        received = b""
        while not received.endswith(b"data: [DONE]\n\n"):
            received += await wire.chunk()
        assert received == event * put + b"data: [DONE]\n\n"
        assert await wire.chunk() == b""
