"""``trio-cluster top`` in a terminal: what it shows, what keys do to a cluster, and how the terminal is left."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio
from nodes import Node, Nodes, Stream
from served import chat, until

pytest.importorskip("rich", reason="the extra 'top' is not installed")
pytestmark = pytest.mark.processes

#: As a shell does it: the command is in a process group of its own, in the foreground. Says what becomes of it.
SHELL = """
import fcntl, os, signal, subprocess, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
command = [sys.executable, "-m", "trio_cluster", *sys.argv[1:]]
child = subprocess.Popen(command, process_group=0, stderr=subprocess.STDOUT)
os.tcsetpgrp(0, child.pid)
print("pid", child.pid, file=sys.stderr, flush=True)
while True:
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        print("stopped", file=sys.stderr, flush=True)
    else:
        print("ended", os.waitstatus_to_exitcode(status), file=sys.stderr, flush=True)
        break
"""

ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"


class TopInTerminal:
    """One run.

    Attributes:
        received: all that it has written to the terminal.
        said: the lines of its shell.
        before: the settings of the terminal before it was started.
    """

    def __init__(self, master: int, slave: int) -> None:
        self.received = b""
        self.said: list[str] = []
        self.before = termios.tcgetattr(slave)
        self._master, self._slave = master, slave

    @property
    def pid(self) -> int:
        return int(self.said[0].split()[1])

    @property
    def screen(self) -> str:
        """The last frame that is complete, without styles."""
        frames = self.received.rpartition(b"\x1b[?2026l")[0].rpartition(b"\x1b[H")[2]
        return re.sub(r"\x1b\[[0-9;]*m", "", frames.decode().replace("\r", ""))

    @property
    def is_restored(self) -> bool:
        after = termios.tcgetattr(self._slave)
        return after == self.before and self.received.count(LEAVE) == self.received.count(ENTER)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    async def shows(self, text: str, within: float = 10) -> None:
        try:
            await until(lambda: text in self.screen, within)
        except trio.TooSlowError:
            raise AssertionError(f"{text!r} is not on the screen:\n{self.screen}\n{self.said}") from None

    async def says(self, line: str, within: float = 10) -> None:
        await until(lambda: line in self.said, within)

    async def read_terminal(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._master)
            try:
                self.received += os.read(self._master, 65536)
            except OSError:
                return

    async def read_shell(self, stream: Any) -> None:
        unread = b""
        async for data in stream:
            *lines, unread = (unread + data).split(b"\n")
            self.said += [line.decode() for line in lines]


@asynccontextmanager
async def opened(node: Node, *arguments: str, **variables: str) -> AsyncIterator[TopInTerminal]:
    master, slave = pty.openpty()
    top = TopInTerminal(master, slave)
    top.resize(80, 24)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRIO_CLUSTER_")}
    environ |= {"TERM": "xterm-256color", **variables}
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", SHELL, "top", node.url, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE,
            env=environ,
        )
        nursery.start_soon(top.read_terminal)
        nursery.start_soon(top.read_shell, process.stderr)
        try:
            await until(lambda: bool(top.said), 10)
            yield top
        finally:
            if top.said and not any(line.startswith("ended") for line in top.said):
                top.send(signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()
    os.close(master)
    os.close(slave)


async def calls_of(node: Node) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=node.url, trust_env=False) as client:
        calls: list[dict[str, Any]] = (await client.get("/cluster/calls")).json()["calls"]
        return calls


async def test_keys_cancel_requests_tell_stories_and_drain_workers(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    master = await nodes.master()
    worker = await nodes.worker(master, "w1", models="m")
    async with opened(master) as top:
        await top.shows("No requests. They are shown here")
        stream = await nursery.start(Stream().read, master.url, chat("m", stream=True, ticks=400, pause=0.05))
        await top.shows("└ ")
        await top.shows("streaming")
        (call,) = await calls_of(master)
        top.press("\r")
        await top.shows("sent to worker 'w1'")
        top.press("q")
        await top.shows("Enter why")
        top.press("c")
        await top.shows("y/n")
        top.press("n")
        await top.shows("not done")
        assert len(await calls_of(master)) == 1
        top.press("cy")
        await top.shows(f"1 call cancelled of {call['request_id']}")
        assert (await stream.end(within=10)).report.ending != "finished"
        await top.shows("Requests 0")
        top.press("\t")
        await top.shows("WORKER")
        top.press("d")
        await top.shows("Drain worker w1?")
        top.press("y")
        await top.shows("No workers. Start one with")
        assert await worker.exit_code(within=10) == 0
        assert top.received.count(ENTER) == 1
        top.press("q")
        await top.says("ended 0")
        assert top.is_restored


async def test_the_terminal_is_what_it_was_however_it_ends(nodes: Nodes) -> None:
    master = await nodes.master(models="m")
    async with opened(master, NO_COLOR="1") as top:
        await top.shows("Requests 0")
        assert termios.tcgetattr(top._slave) != top.before
        # Ctrl-Z, and back.
        top.press("\x1a")
        await top.says("stopped")
        assert top.is_restored
        top.send(signal.SIGCONT)
        await until(lambda: top.received.count(ENTER) == 2, 10)
        await top.shows("Requests 0")
        # A window that gets another size.
        top.resize(40, 10)
        await until(lambda: {len(line) for line in top.screen.split("\n")} == {40}, 3)
        assert len(top.screen.split("\n")) == 10
        # No colours, and a selection that can be seen.
        assert not re.search(rb"\x1b\[[0-9;]*3[0-7]m", top.received)
        master.send(signal.SIGKILL)
        await top.shows("no connection:")
        top.send(signal.SIGTERM)
        await top.says("ended 0")
        assert top.is_restored
    assert await master.exit_code(within=10) != 0


async def test_ctrl_c_ends_it_and_an_error_restores_the_terminal(nodes: Nodes) -> None:
    master = await nodes.master("--api-key", "k", "--operator-key", "ops", models="m")
    async with opened(master, "--operator-key", "ops") as top:
        await top.shows("Requests 0")
        top.press("\x03")
        await top.says("ended 0")
        assert top.is_restored
    async with opened(master, "--api-key", "k") as top:
        await top.says("ended 1")
        assert b"error: " + master.url.encode() in top.received
        assert ENTER not in top.received
        assert top.is_restored
