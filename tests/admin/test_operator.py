"""What an operator may do from outside: see calls, cancel them, let a worker go, have the configuration read again."""

from __future__ import annotations

import json
import math
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import attrs
import httpx
import openai
import pytest
import trio
from http_node import CHAT, EVENTS, STREAM, WORKER, Answer, HttpNode, Served, open_http_node

from trio_cluster.core.status import WorkerStatus
from trio_cluster.errors import OptionsError
from trio_cluster.options import OptionChange, Reloaded

PATH = "/v1/chat/completions"


@pytest.fixture
async def node() -> AsyncIterator[HttpNode]:
    """A node whose calls end only when the test ends them."""
    async with open_http_node(script=None) as opened:
        yield opened
    assert not opened.router.live


async def get_calls(node: HttpNode) -> list[dict[str, Any]]:
    async with node.client() as client:
        response = await client.get("/cluster/calls")
    assert response.status_code == 200
    calls: list[dict[str, Any]] = response.json()["calls"]
    return calls


async def cancel(node: HttpNode, request_id: str, body: bytes = b"", **headers: str) -> Answer:
    """Ask for it byte by byte: clients have opinions about what a path may look like."""
    path = f"/cluster/calls/{urllib.parse.quote(request_id, safe='')}/cancel"
    async with node.connect() as wire:
        await wire.request("POST", path, body, *(f"{name}: {value}" for name, value in headers.items()))
        return await wire.answer()


class Asking:
    """A client that waits for its answer."""

    def __init__(self, node: HttpNode, request_id: str, body: dict[str, Any] = CHAT) -> None:
        self.node = node
        self.request_id = request_id
        self.body = json.dumps(body).encode()
        self.answer: Answer | None = None

    async def run(self, *, task_status: trio.TaskStatus[Served]) -> None:
        async with self.node.connect() as wire:
            await wire.request("POST", PATH, self.body, f"x-request-id: {self.request_id}")
            task_status.started(await self.node.backend.next())
            self.answer = await wire.answer()


async def test_calls_are_listed_oldest_first_with_what_is_known_of_them(
    node: HttpNode, nursery: trio.Nursery
) -> None:
    assert await get_calls(node) == []
    first: Served = await nursery.start(Asking(node, "r1", STREAM).run)
    second: Served = await nursery.start(Asking(node, "r2").run)
    first.head(EVENTS).event("hello")
    first.call.opened_at = time.monotonic() - 90
    while not first.taken:
        await trio.lowlevel.checkpoint()
    one, two = await get_calls(node)
    assert 90 <= one.pop("age") < 100
    assert 0 <= two.pop("age") < 10
    assert one.pop("client").startswith("127.0.0.1:")
    assert two.pop("client").startswith("127.0.0.1:")
    common = {"model": "m", "kind": "chat", "endpoint": "chat.completions", "node": "local"}
    taken = {"produced": first.taken, "delivered": first.taken}
    assert one == common | {"request_id": "r1", "phase": "streaming"} | taken
    assert two == common | {"request_id": "r2", "phase": "waiting", "produced": 0, "delivered": 0}
    first.done()
    second.head().done()


@pytest.mark.parametrize(
    "request_id", ["r1", "a/b", "/x//", "a b", "100%", "q?x#y", "..", "x/cancel", "a%2Fb", "~!\"$&'()*+,;=@"]
)
async def test_a_call_that_is_cancelled_is_a_503_that_clients_do_not_repeat(
    node: HttpNode, nursery: trio.Nursery, request_id: str
) -> None:
    async with trio.open_nursery() as asking:
        client = Asking(node, request_id)
        served: Served = await asking.start(client.run)
        answer = await cancel(node, request_id, b'{"reason": "make room"}')
        assert answer.status == 200
        assert json.loads(answer.body) == {"request_id": request_id, "cancelled": 1}
    assert await served.wait_cancelled() == "make room"
    assert client.answer is not None
    assert (client.answer.status, client.answer.error["code"]) == (503, "cancelled")
    assert client.answer.error["message"] == "The request was cancelled: make room"
    assert client.answer.headers["x-should-retry"] == "false"
    assert client.answer.headers["x-request-id"] == request_id


