"""What the kit uses of trio beyond its documented interface: that it is there, and that the rest works without it."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import trio
from trio.testing import MockClock

from trio_cluster.testing import (
    FakeModel,
    _trio_internals,
    open_cluster,
    run_schedule,
    seeded,
    settle,
    worker,
)
from trio_cluster.testing._seed import can_be_seeded
from trio_cluster.testing._trio_internals import missing_internals, reproducible_scheduler, waits_for_thread

REMEDY = f"trio {trio.__version__} has changed: adapt trio_cluster/testing/_trio_internals.py"


# The installed version of trio


def test_trio_has_every_internal_name_that_is_used() -> None:
    assert missing_internals() == [], REMEDY


def test_the_scheduler_takes_its_random_numbers_from_the_generator() -> None:
    async def order() -> list[int]:
        ran: list[int] = []

        async def task(number: int) -> None:
            ran.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(task, number)
        return ran

    with reproducible_scheduler() as generator:
        orders = []
        for seed in (1, 1, 2):
            generator.seed(seed)
            orders.append(trio.run(order))
    assert orders[0] == orders[1] != orders[2], REMEDY
    assert sorted(orders[0]) == list(range(20))


async def test_a_task_that_waits_for_a_thread_is_recognized(nursery: trio.Nursery) -> None:
    computing, go_on, waiting = threading.Event(), threading.Event(), trio.Event()
    tasks: list[trio.lowlevel.Task] = []

    def compute_and_wait() -> None:
        computing.set()
        go_on.wait()
        trio.from_thread.run(wait_in_trio)

    async def wait_in_trio() -> None:
        waiting.set()
        await trio.sleep_forever()

    async def run_thread() -> None:
        tasks.append(trio.lowlevel.current_task())
        await trio.to_thread.run_sync(compute_and_wait)

    try:
        nursery.start_soon(run_thread)
        await trio.to_thread.run_sync(computing.wait)
        assert waits_for_thread(tasks[0]), REMEDY
    finally:
        go_on.set()
    await waiting.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert not waits_for_thread(tasks[0]), REMEDY
    assert not waits_for_thread(trio.lowlevel.current_task())
    nursery.cancel_scope.cancel()


async def test_the_run_loop_calls_the_replaced_autojump(autojump_clock: MockClock) -> None:
    jumps = 0

    def replacement(jump: object) -> object:
        def count() -> None:
            nonlocal jumps
            jumps += 1
            jump()  # type: ignore[operator]

        return count

    with _trio_internals.autojump_replaced(autojump_clock, replacement):  # type: ignore[arg-type]
        await trio.sleep(1)
    assert jumps >= 1, REMEDY
    before = jumps
    await trio.sleep(1)
    assert jumps == before


# A version of trio without them


@pytest.mark.parametrize("name", ["_GENERATOR", "_SORTS_TASKS", "_SCHEDULER"])
def test_only_seeding_fails_without_the_names_of_the_scheduler(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with open_cluster() as cluster:
            server = worker("w1")
            server.register_chat("m", model := FakeModel(interval=1))
            await cluster.start_worker(server)
            assert (await cluster.client().chat("m")).report().text == model.text()
            await settle(cluster)
        with pytest.raises(RuntimeError, match=explanation):
            async with open_cluster(seed=1):
                raise AssertionError("it was opened")

    assert can_be_seeded()
    monkeypatch.setattr(_trio_internals, name, "trio.no_longer_there")
    assert not can_be_seeded()
    explanation = (
        rf"^the scheduler of trio {trio.__version__} cannot be seeded: it has no trio\..*no_longer_there"
    )
    trio.run(main, clock=MockClock(autojump_threshold=0))
    with pytest.raises(RuntimeError, match=explanation), seeded(1):
        pass
    with pytest.raises(RuntimeError, match=explanation):
        run_schedule(1)


def test_without_its_names_the_clock_works_and_a_warning_names_trio(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with open_cluster():
            await trio.sleep(1000)

    monkeypatch.setattr(_trio_internals, "_AUTOJUMP", "_no_longer_there")
    with pytest.warns(RuntimeWarning, match=f"trio {trio.__version__} has no .*MockClock._no_longer_there"):
        trio.run(main, clock=MockClock(autojump_threshold=0))


def test_the_kit_and_the_plugin_can_be_imported_without_any_of_them() -> None:
    program = (
        "import trio, sys\n"
        "import trio.testing\n"
        "del trio._core._run._r, trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING, trio.testing.MockClock._autojump\n"
        "import trio_cluster.testing, pytest_trio_cluster\n"
        "from trio_cluster.testing._trio_internals import missing_internals\n"
        "print(*missing_internals(), sep='\\n')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.split() == [
        "trio._core._run._r",
        "trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING",
        "trio.testing.MockClock._autojump",
    ]
