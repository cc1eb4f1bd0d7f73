"""Two processes have a state directory one after the other, and keys have used something meanwhile."""

from __future__ import annotations

from pathlib import Path

from trio_cluster.core.principal import Limits
from trio_cluster.core.state_dir import StateDir
from trio_cluster.limits.account import Demand
from trio_cluster.limits.memory import MemoryLimiter

LIMITS = Limits(requests_per_minute=10, tokens_per_minute=1000)
TOKENS = 100


def use(counts: MemoryLimiter, times: int = 1) -> None:
    for _ in range(times):
        counts.reserve_nowait("k", LIMITS, Demand(TOKENS, TOKENS, TOKENS))


def used(counts: MemoryLimiter) -> int:
    """Return how many tokens count now."""
    account = counts._accounts.get("k")
    return 0 if account is None else sum(entry.tokens for entry in account.log)


async def test_what_is_used_after_the_directory_was_left_reaches_the_other_process_once(
    tmp_path: Path,
) -> None:
    old, new, lines = MemoryLimiter(state_dir=StateDir(tmp_path)), MemoryLimiter(), list[bytes]()
    use(old, 2)
    await old.release(lines.append)
    new.load(StateDir(tmp_path))
    assert used(new) == 2 * TOKENS
    use(old, 3)
    use(new)
    for line in lines:
        new.apply(line)
    assert used(new) == 6 * TOKENS
    async with old.opened():
        # At its end, it writes nothing.
        pass
    # And the other one has kept it.
    assert used(MemoryLimiter(state_dir=StateDir(tmp_path))) == 6 * TOKENS


async def test_an_account_that_is_new_is_made(tmp_path: Path) -> None:
    old, new, lines = MemoryLimiter(state_dir=StateDir(tmp_path)), MemoryLimiter(), list[bytes]()
    await old.release(lines.append)
    new.load(StateDir(tmp_path))
    use(old)
    new.apply(lines[0])
    assert used(new) == TOKENS
    new.apply(b"garbage")
    assert used(new) == TOKENS


async def test_a_directory_that_is_taken_back_has_what_its_owner_knows(tmp_path: Path) -> None:
    old, new, lines = MemoryLimiter(state_dir=StateDir(tmp_path)), MemoryLimiter(), list[bytes]()
    use(old)
    await old.release(lines.append)
    new.load(StateDir(tmp_path))
    use(old)
    for line in lines:
        new.apply(line)
    new.unload()
    old.retake()
    use(old)
    assert len(lines) == 1
    assert used(MemoryLimiter(state_dir=StateDir(tmp_path))) == 3 * TOKENS
    # Nothing is written any more by the one that has let it go.
    use(new)
    async with new.opened():
        pass
    assert used(MemoryLimiter(state_dir=StateDir(tmp_path))) == 3 * TOKENS
