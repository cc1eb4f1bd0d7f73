"""Browsers: which pages may ask, and what they get to see; and the other headers that every answer has."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import trio
from http_node import CHAT, EVENTS, STREAM, HttpNode, Served, open_http_node

from trio_cluster.errors import Overloaded

PAGE = "https://page.example"
OTHER = "https://other.example"
EXPOSED = {"x-request-id", "openai-processing-ms", "retry-after", "retry-after-ms"} | {
    f"x-ratelimit-{what}-{kind}"
    for what in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens")
}
EXPOSED |= {"request-id", "x-trio-cluster-model", "x-trio-cluster-worker"} | {
    f"anthropic-ratelimit-{kind}-{what}"
    for kind in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
}
JSON = {"content-type": "application/json"}
ASKS = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-lang",
}


def names(value: str) -> set[str]:
    return {name.strip().lower() for name in value.split(",")}


def is_allowed(answer: httpx.Response, origin: str) -> bool:
    """Return whether a browser lets a page of this origin see an answer."""
    return answer.headers.get("access-control-allow-origin") in ("*", origin)


# Asking whether one may ask


@pytest.mark.parametrize("origins", ["*", PAGE, f"{OTHER}, {PAGE}", f"{PAGE}/"])
async def test_a_page_that_is_listed_may_ask_and_needs_no_key_for_asking_that(origins: str) -> None:
    async with open_http_node(cors_origins=origins, api_key="secret") as node, node.client() as client:
        answer = await client.options("/v1/chat/completions", headers=ASKS)
        assert (answer.status_code, answer.content) == (204, b"")
        assert is_allowed(answer, PAGE)
        assert names(answer.headers["access-control-allow-methods"]) == {"get", "post", "options"}
        assert names(answer.headers["access-control-allow-headers"]) == names(
            ASKS["access-control-request-headers"]
        )
        assert int(answer.headers["access-control-max-age"]) > 0
        assert "x-request-id" in answer.headers


async def test_a_page_that_is_not_listed_is_not_told_that_it_may() -> None:
    async with open_http_node(cors_origins=OTHER) as node, node.client() as client:
        answer = await client.options("/v1/chat/completions", headers=ASKS)
        assert answer.status_code == 204
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert answer.headers["vary"] == "origin"


async def test_without_the_option_no_cors_header_is_sent() -> None:
    async with open_http_node(api_key="secret") as node, node.client() as client:
        asked = await client.options("/v1/chat/completions", headers=ASKS)
        headers = {"origin": PAGE, "authorization": "Bearer secret"}
        answered = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        for answer in (asked, answered):
            assert not [
                name for name in answer.headers if name.startswith("access-control-") or name == "vary"
            ]
        assert answered.status_code == 200


async def test_an_options_request_that_is_no_preflight_requires_a_key() -> None:
    async with open_http_node(cors_origins="*", api_key="secret") as node, node.client() as client:
        answer = await client.options("/v1/chat/completions", headers={"origin": PAGE})
        assert answer.status_code == 401


async def test_the_connection_goes_on_after_it() -> None:
    async with open_http_node(cors_origins="*") as node, node.connect() as wire:
        for _ in range(3):
            await wire.request(
                "OPTIONS", "/v1/models", b"{}", f"Origin: {PAGE}", "Access-Control-Request-Method: GET"
            )
            status, headers = await wire.head()
            assert (status, "transfer-encoding" in headers) == (204, False)
        await wire.request("GET", "/health")
        assert (await wire.answer()).status == 200


# Answers


async def check(node: HttpNode, path: str, status: int, **request: Any) -> httpx.Response:
    async with node.client() as client:
        headers = {"origin": PAGE, **request.pop("headers", {})}
        answer = await client.request(request.pop("method", "POST"), path, headers=headers, **request)
    assert answer.status_code == status
    assert is_allowed(answer, PAGE)
    assert names(answer.headers["access-control-expose-headers"]) == EXPOSED
    return answer


async def test_a_page_sees_answers_errors_and_refusals() -> None:
    async with open_http_node(cors_origins=PAGE, api_key="secret", max_body_size=10_000) as node:
        key = {"authorization": "Bearer secret", "content-type": "application/json"}
        answers = [
            await check(node, "/v1/chat/completions", 200, json=CHAT, headers=key),
            await check(node, "/v1/models", 200, method="GET", headers=key),
            await check(node, "/v1/chat/completions", 401, json=CHAT),
            await check(node, "/v1/chat/completions", 400, content=b"nonsense", headers=key),
            await check(node, "/v1/chat/completions", 404, json=CHAT | {"model": "nobody"}, headers=key),
            await check(node, "/v1/chat/completions", 413, content=bytes(20_000), headers=key),
            await check(node, "/nowhere", 404, method="GET", headers=key),
            await check(node, "/v1/models", 405, headers=key),
        ]
        for answer in answers:
            assert answer.headers["vary"] == "origin"
            assert answer.headers.get_list("access-control-allow-origin") == [PAGE]


async def test_a_page_sees_a_stream_and_its_failure() -> None:
    def fail(served: Served) -> None:
        served.head(EVENTS).event("some").fail(Overloaded("full"))

    async with (
        open_http_node(fail, cors_origins="*") as node,
        node.client() as client,
        client.stream("POST", "/v1/chat/completions", json=STREAM, headers={"origin": PAGE}) as answer,
    ):
        assert is_allowed(answer, PAGE)
        assert b'"full"' in await answer.aread()


async def test_a_page_that_is_not_listed_gets_an_answer_that_its_browser_hides() -> None:
    async with open_http_node(cors_origins=OTHER, api_key="secret") as node:
        answer = await node.post(headers={"origin": PAGE, "authorization": "Bearer secret"})
        assert (answer.status_code, is_allowed(answer, PAGE), answer.headers["vary"]) == (
            200,
            False,
            "origin",
        )


async def test_what_is_no_browser_is_told_nothing() -> None:
    async with open_http_node(cors_origins="*") as node:
        answer = await node.post()
        assert not [name for name in answer.headers if name.startswith("access-control-") or name == "vary"]


async def test_the_option_acts_at_once() -> None:
    async with open_http_node() as node:
        assert not is_allowed(await node.post(headers={"origin": PAGE}), PAGE)
        node.node_context.options.server.cors_origins = PAGE
        assert is_allowed(await node.post(headers={"origin": PAGE}), PAGE)


# The headers of every answer of a model


async def test_the_time_until_an_answer_began_is_told_for_successes_and_errors() -> None:
    async def later(served: Served) -> None:
        await trio.sleep(0.05)
        served.head().data(b"{}").done()

    async with open_http_node(None) as node, trio.open_nursery() as nursery:
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await node.post())

        nursery.start_soon(ask)
        await later(await node.backend.next())
        for body in (b"nonsense", b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}'):
            async with node.client() as client:
                answers.append(await client.post("/v1/chat/completions", content=body, headers=JSON))
    took = {answer.status_code: int(answer.headers["openai-processing-ms"]) for answer in answers}
    assert took.keys() == {200, 400, 404}
    assert took[200] >= 50


async def test_a_stream_is_told_to_pass_unbuffered_and_uncached_and_nothing_else_is() -> None:
    def script(served: Served) -> None:
        if b'"stream": true' in served.request.body or b'"stream":true' in served.request.body:
            served.head(EVENTS).event("some").data(b"data: [DONE]\n\n").done()
        else:
            served.head().data(b"{}").done()

    async with open_http_node(script) as node:
        stream, plain = await node.post(STREAM), await node.post(CHAT)
        assert (stream.headers["x-accel-buffering"], stream.headers["cache-control"]) == ("no", "no-cache")
        assert "openai-processing-ms" in stream.headers
        assert "x-accel-buffering" not in plain.headers
        assert "cache-control" not in plain.headers


# The other way to show a key


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "secret"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": ""}, 401),
        ({"authorization": "Bearer wrong", "x-api-key": "secret"}, 401),
        ({"authorization": "Bearer secret", "x-api-key": "wrong"}, 200),
        ({"authorization": "Basic secret", "x-api-key": "secret"}, 401),
    ],
)
async def test_a_key_may_come_as_x_api_key_where_there_is_no_authorization(
    headers: dict[str, str], status: int
) -> None:
    async with open_http_node(api_key="secret") as node:
        answer = await node.post(headers=headers)
        assert answer.status_code == status
        if status == 200:
            # It is not passed on to handlers.
            assert "x-api-key" not in (await node.backend.next()).request.headers


# Without a key


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8080", "[::1]:8080", "10.1.2.3", "localhost:8080", "LOCALHOST", "a.localhost", "gpu-1",
     "GPU-1:80", "llm.lan."],
)  # fmt: skip
async def test_without_a_key_a_node_answers_under_an_address_localhost_or_its_names(host: str) -> None:
    async with open_http_node(allowed_hosts="gpu-1, llm.lan") as node:
        assert (await node.post(headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["rebound.example", "127.0.0.1.example", "localhost.example:8080", "gpu-2", "1.2.3"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/cluster/status", "/cluster/calls", "/v1/nothing"])
async def test_without_a_key_a_node_does_not_answer_under_any_other_name(host: str, path: str) -> None:
    async with open_http_node(allowed_hosts="gpu-1") as node, node.client() as client:
        answer = await client.get(path, headers={"host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
        assert "--allowed-hosts" in answer.json()["error"]["message"]
        assert (await node.post(headers={"host": host})).status_code == 403
    assert node.backend.opened() == 0


@pytest.mark.parametrize("options", [{"api_key": "secret"}, {"allowed_hosts": "*"}])
async def test_with_a_key_or_on_demand_a_node_answers_under_every_name(options: dict[str, str]) -> None:
    async with open_http_node(**options) as node:
        headers = {"host": "llm.example", "authorization": "Bearer secret"}
        assert (await node.post(headers=headers)).status_code == 200


async def test_health_checks_may_use_any_name() -> None:
    async with open_http_node() as node, node.client() as client:
        for path in ("/", "/health", "/ready", "/openapi.json"):
            assert (await client.get(path, headers={"host": "llm.example"})).status_code == 200


@pytest.mark.parametrize("key", [None, "secret"])
async def test_metrics_are_not_shown_to_pages(key: str | None) -> None:
    """A page whose own name points here (DNS rebinding) has that name in its Host header, and no Origin."""
    async with (
        open_http_node(api_key=key, allowed_hosts="prometheus.example") as node,
        node.client() as client,
    ):
        for path in ("/metrics", "/metrics/"):
            answer = await client.get(path, headers={"host": "rebound.example"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
            assert answer.json()["error"]["message"].startswith("/metrics requires no API key")
        assert (await client.get("/metrics", headers={"origin": OTHER})).status_code == 403
        for host in ("localhost", "10.0.0.1:8080", "prometheus.example"):
            assert (await client.get("/metrics", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [(PAGE, 200), (OTHER, 403), ("null", 403), ("http://localhost:1", 403), ("http://localhost:8080", 200)],
)
async def test_without_a_key_a_page_from_elsewhere_may_not_start_work(origin: str, status: int) -> None:
    async with open_http_node(cors_origins=PAGE) as node:
        answer = await node.post(headers={"origin": origin, "host": "localhost:8080"})
        assert answer.status_code == status
        if status == 403:
            assert answer.json()["error"]["code"] == "foreign_origin"
    assert node.backend.opened() == (status == 200)


async def test_without_a_key_a_page_from_elsewhere_may_not_send_a_form() -> None:
    async with open_http_node() as node, node.client() as client:
        answer = await client.post(
            "/v1/audio/transcriptions", data={"model": "m"}, files={"file": b"x"}, headers={"origin": OTHER}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
