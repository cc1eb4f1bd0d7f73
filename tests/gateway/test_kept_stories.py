"""Which stories are kept: the last ones, within a number and a size; nothing of a story keeps what was in a request."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest

from trio_cluster.core.answer import Done, Failed, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.request import Request
from trio_cluster.core.story import NOTES_MAX, TIMES
from trio_cluster.errors import ApiError
from trio_cluster.gateway import stories as module
from trio_cluster.gateway.context import RequestContext
from trio_cluster.gateway.stories import Stories
from trio_cluster.options import ClusterServerOptions
from trio_cluster.routing.cost import LeastCost, Placement
from trio_cluster.routing.health import Health
from trio_cluster.routing.router import Router


def ask(stories: Stories, request_id: str = "r1", **fields: Any) -> tuple[RequestContext, Call]:
    """Return the context of a request that has one call."""
    context = RequestContext([(b"x-request-id", request_id.encode())], path="/v1/chat/completions")
    context.request = Request(
        "chat.completions", "chat", "m", b"secret words", request_id=request_id, **fields
    )
    call = Call(context.request, served_by="w1")
    context.add_call(call)
    stories.live[context] = None
    return context, call


def finish(call: Call) -> None:
    call.put(Head())
    call.put(Done(Usage(7, 5)))
    call.release()


def test_the_last_ones_are_kept_within_their_number() -> None:
    options = ClusterServerOptions(stories=3)
    stories = Stories(options)
    for number in range(5):
        context, call = ask(stories, f"r{number}")
        finish(call)
        stories.end(context, left=False)
    assert [story.request_id for _, story in stories.over] == ["r2", "r3", "r4"]
    assert not stories.live
    assert stories.size == sum(size for size, _ in stories.over)
    options.stories = 1
    context, call = ask(stories, "r5")
    finish(call)
    stories.end(context, left=False)
    assert [story.request_id for _, story in stories.over] == ["r5"]
    options.stories = 0
    context, call = ask(stories, "r6")
    assert stories.find("r6") == stories.find("r5") == []
    stories.end(context, left=False)
    assert (list(stories.over), stories.size, stories.live) == ([], 0, {})


def test_the_end_of_a_request_is_recorded_once() -> None:
    stories = Stories(ClusterServerOptions())
    context, _ = ask(stories)
    stories.end(context, left=True)
    stories.end(context, left=False)
    assert [story.left for _, story in stories.over] == [True]


def test_stories_of_one_id_are_found_oldest_first() -> None:
    stories = Stories(ClusterServerOptions())
    for left in (True, False):
        context, call = ask(stories)
        finish(call)
        stories.end(context, left=left)
    ask(stories)
    ask(stories, "another")
    assert [(story.left, story.ended_at >= 0) for story in stories.find("r1")] == [
        (True, True),
        (False, True),
        (False, False),
    ]


def test_work_that_goes_on_completes_the_story() -> None:
    stories = Stories(ClusterServerOptions())
    context, call = ask(stories)
    context.cancel_calls("client left")
    stories.end(context, left=True)
    ((facts,),) = [story.attempts for story in stories.find("r1")]
    assert facts.cancelled == "client left"
    assert facts.released_at < 0
    call.worker_times = {"started": 5}
    call.queued_for = 3.0
    call.release()
    assert facts.released_at >= facts.ended_at
    assert (facts.times, facts.queued_for) == ({"started": 5}, 3.0)


def test_a_story_keeps_neither_the_request_nor_its_call() -> None:
    stories = Stories(ClusterServerOptions())
    context, call = ask(stories)
    call.cancel("enough")
    stories.end(context, left=False)
    left, seen = [stories.over], set()
    while left:
        each = left.pop()
        if id(each) not in seen and not isinstance(each, type):
            seen.add(id(each))
            assert not isinstance(each, (RequestContext, Call, ByteChannel, Request, ApiError))
            left += gc.get_referents(each)
    assert "secret" not in repr(stories.over)


class _Replica:
    name = ""
    load = 0.0
    elsewhere = 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.health = Health()


#: All stories share the names of replicas, which are as long as they can be.
REPLICAS: Any = [_Replica(f"{'w' * 500}{index}") for index in range(100)]


def largest(stories: Stories, number: int) -> None:
    """Record a story with as much in it as there can be."""
    name = chr(ord("a") + number) * 500
    context, call = ask(stories, f"r{number:0127}")
    context.path = "/" + name
    context.error = module.error_facts(ApiError(500, name * 20, code=name))
    for index in range(1, 4):
        again = Call(context.request, served_by=name + str(index))
        context.add_call(again)
    for call in context.calls:
        policy = LeastCost(clock=lambda: 0.0)
        policy.pick(REPLICAS, context.request)
        call.tracker = policy.placement
        for _ in range(NOTES_MAX + 10):
            call.note(name[:100] + str(number))
        call.why = name * 2
        call.put(Failed(ApiError(500, name * 10, code=name)))
        call.worker_times = dict.fromkeys(TIMES, 2**50 + number)
        call.release()
    stories.end(context, left=False)


def test_the_size_is_bounded_and_counted_for_the_largest_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = Stories(ClusterServerOptions())
    largest(stories, 0)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(1, 11):
            largest(stories, number)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(stories.over[0][1].attempts[0].candidates) == 32
    assert len(stories.over[0][1].attempts[0].notes) == NOTES_MAX
    assert taken < 2 * stories.size
    monkeypatch.setattr(module, "MAX_BYTES", stories.size // 2)
    largest(stories, 11)
    assert stories.size <= module.MAX_BYTES
    assert stories.over[-1][1].request_id.endswith("11")


def test_ten_thousand_usual_stories_are_within_the_size() -> None:
    stories = Stories(ClusterServerOptions())
    for number in range(10_000):
        context, call = ask(stories, str(number))
        finish(call)
        stories.end(context, left=False)
    assert len(stories.over) == 10_000
    assert stories.size < module.MAX_BYTES


def test_the_chosen_replica_is_among_the_candidates_that_are_kept() -> None:
    policy = LeastCost(clock=lambda: 0.0)
    replicas: Any = [_Replica(f"w{number}") for number in range(100)]
    router, request = Router(policy), Request("chat.completions", "chat", "m", b"{}")
    assert router.live == {}
    assert policy.pick(replicas, request) is not None
    placement = policy.placement
    assert type(placement) is Placement
    stories = Stories(ClusterServerOptions())
    context, call = ask(stories)
    call.tracker, call.served_by = placement, "w77"
    placement.candidates[77] = ("w77", 999.0, 1)
    stories.end(context, left=False)
    candidates = stories.find("r1")[0].attempts[0].candidates
    assert len(candidates) == 32
    assert ("w77", 999.0, 1) in candidates
