"""Limits of keys, with real processes: what a key has used is known after a restart, however the master ended."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from nodes import Node, open_nodes

pytestmark = pytest.mark.processes

ADMIN = "tc-the-admin-of-this-test"


async def post(node: Node, path: str, key: str, value: Any) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.post(
            node.url + path, json=value, headers={"authorization": f"Bearer {key}"}, timeout=10
        )


async def ask(node: Node, key: str) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}
    return await post(node, "/v1/chat/completions", key, body)


async def test_what_a_key_has_used_is_known_after_kill_9_and_after_a_stop(tmp_path: Path) -> None:
    flags = ("--state-dir", str(tmp_path / "state"), "--api-key", ADMIN)
    async with open_nodes(tmp_path) as nodes:
        master = await nodes.master(*flags, models="m")
        made = await post(
            master,
            "/cluster/keys",
            ADMIN,
            {"name": "app", "requests_per_minute": 2, "budget": {"tokens": 1000, "per": "month"}},
        )
        assert made.status_code == 201
        key = made.json()["key"]
        left = [(await ask(master, key)).headers["x-ratelimit-remaining-requests"] for _ in range(2)]
        assert left == ["1", "0"]
        before = 60_000
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            master.send(number)
            await master.exit_code()
            master = await nodes.master(*flags, models="m")
            refused = await ask(master, key)
            assert refused.status_code == 429, number
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            wait = int(refused.headers["retry-after-ms"])
            assert 30_000 < wait < before
            before = wait
