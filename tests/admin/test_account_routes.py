"""The routes for keys, usage and the audit log, and what a key may do."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import patience
import pytest
import trio
from http_node import CHAT, WORKER, HttpNode, Served, open_http_node

from trio_cluster.accounts.accounts import Accounts
from trio_cluster.core.answer import Done, Usage
from trio_cluster.core.status import NodeStatus


def answer(served: Served) -> None:
    served.head().data(b'{"choices": []}')
    served.call.put(Done(Usage(3, 4, 1)))
    served.call.release()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[HttpNode]:
    """A node with a database, on this machine, and without any key."""
    async with open_http_node(answer, database=tmp_path / "accounts.db") as opened:
        yield opened


class Asking:
    """A client that sends a key."""

    def __init__(self, node: HttpNode, key: str = "", **headers: str) -> None:
        self.node = node
        self.headers = headers | ({"Authorization": f"Bearer {key}"} if key else {})

    async def __call__(self, method: str, path: str, json: Any = None, **headers: str) -> httpx.Response:
        async with self.node.client() as client:
            return await client.request(method, path, json=json, headers=self.headers | headers)

    async def status(self, method: str, path: str, json: Any = None) -> tuple[int, str | None]:
        response = await self(method, path, json)
        error = response.json().get("error")
        return response.status_code, error and error["code"]


async def make(node: HttpNode, name: str, key: str = "", **fields: Any) -> str:
    response = await Asking(node, key)("POST", "/cluster/keys", {"name": name, **fields})
    assert response.status_code == 201, response.text
    made: str = response.json()["key"]
    return made


def accounts_of(node: HttpNode) -> Accounts:
    assert node.node_context.accounts is not None
    return node.node_context.accounts


MODELS, CHATS = ("GET", "/v1/models"), ("POST", "/v1/chat/completions", CHAT)
REFUSED = (401, "invalid_api_key")


# Whether a key is required


async def test_the_first_key_ends_that_none_is_required(node: HttpNode) -> None:
    nobody = Asking(node)
    assert await nobody.status(*CHATS) == (200, None)
    key = await make(node, "a")
    assert await nobody.status(*CHATS) == await nobody.status(*MODELS) == REFUSED
    assert await Asking(node, key).status(*CHATS) == (200, None)
    assert await Asking(node, "tc-wrong").status(*CHATS) == REFUSED
    assert (await nobody("GET", "/health")).status_code == 200
    assert (await nobody("GET", "/openapi.json")).json()["security"] == [{"key": []}]


async def test_revoking_the_last_key_does_not_open_the_node(node: HttpNode) -> None:
    key = await make(node, "a")
    assert (await Asking(node)("DELETE", "/cluster/keys/a")).json() == {"name": "a", "revoked": True}
    assert await Asking(node, key).status(*CHATS) == REFUSED
    assert await Asking(node).status(*CHATS) == REFUSED


async def test_without_an_admin_this_machine_is_one_until_there_is_an_admin_key(node: HttpNode) -> None:
    here = Asking(node)
    elsewhere = Asking(node, **{"X-Forwarded-For": "192.0.2.1"})
    assert (await elsewhere.status("GET", "/cluster/keys")) == (403, "role_required")
    inference = await make(node, "a")
    await make(node, "b", role="operator")
    assert await elsewhere.status("GET", "/cluster/keys") == REFUSED
    # A key that is sent counts, also here.
    assert await Asking(node, inference).status("GET", "/cluster/keys") == (403, "role_required")
    assert await Asking(node, "wrong").status("GET", "/cluster/keys") == REFUSED
    admin = await make(node, "c", role="admin")
    assert await here.status("GET", "/cluster/keys") == REFUSED
    assert await Asking(node, admin).status("GET", "/cluster/keys") == (200, None)
    # When the last admin key is not valid any more, it is this machine again.
    assert await Asking(node, admin).status("PATCH", "/cluster/keys/c", {"disabled": True}) == (200, None)
    assert await here.status("GET", "/cluster/keys") == (200, None)
    assert await elsewhere.status("GET", "/cluster/keys") == REFUSED


async def test_the_options_are_admin_keys_and_mend_a_lost_one(node: HttpNode) -> None:
    await make(node, "c", role="admin")
    server = node.node_context.options.server
    server.api_key = "lost"
    far = {"X-Forwarded-For": "192.0.2.1"}
    assert await Asking(node, "lost", **far).status("GET", "/cluster/keys") == (200, None)
    # With an operator key, the API key is for clients.
    server.operator_key = "op"
    assert await Asking(node, "lost").status("GET", "/cluster/keys") == (403, "role_required")
    assert await Asking(node, "lost").status(*CHATS) == (200, None)
    assert await Asking(node, "op", **far).status("GET", "/cluster/keys") == (200, None)


# What a key may do


async def test_keys_that_are_not_valid_any_more_are_refused_and_say_why(node: HttpNode) -> None:
    keys = {name: await make(node, name) for name in ("late", "off", "gone")}
    here = Asking(node)
    await here("PATCH", "/cluster/keys/late", {"expires_at": time.time() - 1})
    await here("PATCH", "/cluster/keys/off", {"disabled": True})
    await here("DELETE", "/cluster/keys/gone")
    messages = {}
    for name, key in keys.items():
        response = await Asking(node, key)(*CHATS)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == REFUSED
        messages[name] = error["message"]
    assert messages == {
        "late": "This API key has expired",
        "off": "This API key is disabled",
        "gone": "The API key is not valid",
    }
    await here("PATCH", "/cluster/keys/late", {"expires_at": None})
    assert await Asking(node, keys["late"]).status(*CHATS) == (200, None)


async def test_a_key_expires_by_itself(node: HttpNode, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = time.time() + 3600
    key = await make(node, "a", expires_at=ends)
    assert await Asking(node, key).status(*MODELS) == (200, None)
    monkeypatch.setattr(time, "time", lambda: ends + 1)
    assert await Asking(node, key).status(*MODELS) == REFUSED


async def test_models_that_a_key_may_not_use_are_hidden_and_refused(node: HttpNode) -> None:
    for name in ("qwen-1", "qwen-2", "secret"):
        node.add(name)
    status = NodeStatus(workers=[attrs.evolve(WORKER, models=["qwen-1", "secret"])])
    node.node_context.status = lambda: status
    key = await make(node, "a", models=["qwen*", "later"])
    asking = Asking(node, key)
    listed = [model["id"] for model in (await asking("GET", "/v1/models")).json()["data"]]
    assert listed == ["qwen-1", "qwen-2"]
    assert await asking.status("GET", "/v1/models/qwen-1") == (200, None)
    assert await asking.status("GET", "/v1/models/secret") == (403, "model_not_allowed")
    assert await asking.status("GET", "/v1/models/nothing") == (403, "model_not_allowed")
    for path, model in (
        ("/v1/chat/completions", "secret"),
        ("/v1/chat/completions", "nothing"),
        ("/chat/completions", "m"),
        ("/openai/deployments/secret/chat/completions", "x"),
    ):
        assert await asking.status("POST", path, CHAT | {"model": model}) == (403, "model_not_allowed")
    assert await asking.status("POST", "/v1/chat/completions", CHAT | {"model": "qwen-2"}) == (200, None)
    for path in ("/v1/chat/completions", "/v1/models/later"):
        missing = await asking("GET" if "models" in path else "POST", path, CHAT | {"model": "later"})
        assert missing.status_code == 404
        assert missing.json()["error"]["message"].endswith("Available models: qwen-1, qwen-2")
    shown = (await asking("GET", "/cluster/status")).text
    assert "secret" not in shown
    assert "qwen-1" in shown


async def test_a_form_for_a_model_that_a_key_may_not_use_is_refused(node: HttpNode) -> None:
    node.add("ears", "asr")
    key = await make(node, "a", models=["m"])
    for size, model in ((10, "ears"), (3_000_000, "ears"), (10, "nothing"), (3_000_000, "nothing")):
        async with node.client() as client:
            response = await client.post(
                "/v1/audio/transcriptions",
                data={"model": model},
                files={"file": ("a.wav", b"x" * size)},
                headers={"Authorization": f"Bearer {key}"},
            )
        assert (response.status_code, response.json()["error"]["code"]) == (403, "model_not_allowed")
    assert node.backend.opened() == 0


async def test_what_each_role_may_do(node: HttpNode) -> None:
    admin = await make(node, "boss", role="admin")
    keys = {"admin": admin}
    for role in ("inference", "operator"):
        keys[role] = await make(node, role[:4], admin, role=role)
    routes = {
        ("GET", "/v1/usage"): {"inference", "operator", "admin"},
        ("GET", "/cluster/status"): {"inference", "operator", "admin"},
        ("GET", "/cluster/calls"): {"operator", "admin"},
        ("GET", "/cluster/usage"): {"operator", "admin"},
        ("GET", "/cluster/audit"): {"admin"},
        ("GET", "/cluster/keys"): {"admin"},
        ("GET", "/cluster/keys/boss"): {"admin"},
        ("GET", "/cluster/keys/"): {"admin"},
    }
    told = {"inference": (403, "role_required")}
    for role, key in keys.items():
        status = await Asking(node, key).status("GET", "/cluster/requests/r1")
        assert status == told.get(role, (404, "request_not_found"))
    for (method, path), roles in routes.items():
        for role, key in keys.items():
            expected = (200, None) if role in roles else (403, "role_required")
            assert await Asking(node, key).status(method, path) == expected, (path, role)
    for path in (
        "/cluster/keys",
        "/cluster/keys/boss/rotate",
        "/cluster/invites",
        "/cluster/ca/rotate",
        "/cluster/workers/w1/revoke",
        "/cluster/workers/w1/revoke/",
    ):
        assert await Asking(node, keys["operator"]).status("POST", path, {}) == (403, "role_required")


# Keys


async def test_a_key_is_shown_once(node: HttpNode, tmp_path: Path) -> None:
    response = await Asking(node)(
        "POST", "/cluster/keys", {"name": "a", "budget": {"tokens": 5, "per": "day"}}
    )
    made = response.json()
    key = made.pop("key")
    assert key.startswith("tc-")
    shown = await Asking(node)("GET", "/cluster/keys/a")
    assert shown.json() == made
    assert (await Asking(node)("GET", "/cluster/keys")).json()["data"] == [made]
    assert made["budget"] == {"tokens": 5, "per": "day"}
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())  # noqa: ASYNC240
    assert b"key.create" in written
    assert key.encode() not in written


async def test_what_is_wrong_with_a_key_is_said(node: HttpNode) -> None:
    here = Asking(node)
    assert await here.status("POST", "/cluster/keys", {"name": "a"}) == (201, None)
    assert await here.status("POST", "/cluster/keys", {"name": "a"}) == (409, "name_taken")
    assert await here.status("POST", "/cluster/keys", {"name": "default"}) == (409, "name_taken")
    assert await here.status("POST", "/cluster/keys", {}) == (400, "missing_required_parameter")
    assert await here.status("POST", "/cluster/keys", [1]) == (400, "invalid_json")
    assert await here.status("POST", "/cluster/keys", {"name": "b", "x": 1}) == (400, "unknown_parameter")
    assert await here.status("POST", "/cluster/keys", {"name": "b", "weight": -1}) == (400, "invalid_value")
    assert await here.status("PATCH", "/cluster/keys/a", {"name": "b"}) == (400, "invalid_value")
    assert await here.status("POST", "/cluster/keys/a/rotate", {"grace": -1}) == (400, "invalid_value")
    for method, path in (
        ("GET", "/cluster/keys/b"),
        ("PATCH", "/cluster/keys/b"),
        ("DELETE", "/cluster/keys/b"),
        ("POST", "/cluster/keys/b/rotate"),
    ):
        assert await here.status(method, path, {}) == (404, "key_not_found")
    assert len((await here("GET", "/cluster/keys")).json()["data"]) == 1


async def test_a_rotated_key_works_for_a_while_beside_the_new_one(node: HttpNode) -> None:
    old = await make(node, "a", models=["m"])
    response = await Asking(node)("POST", "/cluster/keys/a/rotate", {"grace": 1})
    new = response.json()["key"]
    assert response.json()["models"] == ["m"]
    assert await Asking(node, old).status(*MODELS) == await Asking(node, new).status(*MODELS) == (200, None)
    await trio.sleep(1.1)
    assert await Asking(node, old).status(*MODELS) == REFUSED
    assert await Asking(node, new).status(*MODELS) == (200, None)
    newest = (await Asking(node)("POST", "/cluster/keys/a/rotate")).json()["key"]
    assert await Asking(node, new).status(*MODELS) == REFUSED
    assert await Asking(node, newest).status(*MODELS) == (200, None)


async def test_another_node_with_the_database_notices_within_two_seconds(
    node: HttpNode, tmp_path: Path
) -> None:
    async with open_http_node(answer, database=tmp_path / "accounts.db") as other:
        key = await make(node, "a")
        with patience.fail_after(2):
            while await Asking(other, key).status(*MODELS) != (200, None):  # noqa: ASYNC110
                await trio.sleep(0.05)
            while await Asking(other).status(*MODELS) != REFUSED:  # noqa: ASYNC110
                await trio.sleep(0.05)
        await Asking(node)("PATCH", "/cluster/keys/a", {"disabled": True})
        assert await Asking(node, key).status(*MODELS) == REFUSED
        with patience.fail_after(2):
            while await Asking(other, key).status(*MODELS) != REFUSED:  # noqa: ASYNC110
                await trio.sleep(0.05)
        # A change of the other one, of a key that this one has deleted meanwhile.
        await Asking(node)("DELETE", "/cluster/keys/a")
        assert await Asking(other).status("PATCH", "/cluster/keys/a", {}) == (404, "key_not_found")


async def test_pages_from_elsewhere_may_not_act_without_a_key(tmp_path: Path) -> None:
    origin = "https://page.example"
    # Also where they may ask models.
    async with open_http_node(answer, database=tmp_path / "accounts.db", cors_origins=origin) as node:
        page = Asking(node, Origin=origin)
        for method, path in (
            ("POST", "/cluster/keys"),
            ("PATCH", "/cluster/keys/a"),
            ("DELETE", "/cluster/keys/a"),
            ("POST", "/cluster/keys/a/rotate"),
        ):
            assert await page.status(method, path, {"name": "a"}) == (403, "foreign_origin")
        assert (await Asking(node)("GET", "/cluster/keys")).json()["data"] == []


async def test_the_node_s_own_page_may_act_without_a_key(node: HttpNode) -> None:
    page = Asking(node, Origin=node.url)
    assert (await page("POST", "/cluster/keys", {"name": "a", "role": "admin"})).status_code == 201
    # There is an admin key now.
    assert await page.status("DELETE", "/cluster/keys/a") == (401, "invalid_api_key")


async def test_a_node_without_a_database_says_so() -> None:
    async with open_http_node() as node:
        for path in ("/cluster/keys", "/cluster/usage", "/v1/usage", "/cluster/audit"):
            assert await Asking(node).status("GET", path) == (409, "no_database")


# Usage


async def test_usage_has_every_request_that_is_over_by_what_is_asked_for(node: HttpNode) -> None:
    keys = {name: await make(node, name) for name in ("a", "b")}
    for key in (keys["a"], keys["a"], keys["b"]):
        assert await Asking(node, key).status(*CHATS) == (200, None)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    here = Asking(node)
    rows = (await here("GET", "/cluster/usage?group_by=key,model,worker,day")).json()["data"]
    counts = {
        "completed": 2, "failed": 0, "cancelled": 0, "prompt_tokens": 6, "completion_tokens": 8,
        "cached_tokens": 2, "usage_unknown": 0,
    }  # fmt: skip
    assert rows[0] == {"key": "a", "model": "m", "worker": "local", "day": today, "requests": 2} | counts
    assert [(row["key"], row["requests"]) for row in rows] == [("a", 2), ("b", 1)]
    (total,) = (await here("GET", "/cluster/usage")).json()["data"]
    assert (total["requests"], total["prompt_tokens"]) == (3, 9)
    # A key sees its own.
    (own,) = (await Asking(node, keys["b"])("GET", "/v1/usage?group_by=key")).json()["data"]
    assert (own["key"], own["requests"]) == ("b", 1)


@pytest.mark.parametrize(
    ("query", "requests"),
    [
        ("", 1),
        ("?since=2020-01-01", 1),
        ("?since=2020-01-01T10:00:00+02:00&until=2099-12-31T10:00:00.5Z", 1),
        ("?until=2020-01-01", 0),
        ("?since=2099-01-01", 0),
        ("?since=2020-01-01&until=2020-01-01", 0),
    ],
)
async def test_usage_can_be_limited_to_a_time(node: HttpNode, query: str, requests: int) -> None:
    await Asking(node)(*CHATS)
    rows = (await Asking(node)("GET", f"/cluster/usage{query}")).json()["data"]
    assert sum(row["requests"] for row in rows) == requests


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("since=yesterday", "since"),
        ("until=", "until"),
        ("since=2026-13-01", "since"),
        ("since=2026-02-01&until=2026-01-01", "until"),
        ("group_by=key,colour", "group_by"),
        ("group_by=key;model", "group_by"),
        ("sinse=2026-01-01", "sinse"),
    ],
)
async def test_what_is_wrong_with_a_question_about_usage_is_said(
    node: HttpNode, query: str, param: str
) -> None:
    response = await Asking(node)("GET", f"/cluster/usage?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


# Audit


async def test_who_has_done_what_is_an_entry_and_a_line(
    node: HttpNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node.node_context.drain_worker = lambda name: WORKER
    admin = await make(node, "boss", role="admin")
    asking = Asking(node, admin)
    await make(node, "a", admin, models=["m"])
    await asking("PATCH", "/cluster/keys/a", {"weight": 2})
    await asking("POST", "/cluster/keys/a/rotate", {"grace": 5})
    await asking("DELETE", "/cluster/keys/a")
    await asking("POST", "/cluster/workers/w1/drain")
    node.backend.script = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: asking(*CHATS, **{"x-request-id": "r1"}))
        while not node.router.live:  # noqa: ASYNC110
            await trio.sleep(0.01)
        await asking("POST", "/cluster/calls/r1/cancel", {"reason": "enough"})
    # What was refused is no action.
    await asking("DELETE", "/cluster/keys/a")
    entries = (await asking("GET", "/cluster/audit")).json()["data"]
    expected = [
        ("request.cancel", "r1", {"reason": "enough", "calls": 1}),
        ("worker.drain", "w1", {}),
        ("key.revoke", "a", {}),
        ("key.rotate", "a", {"grace": 5.0}),
        ("key.change", "a", {"weight": 2.0}),
        ("key.create", "a", {"role": "inference", "models": ["m"]}),
        ("key.create", "boss", {"role": "admin"}),
    ]
    assert [(each["action"], each["target"], each["details"]) for each in entries] == expected
    assert [each["principal"] for each in entries] == ["boss"] * 6 + [""]
    assert all(each["address"].startswith("127.0.0.1:") for each in entries)
    lines = [record.getMessage() for record in caplog.records if record.name == "trio_cluster.audit"]
    assert lines == [f"audit: {action}" for action, _, _ in reversed(expected)]
    assert admin not in caplog.text
    assert len((await asking("GET", "/cluster/audit?limit=2")).json()["data"]) == 2
    for limit in ("0", "-1", "x", "10001"):
        assert await asking.status("GET", f"/cluster/audit?limit={limit}") == (400, "invalid_value")


# The database is away


async def test_without_its_database_the_node_goes_on_with_the_keys_that_it_knows(
    node: HttpNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from trio_cluster.accounts.errors import StoreError
    from trio_cluster.accounts.store import Store

    key = await make(node, "a")
    with monkeypatch.context() as away:
        for name in ("add_usage", "add_key", "load_keys", "count_key_changes", "sum_usage"):

            def fail(*_: object) -> None:
                raise StoreError("database /secret/path: gone")

            away.setattr(Store, name, fail)
        for _ in range(3):
            assert await Asking(node, key).status(*CHATS) == (200, None)
        response = await Asking(node)("POST", "/cluster/keys", {"name": "b"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "database_unavailable")
        assert "secret" not in response.text
        assert int(response.headers["retry-after"]) > 0
        assert (await Asking(node)("GET", "/cluster/usage")).status_code == 503
        await trio.sleep(2.2)
        assert accounts_of(node).journal.waiting == 3
    (total,) = (await Asking(node)("GET", "/cluster/usage")).json()["data"]
    assert total["requests"] == 3
    await trio.sleep(1.1)
    told = [record.getMessage() for record in caplog.records if record.name == "trio_cluster.accounts"]
    assert sorted(told) == [
        "changes of keys by other masters are not noticed: database /secret/path: gone",
        "changes of keys by other masters are noticed again",
        "the usage of requests cannot be written, and is kept in memory: database /secret/path: gone",
        "the usage of requests is written again",
    ]
