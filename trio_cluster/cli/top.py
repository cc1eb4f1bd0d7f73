"""``trio-cluster top``: the requests of a node and its workers in a terminal, live, with keys that act on them.

Theory of operation
===================

Four tasks share one :class:`TopState`. One follows the events of the node (``event_feed.py``), one reads keys, one
waits for signals, and one draws: at most :data:`FRAMES` times in a second because of events, at once because of a key,
and every second for the durations. Events only change the state, so a node with thousands of requests costs a frame
for the rows that are visible.

What a key starts is done by a task of its own, which asks the node as the other commands do, in a thread; its answer
becomes a message on the screen.

The terminal is given back before the process is stopped by Ctrl-Z, and taken again when it goes on.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import trio
from rich.console import Console

from ..errors import ClusterError
from .admin_client import NodeAddress, printable, request_json
from .event_feed import EventFeed
from .tables import describe_story
from .terminal import Terminal, open_terminal
from .top_screen import Look, now_of, paint, screen
from .top_state import Action, Item, TopState

__all__ = ["FRAMES", "run_top"]

#: Frames per second because of events.
FRAMES: Final = 4
#: Seconds between two frames because of keys, such as one that is held down.
_KEY_FRAME: Final = 0.03
#: Seconds between two looks at a story that goes on.
_STORY_INTERVAL: Final = 1.0

#: The latest time that is shown as one, in seconds since the epoch.
_LATEST: Final = 1e11

_SIGNALS: Final = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH,
)  # fmt: skip


def run_top(address: NodeAddress, api_key: str | None) -> None:
    """Show a node until the user ends that. Blocks.

    Args:
        address: the node.
        api_key: the key to send, if any.

    Raises:
        ClusterError: there is no terminal, or the node cannot be asked.
    """
    with open_terminal(check=partial(_check, address, api_key)) as terminal:
        trio.run(_Top(address, api_key, terminal).run, restrict_keyboard_interrupt_to_checkpoints=True)


def _check(address: NodeAddress, api_key: str | None) -> None:
    """Ask the node once, so that what is wrong is said in one line, as by the other commands. Blocks."""
    request_json(address, "/cluster/calls", api_key, expected=("calls",))


class _Top:
    """One run of the command; see the top of this module."""

    def __init__(self, address: NodeAddress, api_key: str | None, terminal: Terminal) -> None:
        self._address, self._api_key, self._terminal = address, api_key, terminal
        self._state = TopState(address.url)
        self._feed = EventFeed(address, api_key, self._on_event, self._on_connection)
        self._changed = trio.Event()
        # A key or a signal wants a frame at once.
        self._hurry = trio.Event()
        self._console = self._new_console()
        is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        self._tree = ("├ ", "└ ") if is_utf8 else ("| ", "` ")
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Show the node until the user ends that. A checkpoint."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self._wait_for_signals)
            nursery.start_soon(self._feed.run)
            nursery.start_soon(self._read_keys)
            nursery.start_soon(self._tick)
            nursery.start_soon(self._draw)

    def _new_console(self) -> Console:
        # What it writes is captured; it only decides about colours.
        return Console(
            file=io.StringIO(),
            force_terminal=True,
            no_color=bool(os.environ.get("NO_COLOR")),
            width=10_000,
            highlight=False,
            markup=False,
            emoji=False,
        )

    # What changes the state

    def _on_event(self, name: str, content: Any) -> None:
        self._state.items.apply(name, content, trio.current_time())
        self._changed.set()

    def _on_connection(self, lost: str) -> None:
        self._state.lost = lost
        self._state.clock_ahead = self._feed.clock_ahead
        self._changed.set()

    async def _tick(self) -> None:
        """Have durations drawn again."""
        while True:
            await trio.sleep(1)
            self._changed.set()

    async def _read_keys(self) -> None:
        assert self._nursery is not None
        while True:
            keys = await self._terminal.read_keys()
            if not keys:
                # The terminal is gone.
                self._nursery.cancel_scope.cancel(reason="the terminal was closed")
                return
            for key in keys:
                self._do(self._state.press(key))
            self._draw_soon()

    async def _wait_for_signals(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        assert self._nursery is not None
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGTSTP:
                    self._terminal.suspend()
                elif number == signal.SIGCONT:
                    self._terminal.enter()
                elif number != signal.SIGWINCH:
                    break
                self._draw_soon()
        self._nursery.cancel_scope.cancel(reason="the process is being stopped")

    # Actions

    def _do(self, action: Action | None) -> None:
        assert self._nursery is not None
        if action is None:
            return
        if action.what == "quit":
            self._nursery.cancel_scope.cancel(reason="the user has quit")
        elif action.what == "redraw":
            self._terminal.clear()
        elif action.what == "story":
            self._nursery.start_soon(self._tell, action)
        else:
            self._nursery.start_soon(self._act, action)

    async def _act(self, action: Action) -> None:
        name = quote(action.target, safe="")
        if action.what == "cancel":
            path, expected = f"/cluster/calls/{name}/cancel", ("cancelled",)
        else:
            path, expected = f"/cluster/workers/{name}/drain", ("id",)
        try:
            content = await self._ask(path, expected, body={})
        except ClusterError as error:
            self._state.message = str(error)
        else:
            if action.what == "drain":
                self._state.message = f"{action.target} drains"
            else:
                count = content["cancelled"]
                self._state.message = (
                    f"{count} {'call' if count == 1 else 'calls'} cancelled of {action.target}"
                )
        self._draw_soon()

    async def _tell(self, action: Action) -> None:
        """Show a story, and follow it while it goes on."""
        state = self._state
        while state.story_of is action:
            if state.tab == "workers":
                worker = state.items.workers.get(action.target)
                state.show_story([f"{action.target} has left"] if worker is None else _details(worker))
            else:
                try:
                    story = await self._ask(
                        f"/cluster/requests/{quote(action.target, safe='')}", ("outcome", "steps")
                    )
                except ClusterError as error:
                    story = {}
                    lines = [str(error)]
                else:
                    lines = describe_story(story).splitlines()
                if state.story_of is not action:
                    return
                state.show_story(lines)
                if story.get("outcome") not in (None, "running"):
                    self._draw_soon()
                    return
            self._draw_soon()
            await trio.sleep(_STORY_INTERVAL)

    async def _ask(
        self, path: str, expected: tuple[str, ...], body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        ask: Callable[[], dict[str, Any]] = partial(
            request_json, self._address, path, self._api_key, expected=expected, body=body
        )
        return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)

    # Drawing

    def _draw_soon(self) -> None:
        self._changed.set()
        self._hurry.set()

    async def _draw(self) -> None:
        while True:
            self._changed = trio.Event()
            self._hurry = trio.Event()
            width, height = self._terminal.size
            state = self._state
            look = Look(width, height, now_of(state), trio.current_time(), self._tree)
            await self._terminal.draw(paint(screen(state, look), self._console))
            await trio.sleep(_KEY_FRAME)
            with trio.move_on_after(1 / FRAMES - _KEY_FRAME):
                await self._hurry.wait()
            await self._changed.wait()


def _details(worker: Item) -> list[str]:
    """Return a line for each field of a worker."""
    width = max(len(name) for name in worker)
    titles = {name: printable(name).replace("_", " ").ljust(width) for name in worker}
    return [f"{titles[name]}  {_shown(name, value)}" for name, value in worker.items()]


def _shown(name: str, value: object) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(str, value))
    elif isinstance(value, dict):
        shown = ", ".join(f"{key}: {each}" for key, each in value.items())
    elif isinstance(value, bool):
        shown = "yes" if value else "no"
    elif name == "connected_since" and isinstance(value, float) and 0 <= value < _LATEST:
        shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    else:
        shown = "" if value is None else str(value)
    return printable(shown) or "-"
