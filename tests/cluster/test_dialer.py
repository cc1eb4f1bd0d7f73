"""Which of its addresses a worker that was invited finds its master at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster.cluster import dialer
from trio_cluster.cluster.dialer import MemberDialer

ADDRESSES = [("a", 1), ("b", 2), ("c", 3)]


class Machines:
    """A network with three machines; they are up, down, or silent."""

    def __init__(self, **states: str) -> None:
        self.states = states
        self.asked: list[str] = []

    async def connect(self, host: str, port: int) -> Any:
        self.asked.append(host)
        match self.states[host]:
            case "silent":
                await trio.sleep_forever()
            case "down":
                raise ConnectionRefusedError(111, "Connection refused")
        return f"{host}:{port}"


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    found = Machines()
    monkeypatch.setattr(dialer, "TlsNetwork", lambda *_: found)
    monkeypatch.setattr(MemberDialer, "_make_context", lambda _: None)
    return found


def dialer_for(machines: Machines) -> MemberDialer:
    network: Any = machines
    membership: Any = None
    return MemberDialer(network, None, membership, Path(), ADDRESSES, None)


async def test_a_machine_that_does_not_answer_does_not_hide_the_others(
    machines: Machines, autojump_clock: MockClock
) -> None:
    machines.states = {"a": "silent", "b": "down", "c": "up"}
    member, began = dialer_for(machines), trio.current_time()
    assert await member.connect() == "c:1003"  # type: ignore[comparison-overlap]
    assert member.host == "c"
    assert trio.current_time() - began < 10
    # The one that was found stays the first.
    assert await member.connect() == "c:1003"  # type: ignore[comparison-overlap]
    assert machines.asked == ["a", "b", "c", "c"]
    machines.states = {"a": "up", "b": "up", "c": "down"}
    assert await member.connect() == "a:1001"  # type: ignore[comparison-overlap]


async def test_every_address_has_its_turn_although_the_caller_waits_for_one_only(
    machines: Machines, autojump_clock: MockClock
) -> None:
    machines.states = dict.fromkeys("abc", "silent")
    member = dialer_for(machines)
    for _ in range(4):
        with trio.move_on_after(5):
            await member.connect()
    assert machines.asked == ["a", "b", "c", "a"]


async def test_without_an_answer_the_first_reason_is_raised(
    machines: Machines, autojump_clock: MockClock
) -> None:
    machines.states = {"a": "silent", "b": "down", "c": "down"}
    with pytest.raises(TimeoutError):
        await dialer_for(machines).connect()
    machines.states["a"] = "down"
    with pytest.raises(ConnectionRefusedError):
        await dialer_for(machines).connect()
