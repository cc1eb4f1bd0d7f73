"""A master that is two processes on one port, with two workers: one service, whatever happens to one of the two."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from nodes import Node, Nodes, Stream
from served import chat, until

pytestmark = pytest.mark.processes


@asynccontextmanager
async def client_of(node: Node) -> AsyncIterator[httpx.AsyncClient]:
    """A client with one connection, and so with one of the processes."""
    async with httpx.AsyncClient(base_url=node.url, trust_env=False, verify=False, timeout=20) as client:
        yield client


async def status_of(node: Node) -> dict[str, Any]:
    async with client_of(node) as client:
        status: dict[str, Any] = (await client.get("/cluster/status")).json()
        return status


async def wait_linked(node: Node, within: float = 20) -> dict[str, Any]:
    """Wait until both workers are linked to both processes, and return the status then."""
    status: dict[str, Any] = {}

    async def linked() -> bool:
        status.update(await status_of(node))
        return [(worker["id"], worker["processes"]) for worker in status["workers"]] == [
            ("w1", [0, 1]),
            ("w2", [0, 1]),
        ]

    await until(linked, within)
    return status


async def open_group(nodes: Nodes, *arguments: str) -> Node:
    master = await nodes.start(
        "master", 0, "--processes", "2", "--on-conflict", "replicate", *arguments, ready=False
    )
    await master.log("serving", within=30, processes=2)
    for name in ("w1", "w2"):
        await nodes.worker(master, name, models="m")
    return master


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    # One whose parent has ended may wait for somebody to take note of its end.
    return state != "Z"


async def streams_on(node: Node, nursery: trio.Nursery, process: int, count: int) -> list[Stream]:
    """Open streams until one process has so many of its own; return those."""
    found: list[Stream] = []
    while len(found) < count:
        before = in_flight(await status_of(node), process)
        stream = await nursery.start(Stream().read, node.url, chat("m", stream=True, ticks=40, pause=0.05))
        if in_flight(await status_of(node), process) > before:
            found.append(stream)
    return found


def in_flight(status: dict[str, Any], process: int) -> int:
    count: int = status["processes"][process]["in_flight"]
    return count


class Page:
    """Follows the events of one process.

    Attributes:
        shown: the items of each kind, by their ids.
        over: the process has ended.
    """

    def __init__(self) -> None:
        self.shown: dict[str, dict[str, Any]] = {"requests": {}, "workers": {}, "models": {}}
        self.over = False

    async def follow(self, node: Node, *, task_status: trio.TaskStatus[None]) -> None:
        event = ""
        try:
            async with client_of(node) as client, client.stream("GET", "/cluster/events") as response:
                async for line in response.aiter_lines():
                    if line.startswith("event: "):
                        event = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        for kind, items in json.loads(line.removeprefix("data: ")).items():
                            if event == "remove":
                                for key in items:
                                    del self.shown[kind][key]
                            else:
                                self.shown[kind] |= {item["id"]: item for item in items}
                        if event == "snapshot":
                            task_status.started()
        except httpx.HTTPError:
            pass
        self.over = True


async def test_two_processes_are_one_master(nodes: Nodes, nursery: trio.Nursery) -> None:
    master = await open_group(nodes)
    status = await wait_linked(master)
    pids = [process["pid"] for process in status["processes"]]

    # Requests of twelve connections are served by both.
    async def ask() -> None:
        async with client_of(master) as client:
            response = await client.post("/v1/chat/completions", json=chat("m"))
            assert response.status_code == 200
        # Whichever of them is asked for its story.
        async with client_of(master) as client:
            story = await client.get(f"/cluster/requests/{response.headers['x-request-id']}")
            assert (story.status_code, story.json()["outcome"]) == (200, "completed")

    async with trio.open_nursery() as asking:
        for _ in range(12):
            asking.start_soon(ask)
    status = await status_of(master)
    assert status["calls"]["completed"] == 12

    # One is killed, under a stream of the other. Until then, each of them shows the streams of both.
    kept = await streams_on(master, nursery, 0, 2)
    lost = await streams_on(master, nursery, 1, 1)
    pages = [Page() for _ in range(6)]
    for page in pages:
        await nursery.start(page.follow, master)
    assert all(len(page.shown["requests"]) >= len(kept) + len(lost) for page in pages)
    assert all(page.shown["workers"]["w1"]["processes"] == [0, 1] for page in pages)
    os.kill(pids[1], signal.SIGKILL)

    async def gone() -> bool:
        mine = [page for page in pages if not page.over]
        return all(not any(key.startswith(f"{pids[1]}-") for key in page.shown["requests"]) for page in mine)

    await until(gone, 20)
    line = await master.log("a process of this master has ended (killed by SIGKILL)")
    assert line["process"] == 1
    status = await wait_linked(master)
    assert status["processes"][1]["restarts"] == 1
    assert status["processes"][1]["pid"] not in pids
    for stream in kept:
        assert (await stream.end(within=20)).report.ending == "finished"

    # All end at one signal, with what they have begun.
    drained = await nursery.start(Stream().read, master.url, chat("m", stream=True, ticks=15, pause=0.05))
    master.send(signal.SIGTERM)
    assert (await drained.end(within=20)).report.ending == "finished"
    assert await master.exit_code(within=20) == 0
    assert not any(is_alive(process["pid"]) for process in status["processes"])


async def test_all_processes_read_the_configuration_again(nodes: Nodes) -> None:
    file = nodes.directory / "c.toml"
    file.write_text("processes = 2\n[server]\nkeepalive = 10\n")
    master = await nodes.start("master", 0, "--config", str(file), ready=False)
    await master.log("serving", within=30, processes=2)
    file.write_text("processes = 2\n[server]\nkeepalive = 5\n")
    master.send(signal.SIGHUP)
    for _ in range(2):
        line = await master.log("the configuration was read again")
        assert line["applied"] == ["server.keepalive: 10 -> 5"]
    file.write_text("processes = 2\n[server]\nkeepalive = 7\n")
    async with client_of(master) as client:
        response = await client.post("/cluster/reload")
        assert (response.status_code, len(response.json()["applied"])) == (200, 1)
    assert len(master.logged("the configuration was read again", applied=["server.keepalive: 5 -> 7"])) == 2
    master.send(signal.SIGTERM)
    assert await master.exit_code(within=20) == 0


async def test_the_processes_end_with_their_supervisor(nodes: Nodes) -> None:
    master = await nodes.start("master", 0, "--processes", "2", "--state-dir", "state", ready=False)
    await master.log("serving", within=30)
    pids = [process["pid"] for process in (await status_of(master))["processes"]]
    master.send(signal.SIGKILL)
    # The log ends when the last process has ended that writes it.
    await master.exit_code(within=20)
    assert master.logged("the supervisor of this process has ended")
    assert not any(is_alive(pid) for pid in pids)


async def test_a_process_that_cannot_start_ends_the_command_with_its_error(nodes: Nodes) -> None:
    arguments = ("--processes", "2", "--state-dir", "state", "--tls-cert", "missing.pem")
    master = await nodes.start("master", 0, *arguments, ready=False)
    assert await master.exit_code(within=20) == 1
    assert "missing.pem" in master.noise[0]
