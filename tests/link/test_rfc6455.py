"""A peer that violates RFC 6455 gets a close frame with the code for it: section by section, at both ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import attrs
import pytest
import trio
import wsproto
from memory_streams import MemoryStream, memory_pair
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto.events import AcceptConnection, CloseConnection, Request

from trio_cluster.link.frames import close_frame
from trio_cluster.link.link import Link, LinkClosed
from trio_cluster.link.websocket import PATH, accept, dial
from trio_cluster.net.watchdog import injectable
from trio_cluster.protocol import (
    MAGIC,
    MAX_MESSAGE,
    SUBPROTOCOL,
    Handshake,
    MasterSession,
    WorkerSession,
    encode,
)

KEY = b"\x37\xfa\x21\x3d"
FIN, MASKED = 0x80, 0x80
TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A


def raw(first: int, payload: bytes = b"", *, masked: bool, width: int = 0, size: int | None = None) -> bytes:
    """Return a frame of any content. ``width`` is that of its length, ``size`` what it claims to have."""
    size = len(payload) if size is None else size
    width = width or (1 if size < 126 else 2 if size < 1 << 16 else 8)
    head = bytes((first, {1: size, 2: 126, 8: 127}[width] | (MASKED if masked else 0)))
    if width > 1:
        head += size.to_bytes(width, "big")
    if masked:
        payload = KEY + bytes(byte ^ KEY[index % 4] for index, byte in enumerate(payload))
    return head + payload


@attrs.define(eq=False)
class Peer:
    """One end under test, and a raw connection to it behind the opening handshake."""

    stream: MemoryStream
    protocol: wsproto.WSConnection
    masked: bool
    link: Link
    closed: LinkClosed | None = None
    over: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, opener: Any) -> None:
        try:
            await self.link.run(opener)
        except LinkClosed as closed:
            self.closed = closed
        finally:
            self.over.set()

    async def close_frames(self) -> list[CloseConnection]:
        """Read until the end of the connection; return the close frames among what came."""
        found = []
        while data := bytes(await self.stream.receive_some()):
            self.protocol.receive_data(data)
            found += [event for event in self.protocol.events() if isinstance(event, CloseConnection)]
        return found


async def open_peer(nursery: trio.Nursery, side: str) -> Peer:
    """Open a websocket with the end of a master, or of a worker."""
    ours, theirs = memory_pair()
    stream = injectable(ours)
    now = trio.current_time()
    session: Any = MasterSession("m", "1", now) if side == "master" else WorkerSession("w", "1", now)
    link = Link(stream, session, on_events=lambda _: None, timeout=30)
    if side == "master":
        peer = Peer(theirs, wsproto.WSConnection(wsproto.ConnectionType.CLIENT), True, link)
        nursery.start_soon(peer.run, accept(stream, lambda path, headers: None))
        request = Request(host="m", target=PATH, subprotocols=[SUBPROTOCOL])
        await theirs.send_all(peer.protocol.send(request))
        peer.protocol.receive_data(bytes(await theirs.receive_some()))
    else:
        peer = Peer(theirs, wsproto.WSConnection(wsproto.ConnectionType.SERVER), False, link)
        nursery.start_soon(peer.run, dial(stream, "m"))
        peer.protocol.receive_data(bytes(await theirs.receive_some()))
        list(peer.protocol.events())
        await theirs.send_all(peer.protocol.send(AcceptConnection(subprotocol=SUBPROTOCOL)))
    list(peer.protocol.events())
    await wait_all_tasks_blocked()
    return peer


Sent: TypeAlias = Callable[[bool], bytes]


def case(code: int, what: str, *frames: tuple[Any, ...], **options: Any) -> Any:
    def sent(masked: bool) -> bytes:
        return b"".join(raw(*each, masked=masked, **options) for each in frames)

    return pytest.param(sent, code, id=what)


def unmasked(first: int, payload: bytes = b"x") -> Sent:
    """A frame that is masked where it must not be, or not masked where it must be."""
    return lambda masked: raw(first, payload, masked=not masked)


def big(code: int) -> bytes:
    return code.to_bytes(2, "big")


CASES = [
    # 5.1, 5.3: the client masks, the server does not.
    *[
        pytest.param(unmasked(first), 1002, id=f"5.1 mask {first:#x}")
        for first in (BINARY, PING, PONG, CLOSE, TEXT)
    ],
    pytest.param(unmasked(0x02), 1002, id="5.1 mask of a first fragment"),
    # 5.2: reserved bits, reserved opcodes, lengths.
    *[
        case(1002, f"5.2 rsv {bit:#x} {kind}", (kind | bit, b"x"))
        for bit in (0x40, 0x20, 0x10)
        for kind in (BINARY, PING, CLOSE)
    ],
    case(1002, "5.2 all rsv", (0xF2, b"x")),
    *[
        case(1002, f"5.2 opcode {opcode:#x}", (FIN | opcode, b"x"))
        for opcode in (*range(3, 8), *range(0xB, 0x10))
    ],
    *[case(1002, f"5.2 fragmented opcode {opcode:#x}", (opcode, b"x")) for opcode in (3, 7, 0xB, 0xF)],
    case(1002, "5.2 two bytes for a length of 5", (BINARY, b"hello"), width=2),
    case(1002, "5.2 two bytes for a length of 125", (BINARY, bytes(125)), width=2),
    case(1002, "5.2 eight bytes for a length of 5", (BINARY, b"hello"), width=8),
    case(1002, "5.2 eight bytes for a length of 65535", (BINARY, bytes(65535)), width=8),
    # 5.4: fragments.
    case(1002, "5.4 continuation of nothing", (0x80, b"x")),
    case(1002, "5.4 first fragment is a continuation", (0x00, b"x")),
    case(1002, "5.4 a message between fragments", (0x02, b"x"), (BINARY, b"x")),
    case(1002, "5.4 a first fragment between fragments", (0x02, b"x"), (0x02, b"x")),
    case(1002, "5.4 an empty fragment, then a message", (0x02, b""), (BINARY, b"")),
    # 5.5: control frames.
    *[case(1002, f"5.5 fragmented {kind:#x}", (kind & 0x0F, b"")) for kind in (CLOSE, PING, PONG)],
    *[case(1002, f"5.5 126 bytes in {kind:#x}", (kind, bytes(126))) for kind in (PING, PONG)],
    case(1002, "5.5 126 bytes in close", (CLOSE, big(1000) + bytes(124))),
    case(1002, "5.5 64 bit length in ping", (PING, b""), width=8, size=1 << 40),
    # 5.5.1: close.
    case(1002, "5.5.1 half a code", (CLOSE, b"\x03")),
    *[case(1002, f"7.4.1 code {code}", (CLOSE, big(code))) for code in (0, 1, 999, 1004, 1005, 1006, 1015)],
    *[
        case(1002, f"7.4.2 code {code}", (CLOSE, big(code) + b"why"))
        for code in (1016, 1100, 2000, 2999, 5000, 65535)
    ],
    # 5.6, 8.1: text has to be UTF-8, here too, where it is the reason of a close frame.
    *[
        case(1007, f"8.1 reason {reason!r}", (CLOSE, big(1000) + reason))
        for reason in (b"\xff", b"ok \xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xe2\x82")
    ],
    # 5.6: this protocol has no text.
    case(1003, "5.6 text", (TEXT, b"hello")),
    case(1003, "5.6 text that is no UTF-8", (TEXT, b"\xff")),
    case(1003, "5.6 fragment of a text", (0x01, b"hello")),
    # 10.4: sizes.
    case(1009, "10.4 a large message", (BINARY, bytes(MAX_MESSAGE + 1))),
    case(1009, "10.4 announced", (BINARY, b""), width=8, size=MAX_MESSAGE + 1),
    case(1009, "10.4 announced, with the highest bit set", (BINARY, b""), width=8, size=(1 << 64) - 1),
    case(1009, "10.4 in fragments", (0x02, bytes(MAX_MESSAGE)), (0x80, b"x")),
    # What is in a message is this protocol's business; that it is nonsense is a violation of this protocol.
    case(1002, "5.6 no batch", (BINARY, b"rubbish")),
    case(1002, "5.6 an empty message", (BINARY, b"")),
]


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 73


@pytest.mark.parametrize("side", ["master", "worker"])
@pytest.mark.parametrize("rest", ["alone", "with garbage behind it", "byte by byte"])
@pytest.mark.parametrize(("sent", "code"), CASES)
async def test_a_violation_ends_with_a_close_frame_that_says_so(
    sent: Sent, code: int, rest: str, side: str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    peer = await open_peer(nursery, side)
    data = sent(peer.masked)
    if rest == "byte by byte":
        # The last ones, on which it depends.
        head, data = data[:-20], data[-20:]
        await peer.stream.send_all(head)
        for index in range(len(data)):
            await peer.stream.send_all(data[index : index + 1])
            await trio.lowlevel.checkpoint()
    else:
        await peer.stream.send_all(data + (b"\xff" * 200 if rest != "alone" else b""))
    began = trio.current_time()
    (close,) = await peer.close_frames()
    assert close.code == code
    assert close.reason
    assert trio.current_time() - began < 3
    await peer.over.wait()
    assert peer.closed is not None
    assert not peer.closed.by_peer
    assert "protocol error" in peer.closed.why


@pytest.mark.parametrize("side", ["master", "worker"])
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        *[big(code) for code in (*range(1000, 1004), *range(1007, 1014), 3000, 4999)],
        big(1000) + "Tschüß".encode(),
        big(1000) + b"x" * 123,
    ],
)
async def test_a_valid_close_frame_is_answered_with_its_code(
    payload: bytes, side: str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    peer = await open_peer(nursery, side)
    await peer.stream.send_all(raw(CLOSE, payload, masked=peer.masked))
    (close,) = await peer.close_frames()
    assert close.code == (int.from_bytes(payload[:2], "big") if payload else 1005)
    await peer.over.wait()
    assert peer.closed is not None
    assert peer.closed.by_peer


@pytest.mark.parametrize("side", ["master", "worker"])
async def test_a_violation_after_valid_messages_and_pings_is_found(
    side: str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    peer = await open_peer(nursery, side)
    hello = encode([Handshake(MAGIC, 1, 1, "p", "1")])
    frames = [(0x02, hello[:5]), (PING, b"p"), (0x00, b""), (PONG, b""), (0x80, hello[5:]), (0x83, b"")]
    await peer.stream.send_all(b"".join(raw(*each, masked=peer.masked) for each in frames))
    (close,) = await peer.close_frames()
    assert (close.code, close.reason) == (1002, "protocol error: reserved opcode 0x3")


async def test_a_peer_that_goes_on_after_its_violation_is_cut_off_after_a_second(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    peer = await open_peer(nursery, "master")
    began = trio.current_time()
    await peer.stream.send_all(raw(0x83, masked=True))
    while not peer.over.is_set():
        await peer.stream.send_all(b"more")
        await trio.sleep(0.1)
    assert trio.current_time() - began < 1.5


async def test_a_peer_that_takes_nothing_after_its_violation_is_cut_off_after_a_second(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    peer = await open_peer(nursery, "master")
    peer.stream.peer.held = True
    began = trio.current_time()
    await peer.stream.send_all(raw(0x83, masked=True))
    await peer.over.wait()
    assert trio.current_time() - began < 1.5


@pytest.mark.parametrize("masked", [True, False])
def test_a_reason_is_cut_where_it_stays_utf_8(masked: bool) -> None:
    side = wsproto.ConnectionType.SERVER if masked else wsproto.ConnectionType.CLIENT
    protocol = wsproto.connection.Connection(side)
    protocol.receive_data(close_frame(1002, "é" * 100, masked=masked))
    (event,) = list(protocol.events())
    assert event == CloseConnection(code=1002, reason="é" * 61)
