"""The errors and headers of the routes of the Messages API, whatever refuses the request."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
import trio
from http_node import HttpNode, open_http_node
from test_key_limits import scene

from trio_cluster.core.principal import Limits
from trio_cluster.errors import ApiError
from trio_cluster.openai.failures import MESSAGE_ERROR

BODY = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
KEY = {"x-api-key": "secret", "content-type": "application/json"}


async def ask(node: HttpNode, method: str, path: str, **sent: Any) -> Any:
    async with node.client() as client:
        return await client.request(method, path, **sent)


def status_of(answer: Any) -> int:
    return int(getattr(answer, "status_code", None) or answer.status)


def checked(answer: Any, status: int, kind: str, code: str | None) -> dict[str, Any]:
    """Check that an answer is an error of the Messages API, and return the error."""
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"}
    assert (status_of(answer), body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["error"]["code"] == code
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("sent", "status", "kind", "code"),
    [
        ({"headers": {}, "json": BODY}, 401, "authentication_error", "invalid_api_key"),
        ({"headers": KEY | {"x-api-key": "no"}, "json": BODY}, 401, "authentication_error", "invalid_api_key"),
        ({"content": b"nonsense"}, 400, "invalid_request_error", "invalid_json"),
        ({"json": BODY | {"max_tokens": 0}}, 400, "invalid_request_error", "invalid_value"),
        ({"json": BODY | {"model": "nobody"}}, 404, "not_found_error", "model_not_found"),
        ({"content": bytes(20_000)}, 413, "request_too_large", None),
        ({"content": b"a", "headers": KEY | {"content-type": "text/plain"}}, 415, "invalid_request_error",
         "unsupported_media_type"),
        ({"headers": KEY | {"x-request-timeout": "x"}, "json": BODY}, 400, "invalid_request_error", None),
    ],
)  # fmt: skip
async def test_every_refusal_has_the_envelope_of_the_route(
    sent: dict[str, Any], status: int, kind: str, code: str | None
) -> None:
    async with open_http_node(api_key="secret", max_body_size=10_000) as node:
        for path in ("/v1/messages", "/messages"):
            answer = await ask(node, "POST", path, **{"headers": KEY} | sent)
            checked(answer, status, kind, code)


async def test_paths_and_methods_that_are_not_served() -> None:
    async with open_http_node() as node:
        checked(await ask(node, "POST", "/v1/messages/batches", json=BODY), 404, "not_found_error", None)
        answer = await ask(node, "GET", "/v1/messages")
        checked(answer, 405, "invalid_request_error", None)
        assert "request-id" not in (await ask(node, "GET", "/nothing")).headers


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ApiError(503, "busy", code="c", retry_after=3), 529, "overloaded_error"),
        (ApiError(429, "slow", code="c", retry_after=3), 429, "rate_limit_error"),
        (ApiError(500, "no", code="c"), 500, "api_error"),
        (ApiError(502, "lost", code="c"), 502, "api_error"),
        (ApiError(504, "late", code="c"), 504, "timeout_error"),
        (ApiError(403, "no", code="c"), 403, "permission_error"),
        (ApiError(422, "no", code="c", param="p"), 422, "invalid_request_error"),
    ],
)
async def test_failures_have_it_too(error: ApiError, status: int, kind: str) -> None:
    async with open_http_node(lambda served: served.fail(error)) as node:
        answer = await ask(node, "POST", "/v1/messages", json=BODY)
        assert checked(answer, status, kind, "c").get("param") == error.param
        assert answer.headers.get("retry-after") == ("3" if error.retry_after else None)
        # The other routes are as they were.
        other = await ask(node, "POST", "/v1/chat/completions", json=BODY)
        assert (other.status_code, other.json()) == (error.status, error.envelope())
        assert "request-id" not in other.headers


async def test_an_answer_has_the_id_of_the_request() -> None:
    async with open_http_node() as node:
        answer = await ask(node, "POST", "/v1/messages", json=BODY)
        assert answer.status_code == 200
        assert answer.headers["request-id"] == answer.headers["x-request-id"]


async def test_a_stream_without_output_has_pings(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(Limits(requests_per_minute=5)) as each:
        each.model.usage = None
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                body = BODY | {"stream": True, "messages": [{"role": "user", "content": "waits late"}]}
                answer = await each.client().post("/v1/messages", body)
                assert answer.body.count(MESSAGE_ERROR.keepalive) == 2
                assert b"\n: " not in answer.body

            nursery.start_soon(listen)
            await trio.sleep(25)
            each.model.go.set()


async def test_the_limits_of_a_key_are_in_the_headers(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(Limits(requests_per_minute=1, tokens_per_minute=1000)) as each:
        first = await each.client().post("/v1/messages", BODY)
        assert first.status == 200
        assert first.headers["anthropic-ratelimit-requests-limit"] == "1"
        assert first.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert int(first.headers["anthropic-ratelimit-tokens-remaining"]) < 1000
        reset = datetime.fromisoformat(first.headers["anthropic-ratelimit-requests-reset"])
        left = reset.timestamp() - datetime.now().timestamp()
        assert 0 < left <= 61
        assert first.headers["x-ratelimit-limit-requests"] == "1"
        refused = await each.client().post("/v1/messages", BODY)
        checked(refused, 429, "rate_limit_error", "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) == 60
        assert refused.headers["anthropic-ratelimit-requests-remaining"] == "0"