async def test_a_stream_that_is_cancelled_gets_its_error_event_and_a_proper_end(
    node: HttpNode, nursery: trio.Nursery
) -> None:
    async with node.connect() as wire:
        await wire.request("POST", PATH, json.dumps(STREAM).encode(), "x-request-id: r1")
        served = await node.backend.next()
        served.head(EVENTS).event("hello")
        await wire.until(b"hello")
        await cancel(node, "r1")
        rest = await wire.until(b"}}\n\n")
        assert b'"code":"cancelled"' in rest
        assert b"requested by an operator" in rest
        await wire.until(b"\r\n0\r\n\r\n")


async def test_a_call_that_is_cancelled_because_the_node_stops_may_be_repeated(
    node: HttpNode, nursery: trio.Nursery
) -> None:
    async with trio.open_nursery() as asking:
        client = Asking(node, "r1")
        await asking.start(client.run)
        node.router.cancel_all("the server is being stopped")
    assert client.answer is not None
    assert (client.answer.status, client.answer.error["code"]) == (503, "cancelled")
    assert "x-should-retry" not in client.answer.headers


async def test_all_calls_of_the_same_id_are_cancelled_and_no_others(
    node: HttpNode, nursery: trio.Nursery
) -> None:
    async with trio.open_nursery() as asking:
        clients = [Asking(node, request_id) for request_id in ("twin", "other", "twin")]
        calls: list[Served] = [await asking.start(client.run) for client in clients]
        assert json.loads((await cancel(node, "twin")).body)["cancelled"] == 2
        assert calls[1].reason is None
        calls[1].head().data(b"{}").done()
    assert [client.answer.status for client in clients if client.answer] == [503, 200, 503]


async def test_a_call_whose_work_has_not_stopped_is_listed_and_not_cancelled_again(
    node: HttpNode, nursery: trio.Nursery
) -> None:
    async with trio.open_nursery() as asking:
        served: Served = await asking.start(Asking(node, "r1").run)
        served.call._on_cancel = lambda reason: None  # it hears of it, and goes on
        await cancel(node, "r1")
    assert [call["phase"] for call in await get_calls(node)] == ["stopping"]
    answer = await cancel(node, "r1")
    assert (answer.status, json.loads(answer.body)["cancelled"]) == (200, 0)
    served.call.release()
    assert await get_calls(node) == []
    assert (await cancel(node, "r1")).status == 404


async def test_what_is_not_there_is_404(node: HttpNode) -> None:
    answer = await cancel(node, "nobody")
    assert (answer.status, answer.error["code"]) == (404, "call_not_found")
    assert "'nobody'" in answer.error["message"]
    async with node.client() as client:
        response = await client.post("/cluster/workers/nobody/drain")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "worker_not_found")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"reason": 3}', "reason"),
        (b'{"reason": ""}', "reason"),
        (b'{"reason": "two\\nlines"}', "reason"),
        (json.dumps({"reason": "x" * 501}).encode(), "reason"),
    ],
)
async def test_a_reason_that_is_none_is_a_400_and_nothing_is_cancelled(
    node: HttpNode, nursery: trio.Nursery, body: bytes, param: str | None
) -> None:
    served: Served = await nursery.start(Asking(node, "r1").run)
    answer = await cancel(node, "r1", body)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert served.reason is None
    assert (await cancel(node, "r1", b' {"reason": null, "x": 1} ')).status == 200


@pytest.mark.parametrize("name", ["w1", "rack 3/gpu 1", "模型", "..", "w/drain"])
async def test_a_worker_is_drained_whatever_its_name(node: HttpNode, name: str) -> None:
    asked: list[str] = []

    def drain(worker: str) -> WorkerStatus:
        asked.append(worker)
        return attrs.evolve(WORKER, id=worker, state="draining")

    node.node_context.drain_worker = drain
    async with node.connect() as wire:
        await wire.request("POST", f"/cluster/workers/{urllib.parse.quote(name, safe='')}/drain", b"")
        answer = await wire.answer()
    state = json.loads(answer.body)
    assert (answer.status, state["id"], state["state"]) == (202, name, "draining")
    assert asked == [name]


