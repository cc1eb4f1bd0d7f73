"""Whole messages as frames and back, compared with another implementation."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from wsproto.frame_protocol import FrameDecoder, FrameProtocol, MessageDecoder, ParseFailed

from trio_cluster.link import frames
from trio_cluster.link.frames import FrameReader, choose_mask, frame, mask_in_python
from trio_cluster.protocol import ProtocolError

# The edges of each class of payload length.
SIZES = [0, 1, 3, 4, 5, 125, 126, 127, 65_535, 65_536, 65_537, 300_000]
NO_LIMIT = (1 << 63) - 1


@attrs.define
class Found:
    """What a reader has found: messages and control frames, in order, and the error."""

    messages: list[bytes] = attrs.field(factory=list)
    controls: list[bytes] = attrs.field(factory=list)
    error: str | None = None


class Ours:
    """The reader under test."""

    def __init__(self, *, masked: bool, limit: int = NO_LIMIT) -> None:
        self.found = Found()
        self.reader = FrameReader(masked=masked, limit=limit, on_control=self.found.controls.append)

    def feed(self, data: bytes) -> Found:
        if data:
            self.reader.feed(data)
        try:
            while (message := self.reader.next_message()) is not None:
                self.found.messages.append(message)
        except ProtocolError as error:
            self.found.error = error.reason
        return self.found


class Oracle:
    """The same with another implementation, which also accepts text."""

    def __init__(self, *, masked: bool) -> None:
        self.found = Found()
        self._frames = FrameDecoder(client=not masked)
        self._messages = MessageDecoder()
        self._message = b""
        self._control = b""

    def feed(self, data: bytes) -> Found:
        self._frames.receive_bytes(data)
        try:
            while (piece := self._frames.process_buffer()) is not None:
                self._take(piece)
        except ParseFailed as error:
            self.found.error = str(error)
        return self.found

    def _take(self, piece: Any) -> None:
        if piece.opcode.iscontrol():
            self._control += piece.payload
            if piece.frame_finished:
                self.found.controls.append(self._control)
                self._control = b""
            return
        whole = self._messages.process_frame(piece)
        self._message += whole.payload.encode() if isinstance(whole.payload, str) else whole.payload
        if whole.message_finished:
            self.found.messages.append(self._message)
            self._message = b""


def raw(
    first: int, payload: bytes = b"", *, masked: bool = False, key: bytes = b"\1\2\3\4", width: int = 0
) -> bytes:
    """Return a frame with the first byte ``first``; ``width`` bytes for its length, if not the minimum."""
    size = len(payload)
    width = width or (1 if size < 126 else 2 if size < 1 << 16 else 8)
    short = {1: size, 2: 126, 8: 127}[width]
    head = bytes((first, short | (0x80 if masked else 0))) + (
        size.to_bytes(width, "big") if width > 1 else b""
    )
    if not masked:
        return head + payload
    return head + key + bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))


def payload_of(control: bytes, *, masked: bool) -> bytes:
    oracle = Oracle(masked=masked)
    (payload,) = oracle.feed(control).controls
    return payload


def some_bytes(size: int) -> bytes:
    return (bytes(range(256)) * (size // 256 + 1))[:size]


def mask_by_the_standard(data: bytes, key: bytes) -> bytes:
    """Return ``data`` as RFC 6455, section 5.3, masks it."""
    return bytes(byte ^ key[index % 4] for index, byte in enumerate(data))


KEYS = st.binary(min_size=4, max_size=4)


@given(st.binary(max_size=300), KEYS)
def test_masking_is_that_of_the_standard_compiled_and_in_python(data: bytes, key: bytes) -> None:
    masked = mask_by_the_standard(data, key)
    assert mask_in_python(data, key) == masked
    assert frames._mask(data, key) == masked
    assert mask_in_python(masked, key) == data


@given(st.sampled_from(SIZES), KEYS)
@settings(deadline=None)
def test_masking_in_python_is_the_same_as_compiled_at_every_size(size: int, key: bytes) -> None:
    assert mask_in_python(some_bytes(size), key) == frames._mask(some_bytes(size), key)


def test_the_compiled_function_is_used_where_there_is_one() -> None:
    speedups = pytest.importorskip("websockets.speedups")
    assert choose_mask() is speedups.apply_mask
    assert frames._mask is speedups.apply_mask


def answers_wrongly(data: bytes, key: bytes) -> bytes:
    return data


def answers_wrongly_where_it_is_long(data: bytes, key: bytes) -> bytes:
    return mask_in_python(data[:16], key) + data[16:]


def answers_with_another_type(data: bytes, key: bytes) -> bytearray:
    return bytearray(mask_in_python(data, key))


def takes_other_types(data: memoryview, key: int) -> bytes:
    raise TypeError("an integer is required")


def takes_another_number_of_arguments(data: bytes, key: bytes, start: int) -> bytes:
    return mask_in_python(data, key)


def fails(data: bytes, key: bytes) -> bytes:
    raise SystemError("bad internal call")


@pytest.mark.parametrize(
    "function",
    [
        answers_wrongly,
        answers_wrongly_where_it_is_long,
        answers_with_another_type,
        takes_other_types,
        takes_another_number_of_arguments,
        fails,
        None,
    ],
)
def test_a_compiled_function_that_cannot_be_used_is_replaced_with_a_warning(
    function: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    speedups: Any = ModuleType("websockets.speedups")
    speedups.apply_mask = function
    monkeypatch.setitem(sys.modules, "websockets.speedups", speedups)
    assert choose_mask() is mask_in_python
    assert "masking in Python" in caplog.text


@pytest.mark.parametrize("there", [True, False], ids=["no such function", "no such module"])
def test_without_a_compiled_function_masking_in_python_takes_its_place(
    there: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "websockets.speedups", ModuleType("empty") if there else None)
    assert choose_mask() is mask_in_python
    assert caplog.text == ""


def test_frames_are_masked_also_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_mask", mask_in_python)
    test_another_implementation_reads_our_frames(1000, True)
    test_frames_of_another_implementation_are_read(1000, True)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("size", SIZES)
def test_another_implementation_reads_our_frames(size: int, masked: bool) -> None:
    oracle = Oracle(masked=masked)
    oracle.feed(frame(some_bytes(size), masked=masked))
    assert oracle.found == Found([some_bytes(size)])


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("size", SIZES)
def test_frames_of_another_implementation_are_read(size: int, masked: bool) -> None:
    ours = Ours(masked=masked, limit=size)
    ours.feed(bytes(FrameProtocol(client=masked, extensions=[]).send_data(some_bytes(size))))
    assert ours.found == Found([some_bytes(size)])


@pytest.mark.parametrize(
    ("size", "head"),
    [
        (0, b"\x82\x00"),
        (125, b"\x82\x7d"),
        (126, b"\x82\x7e\x00\x7e"),
        (65_535, b"\x82\x7e\xff\xff"),
        (65_536, b"\x82\x7f\0\0\0\0\0\1\0\0"),
    ],
)
def test_a_frame_has_the_header_of_the_standard(size: int, head: bytes) -> None:
    assert frame(bytes(size), masked=False) == head + bytes(size)
    masked = frame(bytes(size), masked=True)
    assert masked[: len(head)] == head[:1] + bytes((head[1] | 0x80,)) + head[2:]
    # A payload of zeros shows the key.
    key = masked[len(head) : len(head) + 4]
    assert masked[len(head) + 4 :] == (key * (size // 4 + 1))[:size]


def test_each_frame_has_a_new_key() -> None:
    assert len({frame(b"the same", masked=True) for _ in range(20)}) == 20


# Conversations, split anywhere

Conversation = list[tuple[list[bytes], list[bytes]]]

CONTROLS = st.sampled_from([b"", b"hello", bytes(125)])
PIECES = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([some_bytes(size) for size in (125, 126, 127, 300)]),
)
#: Messages, each in one or more fragments; and after each fragment a ping, or nothing.
CONVERSATIONS: st.SearchStrategy[Conversation] = st.lists(
    st.tuples(st.lists(PIECES, min_size=1, max_size=4), st.lists(CONTROLS, max_size=3)), max_size=5
)


def encoded(conversation: Conversation, *, masked: bool) -> bytes:
    """Return what another implementation sends."""
    protocol = FrameProtocol(client=masked, extensions=[])
    sent = b""
    for pieces, pings in conversation:
        for index, piece in enumerate(pieces):
            sent += protocol.send_data(piece, fin=index == len(pieces) - 1)
            if index < len(pings):
                sent += protocol.ping(pings[index])
    return sent


def expected(conversation: Conversation) -> Found:
    found = Found()
    for pieces, pings in conversation:
        found.messages.append(b"".join(pieces))
        found.controls += pings[: len(pieces)]
    return found


def split(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    for cut in cuts:
        yield data[:cut]
        data = data[cut:]
    yield data


@given(CONVERSATIONS, st.booleans(), st.lists(st.integers(1, 40), max_size=40))
@settings(deadline=None)
def test_fragmented_messages_with_pings_between_arrive_however_they_are_split(
    conversation: Conversation, masked: bool, cuts: list[int]
) -> None:
    ours = Ours(masked=masked)
    for piece in split(encoded(conversation, masked=masked), cuts):
        ours.feed(piece)
    ours.found.controls[:] = [payload_of(each, masked=masked) for each in ours.found.controls]
    assert ours.found == expected(conversation)


@given(CONVERSATIONS, st.booleans(), st.integers(0, 2000))
@settings(deadline=None)
def test_another_reader_can_go_on_from_anywhere(conversation: Conversation, masked: bool, cut: int) -> None:
    sent = encoded(conversation, masked=masked)
    cut = min(cut, len(sent))
    ours, oracle = Ours(masked=masked), Oracle(masked=masked)
    ours.feed(sent[:cut])
    oracle.feed(ours.reader.take_remainder())
    oracle.feed(sent[cut:])
    assert oracle.found.error is None
    assert ours.found.messages + oracle.found.messages == expected(conversation).messages
    assert len(ours.found.controls + oracle.found.controls) == len(expected(conversation).controls)
    # And nothing of it is left in this reader.
    assert ours.reader.take_remainder() == b""
    assert ours.feed(raw(0x82, b"anew", masked=masked)).messages[-1] == b"anew"


@given(
    CONVERSATIONS, st.booleans(), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3)
)
@settings(deadline=None, max_examples=400)
def test_what_another_implementation_refuses_is_refused_and_the_rest_is_read_alike(
    conversation: Conversation, masked: bool, damage: list[tuple[int, int]]
) -> None:
    sent = bytearray(encoded(conversation, masked=masked))
    for where, value in damage:
        if where < len(sent):
            sent[where] = value
    ours, oracle = Ours(masked=masked), Oracle(masked=masked)
    ours.feed(bytes(sent))
    oracle.feed(bytes(sent))
    if oracle.found.error is not None and ours.found.error is None:
        # The other one does not wait for the end of an invalid header.
        ours.feed(bytes(14))
        assert ours.found.error is not None
    error = ours.found.error or ""
    if "text" in error or "message longer than" in error or "close frame with" in error:
        # These are limits of this protocol, and what a close frame says the other one checks elsewhere. It has gone on.
        del oracle.found.messages[len(ours.found.messages) :]
    else:
        assert (ours.found.error is None) == (oracle.found.error is None)
    assert ours.found.messages == oracle.found.messages


# Violations

RESERVED_OPCODES = [*range(0x3, 0x8), *range(0xB, 0x10)]


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        *[([(first, b"x")], "reserved bit set") for first in (0xC2, 0xA2, 0x92)],
        *[([(first, b"x")], "text message; this protocol is binary") for first in (0x81, 0x01)],
        *[([(0x80 | opcode, b"x")], f"reserved opcode {opcode:#x}") for opcode in RESERVED_OPCODES],
        ([(0x80, b"x")], "unexpected continuation frame"),
        ([(0x00, b"x")], "unexpected continuation frame"),
        ([(0x02, b"x"), (0x82, b"x")], "expected a continuation frame"),
        ([(0x02, b""), (0x02, b"x")], "expected a continuation frame"),
        ([(0x02, b"x"), (0x80, b"x"), (0x80, b"x")], "unexpected continuation frame"),
        ([(0x09, b"x")], "fragmented control frame"),
        ([(0x08, b"x")], "fragmented control frame"),
        ([(0x89, bytes(126))], "control frame payload longer than 125 bytes"),
        ([(0x8A, bytes(126))], "control frame payload longer than 125 bytes"),
    ],
)
def test_a_frame_that_violates_the_standard_or_is_not_used_is_refused_with_a_reason(
    sent: list[tuple[int, bytes]], complaint: str, masked: bool
) -> None:
    ours, oracle = Ours(masked=masked), Oracle(masked=masked)
    for first, payload in sent:
        ours.feed(raw(first, payload, masked=masked))
        oracle.feed(raw(first, payload, masked=masked))
    assert complaint in (ours.found.error or "")
    assert (oracle.found.error is None) == ("text" in complaint)


@pytest.mark.parametrize(
    ("masked", "complaint"),
    [(True, "unmasked frame from the client"), (False, "masked frame from the server")],
)
@pytest.mark.parametrize("first", [0x82, 0x89, 0x88])
def test_the_client_has_to_mask_and_the_server_must_not(first: int, masked: bool, complaint: str) -> None:
    ours, oracle = Ours(masked=masked), Oracle(masked=masked)
    sent = raw(first, b"hello", masked=not masked)
    assert (ours.feed(sent).error or "") == complaint
    assert oracle.feed(sent).error is not None


@pytest.mark.parametrize(("size", "width"), [(5, 2), (125, 2), (5, 8), (126, 8), (65_535, 8)])
def test_a_length_that_is_not_minimally_encoded_is_refused(size: int, width: int) -> None:
    sent = raw(0x82, bytes(size), width=width)
    assert "minimal number of bytes" in (Ours(masked=False).feed(sent).error or "")
    assert Oracle(masked=False).feed(sent).error is not None


def test_a_message_beyond_the_limit_is_refused_before_it_has_arrived() -> None:
    assert Ours(masked=False, limit=1000).feed(raw(0x82, bytes(1000))).messages == [bytes(1000)]
    head = raw(0x82, bytes(1001))[:4]
    assert Ours(masked=False, limit=1000).feed(head).error == "message longer than 1000 bytes"
    boast = b"\x82\x7f" + b"\xff" * 8
    assert "message longer than" in (Ours(masked=False, limit=1000).feed(boast).error or "")


def test_the_limit_is_for_all_fragments_of_a_message() -> None:
    ours = Ours(masked=False, limit=1000)
    ours.feed(raw(0x02, bytes(600)) + raw(0x00, bytes(400)))
    assert ours.found.error is None
    assert ours.feed(raw(0x80, b"x")[:2]).error is not None


def test_empty_fragments_take_no_memory() -> None:
    ours = Ours(masked=False, limit=1000)
    ours.feed(raw(0x02))
    tracemalloc.start()
    try:
        ours.feed(raw(0x00) * 10_000)
        ours.feed(raw(0x00))
        assert tracemalloc.get_traced_memory()[0] < 10_000
    finally:
        tracemalloc.stop()
    assert ours.feed(raw(0x80, b"x")).messages == [b"x"]
