"""Fuzz target: websocket frames at both ends, alone and as a whole link.

Checked for any bytes:

- Frames that arrive in any pieces mean the same as in one piece, and so do those whose rest another reader has taken
  over. Nothing is raised but ``FramingError``, and no message is longer than the limit.
- A message that is framed again is read as the same.
- Where the reader accepts everything, so does another implementation (wsproto), and finds the same messages.
- A link ends with ``LinkClosed``, whatever comes: before, in and after the opening handshake. Nothing is logged as an
  internal error, nothing waits for ever, and the session is closed.
- The CPU time is proportional to the bytes.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import math
import re
from collections.abc import Sequence
from typing import Any, Final

import trio
from fuzz_input import Input, seed, timed
from memory_streams import MemoryStream, memory_pair
from trio.testing import MockClock
from wsproto.frame_protocol import FrameDecoder, MessageDecoder, ParseFailed

from trio_cluster.link.frames import FrameReader, FramingError, close_frame, frame
from trio_cluster.link.link import Link, LinkClosed
from trio_cluster.link.websocket import PATH, Refusal, accept, dial
from trio_cluster.net.watchdog import injectable
from trio_cluster.protocol import (
    MAGIC,
    SUBPROTOCOL,
    Drain,
    Handshake,
    Heartbeat,
    MasterSession,
    ModelRegistered,
    RegisterModel,
    WorkerSession,
    encode,
)

__all__ = ["FINDINGS", "SEEDS", "check"]

_UNMASKED, _MASKED, _ACCEPTED, _ACCEPTED_RAW, _DIALLED, _DIALLED_RAW = range(6)
#: Small, so that it is exceeded.
_LIMIT: Final = 4096
#: wsproto takes its time.
_WSPROTO_MAX: Final = 1024
#: Virtual seconds that a link may take. All its own time limits are shorter.
_HANGS: Final = 300.0

_REQUEST: Final = (
    f"GET {PATH} HTTP/1.1\r\nHost: m\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
).encode()
_RESPONSE: Final = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: %s\r\n"
    f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
)
_KEY: Final = re.compile(rb"sec-websocket-key: *([^\r]+)\r\n", re.IGNORECASE)
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def check(encoded: bytes) -> None:
    """Check one input."""
    given = Input.of(encoded)
    part = given.part % 6
    if part in (_UNMASKED, _MASKED):
        _check_frames(given, masked=part == _MASKED)
    else:
        timed(
            lambda: _run_link(
                given, is_client=part in (_DIALLED, _DIALLED_RAW), opened=part in (_ACCEPTED, _DIALLED)
            ),
            len(given.data),
            # A link is made and closed, by a scheduler of its own.
            1000 + 40 * len(given.pieces),
        )


# Frames


class _Reading:
    """What a reader makes of frames."""

    def __init__(self, *, masked: bool) -> None:
        self.masked = masked
        self.messages: list[bytes] = []
        self.controls: list[bytes] = []
        self.error: tuple[str, int] | None = None
        self.reader = FrameReader(masked=masked, limit=_LIMIT, on_control=self.controls.append)

    def feed(self, data: bytes) -> None:
        if self.error is not None:
            return
        self.reader.feed(data)
        try:
            while (message := self.reader.next_message()) is not None:
                self.messages.append(message)
        except FramingError as error:
            assert len(error.reason) < 200
            self.error = error.reason, error.code

    def found(self) -> tuple[Any, ...]:
        return self.messages, self.controls, self.error


def _read(pieces: Sequence[bytes], *, masked: bool) -> tuple[Any, ...]:
    reading = _Reading(masked=masked)
    for piece in pieces:
        reading.feed(piece)
    return reading.found()


def _read_by_two(pieces: Sequence[bytes], *, masked: bool) -> tuple[Any, ...]:
    """Return what two readers find of which the second one goes on where the first one stopped."""
    first = _Reading(masked=masked)
    half = len(pieces) // 2
    for piece in pieces[:half]:
        first.feed(piece)
    if first.error is not None:
        return first.found()
    second = _Reading(masked=masked)
    for piece in (first.reader.take_remainder(), *pieces[half:]):
        second.feed(piece)
    assert first.reader.take_remainder() == b""
    return first.messages + second.messages, first.controls + second.controls, second.error


def _check_frames(given: Input, *, masked: bool) -> None:
    whole = timed(lambda: _read([given.data], masked=masked), len(given.data))
    messages, controls, error = whole
    assert all(len(message) <= _LIMIT for message in messages)
    assert all(2 <= len(control) <= 131 for control in controls)
    assert sum(map(len, messages)) + sum(map(len, controls)) <= len(given.data)
    if len(given.pieces) > 1:
        split = timed(lambda: _read(given.pieces, masked=masked), len(given.data), len(given.pieces))
        assert split == whole, f"in pieces {split}, in one piece {whole}"
        by_two = _read_by_two(given.pieces, masked=masked)
        assert by_two == whole, f"read by two {by_two}, by one {whole}"
    again = _read([frame(message, masked=masked) for message in messages], masked=masked)
    assert again == (messages, [], None)
    if len(given.data) <= _WSPROTO_MAX:
        theirs = _read_by_wsproto(given.data, masked=masked)
        if error is None:
            assert theirs[0] == messages, f"wsproto {theirs}, here {messages}"
            if theirs[1] is not None:
                # It does not wait for the end of an invalid header.
                error = _read([given.data + bytes(14)], masked=masked)[2]
                assert error is not None, f"wsproto {theirs}, here nothing is wrong"
        else:
            assert theirs[0][: len(messages)] == messages, f"wsproto {theirs}, here {whole}"


def _read_by_wsproto(data: bytes, *, masked: bool) -> tuple[list[bytes], str | None]:
    frames, parts = FrameDecoder(client=not masked), MessageDecoder()
    found: list[bytes] = []
    message = b""
    frames.receive_bytes(data)
    try:
        while (piece := frames.process_buffer()) is not None:
            if piece.opcode.iscontrol():
                continue
            part = parts.process_frame(piece)
            message += part.payload.encode() if isinstance(part.payload, str) else bytes(part.payload)
            if part.message_finished:
                found.append(message)
                message = b""
    except ParseFailed as error:
        return found, str(error)
    return found, None


# Links


class _Errors(logging.Handler):
    """Keeps what is logged as an error: what a link logs before it ends for a bug."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(logging.Formatter().format(record))