async def test_the_story_of_a_request_is_told_while_it_runs_and_afterwards(
    node: HttpNode, nursery: trio.Nursery
) -> None:
    path = f"/cluster/requests/{urllib.parse.quote('a/b c', safe='')}"
    async with node.client() as client:
        unknown = await client.get(path)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")
        async with trio.open_nursery() as asking:
            served: Served = await asking.start(Asking(node, "a/b c").run)
            story = (await client.get(path)).json()
            assert (story["outcome"], story["by"], story["status"]) == ("running", "", 0)
            assert (story["endpoint"], story["model"]) == ("chat.completions", "m")
            assert story["steps"][-1]["text"].startswith("now: waiting for the first output of 'm' on ")
            assert story["attempts"][0]["ended"] is None
            served.head().done()
        story = (await client.get(path)).json()
        assert (story["outcome"], story["by"], story["status"]) == ("completed", "model", 200)
        assert story["earlier"] == 0
        assert (await client.post(path)).status_code == 405
        again: Served = await nursery.start(Asking(node, "a/b c").run)
        assert (await client.get(path)).json()["earlier"] == 1
        again.head().done()


async def test_no_story_is_told_if_none_is_recorded(node: HttpNode, nursery: trio.Nursery) -> None:
    node.node_context.options.stories = 0
    served: Served = await nursery.start(Asking(node, "r1").run)
    served.head().done()
    async with node.client() as client:
        response = await client.get("/cluster/requests/r1")
    assert response.status_code == 404
    assert "option 'stories'" in response.json()["error"]["message"]


async def test_operators_need_the_key() -> None:
    async with open_http_node(api_key="secret") as node, node.client() as client:
        node.node_context.drain_worker = lambda name: pytest.fail("drained without a key")
        for method, path in (
            ("GET", "/cluster/calls"),
            ("POST", "/cluster/calls/r1/cancel"),
            ("GET", "/cluster/requests/r1"),
            ("POST", "/cluster/workers/w1/drain"),
            ("POST", "/cluster/reload"),
        ):
            assert (await client.request(method, path)).status_code == 401


async def test_pages_of_the_web_may_not_act(node: HttpNode, nursery: trio.Nursery) -> None:
    node.node_context.drain_worker = lambda name: pytest.fail("drained by a page")
    served: Served = await nursery.start(Asking(node, "r1").run)
    answer = await cancel(node, "r1", Origin="https://example.com")
    assert (answer.status, answer.error["code"]) == (403, "foreign_origin")
    assert served.reason is None
    async with node.client() as client:
        for origin in ("https://example.com", "null"):
            response = await client.post("/cluster/workers/w1/drain", headers={"Origin": origin})
            assert response.status_code == 403
    served.head().done()


async def test_the_node_s_own_page_may_act(node: HttpNode, nursery: trio.Nursery) -> None:
    served: Served = await nursery.start(Asking(node, "r1").run)
    async with node.client() as client:
        response = await client.post("/cluster/calls/r1/cancel", headers={"Origin": node.url})
    assert response.status_code == 200
    assert served.reason is not None


async def test_looking_changes_nothing(node: HttpNode) -> None:
    async with node.client() as client:
        assert (await client.get("/cluster/calls/r1/cancel")).status_code == 405
        assert (await client.get("/cluster/workers/w1/drain")).status_code == 405
        assert (await client.post("/cluster/calls")).status_code == 405


