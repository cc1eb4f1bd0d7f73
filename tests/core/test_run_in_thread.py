"""Work in threads, and what happens if there is none."""

from __future__ import annotations

import gc
import logging
import re
from pathlib import Path

import pytest
import trio
from thread_shortage import no_threads
from trio.testing import MockClock

import trio_cluster
from trio_cluster import ClusterError
from trio_cluster.core.threads import NoThread, run_in_thread, start_in_thread
from trio_cluster.net.sockets import Sockets, why_not_connected

PACKAGE = Path(trio_cluster.__file__).parent
#: Where threads are started, each with an answer to the question what happens if there is none. The demo is a program,
#: and so is `trio-cluster top`. The last one is the program of a process of its own, which is not a node.
STARTERS = {
    "core/threads.py",
    "net/watchdog.py",
    "engines/_threads.py",
    "demo/cluster.py",
    "demo/node.py",
    "cli/top.py",
    "cli/terminal.py",
    "engines/_hub_process.py",
}


def test_threads_are_started_nowhere_else() -> None:
    start = re.compile(r"to_thread\.run_sync\(|start_thread_soon\(|\bThread\(")
    found = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if start.search(path.read_text())
    }
    assert found == STARTERS


async def test_a_function_is_called_in_a_thread_with_its_arguments() -> None:
    assert await run_in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await run_in_thread(divmod, 7, 0)
    limiter = trio.CapacityLimiter(1)
    assert await run_in_thread(lambda: limiter.borrowed_tokens, limiter=limiter) == 1


async def test_without_a_thread_it_is_not_called_and_the_next_one_is_when_there_is_room() -> None:
    called: list[str] = []
    with no_threads(), pytest.raises(NoThread) as caught:
        await run_in_thread(called.append, "x")
    assert (caught.value.status, caught.value.code) == (503, "over_capacity")
    assert caught.value.retry_after is not None
    assert called == []
    await run_in_thread(called.append, "y")
    assert called == ["y"]


async def test_a_node_that_cannot_start_without_a_thread_says_so_in_one_line() -> None:
    assert await start_in_thread(divmod, 7, 2) == (3, 1)
    with no_threads(), pytest.raises(ClusterError, match="This server can start no more threads"):
        await start_in_thread(divmod, 7, 2)


async def test_the_same_error_of_the_function_itself_is_its_own() -> None:
    def function() -> None:
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="can't start new thread"):
        await run_in_thread(function)


async def test_a_shortage_is_logged_when_it_begins_and_when_it_is_over(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with no_threads():
        for _ in range(50):
            with pytest.raises(NoThread):
                await run_in_thread(int)
    await run_in_thread(int)
    assert [record.message for record in caplog.records] == [
        "no room for another thread: can't start new thread; "
        "raise the limit (ulimit -u, or pids of the container), or send fewer requests at once"
    ]
    await trio.sleep(6)
    await run_in_thread(int)
    await run_in_thread(int)
    assert [record.message for record in caplog.records[1:]] == ["there is room for another thread again"]


async def test_the_error_is_no_work_for_the_garbage_collector() -> None:
    with no_threads(), pytest.raises(NoThread):
        await run_in_thread(int)
    gc.collect()
    gc.disable()
    try:
        with no_threads():
            try:
                await run_in_thread(int)
            except NoThread as error:
                error.with_traceback(None)
        assert not [each for each in gc.get_objects() if isinstance(each, NoThread)]
    finally:
        gc.enable()


async def test_a_name_that_cannot_be_resolved_for_want_of_a_thread_is_no_connection() -> None:
    with no_threads(), pytest.raises(OSError, match="can't start new thread") as caught:
        await Sockets().connect("localhost", 1)
    assert why_not_connected(caught.value) == "can't start new thread"
    with no_threads(), pytest.raises(trio_cluster.ClusterPortError, match="can't start new thread"):
        await Sockets().listen("localhost", 0)
