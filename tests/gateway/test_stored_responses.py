"""Stored responses on the path of a request: what is forwarded, and when the client sees the end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import patience
import pytest
import trio
import trio.lowlevel
import trio.testing
from http_node import EVENTS, HttpNode, Turns, open_http_node

from trio_cluster.accounts.errors import StoreError
from trio_cluster.accounts.keys import KeyRecord
from trio_cluster.core.principal import ANONYMOUS
from trio_cluster.errors import ApiError
from trio_cluster.stored.memory import MemoryResponses
from trio_cluster.stored.record import Record, owner_of

DELTA = b'event: response.output_text.delta\ndata: {"delta": "response.completed"}\n\n'


def response(response_id: str = "resp_1", text: str = "hi", **members: Any) -> dict[str, Any]:
    message = {
        "id": f"msg_{response_id}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }
    return {
        "id": response_id,
        "object": "response",
        "status": "completed",
        "output": [message],
        "store": False,
    } | members


def final(value: dict[str, Any], kind: str = "completed", line: str = "\n") -> bytes:
    event = {"type": f"response.{kind}", "response": value}
    return f"event: response.{kind}{line}data: {json.dumps(event)}{line}{line}".encode()


class Gated(MemoryResponses):
    """Stores nothing until it may.

    Attributes:
        waiting: it has been asked to.
        may: it may.
    """

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.waiting = trio.Event()
        self.may = trio.Event()

    async def put(self, owner: str, record: Record) -> bool:
        self.waiting.set()
        await self.may.wait()
        return await super().put(owner, record)


@pytest.fixture
async def node() -> AsyncIterator[HttpNode]:
    """A node with a chat model ``m`` and a passthrough model ``raw``, whose calls the test answers."""
    async with open_http_node(None) as opened:
        opened.node_context.responses = MemoryResponses(opened.node_context.options)
        opened.add("raw", kind="any")
        yield opened


async def answered(
    node: HttpNode,
    asked: dict[str, Any] | bytes,
    value: dict[str, Any] | bytes,
    content_type: str = "application/json",
    status: int = 200,
) -> tuple[bytes, httpx.Response]:
    """Ask a model; return what its backend was sent, and what the client got."""
    got: list[httpx.Response] = []
    content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()

    async def ask() -> None:
        async with node.client() as client:
            headers = {"content-type": "application/json"}
            got.append(await client.post("/v1/responses", content=content, headers=headers))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        served = await node.backend.next()
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        served.head(content_type, status).data(data).done()
    return served.request.body, got[0]


async def get(node: HttpNode, path: str, key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with node.client(headers=headers) as client:
        return await client.get(path)


async def is_stored(node: HttpNode, response_id: str = "resp_1") -> bool:
    return (await get(node, f"/v1/responses/{response_id}")).status_code == 200


# What is forwarded


async def test_a_body_that_refers_to_nothing_is_forwarded_as_it_is(node: HttpNode) -> None:
    for body in (
        b'{"model": "m",  "input": "x"}',
        b'{"model":"m","input":[{"role":"user","content":"x"}],"store":true}',
    ):
        forwarded, _ = await answered(node, body, response())
        assert forwarded == body
        assert await is_stored(node)
    body = b' {"model": "raw", "input": "x", "store": false, "mine": 1}'
    forwarded, _ = await answered(node, body, response("resp_2"))
    assert forwarded == body
    assert not await is_stored(node, "resp_2")


async def test_a_server_behind_a_passthrough_model_stores_nothing_and_gets_all_of_it(node: HttpNode) -> None:
    for body in (b' {"model": "raw", "input": "x"}', b'{"model": "raw", "input": "x", "store": true}'):
        forwarded, got = await answered(node, body, response())
        assert json.loads(forwarded) == {"model": "raw", "input": "x", "store": False}
        # Its answer passes as it is.
        assert got.json() == response()
    stored = (await get(node, "/v1/responses/resp_1")).json()
    assert stored == response() | {"store": True, "previous_response_id": None}
    second = {"model": "raw", "input": [{"role": "user", "content": "y"}], "previous_response_id": "resp_1"}
    forwarded, _ = await answered(node, second, response("resp_2"))
    sent = json.loads(forwarded)
    assert sent.keys() == {"model", "input", "store"}
    assert sent["store"] is False
    assert [(item["role"], item.get("id")) for item in sent["input"][1:]] == [
        ("assistant", "msg_resp_1"),
        ("user", None),
    ]
    third = {
        "model": "raw",
        "input": [{"type": "item_reference", "id": "msg_resp_2"}, {"role": "user", "content": "z"}],
        "store": False,
    }
    forwarded, _ = await answered(node, third, response("resp_3"))
    assert [item["role"] for item in json.loads(forwarded)["input"]] == ["assistant", "user"]
    assert not await is_stored(node, "resp_3")


async def test_where_nothing_is_stored_a_passthrough_model_gets_every_byte(node: HttpNode) -> None:
    node.node_context.options.stored_responses = 0
    body = b'{"model": "raw", "input": "x", "previous_response_id": "resp_of_the_server", "store": true}'
    forwarded, got = await answered(node, body, response())
    assert forwarded == body
    assert got.json() == response()
    forwarded, _ = await answered(node, b'{"model": "m", "input": "x", "store": true}', response())
    assert json.loads(forwarded)["store"] is False
    forwarded, _ = await answered(node, b' {"model": "m", "input": "x"}', response())
    assert forwarded == b'{"store":false,"model": "m", "input": "x"}'


async def test_what_is_no_request_is_left_to_the_server_behind_a_passthrough_model(node: HttpNode) -> None:
    for body in (
        b'{"model": "raw", "input": 7}',
        b'{"model": "raw"}',
        b'{"model": "raw", "input": ["x"]}',
        b'{"model": "raw", "input": 1e999}',
    ):
        forwarded, got = await answered(node, body, b'{"error": {}}', status=400)
        assert forwarded == body
        assert got.status_code == 400
    for value in (
        b"no json",
        b"[]",
        b"{}",
        json.dumps(response(status="queued")).encode(),
        json.dumps(response("conv_1")).encode(),
    ):
        await answered(node, {"model": "raw", "input": "x"}, value)
    assert not await is_stored(node)
    assert node.node_context.responses.count == 0  # type: ignore[union-attr]
    await answered(node, {"model": "raw", "input": [{"type": 7, "content": {"a": None}}]}, response())
    assert await is_stored(node)


async def test_a_whole_input_may_be_as_large_as_a_body(node: HttpNode) -> None:
    node.node_context.options.server.max_json_size = 3000
    await answered(node, {"model": "m", "input": "x" * 2000}, response())
    async with node.client() as client:
        body = {"model": "m", "input": "y" * 1000, "previous_response_id": "resp_1"}
        got = await client.post("/v1/responses", json=body)
    assert got.status_code == 413


async def test_a_server_behind_a_passthrough_model_may_have_routes_below_responses(node: HttpNode) -> None:
    async with node.client() as client, trio.open_nursery() as nursery:
        body = {"model": "raw", "input": "x"}
        nursery.start_soon(partial(client.post, "/v1/responses/compact", json=body))
        served = await node.backend.next()
        assert served.request.endpoint == "/v1/responses/compact"
        served.head().data(b"{}").done()
        assert (await client.get("/v1/responses/compact")).status_code == 404


# What is captured


@pytest.mark.parametrize("line", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
async def test_the_last_event_of_a_stream_is_stored(node: HttpNode, kind: str, line: str) -> None:
    data = DELTA + final(response(status=kind), kind, line)
    _, got = await answered(node, {"model": "m", "input": "x", "stream": True}, data, EVENTS)
    assert got.content == data
    assert (await get(node, "/v1/responses/resp_1")).json()["status"] == kind


async def test_a_stream_that_fails_behind_a_comment_before_it_has_an_id_is_not_stored(node: HttpNode) -> None:
    node.node_context.options.server.keepalive = 0.05
    body = json.dumps({"model": "m", "input": "x", "stream": True}).encode()
    async with node.connect() as wire:
        await wire.request("POST", "/v1/responses", body)
        served = await node.backend.next()
        assert (await wire.head())[0] == 200
        served.fail(ApiError(500, "the model broke"))
        await wire.until(b"event: response.failed")
        await wire.until(b"\r\n0\r\n\r\n")
    assert node.node_context.responses.count == 0  # type: ignore[union-attr]
    # One that goes on behind its comments is.
    async with node.connect() as wire:
        await wire.request("POST", "/v1/responses", body)
        served = await node.backend.next()
        await wire.head()
        served.head(EVENTS).data(DELTA + final(response())).done()
        await wire.until(b"\r\n0\r\n\r\n")
    assert await is_stored(node)


@pytest.mark.parametrize("size", [10, 300_000, 1_500_000, 5_000_000])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_an_answer_of_any_size_is_stored_whatever_pieces_it_comes_in(
    node: HttpNode, size: int, stream: bool
) -> None:
    value = response(text="event: response.completed\n" * (size // 26 + 1))
    data = DELTA + final(value) if stream else json.dumps(value).encode()
    pieces = (
        [data[i : i + 250_007] for i in range(0, len(data), 250_007)]
        if size > 10
        else [bytes([each]) for each in data]
    )
    body = {"model": "m", "input": "x", "stream": stream}
    async with trio.open_nursery() as nursery:
        got = bytearray()

        async def ask() -> None:
            async with node.client() as client, client.stream("POST", "/v1/responses", json=body) as answer:
                async for piece in answer.aiter_raw():
                    got.extend(piece)
            assert await is_stored(node)

        nursery.start_soon(ask)
        served = await node.backend.next()
        served.head(EVENTS if stream else "application/json")
        for piece in pieces:
            served.data(piece)
            await trio.lowlevel.checkpoint()
        served.done()
    assert bytes(got) == data
    stored = (await get(node, "/v1/responses/resp_1")).json()
    assert stored["output"] == value["output"]


async def test_an_answer_that_is_larger_than_all_may_be_is_not_stored(node: HttpNode) -> None:
    node.node_context.options.stored_responses_size = 10_000
    value = response(text="x" * 20_000)
    _, got = await answered(node, {"model": "m", "input": "x"}, value)
    assert got.json() == value
    data = DELTA + final(value)
    _, got = await answered(node, {"model": "m", "input": "x", "stream": True}, data, EVENTS)
    assert got.content == data
    assert not await is_stored(node)


async def test_a_plain_answer_that_is_cut_is_not_stored_even_if_it_looks_whole(node: HttpNode) -> None:
    # Larger than what is kept until the end of an answer is known.
    value = json.dumps(response(text="x" * 1_500_000)).encode()
    async with node.connect() as wire:
        await wire.request("POST", "/v1/responses", b'{"model": "m", "input": "x"}')
        served = await node.backend.next()
        served.head().data(value)
        await wire.until(value[-100:])
        served.fail(ApiError(502, "the worker was lost"))
        await wire.closed()
    await node.node_context.wait_answered()
    assert not await is_stored(node)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_the_client_sees_the_end_when_the_answer_is_stored(node: HttpNode, stream: bool) -> None:
    gated = node.node_context.responses = Gated(node.node_context.options)
    end = final(response()) if stream else json.dumps(response()).encode()
    content = json.dumps({"model": "m", "input": "x", "stream": stream}).encode()
    async with node.connect() as wire:
        await wire.request("POST", "/v1/responses", content)
        served = await node.backend.next()
        if stream:
            served.head(EVENTS).data(DELTA)
            await wire.head()
            assert await wire.chunk() == DELTA
            # Tokens take the fast path all the same.
            await trio.testing.wait_all_tasks_blocked()
            with Turns() as turns:
                served.data(b"event: response.output_text.delta\ndata: {}\n\n")
                await trio.testing.wait_all_tasks_blocked()
            fast = turns.now
            assert await wire.chunk() == b"event: response.output_text.delta\ndata: {}\n\n"
            assert fast <= 2
        else:
            served.head()
        served.data(end).done()
        with patience.fail_after(2):
            await gated.waiting.wait()
        with trio.move_on_after(0.1) as scope:
            await wire.chunk() if stream else await wire.head()
        assert scope.cancelled_caught
        gated.may.set()
        if stream:
            assert await wire.chunk() == end
        else:
            assert (await wire.answer()).body == end


async def test_a_client_that_leaves_while_its_answer_is_stored_ends_that(node: HttpNode) -> None:
    gated = node.node_context.responses = Gated(node.node_context.options)
    async with node.connect() as wire:
        await wire.request("POST", "/v1/responses", b'{"model": "m", "input": "x"}')
        served = await node.backend.next()
        served.head().data(json.dumps(response()).encode()).done()
        with patience.fail_after(2):
            await gated.waiting.wait()
    with patience.fail_after(2):
        await node.node_context.wait_answered()
    gated.may.set()
    assert gated.count == 0


async def test_a_store_that_fails_costs_no_answer(node: HttpNode) -> None:
    class Away(MemoryResponses):
        async def extend(self, *_: Any) -> bool:
            raise StoreError("database x: away")

    node.node_context.responses = Away(node.node_context.options)
    async with node.client() as client:
        conversation = (await client.post("/v1/conversations")).json()["id"]
    body = {"model": "m", "input": "x", "conversation": conversation}
    _, got = await answered(node, body, response())
    assert got.json() == response()


async def test_a_store_that_cannot_be_read_is_503_for_what_refers_to_it_and_for_nothing_else(
    node: HttpNode,
) -> None:
    class Away(MemoryResponses):
        async def get(self, *_: Any) -> Record | None:
            raise StoreError("database x: away")

    node.node_context.responses = Away(node.node_context.options)
    async with node.client() as client:
        body = {"model": "m", "input": "x", "previous_response_id": "resp_1"}
        got = [await client.post("/v1/responses", json=body), await client.get("/v1/responses/resp_1")]
    for each in got:
        assert (each.status_code, each.json()["error"]["code"]) == (503, "database_unavailable")
        assert "retry-after" in each.headers
    _, answer = await answered(node, {"model": "m", "input": "x"}, response())
    assert answer.status_code == 200


# Who finds it


async def test_a_key_finds_what_it_has_stored_and_nothing_else(tmp_path: Path) -> None:
    async with open_http_node(None, database=tmp_path / "a.db") as node:
        responses = MemoryResponses(node.node_context.options)
        node.node_context.responses = responses
        accounts = node.node_context.accounts
        assert accounts is not None
        accounts.on_revoked = responses.forget
        mine, other, admin = [
            await accounts.create_key(KeyRecord(name=name, role=role, created_at=5.0), ANONYMOUS, "")
            for name, role in (("a", "inference"), ("b", "inference"), ("c", "admin"))
        ]

        async def ask(key: str, answer: dict[str, Any] | None = None, **fields: Any) -> httpx.Response:
            got: list[httpx.Response] = []

            async def post() -> None:
                async with node.client(headers={"authorization": f"Bearer {key}"}) as client:
                    got.append(await client.post("/v1/responses", json={"model": "m", "input": "x"} | fields))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(post)
                if answer is not None:
                    (await node.backend.next()).head().data(json.dumps(answer).encode()).done()
            return got[0]

        async def create_conversation(key: str) -> str:
            async with node.client(headers={"authorization": f"Bearer {key}"}) as client:
                made: str = (await client.post("/v1/conversations")).json()["id"]
            return made

        await ask(mine, response())
        conversation = await create_conversation(mine)
        assert (await get(node, "/v1/responses/resp_1", mine)).status_code == 200
        reference = [{"type": "item_reference", "id": "msg_resp_1"}]
        for key in (other, admin):
            # The same as for one that there never was.
            for path in ("/v1/responses/{}", "/v1/responses/{}/input_items", "/v1/conversations/{}"):
                this, none = (conversation, "conv_x") if "conv" in path else ("resp_1", "resp_x")
                found, missing = [await get(node, path.format(each), key) for each in (this, none)]
                assert found.status_code == missing.status_code == 404
                assert (
                    found.json()["error"]["message"].replace(this, none) == missing.json()["error"]["message"]
                )
            async with node.client(headers={"authorization": f"Bearer {key}"}) as client:
                assert (await client.delete("/v1/responses/resp_1")).status_code == 404
                assert (await client.delete(f"/v1/conversations/{conversation}")).status_code == 404
            for fields, status in (
                ({"previous_response_id": "resp_1"}, 400),
                ({"conversation": conversation}, 404),
                ({"input": reference}, 404),
            ):
                assert (await ask(key, **fields)).status_code == status
        # The same id is another response for another key.
        await ask(other, response(text="other"))
        assert (await get(node, "/v1/responses/resp_1", mine)).json()["output"] == response()["output"]
        # A new key under the name of one that was revoked.
        await accounts.revoke_key("a", ANONYMOUS, "")
        assert responses.count == 1
        again = await accounts.create_key(KeyRecord(name="a", created_at=6.0), ANONYMOUS, "")
        assert (await get(node, "/v1/responses/resp_1", again)).status_code == 404
        assert (await get(node, "/v1/responses/resp_1", mine)).status_code == 401


async def test_a_rotated_key_finds_what_it_has_stored(tmp_path: Path) -> None:
    async with open_http_node(None, database=tmp_path / "a.db") as node:
        responses = node.node_context.responses = MemoryResponses(node.node_context.options)
        accounts = node.node_context.accounts
        assert accounts is not None
        await accounts.create_key(KeyRecord(name="a", created_at=5.0), ANONYMOUS, "")
        await responses.put(owner_of(accounts.record("a").principal()), Record("resp_1", b"{}", ()))
        key = await accounts.rotate_key("a", 0, ANONYMOUS, "")
        assert (await get(node, "/v1/responses/resp_1", key)).status_code == 200
