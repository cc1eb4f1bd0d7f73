"""Every route gives both official clients what they expect, wherever the model runs."""

from __future__ import annotations

import pytest
from client_case import USER
from client_cases import CASES, endpoint_of
from client_drivers import Client
from served import Served

from trio_cluster.openai import ENDPOINTS


@pytest.mark.parametrize("name", CASES)
async def test_the_client_gets_the_answer(served: Served, client: Client, name: str) -> None:
    case = CASES[name]
    answer = await client.ask(case.method, *case.positional, as_pieces=case.as_pieces, **case.body)
    case.check(answer)
    if case.asked:
        [request] = served.trace.requests
        assert {name: getattr(request, name) for name in case.asked} == case.asked


#: The routes of the Messages API, which have clients of their own: see ``test_client_messages.py``.
MESSAGES = {"messages", "messages.count_tokens"}


def test_every_route_is_asked() -> None:
    assert {endpoint_of(case) for case in CASES.values()} | MESSAGES >= ENDPOINTS.keys()


async def test_the_id_of_a_request_is_the_clients_own_or_a_new_one(client: Client) -> None:
    body = {"model": "echo", "messages": [USER]}
    for stream in (False, True):
        named = await client.ask(
            "chat.completions.create", headers={"x-request-id": "the-same"}, stream=stream, **body
        )
        new = await client.ask("chat.completions.create", stream=stream, **body)
        assert named.request_id == "the-same"
        assert new.request_id is not None
        assert new.request_id.startswith("req_")


async def test_a_key_does_not_reach_the_model_and_other_headers_do(served: Served, client: Client) -> None:
    await client.ask("chat.completions.create", headers={"x-tenant": "blue"}, model="mirror", messages=[USER])
    [request] = served.trace.requests
    assert request.headers["x-tenant"] == "blue"
    assert not any("a-key" in value for value in request.headers.values())
