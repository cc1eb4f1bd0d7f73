"""What the processes of a master answer together, whichever is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from trio_cluster.group.front import HIDDEN, SIBLING_KEY, Front
from trio_cluster.group.messages import Notice, Process, Request, Response

Answer = Callable[[Request], Response]


def json_response(status: int, content: Any) -> Response:
    return Response(status, [(b"content-type", b"application/json")], json.dumps(content).encode())


class Others:
    """The other processes: what they are asked, and what they answer."""

    def __init__(self, answer: Answer | None = None) -> None:
        self.asked: list[Request | Notice | None] = []
        self.answer = answer
        self.first = False

    async def ask(
        self, what: Request | Notice | None, *, first: bool = False, own: Response | None = None
    ) -> tuple[list[Process], bytes]:
        self.asked.append(what)
        self.first = self.first or first
        answer = None
        if self.answer is not None and isinstance(what, Request):
            answer = self.answer(what)
        return [Process(0, 1, True, 0, own), Process(1, 2, True, 0, answer)], b""


class Gateway:
    """The gateway of the process that is asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.seen: list[tuple[str, bytes, bool]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message.get("more_body", False)
        self.seen.append((scope["path"], body, SIBLING_KEY in scope))
        response = self.answer(Request(scope["method"], scope["path"], body=body))
        await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
        await send({"type": "http.response.body", "body": response.body})


async def ask(front: Front, method: str, path: str, *pieces: bytes) -> tuple[int, bytes, dict[bytes, bytes]]:
    """Send a request, and return the status, the body and the headers of the answer."""
    pending = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1}
        for number, piece in enumerate(pieces or (b"",))
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return pending.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer k")],
        "client": ("127.0.0.1", 5),
        "http_version": "1.1",
    }
    await front(scope, receive, send)
    head, *rest = sent
    return head["status"], b"".join(message["body"] for message in rest), dict(head["headers"])


def calls(*ages: float) -> Response:
    return json_response(200, {"calls": [{"age": age} for age in ages]})


async def test_requests_for_models_are_answered_by_the_process_that_got_them() -> None:
    others, gateway = Others(), Gateway(lambda _: Response(200, [], b"an answer"))
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/health"),
        ("POST", "/cluster/status"),
        ("GET", "/cluster/keys"),
    ):
        status, body, _ = await ask(Front(gateway, others), method, path, b"a", b"b")
        assert (status, body) == (200, b"an answer")
        assert others.asked == []
    # As they came, and not by way of what is passed on.
    assert gateway.seen[0] == ("/v1/chat/completions", b"ab", False)


async def test_what_all_processes_know_is_merged() -> None:
    others = Others(lambda _: calls(3, 1))
    status, body, headers = await ask(Front(Gateway(lambda _: calls(2)), others), "GET", "/cluster/calls")
    assert status == 200
    assert [call["age"] for call in json.loads(body)["calls"]] == [3, 2, 1]
    assert headers[b"content-length"] == str(len(body)).encode()
    (asked,) = others.asked
    # The others find out for themselves who asks.
    assert isinstance(asked, Request)
    assert (asked.method, asked.path, asked.client) == ("GET", "/cluster/calls", ("127.0.0.1", 5))
    assert asked.headers == [(b"authorization", b"Bearer k")]


def scrape(*, hides: bool, eof: bytes = b"") -> Response:
    families = (b"requests", b'model="m"', 2), (b"key_requests", b'key="k"', 3)
    text = b"".join(
        b"# HELP trio_cluster_%b_total x\n# TYPE trio_cluster_%b_total counter\ntrio_cluster_%b_total{%b} %d\n"
        % (name, name, name, labels, value)
        for name, labels, value in families
    )
    headers = [(HIDDEN.encode(), b"trio_cluster_key_")] if hides else []
    return Response(200, headers, text + eof)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("eof", [b"", b"# EOF\n"])
async def test_metrics_are_added_up_and_what_a_client_may_not_see_is_left_out(
    hides: bool, eof: bytes
) -> None:
    answer = scrape(hides=hides, eof=eof)
    others, gateway = Others(lambda _: answer), Gateway(lambda _: answer)
    status, body, headers = await ask(Front(gateway, others), "GET", "/metrics")
    lines = body.decode().splitlines()
    assert status == 200
    assert HIDDEN.encode() not in headers
    assert 'trio_cluster_requests_total{model="m"} 4.0' in lines
    assert ('trio_cluster_key_requests_total{key="k"} 6.0' in lines) == (not hides)
    assert (b"_key_" in body) == (not hides)
    # In the format in which the process has answered.
    assert body.endswith(b"# EOF\n") == bool(eof)
    assert (f"# TYPE trio_cluster_requests{'' if eof else '_total'} counter") in lines
    # All is there for the others, so that nothing is lost with a process.
    assert gateway.seen == [("/metrics", b"", True)]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/cluster/status"),
        ("GET", "/metrics"),
        ("POST", "/cluster/calls/r/cancel"),
        ("POST", "/cluster/workers/w/drain"),
        ("POST", "/cluster/keys"),
    ],
)
async def test_the_others_are_not_asked_for_what_is_refused(method: str, path: str) -> None:
    others, refusal = Others(), json_response(401, {"error": {}})
    status, body, _ = await ask(Front(Gateway(lambda _: refusal), others), method, path)
    assert (status, body) == (401, refusal.body)
    assert others.asked == []


