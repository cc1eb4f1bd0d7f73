"""The ledger: what keeps the counters of a process over a restart, also over ``kill -9``.

There is a snapshot of all accounts, and a log of what has changed since: one line for each admission and each
settlement, written when it happens and before the request goes on. A line is in the hands of the system as soon as
it is written, so it outlives the process, however that ends; it is not forced onto the disk, so what was written in the
last seconds before the *machine* fails may be lost. A line costs a few microseconds.

When the log has grown, and at the end, a snapshot is written (whole or not at all, see ``core/state_dir.py``), and a
new log is begun. Snapshot and logs have numbers: a snapshot contains everything that is in the logs before its own
number, so that one that could not be written is made up for by the logs.

A line is a *change*: so many requests and tokens more or less, for the admission of a key at a time. A process that was
killed has settled nothing of what it was doing; those tokens count as reserved, and slots are free: its work has ended
with it. Times are microseconds since the epoch. An entry that seems to come from the future, because the clock was set
back, counts from now on.

What cannot be written is logged once, and counting goes on in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import attrs
import msgspec
import trio

from ..core.state_dir import StateDir, StateDirError
from ..core.threads import NoThread, run_in_thread
from .account import Account
from .window import Entry

__all__ = ["Ledger"]

logger = logging.getLogger("trio_cluster.limits")

_SNAPSHOT: Final = "limits.json"
_VERSION: Final = 1

#: Bytes of a log after which a snapshot is written.
_LOG_LIMIT: Final = 256 * 1024


class _Change(msgspec.Struct, array_like=True):
    """A line of the log."""

    key: str
    time: int
    requests: int
    tokens: int
    period: str = ""
    """The calendar period in which the tokens count, too; empty: none."""


class _SavedAccount(msgspec.Struct):
    entries: list[tuple[int, int, int]]
    """Time, requests and tokens of each."""
    period: str = ""
    period_tokens: int = 0


class _Snapshot(msgspec.Struct):
    version: int
    number: int
    accounts: dict[str, _SavedAccount]


@attrs.define
class _Restored:
    account: Account
    entries: dict[int, Entry] = attrs.field(factory=dict)
    """By the time at which they were admitted."""


class Ledger:
    """See the top of this module.

    Args:
        state_dir: where the files are.
        offset: what is to be added to a time of the accounts to get microseconds since the epoch.
    """

    def __init__(self, state_dir: StateDir, offset: int) -> None:
        self._state_dir = state_dir
        self._offset = offset
        self._number = 0
        self._oldest = 0
        self._handle: int | None = None
        self._written = 0
        self._failed = False
        # Where changes go while another process has the state directory.
        self._forward: Callable[[bytes], None] | None = None
        self._saving = trio.Lock()
        # The accounts with the entries that a change from another process may refer to.
        self._known: dict[str, _Restored] = {}
        self._encoder = msgspec.json.Encoder()

    def restore(self, window: int, now: int) -> dict[str, Account]:
        """Return the accounts as they were, and begin a new log. Blocks.

        Args:
            window: the length of the sliding window, in microseconds.
            now: the time of the accounts' clock.

        Raises:
            StateDirError: the files cannot be read or written.
        """
        restored: dict[str, _Restored] = {}
        content = self._state_dir.read(_SNAPSHOT)
        if content is not None:
            try:
                snapshot = msgspec.json.decode(content, type=_Snapshot)
            except (msgspec.MsgspecError, ValueError) as error:
                # ValueError: text that is not UTF-8.
                logger.warning("what keys have used is lost: %s: %s", _SNAPSHOT, error)
            else:
                self._number = snapshot.number
                for key, saved in snapshot.accounts.items():
                    one = restored[key] = _Restored(Account(window))
                    one.account.period, one.account.period_tokens = saved.period, saved.period_tokens
                    for time, requests, tokens in saved.entries:
                        self._add(one, time, requests, tokens, now)
        self._oldest = self._number
        while (log := self._state_dir.read(_log_name(self._number))) is not None:
            for line in log.split(b"\n"):
                # The last line may be cut: its request was not admitted yet.
                with suppress(msgspec.MsgspecError, ValueError):
                    change = msgspec.json.decode(line, type=_Change)
                    self._apply(restored, change, window, now)
            self._number += 1
        accounts = {key: one.account for key, one in restored.items()}
        self._known = restored
        try:
            self._begin_log(self._number)
        except OSError as error:
            raise StateDirError(
                f"state_dir {self._state_dir.path}: {_log_name(self._number)}: {error.strerror}"
            ) from error
        self.save(accounts)
        return accounts

    def _apply(self, restored: dict[str, _Restored], change: _Change, window: int, now: int) -> None:
        one = restored.get(change.key)
        if one is None:
            one = restored[change.key] = _Restored(Account(window))
        account = one.account
        if change.period:
            if change.period == account.period:
                account.period_tokens = max(0, account.period_tokens + change.tokens)
            elif change.tokens > 0:
                account.period, account.period_tokens = change.period, change.tokens
        entry = one.entries.get(change.time)
        if entry is not None:
            account.log.change(
                entry, max(change.requests, -entry.requests), max(change.tokens, -entry.tokens)
            )
        elif change.requests > 0 or change.tokens > 0:
            self._add(one, change.time, max(0, change.requests), max(0, change.tokens), now)

    def _add(self, one: _Restored, time: int, requests: int, tokens: int, now: int) -> None:
        at = min(time - self._offset, now)
        if at + one.account.log.window > now:
            one.entries[time] = one.account.log.add(at, requests, tokens)

    async def release(self, accounts: dict[str, Account], forward: Callable[[bytes], None]) -> None:
        """Write a snapshot, and then nothing more: another process has the directory. A checkpoint; never raises.

        Args:
            accounts: as they are.
            forward: is given the changes from then on, each a line without its break.
        """
        async with self._saving:
            self.save(accounts)
            self.close()
            self._forward = forward

    def retake(self, accounts: dict[str, Account]) -> None:
        """Have the directory again, in which another process may have written. Blocks; never raises."""
        if self._forward is None:
            return
        self._forward = None
        # What the other one has written is to be ignored and removed: it knew less.
        found = [self._number]
        for path in self._state_dir.path.glob(_log_name("*")):
            with suppress(ValueError):
                found.append(int(path.name.split(".")[1]))
        self._oldest, self._number = min(found), max(found)
        self.save(accounts)

    def apply(self, accounts: dict[str, Account], line: bytes, window: int, now: int) -> None:
        """Take a change that another process has forwarded, and note it here. Synchronous; never raises."""
        try:
            change = msgspec.json.decode(line, type=_Change)
        except (msgspec.MsgspecError, ValueError) as error:
            logger.warning("what a key has used at the process before is lost: %s", error)
            return
        known, account = self._known.get(change.key), accounts.get(change.key)
        if known is not None and account is not None and known.account is not account:
            # The account was empty, was forgotten, and has begun anew.
            self._known[change.key] = _Restored(account)
        elif known is None and account is not None:
            self._known[change.key] = _Restored(account)
        self._apply(self._known, change, window, now)
        accounts[change.key] = self._known[change.key].account
        self._append(line + b"\n")

    def note(self, key: str, time: int, requests: int, tokens: int, period: str) -> None:
        """Write a change. Synchronous; the system takes it without waiting for the disk."""
        if self._handle is None and self._forward is None:
            return
        line = self._encoder.encode(_Change(key, time + self._offset, requests, tokens, period))
        if self._forward is not None:
            self._forward(line)
        else:
            self._append(line + b"\n")

    def _append(self, line: bytes) -> None:
        if self._handle is None:
            return
        try:
            os.write(self._handle, line)
        except OSError as error:
            self._fail(error.strerror or str(error))
        else:
            self._written += len(line)

    @property
    def wants_snapshot(self) -> bool:
        """Whether it is time to save the accounts."""
        return self._forward is None and (self._written > _LOG_LIMIT or self._handle is None)

    def save(self, accounts: dict[str, Account]) -> None:
        """Write a snapshot, unless another process has the directory. Blocks; never raises."""
        if self._forward is not None:
            return
        try:
            self._begin_log(self._number + 1)
            self._write(self._encode(accounts, self._number))
        except (OSError, StateDirError) as error:
            self._fail(str(error))

    async def save_in_thread(self, accounts: dict[str, Account]) -> None:
        """Write a snapshot while requests go on, unless another process has the directory; never raises."""
        async with self._saving:
            if self._forward is not None:
                return
            try:
                # What changes from here on is in the new log.
                self._begin_log(self._number + 1)
                content = self._encode(accounts, self._number)
                try:
                    await run_in_thread(self._write, content)
                except NoThread:
                    self._write(content)
            except (OSError, StateDirError) as error:
                self._fail(str(error))

    def close(self) -> None:
        """Write nothing more."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _begin_log(self, number: int) -> None:
        path = self._state_dir.path / _log_name(number)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        self.close()
        self._handle, self._number, self._written = handle, number, 0

    def _encode(self, accounts: dict[str, Account], number: int) -> bytes:
        offset = self._offset
        saved = {
            key: _SavedAccount(
                [(entry.time + offset, entry.requests, entry.tokens) for entry in account.log],
                account.period,
                account.period_tokens,
            )
            for key, account in accounts.items()
        }
        return self._encoder.encode(_Snapshot(_VERSION, number, saved))

    def _write(self, content: bytes) -> None:
        number = self._number
        self._state_dir.write(_SNAPSHOT, content)
        while self._oldest < number:
            with suppress(FileNotFoundError):
                (self._state_dir.path / _log_name(self._oldest)).unlink()
            self._oldest += 1
        self._failed = False

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("what keys have used of their limits will not survive a restart: %s", why)


def _log_name(number: int | str) -> str:
    return f"limits.{number}.log"
