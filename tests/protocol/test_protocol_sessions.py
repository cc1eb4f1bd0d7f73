"""Sessions: handshake, time, credit, order, limits, and the end."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import pytest
from protocol_link import Link, open_link

from trio_cluster.core.model import ModelInfo
from trio_cluster.errors import ApiError, InvalidRequest, Overloaded, WorkerLost
from trio_cluster.protocol import (
    MAGIC,
    MAX_BACKLOG,
    MAX_CALLS,
    PIECE,
    PROTOCOL_MAX,
    WINDOW,
    Cancel,
    Data,
    Done,
    Drain,
    Failed,
    ForwardRequest,
    ForwardResponse,
    Grant,
    Handshake,
    HandshakeError,
    Heartbeat,
    MasterSession,
    Message,
    ModelRegistered,
    ModelRejected,
    PeerSilent,
    ProtocolError,
    RegisterModel,
    Shutdown,
    State,
    UnregisterModel,
    WorkerSession,
    decode,
    encode,
)

GREETING = Handshake(MAGIC, 1, 1, "peer", "9.9")


def written(session: MasterSession | WorkerSession, limit: int = PIECE) -> list[Message]:
    batch = session.next_message(limit)
    return [] if batch is None else decode(batch.data)


def request(call: int, *, size: int = -1) -> ForwardRequest:
    return ForwardRequest(call, "e", "chat", "m", "", {}, "", None, None, size)


def answering(link: Link, body: bytes | None = b"") -> int:
    """Return a call on ``link`` whose answer has begun."""
    call = link.open(body)
    link.settle()
    link.worker.respond(call, 200, "text/plain")
    link.settle()
    return call


# The handshake


def test_an_instance_tells_two_processes_of_one_name_apart() -> None:
    link = Link()
    link.worker = WorkerSession("w", "1.0", 0.0, instance="a1b2")
    link.settle()
    assert link.master.peer == Handshake(MAGIC, 1, 1, "w", "1.0", "a1b2")


def test_both_ends_send_their_handshake_first_and_have_that_of_the_peer_afterwards() -> None:
    link = Link()
    link.worker.register(ModelInfo("echo", "chat"))
    events = link.settle()
    assert [type(event) for event in events[0]] == [Handshake, RegisterModel]
    assert link.master.peer == Handshake(MAGIC, 1, 1, "w", "1.0")
    assert link.worker.peer == Handshake(MAGIC, 1, 1, "m", "1.0")
    assert (link.master.protocol, link.worker.protocol) == (1, 1)
    assert link.master.idle
    assert link.worker.idle


@pytest.mark.parametrize("session", [MasterSession("m", "1", 0.0), WorkerSession("w", "1", 0.0)])
def test_a_wrong_magic_number_is_final(session: MasterSession | WorkerSession) -> None:
    with pytest.raises(HandshakeError, match="not a trio_cluster node"):
        session.receive(encode([Handshake(MAGIC + 1, 1, 1, "x", "1")]), 0.0)
    assert session.peer is None


@pytest.mark.parametrize(("lowest", "highest"), [(PROTOCOL_MAX + 1, PROTOCOL_MAX + 3), (0, 0), (1, 0)])
def test_having_no_version_in_common_is_final_and_names_both_ranges(lowest: int, highest: int) -> None:
    session = MasterSession("m", "1", 0.0)
    with pytest.raises(HandshakeError, match=f"'x' .* supports {lowest} to {highest}, this node 1 to 1"):
        session.receive(encode([Handshake(MAGIC, lowest, highest, "x", "7")]), 0.0)


def test_the_highest_version_in_common_is_used() -> None:
    session = MasterSession("m", "1", 0.0)
    session.receive(encode([Handshake(MAGIC, 0, 99, "x", "7")]), 0.0)
    assert session.protocol == PROTOCOL_MAX


def test_anything_before_the_handshake_is_refused_but_a_retry_may_help() -> None:
    with pytest.raises(ProtocolError, match="first message must be Handshake, not Heartbeat") as caught:
        MasterSession("m", "1", 0.0).receive(encode([Heartbeat()]), 0.0)
    assert not isinstance(caught.value, HandshakeError)


def test_a_second_handshake_is_refused() -> None:
    with pytest.raises(ProtocolError, match="a second Handshake"):
        MasterSession("m", "1", 0.0).receive(encode([GREETING, GREETING]), 0.0)


def test_no_call_can_be_opened_before_the_handshake() -> None:
    with pytest.raises(RuntimeError, match="before the handshake"):
        Link().open()


@pytest.mark.parametrize("message", [ModelRegistered("m"), ModelRejected("m", "no"), Shutdown("go")])
def test_messages_that_only_a_master_sends_are_refused_by_a_master(message: Message) -> None:
    with pytest.raises(ProtocolError, match=r"the wrong end sent (Model|Shutdown)"):
        open_link().master.receive(encode([message]), 0.0)


@pytest.mark.parametrize("message", [RegisterModel("m", "chat", "o", 0), UnregisterModel("m")])
def test_messages_that_only_a_worker_sends_are_refused_by_a_worker(message: Message) -> None:
    with pytest.raises(ProtocolError, match=r"the wrong end sent .*Model"):
        open_link().worker.receive(encode([message]), 0.0)


def test_models_loads_and_drains_are_events_at_the_other_end() -> None:
    link = open_link()
    info = ModelInfo("echo", "chat", "me", 7)
    link.worker.register(info)
    link.worker.unregister("old")
    link.worker.drain("restart")
    link.master.model_registered("echo")
    link.master.model_rejected("other", "x" * 10_000)
    link.master.drain("upgrade")
    link.master.shut_down("y" * 10_000)
    to_master, to_worker = link.settle()
    assert to_master == [RegisterModel.of(info), UnregisterModel("old"), Drain("restart")]
    assert to_master[0].info() == info
    assert to_worker == [
        ModelRegistered("echo"),
        ModelRejected("other", "x" * 8191 + "…"),
        Drain("upgrade"),
        Shutdown("y" * 8191 + "…"),
    ]


# Time


def test_heartbeats_carry_the_load_and_come_at_their_interval() -> None:
    link = open_link()
    link.worker.load = (1, 0, 4)
    assert link.worker.deadline() == 5.0
    link.worker.tick(4.9)
    assert written(link.worker) == []
    link.worker.tick(5.0)
    link.worker.load = (2, 1, 4)
    assert written(link.worker) == [Heartbeat(2, 1, 4)]
    assert link.worker.deadline() == 10.0
    link.master.tick(5.0)
    assert written(link.master) == [Heartbeat(0, 0, 0)]


def test_a_heartbeat_can_be_queued_before_it_is_due() -> None:
    link = open_link()
    link.worker.load = (1, 2, 3)
    link.worker.queue_heartbeat()
    assert not link.worker.idle
    assert link.settle()[0] == [Heartbeat(1, 2, 3)]
    assert link.worker.deadline() == 5.0


def test_heartbeats_that_cannot_be_written_do_not_pile_up() -> None:
    link = open_link()
    for now in range(5, 30, 5):
        link.worker.tick(float(now))
    assert written(link.worker) == [Heartbeat()]
    assert written(link.worker) == []


def test_a_load_below_zero_is_refused_where_it_is_set() -> None:
    worker = open_link().worker
    with pytest.raises(ValueError, match="waiting"):
        worker.load = (0, -1, 4)
    assert worker.load == (0, 0, 0)


def test_heartbeats_carry_the_lag_and_the_progress_of_each_call() -> None:
    link = open_link()
    link.worker.load = (1, 1, 4)
    link.worker.lag = 2.5
    link.worker.report_progress([(1, 700), (2, -1)])
    link.worker.queue_heartbeat()
    assert link.settle()[0] == [Heartbeat(1, 1, 4, 2.5, progress=((1, 700), (2, -1)))]
    link.worker.load = (2, 0, 4)
    link.worker.queue_heartbeat()
    assert link.settle()[0] == [Heartbeat(2, 0, 4, 2.5, progress=((1, 700), (2, -1)))]


def test_heartbeats_carry_the_states_of_models_that_run_on_demand() -> None:
    link = open_link()
    link.worker.report_on_demand([("m", "starting", 20.0)], [(1, "starting m", -1.0)])
    link.worker.queue_heartbeat()
    heartbeat = Heartbeat(on_demand=(("m", "starting", 20.0),), starts=((1, "starting m", -1.0),))
    assert link.settle()[0] == [heartbeat]
    link.worker.report_on_demand([], [])
    link.worker.queue_heartbeat()
    assert link.settle()[0] == [Heartbeat()]


def test_of_very_many_models_some_are_left_out() -> None:
    link = open_link()
    models = [(f"{number:05}" + "m" * 200, "cold", 1.0) for number in range(1000)]
    link.worker.report_on_demand(models, ())
    link.worker.queue_heartbeat()
    (heartbeat,) = link.settle()[0]
    assert isinstance(heartbeat, Heartbeat)
    assert 50 < len(heartbeat.on_demand) < 100
    assert list(heartbeat.on_demand) == models[: len(heartbeat.on_demand)]


@pytest.mark.parametrize(
    "fields",
    [
        {"on_demand": (("m", "cold", -2.0),)},
        {"on_demand": (("m\n", "cold", 1.0),)},
        {"on_demand": (("m", "c" * 17, 1.0),)},
        {"on_demand": (("m", "cold", math.nan),)},
        {"on_demand": (("m", "starting", math.inf),)},
        {"on_demand": (("m", "cold", 1.0),) * 385},
        {"on_demand": (("m" * 200, "cold", 1.0),) * 100},
        {"starts": ((0, "starting m", 1.0),)},
        {"starts": ((1, "starting m", math.inf),)},
        {"starts": ((1, "starting\nm", 1.0),)},
    ],
)
def test_wrong_reports_of_models_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Heartbeat(**fields)


def test_the_progress_of_only_some_of_very_many_calls_is_reported() -> None:
    link = open_link()
    link.worker.report_progress((call, 0) for call in range(1, 2000))
    link.worker.queue_heartbeat()
    (beat,) = link.settle()[0]
    assert [call for call, _ in beat.progress] == list(range(1, 1025))


def test_a_heartbeat_of_a_blocked_end_does_not_change_what_is_queued() -> None:
    link = open_link()
    link.worker.load = (1, 0, 4)
    link.worker.drain("later")
    data = link.worker.heartbeat_while_blocked(7.5, "x" * 600)
    assert decode(data) == [Heartbeat(1, 0, 4, 7.5, "x" * 511 + "…")]
    assert written(link.worker) == [Drain("later")]
    assert written(link.worker) == []


def test_what_blocks_the_peer_is_known_until_its_next_heartbeat() -> None:
    link = open_link()
    assert link.master.peer_blocked == ""
    link.master.receive(link.worker.heartbeat_while_blocked(7.5, "handler of 'm'"), 1.0)
    assert link.master.peer_blocked == "handler of 'm'"
    link.master.receive(encode([Drain("later")]), 1.0)
    assert link.master.peer_blocked == "handler of 'm'"
    link.master.receive(encode([Heartbeat()]), 2.0)
    assert link.master.peer_blocked == ""


def test_time_during_which_this_end_did_not_read_is_not_silence_of_the_peer() -> None:
    session = MasterSession("m", "1", 0.0, heartbeat_interval=50.0, silence_timeout=30.0)
    session.receive(encode([GREETING]), 10.0)
    assert session.silence(25.0) == 15.0
    session.extend_silence_deadline(60.0, 85.0)
    assert session.silence(85.0) == 15.0
    session.tick(99.9)
    with pytest.raises(PeerSilent):
        session.tick(100.0)


def test_the_silence_of_a_peer_is_never_negative() -> None:
    session = MasterSession("m", "1", 0.0, heartbeat_interval=50.0, silence_timeout=30.0)
    session.receive(encode([GREETING]), 80.0)
    session.extend_silence_deadline(60.0, 80.0)
    assert session.silence(81.0) == 1.0


def test_silence_ends_the_session_and_any_message_is_a_sign_of_life() -> None:
    session = MasterSession("m", "1", 100.0, heartbeat_interval=50.0, silence_timeout=30.0)
    assert session.deadline() == 130.0
    session.receive(encode([GREETING]), 120.0)
    assert session.deadline() == 150.0
    session.tick(149.9)
    session.receive(encode([Drain("later")]), 149.9)
    session.tick(179.8)
    with pytest.raises(PeerSilent, match=r"30\.1 s"):
        session.tick(180.0)
    assert session.close_reason == "no message from the peer for 30.1 s"
    session.tick(999.0)
    assert session.deadline() == math.inf


# Bodies and credit


def test_a_sender_stops_at_the_window_and_goes_on_when_a_quarter_of_it_has_been_taken() -> None:
    link = open_link()
    call = answering(link)
    link.worker.send(call, bytes(2 * WINDOW))
    received = link.settle()[0]
    assert [len(event.data) for event in received] == [PIECE] * 4
    assert link.worker.queued(call) == WINDOW
    assert not link.master.grant(call, WINDOW // 4 - 1)
    assert written(link.master) == []
    assert link.master.grant(call, 1)
    assert [len(event.data) for event in link.settle()[0]] == [PIECE]
    assert link.worker_spy.outstanding[call] == WINDOW
    assert link.worker.queued(call) == WINDOW - PIECE


def test_small_grants_are_joined() -> None:
    link = open_link()
    call = answering(link)
    link.worker.send(call, bytes(PIECE))
    link.settle()
    for _ in range(64):
        link.master.grant(call, 1024)
    assert written(link.master) == [Grant(call, PIECE)]


def test_a_chunk_is_split_only_if_it_is_longer_than_a_piece() -> None:
    link = open_link()
    call = answering(link)
    chunk = bytes(60_000)
    for _ in range(6):
        link.worker.send(call, chunk)
    # Four have 240 000 bytes; the fifth waits although there is credit for a part of it.
    assert [len(event.data) for event in link.settle()[0]] == [60_000] * 4
    link.master.grant(call, 120_000)
    assert [len(event.data) for event in link.settle()[0]] == [60_000] * 2


def test_queued_chunks_are_sent_together() -> None:
    link = open_link()
    call = answering(link)
    for word in (b"a", memoryview(b"xbx")[1:2], b"", b"c"):
        link.worker.send(call, word)
    assert written(link.worker) == [Data(call, b"abc")]


def test_the_rest_of_a_long_chunk_is_sent_with_its_neighbours() -> None:
    link = open_link()
    call = answering(link)
    link.worker.send(call, bytes(PIECE + 1))
    link.worker.send(call, b"end")
    assert written(link.worker) == [Data(call, bytes(PIECE))]
    assert written(link.worker) == [Data(call, b"\x00end")]


def test_an_empty_piece_of_an_answer_is_a_sign_of_life_that_needs_no_credit() -> None:
    link = open_link()
    call = answering(link)
    link.worker.send(call, b"")
    assert link.settle()[0] == [Data(call, b"")]
    link.worker.send(call, bytes(WINDOW))
    link.settle()
    link.worker.send(call, b"")
    assert link.settle()[0] == [Data(call, b"")]
    link.worker.send(call, b"x")
    link.worker.send(call, b"")
    link.worker.done(call)
    link.master.grant(call, WINDOW)
    assert link.settle()[0] == [Data(call, b"x"), Done(call)]
    assert link.worker.idle


def test_signs_of_life_do_not_pile_up_behind_bytes_that_wait_for_credit() -> None:
    link = open_link()
    call = answering(link)
    link.worker.send(call, bytes(WINDOW + 1))
    link.settle()
    tracemalloc.start()
    try:
        for _ in range(10_000):
            link.worker.send(call, b"")
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


def test_batches_report_the_bytes_that_they_carry_of_each_call() -> None:
    link = open_link()
    one, two = answering(link), answering(link)
    link.worker.send(one, b"abc")
    link.worker.send(two, b"de")
    link.worker.done(two)
    batch = link.worker.next_message()
    assert batch is not None
    assert batch.sent == ((one, 3), (two, 2))
    assert decode(batch.data) == [Data(one, b"abc"), Data(two, b"de"), Done(two)]


def test_data_beyond_the_credit_ends_the_session() -> None:
    link = open_link()
    call = answering(link)
    for _ in range(3):
        link.master.receive(encode([Data(call, bytes(PIECE))]), 0.0)
    link.master.receive(encode([Data(call, bytes(PIECE - 1))]), 0.0)
    with pytest.raises(ProtocolError, match=f"call {call}: 2 bytes of data, but credit for 1"):
        link.master.receive(encode([Data(call, b"xx")]), 0.0)


def test_credit_beyond_the_window_ends_the_session() -> None:
    link = open_link()
    call = answering(link)
    link.worker.send(call, b"abc")
    link.worker_writes()
    with pytest.raises(ProtocolError, match=f"call {call}: credit beyond the window"):
        link.worker.receive(encode([Grant(call, 4)]), 0.0)


def test_more_cannot_be_taken_than_was_received() -> None:
    link = open_link()
    call = answering(link)
    link.worker.send(call, b"abc")
    link.settle()
    for count in (4, -1):
        with pytest.raises(RuntimeError, match=f"{count} bytes taken of 3"):
            link.master.grant(call, count)
    link.master.grant(call, 3)


@pytest.mark.parametrize(
    "pieces", [[Data(1, b"1234")], [Data(1, b"12", True)], [Data(1, b"12"), Data(1, b"", True)]]
)
def test_a_body_of_another_size_than_announced_ends_the_session(pieces: list[Message]) -> None:
    worker = open_link().worker
    with pytest.raises(ProtocolError, match="does not have the announced size"):
        worker.receive(encode([request(1, size=3), *pieces]), 0.0)


def test_a_body_of_another_size_than_announced_is_not_even_sent() -> None:
    link = open_link()
    call = link.master.open(endpoint="e", kind="chat", model="m", size=3)
    link.master.send_body(call, b"12")
    for data, last in ((b"34", False), (b"", True), (b"34", True)):
        with pytest.raises(RuntimeError, match="does not have the announced size"):
            link.master.send_body(call, data, last=last)
    link.master.send_body(call, b"3", last=True)
    assert link.settle()[1][1:] == [Data(call, b"123", True)]


def test_an_empty_body_is_one_last_piece() -> None:
    link = open_link()
    call = link.master.open(endpoint="e", kind="chat", model="m", size=0)
    link.master.send_body(call, b"")
    assert [type(event) for event in link.settle()[1]] == [ForwardRequest]
    link.master.send_body(call, b"", last=True)
    assert link.settle()[1] == [Data(call, b"", True)]
    assert link.worker.state(call) is State.WAITING


# Order


def test_each_call_gets_turns_however_much_the_others_send() -> None:
    link = open_link()
    greedy = answering(link)
    modest = [answering(link) for _ in range(4)]
    link.worker.send(greedy, bytes(WINDOW))
    for call in modest:
        link.worker.send(call, b"token")
    first = link.worker.next_message()
    second = link.worker.next_message()
    assert first is not None
    assert second is not None
    assert dict(first.sent) == {greedy: PIECE}
    assert dict(second.sent) == dict.fromkeys(modest, 5) | {greedy: PIECE}
    # Turns are kept from one batch to the next.
    for call in modest:
        link.worker.send(call, bytes(PIECE))
    order = []
    while (batch := link.worker.next_message()) is not None:
        order += [call for call, _ in batch.sent]
    assert order[: len(modest) + 1] in ([greedy, *modest], [*modest, greedy])


def test_a_cancel_overtakes_all_bodies() -> None:
    link = open_link()
    doomed = link.master.open(endpoint="e", kind="chat", model="m")
    other = link.master.open(endpoint="e", kind="chat", model="m")
    for call in (doomed, other):
        link.master.send_body(call, bytes(10 * WINDOW), last=True)
    link.master_writes()
    link.master.cancel(doomed, "client left")
    before = len(link.master_spy.messages)
    link.master_writes()
    assert link.master_spy.messages[before] == Cancel(doomed, "client left")
    link.settle()
    bodies = [message.call for message in link.master_spy.messages[before:] if isinstance(message, Data)]
    assert bodies
    assert set(bodies) == {other}


def test_a_head_precedes_its_data_and_its_end_follows_them() -> None:
    link = open_link()
    call = link.open()
    link.settle()
    link.worker.respond(call, 200, "text/plain", [("x-a", "1")])
    link.worker.send(call, b"abc")
    link.worker.done(call)
    assert link.worker.queued(call) == 3
    events = link.settle()[0]
    assert events == [
        ForwardResponse(call, 200, "text/plain", (("x-a", "1"),)),
        Data(call, b"abc"),
        Done(call),
    ]
    assert link.master.idle
    assert link.worker.idle


def test_a_failure_comes_after_what_was_produced_before_it() -> None:
    link = open_link()
    call = answering(link)
    link.worker.send(call, bytes(WINDOW + 10))
    link.worker.fail(call, ApiError(500, "broke"))
    assert link.worker.open_calls == ()
    assert link.worker.state(call) is State.ENDED
    assert sum(len(event.data) for event in link.settle()[0]) == WINDOW
    assert not link.worker.idle
    link.master.grant(call, WINDOW)
    data, failed = link.settle()[0]
    assert (data, failed) == (Data(call, bytes(10)), Failed.of(call, ApiError(500, "broke")))
    assert link.worker.idle


def test_after_a_cancel_an_end_that_waits_for_credit_is_sent_at_once() -> None:
    link = open_link()
    call = answering(link)
    link.worker.send(call, bytes(2 * WINDOW))
    link.worker.done(call)
    link.settle()
    link.master.cancel(call, "client left")
    to_master, to_worker = link.settle()
    assert to_worker == []
    assert to_master == [Done(call)]
    assert link.master.idle
    assert link.worker.idle


def test_a_cancelled_call_has_no_event_but_its_end_and_no_credit_is_granted_for_its_data() -> None:
    link = open_link()
    call = answering(link, None)
    link.worker.send(call, b"on its way")
    link.worker_writes()
    link.worker.send(call, b"never sent")
    link.master.cancel(call, "client left")
    link.master.cancel(call, "twice")
    link.master_writes()
    assert link.worker_reads() == [Cancel(call, "client left")]
    assert link.worker.queued(call) == 0
    assert link.settle() == ([], [])
    assert link.master.open_calls == (call,)
    link.worker.send(call, b"dropped")
    assert link.worker.queued(call) == 0
    assert written(link.worker) == []
    link.worker.done(call)
    assert link.settle()[0] == [Done(call)]
    assert link.master.idle
    assert link.worker.idle
    link.master.cancel(call, "too late")
    assert link.master.idle


def test_a_body_is_dropped_when_the_answer_ends_before_it() -> None:
    link = open_link()
    call = link.open(bytes(3 * WINDOW))
    link.settle()
    assert link.master.queued(call) == 2 * WINDOW
    link.worker.fail(call, ApiError(413, "too large"))
    assert [type(event) for event in link.settle()[0]] == [Failed]
    assert link.master.queued(call) == 0
    link.master.send_body(call, b"more", last=True)
    assert link.master.idle
    assert link.worker.idle


# Limits


def test_a_request_that_is_too_large_to_forward_is_refused_and_opens_no_call() -> None:
    master = open_link().master
    for field, value in (("headers", {"a": "x" * 40_000}), ("request_id", "\ud800"), ("content_type", "a\n")):
        extra: Any = {field: value}
        with pytest.raises(InvalidRequest, match="cannot be forwarded"):
            master.open(endpoint="e", kind="chat", model="m", **extra)
    assert master.idle
    assert master.open(endpoint="e", kind="chat", model="m") == 1


def test_timeouts_are_forwarded_and_infinite_ones_left_out() -> None:
    link = open_link()
    link.master.open(endpoint="e", kind="chat", model="m", timeout=2.5, budget=-0.1)
    link.master.open(endpoint="e", kind="chat", model="m")
    one, two = link.settle()[1]
    assert (one.timeout, one.budget) == (2.5, 0.0)
    assert (two.timeout, two.budget) == (None, None)


def test_an_answer_that_cannot_be_sent_can_still_fail() -> None:
    link = open_link()
    call = link.open()
    link.settle()
    with pytest.raises(ValueError, match="headers"):
        link.worker.respond(call, 200, "text/plain", [("x", "a\r\nb: c")])
    assert link.worker.state(call) is State.WAITING
    link.worker.fail(call, ApiError(500, "sorry"))
    assert [type(event) for event in link.settle()[0]] == [Failed]


def test_the_calls_of_a_link_are_limited() -> None:
    link = open_link()
    for _ in range(MAX_CALLS):
        link.open()
    with pytest.raises(Overloaded):
        link.open()
    link.settle()
    assert len(link.worker.open_calls) == MAX_CALLS
    with pytest.raises(ProtocolError, match=f"more than {MAX_CALLS} open calls"):
        link.worker.receive(encode([request(MAX_CALLS + 1)]), 0.0)


def test_calls_that_wait_only_for_credit_count_as_open() -> None:
    link = open_link()
    for _ in range(10):
        call = answering(link)
        link.worker.send(call, bytes(WINDOW + 1))
        link.worker.done(call)
    link.settle()
    assert link.worker.open_calls == ()
    for call in range(11, MAX_CALLS + 1):
        link.worker.receive(encode([request(call)]), 0.0)
    with pytest.raises(ProtocolError, match="open calls"):
        link.worker.receive(encode([request(MAX_CALLS + 1)]), 0.0)


def test_a_peer_that_sends_and_never_reads_ends_the_session() -> None:
    link = open_link()
    register = encode([RegisterModel("m", "chat", "o", 0)])
    for _ in range(MAX_BACKLOG // 8100):
        link.master.model_rejected("m", "x" * 8000)
    link.master.receive(register, 0.0)
    for _ in range(100):
        link.master.model_rejected("m", "x" * 8000)
    with pytest.raises(ProtocolError, match="does not read"):
        link.master.receive(register, 0.0)


def test_a_link_that_is_not_written_to_takes_no_more_calls() -> None:
    link = open_link()
    # With the other fields, a message has less than 30 000 bytes.
    headers = {"a": "x" * 29_700}
    for _ in range(MAX_BACKLOG // 4 // 30_000 + 2):
        link.master.open(endpoint="e", kind="chat", model="m", headers=headers)
    with pytest.raises(Overloaded):
        link.open()
    link.settle()
    assert link.open()


def test_numbers_only_grow() -> None:
    link = open_link()
    for _ in range(3):
        call = answering(link)
        link.worker.done(call)
        link.settle()
    assert call == 3
    with pytest.raises(ProtocolError, match="ForwardRequest for call 2, which is ENDED"):
        link.worker.receive(encode([request(2)]), 0.0)


def test_ended_calls_take_no_memory() -> None:
    link = open_link()
    for _ in range(100):
        call = answering(link)
        link.worker.send(call, b"x")
        link.worker.done(call)
        link.settle()
    assert link.master.idle
    assert link.worker.idle
    assert link.master.open_calls == link.worker.open_calls == ()


def test_a_limit_of_zero_still_sends_something() -> None:
    assert [type(message) for message in written(MasterSession("m", "1", 0.0), 0)] == [Handshake]


def test_a_batch_holds_control_messages_up_to_its_limit() -> None:
    link = open_link()
    for _ in range(20):
        link.master.model_rejected("m", "x" * 1000)
    assert len(written(link.master, 2500)) == 3
    assert len(written(link.master, 10**9)) == 17


# The end


def test_after_an_error_the_masters_open_calls_are_those_without_an_event_of_their_end() -> None:
    link = open_link()
    ended, going, reported = answering(link), answering(link), answering(link)
    link.master.receive(encode([Done(reported)]), 0.0)
    with pytest.raises(ProtocolError, match="call 99"):
        link.master.receive(encode([Done(ended), Data(going, b"x"), Done(99)]), 0.0)
    assert sorted(link.master.open_calls) == [ended, going]


def test_after_an_error_the_workers_open_calls_are_those_with_an_event_of_their_beginning() -> None:
    link = open_link()
    call = answering(link)
    with pytest.raises(ProtocolError, match="call 99"):
        link.worker.receive(encode([request(call + 1), Cancel(99, "")]), 0.0)
    assert link.worker.open_calls == (call,)


def test_a_batch_with_a_malformed_message_has_no_effect() -> None:
    link = open_link()
    call = answering(link)
    with pytest.raises(ProtocolError):
        link.master.receive(encode([Done(call)])[:-1], 0.0)
    assert link.master.open_calls == (call,)


def test_a_closed_session_sends_nothing_receives_nothing_and_ignores_what_is_still_sent() -> None:
    link = open_link()
    call, other = answering(link, None), answering(link, None)
    link.worker.send(call, bytes(2 * WINDOW))
    for session in (link.master, link.worker):
        session.close("cut off")
        session.close("later")
        assert session.close_reason == "cut off"
        session.drain("x")
        session.grant(call, 5)
        assert session.next_message() is None
        assert session.queued(call) == 0
        assert sorted(session.open_calls) == [call, other]
        with pytest.raises(ProtocolError, match="cut off"):
            session.receive(encode([Heartbeat()]), 1.0)
    link.master.send_body(call, b"x", last=True)
    link.master.cancel(call, "x")
    link.master.model_registered("m")
    link.master.shut_down("x")
    with pytest.raises(WorkerLost, match=r"'w' .* cut off"):
        link.open()
    link.worker.respond(call, 200, "text/plain")
    link.worker.send(call, b"x")
    link.worker.done(call)
    link.worker.fail(other, ApiError(500, "x"))
    link.worker.register(ModelInfo("m", "chat"))
    assert link.worker.open_calls == ()
    assert link.master.next_message() is None
    assert link.worker.next_message() is None


# Before a peer is admitted


def test_nothing_of_a_peer_that_is_not_admitted_is_decoded_beyond_its_handshake() -> None:
    first = b"\x92" + encode([GREETING])[1:] + b"\x92\x09\x81\xa4call\xa1x"
    refused = MasterSession("m", "1.0", 0.0, admit=lambda _: False)
    assert refused.receive(first, 0.0) == [GREETING]
    assert refused.receive(b"anything at all", 0.0) == []
    assert refused.receive(encode([GREETING, Heartbeat()]), 0.0) == []
    admitted = MasterSession("m", "1.0", 0.0)
    with pytest.raises(ProtocolError, match="Done: expected int, got str in call"):
        admitted.receive(first, 0.0)


def test_what_comes_with_the_handshake_of_a_peer_that_is_admitted_is_received() -> None:
    seen: list[Handshake] = []

    def admit(handshake: Handshake) -> bool:
        seen.append(handshake)
        return True

    master = MasterSession("m", "1.0", 0.0, admit=admit)
    assert master.receive(encode([GREETING, Heartbeat(1)]), 0.0) == [GREETING, Heartbeat(1)]
    assert seen == [GREETING]


def test_a_peer_with_another_magic_number_is_not_asked_for_admission() -> None:
    master = MasterSession("m", "1.0", 0.0, admit=pytest.fail)
    with pytest.raises(ProtocolError, match="magic"):
        master.receive(encode([Handshake(7, 1, 1, "w", "1.0")]), 0.0)
