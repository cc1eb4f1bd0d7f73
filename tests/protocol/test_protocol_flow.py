"""Flow of bodies: no call starves, and the memory that a body takes does not depend on its size."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, settings, strategies as st
from protocol_link import open_link

from trio_cluster.protocol import PIECE, WINDOW, Data

SIZES = st.sampled_from([1, 200, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE - 1, WINDOW])


# Memory


def peak_of_a_body(size: int, *, up: bool) -> tuple[int, int]:
    """Move a body over a link; return the peak of what was allocated, and the bytes that arrived."""
    link = open_link()
    body = bytes(size)
    call = link.open(None if up else b"")
    link.settle()
    if not up:
        link.worker.respond(call, 200, "audio/wav")
        link.settle()
    arrived = 0
    tracemalloc.start()
    try:
        if up:
            link.master.send_body(call, body, last=True)
        else:
            link.worker.send(call, body)
        sender, receiver = (link.master, link.worker) if up else (link.worker, link.master)
        while True:
            while (batch := sender.next_message()) is not None:
                for event in receiver.receive(batch.data, 0.0):
                    assert isinstance(event, Data)
                    arrived += len(event.data)
                    receiver.grant(call, len(event.data))
            back = receiver.next_message()
            if back is None:
                return tracemalloc.get_traced_memory()[1], arrived
            sender.receive(back.data, 0.0)
    finally:
        tracemalloc.stop()


def test_memory_stays_flat_however_large_a_body_is() -> None:
    for up in (True, False):
        peak, arrived = peak_of_a_body(32 * 1024 * 1024, up=up)
        assert arrived == 32 * 1024 * 1024
        # A piece, the batch that carries it, and the same once more at the other end.
        assert peak < 2 * WINDOW


def test_a_consumer_that_takes_nothing_costs_one_window() -> None:
    link = open_link()
    call = link.open()
    link.settle()
    link.worker.respond(call, 200, "audio/wav")
    link.worker.send(call, bytes(32 * 1024 * 1024))
    received = sum(len(event.data) for event in link.settle()[0] if isinstance(event, Data))
    assert received == WINDOW
    assert link.worker.next_message() is None


# Fairness


@given(st.lists(SIZES, min_size=2, max_size=8), st.sampled_from([1, 300, PIECE]))
@settings(deadline=None)
def test_no_call_gets_a_second_turn_before_the_others_have_had_one(sizes: list[int], limit: int) -> None:
    link = open_link()
    calls = [link.open() for _ in sizes]
    link.settle()
    for call in calls:
        link.worker.respond(call, 200, "text/plain")
    link.settle()
    left = {}
    for call, size in zip(calls, sizes, strict=True):
        link.worker.send(call, bytes(size))
        left[call] = min(size, WINDOW)
    turns: list[int] = []
    while (batch := link.worker_writes(limit)) is not None:
        turns.extend(call for call, _ in batch.sent)
    while turns:
        waiting = {call for call, size in left.items() if size > 0}
        assert set(turns[: len(waiting)]) == waiting
        for call in waiting:
            left[call] -= PIECE
        turns = turns[len(waiting) :]
