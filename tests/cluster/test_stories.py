"""What the story of a request says about causes that were planted: a queue, a slow replica, a slow client, losses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
from trio.testing import MockClock

from trio_cluster.testing import SimulatedCluster, SimulatedNode, open_cluster, worker

LATENCY: Final = 0.05
OPTIONS: Final[dict[str, Any]] = {
    "max_concurrency": 1,
    "queue_timeout": 60.0,
    "on_conflict": "replicate",
    "default_timeout": 60.0,
    "keepalive": 0.0,
}


class Stage:
    """A master, its workers, and clients whose requests have numbers."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.cluster = cluster
        self.piece = "word "

    async def add(
        self, name: str, model: str = "m", *, first: float = 1.0, rest: float = 1.0, slots: int | None = None
    ) -> SimulatedNode:
        server = worker(name, **OPTIONS)

        @server.chat(model, max_concurrency=slots)
        async def handler(request: Any) -> AsyncIterator[str]:
            await trio.sleep(first)
            for _ in range(4):
                yield self.piece
            await trio.sleep(rest)
            yield "end"

        return await self.cluster.start_worker(server)

    async def ask(self, request_id: str, model: str = "m", **fields: Any) -> None:
        await self.cluster.client(**{"x-request-id": request_id}).chat(model, **fields)

    async def story(self, request_id: str) -> Any:
        response = await self.cluster.client("operator").get(f"/cluster/requests/{request_id}")
        assert response.status == 200
        return response.json()


@asynccontextmanager
async def stage(**options: Any) -> AsyncIterator[Stage]:
    async with open_cluster(latency=LATENCY, **(OPTIONS | options)) as cluster:
        yield Stage(cluster)


def texts(story: Any, word: str = "") -> list[str]:
    return [f"+{step['at']:.3f} {step['text']}" for step in story["steps"] if word in step["text"]]


async def test_a_queue_is_named_with_its_seconds(autojump_clock: MockClock) -> None:
    async with stage() as at, trio.open_nursery() as nursery:
        await at.add("w")
        nursery.start_soon(at.ask, "r1")
        await trio.sleep(0.5)
        nursery.start_soon(at.ask, "r2")
        await trio.sleep(3)
        waiting = await at.story("r2")
        await trio.sleep(3)
        story = await at.story("r2")
    assert waiting["outcome"] == "running"
    # The first one has the slot for two seconds; it came half a second before.
    assert "+1.550 waited 1.500 s in the queue of worker 'w'" in texts(story)
    assert story["attempts"][0]["queued_for"] == pytest.approx(1.5, abs=1e-5)
    assert story["attempts"][0]["started"] == pytest.approx(1.55, abs=1e-5)
    assert story["slowest"] == "1.500 of 3.600 s in the queue of worker 'w'"


async def test_the_queue_of_a_model_is_told_from_that_of_its_worker(autojump_clock: MockClock) -> None:
    async with stage() as at, trio.open_nursery() as nursery:
        await at.add("w", slots=1)
        nursery.start_soon(at.ask, "r1")
        await trio.sleep(0.5)
        await at.ask("r2")
        story = await at.story("r2")
    assert texts(story, "queue") == ["+1.550 waited 1.500 s in the queue of model 'm'"]


async def test_a_slow_replica_is_named(autojump_clock: MockClock) -> None:
    async with stage() as at:
        await at.add("slow", first=8.0)
        await at.ask("r1")
        story = await at.story("r1")
    assert story["slowest"] == "8.100 of 9.100 s for the first output of 'm' on worker 'slow'"
    assert texts(story)[3:6] == [
        "+0.050 the handler of 'm' began on worker 'slow'",
        "+8.100 first output, 8.100 s after it was sent to worker 'slow'",
        "+8.100 the response began with status 200",
    ]