async def test_the_official_client_does_not_send_a_cancelled_request_again(
    node: HttpNode, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.platform", lambda *_, **__: "test")
    http_client = httpx.AsyncClient(timeout=5, trust_env=False, verify=False)
    errors: list[openai.APIStatusError] = []

    async def ask() -> None:
        async with openai.AsyncOpenAI(
            api_key="k", base_url=f"{node.url}/v1", max_retries=2, http_client=http_client
        ) as client:
            try:
                await client.chat.completions.create(**CHAT, extra_headers={"x-request-id": "r1"})
            except openai.APIStatusError as error:
                errors.append(error)

    async with trio.open_nursery() as asking:
        asking.start_soon(ask)
        await node.backend.next()
        await cancel(node, "r1")
    assert [error.code for error in errors] == ["cancelled"]
    assert node.router.stats.admitted == 1


@pytest.mark.parametrize(
    "path",
    [
        "/cluster/calls",
        "//cluster/calls",
        "/cluster//calls",
        "/cluster/./calls",
        "/x/../cluster/calls",
        "/cluster%2Fcalls",
        "/%63luster/calls",
        "/CLUSTER/calls",
        "/cluster/calls/",
        "/cluster/calls?x=/health",
        "/cluster/calls#/health",
        "/cluster/calls;x=/health",
        "http://host/cluster/calls",
        "/health/../cluster/calls",
        "/v1/cluster/calls",
    ],
)
async def test_no_spelling_of_a_path_goes_around_the_operator_key(path: str) -> None:
    async with open_http_node(script=None, api_key="k", operator_key="op") as node:
        statuses = {}
        for key in ("k", "op"):
            async with node.connect() as wire:
                await wire.request("GET", path, b"", f"authorization: Bearer {key}")
                statuses[key] = (await wire.answer()).status
        assert statuses["k"] in (400, 403, 404)
        assert statuses["k"] == 403 or statuses["op"] != 200


async def test_with_an_operator_key_the_key_of_clients_neither_cancels_nor_drains(
    nursery: trio.Nursery,
) -> None:
    async with open_http_node(script=None, operator_key="op") as node:
        served: Served = await nursery.start(Asking(node, "r1").run)
        for key, status in (("wrong", 401), ("op", 200)):
            answer = await cancel(node, "r1", authorization=f"Bearer {key}")
            assert answer.status == status
            assert served.call.ended == (status == 200)
            async with node.client(headers={"authorization": f"Bearer {key}"}) as client:
                response = await client.post("/cluster/workers/w/drain")
            assert response.status_code == (404 if status == 200 else status)
        served.call.release()


async def test_a_configuration_that_was_read_again_is_described_without_secrets(node: HttpNode) -> None:
    async def reload() -> Reloaded:
        return Reloaded(
            "/etc/c.toml",
            [
                OptionChange("server.default_timeout", math.inf, 5.0, "at once"),
                OptionChange("server.port", 8080, 8081, "after a restart"),
                OptionChange("server.api_key", "old-sesame", "new-sesame", "at once", is_secret=True),
            ],
            certificates=True,
        )

    node.node_context.reload = reload
    async with node.client() as client:
        response = await client.post("/cluster/reload")
        assert (await client.get("/cluster/reload")).status_code == 405
    assert "sesame" not in response.text
    assert (response.status_code, response.json()) == (
        200,
        {
            "file": "/etc/c.toml",
            "applied": [
                {"option": "server.default_timeout", "before": "inf", "after": 5.0},
                {"option": "server.api_key"},
            ],
            "needs_restart": [{"option": "server.port", "before": 8080, "after": 8081}],
            "certificates": True,
        },
    )


async def test_a_configuration_that_is_wrong_or_not_there_is_a_409(node: HttpNode) -> None:
    async with node.client() as client:
        response = await client.post("/cluster/reload")
        assert response.status_code == 409
        assert response.json()["error"]["code"] == "no_configuration_file"

        async def reload() -> Reloaded:
            raise OptionsError("c.toml: drain_timeout: must be 0 or more seconds")

        node.node_context.reload = reload
        response = await client.post("/cluster/reload")
        assert response.status_code == 409
        error = response.json()["error"]
        assert error["code"] == "invalid_configuration"
        assert error["message"] == "Nothing has changed: c.toml: drain_timeout: must be 0 or more seconds"

        async def fail() -> Reloaded:
            pytest.fail("a page has it read")

        node.node_context.reload = fail
        response = await client.post("/cluster/reload", headers={"Origin": "https://page.example"})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "foreign_origin")
