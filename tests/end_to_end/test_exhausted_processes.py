"""Processes that run out of threads: a master or a worker of which the system lets no further one start."""

from __future__ import annotations

from typing import Any, Final

import httpx
import pytest
import trio
from nodes import Node, Nodes
from served import chat

pytestmark = pytest.mark.processes

#: A stack of this size is refused by the system, as every thread is at a limit (``ulimit -u``, ``pids.max``). A limit
#: of the user would not hold for root, which tests often are.
APP: Final = """\
import threading

from trio_cluster import ClusterServer

server = ClusterServer()


@server.chat("starve")
async def starve(request):
    threading.stack_size(1 << 44)
    return "starving"


@server.chat("feed")
async def feed(request):
    threading.stack_size(0)
    return "fed"


@server.chat("plain")
def plain(request):
    return "hello"


@server.chat("async")
async def asynchronous(request):
    return f"hello {len(request.last_text)}"
"""


async def ask(node: Node, model: str, text: str = "x") -> tuple[int, Any]:
    async with httpx.AsyncClient(base_url=node.url, timeout=10, trust_env=False, verify=False) as client:
        response = await client.post("/v1/chat/completions", json=chat(model, text))
    answer = response.json()
    if response.is_success:
        return 200, answer["choices"][0]["message"]["content"]
    return response.status_code, answer["error"]["code"]


@pytest.mark.parametrize("where", ["master", "worker"])
async def test_a_process_without_threads_refuses_what_needs_one_and_goes_on(
    where: str, nodes: Nodes, nursery: trio.Nursery
) -> None:
    (nodes.directory / "starving.py").write_text(APP)
    application = ("--app", "starving:server")
    master = await nodes.master(*(application if where == "master" else ()))
    # A guardian is started in a thread, which stays for a while.
    flags = (*application, "--no-guardian")
    node = master if where == "master" else await nodes.worker(master, "w", *flags, models="")
    large = "x" * (1 << 20)
    assert await ask(master, "starve") == (200, "starving")
    for _ in range(3):
        assert await ask(master, "plain") == (503, "over_capacity")
        assert await ask(master, "async") == (200, "hello 1")
    if where == "master":
        assert await ask(master, "async", large) == (503, "over_capacity")
    assert await ask(master, "feed") == (200, "fed")
    assert await ask(master, "plain") == (200, "hello")
    assert await ask(master, "async", large) == (200, f"hello {len(large)}")
    assert len(node.logged("no room for another thread")) == 1
    assert node.process.returncode is None
