"""The usage journal: a row for each request that was handed to a model.

Theory of operation
===================

*Rows.* The journal is an observer of the node's calls. When the work of a call has stopped, a row of it is made. A
request that was retried is one row, with the worker that answered in the end. Whether a failed call will be retried is
not known when it ends, so its row is kept aside until the retry begins, or until two batches were taken meanwhile: the
task that would retry the call has run by then.

*Batches.* Rows are collected in memory. Every :data:`PAUSE` seconds they are written in one transaction, in a thread.
So a node that is killed loses what was collected since. The path of a request has nothing to do with the database.

*Failures.* What cannot be written is kept, up to :data:`MAX_ROWS`; beyond that the oldest rows are dropped and counted.
The log says once that rows are kept, once that they are dropped, and once that it is over. A connection that breaks in
the middle of a commit leaves it open whether the batch was written. So the same batch is tried again under the same
number, and the database knows the number of the last batch of each writer (``Store.add_usage``): no row is lost, and
none is counted twice.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Final

from ..core import clock, randomness
from ..core.answer import Done, Failed
from ..core.call import Call
from ..core.observer import Observer
from ..core.outcome import Outcome
from .errors import StoreError
from .usage_row import UsageRow

__all__ = ["MAX_ROWS", "PAUSE", "Journal"]

logger = logging.getLogger("trio_cluster.accounts")

#: Seconds between two batches; less than a second, since writing one takes time, too.
PAUSE: Final = 0.8

#: Rows that are kept while they cannot be written, beside a batch; about 500 bytes each.
MAX_ROWS: Final = 50_000

#: Tokens of a request, at most. What is more is a mistake, or a lie, and counts as this many: otherwise the sum of some
#: such requests would be more than a database can count, and nothing could be written any more.
_MOST_TOKENS: Final = 2**31 - 1

#: Rows of a batch, at most: the lock of the database is held for a few hundredths of a second.
_BATCH: Final = 5000


class Journal(Observer):
    """Collects the rows, and writes them.

    Args:
        write: ``await write(writer, number, rows)`` stores a batch; see ``Store.add_usage``.

    Attributes:
        dropped: how many rows were dropped since they could not be written.
    """

    def __init__(self, write: Callable[[str, int, list[UsageRow]], Awaitable[None]]) -> None:
        self.dropped = 0
        self._write = write
        self._writer = randomness.token(16)
        self._number = 0
        self._rows: deque[UsageRow] = deque()
        # The batch that is being written, or is to be written again.
        self._batch: list[UsageRow] = []
        # The rows of calls that have failed and may be retried, and whether a batch was taken since.
        self._undecided: dict[Call, tuple[UsageRow, bool]] = {}
        # Calls that were retried, and whose work has not stopped yet.
        self._replaced: set[Call] = set()
        # When requests were first handed to a model, by core/clock.py, for calls that are retries.
        self._opened: dict[Call, float] = {}
        self._failing = False
        self._dropped_before = 0

    # Collecting

    def on_retried(self, lost: Call, again: Call) -> None:
        """See ``Observer``."""
        if lost.released:
            self._undecided.pop(lost, None)
        else:
            self._replaced.add(lost)
        if not again.released:
            self._opened[again] = lost.opened_at

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        """See ``Observer``."""
        now = clock.now()
        opened = self._opened.pop(call, call.opened_at) if self._opened else call.opened_at
        if call.superseded:
            # The other attempt at the same request has a row.
            self._replaced.discard(call)
            return
        request, end = call.request, call.end
        usage = end.usage if type(end) is Done else None
        if usage is None:
            prompt = completion = cached = None
        else:
            prompt, completion, cached = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
            if prompt > _MOST_TOKENS or completion > _MOST_TOKENS or cached > _MOST_TOKENS:
                prompt, completion, cached = (
                    min(each, _MOST_TOKENS) for each in (prompt, completion, cached)
                )
        row = (
            time.time() - (now - opened),
            request.principal.name,
            request.model,
            request.alias,
            call.served_by,
            request.endpoint,
            prompt,
            completion,
            cached,
            outcome,
            call.begun_at - opened if call.begun else None,
            now - opened,
            request.request_id,
        )
        if outcome != "completed" and type(end) is Failed and end.movable:
            if call in self._replaced:
                self._replaced.discard(call)
                return
            if not call.begun:
                self._undecided[call] = row, False
                return
        self._rows.append(row)
        if len(self._rows) > MAX_ROWS:
            self._drop()

    def _drop(self) -> None:
        """Drop the oldest row, but not of the batch that is being written: it may be there already."""
        self._rows.popleft()
        if self.dropped == self._dropped_before:
            logger.error(
                "the usage of requests is lost from now on, the oldest first: %d wait for the database",
                MAX_ROWS,
            )
        self.dropped += 1

    # Writing

    @property
    def waiting(self) -> int:
        """How many rows are not written yet."""
        return len(self._rows) + len(self._batch)

    async def flush(self) -> None:
        """Write all rows that were collected until now. To be called by one task at a time.

        A batch whose writing is cancelled is written again by the next call.

        Raises:
            StoreError: a batch cannot be written; it is kept.
        """
        left = len(self._rows)
        while self._batch or left > 0:
            if not self._batch:
                self._batch = list(islice(self._rows, min(left, _BATCH)))
                for _ in self._batch:
                    self._rows.popleft()
                self._number += 1
                left -= len(self._batch)
            try:
                await self._write(self._writer, self._number, self._batch)
            except StoreError as error:
                if not self._failing:
                    self._failing = True
                    logger.error("the usage of requests cannot be written, and is kept in memory: %s", error)
                raise
            self._batch = []
        if self._failing:
            fields = {"lost": self.dropped - self._dropped_before}
            logger.warning("the usage of requests is written again", extra={"fields": fields})
            self._failing, self._dropped_before = False, self.dropped

    def take_decided(self) -> None:
        """Take the rows of failed calls that were not retried. To be called before each batch. Synchronous."""
        for call, (row, seen) in list(self._undecided.items()):
            if seen:
                del self._undecided[call]
                self._rows.append(row)
            else:
                self._undecided[call] = row, True

    def take_undecided(self) -> None:
        """Take the rows of all failed calls: no call is retried any more. Synchronous."""
        self._rows.extend(row for row, _ in self._undecided.values())
        self._undecided.clear()
