"""The stages of the gateway: in order, each of them asynchronous, and what they find out goes along."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from http_node import CHAT, PLAIN, Backend
from trio.testing import MockClock

from trio_cluster import ApiError, ChatRequest
from trio_cluster.core.call import Call
from trio_cluster.core.log_context import current_principal
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.observer import Observer
from trio_cluster.core.outcome import Outcome
from trio_cluster.core.principal import ANONYMOUS, Principal
from trio_cluster.core.request import Request
from trio_cluster.gateway.auth import ApiKeys, Authenticate
from trio_cluster.gateway.context import RequestContext
from trio_cluster.gateway.limits import LimitSize
from trio_cluster.gateway.node_context import NodeContext
from trio_cluster.gateway.origin import CheckOrigin
from trio_cluster.gateway.parse import Parse
from trio_cluster.gateway.pipeline import Gateway
from trio_cluster.gateway.route import Route
from trio_cluster.options import ClusterServerOptions, ServerOptions
from trio_cluster.routing.router import Router
from trio_cluster.testing import open_cluster, worker

BODY = json.dumps(CHAT).encode()


def context_of(*headers: tuple[bytes, bytes], path: str = "/v1/models") -> RequestContext:
    return RequestContext(headers, path=path)


# The key


@pytest.mark.parametrize(
    ("headers", "principal"),
    [
        ([(b"authorization", b"Bearer secret")], Principal("default", "admin")),
        ([(b"authorization", b"bearer   secret ")], Principal("default", "admin")),
        ([(b"x-api-key", b"secret")], Principal("default", "admin")),
        ([(b"authorization", b"Bearer wrong")], None),
        ([(b"authorization", b"Bearer")], None),
        ([(b"authorization", b"Basic secret")], None),
        # A bearer token counts, whatever else there is.
        ([(b"authorization", b"Bearer wrong"), (b"x-api-key", b"secret")], None),
        ([(b"x-api-key", b"")], None),
        ([], None),
    ],
)
async def test_the_one_key_is_required_in_either_header(
    headers: list[tuple[bytes, bytes]], principal: Principal | None
) -> None:
    key = ApiKeys(ClusterServerOptions(ServerOptions(api_key="secret")))
    if principal is not None:
        assert await key.authenticate(context_of(*headers)) == principal
        return
    with pytest.raises(ApiError) as refused:
        await key.authenticate(context_of(*headers))
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


async def test_without_a_key_the_principal_is_anonymous() -> None:
    assert await ApiKeys(ClusterServerOptions()).authenticate(context_of()) == ANONYMOUS


OPERATORS_PATHS = [
    "/cluster/calls",
    "/cluster/calls/",
    "/cluster/workers/w/drain",
    "/cluster/what-comes-next",
]


def asked(path: str, client: str, key: str = "", **headers: str) -> RequestContext:
    """Return the context of a request of a client with this address."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    if key:
        fields["authorization"] = f"Bearer {key}"
    return RequestContext(
        [(name.encode(), value.encode()) for name, value in fields.items()], client=client, path=path
    )


async def status_of(context: RequestContext, **options: str) -> int:
    """Return the status with which a request is refused, or 200."""
    try:
        await Authenticate(ApiKeys(ClusterServerOptions(ServerOptions(**options)))).admit(context)  # type: ignore[arg-type]
    except ApiError as error:
        return {("invalid_api_key", 401): 401, ("role_required", 403): 403}[error.code or "", error.status]
    return 200


FAR, NEAR = "192.0.2.7:5000", "127.0.0.1:5000"


