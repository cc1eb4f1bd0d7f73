"""The fuzz targets accept what they begin with and what they once found, and find bugs that are planted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import fuzz_http
import fuzz_messages
import fuzz_requests
import fuzz_sessions
import fuzz_websocket
import pytest
from fuzz_input import PREFIX, Input, Slowdown, TooSlow, seed, timed

from trio_cluster.engines import _http_response
from trio_cluster.http1 import chunks, parser
from trio_cluster.link import frames, link
from trio_cluster.openai.requests import checks, messages_api, messages_api_content
from trio_cluster.protocol import codec, errors, outbox, session, worker

TARGETS: Final = {
    "http": fuzz_http,
    "websocket": fuzz_websocket,
    "messages": fuzz_messages,
    "sessions": fuzz_sessions,
    "requests": fuzz_requests,
}
FINDINGS: Final = [
    pytest.param(module.check, data, id=f"{name}-{number}")
    for name, module in TARGETS.items()
    for number, data in enumerate(module.FINDINGS)
]


@pytest.fixture(autouse=True)
def _busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests run beside these; what is too slow by its nature exceeds this, too."""
    monkeypatch.setattr(Slowdown, "factor", 5.0)


@pytest.mark.parametrize("module", TARGETS.values(), ids=TARGETS)
def test_what_a_target_begins_with_is_accepted(module: Any) -> None:
    for data in module.SEEDS:
        module.check(data)


@pytest.mark.parametrize(("check", "data"), FINDINGS)
def test_what_was_found_once_does_not_come_back(check: Callable[[bytes], None], data: bytes) -> None:
    check(data)


@pytest.mark.parametrize("module", TARGETS.values(), ids=TARGETS)
def test_what_has_a_part_of_an_input_is_an_input(module: Any) -> None:
    for size in range(PREFIX + 2):
        module.check(module.SEEDS[0][:size])


def test_an_input_is_cut_and_repeated_as_it_says() -> None:
    whole = Input.of(seed(b"abcde", part=7, cuts=1, times=4, start=1, length=2))
    assert (whole.part, whole.data) == (7, b"abcbcbcbcde")
    assert whole.pieces == [bytes((byte,)) for byte in whole.data]
    for cuts in range(256):
        given = Input.of(seed(bytes(range(100)), cuts=cuts))
        assert b"".join(given.pieces) == given.data == bytes(range(100))
        assert all(given.pieces)
    assert Input.of(b"") == Input(0, b"", [b""])
    assert len(Input.of(seed(b"xy", times=1 << 16, start=0, length=2)).data) == 72 * 1024


def test_a_cost_is_held_against_the_size() -> None:
    Slowdown.factor = 0.02  # a millisecond
    assert timed(lambda: 7, 100) == 7
    with pytest.raises(TooSlow, match="100 bytes in 1 pieces"):
        timed(lambda: sum(range(1 << 17)), 100)
    assert timed(lambda: sum(range(1 << 17)), 1 << 26)
    assert timed(lambda: sum(range(1 << 17)), 100, pieces=1 << 16)


def test_the_program_repeats_an_input_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_bytes(fuzz_messages.SEEDS[0])
    program = [sys.executable, str(Path(__file__).parent), "messages", "--replay", str(file)]
    assert subprocess.run(program, check=False, capture_output=True).returncode == 0


# Planted bugs


def found(module: Any) -> bool:
    """Return whether a target finds something with what it begins with."""
    for data in module.SEEDS:
        try:
            module.check(data)
        except Exception:
            return True
    return False


def forget_the_tail(self: Any, data: bytes, at: int) -> int:
    self._tail = b""
    return FEED_HEAD(self, data, at)


def lose_a_byte(self: Any, data: bytes, at: int) -> tuple[bytes, int]:
    piece, end = DECODE_CHUNKS(self, data, at)
    return (piece[:-1] if at > 0 else piece), end


def keep_what_follows(self: Any) -> None:
    FEED_EOF(self)
    self.keep_alive = True


def look_at_the_rest(self: Any) -> bytes | None:
    # The cost grows with the square of what is left.
    self._data[self._position :].count(b"x")
    return NEXT_MESSAGE(self)


def forget_fragments(self: Any) -> bytes:
    self._fragments = None
    return TAKE_REMAINDER(self)


def raise_another_error(self: Any, *arguments: Any, **options: Any) -> Any:
    raise KeyError("planted")


def explain_in_two_lines(error: Exception) -> str:
    return f"{error}\n{error!r}"


def forget_the_role(blocks: Any) -> Any:
    return {"content": ASSISTANT_MESSAGE(blocks).get("content")}


def send_beyond_the_credit(self: Any) -> Any:
    self.credit = 1 << 30
    return TAKE(self)


def keep_the_record(self: Any, call: int, message: Any) -> None:
    self._outbox.finish(call, message)


FEED_HEAD: Final = parser.RequestParser._feed_head
DECODE_CHUNKS: Final = chunks.ChunkDecoder.decode
FEED_EOF: Final = _http_response.ResponseReader.feed_eof
NEXT_MESSAGE: Final = frames.FrameReader.next_message
TAKE_REMAINDER: Final = frames.FrameReader.take_remainder
ASSISTANT_MESSAGE: Final = messages_api_content._assistant_message
TAKE: Final = outbox._Stream.take


@pytest.mark.parametrize(
    ("target", "owner", "name", "bug"),
    [
        ("http", parser.RequestParser, "_feed_head", forget_the_tail),
        ("http", chunks.ChunkDecoder, "decode", lose_a_byte),
        ("http", _http_response.ResponseReader, "feed_eof", keep_what_follows),
        ("http", parser, "_PROTOCOLS", {"1.1": b" HTTP/1.1\r\n", "1.0": b" RTSP/1.0\r\n"}),
        ("websocket", frames.FrameReader, "next_message", look_at_the_rest),
        ("websocket", frames.FrameReader, "take_remainder", forget_fragments),
        ("websocket", frames, "_CONTROL_PAYLOAD_MAX", 10_000),
        ("websocket", link.Link, "_read", raise_another_error),
        ("messages", codec, "_explain", explain_in_two_lines),
        ("messages", codec, "_explain_batch", raise_another_error),
        ("messages", codec, "_decode_only_data", lambda data: [errors.ProtocolError("planted")]),
        ("sessions", outbox._Stream, "take", send_beyond_the_credit),
        ("sessions", worker.WorkerSession, "_end", keep_the_record),
        ("sessions", session.Session, "_receive_body", raise_another_error),
        ("sessions", outbox.Outbox, "drop", lambda self, call: None),
        ("requests", checks, "_kind_of", raise_another_error),
        ("requests", checks, "_LONGEST_SHOWN", 100_000),
        ("requests", messages_api, "_convert_tools", lambda tools: tools),
        ("requests", messages_api_content, "_assistant_message", forget_the_role),
    ],
)
def test_a_planted_bug_is_found(
    target: str, owner: Any, name: str, bug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, bug)
    monkeypatch.setattr(Slowdown, "factor", 1.0)
    assert found(TARGETS[target])
