"""The short way of a token: only when it changes nothing, and with the same accounts."""

from __future__ import annotations

import json

import pytest
import trio
from http_node import EVENTS, STREAM, open_http_node
from trio.testing import MockClock

from trio_cluster.core.call import WINDOW, Call, Data, Done, Failed, Head, Request
from trio_cluster.gateway.direct import DirectWriter

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

    def send_nowait(self, body: bytes | memoryview) -> bool:
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
    call = Call(REQUEST, on_taken=taken.append)
    call.put(Head())
    call.receive_nowait()
    wire = Wire()
    DirectWriter(call, wire, lambda data: True)
    call.put(Data(b"one"))
    call.put(Data(b"three"))
    assert wire.sent == [b"one", b"three"]
    assert taken == [3, 5]
    assert call.waiting_bytes == 0


async def test_what_cannot_go_waits_and_holds_back_everything_after_it() -> None:
    call, wire = begun(), Wire()
    short = DirectWriter(call, wire, lambda data: True)
    wire.ready = False
    call.put(Data(b"one"))
    wire.ready = True
    call.put(Data(b"two"))
    assert wire.sent == []
    assert call.waiting_bytes == 6
    assert [short.receive_nowait(), short.receive_nowait()] == [Data(b"one"), Data(b"two")]
    assert call.waiting_bytes == 0
    with pytest.raises(trio.WouldBlock):
        short.receive_nowait()
    call.put(Data(b"three"))
    assert wire.sent == [b"three"]


async def test_what_is_not_whole_goes_the_ordinary_way() -> None:
    call, wire = begun(), Wire()
    short = DirectWriter(call, wire, lambda data: bytes(data).endswith(b"."))
    call.put(Data(b"half"))
    call.put(Data(b"whole."))
    assert wire.sent == []
    assert short.receive_nowait() == Data(b"half")


async def test_a_piece_that_went_in_part_asks_for_an_ordinary_write() -> None:
    call, wire = begun(), Wire()
    short = DirectWriter(call, wire, lambda data: True)
    wire.takes_all = False
    call.put(Data(b"one"))
    assert short.has_unsent
    assert await short.receive() is None
    call.put(Data(b"two"))
    assert wire.sent == [b"one"]
    assert await short.receive() == Data(b"two")


async def test_the_end_always_goes_the_ordinary_way() -> None:
    call, wire = begun(), Wire()
    short = DirectWriter(call, wire, lambda data: True)
    call.put(Data(b"one"))
    call.put(Done())
    assert short.receive_nowait() == Done()
    with pytest.raises(trio.EndOfChannel):
        short.receive_nowait()


async def test_a_cancelled_call_sends_nothing_more() -> None:
    call, wire = begun(), Wire()
    short = DirectWriter(call, wire, lambda data: True)
    call.cancel("client left")
    call.put(Data(b"late"))
    assert wire.sent == []
    assert isinstance(short.receive_nowait(), Failed)


async def test_a_sign_of_life_is_heard_and_not_sent(autojump_clock: MockClock) -> None:
    call, wire = begun(), Wire()
    short = DirectWriter(call, wire, lambda data: True)
    await trio.sleep(5)
    call.put(Data(b""))
    assert wire.sent == []
    assert short.last == trio.current_time()


async def test_a_client_that_does_not_read_holds_its_handler_back_and_loses_nothing() -> None:
    async with open_http_node(None) as node, node.connect(receive_buffer=4096) as wire:
        await wire.request("POST", PATH, STREAM_BODY)
        served = await node.backend.next()
        served.head(EVENTS).data(b"data: begun\n\n")
        await wire.head()
        assert await wire.chunk() == b"data: begun\n\n"
        event = b"data: " + bytes(1000).replace(b"\0", b"x") + b"\n\n"
        put = 0
        while served.call.waiting_bytes < WINDOW:
            served.data(event)
            put += 1
        served.data(b"data: [DONE]\n\n").done()
        received = b""
        while not received.endswith(b"data: [DONE]\n\n"):
            received += await wire.chunk()
        assert received == event * put + b"data: [DONE]\n\n"
        assert await wire.chunk() == b""
