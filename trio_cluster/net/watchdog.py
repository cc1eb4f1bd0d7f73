"""Heartbeats from a process whose event loop is blocked.

Theory of operation
===================

Everything in a node happens in one event loop, its heartbeats too. A handler that computes, or sleeps, without
awaiting stops all of it; and at the other end of a link that looks just like a process that has died. So a watchdog
thread writes the heartbeats that the loop misses, and puts into them what blocks it. A process that is frozen, or a
machine that is gone, has no thread that runs either: it falls silent, and is dropped.

*When is a loop blocked?* Trio calls an instrument before and after it waits for IO. Between the two it *turns*: it
runs every task that is ready, once. The length of a turn is exactly how late every other task is, be it for one task
that blocks or for a thousand that each take a little. A task of ours that sleeps and looks at the clock would be less
exact, and wake an idle loop. A turn that lasts longer than the interval between two heartbeats is a block.

*How can a thread write into a stream that the loop writes to?* Between two frames. :class:`InjectableStream` keeps what
is on its way in one buffer, which both sides write from, under a lock and without ever waiting: the loop when it runs,
the thread when the loop does not. So the thread completes a frame that the loop had begun before it writes its own, and
the loop completes one that the thread could not. A frame is never torn, and the lock is never held for longer than a
write that does not block.

*Why the thread may not outlive the link.* A descriptor that is closed is soon another connection's. So closing a stream
takes the lock, and from then on the thread writes nothing to it. The same holds once a stream is no longer watched.

*On which connections?* On all of them: :func:`injectable` refuses a connection on which a thread
cannot write (see :class:`~trio_cluster.net.streams.ByteStream`). A simulated one needs no thread, since its time stands
still while the loop is blocked.

*Without a link* a block is logged all the same, see :func:`log_blocks`: it stops every answer of the node.

There is one thread for each event loop, which serves all links of it, and only while something is watched. What it
cannot help against is code that does not let other threads run, such as an extension that computes without releasing
Python's interpreter lock.
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final, TypeAlias

import attrs
import trio

from .streams import Address, ByteStream

__all__ = [
    "InjectableStream",
    "NotInjectable",
    "blocking_frame",
    "heartbeats_while_blocked",
    "injectable",
    "is_users_code",
    "log_blocks",
    "place_of",
    "take_max_lag",
]

logger = logging.getLogger("trio_cluster.pulse")

#: Makes the frame that is written when the loop misses a heartbeat: of the seconds that its turn has lasted so far, and
#: of what blocks it ("" for a turn that is not long enough to be called a block). Called in the thread.
Frame: TypeAlias = Callable[[float, str], bytes]

#: How often the thread looks, in an interval between two heartbeats.
_LOOKS: Final = 10


class NotInjectable(TypeError):
    """A connection cannot carry a link: a blocked event loop would look like a dead process on it."""


class InjectableStream(trio.abc.AsyncResource):
    """A connection that carries whole frames, and into which another thread may write frames of its own.

    Args:
        stream: is closed with this one, and must not be used, or closed, in any other way.

    Attributes:
        last_frame: when the connection last took the end of a frame, on the monotonic clock.
        read: reads from the connection, see :meth:`ByteStream.read <trio_cluster.net.streams.ByteStream.read>`.
        virtual_time: as of the connection; no thread writes to it then.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.last_frame = time.monotonic()
        # The connection's own, since a method in between would cost two calls for each token.
        self.read = stream.read
        self.virtual_time = stream.virtual_time
        self._stream = stream
        self._lock = threading.Lock()
        self._unsent = memoryview(b"")
        self._closed = False
        self._injection_allowed = False

    @property
    def peer_address(self) -> Address:
        """The address of the other end. Raises ``OSError`` if the connection is over."""
        return self._stream.peer_address

    async def write(self, frames: bytes | bytearray | memoryview) -> None:
        """Write whole frames. A checkpoint. Cancelled, the rest of them stays in front of what is written next.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is over.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        complete = self.write_nowait(frames)
        while not complete:
            await self._stream.wait_writable()
            complete = self.write_nowait(b"")
        await trio.lowlevel.cancel_shielded_checkpoint()

    def write_nowait(self, frames: bytes | bytearray | memoryview) -> bool:
        """Write as much as can be written without waiting. Synchronous.

        Args:
            frames: must be whole; may be none.

        Returns:
            Whether nothing is left. The rest stays in front of what is written next, be it nothing.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is over.
        """
        with self._lock:
            if self._closed:
                raise trio.ClosedResourceError("this connection has been closed")
            if frames:
                self._unsent = memoryview(b"".join((self._unsent, frames)) if self._unsent else frames)
            return self._flush()

    async def wait_writable(self) -> None:
        """Wait until the connection takes something. A checkpoint."""
        await self._stream.wait_writable()

    def close(self) -> None:
        """Close this end. Synchronous, idempotent."""
        with self._lock:
            self._closed = True
        self._stream.close()

    async def aclose(self) -> None:
        """Close this end. A checkpoint, after closing."""
        self.close()
        await trio.lowlevel.checkpoint()

    def allow_injection(self, allowed: bool) -> None:
        """Set whether :meth:`inject_frame` may write from now on; at first it may not."""
        with self._lock:
            self._injection_allowed = allowed

    def inject_frame(self, frame: bytes) -> bool:
        """Write a frame from another thread. Never waits, never raises.

        Returns:
            Whether it is on its way. It is not if injection is not allowed, if the stream is closed or broken, if it is
            being written to right now, or if the other end does not take what is on its way already.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._closed or not self._injection_allowed or not self._flush():
                return False
            self._unsent = memoryview(frame)
            self._flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # The loop will find out for itself.
            return False
        finally:
            self._lock.release()
        return True

    def _flush(self) -> bool:
        """Write what the connection takes. Return whether nothing is left. To be called with the lock held."""
        while self._unsent:
            written = self._stream.try_write(self._unsent)
            if not written:
                return False
            self._unsent = self._unsent[written:]
            if not self._unsent:
                self.last_frame = time.monotonic()
        return True


