"""Which process of a master a connection is for, told by what it sends first."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given, strategies as st

from trio_cluster.link.websocket import request_of_end
from trio_cluster.net.addressing import HEAD_MAX, Incomplete, addressed_process, protocol_for


def hello(*protocols: str) -> bytes:
    """Return what a client of TLS sends first."""
    context = ssl.create_default_context()
    if protocols:
        context.set_alpn_protocols(list(protocols))
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="master.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def in_small_records(data: bytes, size: int) -> bytes:
    """Spread the one record of a handshake over several."""
    content = data[5:]
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    return b"".join(data[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)


NAMED = [
    (request_of_end("h", "proof", "token", 3), 3),
    (request_of_end("h", "proof", None), None),
    (b"GET /cluster HTTP/1.1\nX-Trio-Cluster-PROCESS: 12 \n\n", 12),
    (b"GET /cluster HTTP/1.1\r\nx-trio-cluster-process: 99\r\n\r\n", None),
    (b"GET /cluster HTTP/1.1\r\nx-trio-cluster-process: x\r\n\r\n", None),
    (b"GET /x-trio-cluster-process:1 HTTP/1.1\r\nHost: h\r\n\r\nx-trio-cluster-process: 2\r\n\r\n", None),
    (hello(protocol_for(5), "http/1.1"), 5),
    (hello("http/1.1", protocol_for(63)), 63),
    (hello(protocol_for(64), "http/1.1"), None),
    (hello("http/1.1"), None),
    (hello(), None),
    (in_small_records(hello(protocol_for(7), "http/1.1"), 50), 7),
]


@pytest.mark.parametrize(("data", "process"), NAMED)
def test_the_beginning_of_a_connection_names_its_process(data: bytes, process: int | None) -> None:
    assert addressed_process(data) == process


@pytest.mark.parametrize(("data", "process"), NAMED)
def test_a_part_of_the_beginning_is_not_mistaken_for_the_whole(data: bytes, process: int | None) -> None:
    end = len(data)
    if data.startswith(b"GET /x"):
        end = data.index(b"\r\n\r\n") + 4
    for size in range(end - 1):
        try:
            assert addressed_process(data[:size]) == process
        except Incomplete:
            continue
        assert data[:3] == b"GET", "a part of a ClientHello was enough"
    assert addressed_process(data) == process


def test_a_long_beginning_names_no_process() -> None:
    assert addressed_process(b"GET / HTTP/1.1\r\nx: " + b"a" * HEAD_MAX) is None
    endless = b"\x16\x03\x01\x40\x00" + b"\x01\x00\xff\xff" + b"a" * HEAD_MAX
    assert addressed_process(endless) is None


@given(st.one_of(st.binary(), st.binary().map(lambda data: b"\x16\x03\x01" + data)))
def test_whatever_a_connection_sends_there_is_an_answer(data: bytes) -> None:
    try:
        process = addressed_process(data)
    except Incomplete:
        return
    assert process is None or 0 <= process < 64
