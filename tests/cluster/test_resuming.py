"""Links that are cut: the same two processes go on, others do not, and what has died is not waited for."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from memory_cluster import MemoryCluster, Worker, chat_request, echo, everything, forever, text
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.cluster.admission import Admitted
from trio_cluster.cluster.master import WorkerConnection
from trio_cluster.core.answer import Done, Failed
from trio_cluster.core.call import Call
from trio_cluster.core.limits import CLOSE_TIMEOUT
from trio_cluster.errors import Overloaded, WorkerLost
from trio_cluster.openai import ChatRequest
from trio_cluster.protocol import SessionState
from trio_cluster.protocol.codec import decode_handshake

WINDOW = 15.0


class Counting:
    """A model that puts numbers, one each second, and knows how often it was asked and how it ended."""

    def __init__(self, count: int = 10) -> None:
        self.count = count
        self.begun = self.completed = self.cancelled = 0

    async def counting(self, request: ChatRequest) -> AsyncIterator[str]:
        self.begun += 1
        try:
            for number in range(self.count):
                yield f"{number} "
                await trio.sleep(1)
            self.completed += 1
        except trio.Cancelled:
            self.cancelled += 1
            raise

    @property
    def whole(self) -> str:
        return "".join(f"{number} " for number in range(self.count))


def words_of(events: list[Any]) -> str:
    """Return the contents of the deltas in a stream of events."""
    body = text(events)
    return "".join(part.split('"', 1)[0] for part in body.split('"content":"')[1:])


@pytest.fixture
def cluster(nursery: trio.Nursery) -> MemoryCluster:
    return MemoryCluster(nursery, on_conflict="replicate")


def state_of(cluster: MemoryCluster, name: str = "w1") -> str:
    return next(status.state for status in cluster.manager.status() if status.id == name)


async def begin(cluster: MemoryCluster, model: str, **fields: Any) -> tuple[Call, list[Any]]:
    call = cluster.router.open(chat_request(model, **fields))
    return call, [await call.receive()]


# The same two processes


async def test_a_stream_goes_on_after_a_reset_byte_for_byte_and_nothing_runs_twice(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting()
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    for _ in range(4):
        await trio.sleep(2.25)
        worker.reset()
    events += await everything(call)
    assert isinstance(events[-1], Done)
    assert words_of(events) == model.whole
    assert (model.begun, model.completed, model.cancelled) == (1, 1, 0)
    assert worker.dials == 5
    await wait_all_tasks_blocked()
    assert state_of(cluster) == "ok"
    assert call.released
    assert len(cluster.manager.sessions) == 1


async def test_a_silent_connection_is_left_for_another_one_before_anyone_is_lost(
    cluster: MemoryCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    model = Counting(40)
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    await trio.sleep(3)
    worker.black_hole()
    with caplog.at_level(logging.INFO, "trio_cluster"):
        events += await everything(call)
    assert words_of(events) == model.whole
    assert model.begun == model.completed == 1
    assert worker.dials == 2
    assert "worker left" not in caplog.text
    assert "worker stalled" not in caplog.text


async def test_a_look_that_comes_late_is_followed_by_another_one(
    cluster: MemoryCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    model = Counting(40)
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    worker.black_hole()
    await trio.sleep(11)
    # The process does not run at the moment at which it would try a second connection.
    autojump_clock.jump(5)
    with caplog.at_level(logging.INFO, "trio_cluster"):
        events += await everything(call)
    assert words_of(events) == model.whole
    assert worker.dials == 2
    assert "worker left" not in caplog.text


async def test_the_first_connection_is_kept_if_it_gives_a_sign_of_life_before_the_second_is_open(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    first = worker.streams
    session = worker.client.session
    worker.lose_way()
    # The second connection is tried after 12.5 s, and nothing is answered there.
    await trio.sleep(14)
    assert worker.dials == 2
    for stream in first:
        stream.release()
    await trio.sleep(60)
    assert worker.client.session is session
    assert session is not None
    assert session.resumptions == 0
    assert state_of(cluster) == "ok"


async def test_a_body_that_is_on_its_way_to_the_worker_arrives_whole(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    async def size(request: ChatRequest) -> str:
        return str(len(request.last_text))

    worker = await cluster.start("w1", size)
    for stream in worker.streams:
        stream.at_once = 10_000
    call = cluster.router.open(chat_request("size", content="x" * 1_000_000))
    for _ in range(5):
        await trio.lowlevel.checkpoint()
    worker.reset()
    assert words_of(await everything(call)) == "1000000"


async def test_a_model_that_comes_while_the_link_is_cut_is_registered_when_it_goes_on(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", echo)
    worker.way_lost = True
    worker.reset()
    await trio.sleep(3)
    worker.serve("later", echo)
    info = worker.router.catalog.info("later")
    assert info is not None
    worker.client.announce(info)
    assert cluster.router.catalog.names() == ["echo"]
    worker.find_way()
    await trio.sleep(3)
    assert cluster.router.catalog.names() == ["echo", "later"]


# While it is suspended


async def suspended(cluster: MemoryCluster, worker: Worker) -> None:
    """Cut the link of a worker, and let no other come."""
    worker.way_lost = True
    worker.reset()
    await wait_all_tasks_blocked()
    assert state_of(cluster, worker.client._node_id) == "suspended"


async def test_a_suspended_worker_gets_no_calls_and_is_lost_when_the_window_has_passed(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting(100)
    worker = await cluster.start("w1", model.counting)
    call, _ = await begin(cluster, "counting")
    await suspended(cluster, worker)
    start = trio.current_time()
    with pytest.raises(Overloaded):
        cluster.router.open(chat_request("counting"))
    last = (await everything(call))[-1]
    assert trio.current_time() - start == WINDOW
    assert isinstance(last, Failed)
    assert isinstance(last.error, WorkerLost)
    assert "not resumed within 15 s" in str(last.error)
    assert call.released
    assert cluster.router.catalog.names() == []
    await wait_all_tasks_blocked()
    assert (model.begun, model.cancelled) == (1, 1)


async def test_a_suspended_call_is_cancelled_at_once_and_its_slot_is_free_when_its_handler_has_stopped(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting(100)
    worker = await cluster.start("w1", model.counting)
    call, _ = await begin(cluster, "counting")
    await suspended(cluster, worker)
    call.cancel("the client left")
    assert call.ended
    await trio.sleep(5)
    assert not call.released
    assert model.cancelled == 0
    worker.find_way()
    await trio.sleep(5)
    assert call.released
    assert model.cancelled == 1


async def test_calls_that_have_given_nothing_are_opened_elsewhere_and_others_wait(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    async def shared(request: ChatRequest) -> AsyncIterator[str]:
        if request.last_text == "begun":
            yield "begun"
        await trio.sleep_forever()

    worker = await cluster.start("w1", shared)
    quiet = cluster.router.open(chat_request("shared", content="quiet"))
    begun, _ = await begin(cluster, "shared", content="begun")
    await cluster.start("w2", shared)
    await suspended(cluster, worker)
    assert isinstance(quiet.end, Failed)
    assert quiet.end.retryable
    again = cluster.router.reopen(quiet)
    assert again is not None
    assert again.served_by == "w2"
    assert again.request.retried
    assert not begun.ended
    # Its work counts until it has stopped.
    assert not quiet.released
    worker.find_way()
    await trio.sleep(5)
    assert quiet.released
    assert not begun.ended


@pytest.mark.parametrize("case", ["nobody else", "retried before", "the master drains"])
async def test_a_call_that_cannot_be_opened_elsewhere_waits(
    cluster: MemoryCluster, autojump_clock: MockClock, case: str
) -> None:
    async def shared(request: ChatRequest) -> AsyncIterator[str]:
        await trio.sleep_forever()
        yield "x"

    worker = await cluster.start("w1", shared)
    call = cluster.router.open(chat_request("shared", retried=case == "retried before"))
    if case != "nobody else":
        await cluster.start("w2", shared)
    if case == "the master drains":
        cluster.manager.drain("enough")
    await suspended(cluster, worker)
    assert not call.ended


# Deaths


async def test_the_end_of_a_connection_without_a_goodbye_is_a_death(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    start = trio.current_time()
    worker.cut()
    last = (await everything(call))[-1]
    assert trio.current_time() == start
    assert isinstance(last, Failed)
    assert call.released


async def test_through_a_proxy_the_end_of_a_connection_may_be_a_cut(
    cluster: MemoryCluster, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = WorkerConnection._admit

    def admit_through_a_proxy(self: Any, path: str, headers: dict[str, str]) -> Any:
        return admit(self, path, headers | {"x-forwarded-for": "10.0.0.7"})

    monkeypatch.setattr(WorkerConnection, "_admit", admit_through_a_proxy)
    model = Counting()
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    await trio.sleep(3.5)
    for stream in worker.streams:
        stream.end()
    events += await everything(call)
    assert words_of(events) == model.whole
    assert model.begun == 1


async def test_a_master_that_refuses_connections_is_gone_and_work_for_it_is_not_continued(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting(100)
    worker = await cluster.start("w1", model.counting)
    await begin(cluster, "counting")
    cluster.kill_master()
    worker.reset()
    await trio.sleep(1)
    assert model.cancelled == 1


async def test_a_master_that_takes_a_last_connection_while_it_dies_is_found_out_without_a_wait(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting(100)
    worker = await cluster.start("w1", model.counting)
    await begin(cluster, "counting")
    start = trio.current_time()
    worker.resets, cluster.last_connections = 1, 1
    worker.reset()
    await wait_all_tasks_blocked()
    assert trio.current_time() == start
    assert model.cancelled == 1


async def test_connections_that_are_reset_again_and_again_are_followed_by_waits(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    worker.resets = 10**6
    worker.reset()
    await trio.sleep(WINDOW)
    assert 5 < worker.dials < 100


async def test_another_process_of_the_same_name_ends_the_wait_at_once(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    await suspended(cluster, worker)
    worker.scope.cancel()
    await cluster.start("w1", forever)
    assert isinstance(call.end, Failed)
    assert call.released
    assert state_of(cluster) == "ok"
    assert len(cluster.manager.sessions) == 1


async def test_a_worker_that_says_goodbye_is_not_waited_for(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    worker.client.close("enough")
    await wait_all_tasks_blocked()
    assert call.ended
    assert cluster.manager.status() == []


@pytest.mark.parametrize("at", ["master", "worker"])
async def test_without_a_window_at_both_ends_a_reset_is_the_end(
    nursery: trio.Nursery, autojump_clock: MockClock, at: str
) -> None:
    cluster = MemoryCluster(nursery, **({"resume_window": 0.0} if at == "master" else {}))
    worker = await cluster.start("w1", forever, **({"resume_window": 0.0} if at == "worker" else {}))
    call, _ = await begin(cluster, "forever")
    worker.reset()
    await wait_all_tasks_blocked()
    assert isinstance(call.end, Failed)
    assert call.released


async def test_closing_the_master_does_not_wait_for_links_that_are_suspended(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    await suspended(cluster, worker)
    start = trio.current_time()
    await cluster.manager.close_all("the master stops")
    # There is a connection without a handshake, too, which is waited for.
    assert trio.current_time() - start <= CLOSE_TIMEOUT
    assert call.ended


async def test_an_operator_can_drop_a_worker_that_is_suspended(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    await suspended(cluster, worker)
    assert cluster.manager.drop_worker("w1", "its certificate was revoked")
    assert call.ended
    worker.way_lost = False
    await trio.sleep(30)
    # It is a new session, whoever lets it in.
    assert state_of(cluster) == "ok"


async def test_a_drain_while_the_link_is_cut_keeps_the_answers(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting(5)
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    await suspended(cluster, worker)
    worker.router.drain("enough")
    worker.client.drain("enough")
    await trio.sleep(8)
    worker.find_way()
    await worker.client.wait_sent()
    worker.client.close("enough")
    events += await everything(call)
    assert words_of(events) == model.whole
    await worker.over.wait()


# Who may resume


async def test_a_worker_that_names_an_unknown_session_is_turned_away_and_comes_back_as_a_new_one(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting(100)
    worker = await cluster.start("w1", model.counting)
    await begin(cluster, "counting")
    old = cluster.manager.sessions[0]
    # The same address is another master's now, which knows nothing.
    scopes = cluster.scopes
    cluster.restart()
    worker.reset()
    await trio.sleep(10)
    assert model.cancelled == 1
    assert state_of(cluster) == "ok"
    assert cluster.manager.sessions[0] is not old
    for scope in scopes:
        scope.cancel()


async def test_to_know_the_session_is_not_enough(cluster: MemoryCluster, autojump_clock: MockClock) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    worker.way_lost = True
    worker.reset()
    await wait_all_tasks_blocked()
    connection = next(iter(cluster.manager._connections))
    session = worker.client.session
    assert session is not None
    assert session.session_state is SessionState.SUSPENDED
    handshake = decode_handshake(session._name_session(session._retention))[0]  # type: ignore[arg-type]
    open_ = Admitted("open")
    assert connection.can_be_resumed_by(handshake, open_)
    assert not connection.can_be_resumed_by(handshake, Admitted("token"))
    assert not connection.can_be_resumed_by(handshake, Admitted("certificate", "w1"))
    assert not call.ended


async def test_a_connection_that_breaks_while_it_is_resumed_is_followed_by_another(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting(10)
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    await trio.sleep(2.5)
    worker.reset()
    # Whenever another connection has been made, it is reset a few turns later: somewhere in its handshakes.
    for turns in range(1, 25):
        dials = worker.dials
        while worker.dials == dials and not call.ended:
            await trio.sleep(0.01)
            if worker.client.session is not None and not worker.client.session.suspended:
                break
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        worker.reset()
    events += await everything(call)
    assert words_of(events) == model.whole
    assert (model.begun, model.completed) == (1, 1)


async def test_what_is_logged(
    cluster: MemoryCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await cluster.start("w1", forever)
    await begin(cluster, "forever")
    secret = cluster.manager.sessions[0].session_id
    with caplog.at_level(logging.DEBUG):
        worker.reset()
        await trio.sleep(2)
    assert len(secret) == 32
    for line in (
        "link cut: the connection broke",
        "link resumed",
        "the link was cut",
        "the link to the master goes on",
    ):
        assert line in caplog.text
    assert secret not in caplog.text
