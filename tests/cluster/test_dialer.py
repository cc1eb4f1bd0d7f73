"""Which of its addresses a worker that was invited finds its master at."""

from __future__ import annotations

import datetime
import logging
import os
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from trio_cluster.cluster import dialer
from trio_cluster.cluster.dialer import MemberDialer, NeighbourDialer
from trio_cluster.core.state_dir import StateDir
from trio_cluster.security.authority import Authority
from trio_cluster.security.membership import neighbour, renewed_neighbour

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
    monkeypatch.setattr(MemberDialer, "_make_context", lambda *_: None)
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


async def test_a_renewed_certificate_that_cannot_be_read_does_not_end_the_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDir(tmp_path / "master")
    membership, path = neighbour(state, datetime.datetime.now(datetime.UTC))
    network: Any = None
    member = MemberDialer(network, state, membership, path, ADDRESSES, None)
    path.write_text("rubbish")
    renewed = attrs.evolve(membership, name="renewed")
    monkeypatch.setattr("trio_cluster.security.joining.renew_if_due", lambda *_: renewed)
    with trio.move_on_after(0.2):
        await member.run()
    assert "the certificate of this worker could not be checked" in caplog.text


@pytest.mark.parametrize(("age", "rotated"), [(0, True), (61, False)])
async def test_a_process_beside_the_master_makes_itself_a_new_certificate_in_time(
    age: int, rotated: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A month before the end of the certificate, and when the authority was replaced."""
    state, now = StateDir(tmp_path), datetime.datetime.now(datetime.UTC)
    membership, path = neighbour(state, now - datetime.timedelta(days=age))
    network: Any = None
    member = NeighbourDialer(network, state, membership, path, ADDRESSES[0], 1)
    path.unlink()
    if rotated:
        assert renewed_neighbour(state, now, membership) is None
        Authority(state, now).rotate(now)
    caplog.set_level(logging.INFO)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(member.run)
        with trio.fail_after(10):
            while not caplog.messages:  # noqa: ASYNC110  (what a thread does has no event)
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert caplog.messages == ["the certificate of this worker was renewed"]
    pem, authority = member.trust.certificate, Authority(state, now)
    name, serial, _ = authority.key_of_worker(pem[pem.index("-----BEGIN CERTIFICATE") :], now)
    # The master knows a worker by its name.
    assert name == membership.name
    made_at = now - datetime.timedelta(days=age)
    assert serial != authority.key_of_worker(membership.certificate, made_at)[1]
    assert member.trust.authority == authority.trusted
    assert not [file for file in os.listdir(tmp_path) if file.startswith(".")]
