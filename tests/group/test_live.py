"""What the processes of a group show live together: whole, up to date, and whatever one of them does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster.group import live
from trio_cluster.group.live import LiveGroup
from trio_cluster.group.messages import Ask, Look, Process, decode, encode
from trio_cluster.group.status import merge_models, merge_workers

EMPTY: dict[str, dict[str, bytes]] = {"requests": {}, "workers": {}, "models": {}}


class Fake:
    """One process: what it has to show, and how it does."""

    def __init__(self, group: Group, number: int) -> None:
        self.process, self.processes = number, len(group.pids)
        self.requests: dict[str, bytes] = {}
        self.looks: list[Look] = []
        self._group = group
        self.live = LiveGroup(self)
        self.live.own = lambda: {**EMPTY, "requests": dict(self.requests)}

    async def ask_one(self, process: int, what: Look) -> Process | None:
        await trio.sleep(0.01)
        group = self._group
        pid = group.pids[process]
        if not pid:
            return Process(process, 0, False, 0)
        other = group.members[process]
        # As it crosses the sockets.
        ask = decode(encode(Ask(1, what, to=process)))
        assert isinstance(ask, Ask)
        assert isinstance(ask.what, Look)
        if process in group.frozen:
            await trio.sleep(3)
            return Process(process, pid, True, 0)
        other.looks.append(ask.what)
        response = other.live.answer(ask.what)
        if group.loses is not None and group.loses(process):
            return Process(process, pid, True, 0)
        return Process(process, pid, True, 0, response)

    def tell_one(self, process: int, what: Look) -> None:
        self._group.members[process].looks.append(what)
        self._group.members[process].live.answer(what)

    @property
    def shown(self) -> dict[str, int]:
        merged = self.live.merged(self.live.own())["requests"]
        return {key: json.loads(item)["n"] for key, item in merged.items()}

    def set(self, **numbers: int) -> None:
        self.requests |= {
            key: json.dumps({"id": key, "n": number}).encode() for key, number in numbers.items()
        }


class Group:
    def __init__(self, count: int) -> None:
        self.pids = [100 + number for number in range(count)]
        self.frozen: set[int] = set()
        self.loses: Callable[[int], bool] | None = None
        self.members = [Fake(self, number) for number in range(count)]

    def restart(self, number: int, pid: int) -> None:
        self.pids[number] = pid
        self.members[number] = Fake(self, number)


@asynccontextmanager
async def running(group: Group) -> AsyncIterator[Fake]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(group.members[0].live.run)
        yield group.members[0]
        nursery.cancel_scope.cancel()


async def test_a_process_shows_what_all_of_them_have(autojump_clock: MockClock) -> None:
    group = Group(3)
    async with running(group) as first:
        for number, member in enumerate(group.members):
            member.set(**{f"r{number}": 1})
        with first.live.watching():
            await first.live.wait_known()
            assert first.shown == {"r0": 1, "r1": 1, "r2": 1}
            group.members[1].set(r1=2, new=5)
            del group.members[2].requests["r2"]
            await trio.sleep(0.5)
            assert first.shown == {"r0": 1, "r1": 2, "new": 5}


async def test_nothing_is_asked_without_subscribers(autojump_clock: MockClock) -> None:
    group = Group(2)
    other = group.members[1]
    async with running(group) as first:
        await trio.sleep(10)
        assert other.looks == []
        with first.live.watching(), first.live.watching():
            await trio.sleep(10)
        assert 30 < len(other.looks) <= 41
        await trio.sleep(1)
        assert other.looks[-1].over
        count = len(other.looks)
        await trio.sleep(60)
        assert len(other.looks) == count
        # A subscriber that comes later has what is there by then.
        other.set(late=1)
        with first.live.watching():
            await first.live.wait_known()
            assert first.shown == {"late": 1}


async def test_a_process_that_is_stuck_does_not_hold_up_the_others(autojump_clock: MockClock) -> None:
    group = Group(3)
    group.frozen.add(1)
    async with running(group) as first:
        with first.live.watching():
            began = trio.current_time()
            await first.live.wait_known()
            assert trio.current_time() - began < 1
            for number in range(20):
                group.members[2].set(r2=number)
                await trio.sleep(0.5)
                assert first.shown == {"r2": number}
            group.frozen.clear()
            group.members[1].set(r1=1)
            await trio.sleep(4)
            assert first.shown == {"r1": 1, "r2": 19}
            # It is stuck again, and still has its requests.
            group.frozen.add(1)
            await trio.sleep(10)
            assert first.shown == {"r1": 1, "r2": 19}


async def test_what_a_process_had_goes_with_it(autojump_clock: MockClock) -> None:
    group = Group(2)
    async with running(group) as first:
        with first.live.watching():
            group.members[1].set(old=1)
            await trio.sleep(0.5)
            assert first.shown == {"old": 1}
            group.pids[1] = 0
            await trio.sleep(0.5)
            assert first.shown == {}
            group.restart(1, 201)
            group.members[1].set(new=1)
            await trio.sleep(0.5)
            assert first.shown == {"new": 1}
            # Between two looks it has ended, and another one serves.
            group.restart(1, 202)
            group.members[1].set(newer=1)
            await trio.sleep(1)
            assert first.shown == {"newer": 1}
            # The same, and the new one is stuck.
            group.restart(1, 203)
            group.frozen.add(1)
            await trio.sleep(4)
            assert first.shown == {}


async def test_an_answer_that_is_lost_is_made_up_for(autojump_clock: MockClock) -> None:
    group = Group(2)
    other = group.members[1]
    async with running(group) as first:
        with first.live.watching():
            other.set(a=1, b=1)
            await trio.sleep(0.5)
            lost = [True]
            group.loses = lambda _: lost[0]
            other.set(a=2, c=1)
            del other.requests["b"]
            await trio.sleep(1)
            lost[0] = False
            await trio.sleep(1)
            assert first.shown == {"a": 2, "c": 1}


async def test_much_comes_in_pieces_and_all_of_it_gets_its_turn(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "ANSWER_BYTES", 1000)
    group = Group(2)
    other = group.members[1]
    numbers = {f"r{number:03}": 0 for number in range(200)}
    sizes: list[int] = []
    answer = other.live.answer

    def noted(look: Look) -> Any:
        response = answer(look)
        sizes.append(len(response.body))
        return response

    monkeypatch.setattr(other.live, "answer", noted)
    async with running(group) as first:
        with first.live.watching():
            for change in range(12):
                # All of them change faster than they can be sent.
                other.set(**dict.fromkeys(numbers, change))
                await trio.sleep(0.2)
            # Each of them was sent more than once, and none is far behind.
            assert set(first.shown) == set(numbers)
            assert min(first.shown.values()) >= 6
            other.set(**dict.fromkeys(numbers, 100))
            await trio.sleep(3)
            assert set(first.shown.values()) == {100}
    assert max(sizes) < 4000


def worker(**fields: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "id": "w", "state": "ok", "draining": False, "models": ["m"], "in_flight": 1, "in_flight_elsewhere": 0,
        "waiting_by": {}, "ejected": {}, "connected_since": 10.0,
    }  # fmt: skip
    return known | fields


def test_a_worker_is_one_item() -> None:
    asleep = worker(state="asleep", connected_since=None, in_flight=0)
    merged = merge_workers(
        {0: [worker(in_flight_elsewhere=6)], 1: [worker(in_flight=4, connected_since=9.0)], 2: [asleep]}
    )
    assert [
        (each["id"], each["state"], each["in_flight"], each["in_flight_elsewhere"], each["connected_since"])
        for each in merged
    ] == [("w", "ok", 5, 2, 9.0)]


def test_a_model_is_one_item() -> None:
    def model(in_flight: int, speed: float | None, state: str) -> dict[str, Any]:
        replica = {"node": "w", "state": state, "why": "", "available": True, "in_flight": in_flight}
        return {
            "id": "m", "nodes": ["w"], "state": state, "why": "", "in_flight": in_flight, "prompt_tokens": 10,
            "cached_tokens": 4, "tokens_per_second": speed, "bytes_per_token": speed,
            "replicas": [replica | {"tokens_per_second": speed}],
        }  # fmt: skip

    (merged,) = merge_models([[model(1, None, "cold")], [model(2, 30.0, "ready")]], live=True)
    assert (merged["in_flight"], merged["prompt_tokens"], merged["cached_tokens"]) == (3, 20, 8)
    assert (merged["tokens_per_second"], merged["state"]) == (30.0, "ready")
    assert merged["bytes_per_token"] == 30.0
    (replica,) = merged["replicas"]
    assert (replica["state"], replica["in_flight"], replica["tokens_per_second"]) == ("ready", 3, 30.0)
