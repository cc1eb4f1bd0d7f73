"""Counting in memory, and what is known after a restart, however the process ended."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import trio

from trio_cluster.core.principal import Limits, Principal
from trio_cluster.core.state_dir import StateDir, StateDirError
from trio_cluster.limits import ledger as ledger_module
from trio_cluster.limits.account import Demand
from trio_cluster.limits.limiter import Refused
from trio_cluster.limits.memory import MemoryLimiter
from trio_cluster.limits.reservation import Reservation

LIMITS = Limits(requests_per_minute=5, tokens_per_minute=1000)


class Clock:
    """A steady clock, and the time of the calendar."""

    def __init__(self, steady: float = 100.0, wall: float = 1_800_000_000.0) -> None:
        self.steady = steady
        self.wall = wall

    def pass_by(self, seconds: float) -> None:
        self.steady += seconds
        self.wall += seconds


def limiter(path: Path | None, clock: Clock, window: float = 60.0) -> MemoryLimiter:
    return MemoryLimiter(
        window,
        None if path is None else StateDir(path),
        clock=lambda: clock.steady,
        wall_clock=lambda: clock.wall,
    )


def ask(
    counts: MemoryLimiter, tokens: int = 10, limits: Limits = LIMITS, key: str = "k"
) -> Reservation | None:
    try:
        return counts.reserve_nowait(key, limits, Demand(tokens, tokens, tokens))
    except Refused:
        return None


def left(counts: MemoryLimiter, tokens: int = 1, limits: Limits = LIMITS) -> int:
    """Return how many more requests are admitted."""
    count = 0
    while ask(counts, tokens, limits) is not None:
        count += 1
    return count


def after_restart(path: Path, clock: Clock, tmp_path: Path, window: float = 60.0) -> MemoryLimiter:
    """Return what a process counts that starts with a copy of the files as they are now."""
    copy = tmp_path / f"copy-{random.getrandbits(40)}"
    shutil.copytree(path, copy)
    copy.chmod(0o700)
    return limiter(copy, Clock(steady=7.0, wall=clock.wall), window)


async def test_what_was_used_is_known_after_a_proper_end(tmp_path: Path) -> None:
    clock = Clock()
    counts = limiter(tmp_path / "state", clock)
    async with counts.opened():
        assert ask(counts) is not None
        assert ask(counts) is not None
    clock.pass_by(2)
    again = limiter(tmp_path / "state", Clock(steady=3.0, wall=clock.wall))
    assert left(again) == 3
    assert len(list((tmp_path / "state").glob("limits.*.log"))) == 1


def test_what_was_used_is_known_after_kill_9(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "state"
    counts = limiter(path, clock)
    reservations = []
    for number in range(4):
        reservation = ask(counts, 200)
        assert reservation is not None
        reservations.append(reservation)
        assert left(after_restart(path, clock, tmp_path)) == 5 - number - 1
    # What is settled is known, too, and what is not counts as reserved.
    for reservation in reservations[:2]:
        reservation.end_request()
    again = after_restart(path, clock, tmp_path)
    assert left(again) == 3
    again = after_restart(path, clock, tmp_path)
    assert ask(again, 601) is None
    assert ask(again, 600) is not None
    # Slots belong to work that has ended with its process.
    assert again.open_reservations == 1


def test_a_minute_is_over_when_it_is_over_also_without_a_process(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "state"
    counts = limiter(path, clock)
    assert left(counts) == 5
    clock.pass_by(59.9)
    assert left(after_restart(path, clock, tmp_path)) == 0
    clock.pass_by(0.1)
    assert left(after_restart(path, clock, tmp_path)) == 5


def test_a_clock_that_was_set_back_frees_nothing_early(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "state"
    counts = limiter(path, clock)
    assert left(counts) == 5
    clock.wall -= 3600
    restarted = Clock(steady=1.0, wall=clock.wall)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    again = limiter(copy, restarted)
    restarted.pass_by(59)
    assert left(again) == 0
    restarted.pass_by(1)
    assert left(again) == 5


def test_a_budget_is_known_after_a_restart(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "state"
    limits = Limits(budget_tokens=100, budget_per="month")
    counts = limiter(path, clock)
    assert ask(counts, 60, limits) is not None
    done = ask(counts, 30, limits)
    assert done is not None
    done.end_request()
    clock.pass_by(86_400)
    again = after_restart(path, clock, tmp_path)
    assert ask(again, 41, limits) is None
    assert ask(again, 40, limits) is not None


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "state"
    counts = limiter(path, clock)
    assert ask(counts) is not None
    log = next(path.glob("limits.*.log"))
    log.write_bytes(log.read_bytes() + b'["\xff",1,1,1]\n["k",18000000')
    assert left(after_restart(path, clock, tmp_path)) == 4


def test_a_log_that_cannot_be_begun_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = StateDir(tmp_path / "state")
    monkeypatch.setattr(ledger_module.os, "open", full)
    with pytest.raises(StateDirError, match=r"limits\.0\.log: No space left"):
        MemoryLimiter(60.0, state, clock=lambda: 0.0)


@pytest.mark.parametrize("content", [b"{", b'{"version": "\xff"}'])
def test_a_snapshot_that_is_none_is_logged_and_the_log_still_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "state"
    StateDir(path).write("limits.json", content)
    clock = Clock()
    with caplog.at_level(logging.WARNING):
        assert left(limiter(path, clock)) == 5
    assert "what keys have used is lost" in caplog.text


def test_whatever_step_a_process_is_killed_at_nothing_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are looked at before and after everything that is done to them."""
    monkeypatch.setattr(ledger_module, "_LOG_LIMIT", 250)
    clock, path, rng = Clock(), tmp_path / "state", random.Random(1)
    limits = Limits(requests_per_minute=1000, tokens_per_minute=1_000_000)
    counts = limiter(path, clock, window=1000.0)
    used = {"requests": 0, "tokens": 0}
    checked = 0
    real = {name: getattr(os, name) for name in ("open", "fsync")}
    busy = False

    def check() -> None:
        nonlocal checked, busy
        if busy:
            return
        busy = True
        again = after_restart(path, clock, tmp_path, window=1000.0)
        state = trio.run(again.state, Principal("k"), limits)
        assert state.requests is not None
        assert state.tokens is not None
        assert 1000 - state.requests.remaining == used["requests"]
        assert 1_000_000 - state.tokens.remaining == used["tokens"]
        checked += 1
        busy = False

    def around(name: str) -> None:
        def step(*args: Any, **more: Any) -> Any:
            check()
            return real[name](*args, **more)

        monkeypatch.setattr(os, name, step)

    for name in real:
        around(name)
    waiting: list[tuple[Reservation, int]] = []
    for _ in range(120):
        clock.pass_by(0.01)
        if waiting and rng.random() < 0.4:
            reservation, tokens = waiting.pop(0)
            reservation.end_request()
            used["tokens"] -= tokens
            used["requests"] -= 1
        else:
            tokens = rng.randrange(1, 500)
            got = ask(counts, tokens, limits)
            assert got is not None
            waiting.append((got, tokens))
            used["tokens"] += tokens
            used["requests"] += 1
        ledger = counts._ledger
        assert ledger is not None
        if ledger.wants_snapshot:
            ledger.save(counts._accounts)
        check()
    assert checked > 140


