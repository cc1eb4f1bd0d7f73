"""Options that apply at once: each has an effect on the next request after it was changed, and none is forgotten.

Every option that declares itself so has a row in the table below: the values before and after a change, something that
observes the node, and what that sees before and after. The node runs all the time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import attrs
import pytest
import trio

from trio_cluster import ApiError, ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.cluster.admission import Doorkeeper
from trio_cluster.errors import ClusterError, OptionsError
from trio_cluster.net.streams import TlsSession
from trio_cluster.options import OptionChange, when_applied
from trio_cluster.testing import Response, SimulatedCluster, open_cluster, worker

_numbers: Iterator[int] = itertools.count()


def fields() -> Iterator[tuple[str, Any]]:
    """Yield the name of each option as in a file, with its field."""
    yield from ((f"server.{field.name}", field) for field in attrs.fields(ServerOptions))
    yield from ((field.name, field) for field in attrs.fields(ClusterServerOptions) if field.name != "server")


def register(server: ClusterServer) -> None:
    @server.chat("m")
    async def answer(request: Any) -> str:
        return "hello"

    @server.chat("sleeps")
    async def sleep(request: Any) -> str:
        await trio.sleep(3)
        return "slept"

    @server.chat("stuck")
    async def stay(request: Any) -> str:
        await trio.sleep_forever()
        raise AssertionError

    @server.chat("breaks")
    async def fail(request: Any) -> Any:
        yield "begun"
        raise ValueError


async def status(cluster: SimulatedCluster) -> int:
    return (await cluster.client().chat("m", "hello " * 20)).status


async def statuses_of_two(cluster: SimulatedCluster) -> list[int]:
    found: list[int] = []

    async def ask() -> None:
        found.append((await cluster.client().chat("sleeps", stream=False)).status)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(ask)
    return sorted(found)


async def seconds_to_refusal(cluster: SimulatedCluster) -> float:
    """Return how long a request waits for a slot that another one has."""
    seconds = 0.0
    async with trio.open_nursery() as nursery:

        async def hold() -> None:
            await cluster.client().chat("stuck", stream=False)

        nursery.start_soon(hold)
        while not cluster.master.server.pool.running:
            await trio.lowlevel.checkpoint()
        began = trio.current_time()
        assert (await cluster.client().chat("m", stream=False)).status == 503
        seconds = trio.current_time() - began
        nursery.cancel_scope.cancel()
    await cluster.master.server.router.wait_idle()
    return round(seconds, 3)


async def seconds_of_silence(cluster: SimulatedCluster) -> float:
    began = trio.current_time()
    assert (await cluster.client().chat("stuck", stream=False)).status == 504
    return round(trio.current_time() - began, 3)


async def status_for_operators(cluster: SimulatedCluster) -> int:
    return (await cluster.client(authorization="Bearer b").get("/cluster/calls")).status


async def cors(cluster: SimulatedCluster) -> str | None:
    response = await cluster.client(origin="https://page.example").get("/health")
    return response.headers.get("access-control-allow-origin")


async def status_under_a_name(cluster: SimulatedCluster) -> int:
    return (await cluster.client(host="cluster.example").get("/v1/models")).status


async def has_a_story(cluster: SimulatedCluster) -> bool:
    response = await cluster.client().chat("m", stream=False)
    path = f"/cluster/requests/{response.headers['x-request-id']}"
    return (await cluster.client().get(path)).status == 200


async def seconds_of_waiting(cluster: SimulatedCluster) -> float:
    """Return how long a request waits for the machine of a worker that has left."""
    server = worker("w")

    @server.chat("far")
    async def hello(request: Any) -> str:
        return "hello"

    if "w" not in cluster.workers:
        node = await cluster.start_worker(server)
        node.stop()
        await node.over.wait()
    began = trio.current_time()
    await cluster.client().chat("far-or-near" if cluster.options.aliases else "far", stream=False)
    return round(trio.current_time() - began)


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


async def lines_in_the_access_log(cluster: SimulatedCluster) -> int:
    records, access = Records(), logging.getLogger("trio_cluster.access")
    access.addHandler(records)
    level = access.level
    access.setLevel(logging.INFO)
    try:
        await status(cluster)
        await trio.testing.wait_all_tasks_blocked()
    finally:
        access.removeHandler(records)
        access.setLevel(level)
    return records.count


async def ends_properly(cluster: SimulatedCluster) -> bool:
    return (await cluster.client().chat("breaks")).complete


async def has_comments(cluster: SimulatedCluster) -> bool:
    return b"\n:" in b"\n" + (await cluster.client().chat("sleeps")).body


async def joins(cluster: SimulatedCluster) -> bool:
    """Tell whether a worker joins that has no token."""
    try:
        await cluster.start_worker(worker(f"w{next(_numbers)}"))
    except ClusterError:
        return False
    return True


async def second_replica(cluster: SimulatedCluster) -> bool:
    server = worker(f"w{next(_numbers)}")
    register(server)
    node = await cluster.start_worker(server)
    assert node.server.worker_client is not None
    return "m" not in node.server.worker_client.rejected_models


async def policy(cluster: SimulatedCluster) -> str:
    return type(cluster.master.server.router.policy).__name__


async def status_of_an_alias(cluster: SimulatedCluster) -> int:
    return (await cluster.client().chat("other")).status


async def ejected_for(cluster: SimulatedCluster, retry_after: float | None = None) -> float:
    """Return for how long a replica is left alone that has failed once; 0: it is not."""
    model = f"f{next(_numbers)}"
    for _ in range(2):
        server = worker(f"w{next(_numbers)}")

        @server.chat(model)
        async def fail(request: Any) -> str:
            raise ApiError(503, "broken", code="broken", retry_after=retry_after)

        await cluster.start_worker(server)
    await cluster.client().chat(model, stream=False)
    return sum(
        replica.seconds
        for replica in cluster.master.server.router.ejections.status()
        if replica.model == model
    )


async def ejected_as_asked_for(cluster: SimulatedCluster) -> float:
    return await ejected_for(cluster, 100.0)


async def keeps_a_response(cluster: SimulatedCluster) -> bool:
    response = await cluster.client().post("/v1/responses", {"model": "m", "input": "hi"})
    path = f"/v1/responses/{response.json()['id']}"
    await trio.sleep(10)
    return (await cluster.client().get(path)).status == 200


async def admits_anybody(cluster: SimulatedCluster) -> bool:
    found = Doorkeeper(cluster.master.server.options).admit({}, TlsSession("TLSv1.3", None, None))
    return not hasattr(found, "status")


async def seconds_to_the_end(cluster: SimulatedCluster) -> float:
    """Stop the node, and return how long it takes while a request runs."""
    async with cluster.client().open_chat("stuck", stream=True):
        began = trio.current_time()
        cluster.master.stop()
        await cluster.master.over.wait()
        return trio.current_time() - began


@attrs.frozen
class Row:
    before: Any
    after: Any
    observe: Callable[[SimulatedCluster], Awaitable[object]]
    seen_before: object
    seen_after: object
    others: dict[str, Any] = attrs.field(factory=dict)
    """Other options of the node."""


ONE_SLOT: Final = {"max_concurrency": 1, "queue_timeout": 1.0, "keepalive": 0.0, "default_timeout": 1000.0}
REPLICAS: Final = {"on_conflict": "replicate", "ejection_failures": 1}

#: The only option without a row: what it is for happens once a day. It is read through a function.
#: Packets for a machine that is not there, to this one.
ASLEEP: Final = {"wake": {"w": "02:42:ac:11:00:02@127.0.0.1"}}
UNSEEN: Final = {"usage_days"}

TABLE: Final = {
    "server.max_concurrency": Row(1, 2, statuses_of_two, [200, 503], [200, 200], {"queue_timeout": 0.0}),
    "server.queue_timeout": Row(1.0, 3.0, seconds_to_refusal, 1.0, 3.0, ONE_SLOT),
    "server.default_timeout": Row(5.0, 9.0, seconds_of_silence, 5.0, 9.0),
    "server.api_key": Row(None, "k", status, 200, 401),
    "server.operator_key": Row("a", "b", status_for_operators, 403, 200, {"api_key": "b"}),
    "server.max_body_size": Row(1000, 10, status, 200, 413),
    "server.max_json_size": Row(1000, 10, status, 200, 413),
    "server.cors_origins": Row(None, "*", cors, None, "*"),
    "server.access_log": Row(False, True, lines_in_the_access_log, 0, 1),
    "server.stream_failure": Row("end", "abort", ends_properly, True, False),
    "server.keepalive": Row(0.0, 1.0, has_comments, False, True),
    "server.allowed_hosts": Row(None, "cluster.example", status_under_a_name, 403, 200),
    "cluster_token": Row(None, "t", joins, True, False),
    "on_conflict": Row("reject", "replicate", second_replica, False, True),
    "routing": Row("cost", "least-busy", policy, "LeastCost", "LeastBusy"),
    "aliases": Row(None, {"other": "m"}, status_of_an_alias, 404, 200),
    "ejection_failures": Row(0, 1, ejected_for, 0.0, 5.0, REPLICAS),
    "ejection_time": Row(5.0, 50.0, ejected_for, 5.0, 50.0, REPLICAS),
    "ejection_time_max": Row(300.0, 20.0, ejected_as_asked_for, 100.0, 20.0, REPLICAS),
    "ejection_share": Row(0.0, 0.5, ejected_for, 0.0, 5.0, REPLICAS),
    "start_patience": Row(
        20.0, 40.0, seconds_of_waiting, 20, 40, ASLEEP | {"aliases": {"far-or-near": ["far", "m"]}}
    ),
    "wake_timeout": Row(60.0, 90.0, seconds_of_waiting, 60, 90, ASLEEP),
    "stories": Row(0, 100, has_a_story, False, True),
    "drain_timeout": Row(30.0, 3.0, seconds_to_the_end, None, 3.0, {"default_timeout": 1000.0}),
    "stored_responses": Row(100, 0, keeps_a_response, True, False),
    "stored_responses_size": Row(100_000, 1, keeps_a_response, True, False),
    "stored_responses_lifetime": Row(86_400.0, 5.0, keeps_a_response, True, False),
    "allow_anonymous_workers": Row(False, True, admits_anybody, False, True),
}


def change(option: str, after: Any, before: Any = None) -> OptionChange:
    (field,) = [field for name, field in fields() if name == option]
    return OptionChange(option, before, after, when_applied(field))


def test_every_option_says_when_a_new_value_applies_and_those_that_do_at_once_are_seen_to() -> None:
    at_once = {name for name, field in fields() if when_applied(field) == "at once"}
    assert at_once == TABLE.keys() | UNSEEN


@pytest.mark.parametrize("option", TABLE)
async def test_a_new_value_applies_to_the_next_request(option: str, autojump_clock: trio.abc.Clock) -> None:
    row = TABLE[option]
    name = option.removeprefix("server.")
    async with open_cluster(**row.others | {name: row.before}) as cluster:
        server = cluster.master.server
        register(server)
        if row.seen_before is not None:
            assert await row.observe(cluster) == row.seen_before
        await server.apply_changes([change(option, row.after, row.before)])
        assert await row.observe(cluster) == row.seen_after


async def test_what_needs_a_restart_is_left_as_it_is(autojump_clock: trio.abc.Clock) -> None:
    async with open_cluster() as cluster:
        server = cluster.master.server
        await server.apply_changes([change("server.port", 1), change("server.keepalive", 3.0)])
        assert (server.options.server.port, server.options.server.keepalive) == (8080, 3.0)


@pytest.mark.parametrize(
    "wrong",
    [("server.queue_timeout", -1.0), ("server.access_log", "yes"), ("aliases", {"a": "b"})],
    ids=lambda pair: pair[0],
)
async def test_nothing_is_changed_if_one_change_cannot_be_applied(
    wrong: tuple[str, Any], autojump_clock: trio.abc.Clock
) -> None:
    async with open_cluster() as cluster:
        server = cluster.master.server
        # Together with the alias of the row this would be a circle.
        server.alias("b", "a")
        with pytest.raises((TypeError, OptionsError), match=wrong[0].removeprefix("server.")):
            await server.apply_changes([change("server.max_concurrency", 3), change(*wrong)])
        assert server.options.server.max_concurrency == 10
        assert server.pool.slots.capacity == 10
        assert server.options.aliases is None


async def test_a_running_request_goes_on(autojump_clock: trio.abc.Clock) -> None:
    async with open_cluster(max_concurrency=2) as cluster:
        server = cluster.master.server
        register(server)
        responses: list[Response] = []

        async def ask() -> None:
            responses.append(await cluster.client().chat("sleeps"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await trio.sleep(1)
            changes = [
                change("server.max_concurrency", 1),
                change("server.api_key", "other"),
                change("server.max_json_size", 1),
                change("server.default_timeout", 0.1),
                change("aliases", {"sleeps": "m"}),
            ]
            await server.apply_changes(changes)
        assert [(response.status, b"slept" in response.body) for response in responses] == [(200, True)] * 2


async def test_options_may_be_changed_before_the_server_runs() -> None:
    server = ClusterServer()
    assert await server.apply_changes([change("server.max_concurrency", 3)]) is False
    assert server.pool.slots.capacity == 3