@pytest.mark.parametrize("path", OPERATORS_PATHS)
@pytest.mark.parametrize("client", [FAR, NEAR])
async def test_the_operator_key_is_required_for_what_concerns_others(path: str, client: str) -> None:
    for keys in ({"operator_key": "op", "api_key": "k"}, {"operator_key": "op"}):
        assert await status_of(asked(path, client, "op"), **keys) == 200
        assert await status_of(asked(path, client), **keys) == 401
        assert await status_of(asked(path, client, "wrong"), **keys) == 401
        assert await status_of(asked("/v1/models", client, "op"), **keys) == 200
        assert await status_of(asked("/cluster/status", client, "op"), **keys) == 200
    assert await status_of(asked(path, client, "k"), operator_key="op", api_key="k") == 403
    assert await status_of(asked("/cluster/status", client, "k"), operator_key="op", api_key="k") == 200
    assert await status_of(asked("/v1/models", client), operator_key="op") == 200
    assert await status_of(asked("/v1/models", client), operator_key="op", api_key="k") == 401


@pytest.mark.parametrize("path", OPERATORS_PATHS)
async def test_without_an_operator_key_operators_have_the_api_key_or_are_on_the_same_machine(
    path: str,
) -> None:
    for near in (NEAR, "127.8.9.1:1", "[::1]:5000", "[::ffff:127.0.0.1]:5000", "client:1", ""):
        assert await status_of(asked(path, near)) == 200
        assert await status_of(asked(path, near, "k"), api_key="k") == 200
        assert await status_of(asked(path, near), api_key="k") == 401
    for far in (FAR, "10.0.0.1:1", "[2001:db8::1]:1", "[::ffff:10.0.0.1]:1", "[fe80::1%eth0]:1"):
        assert await status_of(asked(path, far)) == 403
        # The API key is an admin's, unless there is an operator key.
        assert await status_of(asked(path, far, "k"), api_key="k") == 200
        assert await status_of(asked("/cluster/status", far, "k"), api_key="k") == 200
    for header in ("x_forwarded_for", "forwarded", "x_real_ip", "via"):
        assert await status_of(asked(path, NEAR, **{header: "x"})) == 403


@pytest.mark.parametrize(("role", "status"), [("inference", 403), ("operator", 200), ("admin", 200)])
async def test_what_is_for_operators_is_decided_by_the_role_whatever_authenticator_gives_it(
    role: Any, status: int
) -> None:
    class Gives:
        async def authenticate(self, context: RequestContext) -> Principal:
            return Principal("someone", role)

    refused = 200
    try:
        await Authenticate(Gives()).admit(asked("/cluster/calls", FAR))
    except ApiError as error:
        refused = error.status
    assert refused == status


@pytest.mark.parametrize("path", ["/", "/health", "/health/", "/metrics", "/openapi.json", "/ready"])
async def test_open_paths_do_not_ask_the_authenticator(path: str) -> None:
    class Never:
        async def authenticate(self, context: RequestContext) -> Principal:
            raise AssertionError

    await Authenticate(Never()).admit(context_of(path=path))


async def test_the_stages_stand_in_the_order_in_which_a_request_meets_them() -> None:
    async def app(*_: Any) -> None:
        raise AssertionError

    gateway = Gateway(app, NodeContext(Router(), ClusterServerOptions()))
    assert [type(stage) for stage in gateway.pipeline.admission] == [Authenticate, CheckOrigin, LimitSize]
    assert [type(stage) for stage in gateway.pipeline.dispatch] == [Parse, Route]


class Directory:
    """An authenticator that has to ask somewhere else."""

    def __init__(self) -> None:
        self.asked: list[bytes | None] = []

    async def authenticate(self, context: RequestContext) -> Principal:
        key = context.header(b"authorization")
        self.asked.append(key)
        await trio.sleep(1.5)
        if key != b"Bearer alice":
            raise ApiError(401, "nobody of that name", code="invalid_api_key")
        return Principal("alice", "inference")


