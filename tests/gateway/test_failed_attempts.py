"""Clients that send wrong keys are slowed down, in bounded memory; valid keys are not."""

from __future__ import annotations

import pytest
import trio
from http_node import open_http_node
from trio.testing import MockClock

from trio_cluster.errors import ApiError
from trio_cluster.gateway import failed_attempts
from trio_cluster.gateway.failed_attempts import FREE, MAX_ADDRESSES, MAX_DELAY, FailedAttempts


async def delay_of(attempts: FailedAttempts, client: str = "192.0.2.1:5000") -> float:
    began = trio.current_time()
    await attempts.refused(client)
    return round(trio.current_time() - began, 6)


async def test_a_few_wrong_keys_cost_nothing_and_more_wait_longer_each(autojump_clock: MockClock) -> None:
    attempts = FailedAttempts()
    assert [await delay_of(attempts, f"192.0.2.1:{port}") for port in range(FREE)] == [0.0] * FREE
    delays = [await delay_of(attempts) for _ in range(10)]
    assert 0.25 < delays[0] < 1
    assert delays == sorted(delays)
    assert delays[-1] == MAX_DELAY
    # Another address is another client.
    assert await delay_of(attempts, "192.0.2.2:5000") == 0.0
    await trio.sleep(120)
    assert await delay_of(attempts) == 0.0


async def test_ten_a_minute_never_wait(autojump_clock: MockClock) -> None:
    attempts = FailedAttempts()
    for _ in range(100):
        assert await delay_of(attempts) == 0.0
        await trio.sleep(6.01)


async def test_a_few_wait_at_once_and_others_are_refused(autojump_clock: MockClock) -> None:
    attempts = FailedAttempts()
    for _ in range(FREE):
        await attempts.refused("192.0.2.1:1")
    refused: list[ApiError] = []

    async def ask() -> None:
        try:
            await attempts.refused("192.0.2.1:1")
        except ApiError as error:
            refused.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(ask)
    assert len(refused) == 30 - 8
    assert {(error.status, error.code, error.retry_after) for error in refused} == {
        (429, "too_many_failures", MAX_DELAY)
    }
    await trio.sleep(600)
    assert await delay_of(attempts) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1:1", "192.0.2.1:2", True),
        ("192.0.2.1:1", "[::ffff:192.0.2.1]:2", True),
        ("[2001:db8::1]:1", "[2001:db8::ffff]:2", True),
        ("[2001:db8:0:1::1]:1", "[2001:db8:0:2::1]:1", False),
        ("[fe80::1%eth0]:1", "[fe80::2%eth0]:1", True),
        ("client:1", "client:2", True),
        ("", "", True),
    ],
)
async def test_what_counts_as_one_address(
    one: str, other: str, same: bool, autojump_clock: MockClock
) -> None:
    attempts = FailedAttempts()
    for _ in range(FREE):
        await attempts.refused(one)
    assert (await delay_of(attempts, other) > 0) is same


async def test_memory_is_bounded(autojump_clock: MockClock) -> None:
    attempts = FailedAttempts()
    for number in range(MAX_ADDRESSES + 100):
        await attempts.refused(f"10.0.{number >> 8}.{number & 255}:1")
    assert len(attempts) == MAX_ADDRESSES


async def test_a_valid_key_of_the_same_address_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failed_attempts, "_FIRST_DELAY", 60.0)
    monkeypatch.setattr(failed_attempts, "MAX_DELAY", 60.0)
    async with (
        open_http_node(api_key="right") as node,
        node.client() as client,
        trio.open_nursery() as nursery,
    ):

        async def ask(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return (await client.get("/v1/models", headers=headers)).status_code

        assert [await ask("wrong") for _ in range(FREE)] == [401] * FREE
        waiting = trio.Event()

        async def guess() -> None:
            waiting.set()
            await ask("wrong")

        nursery.start_soon(guess)
        await waiting.wait()
        with trio.fail_after(5):
            assert await ask("right") == 200
            # A request without a key is no guess.
            assert (await client.get("/v1/models")).status_code == 401
        nursery.cancel_scope.cancel()
