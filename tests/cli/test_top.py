"""``trio-cluster top`` up to its screen: keys, the events that it follows, and why it does not start."""

from __future__ import annotations

import json
import os
import pty
import select
import sys
import termios
from typing import Any

import pytest
import trio
from command_line import Main, one_line
from raw_server import Visit, open_raw_server

from trio_cluster.cli import event_feed
from trio_cluster.cli.admin_client import NodeAddress
from trio_cluster.cli.event_feed import EventFeed, EventReader
from trio_cluster.cli.terminal import Keys, open_terminal
from trio_cluster.errors import ClusterError


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"jq", ["j", "q"]),
        (b"\x1b[A\x1bOB\x1b[5~\x1b[6~\x1b[H\x1b[4~", ["up", "down", "page up", "page down", "home", "end"]),
        (b"\t\x1b[Z\r\x7f", ["tab", "back tab", "enter", "backspace"]),
        ("äß".encode(), ["ä", "ß"]),
        # What is not known is no key, and not several either.
        (b"\x1b[1;5Aj\x1b[200~k\x01", ["j", "k"]),
        (b"\x1bq", ["escape", "q"]),
        (b"\xff\xfea", ["\ufffd", "\ufffd", "a"]),
    ],
)
def test_bytes_are_keys_in_whatever_pieces_they_come(data: bytes, expected: list[str]) -> None:
    assert Keys().feed(data) == expected
    keys = Keys()
    assert [key for byte in data for key in keys.feed(bytes([byte]))] == expected
    assert not keys.unfinished


def test_an_escape_alone_is_a_key_when_nothing_follows() -> None:
    keys = Keys()
    assert keys.feed(b"a\x1b") == ["a"]
    assert keys.unfinished
    assert keys.flush() == ["escape"]
    assert keys.feed(b"b") == ["b"]
    # The beginning of a sequence that goes no further is none.
    assert keys.feed(b"\x1b[") == []
    assert keys.flush() == []


def test_events_are_read_in_whatever_pieces_they_come() -> None:
    stream = (
        b'event: snapshot\ndata: {"requests": [1]}\n\n: keepalive\n\nevent: remove\ndata: {"a": "\\n"}\n\n'
    )
    expected = [("snapshot", {"requests": [1]}), ("remove", {"a": "\n"})]
    for size in (1, 7, len(stream)):
        reader = EventReader()
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert [event for piece in pieces for event in reader.feed(piece)] == expected
    with pytest.raises(ValueError, match="truncated"):
        EventReader().feed(b"data: {\n\n")


def event(name: str, **items: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(items)}\n\n".encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"


async def test_a_connection_that_is_lost_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_feed, "_FIRST_PAUSE", 0.01)
    # It begins to count before the node is connected to, so a busy machine has to manage that.
    monkeypatch.setattr(event_feed, "_SILENCE", 2.0)
    visits = 0
    refused = json.dumps({"error": {"message": "not \x1b[2J now"}}).encode()

    async def script(visit: Visit) -> None:
        nonlocal visits
        visits += 1
        head = await visit.head()
        assert head.line == "GET /cluster/events HTTP/1.1"
        assert head.headers["authorization"] == "Bearer k"
        if visits == 1:
            await visit.send(
                HEAD + b"x-trio-cluster-time: 5.0\r\n\r\n", chunk(event("snapshot", requests=[]))
            )
        elif visits == 2:
            length = b"content-length: %d\r\n\r\n" % len(refused)
            await visit.send(b"HTTP/1.1 503 Service Unavailable\r\n" + length + refused)
        elif visits == 3:
            await visit.send(HEAD + b"\r\n" + chunk(b"data: nonsense\n\n"))
        elif visits == 4:
            await visit.send(HEAD + b"\r\n" + chunk(event("upsert", requests=[1])))
            await visit.closed(within=60)
        else:
            await visit.send(HEAD + b"\r\n" + chunk(event("snapshot", requests=[2])))
            await visit.closed(within=60)

    events: list[tuple[str, Any]] = []
    states: list[str] = []
    second = trio.Event()

    def on_event(name: str, content: Any) -> None:
        events.append((name, content))
        if content == {"requests": [2]}:
            second.set()

    async with open_raw_server(script) as server, trio.open_nursery() as nursery:
        feed = EventFeed(NodeAddress(f"http://127.0.0.1:{server.port}"), "k", on_event, states.append)
        nursery.start_soon(feed.run)
        with trio.fail_after(20):
            await second.wait()
        nursery.cancel_scope.cancel()
    assert [name for name, _ in events] == ["snapshot", "upsert", "snapshot"]
    assert states[:2] == ["", "the connection was closed in the middle of the response"]
    assert states[2] == "HTTP 503: not ?[2J now"
    assert states[3].startswith("JSON is malformed")
    assert states[4:] == ["", "nothing came for 2 s", ""]


