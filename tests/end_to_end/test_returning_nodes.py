"""A worker or the master is restarted while the official client, as it comes, asks and asks.

What was under way on a process that was killed may fail, and so may what was sent while nothing listened on the port.
Every later request succeeds: the client's own two retries last until the workers are back.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import httpx
import openai
import pytest
import trio
from nodes import Node, Nodes, free_pair
from served import until

pytestmark = pytest.mark.processes

#: Clients that ask at the same time; each asks again as soon as it has its answer.
CLIENTS = 8
#: Requests after a restart that have to succeed.
LATER = 200
#: Seconds in which workers return, and what a machine may add that does other things as well.
RETURN, SLOW_MACHINE = 5.0, 1.5
#: Seconds after which the workers look for their master as rarely as they ever do.
LONG = 6.0

USER: Any = {"role": "user", "content": "hi"}


@attrs.define
class Asking:
    """Official clients with default settings, and how their requests ended."""

    url: str
    models: tuple[str, ...]
    asked: int = 0
    succeeded: list[float] = attrs.field(factory=list)
    """When each of the requests that succeeded was begun, in trio's time."""
    failed: list[tuple[float, str]] = attrs.field(factory=list)
    """When each of the others was begun, and why it failed."""
    over: bool = False

    async def run(self) -> None:
        """Ask until it is over."""
        http_client = openai.DefaultAsyncHttpxClient(trust_env=False, verify=False)
        client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="a-key", http_client=http_client)
        async with client:
            while not self.over:
                self.asked += 1
                began = trio.current_time()
                try:
                    answer = await client.chat.completions.create(
                        model=self.models[self.asked % len(self.models)],
                        messages=[USER],
                        extra_body={"ticks": 2, "pause": 0.005},
                    )
                    assert answer.choices[0].message.content == "0 1 "
                    self.succeeded.append(began)
                except openai.OpenAIError as error:
                    self.failed.append((began, repr(error)))
                    # Nothing listens, or so: no race.
                    await trio.sleep(0.1)

    def since(self, when: float) -> tuple[int, list[str]]:
        """Return how many of the requests that were begun since then have succeeded, and why the others failed."""
        succeeded = sum(began >= when for began in self.succeeded)
        return succeeded, [why for began, why in self.failed if began >= when]

    async def go_on(self, since: float, requests: int = LATER, within: float = 15) -> list[str]:
        """Wait until so many requests that were begun since then have ended; return why any of them failed."""
        await until(lambda: self.since(since)[0] + len(self.since(since)[1]) >= requests, within)
        return self.since(since)[1]


async def count_of_workers(master: Node) -> int:
    async with httpx.AsyncClient(base_url=master.url, trust_env=False, verify=False) as client:
        return len((await client.get("/cluster/status")).json()["workers"])


async def test_no_request_fails_after_a_worker_was_killed(
    nodes: Nodes, nursery: trio.Nursery, record_property: Callable[[str, object], None]
) -> None:
    master = await nodes.master()
    worker = await nodes.worker(master, "w1", models="m")
    asking = Asking(master.url, ("m",))
    async with trio.open_nursery() as clients:
        for _ in range(CLIENTS):
            clients.start_soon(asking.run)
        await asking.go_on(0.0, 50)
        worker.send(signal.SIGKILL)
        await worker.exit_code()
        killed = trio.current_time()
        await nodes.worker(master, "w1", models="m")
        record_property("seconds_to_start", round(trio.current_time() - killed, 2))
        assert await asking.go_on(killed) == []
        asking.over = True
    succeeded, failed = asking.since(killed)
    assert not failed
    record_property("later", succeeded)
    record_property("failed_in_flight", len(asking.failed))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
async def test_no_request_fails_after_the_master_listens_again(
    end: signal.Signals, nodes: Nodes, nursery: trio.Nursery, record_property: Callable[[str, object], None]
) -> None:
    port = free_pair()
    arguments = ("--state-dir", str(nodes.directory / "state"), "--on-conflict", "replicate")
    master = await nodes.start("master", port, *arguments)
    models = {"w1": "a b", "w2": "b c", "w3": "d"}
    async with trio.open_nursery() as starting:
        for name in models:
            starting.start_soon(partial(nodes.worker, master, name, models=models[name]))
    asking = Asking(master.url, ("a", "b", "c", "d"))
    async with trio.open_nursery() as clients:
        for _ in range(CLIENTS):
            clients.start_soon(asking.run)
        await asking.go_on(0.0, 50)
        # The names are written down within a second.
        await trio.sleep(1)
        master.send(end)
        await master.exit_code()
        await trio.sleep(LONG)
        stopped = trio.current_time()
        master = await nodes.start("master", port, *arguments)
        listening = trio.current_time()

        async def all_are_back() -> bool:
            return await count_of_workers(master) == len(models)

        await until(all_are_back, RETURN + SLOW_MACHINE)
        record_property("seconds_to_start", round(listening - stopped, 2))
        record_property("seconds_to_return", round(trio.current_time() - listening, 2))
        assert await asking.go_on(listening) == []
        asking.over = True
    succeeded, failed = asking.since(listening)
    assert not failed
    record_property("later", succeeded)
    record_property("failed_before", len(asking.failed))


async def test_no_request_fails_when_master_and_workers_are_restarted_together(
    nodes: Nodes, nursery: trio.Nursery, record_property: Callable[[str, object], None]
) -> None:
    port = free_pair()
    arguments = ("--state-dir", str(nodes.directory / "state"))
    master = await nodes.start("master", port, *arguments)
    worker = await nodes.worker(master, "w1", models="m")
    asking = Asking(master.url, ("m",))
    async with trio.open_nursery() as clients:
        for _ in range(CLIENTS):
            clients.start_soon(asking.run)
        await asking.go_on(0.0, 50)
        await trio.sleep(1)
        for node in (worker, master):
            node.send(signal.SIGKILL)
            await node.exit_code()
        async with trio.open_nursery() as starting:
            starting.start_soon(partial(nodes.start, "worker", "127.0.0.1", port, "--name", "w1", models="m"))
            master = await nodes.start("master", port, *arguments)
            listening = trio.current_time()
        assert await asking.go_on(listening) == []
        asking.over = True
    record_property("later", asking.since(listening)[0])