def injectable(stream: ByteStream) -> InjectableStream:
    """Return ``stream`` in the form that a link needs.

    Raises:
        NotInjectable: heartbeats cannot be sent on it while the event loop is blocked. It is closed then.
    """
    if not (stream.injectable or stream.virtual_time):
        stream.close()
        raise NotInjectable(
            f"no heartbeats can be sent on a {type(stream).__name__} while the event loop is blocked"
        )
    return InjectableStream(stream)


@contextmanager
def heartbeats_while_blocked(
    stream: InjectableStream, every: float, frame: Frame, on_recovered: Callable[[], None]
) -> Iterator[None]:
    """Watch ``stream`` during the ``with`` statement: heartbeats are sent on it while the event loop is blocked.

    To be entered and left in a task. After the ``with`` statement, the thread writes nothing more to the stream.

    Args:
        stream: nothing is sent on one with virtual time, on which no heartbeat can be missing.
        every: seconds in which something should be written to it.
        frame: makes what is written.
        on_recovered: called in the loop, after each frame that reported a block, as soon as the loop runs again.
    """
    if stream.virtual_time:
        yield
        return
    with _watch(_WatchedStream(stream, every, frame, on_recovered)):
        yield


@contextmanager
def log_blocks(every: float) -> Iterator[None]:
    """Log during the ``with`` statement when the event loop is blocked, also where there is no link.

    To be entered and left in a task.

    Args:
        every: seconds after which a turn of the loop is called a block.
    """
    with _watch(_WatchedLoop(every)):
        yield


@contextmanager
def _watch(watched: _Watched) -> Iterator[None]:
    try:
        watchdog = _watchdog.get()
    except LookupError:
        watchdog = _Watchdog()
        _watchdog.set(watchdog)
    watchdog.add(watched)
    try:
        yield
    finally:
        watchdog.remove(watched)


