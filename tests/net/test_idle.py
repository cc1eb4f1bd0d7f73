"""Which connections have been idle for too long."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from trio_cluster.net.idle import IdleTimeout


class One:
    def __init__(self) -> None:
        self.expired: list[float] = []

    def expire(self) -> None:
        self.expired.append(trio.current_time())


@pytest.fixture
async def limit(nursery: trio.Nursery) -> IdleTimeout:
    limit = IdleTimeout(10)
    nursery.start_soon(limit.run)
    return limit


async def test_each_is_told_once_at_its_own_time(limit: IdleTimeout, autojump_clock: MockClock) -> None:
    start = trio.current_time()
    ones = [One() for _ in range(3)]
    for one in ones:
        limit.begin(one)
        await trio.sleep(4)
    await trio.sleep(100)
    assert [one.expired for one in ones] == [[pytest.approx(start + since + 10)] for since in (0, 4, 8)]


async def test_who_is_not_idle_any_more_is_not_told(limit: IdleTimeout, autojump_clock: MockClock) -> None:
    busy, idle = One(), One()
    limit.begin(busy)
    limit.begin(idle)
    await trio.sleep(9.9)
    limit.end(busy)
    limit.end(busy)
    await trio.sleep(100)
    assert (busy.expired, len(idle.expired)) == ([], 1)


async def test_time_counts_from_the_last_beginning(limit: IdleTimeout, autojump_clock: MockClock) -> None:
    start = trio.current_time()
    one, other = One(), One()
    limit.begin(one)
    await trio.sleep(6)
    limit.begin(other)
    limit.end(one)
    await trio.sleep(1)
    limit.begin(one)
    await trio.sleep(100)
    assert other.expired == [pytest.approx(start + 16)]
    assert one.expired == [pytest.approx(start + 17)]


async def test_a_timeout_begins_again_after_none_was_running(
    limit: IdleTimeout, autojump_clock: MockClock
) -> None:
    one = One()
    limit.begin(one)
    await trio.sleep(50)
    start = trio.current_time()
    limit.begin(one)
    await trio.sleep(50)
    assert one.expired[1:] == [pytest.approx(start + 10)]


async def test_one_that_cannot_be_told_keeps_no_other_from_it(
    limit: IdleTimeout, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(One):
        def expire(self) -> None:
            raise ZeroDivisionError

    failing, other = Failing(), One()
    limit.begin(failing)
    limit.begin(other)
    await trio.sleep(100)
    assert len(other.expired) == 1
    assert "ZeroDivisionError" in caplog.text
