"""Keys and usage in real processes: what is lost when they are killed, what they say, and what they never say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import fork_server
import httpx
import pytest
import trio
from nodes import Node, Nodes, free_pair
from private_postgres import PrivatePostgres
from served import chat

from trio_cluster.accounts.store import Store
from trio_cluster.accounts.usage_row import UsageQuery

pytestmark = pytest.mark.processes

WHO = chat("who")


@attrs.define
class Load:
    """A client that asks again and again.

    Attributes:
        answered: when it had each answer, in seconds of the trio clock.
        failures: answers with another status than 200.
        stopped: it shall end after the request that it has.
    """

    url: str
    answered: list[float] = attrs.field(factory=list)
    failures: list[str] = attrs.field(factory=list)
    stopped: bool = False

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=10, trust_env=False) as client:
            while not self.stopped:
                try:
                    response = await client.post("/v1/chat/completions", json=WHO)
                except httpx.HTTPError:
                    return
                self.answered.append(trio.current_time())
                if response.status_code != 200:
                    self.failures.append(response.text)


def requests_in(database: str | Path) -> int:
    store = Store(database)
    try:
        return sum(row["requests"] for row in store.sum_usage(UsageQuery()))
    finally:
        store.close()


async def test_a_node_that_is_killed_loses_a_second_of_usage_at_most(nodes: Nodes, tmp_path: Path) -> None:
    master = await nodes.master("--state-dir", str(tmp_path / "state"), models="who")
    load = Load(master.url)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        await trio.sleep(3)
        killed = trio.current_time()
        master.send(signal.SIGKILL)
        await master.exit_code()
        nursery.cancel_scope.cancel()
    count = requests_in(tmp_path / "state" / "accounts.db")
    assert len(load.answered) > 100
    assert sum(moment < killed - 1 for moment in load.answered) <= count <= len(load.answered) + 1


async def test_a_database_that_is_killed_and_comes_back_under_load_costs_no_request_and_no_row(
    nodes: Nodes, own_postgres: PrivatePostgres
) -> None:
    postgres, database = own_postgres, own_postgres.create_database()
    master = await nodes.master("--database", database, models="who")
    load = Load(master.url)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        for _ in range(2):
            await trio.sleep(1)
            await trio.to_thread.run_sync(postgres.kill)
            await master.log("the usage of requests cannot be written")
            await trio.sleep(1.5)
            await trio.to_thread.run_sync(postgres.start)
            await master.log("the usage of requests is written again", lost=0)
        await trio.sleep(1)
        load.stopped = True
    master.send(signal.SIGTERM)
    assert await master.exit_code() == 0
    assert load.failures == []
    assert requests_in(database) == len(load.answered)
    for message in ("the usage of requests cannot be written", "the usage of requests is written again"):
        assert len(master.logged(message)) == 2
    assert len(master.logged("changes of keys by other masters are not noticed")) <= 2


async def test_state_that_is_asked_for_and_cannot_be_kept_is_one_line_and_the_end(
    nodes: Nodes, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    cases = {
        ("--state-dir", str(tmp_path / "file")): "state_dir",
        ("--database", f"sqlite:///{tmp_path}/none/accounts.db"): "none/accounts.db: No such file",
        ("--database", f"postgresql://me:sesame@/x?host={tmp_path}"): "database postgresql",
    }
    for arguments, expected in cases.items():
        node = await nodes.start("master", 0, *arguments, ready=False)
        assert await node.exit_code() == 1
        (line,) = node.noise
        assert expected in line
        assert "sesame" not in line


async def test_a_node_that_cannot_keep_its_state_serves_without_and_says_so_once(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/state")
    master = await nodes.start("master", free_pair(), models="who")
    warnings = [entry["message"] for entry in master.entries if entry["level"] != "info"]
    assert len([message for message in warnings if "without keys and usage" in message]) == 1
    async with httpx.AsyncClient(base_url=master.url, trust_env=False) as client:
        assert (await client.post("/v1/chat/completions", json=WHO)).status_code == 200
        assert (await client.get("/cluster/keys")).json()["error"]["code"] == "no_database"


class CommandLine:
    """Runs commands against a node, with a key in the environment, and keeps what they print to standard error."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.printed = ""

    async def run(self, *arguments: str, key: str = "") -> str:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TRIO_CLUSTER_")}
        environ |= {"TRIO_CLUSTER_API_KEY": key} if key else {}
        words = ["-m", "trio_cluster", *arguments, str(self.node.port)]
        done = await fork_server.run(words, cwd=Path.cwd(), env=environ)
        self.printed += done.stderr.decode()
        return done.stdout.decode()