def take_max_lag() -> float:
    """Return the length in seconds of this event loop's longest turn since the last time that this was called.

    It is measured while any stream is watched, and 0 otherwise.
    """
    try:
        return _watchdog.get().take_max_lag()
    except LookupError:
        return 0.0


@attrs.define(eq=False)
class _WatchedStream:
    """What the thread does for one stream."""

    stream: InjectableStream
    every: float
    frame: Frame
    on_recovered: Callable[[], None]
    told: float | None = None
    """The beginning of the turn that the peer was told of as a block."""

    def write_if_due(self, now: float, since: float, blocked_by: str) -> bool:
        """Write a frame if it is time for one, or if the turn that began at ``since`` has just become a block.

        Args:
            now: the time, on the monotonic clock.
            since: when the turn began, on the same clock.
            blocked_by: what blocks the loop; empty while the turn is not long enough to be a block.

        Returns:
            Whether the peer was told of a block.
        """
        is_news = bool(blocked_by) and self.told != since
        is_due = now - self.stream.last_frame >= self.every
        if not (is_news or is_due) or not self.stream.inject_frame(self.frame(now - since, blocked_by)):
            return False
        if blocked_by:
            self.told = since
        return bool(blocked_by)

    def on_added(self) -> None:
        self.stream.allow_injection(True)

    def on_removed(self) -> None:
        self.stream.allow_injection(False)


@attrs.define(eq=False)
class _WatchedLoop:
    """In the place of a stream where there is none: blocks are only logged."""

    every: float

    def write_if_due(self, now: float, since: float, blocked_by: str) -> bool:
        return False

    def on_recovered(self) -> None:
        pass

    def on_added(self) -> None:
        pass

    def on_removed(self) -> None:
        pass


_Watched: TypeAlias = _WatchedStream | _WatchedLoop