def _run_link(given: Input, *, is_client: bool, opened: bool) -> None:
    errors = _Errors()
    logger = logging.getLogger("trio_cluster")
    logger.addHandler(errors)
    propagate, logger.propagate = logger.propagate, False
    try:
        trio.run(_link, given, is_client, opened, clock=MockClock(autojump_threshold=0.0))
    finally:
        logger.removeHandler(errors)
        logger.propagate = propagate
    assert not errors.found, errors.found[0]


async def _link(given: Input, is_client: bool, opened: bool) -> None:
    ours, theirs = memory_pair()
    stream = injectable(ours)
    session: Any = WorkerSession("w", "1", 0.0) if is_client else MasterSession("m", "1", 0.0)
    link = Link(stream, session, on_events=lambda _: None, timeout=10.0)
    opener = dial(stream, "m") if is_client else accept(stream, _admit)
    ended: LinkClosed | None = None
    with trio.move_on_after(_HANGS) as hang:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_play_peer, theirs, given, is_client, opened)
            try:
                await link.run(opener)
            except LinkClosed as error:
                ended = error
            # A task in the same nursery has no business raising groups; what else is raised ends the run.
            nursery.cancel_scope.cancel()
    assert not hang.cancelled_caught, "the link has not ended"
    assert ended is not None
    assert len(ended.why) < 10_000
    assert session.close_reason is not None
    assert session.deadline() == math.inf


def _admit(path: str, headers: dict[str, str]) -> Refusal | None:
    return None if path == PATH else Refusal(404, "nothing is here")


async def _play_peer(stream: MemoryStream, given: Input, is_client: bool, opened: bool) -> None:
    """Send the opening handshake, if there is to be one, and then the pieces, each when the link has taken the last."""
    if opened and is_client:
        request = b""
        while b"\r\n\r\n" not in request:
            if not (read := await stream.read(1 << 16)):
                return
            request += read
        found = _KEY.search(request)
        assert found is not None
        digest = hashlib.sha1(found[1] + _GUID).digest()
        await stream.write((_RESPONSE % base64.b64encode(digest).decode()).encode())
    elif opened:
        await stream.write(_REQUEST)
    try:
        for piece in given.pieces[:16]:
            await stream.write(piece)
            await trio.sleep(0.01)
        for piece in given.pieces[16:]:
            await stream.write(piece)
        if given.part < 128:
            await stream.write_eof()
        else:
            # Silence: a time limit ends the link.
            await trio.sleep_forever()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


