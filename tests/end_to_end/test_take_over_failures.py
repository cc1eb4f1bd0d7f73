"""A take-over that fails at some step, or does not: real sockets, in one process. One of the two masters serves."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
import trio.testing
from nodes import free_pair
from served import chat, until
from test_lifetimes_processes import Wire

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.cluster import replacement
from trio_cluster.cluster.replacement import SOCKET_NAME
from trio_cluster.cluster.take_over import (
    VERSION,
    Begin,
    Hello,
    Linked,
    Message,
    Offer,
    Ready,
    Refused,
    Yours,
    decode as decode_message,
    encode as encode_message,
)
from trio_cluster.errors import ClusterError
from trio_cluster.net.handover import HandoverChannel, connect_to


async def say(request: Any) -> AsyncIterator[str]:
    yield f"from {os.getpid()}"


@attrs.define
class Masters:
    """Masters on one port, with one state directory.

    Attributes:
        port: of their API.
        state: the directory.
        ended: the names of those that have ended as they should.
        failures: what those that have failed have raised.
    """

    port: int
    state: Path
    nursery: trio.Nursery
    ended: list[str] = attrs.field(factory=list)
    failures: dict[str, str] = attrs.field(factory=dict)

    def options(self, **server: Any) -> ClusterServerOptions:
        given = {"host": "127.0.0.1", "port": self.port, **server}
        return ClusterServerOptions(
            server=ServerOptions(**given), state_dir=str(self.state), drain_timeout=5, on_conflict="replicate"
        )

    async def start(
        self,
        name: str,
        *,
        take_over: bool = False,
        hook: Callable[[], Awaitable[None]] | None = None,
        wait: bool = True,
        **server: Any,
    ) -> ClusterServer:
        """Start one, and wait until it serves."""
        one = ClusterServer(self.options(worker_id=name, **server))
        if hook is not None:
            one.on_start(hook)
        started = trio.Event()

        class Status:
            def started(self, _: object) -> None:
                started.set()

        async def run() -> None:
            try:
                await one.run_as_master(take_over=take_over, task_status=Status())  # type: ignore[arg-type]
                self.ended.append(name)
            except ClusterError as error:
                self.failures[name] = str(error)
            started.set()

        self.nursery.start_soon(run)
        if wait:
            await started.wait()
        return one

    async def start_worker(self, port: int | None = None) -> ClusterServer:
        """Start a worker with a model ``m``, which connects to a master, or to what is at another port."""
        worker = ClusterServer(ClusterServerOptions(server=ServerOptions(worker_id="w")))
        worker.register_chat("m", say)
        await self.nursery.start(worker.run_as_worker, "127.0.0.1", port or self.port + 1000)
        return worker

    async def knock(self) -> HandoverChannel:
        """Connect as a process that wants to take over."""
        return await connect_to(self.state / SOCKET_NAME)

    async def served_by(self) -> str:
        """Return the name of the master that serves a new client."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False) as client:
            return str((await client.get("/cluster/status")).json()["node_id"])

    async def ask(self) -> int:
        """Ask the worker's model, as a new client."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False) as client:
            return (await client.post("/v1/chat/completions", json=chat("m"))).status_code


@asynccontextmanager
async def open_masters(directory: Path) -> AsyncIterator[Masters]:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            yield Masters(free_pair(), directory, nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def masters(tmp_path: Path) -> AsyncIterator[Masters]:
    async with open_masters(tmp_path / "state") as opened:
        yield opened


async def hear(channel: HandoverChannel) -> Message | None:
    received = await channel.receive()
    if received is None:
        return None
    line, sockets = received
    for sock in sockets:
        sock.close()
    return decode_message(line)


@pytest.mark.parametrize("http", ["lean", "hypercorn"])
async def test_a_kept_connection_is_answered_by_the_old_master_once_more(masters: Masters, http: str) -> None:
    await masters.start("old", http=http)
    await masters.start_worker()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{masters.port}", trust_env=False) as client:
        first = await client.post("/v1/chat/completions", json=chat("m"))
        assert "connection" not in first.headers
        await masters.start("new", take_over=True, http=http)
        assert await masters.served_by() == "new"
        second = await client.post("/v1/chat/completions", json=chat("m"))
        assert (second.status_code, second.headers["connection"]) == (200, "close")
        third = await client.post("/v1/chat/completions", json=chat("m"))
        assert third.status_code == 200
        assert "connection" not in third.headers
    await until(lambda: bool(masters.ended))
    assert masters.ended == ["old"]
    assert await masters.ask() == 200


async def test_responses_that_are_stored_in_memory_end_with_the_old_master_which_says_so(
    masters: Masters, caplog: pytest.LogCaptureFixture
) -> None:
    await masters.start("old")
    await masters.start_worker()
    body: dict[str, Any] = {"model": "m", "input": "hi"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{masters.port}", trust_env=False) as client:
        first = (await client.post("/v1/responses", json=body)).json()["id"]
        with caplog.at_level(logging.WARNING, "trio_cluster.node"):
            await masters.start("new", take_over=True)
        (said,) = [record for record in caplog.records if "stored in memory" in record.getMessage()]
        assert said.__dict__["fields"] == {"responses": 1}
        # This connection is the old one's still.
        assert (await client.get(f"/v1/responses/{first}")).status_code == 200
        answer = await client.post("/v1/responses", json=body | {"previous_response_id": first})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "previous_response_not_found")


async def test_without_a_master_a_process_that_is_to_take_over_starts_as_one(masters: Masters) -> None:
    await masters.start("first", take_over=True)
    assert await masters.served_by() == "first"


async def test_a_stale_socket_file_is_no_master(masters: Masters) -> None:
    masters.state.mkdir(mode=0o700)
    (masters.state / SOCKET_NAME).touch()
    await masters.start("first", take_over=True)
    assert await masters.served_by() == "first"
    # And the file was replaced.
    await masters.start("second", take_over=True)
    assert await masters.served_by() == "second"


SAID: tuple[tuple[Message, ...], ...] = (
    (),
    (Hello(VERSION, 1),),
    (Hello(VERSION, 1), Ready()),
    (Hello(VERSION, 1), Ready(), Linked()),
)
HEARD = (Offer, Begin, Yours)


@pytest.mark.parametrize("garbage", [b"", b"{}", b'{"type":"yours"}', b"\xff" * 100])
@pytest.mark.parametrize("said", SAID, ids=len)
async def test_a_successor_that_fails_at_any_step_leaves_the_old_master_serving(
    masters: Masters, said: tuple[Message, ...], garbage: bytes
) -> None:
    await masters.start("old")
    await masters.start_worker()
    channel = await masters.knock()
    for message, answer in zip(said, HEARD, strict=False):
        await channel.send(encode_message(message))
        assert isinstance(await hear(channel), answer)
    if garbage:
        await channel.send(garbage)
        refused = await hear(channel)
        assert isinstance(refused, Refused)
    channel.close()
    assert await masters.served_by() == "old"
    assert await masters.ask() == 200
    # Workers are accepted again, too, and the next process may take over.
    await masters.start("new", take_over=True)
    assert masters.failures == {}
    assert await masters.served_by() == "new"
    assert await masters.ask() == 200


async def test_of_two_that_take_over_one_wins_and_the_other_says_why_it_ends(masters: Masters) -> None:
    await masters.start("old")
    may_go_on = trio.Event()
    await masters.start("slow", take_over=True, hook=may_go_on.wait, wait=False)
    # The slow one has the sockets when the other one asks.
    await trio.testing.wait_all_tasks_blocked(0.05)
    await masters.start("late", take_over=True)
    assert masters.failures == {"late": "cannot take over: another process takes over at this moment"}
    assert await masters.served_by() == "old"
    may_go_on.set()
    await until(lambda: masters.ended == ["old"])
    assert await masters.served_by() == "slow"


async def test_who_was_invited_or_revoked_while_the_new_process_started_is_known_to_it(
    masters: Masters,
) -> None:
    scheme: dict[str, Any] = {
        "base_url": f"https://127.0.0.1:{masters.port}",
        "verify": False,
        "trust_env": False,
    }
    may_go_on = trio.Event()
    await masters.start("old", tls="auto")
    async with httpx.AsyncClient(**scheme) as client:
        assert (await client.post("/cluster/invites", json={"name": "revoked"})).status_code == 201
        new = await masters.start("new", take_over=True, hook=may_go_on.wait, wait=False, tls="auto")
        # It has read who was invited.
        await until(lambda: new.internal_port is not None)
        assert (await client.post("/cluster/invites", json={"name": "invited"})).status_code == 201
        assert (await client.post("/cluster/workers/revoked/revoke")).status_code == 200
    async with httpx.AsyncClient(**scheme) as late:
        assert (await late.get("/health")).status_code == 200
        may_go_on.set()

        async def has_arrived() -> bool:
            async with httpx.AsyncClient(**scheme) as other:
                return bool((await other.get("/cluster/status")).json()["node_id"] == "new")

        await until(has_arrived, within=5)
        # A kept connection reaches the old process, which must not change what is the new one's.
        answer = await late.post("/cluster/invites", json={})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "being_replaced"
        assert (await late.post("/cluster/workers/invited/revoke")).status_code == 200
    kept = json.loads((masters.state / "members.json").read_text())
    assert {each["name"]: each["revoked"] for each in kept["invitations"].values()} == {
        "invited": True,
        "revoked": True,
    }


async def test_a_link_that_is_cut_is_resumed_before_its_worker_is_told_to_join_another_process(
    masters: Masters, nursery: trio.Nursery
) -> None:
    old = await masters.start("old")
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    wire, is_open = Wire(0), trio.Event()
    is_open.set()

    async def serve(stream: trio.SocketStream) -> None:
        await is_open.wait()
        await wire.join(stream, masters.port + 1000)

    nursery.start_soon(trio.serve_listeners, serve, [listener])
    await masters.start_worker(listener.socket.getsockname()[1])
    is_open = trio.Event()
    wire.reset()

    async def state() -> str:
        async with httpx.AsyncClient(base_url=str(old.url), trust_env=False) as client:
            return str((await client.get("/cluster/status")).json()["workers"][0]["state"])

    async def is_suspended() -> bool:
        return await state() == "suspended"

    await until(is_suspended)
    channel = await masters.knock()
    for message in (Hello(VERSION, 1), Ready()):
        await channel.send(encode_message(message))
    assert isinstance(await hear(channel), Offer)
    with trio.move_on_after(0.2):
        pytest.fail(f"said before the link was resumed: {await hear(channel)}")
    is_open.set()
    begin = await hear(channel)
    assert isinstance(begin, Begin)
    assert begin.models == {"w": ["m"]}
    assert await state() == "ok"
    channel.close()
    assert await masters.served_by() == "old"
    nursery.cancel_scope.cancel()


async def test_a_hook_that_fails_leaves_the_old_master_serving(masters: Masters) -> None:
    async def fail() -> None:
        raise OSError("no such model")

    await masters.start("old")
    await masters.start("new", take_over=True, hook=fail)
    assert "no such model" in masters.failures["new"]
    assert await masters.served_by() == "old"


async def test_other_addresses_cannot_be_taken_over(masters: Masters) -> None:
    await masters.start("old")
    await masters.start("new", take_over=True, host="0.0.0.0")
    assert f"listens on 127.0.0.1:{masters.port}" in masters.failures["new"]
    assert await masters.served_by() == "old"


async def test_a_successor_that_no_worker_can_join_gives_way(
    masters: Masters, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long it waits does not matter: none ever can.
    monkeypatch.setattr(replacement, "LINK_TIMEOUT", 0.5)
    await masters.start("old")
    await masters.start_worker()
    new = ClusterServer(attrs.evolve(masters.options(), cluster_token="another"))
    with pytest.raises(ClusterError, match="none of the 1 workers has joined"):
        await new.run_as_master(take_over=True)
    assert await masters.served_by() == "old"
    assert await masters.ask() == 200


async def test_a_process_of_another_user_gets_nothing(
    masters: Masters, monkeypatch: pytest.MonkeyPatch
) -> None:
    await masters.start("old")
    assert (masters.state / SOCKET_NAME).stat().st_mode & 0o777 == 0o600
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    # The whole path may be longer than the path of a socket may be.
    monkeypatch.chdir(masters.state)
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        await stranger.connect(str(SOCKET_NAME))
        assert await stranger.recv(1) == b""
    with pytest.raises(OSError, match="belongs to user"):
        await masters.knock()
    monkeypatch.undo()
    assert await masters.served_by() == "old"
