"""A terminal as a place to draw on: keys come one by one, and what was on it before is there again afterwards.

While it is in use, the terminal shows its alternate screen, has no cursor, and neither echoes keys nor waits for the
end of a line. All of that is undone when the context ends, however it ends, and while the process is stopped by Ctrl-Z.
Ctrl-C and Ctrl-Z stay signals.
"""

from __future__ import annotations

import codecs
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import trio

from ..errors import ClusterError

__all__ = ["Keys", "Terminal", "open_terminal"]

#: The alternate screen, no cursor, lines that do not wrap; and back.
_ENTER: Final = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J"
_LEAVE: Final = b"\x1b[?7h\x1b[?25h\x1b[?1049l"
#: Seconds in which the rest of an escape sequence follows its first byte. Later, that was the key Escape.
_SEQUENCE: Final = 0.05
#: Seconds that the last frame may take, at the end.
_LAST_FRAME: Final = 1.0
#: Columns and lines of a terminal that does not say how large it is.
_USUAL_SIZE: Final = (80, 24)

#: What terminals send for keys that are no characters.
_SEQUENCES: Final = {
    "[A": "up", "OA": "up", "[B": "down", "OB": "down", "[C": "right", "OC": "right", "[D": "left", "OD": "left",
    "[H": "home", "OH": "home", "[1~": "home", "[7~": "home", "[F": "end", "OF": "end", "[4~": "end", "[8~": "end",
    "[5~": "page up", "[6~": "page down", "[Z": "back tab",
}  # fmt: skip
_CONTROLS: Final = {
    "\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "backspace", "\x08": "backspace", "\x15": "clear",
    "\x0c": "redraw", "\x04": "half down",
}  # fmt: skip