def _frames(*parts: tuple[int, bytes], masked: bool) -> bytes:
    """Return frames with these first bytes and payloads; the key of those that are masked is zero."""
    sent = b""
    for first, payload in parts:
        size = len(payload)
        length = bytes((size,)) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
        if masked:
            length = bytes((length[0] | 0x80,)) + length[1:] + bytes(4)
        sent += bytes((first,)) + length + payload
    return sent


_GREETING: Final = Handshake(MAGIC, 1, 1, "x", "1")
_TO_MASTER: Final = encode([_GREETING, RegisterModel("m", "chat", "o", 0), Heartbeat(), Drain("soon")])
_TO_WORKER: Final = encode([_GREETING, ModelRegistered("m"), Heartbeat(), Drain("soon")])


def _seeds() -> list[bytes]:
    seeds = []
    for part, masked in ((_UNMASKED, False), (_MASKED, True)):
        seeds += [
            seed(
                _frames((0x82, b"hello"), (0x89, b"?"), (0x8A, b""), (0x82, bytes(126)), masked=masked),
                part=part,
                cuts=1,
            ),
            seed(
                _frames((0x02, b"hel"), (0x89, b"?"), (0x00, b""), (0x80, b"lo"), masked=masked),
                part=part,
                cuts=1,
            ),
            seed(_frames((0x89, bytes(126)), masked=masked), part=part),
            seed(
                _frames((0x82, b""), (0x88, b"\x03\xe8bye"), (0x82, b"x"), masked=masked), part=part, cuts=1
            ),
            seed(
                _frames((0x02, b""), (0x00, b""), masked=masked),
                part=part,
                times=16384,
                start=2,
                length=2,
                cuts=3,
            ),
            seed(
                _frames((0x82, b""), masked=masked),
                part=part,
                times=16384,
                start=0,
                length=6 if masked else 2,
                cuts=3,
            ),
            seed(
                _frames((0x89, b""), masked=masked),
                part=part,
                times=16384,
                start=0,
                length=6 if masked else 2,
                cuts=3,
            ),
            seed(b"\x82" + (b"\xff" if masked else b"\x7f") + b"\xff" * 12, part=part, cuts=1),
        ]
    for part, masked, message in ((_ACCEPTED, True, _TO_MASTER), (_DIALLED, False, _TO_WORKER)):
        for closing in (part, part + 126):
            seeds += [
                seed(
                    frame(message, masked=masked) + close_frame(1000, "bye", masked=masked),
                    part=closing,
                    cuts=9,
                ),
                seed(
                    _frames((0x82, message), (0x89, b"?"), (0x81, b"text"), masked=masked),
                    part=closing,
                    cuts=4,
                ),
                seed(
                    _frames((0x02, message[:9]), (0x80, message[9:]), (0x88, b"\x03"), masked=masked),
                    part=closing,
                ),
                seed(_frames((0x82, b"\x90"), masked=masked), part=closing),
                seed(
                    _frames((0x82, message), (0x89, b""), masked=masked),
                    part=closing,
                    times=256,
                    start=20,
                    length=9,
                ),
                seed(b"", part=closing),
            ]
    seeds += [
        seed(_REQUEST + frame(_TO_MASTER, masked=True), part=_ACCEPTED_RAW, cuts=9),
        seed(_REQUEST.replace(b"/cluster", b"/nothing"), part=_ACCEPTED_RAW, cuts=9),
        seed(_REQUEST.replace(b"trio-cluster", b"another"), part=_ACCEPTED_RAW),
        seed(_REQUEST.replace(b"\r\n", b"\n"), part=_ACCEPTED_RAW, cuts=1),
        seed(b"GET /cluster HTTP/1.1\r\nHost: m\r\n\r\n", part=_ACCEPTED_RAW),
        seed(b"GET / HTTP/1.1\r\nA: bcd\r\n", part=_ACCEPTED_RAW, times=4096, start=16, length=8, cuts=5),
        seed(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", part=_DIALLED_RAW, cuts=5),
        seed(
            b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbusy\r\n0\r\n\r\n",
            part=_DIALLED_RAW,
            cuts=5,
        ),
        seed((_RESPONSE % "x").encode() + frame(_TO_WORKER, masked=False), part=_DIALLED_RAW),
        seed(b"HTTP/1.1 100 C\r\n\r\n", part=_DIALLED_RAW, times=1024, start=0, length=18),
        seed(b"HTTP/1.1 200 OK\r\n\r\nbody", part=_DIALLED_RAW, times=4096, start=19, length=4, cuts=5),
    ]
    return seeds


SEEDS: Final = _seeds()

#: What was found once, and must not come back.
FINDINGS: Final[list[bytes]] = []
