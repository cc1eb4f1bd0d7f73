"""The two seams of tracing, which need no SDK: what opens the traces of calls, and what gets requests that are over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
from scripted_replica import Scripted
from trio.testing import MockClock

from trio_cluster import ChatRequest, ClusterServer, from_asyncio
from trio_cluster.core.answer import Failed, Head
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.core.story import StoryFacts
from trio_cluster.errors import Overloaded
from trio_cluster.gateway.context import RequestContext
from trio_cluster.gateway.stories import Stories
from trio_cluster.options import ClusterServerOptions
from trio_cluster.routing.router import Router
from trio_cluster.testing import open_cluster, worker


class Trace:
    """The trace of a call, for a test."""

    is_exported = True

    def __init__(self, root: object, number: int) -> None:
        self.root = root
        self.number = number
        self.entered = 0
        self.errors: list[BaseException] = []

    def enter(self) -> None:
        self.entered += 1

    def failed(self, error: BaseException) -> None:
        self.errors.append(error)


class Tracer:
    """Numbers the calls."""

    def __init__(self) -> None:
        self.opened: list[Trace] = []

    def open(self, request: Request) -> Request:
        root = object() if request.trace is None else request.trace.root  # type: ignore[attr-defined]
        self.opened.append(Trace(root, len(self.opened)))
        headers = {**request.headers, "traceparent": f"of call {len(self.opened)}"}
        return attrs.evolve(request, headers=headers, trace=self.opened[-1])


def two_replicas() -> tuple[Router, Tracer]:
    router = Router()
    router.tracer = tracer = Tracer()
    for name in ("w1", "w2"):
        router.catalog.add(ModelInfo("m", "chat"), Scripted(name), replicate=True)
    return router, tracer


async def test_every_attempt_at_a_request_has_a_trace_below_that_of_the_request() -> None:
    router, tracer = two_replicas()
    first = router.open(Request("chat.completions", "chat", "m", b"{}", headers={"traceparent": "client's"}))
    first.put(Failed(Overloaded("no"), retryable=True))
    second = router.reopen(first)
    assert second is not None
    assert [call.request.trace for call in (first, second)] == tracer.opened
    assert [call.request.headers["traceparent"] for call in (first, second)] == ["of call 1", "of call 2"]
    assert tracer.opened[0].root is tracer.opened[1].root
    another = router.open(Request("chat.completions", "chat", "m", b"{}"))
    assert another.request.trace is tracer.opened[2]
    assert tracer.opened[2].root is not tracer.opened[0].root


async def test_the_next_name_of_an_alias_has_the_trace_of_the_request() -> None:
    router, tracer = two_replicas()
    router.catalog.add(ModelInfo("n", "chat"), Scripted("w1"))
    following = Request("chat.completions", "chat", "n", b"{}", alias="a")
    call = router.open(
        Request("chat.completions", "chat", "m", b"{}", alias="a", otherwise=lambda: following)
    )
    call.put(Head())
    assert router.open_following(call, "it is late") is not None
    assert tracer.opened[0].root is tracer.opened[1].root


async def answer(request: ChatRequest) -> AsyncIterator[str]:
    yield request.headers["traceparent"]


def answer_in_thread(request: ChatRequest) -> str:
    return str(request.headers["traceparent"])


async def fail(request: ChatRequest) -> str:
    raise RuntimeError(request.headers["traceparent"])


@pytest.mark.parametrize("where", ["master", "worker"])
async def test_a_handler_runs_in_its_trace_whose_context_is_in_its_headers(
    where: str, autojump_clock: MockClock
) -> None:
    async with open_cluster() as cluster:
        server: ClusterServer = cluster.master.server if where == "master" else worker("w1")
        for name, handler in (("a", answer), ("t", answer_in_thread), ("aio", from_asyncio(answer))):
            server.register_chat(name, handler)
        if where == "worker":
            await cluster.start_worker(server)
        server.router.tracer = tracer = Tracer()
        for number, model in enumerate(("a", "t", "aio"), 1):
            response = await cluster.client(traceparent="client's").chat(model, stream=False)
            assert response.json()["choices"][0]["message"]["content"] == f"of call {number}"
        assert [trace.entered for trace in tracer.opened] == [1, 1, 1]


async def test_a_trace_gets_the_error_of_a_handler(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        server = worker("w1")
        server.register_chat("m", fail)
        await cluster.start_worker(server)
        server.router.tracer = tracer = Tracer()
        assert (await cluster.client().chat("m", stream=False)).status == 500
    assert [str(error) for trace in tracer.opened for error in trace.errors] == ["of call 1"]


async def test_a_master_learns_whether_the_worker_exports_the_handler_s_span(
    autojump_clock: MockClock,
) -> None:
    async with open_cluster() as cluster:
        server = worker("w1")
        server.register_chat("m", answer)
        await cluster.start_worker(server)
        seen: list[StoryFacts] = []
        for traced in (False, True):
            server.router.tracer = Tracer() if traced else None
            headers = {"traceparent": "x", "x-request-id": f"r{traced}"}
            await cluster.client(**headers).chat("m", stream=False)
            assert cluster.master.server.stories is not None
            seen += cluster.master.server.stories.find(f"r{traced}")
    assert [story.attempts[0].times.get("traced") for story in seen] == [None, 1]


class RequestTracer:
    """Takes requests that are over, and samples those with an id that begins with ``s``."""

    def __init__(self) -> None:
        self.over: list[tuple[str, Any, StoryFacts]] = []

    def trace_of(self, context: RequestContext) -> Any:
        return "trace" if context.request_id.startswith("s") else None

    def end(self, context: RequestContext, trace: Any, story: StoryFacts) -> None:
        self.over.append((context.request_id, trace, story))


@pytest.mark.parametrize("kept", [0, 10])
def test_the_tracer_gets_every_request_that_is_over_once(kept: int) -> None:
    stories = Stories(ClusterServerOptions(stories=kept))
    stories.tracer = tracer = RequestTracer()
    for request_id in ("sampled", "not sampled"):
        context = RequestContext([(b"x-request-id", request_id.encode())], path="/v1/chat/completions")
        stories.live[context] = None
        stories.end(context, left=True)
        stories.end(context, left=True)
    (first, trace, story), (second, no_trace, other) = tracer.over
    assert (first, trace, second, no_trace) == ("sampled", "trace", "not sampled", None)
    for each in (story, other):
        assert each.left
        assert each.ended_at >= 0
    assert len(stories.over) == min(kept, 2)
    assert trio.lowlevel is not None
