"""Busy is not dead: a process whose event loop is blocked keeps its work; one that is frozen does not."""

from __future__ import annotations

import os
import signal
from typing import Any, Final

import httpx
import patience
import pytest
import trio
from nodes import Node, Nodes, Stream
from served import chat, until

pytestmark = pytest.mark.processes

#: Seconds; the blocks below are longer than the first, and go on until ``enough`` can be opened: if it is a pipe, when
#: the test has opened it, too.
PATIENCE: Final = ("--worker-timeout", "1.5", "--heartbeat-interval", "0.3")
BLOCK: Final = 2.5

#: Has a handler that does what handlers should not.
APP: Final = """\
import os
import time

import trio

from trio_cluster import ClusterServer

server = ClusterServer()


def compute(seconds):
    time.sleep(seconds), os.close(os.open("enough", os.O_RDONLY))


@server.chat("blocks-NAME")
async def blocks(request):
    yield "0 "
    yield "1 "
    await trio.sleep(0.2)
    compute(request.raw["block"])
    yield "2 "


@server.chat("ticks-NAME")
async def ticks(request):
    for i in range(30):
        yield f"{i} "
        await trio.sleep(0.05)


@server.chat("who")
async def who(request):
    return str(os.getpid())
"""


async def start(nodes: Nodes, command: str, name: str, *arguments: str | int) -> Node:
    (nodes.directory / f"busy_{name}.py").write_text(APP.replace("NAME", name))
    return await nodes.start(command, *arguments, *PATIENCE, "--app", f"busy_{name}:server")


async def start_worker(nodes: Nodes, master: Node, name: str) -> Node:
    return await start(nodes, "worker", name, "127.0.0.1", master.port, "--name", name)


async def ask(node: Node, model: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=node.url, timeout=20, trust_env=False, verify=False) as client:
        return await client.post("/v1/chat/completions", json=chat(model))


async def answered_by(master: Node, requests: int) -> set[str]:
    answers = [await ask(master, "who") for _ in range(requests)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.json()["choices"][0]["message"]["content"] for answer in answers}


async def worker_on(master: Node, name: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=master.url, timeout=5, trust_env=False, verify=False) as client:
        status = (await client.get("/cluster/status")).json()
    return next(worker for worker in status["workers"] if worker["id"] == name)


async def open_stream(nursery: trio.Nursery, node: Node, model: str, **fields: Any) -> Stream:
    stream: Stream = await nursery.start(Stream().read, node.url, chat(model, stream=True, **fields))
    return stream


async def test_a_worker_that_a_handler_blocks_keeps_its_streams_and_gets_no_new_work(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    os.mkfifo(nodes.directory / "enough")
    # By cost, a replica that was slow gets less for a while, and this is about which of them get any.
    master = await nodes.master(*PATIENCE, "--on-conflict", "replicate", "--routing", "least-busy")
    first = await start_worker(nodes, master, "w1")
    second = await start_worker(nodes, master, "w2")
    both = {str(first.process.pid), str(second.process.pid)}
    assert await answered_by(master, 4) == both

    other = await open_stream(nursery, master, "ticks-w1")
    blocking = await open_stream(nursery, master, "blocks-w1", block=BLOCK)
    began = trio.current_time()
    culprit = "handler of 'blocks-w1' (busy_w1.py:12 in compute)"
    await first.log(f"the event loop is blocked: {culprit}", level="warning")
    await master.log(f"worker stalled: {culprit}", worker="w1", level="warning", in_flight=2)
    status = await worker_on(master, "w1")
    assert (status["state"], status["stalled"]) == ("stalled", culprit)

    assert await answered_by(master, 6) == {str(second.process.pid)}
    refused = await ask(master, "ticks-w1")
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    # A busy machine may need longer than the block for all of this, so the block waits for it.
    assert first.logged("the event loop runs again") == []
    enough = os.open(nodes.directory / "enough", os.O_RDWR)

    for stream, text in ((blocking, "0 1 2 "), (other, "".join(f"{i} " for i in range(30)))):
        finished = await stream.end(within=BLOCK + 3)
        assert finished.report.ending == "finished"
        assert finished.report.text == text
    os.close(enough)
    assert trio.current_time() - began >= BLOCK - 0.5
    await master.log("worker runs again", worker="w1")
    over = await first.log("the event loop runs again")
    assert BLOCK - 0.1 <= over["blocked_for"] <= trio.current_time() - began + 1
    assert (await worker_on(master, "w1"))["state"] == "ok"
    assert await answered_by(master, 4) == both
    assert master.logged("worker left") == []
    assert first.logged("lost the master") == []


async def test_a_worker_that_is_frozen_while_it_is_blocked_is_gone_within_the_timeout(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    master = await nodes.master(*PATIENCE)
    worker = await start_worker(nodes, master, "w1")
    stream = await open_stream(nursery, master, "blocks-w1", block=10)
    await master.log("worker stalled: handler of 'blocks-w1'")
    worker.send(signal.SIGSTOP)
    watch = patience.Stopwatch()
    failed = await stream.end(within=3)
    assert watch.total >= 1.0
    assert watch.counted <= 2.2
    assert failed.report.ending == "failed"
    assert failed.report.error is not None
    assert failed.report.error["code"] == "worker_lost"
    await master.log("worker left: no message from the peer", worker="w1")


async def test_a_master_that_a_handler_of_its_own_blocks_keeps_its_workers(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    (nodes.directory / "enough").touch()
    master = await start(nodes, "master", "m", 0, "--on-conflict", "replicate")
    worker = await start_worker(nodes, master, "w1")
    stream = await open_stream(nursery, master, "ticks-w1")
    blocking = await open_stream(nursery, master, "blocks-m", block=BLOCK)
    await worker.log("the master is blocked: handler of 'blocks-m' (busy_m.py:12 in compute)")
    await worker.log("the master runs again")
    for each in (stream, blocking):
        finished = await each.end(within=BLOCK + 3)
        assert finished.report.ending == "finished"
    assert master.logged("worker left") == []
    assert worker.logged("lost the master") == []

    async def is_well() -> bool:
        return (await worker_on(master, "w1"))["state"] == "ok"

    await until(is_well, within=1)
