"""Requests with several keys, from their clients to the slots of a worker: who is served when, and what is counted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
from served import until

from trio_cluster import ClusterServer, ClusterServerOptions, OutputChunk, ServerOptions
from trio_cluster.core.log_context import current_principal

ADMIN = {"authorization": "Bearer the-admin-key"}


@attrs.define
class Office:
    """A master with keys, and a worker with one slot.

    Attributes:
        served: the names of the keys of the requests that have come to the handler.
        go: the handler goes on when it is set.
    """

    client: httpx.AsyncClient
    served: list[str] = attrs.field(factory=list)
    go: trio.Event = attrs.field(factory=trio.Event)
    keys: dict[str, str] = attrs.field(factory=dict)

    async def add_key(self, name: str, **fields: Any) -> None:
        answer = await self.client.post("/cluster/keys", json={"name": name, **fields}, headers=ADMIN)
        assert answer.status_code in (200, 201), answer.text
        self.keys[name] = answer.json()["key"]

    async def ask(self, name: str, **fields: Any) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000} | fields
        headers = {"authorization": f"Bearer {self.keys[name]}"}
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    async def waiting_by(self) -> dict[str, int]:
        status = (await self.client.get("/cluster/status", headers=ADMIN)).json()
        (worker,) = status["workers"]
        waiting: dict[str, int] = worker["waiting_by"]
        return waiting


@asynccontextmanager
async def open_office(directory: Path) -> AsyncIterator[Office]:
    def options(**server: Any) -> ClusterServerOptions:
        fields = ServerOptions(host="127.0.0.1", queue_timeout=60, **server)
        return ClusterServerOptions(fields, heartbeat_interval=0.1, state_dir=str(directory))

    master = ClusterServer(options(api_key="the-admin-key"))
    worker = ClusterServer(options(max_concurrency=1, worker_id="w1"))
    async with trio.open_nursery() as nursery:
        await nursery.start(master.run_as_master, 0)
        async with httpx.AsyncClient(
            base_url=master.url or "", timeout=30, trust_env=False, verify=False
        ) as client:
            office = Office(client)

            async def answer(request: Any) -> AsyncIterator[Any]:
                office.served.append(current_principal.get())
                await office.go.wait()
                yield "x"
                yield OutputChunk.usage(7, request.max_tokens)

            worker.register_chat("m", answer)
            await nursery.start(worker.run_as_worker, "127.0.0.1", master.internal_port)
            yield office
            nursery.cancel_scope.cancel()


async def test_keys_are_served_on_the_worker_by_weight_and_priority(tmp_path: Path) -> None:
    async with open_office(tmp_path / "state") as office, trio.open_nursery() as nursery:
        await office.add_key("plain")
        await office.add_key("heavy", weight=3)
        await office.add_key("high", priority="high")
        answers: list[httpx.Response] = []

        async def ask(name: str) -> None:
            answers.append(await office.ask(name))

        nursery.start_soon(ask, "plain")
        await until(lambda: office.served == ["plain"], 30)
        for name in ("plain", "heavy", "high"):
            for _ in range(8):
                nursery.start_soon(ask, name)

        async def all_wait() -> bool:
            return await office.waiting_by() == {"heavy": 8, "high": 8, "plain": 8}

        await until(all_wait, 30)
        office.go.set()
        await until(lambda: len(answers) == 25, 60)
        assert {answer.status_code for answer in answers} == {200}
        # Of the first eight that waited: one, three and four.
        first = office.served[1:9]
        assert first.count("plain") == pytest.approx(1, abs=1)
        assert first.count("heavy") == pytest.approx(3, abs=1)
        assert first.count("high") == pytest.approx(4, abs=1)

        async def none_waits() -> bool:
            return await office.waiting_by() == {}

        await until(none_waits, 30)


async def test_the_usage_of_each_key_is_what_its_answers_reported(tmp_path: Path) -> None:
    async with open_office(tmp_path / "state") as office:
        await office.add_key("a")
        await office.add_key("b")
        office.go.set()
        for name in "aab":
            assert (await office.ask(name, max_tokens=3)).status_code == 200

        async def rows() -> dict[str, tuple[int, int]]:
            answer = await office.client.get("/cluster/usage?group_by=key", headers=ADMIN)
            return {
                row["key"]: (row["prompt_tokens"], row["completion_tokens"]) for row in answer.json()["data"]
            }

        async def are_counted() -> bool:
            return await rows() == {"a": (14, 6), "b": (7, 3)}

        await until(are_counted, 10)
