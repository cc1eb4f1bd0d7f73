"""A sliding window over what was admitted: exact, in bounded memory, without a clock of its own.

Theory of operation
===================

The log has an entry for each admission: the time, and how many requests and tokens were admitted then. An entry counts
for exactly one window (a minute) from its time on: it has left the log at ``time + window``. Something is admitted only
if the sum over the log, with it included, is within the limit. So in *any* window that begins at any instant, not only
in those that begin with a full minute, no more than the limit is admitted: when the last entry of such a window was
made, all others of that window were in the log.

From the same log follows, to the microsecond, when there will be room: when enough of the oldest entries have left.
Nothing else frees room, except that reservations are settled for less.

Times are whole microseconds, so that sums and differences of them are exact. A clock that goes backwards is taken to
stand still.

*Bounded memory.* The first :data:`EXACT` entries are kept one by one. When there are more, an admission is added to the
newest entry if that one began less than a 1024th of the window ago, and the entry takes the later time. So a part of it
counts for up to a 1024th of a window longer than it should (59 ms of a minute), and never shorter. A log has at most
``2 * EXACT + 1`` entries.

Rejected: counters of fixed minutes, which admit twice the limit around the turn of a minute; a bucket that is refilled
steadily (GCRA), which admits up to twice the limit in a window that begins with a full bucket, or no burst at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

__all__ = ["EXACT", "Entry", "SlidingLog"]

#: Entries that are kept one by one.
EXACT: Final = 1024


class Entry:
    """What was admitted at one time.

    Attributes:
        began: the time of the first admission in it, in microseconds.
        time: the time of the last admission in it; the entry counts for one window from then on.
        requests, tokens: how many.
        gone: it has left the log.
    """

    __slots__ = ("began", "gone", "requests", "time", "tokens")

    def __init__(self, time: int, requests: int, tokens: int) -> None:
        self.began = time
        self.time = time
        self.requests = requests
        self.tokens = tokens
        self.gone = False


class SlidingLog:
    """The admissions of the last window. See the top of this module. All methods are synchronous.

    Args:
        window: its length in microseconds.

    Attributes:
        window: as given.
        requests, tokens: the sums over all entries.
    """

    __slots__ = ("_entries", "_latest", "requests", "tokens", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.requests = 0
        self.tokens = 0
        self._entries: deque[Entry] = deque()
        self._latest = 0

    def __len__(self) -> int:
        """The number of entries."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over the entries, oldest first."""
        return iter(self._entries)

    def advance(self, now: int) -> int:
        """Let time pass: remove the entries that have left the window.

        Args:
            now: the time in microseconds.

        Returns:
            The time that the log is at: ``now``, or a later one that it was given before.
        """
        if now > self._latest:
            self._latest = now
        entries, left = self._entries, self._latest - self.window
        while entries and entries[0].time <= left:
            entry = entries.popleft()
            entry.gone = True
            self.requests -= entry.requests
            self.tokens -= entry.tokens
        return self._latest

    def add(self, now: int, requests: int, tokens: int) -> Entry:
        """Add an admission, without asking for room, and return the entry that it is a part of."""
        now = self.advance(now)
        self.requests += requests
        self.tokens += tokens
        entries = self._entries
        if len(entries) >= EXACT and now - entries[-1].began < self.window // EXACT:
            entry = entries[-1]
            entry.time = now
            entry.requests += requests
            entry.tokens += tokens
        else:
            entry = Entry(now, requests, tokens)
            entries.append(entry)
        return entry

    def change(self, entry: Entry, requests: int, tokens: int) -> None:
        """Add to an entry, usually negative numbers. Without effect if it has left the window."""
        if not entry.gone:
            entry.requests += requests
            entry.tokens += tokens
            self.requests += requests
            self.tokens += tokens

    def wait_for_requests(self, limit: int, count: int, now: int) -> int | None:
        """Return after how many microseconds ``count`` more requests are within the limit; 0: now.

        ``None``: never.
        """
        now = self.advance(now)
        if self.requests + count <= limit:
            return 0
        return self._wait(limit, count, self.requests, now, lambda entry: entry.requests)

    def wait_for_tokens(self, limit: int, count: int, now: int) -> int | None:
        """Return after how many microseconds ``count`` more tokens are within the limit; 0: now.

        ``None``: never.
        """
        now = self.advance(now)
        if self.tokens + count <= limit:
            return 0
        return self._wait(limit, count, self.tokens, now, lambda entry: entry.tokens)

    def _wait(
        self, limit: int, count: int, total: int, now: int, amount: Callable[[Entry], int]
    ) -> int | None:
        if count > limit:
            return None
        for entry in self._entries:
            total -= amount(entry)
            if total + count <= limit:
                return entry.time + self.window - now
        return 0

    def reset_of_requests(self, now: int) -> int:
        """Return after how many microseconds no request counts any more, if none is added."""
        return self._reset(now, lambda entry: entry.requests)

    def reset_of_tokens(self, now: int) -> int:
        """Return after how many microseconds no token counts any more, if none is added."""
        return self._reset(now, lambda entry: entry.tokens)

    def _reset(self, now: int, amount: Callable[[Entry], int]) -> int:
        now = self.advance(now)
        for entry in reversed(self._entries):
            if amount(entry):
                return entry.time + self.window - now
        return 0