async def test_a_node_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_feed, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(event_feed, "_SILENCE", 0.5)
    visits = 0

    async def script(visit: Visit) -> None:
        nonlocal visits
        visits += 1
        await visit.head()
        if visits > 1:
            await visit.send(HEAD + b"\r\n" + chunk(event("snapshot", requests=[])))
        await visit.closed(within=60)

    states: list[str] = []
    shown = trio.Event()
    async with open_raw_server(script) as server, trio.open_nursery() as nursery:
        address = NodeAddress(f"http://127.0.0.1:{server.port}")
        feed = EventFeed(address, None, lambda *_: shown.set(), states.append)
        nursery.start_soon(feed.run)
        with trio.fail_after(20):
            await shown.wait()
        nursery.cancel_scope.cancel()
    assert states[0] == "nothing came for 0.5 s"


async def test_the_clock_of_the_node_counts_if_it_differs() -> None:
    feed = EventFeed(NodeAddress("http://127.0.0.1:1"), None, lambda *_: None, lambda _: None)
    for at, ahead in (
        (f"{event_feed.time.time() + 100}", 100),
        (f"{event_feed.time.time()}", 0),
        ("x", 0),
        ("inf", 0),
    ):
        feed.clock_ahead = 0.0
        feed._note_clock(at)
        assert feed.clock_ahead == pytest.approx(ahead, abs=1)


class Descriptor:
    encoding = "utf-8"

    def __init__(self, number: int) -> None:
        self.fileno = lambda: number

    def isatty(self) -> bool:
        return True

    def flush(self) -> None: ...


def test_an_error_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    monkeypatch.setattr(sys, "stdin", Descriptor(slave))
    monkeypatch.setattr(sys, "stdout", Descriptor(slave))
    monkeypatch.setenv("TERM", "xterm")

    def fail() -> None:
        with open_terminal(check=lambda: None) as terminal:
            assert termios.tcgetattr(slave) != before
            # Keys that nobody reads are not for the shell.
            os.write(master, b"rm -rf")
            assert terminal.size == (80, 24)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert termios.tcgetattr(slave) == before
    shown = b""
    # What is written to one side of a pseudo-terminal is at the other one a moment later.
    while b"\x1b[?1049l" not in shown and select.select([master], [], [], 10)[0]:
        shown += os.read(master, 65536)
    assert (shown.count(b"\x1b[?1049h"), shown.count(b"\x1b[?1049l")) == (1, 1)
    os.set_blocking(slave, False)
    with pytest.raises(BlockingIOError):
        os.read(slave, 100)
    # A node that does not answer is an error before anything is drawn.
    with pytest.raises(ZeroDivisionError), open_terminal(check=lambda: 1 // 0):  # type: ignore[arg-type]
        raise AssertionError("unreachable")
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("name", ["dumb", ""])
def test_a_terminal_that_cannot_be_drawn_on_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "stdin", Descriptor(0))
    monkeypatch.setattr(sys, "stdout", Descriptor(1))
    monkeypatch.setenv("TERM", name)
    with (
        pytest.raises(ClusterError, match="there are `trio-cluster status`"),
        open_terminal(check=lambda: None),
    ):
        raise AssertionError("unreachable")


def test_what_is_no_terminal_is_told_what_there_is_for_scripts(main: Main) -> None:
    pytest.importorskip("rich", reason="the extra 'top' is not installed")
    code, out, err = main("top", "http://127.0.0.1:1")
    assert (code, out) == (1, "")
    assert one_line(err) == (
        "top needs a terminal; for scripts there are `trio-cluster status --json` and `trio-cluster calls --json`"
    )


def test_without_its_library_it_names_the_extra(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name == "trio_cluster.cli.top" or name.split(".")[0] == "rich"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    code, _, err = main("top")
    assert code == 1
    assert one_line(err).startswith("top needs rich (the extra `top`): install it with: ")
