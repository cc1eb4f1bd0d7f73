"""Routes that the OpenAI API does not have, from registering them to the answer, wherever their handlers run."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ApiError, ChatRequest, ClusterServer, CustomRequest, OutputChunk, Provider, RawCall
from trio_cluster.testing import (
    FakeModel,
    SimulatedCluster,
    assert_no_orphans,
    assert_stats_balance,
    open_cluster,
    settle,
    worker,
)

BOUNDARY = "x"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


async def echo(request: ChatRequest) -> str:
    return request.last_text


def tokenize(request: CustomRequest) -> dict[str, Any]:
    return {"tokens": [len(word) for word in request.raw["text"].split()]}


@pytest.fixture
async def cluster(autojump_clock: MockClock) -> AsyncIterator[SimulatedCluster]:
    async with open_cluster() as opened:
        yield opened
        await settle(opened)
        assert_no_orphans(opened)
        assert_stats_balance(opened)


@pytest.fixture(params=["master", "worker"])
async def node(request: pytest.FixtureRequest, cluster: SimulatedCluster) -> ClusterServer:
    """A node of the cluster: the one that has the API, or one behind it."""
    if request.param == "master":
        return cluster.master.server
    server = worker("w1")
    await cluster.start_worker(server)
    return server


async def ask(cluster: SimulatedCluster, path: str, **fields: Any) -> Any:
    return await cluster.client().post(path, {"model": "m", **fields})


@pytest.mark.parametrize("path", ["/v1/tokenize", "/tokenize", "/v1/tokenize/"])
async def test_a_route_answers_beside_the_chat_of_its_model(
    cluster: SimulatedCluster, node: ClusterServer, path: str, autojump_clock: MockClock
) -> None:
    node.register_chat("m", echo)
    node.route("/v1/tokenize", "m", tokenize)
    await settle(cluster)
    answer = await ask(cluster, path, text="one three")
    assert (answer.status, answer.json()) == (200, {"tokens": [3, 5]})
    assert (await cluster.client().chat("m", stream=False)).json()["choices"][0]["message"]["content"] == "hi"


async def test_a_model_may_have_nothing_but_routes_of_its_own(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    @node.route("/v1/tokenize", "m")
    async def count(request: CustomRequest) -> dict[str, Any]:
        return {"count": len(request.raw["text"])}

    @node.route("/v1/detokenize", "m")
    async def text(request: CustomRequest) -> str:
        return request.path

    assert callable(count)
    assert callable(text)
    await settle(cluster)
    assert (await ask(cluster, "/v1/tokenize", text="one")).json() == {"count": 3}
    answer = await ask(cluster, "/v1/detokenize")
    assert (answer.body, answer.headers["content-type"]) == (b"/v1/detokenize", "text/plain; charset=utf-8")
    refused = await cluster.client().chat("m", stream=False)
    assert (refused.status, refused.error["code"]) == (400, "model_kind_mismatch")
    listed = (await cluster.client().get("/v1/models")).json()["data"]
    assert [(entry["id"], entry["kind"]) for entry in listed] == [("m", "custom")]


async def test_a_model_that_does_not_answer_a_route_is_refused_on_it(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    node.register_chat("other", echo)
    node.route("/v1/tokenize", "m", tokenize)
    await settle(cluster)
    answer = await ask(cluster, "/v1/tokenize", model="other", text="x")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (
        400,
        "model_kind_mismatch",
        "model",
    )
    assert answer.error["message"] == "The model 'other' does not answer /v1/tokenize"
    answer = await ask(cluster, "/v1/tokenize", model="nobody")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    answer = await cluster.client().post("/v1/tokenize", {"text": "x"})
    assert (answer.status, answer.error["param"]) == (400, "model")


async def test_an_unknown_path_stays_one(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    node.route("/v1/tokenize", "m", tokenize)
    await settle(cluster)
    for path in ("/v1/tokenizer", "/v1/tokenize/more", "/v1", "/v2/tokenize"):
        answer = await ask(cluster, path)
        assert (answer.status, answer.error["type"]) == (404, "invalid_request_error")


async def test_another_method_is_refused_with_the_right_one(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    node.route("/v1/tokenize", "m", tokenize)
    await settle(cluster)
    for path in ("/v1/tokenize", "/tokenize"):
        answer = await cluster.client().get(path)
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert answer.error["message"] == f"{path} does not allow GET"


async def test_a_route_is_gone_two_minutes_after_its_model(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    node.route("/v1/tokenize", "m", tokenize)
    await settle(cluster)
    assert node.unregister_model("m")
    await settle(cluster)
    answer = await ask(cluster, "/v1/tokenize", text="x")
    assert (answer.status, answer.error["code"]) == (503, "model_unavailable")
    await trio.sleep(121)
    assert (await ask(cluster, "/v1/tokenize", text="x")).status == 404


async def test_a_handler_of_a_route_may_have_any_shape(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    async def async_yields(request: CustomRequest) -> AsyncIterator[Any]:
        yield {"a": 1}
        yield {"b": 2}

    async def async_returns(request: CustomRequest) -> Any:
        return {"a": 1, "b": 2}

    async def async_pushes(request: CustomRequest, provider: Provider) -> None:
        await provider.push({"a": 1})
        await provider.push({"b": 2})

    def yields(request: CustomRequest) -> Iterator[Any]:
        yield {"a": 1}
        yield {"b": 2}

    def returns(request: CustomRequest) -> Any:
        return {"a": 1, "b": 2}

    def pushes(request: CustomRequest, provider: Any) -> None:
        provider.push({"a": 1})
        provider.push({"b": 2})

    shapes: list[Any] = [async_yields, async_returns, async_pushes, yields, returns, pushes]
    for shape in shapes:
        node.route(f"/v1/{shape.__name__}", "m", shape)
    await settle(cluster)
    for shape in shapes:
        assert (await ask(cluster, f"/v1/{shape.__name__}")).json() == {"a": 1, "b": 2}
        streamed = await ask(cluster, f"/v1/{shape.__name__}", stream=True)
        assert streamed.headers["content-type"] == "text/event-stream"
        *events, done, _ = streamed.body.split(b"\n\n")
        values = [json.loads(event.removeprefix(b"data: ")) for event in events]
        assert values in ([{"a": 1}, {"b": 2}], [{"a": 1, "b": 2}])
        assert done == b"data: [DONE]"


async def test_a_form_gets_to_the_handler_with_its_files(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    def sizes(request: CustomRequest) -> dict[str, Any]:
        return {"sizes": [len(data) for data in request.files["file"]], "n": request.raw["n"]}

    node.route("/v1/sizes", "m", sizes)
    await settle(cluster)
    # The last one is so large that the form is sent on while it comes.
    large = b"y" * (3 << 20)
    parts = [b'name="n"\r\n\r\n7', b'name="model"\r\n\r\nm']
    parts += [b'name="file"; filename="f"\r\n\r\n' + data for data in (b"", b"abc", large)]
    body = (
        b"".join(b"--x\r\ncontent-disposition: form-data; " + part + b"\r\n" for part in parts) + b"--x--\r\n"
    )
    answer = await cluster.client().post("/v1/sizes", body, headers=FORM)
    assert answer.json() == {"sizes": [0, 3, len(large)], "n": "7"}


async def test_an_error_in_the_middle_of_a_stream_is_an_event(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    async def breaks(request: CustomRequest) -> AsyncIterator[Any]:
        for i in range(request.raw["after"]):
            yield {"i": i}
        raise ApiError(418, "no more", code="teapot")

    node.route("/v1/breaks", "m", breaks)
    await settle(cluster)
    client = cluster.client()
    answer = await client.post("/v1/breaks", {"model": "m", "after": 2, "stream": True})
    assert answer.status == 200
    *events, error, _ = answer.body.split(b"\n\n")
    assert events == [b'data: {"i":0}', b'data: {"i":1}']
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "teapot"
    assert (await client.post("/v1/breaks", {"model": "m", "after": 0, "stream": True})).status == 418
    assert (await client.post("/v1/breaks", {"model": "m", "after": 2})).status == 418


async def test_bytes_have_the_type_that_the_handler_gives_them(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    async def draw(request: CustomRequest) -> AsyncIterator[Any]:
        yield OutputChunk.data(b"<svg>", "image/svg+xml")
        yield b"</svg>"

    node.route("/v1/draw", "m", draw)
    await settle(cluster)
    answer = await ask(cluster, "/v1/draw")
    assert (answer.body, answer.headers["content-type"]) == (b"<svg></svg>", "image/svg+xml")


@pytest.mark.parametrize(
    ("value", "content_type", "body"),
    [
        ("", "text/plain; charset=utf-8", b""),
        (b"", "application/octet-stream", b""),
        (b"x", "application/octet-stream", b"x"),
        ({}, "application/json", b"{}"),
        (OutputChunk.usage(1), "application/json", b"{}"),
    ],
)
async def test_an_answer_is_what_it_is_whatever_comes_before_it(
    cluster: SimulatedCluster,
    node: ClusterServer,
    value: Any,
    content_type: str,
    body: bytes,
    autojump_clock: MockClock,
) -> None:
    async def slow(request: CustomRequest) -> AsyncIterator[Any]:
        yield OutputChunk.usage(3)
        await trio.sleep(5)
        yield value

    node.route("/v1/slow", "m", slow)
    await settle(cluster)
    answer = await ask(cluster, "/v1/slow")
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, content_type, body)


async def test_a_route_is_cancelled_like_everything_else(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    model = FakeModel(stall_at=0)
    node.route("/v1/slow", "m", model)
    await settle(cluster)
    client = cluster.client()
    body = json.dumps({"model": "m"}).encode()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.post, "/v1/slow", body)
        await model.wait_until(lambda m: m.running == 1)
        nursery.cancel_scope.cancel()
    await model.wait_until(lambda m: m.running == 0)
    assert (model.cancelled, model.cleaned_up) == (1, 1)


def test_a_route_that_cannot_be_is_refused_where_it_is_registered() -> None:
    server = ClusterServer()
    server.route("/v1/tokenize", "m", tokenize)
    with pytest.raises(ValueError, match="answers /v1/tokenize already"):
        server.route("/v1/tokenize/", "m", tokenize)
    for path in ("/tokenize", "/v1/models", "/v1/embeddings"):
        with pytest.raises(ValueError, match="route"):
            server.route(path, "m", tokenize)
    for model in ("m", "n"):
        with pytest.raises(TypeError):
            server.route("/v1/other", model, lambda: "x")
    assert server.list_models() == ["m"]


async def test_one_model_may_make_and_change_images(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    model = FakeModel()
    node.register_image_generation("m", model)
    node.register_image_edit("m", model)
    node.register_image_edit("n", model)
    node.register_image_generation("n", model)
    for name in ("m", "n"):
        with pytest.raises(ValueError, match="already"):
            node.register_image_edit(name, model)
    with pytest.raises(ValueError, match="already"):
        node.register_chat("m", echo)
    await settle(cluster)
    parts = [b'name="model"\r\n\r\n%s', b'name="prompt"\r\n\r\np', b'name="image"; filename="f"\r\n\r\npng']
    body = (
        b"".join(b"--x\r\ncontent-disposition: form-data; " + part + b"\r\n" for part in parts) + b"--x--\r\n"
    )
    for name in ("m", "n"):
        assert (
            await cluster.client().post("/v1/images/edits", body % name.encode(), headers=FORM)
        ).status == 200
        assert (await ask(cluster, "/v1/images/generations", model=name, prompt="p")).status == 200


async def test_a_moderation_model_gets_images_if_it_can_see(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    model = FakeModel()
    node.moderation("sees", supports_vision=True)(model)
    node.moderation("blind")(model)
    await settle(cluster)
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    assert (await ask(cluster, "/v1/moderations", model="sees", input=image)).status == 200
    refused = await ask(cluster, "/v1/moderations", model="blind", input=image)
    assert (refused.status, refused.error["param"]) == (400, "input")
    assert refused.error["code"] == "vision_not_supported"


# The query


@pytest.mark.parametrize("kind", ["route", "raw"])
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ""),
        ("?", ""),
        ("?verbose=1&a=%0d%0aHost:%20x&key=secret", "verbose=1&a=%0d%0aHost:%20x"),
        ("?a=1?b", "a=1?b"),
    ],
)
async def test_the_query_reaches_the_handler(
    cluster: SimulatedCluster,
    node: ClusterServer,
    kind: str,
    query: str,
    expected: str,
    autojump_clock: MockClock,
) -> None:
    async def raw(call: RawCall) -> None:
        call.begin(200, "text/plain")
        await call.send(call.request.query.encode() + b"|")

    if kind == "raw":
        node.register_raw("m", raw)
    else:

        @node.route("/v1/tokenize", "m")
        async def tell(request: CustomRequest) -> str:
            return request.query + "|"

        assert callable(tell)
    await settle(cluster)
    answer = await ask(cluster, "/v1/tokenize" + query)
    assert (answer.status, answer.body.decode()) == (200, expected + "|")


async def test_a_query_is_refused_before_it_reaches_a_handler(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    node.route("/v1/tokenize", "m", tokenize)
    await settle(cluster)
    answer = await ask(cluster, "/v1/tokenize?model=other", text="x")
    assert (answer.status, answer.error["param"]) == (400, "model")
    answer = await ask(cluster, "/v1/tokenize?" + "a" * 9000, text="x")
    assert answer.status == 414