NOT_FOUND = json_response(404, {"error": {"code": "call_not_found"}})


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        (1, 2, (200, 3)),
        (None, 2, (200, 2)),
        (1, None, (200, 1)),
        (None, None, (404, None)),
    ],
)
async def test_calls_are_cancelled_wherever_they_are(
    own: int | None, other: int | None, expected: tuple[int, int | None]
) -> None:
    def answer(count: int | None) -> Response:
        return NOT_FOUND if count is None else json_response(200, {"request_id": "r", "cancelled": count})

    front = Front(Gateway(lambda _: answer(own)), Others(lambda _: answer(other)))
    status, body, _ = await ask(front, "POST", "/cluster/calls/r/cancel", b"{}")
    assert (status, json.loads(body).get("cancelled")) == expected


async def test_a_worker_is_drained_by_a_process_that_is_linked_to_it() -> None:
    drained = json_response(202, {"id": "w"})
    others = Others(lambda _: drained)
    front = Front(Gateway(lambda _: json_response(404, {})), others)
    assert (await ask(front, "POST", "/cluster/workers/w/drain", b"{}"))[0] == 202
    others.asked.clear()
    # One of them is enough: the worker tells the others itself.
    front = Front(Gateway(lambda _: drained), others)
    assert (await ask(front, "POST", "/cluster/workers/w/drain", b"{}"))[0] == 202
    assert others.asked == []


async def test_a_request_is_known_wherever_it_was_answered() -> None:
    story = json_response(200, {"id": "r"})
    others = Others(lambda _: story)
    front = Front(Gateway(lambda _: json_response(404, {})), others)
    assert (await ask(front, "GET", "/cluster/requests/r"))[:2] == (200, story.body)
    front = Front(Gateway(lambda _: NOT_FOUND), Others(lambda _: json_response(404, {})))
    assert (await ask(front, "GET", "/cluster/requests/r"))[:2] == (404, NOT_FOUND.body)


async def test_the_others_learn_of_a_new_key_before_its_maker_has_it() -> None:
    others = Others()
    front = Front(Gateway(lambda _: json_response(201, {"key": "k"})), others)
    assert (await ask(front, "POST", "/cluster/keys", b"{}"))[0] == 201
    assert others.asked == [Notice("keys")]


@pytest.mark.parametrize(
    ("path", "worker"),
    [
        ("/cluster/invites", ""),
        ("/cluster/join", ""),
        ("/cluster/renew", ""),
        ("/cluster/ca/rotate", ""),
        ("/cluster/workers/a b/revoke", "a b"),
    ],
)
async def test_one_process_changes_the_state_directory_and_the_others_read_it_again(
    path: str, worker: str
) -> None:
    others = Others(lambda _: json_response(200, {}))
    gateway = Gateway(lambda _: json_response(500, {}))
    assert (await ask(Front(gateway, others), "POST", path, b"{}"))[0] == 200
    assert others.first
    assert gateway.seen == []
    assert others.asked[1:] == [Notice("members", worker)]


@pytest.mark.parametrize("path", ["/cluster/workers/w/revoke/", "//cluster/workers/w/revoke"])
async def test_slashes_that_the_gateway_does_not_mind_change_nothing(path: str) -> None:
    others, gateway = Others(lambda _: json_response(200, {})), Gateway(lambda _: json_response(500, {}))
    assert (await ask(Front(gateway, others), "POST", path, b"{}"))[0] == 200
    assert others.first
    assert others.asked[1:] == [Notice("members", "w")]


async def test_usage_is_read_when_the_others_have_written_theirs() -> None:
    order: list[str] = []
    others = Others(lambda _: (order.append("other"), json_response(200, {}))[1])
    gateway = Gateway(lambda _: (order.append("own"), json_response(200, {"data": []}))[1])
    assert (await ask(Front(gateway, others), "GET", "/cluster/usage"))[0] == 200
    assert order == ["other", "own"]


async def test_a_body_that_is_not_for_these_routes_is_left_to_the_gateway() -> None:
    others, gateway = Others(), Gateway(lambda _: json_response(413, {}))
    pieces = [b"a" * 200_000] * 3
    assert (await ask(Front(gateway, others), "POST", "/cluster/invites", *pieces))[0] == 413
    assert gateway.seen == [("/cluster/invites", b"".join(pieces), False)]
    assert others.asked == []


async def test_what_another_process_asks_is_answered_alone() -> None:
    gateway = Gateway(lambda _: calls(7))
    others = Others()
    response = await Front(gateway, others).answer_alone(Request("GET", "/cluster/calls"))
    assert (response.status, response.body) == (200, calls(7).body)
    assert others.asked == []
    assert gateway.seen == [("/cluster/calls", b"", True)]