async def test_a_log_that_grows_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_LOG_LIMIT", 1000)
    limits, path = Limits(tokens_per_minute=10**9), tmp_path / "state"
    counts = MemoryLimiter(state_dir=StateDir(path))
    async with counts.opened():
        for _ in range(3):
            for _ in range(60):
                assert ask(counts, 1, limits) is not None
            await trio.sleep(1.1)
        logs = list(path.glob("limits.*.log"))
        assert len(logs) == 1
        assert logs[0].stat().st_size < 6000
    state = await MemoryLimiter(state_dir=StateDir(path)).state(Principal("k"), limits)
    assert state.tokens is not None
    assert state.tokens.limit - state.tokens.remaining == 180


async def test_a_full_disk_is_logged_once_and_requests_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    counts = limiter(tmp_path / "state", clock)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert left(counts) == 5
    assert caplog.text.count("will not survive a restart") == 1


async def test_accounts_that_are_empty_are_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    counts = MemoryLimiter()
    async with counts.opened():
        for number in range(1500):
            one = ask(counts, key=f"key-{number}")
            assert one is not None
            one.end_request()
        await trio.sleep(70)
        for number in range(2500):
            ask(counts, key=f"other-{number}")
        await trio.sleep(5)
        assert len(counts._accounts) == 2500
    assert (counts.open_reservations, counts.open_tokens) == (2500, 25_000)
