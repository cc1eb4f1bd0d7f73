"""The body of a request: its limits, its time, and what is kept of it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

from trio_cluster.errors import InvalidRequest, Overloaded
from trio_cluster.gateway import body
from trio_cluster.gateway.body import BODY_IDLE_TIMEOUT, BODY_TIMEOUT, ClientLeft, RequestBody, SpooledBody


class Client:
    """Sends pieces, each after some seconds; leaves in the end if it has not sent all."""

    def __init__(self, *pieces: bytes, complete: bool = True, pause: float = 0.0) -> None:
        self._messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": piece, "more_body": True} for piece in pieces
        ]
        if complete:
            self._messages[-1]["more_body"] = False
        else:
            self._messages.append({"type": "http.disconnect"})
        self._pause = pause
        self.asked = 0

    async def __call__(self) -> dict[str, Any]:
        self.asked += 1
        await trio.sleep(self._pause)
        return self._messages.pop(0)


async def refusal(request_body: RequestBody) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        await request_body.read(1 << 30)
    return caught.value


# Reading


@given(st.lists(st.binary(max_size=4), min_size=1), st.integers(0, 12))
async def test_reading_ends_with_the_body_or_when_it_is_enough(pieces: list[bytes], most: int) -> None:
    request_body, whole = RequestBody(Client(*pieces), 100_000), b"".join(pieces)
    first = await request_body.read(most)
    assert whole.startswith(first)
    assert request_body.received == len(first)
    assert request_body.complete or len(first) > most
    assert await request_body.read(100_000, first) == whole
    assert request_body.complete


async def test_no_more_is_asked_for_than_it_takes() -> None:
    client = Client(b"ab", b"c", b"d")
    request_body = RequestBody(client, 100)
    assert await request_body.read(1) == b"ab"
    assert client.asked == 1
    assert await request_body.read(1, b"ab") == b"ab"
    assert client.asked == 1


async def test_a_body_of_exactly_its_limit_is_taken_and_one_byte_more_is_413() -> None:
    assert await RequestBody(Client(b"ab", b"c"), 3).read(100) == b"abc"
    error = await refusal(RequestBody(Client(b"ab", b"cd"), 3))
    assert (error.status, "3 bytes" in error.message) == (413, True)


async def test_a_client_that_leaves_is_told_from_one_that_is_done() -> None:
    request_body = RequestBody(Client(b"a", complete=False), 100)
    with pytest.raises(ClientLeft):
        await request_body.read(100)
    assert (request_body.left, request_body.complete) == (True, False)


# Time


async def test_each_piece_has_its_time_and_silence_for_longer_is_408(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    slow = RequestBody(Client(b"a", b"b", b"c", pause=BODY_IDLE_TIMEOUT - 1), 100)
    assert await slow.read(100) == b"abc"
    assert trio.current_time() - began > 2 * BODY_IDLE_TIMEOUT
    assert (await refusal(RequestBody(Client(b"a", b"b", pause=BODY_IDLE_TIMEOUT + 1), 100))).status == 408


async def test_the_whole_body_has_its_time(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    assert (await refusal(RequestBody(Client(*[b"a"] * 100, pause=10), 1000))).status == 408
    assert trio.current_time() - began == pytest.approx(BODY_TIMEOUT)


async def test_time_for_which_the_backend_took_nothing_does_not_count_for_the_client(
    autojump_clock: MockClock,
) -> None:
    request_body = RequestBody(Client(*[b"a"] * 50, pause=10), 1000)
    await trio.sleep(500)
    request_body.extend_deadline(500)
    assert len(await request_body.read(1000)) == 50


# Dropping


async def test_what_is_dropped_is_read_to_the_end() -> None:
    request_body = RequestBody(Client(b"a" * 10, b"b" * 10), 5)
    await request_body.drop(100, 1)
    assert request_body.complete


@pytest.mark.parametrize(
    ("pieces", "pause", "seconds"), [(100, 0.0, 1.0), (5, 2.0, 5.0)], ids=["too much", "too slow"]
)
async def test_dropping_ends_when_it_is_enough(
    pieces: int, pause: float, seconds: float, autojump_clock: MockClock
) -> None:
    client = Client(*[b"a" * 10] * pieces, pause=pause)
    request_body = RequestBody(client, 5)
    await request_body.drop(50, seconds)
    assert not request_body.complete
    assert request_body.received <= 60


async def test_dropping_ends_when_the_client_leaves() -> None:
    request_body = RequestBody(Client(b"a", complete=False), 5)
    await request_body.drop(100, 1)
    assert request_body.left


# What is kept


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "SPOOL_THRESHOLD", 10)
    monkeypatch.setattr(body, "_BLOCK", 4)


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=15)), st.binary(max_size=15))
async def test_what_was_kept_is_taken_as_it_came(pieces: list[bytes], end: bytes) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, SpooledBody() as kept:
        monkeypatch.setattr(body, "SPOOL_THRESHOLD", 10)
        monkeypatch.setattr(body, "_BLOCK", 4)
        for piece in pieces:
            await kept.add(piece)
        await kept.add(end, last=True)
        out = b""
        while data := await kept.take():
            out += data
        assert out == b"".join(pieces) + end


async def test_little_is_kept_in_memory_and_more_on_the_disk(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Any] = []
    make = body.tempfile.TemporaryFile
    monkeypatch.setattr(
        body.tempfile, "TemporaryFile", lambda **options: files.append(make(**options)) or files[-1]
    )
    with SpooledBody() as kept:
        await kept.add(b"a" * 10)
        assert files == []
        await kept.add(b"b")
        (file,) = files
        await kept.add(b"c" * 20)
        assert files == [file]
        assert not file.closed
    assert file.closed


async def test_what_comes_last_stays_in_memory(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body.tempfile, "TemporaryFile", None)
    with SpooledBody() as kept:
        await kept.add(b"aaaabb", last=True)
        assert [await kept.take() for _ in range(3)] == [b"aaaa", b"bb", b""]


class FullDisk:
    """A file that has no room for anything, or breaks when it is read."""

    def write(self, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        pass


async def test_a_full_disk_is_503_and_says_so(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body.tempfile, "TemporaryFile", lambda **options: FullDisk())
    with SpooledBody() as kept, pytest.raises(Overloaded, match="No space left") as caught:
        await kept.add(b"a" * 11)
    assert caught.value.status == 503