class Keys:
    """Makes keys of what a terminal sends. Synchronous.

    A key is its character, or a name such as ``up``, ``enter`` or ``escape``.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unread = ""

    @property
    def unfinished(self) -> bool:
        """Whether the beginning of a sequence waits for its rest, which may be the key Escape alone."""
        return bool(self._unread)

    def feed(self, data: bytes) -> list[str]:
        """Return the keys that are complete with these bytes."""
        self._unread += self._decoder.decode(data)
        keys = []
        while self._unread and (key := self._next()) is not None:
            if key:
                keys.append(key)
        return keys

    def flush(self) -> list[str]:
        """Return the keys of what has waited for its rest, which does not come."""
        unread, self._unread = self._unread, ""
        return ["escape"] if unread == "\x1b" else []

    def _next(self) -> str | None:
        """Take out the next key; empty: one that is not known. ``None``: it is not complete."""
        unread = self._unread
        if unread[0] != "\x1b":
            self._unread = unread[1:]
            return _CONTROLS.get(unread[0], unread[0] if unread[0].isprintable() else "")
        if len(unread) == 1:
            return None
        if unread[1] not in "[O":
            # Escape, and another key at once; or Alt and a key.
            self._unread = unread[1:]
            return "escape"
        end = 2
        while end < len(unread) and not ("@" <= unread[end] <= "~"):
            end += 1
        if end == len(unread):
            return None
        self._unread = unread[end + 1 :]
        return _SEQUENCES.get(unread[1 : end + 1], "")


class Terminal:
    """The terminal of this process; see the top of this module.

    Args:
        keyboard, screen: the descriptors of its two directions.
    """

    def __init__(self, keyboard: int, screen: int) -> None:
        self._keyboard, self._screen = keyboard, screen
        self._before: list[Any] = termios.tcgetattr(keyboard)
        self._entered = False
        # Held by the thread that writes a frame, which may go on when nobody waits for it any more.
        self._writing = threading.Lock()
        self._keys = Keys()

    @property
    def size(self) -> tuple[int, int]:
        """The columns and lines that it has now."""
        try:
            columns, lines = os.get_terminal_size(self._screen)
        except OSError:
            return _USUAL_SIZE
        return (columns, lines) if columns > 0 and lines > 0 else _USUAL_SIZE

    def enter(self) -> None:
        """Begin to use it. Synchronous, idempotent."""
        attributes = [*self._before]
        attributes[3] = attributes[3] & ~(termios.ICANON | termios.ECHO)
        # The keys that end a line or a file are keys like others.
        attributes[6] = [*attributes[6]]
        attributes[6][termios.VMIN], attributes[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._keyboard, termios.TCSANOW, attributes)
        if not self._entered:
            self._entered = True
            _write(self._screen, _ENTER)

    def leave(self) -> None:
        """Make it what it was. Synchronous, idempotent; does not fail if the terminal is gone."""
        written = self._writing.acquire(timeout=_LAST_FRAME)
        try:
            if self._entered:
                self._entered = False
                _write(self._screen, _LEAVE)
            # Keys that nobody has read are not for the shell.
            termios.tcflush(self._keyboard, termios.TCIFLUSH)
            termios.tcsetattr(self._keyboard, termios.TCSANOW, self._before)
        except (OSError, termios.error):
            pass
        finally:
            if written:
                self._writing.release()

    def suspend(self) -> None:
        """Stop this process, as Ctrl-Z does, until it is continued. Synchronous. To be called by the main thread."""
        self.leave()
        # Not with SIGSTOP: the kernel ignores SIGTSTP where there is no shell that could continue the process.
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self.enter()

    async def read_keys(self) -> list[str]:
        """Wait for keys, and return them; none at the end of the terminal. A checkpoint."""
        while True:
            if self._keys.unfinished:
                with trio.move_on_after(_SEQUENCE) as scope:
                    await trio.lowlevel.wait_readable(self._keyboard)
                if scope.cancelled_caught:
                    if keys := self._keys.flush():
                        return keys
                    continue
            else:
                await trio.lowlevel.wait_readable(self._keyboard)
            data = os.read(self._keyboard, 4096)
            if not data:
                return []
            if keys := self._keys.feed(data):
                return keys

    def clear(self) -> None:
        """Forget what is shown, such as the words of another program. Synchronous; the next frame shows all again."""
        _write(self._screen, b"\x1b[2J")

    async def draw(self, lines: list[str]) -> None:
        """Show lines, which fill the screen. A checkpoint.

        Args:
            lines: as many as the screen has, each as wide as it is, with their styles.
        """
        drawn = "\x1b[0m\r\n".join(lines)
        # A frame that is shown at once, by terminals that know how to.
        text = f"\x1b[?2026h\x1b[H{drawn}\x1b[0m\x1b[?2026l"
        data = text.encode(sys.stdout.encoding or "utf-8", "replace")
        # In a thread, since a terminal may be slow, or stopped by Ctrl-S.
        await trio.to_thread.run_sync(self._write_frame, data, abandon_on_cancel=True)

    def _write_frame(self, data: bytes) -> None:
        with self._writing:
            if self._entered:
                _write(self._screen, data)


@contextmanager
def open_terminal(check: Callable[[], None]) -> Iterator[Terminal]:
    """Return the terminal of this process, in use until the context ends.

    Args:
        check: called when it is known that there is a terminal, and before it is used.

    Raises:
        ClusterError: there is none, or one that cannot be drawn on.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ClusterError(
            "top needs a terminal; for scripts there are `trio-cluster status --json` and `trio-cluster calls --json`"
        )
    if os.environ.get("TERM", "dumb") in ("", "dumb"):
        raise ClusterError(
            "top cannot draw on this terminal (TERM=dumb); there are `trio-cluster status` and `trio-cluster calls`"
        )
    check()
    sys.stdout.flush()
    terminal = Terminal(sys.stdin.fileno(), sys.stdout.fileno())
    try:
        terminal.enter()
        yield terminal
    finally:
        terminal.leave()


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
