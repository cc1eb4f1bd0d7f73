"""Real processes are killed under the official clients, which have to be told and must not take it for an end."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from client_case import USER, text_of
from client_drivers import Client, Driver
from nodes import NOT_RESUMED, Node, Nodes, open_nodes
from served import until

pytestmark = [pytest.mark.processes, pytest.mark.feature("killed workers and masters")]

CHAT = "chat.completions.create"

#: An application with a model that speaks for ever.
SOUNDS = """\
import trio

from trio_cluster import ClusterServer

server = ClusterServer()


@server.tts("speaker")
async def speaker(request):
    while True:
        yield bytes(1000)
        await trio.sleep(0.01)
"""


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    """Where processes are started."""
    async with open_nodes(tmp_path) as opened:
        yield opened


@pytest.fixture
async def master(nodes: Nodes) -> Node:
    """A master without models of its own."""
    return await nodes.master(*NOT_RESUMED)


@pytest.fixture
async def worker(nodes: Nodes, master: Node) -> Node:
    """Its worker, which counts slowly."""
    return await nodes.worker(master, "w1", models="count")


@pytest.fixture
def client(master: Node, driver: Driver) -> Client:
    """A client of the master."""
    return driver.client_of(master.url)


def slowly(**more: Any) -> dict[str, Any]:
    return {"model": "count", "messages": [USER], "ticks": 1000, **more}


async def worker_of_the_call(master: Node) -> str:
    """Wait until a worker has begun to answer the only call that there is, and return its name."""
    names: list[str] = []

    async def has_begun() -> bool:
        async with httpx.AsyncClient(base_url=master.url, trust_env=False, verify=False) as http:
            calls = (await http.get("/cluster/calls")).json()["calls"]
        names[:] = [call["node"] for call in calls if call["phase"] == "streaming"]
        return len(names) == 1

    await until(has_begun, within=5)
    return names[0]


async def test_a_worker_that_is_killed_in_a_stream_is_told_as_an_error(worker: Node, client: Client) -> None:
    async with client.asking(CHAT, **slowly(stream=True)) as asking:
        await asking.receive_until(lambda events: "2 " in text_of(events))
        worker.send(signal.SIGKILL)
        answer = await asking.answer(within=5)
    assert text_of(answer.events).startswith("0 1 2 ")
    assert answer.failure is not None
    assert (answer.failure.name, answer.failure.code) == ("APIError", "worker_lost")
    assert answer.attempts == [0]


async def test_a_worker_that_is_killed_before_it_answers_is_a_bad_gateway(
    master: Node, worker: Node, client: Client
) -> None:
    async with client.asking(CHAT, **slowly()) as asking:
        await worker_of_the_call(master)
        worker.send(signal.SIGKILL)
        answer = await asking.answer(within=5)
    assert answer.failure is not None
    assert (answer.failure.name, answer.failure.status, answer.failure.code) == (
        "InternalServerError", 502, "worker_lost"
    )  # fmt: skip


async def test_a_client_that_comes_again_is_served_by_the_other_replica(nodes: Nodes, driver: Driver) -> None:
    master = await nodes.master(*NOT_RESUMED, "--on-conflict", "replicate")
    workers = {name: await nodes.worker(master, name, models="count") for name in ("w1", "w2")}
    client = driver.client_of(master.url, max_retries=1)
    async with client.asking(CHAT, **slowly(ticks=60)) as asking:
        # The answer has begun there, which is why it is not for the master to ask elsewhere.
        workers.pop(await worker_of_the_call(master)).send(signal.SIGKILL)
        answer = await asking.answer()
    assert answer.failure is None
    assert answer.value["choices"][0]["message"]["content"].endswith("58 59 ")
    assert len(answer.attempts) == 2


async def test_sound_whose_worker_is_killed_is_not_taken_for_the_whole_of_it(
    nodes: Nodes, master: Node, client: Client
) -> None:
    (nodes.directory / "sounds.py").write_text(SOUNDS)
    worker = await nodes.start("worker", "127.0.0.1", master.port, "--app", "sounds:server")
    async with client.asking(
        "audio.speech.create", as_pieces=True, model="speaker", voice="v", input="x"
    ) as asking:
        await asking.receive_until(lambda pieces: sum(pieces) > 3000)
        worker.send(signal.SIGKILL)
        answer = await asking.answer(within=5)
    assert answer.failure is not None
    assert any(word in answer.failure.message for word in ("incomplete", "terminated"))


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_master_that_is_killed_is_no_clean_end_either(
    nodes: Nodes, master: Node, worker: Node, client: Client, stream: bool
) -> None:
    async with client.asking(CHAT, **slowly(stream=stream)) as asking:
        if stream:
            await asking.receive_until(lambda events: "2 " in text_of(events))
        else:
            await worker_of_the_call(master)
        master.send(signal.SIGKILL)
        answer = await asking.answer(within=5)
        await worker.log("lost the master")
    assert answer.failure is not None
    assert stream or answer.failure.name == "APIConnectionError"
    assert nodes.notes() == ["count cancelled"]