async def test_an_authenticator_may_wait_and_nothing_of_the_body_is_read_before_it_has_answered(
    autojump_clock: MockClock,
) -> None:
    directory, sent = Directory(), []
    backend = Backend(lambda served: served.head().data(PLAIN).done())
    node_context = NodeContext(Router(), ClusterServerOptions())
    node_context.router.catalog.add(ModelInfo("m", "chat"), backend)

    async def app(*_: Any) -> None:
        raise AssertionError

    async def receive() -> dict[str, Any]:
        assert trio.current_time() >= began + 1.5
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    gateway = Gateway(app, node_context, lambda path, method=None: False, directory)
    for name, status in ((b"alice", 200), (b"mallory", 401)):
        began = trio.current_time()
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [
                (b"authorization", b"Bearer " + name),
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(BODY)),
            ],
            "client": ("127.0.0.1", 1),
        }
        await gateway(scope, receive, send)
        assert sent[0]["status"] == status
        sent.clear()
    assert directory.asked == [b"Bearer alice", b"Bearer mallory"]
    assert (await backend.next()).request.principal == Principal("alice", "inference")
    assert backend.opened() == 0


# What goes along


async def test_who_asks_and_the_trace_context_reach_the_handler_s_node(autojump_clock: MockClock) -> None:
    seen: list[tuple[str, dict[str, str]]] = []
    trace = {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=1",
        "baggage": "userId=alice",
    }
    async with open_cluster(api_key="secret") as cluster:
        server = worker("w1")

        @server.chat("m")
        async def handler(request: ChatRequest) -> str:
            sent = {name: value for name, value in request.headers.items() if name in trace}
            seen.append((current_principal.get(), sent))
            return "ok"

        await cluster.start_worker(server)
        client = cluster.client(authorization="Bearer secret", **trace)
        assert (await client.chat("m", stream=False)).status == 200
        assert current_principal.get() == ""
    assert seen == [("default", trace)]


class Story(Observer):
    """The steps of every call, in order."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.usage: Any = None

    def on_admitted(self, request: Request) -> None:
        self.steps.append(f"admitted {request.model} for {request.principal.name}")

    def on_routed(self, call: Call, why: str) -> None:
        self.steps.append(f"routed to {call.served_by}: {why}")

    def on_queued(self, call: Call) -> None:
        self.steps.append("queued")

    def on_forwarded(self, call: Call) -> None:
        self.steps.append("forwarded")

    def on_first_byte(self, call: Call) -> None:
        self.steps.append("first byte")

    def on_retried(self, lost: Call, again: Call) -> None:
        self.steps.append("retried")

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        self.steps.append(f"ended: {outcome}")


async def test_an_observer_of_the_master_and_one_of_the_worker_see_every_step_in_order(
    autojump_clock: MockClock,
) -> None:
    master_saw, worker_saw = Story(), Story()
    async with open_cluster(api_key="secret") as cluster:
        cluster.master.server.router.observers.add(master_saw)
        server = worker("w1")
        server.router.observers.add(worker_saw)

        @server.chat("m")
        async def handler(request: ChatRequest) -> AsyncIterator[str]:
            yield "one "
            await trio.sleep(1)
            yield "two"

        await cluster.start_worker(server)
        client = cluster.client(authorization="Bearer secret")
        assert (await client.chat("m")).status == 200
    assert master_saw.steps == [
        "admitted m for default",
        "routed to w1: the only one",
        "forwarded",
        "first byte",
        "ended: completed",
    ]
    assert worker_saw.steps == ["routed to local: the only one", "first byte", "ended: completed"]


async def test_a_call_that_waits_for_a_slot_is_seen_to_wait_on_both_nodes(autojump_clock: MockClock) -> None:
    stories: dict[str, Story] = {"master": Story(), "worker": Story()}
    async with open_cluster(default_timeout=60.0) as cluster:
        cluster.master.server.router.observers.add(stories["master"])
        server = worker("w1", max_concurrency=1, queue_timeout=30.0, heartbeat_interval=1.0)
        server.router.observers.add(stories["worker"])

        @server.chat("m")
        async def handler(request: ChatRequest) -> str:
            await trio.sleep(10)
            return "ok"

        await cluster.start_worker(server)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(cluster.client().chat, "m")
    assert [story.steps.count("queued") for story in stories.values()] == [1, 1]