async def test_a_slow_client_is_named(autojump_clock: MockClock) -> None:
    async with stage() as at:
        at.piece = "x" * 200_000
        await at.add("w", rest=0.0)
        client = at.cluster.client(**{"x-request-id": "r1"})
        async with client.open_chat("m") as response:
            await trio.sleep(20)
            await response.finish()
        await trio.sleep(1)
        story = await at.story("r1")
    assert story["outcome"] == "completed"
    (held,) = texts(story, "held back")
    assert "the client was slow to read" in held
    assert story["attempts"][0]["held_back"] > 15
    assert story["slowest"].endswith("for the client to read the answer")


async def test_a_retry_says_what_was_lost_and_where_it_went(autojump_clock: MockClock) -> None:
    async with stage() as at, trio.open_nursery() as nursery:
        nodes = {name: await at.add(name) for name in ("w1", "w2")}
        nursery.start_soon(at.ask, "r1")
        await trio.sleep(0.5)
        first = (await at.story("r1"))["attempts"][0]["node"]
        nodes[first].kill()
        await trio.sleep(5)
        story = await at.story("r1")
    (other,) = {"w1", "w2"} - {first}
    assert [(each["kind"], each["node"]) for each in story["attempts"]] == [
        ("first", first),
        ("retry", other),
    ]
    assert len(story["attempts"][0]["candidates"]) == 2
    assert story["attempts"][0]["error"].startswith(f"502 worker_lost: The worker '{first}' was lost")
    assert (story["outcome"], story["by"], story["status"]) == ("completed", "model", 200)
    assert any("tried once more, on worker" in text for text in texts(story))


async def test_an_alias_names_what_it_stands_for_and_what_was_tried(autojump_clock: MockClock) -> None:
    async with stage(aliases={"either": ["a", "b"]}) as at, trio.open_nursery() as nursery:
        node = await at.add("wa", "a")
        await at.add("wb", "b")
        nursery.start_soon(at.ask, "r1", "either")
        await trio.sleep(0.5)
        node.kill()
        await trio.sleep(5)
        story = await at.story("r1")
    assert story["model"] == "either"
    assert [(each["kind"], each["model"]) for each in story["attempts"]] == [
        ("first", "a"),
        ("next_name", "b"),
    ]
    assert texts(story, "stands for") == [
        "+0.000 sent to worker 'wa' as model 'a', which 'either' stands for: the only one"
    ]


async def test_a_cut_link_is_in_the_story_with_the_time_of_its_return(autojump_clock: MockClock) -> None:
    async with stage(resume_window=20.0) as at, trio.open_nursery() as nursery:
        node = await at.add("w", first=10.0)
        nursery.start_soon(at.ask, "r1")
        await trio.sleep(2)
        node.link.reset()
        await trio.sleep(15)
        story = await at.story("r1")
    assert story["outcome"] == "completed"
    cut, resumed = texts(story, "the link")
    assert cut == "+1.900 the link to worker 'w' was cut; it may be resumed"
    assert resumed.endswith("the link to worker 'w' was resumed")
    assert 1.9 < float(resumed.split()[0]) < 5


async def test_a_cancelled_request_says_when_its_handler_had_begun(autojump_clock: MockClock) -> None:
    async with stage() as at, trio.open_nursery() as nursery:
        await at.add("w", first=10.0)
        nursery.start_soon(at.ask, "r1")
        await trio.sleep(2)
        await at.cluster.client().post("/cluster/calls/r1/cancel", {"reason": "too long"})
        await trio.sleep(1)
        story = await at.story("r1")
    assert (story["outcome"], story["by"]) == ("cancelled", "operator")
    assert texts(story, "began") == [
        "+0.050 the handler of 'm' began on worker 'w'",
        "+2.000 the response began with status 503",
    ]
    assert story["attempts"][0]["stopped"] == pytest.approx(2.1)


async def test_a_worker_that_reports_no_times_has_a_story_as_well(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Older versions send none.
    monkeypatch.setattr("trio_cluster.cluster.forwarded._times", lambda call: {})
    async with stage() as at:
        await at.add("w")
        await at.ask("r1")
        story = await at.story("r1")
    assert story["outcome"] == "completed"
    assert story["attempts"][0]["started"] is None
    assert story["attempts"][0]["first_output"] == pytest.approx(1.1)