async def test_keys_are_in_nothing_that_a_node_writes(nodes: Nodes, tmp_path: Path) -> None:
    state = tmp_path / "state"
    flags = ("--state-dir", str(state), "--access-log", "--log-level", "debug")
    master = await nodes.master(*flags, models="who count")
    command = CommandLine(master)
    admin = (await command.run("keys", "create", "boss", "--role", "admin")).strip()
    keys = [(await command.run("keys", "create", name, key=admin)).strip() for name in ("a", "b")]
    keys.append((await command.run("keys", "rotate", "b", "--grace", "1h", key=admin)).strip())
    await command.run("keys", "create", "a", key=admin)
    await command.run("keys", "create", keys[0], key=admin)
    await command.run("keys", "revoke", keys[1], key=admin)
    await command.run("keys", "change", "a", "--disabled", "yes", key=admin)
    await command.run("status", key=keys[0] + "x")
    wrong = "tc-" + "w" * 43
    secrets = [admin, *keys, wrong]
    assert all(secret.startswith("tc-") for secret in secrets)
    bodies: list[Any] = [
        WHO,
        chat("count", ticks=2),
        chat("count", stream=True, ticks="x"),
        chat("nothing"),
        "x",
    ]
    headers = [
        "authorization", "x-api-key", "api-key", "x-request-id", "cookie", "user-agent", "referer", "traceparent",
        "idempotency-key", "x-anything", "openai-organization", "x-forwarded-for", "content-language", "baggage",
    ]  # fmt: skip
    shown = ""
    async with httpx.AsyncClient(base_url=master.url, timeout=10, trust_env=False) as client:
        for number, key in enumerate(secrets):
            for header in headers:
                value = f"Bearer {key}" if header == "authorization" else key
                # Alone it is the key of the request; a few that are not valid, or the node would slow them down.
                if header in ("authorization", "x-api-key", "api-key"):
                    await client.get("/v1/models", headers={header: value})
                sent = {header: value} | {"authorization": f"Bearer {admin}"}
                await client.post("/v1/chat/completions", json=bodies[number % len(bodies)], headers=sent)
            for body in bodies:
                await client.post(
                    "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {admin}"}
                )
            await client.request("BREW", f"/{number}", headers={"authorization": f"Bearer {key}"})
        for path in (
            "/metrics",
            *(f"/cluster/{name}" for name in ("status", "calls", "audit", "keys", "usage")),
        ):
            response = await client.get(path, headers={"authorization": f"Bearer {admin}"})
            assert response.status_code == 200
            shown += response.text
    shown += "".join(map(json.dumps, master.entries)) + "".join(master.noise) + command.printed
    files = {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()}  # noqa: ASYNC240
    master.send(signal.SIGTERM)
    assert await master.exit_code() == 0
    files |= {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()}  # noqa: ASYNC240
    shown += "".join(map(json.dumps, master.entries)) + "".join(master.noise)
    assert "key.rotate" in shown
    assert b"key.rotate" in files["accounts.db"]
    # The tracebacks of handlers that failed are meant to be there.
    for entry in master.entries:
        entry.pop("traceback", None)
    for secret in secrets:
        # Whatever follows the prefix would be enough to find one.
        for part in (secret, secret[3:]):
            assert part not in shown
            assert [name for name, content in files.items() if part.encode() in content] == []


def test_the_command_names_the_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['psycopg'] = None; from trio_cluster.cli import main;"
        "sys.exit(main(['master', '0', '--host', '127.0.0.1', '--database', 'postgresql://u@h/d']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'psycopg[binary]'")
    assert done.stderr.count("\n") == 1
