"""The limits of a key hold once for all processes of a master."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ApiError
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.core.request import Request
from trio_cluster.group.limiter import GroupLimiter, LimitCounter
from trio_cluster.group.messages import AskState, Reserve, Reserved, Settle, decode, encode
from trio_cluster.limits.limiter import Refused
from trio_cluster.limits.memory import MemoryLimiter

KEY = Principal("k")


class Line:
    """The way from one process to the supervisor."""

    def __init__(self, counter: LimitCounter, process: int) -> None:
        self._counter = counter
        self._process = process
        self.silent = False

    async def reserve(self, message: Reserve | AskState) -> Reserved | None:
        sent = decode(encode(message))
        assert isinstance(sent, Reserve | AskState)
        answer = self._counter.receive(self._process, sent)
        assert answer is not None
        if self.silent:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        returned = decode(encode(answer))
        assert isinstance(returned, Reserved)
        return returned

    def settle(self, message: Settle) -> None:
        sent = decode(encode(message))
        assert isinstance(sent, Settle)
        assert self._counter.receive(self._process, sent) is None


class Group:
    def __init__(self) -> None:
        self.limiter = MemoryLimiter()
        self.counter = LimitCounter(self.limiter)
        self.lines = [Line(self.counter, process) for process in range(2)]
        self.members = [GroupLimiter(line) for line in self.lines]


def request() -> Request:
    return Request(endpoint="embeddings", kind="embedding", model="m", body=b'{"input":"a"}')


async def test_requests_of_all_processes_count_together(autojump_clock: MockClock) -> None:
    group, limits = Group(), Limits(requests_per_minute=3, max_concurrency=2)
    one, other = group.members
    first = await one.reserve(KEY, limits, request())
    second = await other.reserve(KEY, limits, request())
    assert second.state.requests is not None
    assert second.state.requests.remaining == 1
    for member in group.members:
        with pytest.raises(Refused) as refused:
            await member.reserve(KEY, limits, request())
        assert refused.value.error.status == 429
        assert "at the same time" in refused.value.error.message
    assert (one.open_reservations, group.limiter.open_reservations) == (1, 2)
    # For neither was a call opened, so they do not count as requests.
    first.end_request()
    second.end_request()
    assert (one.open_reservations, one.open_tokens, group.limiter.open_reservations) == (0, 0, 0)
    state = await other.state(KEY, limits)
    assert state.requests is not None
    assert state.requests.remaining == 3


async def test_what_a_process_has_reserved_that_ends_counts_as_used(autojump_clock: MockClock) -> None:
    group, limits = Group(), Limits(requests_per_minute=3, max_concurrency=1)
    await group.members[0].reserve(KEY, limits, request())
    group.counter.lost(1)
    assert group.limiter.open_reservations == 1
    group.counter.lost(0)
    assert group.limiter.open_reservations == 0
    state = await group.members[1].state(KEY, limits)
    assert state.requests is not None
    assert state.requests.remaining == 2


async def test_a_request_that_is_cancelled_or_not_answered_leaves_nothing_reserved(
    autojump_clock: MockClock,
) -> None:
    group, limits = Group(), Limits(requests_per_minute=3)
    group.lines[0].silent = True
    with trio.move_on_after(0.5) as scope:
        await group.members[0].reserve(KEY, limits, request())
    assert scope.cancelled_caught
    began = trio.current_time()
    with pytest.raises(ApiError) as failed:
        await group.members[0].reserve(KEY, limits, request())
    assert (failed.value.status, failed.value.code) == (503, "limits_unavailable")
    assert trio.current_time() - began == 1
    assert group.limiter.open_reservations == group.members[0].open_reservations == 0
    state = await group.members[1].state(KEY, limits)
    assert state.requests is not None
    assert state.requests.remaining == 3