class _Watchdog(trio.abc.Instrument):
    """Watches one event loop, and sends heartbeats on its links while that is blocked."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._loop = threading.get_ident()
        self._watched: set[_Watched] = set()
        # For the set of what is watched; never held while something is done with one of them.
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._runs = False
        # Whether the last attempt to start the thread has failed, which is logged once.
        self._has_failed = False
        # Read by the thread as they are: a float or None, replaced at once.
        self._since: float | None = None
        self._longest = 0.0
        # The beginning of the last turn that was logged as a block, and of the last one that was logged as over.
        self._blocked: float | None = None
        self._recovered: float | None = None

    # The loop's side

    def before_io_wait(self, timeout: float) -> None:
        """End a turn."""
        if self._since is not None:
            self._longest = max(self._longest, time.monotonic() - self._since)
        self._since = None

    def after_io_wait(self, timeout: float) -> None:
        """Begin a turn."""
        self._since = time.monotonic()

    def add(self, watched: _Watched) -> None:
        watched.on_added()
        with self._lock:
            first = not self._watched
            self._watched.add(watched)
        if first:
            self._since = time.monotonic()
            self._longest = 0.0
            trio.lowlevel.add_instrument(self)
            # Each thread has an event of its own, so that one that is still ending is not started again.
            self._stop = threading.Event()
            self._runs = False
        if not self._runs:
            # The first time, or each time as long as the system starts no further thread.
            self._runs = self._start()

    def _start(self) -> bool:
        try:
            threading.Thread(
                target=self._run, args=(self._stop,), name="trio_cluster watchdog", daemon=True
            ).start()
        except RuntimeError as error:
            if not self._has_failed:
                logger.warning("no heartbeats while the event loop is blocked: %s", error)
            self._has_failed = True
            return False
        self._has_failed = False
        return True

    def remove(self, watched: _Watched) -> None:
        watched.on_removed()
        with self._lock:
            self._watched.remove(watched)
            last = not self._watched
        if last:
            trio.lowlevel.remove_instrument(self)
            self._since = None
            self._stop.set()

    def take_max_lag(self) -> float:
        longest, self._longest = self._longest, 0.0
        return longest if self._since is None else max(longest, time.monotonic() - self._since)

    def _on_recovered(self, since: float) -> None:
        for watched in self._snapshot():
            try:
                watched.on_recovered()
            except Exception:
                # Trio calls this itself, and an exception would end the whole event loop.
                logger.exception("a link failed after its event loop was blocked")
        if self._recovered == since:
            return
        self._recovered = since
        fields = {"blocked_for": round(time.monotonic() - since, 3)}
        logger.warning("the event loop runs again", extra={"fields": fields})

    # The thread's side

    def _run(self, stop: threading.Event) -> None:
        streams = self._snapshot()
        while not stop.wait(min((watched.every for watched in streams), default=1.0) / _LOOKS):
            streams = self._snapshot()
            since = self._since
            if since is None:
                continue
            try:
                self._look(streams, since, time.monotonic())
            except Exception:
                # The thread serves all links of the loop, which would be dropped one after the other without it.
                logger.exception("a heartbeat of a blocked event loop failed")

    def _snapshot(self) -> tuple[_Watched, ...]:
        with self._lock:
            return tuple(self._watched)

    def _look(self, streams: tuple[_Watched, ...], since: float, now: float) -> None:
        blocked_by, told = "", False
        for watched in streams:
            if now - since >= watched.every:
                blocked_by = blocked_by or blocking_frame(self._loop)
                told |= watched.write_if_due(now, since, blocked_by)
            elif now - since >= watched.every / _LOOKS:
                watched.write_if_due(now, since, "")
        is_news = bool(blocked_by) and self._blocked != since
        if told or is_news:
            # For each frame, and not once for each block: the loop may be sending something at the same moment, and
            # the last heartbeat that the peer gets has to say that the loop runs.
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._on_recovered, since)
        # Last of all: the log may block as well.
        if is_news:
            self._blocked = since
            fields = {"blocked_for": round(now - since, 3)}
            logger.warning("the event loop is blocked: %s", blocked_by, extra={"fields": fields})


_watchdog: Final[trio.lowlevel.RunVar[_Watchdog]] = trio.lowlevel.RunVar("watchdog")


_PACKAGE: Final = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LIBRARIES: Final = tuple(
    path + os.sep for name, path in sysconfig.get_paths().items() if name in ("stdlib", "purelib", "platlib")
)
# Under the frames of a task lies the loop's own. That its name is an internal matter of trio does no harm: under
# another name, the worst that could happen is that the line which started the loop gets the blame.
_LOOP: Final = "unrolled_run"


def blocking_frame(thread: int) -> str:
    """Say for people what the event loop that runs in ``thread`` is doing at this moment.

    Names the innermost place that is not in a library. Frames may introduce themselves by a local variable
    ``__traceback_info__``, as some tracebacks show it; the innermost such text comes first.

    Args:
        thread: its identifier; another thread than the one that asks.

    Returns:
        For instance ``"handler of 'm' (app.py:12 in compute)"``.
    """
    frame = innermost = sys._current_frames().get(thread)
    users: FrameType | None = None
    outermost: FrameType | None = None
    owner = ""
    while frame is not None and frame.f_code.co_name != _LOOP:
        code = frame.f_code
        if "__traceback_info__" in code.co_varnames:
            owner = str(frame.f_locals.get("__traceback_info__", ""))
            break
        if users is None and is_users_code(code.co_filename):
            users = frame
        elif not code.co_filename.startswith(_PACKAGE):
            outermost = frame
        frame = frame.f_back
    # A handler may be installed like a library; then its own function says more than what that has called.
    place = users or (outermost if owner else None) or innermost
    where = "unknown code" if place is None else place_of(place)
    text = f"{owner} ({where})" if owner else where
    return "".join(character if character.isprintable() else "?" for character in text)


def is_users_code(path: str) -> bool:
    """Return whether a file of code is neither of this package nor of a library."""
    return not path.startswith((_PACKAGE, *_LIBRARIES, "<frozen"))


def place_of(frame: FrameType) -> str:
    """Say for people where a frame is: ``app.py:12 in compute``."""
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"
