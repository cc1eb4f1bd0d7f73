"""Auto mode heals: when the master of a machine's ``run`` processes goes, exactly one of the others takes its ports."""

from __future__ import annotations

import signal
import ssl
from contextlib import suppress
from functools import partial
from typing import Any

import httpx
import pytest
import trio
from nodes import Node, Nodes, Stream, free_pair
from served import chat, until

pytestmark = pytest.mark.processes

#: In its log, a process says so when it has taken the ports.
PROMOTED = "the master has gone"


async def request(port: int, method: str, path: str, **options: Any) -> httpx.Response | None:
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False
        ) as client:
            return await client.request(method, path, **options)
    except httpx.TransportError:
        return None


async def ask(port: int, model: str) -> httpx.Response | None:
    return await request(port, "POST", "/v1/chat/completions", json=chat(model))


async def start(nodes: Nodes, port: int, *names: str) -> list[Node]:
    """Start processes, the first of which is the master; each has ``who``, and a model of its own."""
    first = await nodes.start("run", port, models=f"who {names[0]}")
    others = [await nodes.start("run", port, models=f"who {name}", ready=False) for name in names[1:]]
    for node in others:
        node.port = 0
        await node.log("registered with the master")
    return [first, *others]


def promoted(all_nodes: list[Node]) -> list[Node]:
    return [node for node in all_nodes if node.logged(PROMOTED)]


async def whole(port: int, names: set[str]) -> None:
    """Wait until each of these models is served."""

    async def is_whole() -> bool:
        response = await request(port, "GET", "/v1/models")
        return response is not None and names <= {entry["id"] for entry in response.json()["data"]}

    await until(is_whole, 20)


async def answered(port: int, model: str, *, refusals: list[tuple[int, str]]) -> str:
    """Ask until there is an answer, and note the refusals."""
    with trio.fail_after(20):
        while True:
            response = await ask(port, model)
            if response is not None and response.status_code == 200:
                return str(response.json()["choices"][0]["message"]["content"])
            if response is not None:
                refusals.append((response.status_code, response.headers.get("retry-after", "")))


async def test_with_tls_the_next_master_has_the_same_authority_and_the_same_certificate(nodes: Nodes) -> None:
    port, state = free_pair(), nodes.directory / "state"
    # The token is for workers of other machines; these need none.
    tls = ("--tls", "auto", "--state-dir", str(state), "--cluster-token", "secret")
    first = await nodes.start("run", port, *tls, models="who a")
    others = [await nodes.start("run", port, *tls, models=f"who {name}", ready=False) for name in "bc"]
    for node in others:
        node.port = 0
        await node.log("registered with the master")
    # As its users do, who have this file.
    context = ssl.create_default_context(cafile=state / "ca.pem")
    async with httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{port}", timeout=20, trust_env=False, verify=context
    ) as client:
        assert (await client.post("/v1/chat/completions", json=chat("a"))).status_code == 200
        # The others have certificates of an authority that was replaced since.
        assert (await client.post("/cluster/ca/rotate")).status_code == 200
        kept = [(state / name).read_bytes() for name in ("ca.pem", "server.pem", "authority.json")]
        first.send(signal.SIGKILL)
        await first.exit_code()

        async def has_healed() -> bool:
            try:
                workers = (await client.get("/cluster/status")).json()["workers"]
            except httpx.TransportError:
                return False
            return [worker["admitted"] for worker in workers] == ["certificate"]

        await until(has_healed, 20)
        assert len(promoted(others)) == 1
        for name in "bc":
            assert (await client.post("/v1/chat/completions", json=chat(name))).status_code == 200
    assert kept == [(state / name).read_bytes() for name in ("ca.pem", "server.pem", "authority.json")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
async def test_another_process_is_the_master_when_it_has_gone(nodes: Nodes, number: signal.Signals) -> None:
    port = free_pair()
    living = await start(nodes, port, "a", "b", "c")
    master, names = living[0], {"who", "a", "b", "c"}
    await whole(port, names)
    while len(living) > 1:
        refusals: list[tuple[int, str]] = []
        before = len(promoted(nodes.all))
        master.send(number)
        await master.exit_code()
        living.remove(master)
        pid = int(await answered(port, "who", refusals=refusals))

        async def said(promotions: int = before + 1) -> bool:
            return len(promoted(nodes.all)) >= promotions

        # Its log may be read later than its answer.
        await until(said, 10)
        new = [node for node in promoted(nodes.all) if node in living]
        assert len(promoted(nodes.all)) == before + 1, "exactly one"
        (master,) = new
        assert pid == master.process.pid, "it serves its own models itself"
        # What is not back yet is refused in a way that clients repeat.
        for node, name in zip(nodes.all, "abc", strict=True):
            if node in living:
                await answered(port, name, refusals=refusals)
        assert {status for status, _ in refusals} <= {503}
        assert all(after for _, after in refusals)
    assert await request(port, "GET", "/cluster/status") is not None


async def test_a_stream_of_a_dead_master_is_cancelled_where_it_runs(nodes: Nodes) -> None:
    port = free_pair()
    master, *_ = await start(nodes, port, "a", "b")
    async with trio.open_nursery() as nursery:
        body = chat("b", stream=True, ticks=1000, pause=0.05)
        stream: Stream = await nursery.start(Stream().read, f"http://127.0.0.1:{port}", body)
        master.send(signal.SIGKILL)
        assert not (await stream.end(10)).whole

    async def cancelled() -> bool:
        return "b cancelled" in nodes.notes()

    await until(cancelled, 10)
    assert await answered(port, "b", refusals=[]) == "0 1 2 "


async def test_a_frozen_master_keeps_its_ports_and_the_others_wait_and_say_so(nodes: Nodes) -> None:
    port = free_pair()
    options = ("--heartbeat-interval", "0.2", "--worker-timeout", "2", "--resume-window", "1")
    master = await nodes.start("run", port, *options, models="a")
    other = await nodes.start("run", port, *options, models="b", ready=False)
    other.port = 0
    await other.log("registered with the master")
    master.send(signal.SIGSTOP)
    try:
        await other.log("the master does not answer, and has its ports still", within=20)
        assert not promoted(nodes.all)
    finally:
        master.send(signal.SIGCONT)
    await whole(port, {"a", "b"})
    assert not promoted(nodes.all)


async def test_both_ports_are_got_or_neither(nodes: Nodes) -> None:
    port = free_pair()
    master, other = await start(nodes, port, "a", "b")

    async def refuse(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                await stream.receive_some()
                await stream.send_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")

    async with trio.open_nursery() as nursery:
        other.send(signal.SIGSTOP)
        master.send(signal.SIGKILL)
        await master.exit_code()
        # Another program has the port for workers.
        await nursery.start(partial(trio.serve_tcp, refuse, port + 1000, host="127.0.0.1"))
        other.send(signal.SIGCONT)
        entry = await other.log("no master, and no ports for this process to be one", within=20)
        if f"port {port + 1000}" not in entry["message"]:
            entry = await other.log(
                f"no master, and no ports for this process to be one: port {port + 1000}", within=20
            )
        assert not promoted(nodes.all)
        nursery.cancel_scope.cancel()
    pid = int(await answered(port, "who", refusals=[]))
    assert pid == other.process.pid
