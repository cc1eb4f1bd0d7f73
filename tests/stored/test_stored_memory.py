"""Records in memory: what is found, by whom, for how long, and how much there is at most."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import hypothesis.strategies as st
import pytest
import trio
import trio.testing
from hypothesis import given, settings

from trio_cluster.core.principal import Principal
from trio_cluster.options import ClusterServerOptions
from trio_cluster.stored.items import input_items, make_record
from trio_cluster.stored.memory import MemoryResponses
from trio_cluster.stored.record import Item, Record, owner_of


def record(name: str, context: tuple[Item, ...] = (), output: tuple[Item, ...] = ()) -> Record:
    return Record(name, b'{"id":"%s"}' % name.encode(), context, output)


def item(name: str, text: str = "") -> Item:
    return Item(name, b'{"id":"%s","text":"%s"}' % (name.encode(), text.encode()))


def store(**options: Any) -> MemoryResponses:
    return MemoryResponses(
        ClusterServerOptions(**{f"stored_responses{name}": options[name] for name in options})
    )


async def test_a_record_is_found_by_its_owner_only() -> None:
    responses = store()
    one, other = owner_of(Principal("a", created_at=1.0)), owner_of(Principal("a", created_at=2.0))
    for owner in (other, owner_of(Principal("b")), owner_of(Principal())):
        await responses.put(one, record("r", (item("i"),)))
        assert await responses.get(owner, "r") is None
        assert await responses.find_items(owner, ["i"]) == {}
        assert not await responses.delete(owner, "r")
        assert not await responses.extend(owner, "r", [item("j")])
    assert (await responses.find_items(one, ["i", "j"])).keys() == {"i"}
    assert await responses.delete(one, "r")
    assert await responses.get(one, "r") is None
    assert (responses.count, responses.size) == (0, 0)


async def test_items_that_records_share_are_kept_once_and_until_the_last_of_them_is_gone() -> None:
    responses = store()
    large = "x" * 10_000
    await responses.put("a", record("r1", (item("i", large),)))
    before = responses.size
    # Made anew, as by a client that sends all of it again.
    await responses.put("a", record("r2", (item("i", large),), (item("j"),)))
    assert responses.size - before < 3_000
    await responses.delete("a", "r1")
    assert (await responses.find_items("a", ["i"]))["i"].json == item("i", large).json
    # The same id with another content is another item.
    await responses.put("a", record("r3", (item("i", "y"),)))
    second = await responses.get("a", "r2")
    assert second is not None
    assert second.context[0].json == item("i", large).json
    assert (await responses.find_items("a", ["i"]))["i"].json == item("i", "y").json
    await responses.delete("a", "r2")
    await responses.delete("a", "r3")
    assert responses.size == 0


async def test_records_expire(autojump_clock: trio.testing.MockClock) -> None:
    responses = store(_lifetime=10.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(responses.run)
        await responses.put("a", record("r1"))
        await trio.sleep(6)
        await responses.put("a", record("r2"))
        await responses.extend("a", "r1", [item("i")])
        await trio.sleep(6)
        assert responses.count == 2
        await trio.sleep(5)
        # Without any request.
        assert (responses.count, responses.size) == (0, 0)
        await responses.put("a", record("r3"))
        await trio.sleep(10.1)
        assert responses.count == 0
        nursery.cancel_scope.cancel()


async def test_a_key_that_stores_much_displaces_its_own_records() -> None:
    responses = store(**{"": 10})
    for name in ("a1", "a2", "a3"):
        await responses.put("a", record(name))
    for i in range(30):
        await responses.put("b", record(f"b{i}"))
    assert responses.count == 10
    for name in ("a1", "a2", "a3"):
        assert await responses.get("a", name) is not None
    responses = store(_size=100_000)
    await responses.put("a", record("a1", (item("i", "x" * 1000),)))
    for i in range(30):
        await responses.put("b", record(f"b{i}", (item(f"i{i}", "x" * 20_000),)))
    assert await responses.get("a", "a1") is not None
    assert await responses.get("b", "b29") is not None


async def test_a_record_that_is_too_large_displaces_nothing() -> None:
    responses = store(_size=10_000)
    await responses.put("a", record("r1"))
    assert not await responses.put("a", record("r2", (item("i", "x" * 10_000),)))
    assert await responses.get("a", "r1") is not None
    assert await responses.get("a", "r2") is None


async def test_the_records_of_a_key_that_is_gone_are_dropped() -> None:
    responses = store()
    await responses.put(owner_of(Principal("a", created_at=1.0)), record("r"))
    await responses.put(owner_of(Principal("ab", created_at=1.0)), record("r"))
    responses.forget("a")
    assert await responses.get(owner_of(Principal("ab", created_at=1.0)), "r") is not None
    assert responses.count == 1


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "delete", "extend", "get"]),
        st.sampled_from(["a", "b\n1.5", "c"]),
        st.integers(0, 8),
        st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, 10, 700])), max_size=5),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(ACTIONS, st.integers(1, 6), st.sampled_from([2_000, 5_000, 20_000, 1_000_000]))
def test_the_bounds_hold_after_every_step_and_nothing_is_counted_wrong(
    actions: list[Any], most: int, most_size: int
) -> None:
    async def play() -> None:
        responses = store(**{"": most, "_size": most_size})
        there: dict[tuple[str, str], bool] = {}
        for action, owner, number, given_items in actions:
            name = f"r{number}"
            items = tuple(item(f"i{i}", "x" * size) for i, size in given_items)
            if action == "put":
                stored = await responses.put(owner, record(name, items, items[:1]))
                if stored:
                    # What was just stored is there, whatever else had to go.
                    found = await responses.get(owner, name)
                    assert found is not None
                    assert [each.json for each in found.context] == [each.json for each in items]
                    there[owner, name] = True
            elif action == "delete":
                was_there = await responses.get(owner, name) is not None
                assert await responses.delete(owner, name) == was_there
            elif action == "extend":
                await responses.extend(owner, name, items)
            else:
                await responses.get(owner, name)
            assert responses.count <= most
            assert responses.size <= most_size
        # Whatever is left can be deleted, and then nothing is left.
        for owner, name in list(there):
            await responses.delete(owner, name)
        for owner in ("a", "b\n1.5", "c"):
            for number in range(9):
                await responses.delete(owner, f"r{number}")
        assert (responses.count, responses.size) == (0, 0)

    trio.run(play)


@pytest.mark.parametrize("kind", ["small", "large", "chain", "repeated"])
def test_what_is_counted_is_what_is_taken(kind: str) -> None:
    most_size = 4 << 20

    async def fill() -> MemoryResponses:
        responses = store(**{"": 10**9, "_size": most_size})
        context: tuple[Item, ...] = ()
        said: list[Any] = []
        for i in range(6_000):
            size = 20_000 if kind == "large" else 40
            given_input: Any = f"{i} " + "x" * size
            if kind == "repeated":
                said = [*said[-200:], {"role": "user", "content": given_input}]
                given_input = said
            response = {
                "id": f"resp_{i:032}",
                "output": [{"id": f"msg_{i:032}", "type": "message", "content": "y" * size}],
            }
            last = context[-1].id if context else ""
            own = input_items(given_input, "a", last)
            made = make_record(response, (*context, *own), "a", {})
            assert made is not None
            assert await responses.put("a", made)
            if kind == "chain":
                context = (*made.context, *made.output)[-400:]
            if i > 300 and responses.count < i - 200:
                break
        return responses

    trio.run(fill)
    gc.collect()
    tracemalloc.start()
    try:
        responses = trio.run(fill)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert responses.size > most_size * 0.3
    assert taken <= responses.size * 1.1
    assert taken >= responses.size * 0.5
