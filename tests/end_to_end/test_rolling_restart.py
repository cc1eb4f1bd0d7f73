"""Every worker of a cluster is restarted, one after the other, while clients ask and ask: they notice nothing."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import fork_server
import httpx
import pytest
import trio
from nodes import Node, Nodes
from served import RawStream, chat, until

import trio_cluster

pytestmark = pytest.mark.processes

#: Clients that ask for streams, and clients that do not; each asks again as soon as it has its answer.
STREAMING, PLAIN = 6, 6

#: What is not the same in two answers.
_UNIQUE = re.compile(rb'("id":"chatcmpl-|"created":)\w+')

TEXT = "".join(f"{i} " for i in range(8))


@attrs.define
class Load:
    """Clients that go on asking until they are told to stop, and all that they noticed."""

    url: str
    pause: float = 0.01
    """Seconds between two tokens."""
    http2: bool = False
    expected: dict[str, bytes] = attrs.field(factory=dict)
    """The first answer of each kind. The others are the same, byte by byte, apart from what differs each time."""
    asked: Counter[str] = attrs.field(factory=Counter)
    failures: list[str] = attrs.field(factory=list)
    over: bool = False

    async def ask(self, stream: bool) -> None:
        kind = "streams" if stream else "plain"
        limits: dict[str, Any] = {"timeout": 10, "trust_env": False, "verify": False}
        async with httpx.AsyncClient(base_url=self.url, http2=self.http2, **limits) as client:
            while not self.over:
                self.asked[kind] += 1
                body = chat("m", stream=stream, ticks=8, pause=self.pause)
                try:
                    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                        assert response.http_version == ("HTTP/2" if self.http2 else "HTTP/1.1")
                        received = await self._read(response)
                    self._check(received, stream=stream)
                except httpx.HTTPError as error:
                    self.failures.append(f"{kind}: {error!r}")

    @staticmethod
    async def _read(response: httpx.Response) -> RawStream:
        pieces: list[bytes] = []
        try:
            async for piece in response.aiter_raw():
                pieces.append(piece)
        except httpx.RemoteProtocolError:
            return RawStream(response.status_code, b"".join(pieces), whole=False)
        return RawStream(response.status_code, b"".join(pieces), whole=True)

    def _check(self, received: RawStream, *, stream: bool) -> None:
        if received.status != 200:
            self.failures.append(f"{received.status}: {received.body!r}")
            return
        if stream:
            report = received.report
            if (report.ending, report.text) != ("finished", TEXT):
                self.failures.append(f"{report.ending}: {received.body!r}")
        elif not received.whole or f'"{TEXT}"'.encode() not in received.body:
            self.failures.append(f"plain: {received.body!r}")
        body = _UNIQUE.sub(rb"\1", received.body)
        if body != self.expected.setdefault("streams" if stream else "plain", body):
            self.failures.append(f"not like the first answer: {received.body!r}")

    async def go_on(self, answers: int, within: float = 10) -> None:
        """Wait until so many more requests have been made."""
        enough = self.asked.total() + answers
        await until(lambda: self.asked.total() >= enough, within)


async def drain(nodes: Nodes, master: Node, name: str) -> str:
    """Run ``trio-cluster drain``, and return what it says."""
    environ = dict(os.environ) | {"PYTHONPATH": str(Path(trio_cluster.__file__).parents[1])}
    done = await fork_server.run(
        ["-m", "trio_cluster", "drain", name, master.url], cwd=nodes.directory, env=environ
    )
    assert done.returncode == 0
    assert done.stderr == b""
    return done.stdout.decode()


async def test_a_rolling_restart_under_load_loses_nothing(
    nodes: Nodes, nursery: trio.Nursery, record_property: Callable[[str, object], None]
) -> None:
    master = await nodes.master("--on-conflict", "replicate")
    names = ["w1", "w2", "w3"]
    workers: dict[str, Node] = {}
    restarts = 0

    async def start(name: str) -> None:
        workers[name] = await nodes.worker(master, name, models="m")

    async with trio.open_nursery() as starting:
        for name in names:
            starting.start_soon(start, name)
    load = Load(master.url)
    async with trio.open_nursery() as asking:
        for stream in itertools.chain([True] * STREAMING, [False] * PLAIN):
            asking.start_soon(load.ask, stream)
        await load.go_on(20)
        for name in names:
            if name == "w2":
                said = await drain(nodes, master, name)
                assert said.splitlines()[-1] == f"{name} has left"
            else:
                workers[name].send(signal.SIGTERM)
            assert await workers[name].exit_code(within=10) == 0
            await load.go_on(20)
            await start(name)
            await load.go_on(20)
            restarts += 1
        load.over = True
    assert load.failures == []

    async with httpx.AsyncClient(base_url=master.url, trust_env=False, verify=False) as client:
        status = (await client.get("/cluster/status")).json()
    calls = status["calls"]
    assert {worker["id"] for worker in status["workers"]} == set(names)
    assert calls["completed"] == load.asked.total()
    # What was on its way to a worker that stopped was opened once more on another one.
    assert calls["failed"] + calls["worker_lost"] == calls["retried"]
    assert calls["admitted"] == calls["completed"] + calls["retried"]
    assert nodes.notes() == ["m finished"] * load.asked.total()
    assert restarts == 3
    for figure, value in [*load.asked.items(), ("restarts", restarts), ("retried", calls["retried"])]:
        record_property(figure, value)
