"""What a token and a request cost, in counts that do not depend on the machine.

The bounds stand a little above what it takes today. If one of them is passed, something has become more expensive: the
failure lists which functions were called how often for one token or request, the most frequent ones first. Compare that
with the list of an earlier revision (set the bound to 0 to see it). If it is worth it, raise the bound, and explain
why.

What is counted is what the tasks of a node do: how often they are scheduled, how many functions in Python are called in
them, and which system calls they make. The event loop's own waiting is not counted.
"""

from __future__ import annotations

import gc
import importlib
import json
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
from counting import HOST, Client, Counted, Counting, FarMaster, FarWorker, has_counters, make_writes_visible

from trio_cluster import ChatRequest, ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.core.answer import Done, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.core.request import Request
from trio_cluster.gateway.auth import ApiKeys
from trio_cluster.options import ClusterMode
from trio_cluster.protocol import Cancel, Data, ForwardRequest
from trio_cluster.routing.backend import Backend
from trio_cluster.routing.cost import LeastCost
from trio_cluster.routing.health import Health
from trio_cluster.routing.router import Router

pytestmark = pytest.mark.skipif(not has_counters(), reason="nothing is counted here on this system")

STREAMS: Final = 64
ROUNDS: Final = 20
#: An event of a stream, of the size that they have.
EVENT: Final = (
    b'data: {"id":"chatcmpl-0123456789ab","object":"chat.completion.chunk","created":1700000000,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"token "},"logprobs":null,"finish_reason":null}]}\n\n'
)
ANSWER: Final = b'{"object":"chat.completion","choices":[]}'
BODY: Final = b'{"model":"m","messages":[{"role":"user","content":"hello"}],"stream":true}'


def node() -> ClusterServer:
    """Return a node that does nothing on its own during a test."""
    server = ServerOptions(host=HOST, max_concurrency=10 * STREAMS)
    return ClusterServer(ClusterServerOptions(server=server, heartbeat_interval=900.0, worker_timeout=1000.0))


async def count(times: int, act: Callable[[], Awaitable[object]]) -> Counted:
    """Count what it takes to do something so many times, after it has been done a few times.

    The least of three counts is returned: on a busy machine, something that a node does once in a while, such as
    writing the usage of the last second, falls into one of them.
    """
    for _ in range(3):
        await act()
    counts = []
    for _ in range(3):
        gc.collect()
        with Counting() as counted:
            for _ in range(times):
                await act()
        counts.append(counted)
    return min(counts, key=lambda each: (each.steps, each.calls))


def check(what: str, counted: Counted, times: int, *, steps: float, calls: float) -> None:
    print(f"{what}: {counted.steps / times:.2f} steps, {counted.calls / times:.2f} calls")
    assert counted.steps / times <= steps, counted.explain(times)
    assert counted.calls / times <= calls, counted.explain(times)


class Relay:
    """A master, and the other ends of all its connections."""

    #: The API key that :meth:`ask` sends.
    key = ""

    def __init__(self, master: ClusterServer, worker: FarWorker) -> None:
        assert master.port is not None
        self.port: int = master.port
        self.worker = worker
        self.clients: list[Client] = []
        self.calls: list[int] = []

    async def next_call(self) -> int:
        """Return the number of the next call, when all of its request has arrived."""
        call = 0
        while True:
            for event in await self.worker.receive_events():
                call = event.call if isinstance(event, ForwardRequest) else call
                if isinstance(event, Data) and event.last:
                    return call

    def connect(self) -> Client:
        self.clients.append(Client(self.port))
        return self.clients[-1]

    async def open_stream(self) -> None:
        client = self.connect()
        client.ask(stream=True)
        self.calls.append(await self.next_call())
        self.worker.session.respond(self.calls[-1], 200, "text/event-stream")
        self.worker.session.send(self.calls[-1], EVENT)
        self.worker.flush()
        await client.receive_until(b"token ")

    async def send_tokens(self, streams: int) -> None:
        """Send a token in each of so many streams, in one message, and wait until their clients have them."""
        for call in self.calls[:streams]:
            self.worker.session.send(call, EVENT)
        self.worker.flush()
        assert self.worker.receive_events_nowait() == []
        for client in self.clients[:streams]:
            assert (await client.receive_until(b"token ")).count(EVENT) == 1

    async def ask(self, client: Client) -> None:
        client.ask(stream=False, key=self.key)
        call, session = await self.next_call(), self.worker.session
        session.respond(call, 200, "application/json")
        session.send(call, ANSWER)
        session.done(call)
        self.worker.flush()
        await client.receive_until(ANSWER)


@pytest.fixture
async def relay(monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery) -> AsyncIterator[Relay]:
    make_writes_visible(monkeypatch)
    master = node()
    mode = await nursery.start(master.run_as_master, 0)
    assert mode is ClusterMode.MASTER
    assert master.internal_port is not None
    worker = await FarWorker.connect(master.internal_port)
    # What is counted is what it costs by default: with all that it takes to resume the link.
    assert worker.session.resumable
    opened = Relay(master, worker)
    yield opened
    for end in (*opened.clients, worker):
        end.close()


async def open_streams(relay: Relay) -> None:
    for _ in range(STREAMS):
        await relay.open_stream()
    # The task of each stream must still find out that it has nothing left to do.
    await trio.testing.wait_all_tasks_blocked()


async def test_a_token_takes_the_fast_path_through_a_master(relay: Relay) -> None:
    await open_streams(relay)

    # Alone in its message, a token also pays for the message.
    alone = await count(ROUNDS, lambda: relay.send_tokens(1))
    check("a token alone, master", alone, ROUNDS, steps=1, calls=50)
    assert alone.system_calls == {"read": ROUNDS, "modify": ROUNDS, "write": ROUNDS}

    # With others, a token wakes no task at all: the task that reads the link does everything.
    together = await count(ROUNDS, lambda: relay.send_tokens(STREAMS))
    check("a token with others, master", together, ROUNDS * STREAMS, steps=1 / STREAMS, calls=11)
    assert together.system_calls == {"read": ROUNDS, "modify": ROUNDS, "write": ROUNDS * STREAMS}


async def test_tokens_leave_nothing_behind_in_a_master(relay: Relay) -> None:
    await relay.open_stream()

    async def many() -> int:
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(1000):
            await relay.send_tokens(1)
        gc.collect()
        return sys.getallocatedblocks() - before

    await many()
    assert await many() < 100


async def test_a_plain_request_through_a_master(relay: Relay) -> None:
    client = relay.connect()
    counted = await count(ROUNDS, lambda: relay.ask(client))
    check("a plain request, master", counted, ROUNDS, steps=6, calls=455)
    # One message to the worker and one from it, one request of the client and one answer to it. The task that reads for
    # all clients polls once for which of them sent something.
    assert counted.system_calls == dict.fromkeys(("read", "modify", "write"), 2 * ROUNDS) | {"poll": ROUNDS}


async def test_a_plain_request_of_a_key_with_limits(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = Principal("k", limits=Limits(10**9, 10**9, 10**9, 10**12))

    async def authenticate(self: ApiKeys, context: Any) -> Principal:
        return limited

    monkeypatch.setattr(ApiKeys, "authenticate", authenticate)
    client = relay.connect()
    counted = await count(ROUNDS, lambda: relay.ask(client))
    # No other task is woken for it, and nothing else is written: this master has no directory for its state.
    check("a plain request with limits, master", counted, ROUNDS, steps=6, calls=510)
    assert counted.system_calls == dict.fromkeys(("read", "modify", "write"), 2 * ROUNDS) | {"poll": ROUNDS}


async def test_a_plain_request_with_a_key_and_a_row_of_usage(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, tmp_path: Path
) -> None:
    # So that no batch is written and no look taken while it is counted; both are done about once a second.
    monkeypatch.setattr("trio_cluster.accounts.accounts.PAUSE", 900.0)
    monkeypatch.setattr("trio_cluster.accounts.accounts.LOOK", 900.0)
    make_writes_visible(monkeypatch)
    master = node()
    master.options.state_dir = str(tmp_path / "state")
    await nursery.start(master.run_as_master, 0)
    assert master.internal_port is not None
    worker = await FarWorker.connect(master.internal_port)
    relay = Relay(master, worker)
    created = await post_json(relay.port, "/cluster/keys", {"name": "a"})
    relay.key = created["key"]
    client = relay.connect()
    counted = await count(ROUNDS, lambda: relay.ask(client))
    # Four calls more than without a key, a database and a journal.
    check("a plain request with a key, master", counted, ROUNDS, steps=6, calls=460)
    for end in (client, worker):
        end.close()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("sampler", "calls"), [("always_off", 485), ("always_on", 590)])
async def test_a_plain_request_with_a_trace(
    sampler: str, calls: float, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    """Of the threads that export, nothing is counted; nothing wakes another task, and nothing else is written."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra 'otel' is not installed")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "900000")
    monkeypatch.setattr("trio_cluster.telemetry.node_telemetry.FLUSH_TIME", 0.1)
    make_writes_visible(monkeypatch)
    master = node()
    await nursery.start(master.run_as_master, 0)
    assert master.internal_port is not None
    worker = await FarWorker.connect(master.internal_port)
    relay = Relay(master, worker)
    client = relay.connect()
    counted = await count(ROUNDS, lambda: relay.ask(client))
    check(f"a plain request with a trace, {sampler}, master", counted, ROUNDS, steps=6, calls=calls)
    assert counted.system_calls == dict.fromkeys(("read", "modify", "write"), 2 * ROUNDS) | {"poll": ROUNDS}
    for end in (client, worker):
        end.close()
    nursery.cancel_scope.cancel()


async def post_json(port: int, path: str, content: Any) -> Any:
    """Send a request to the node of this test, and return the JSON of the response."""

    def blocking() -> Any:
        request = urllib.request.Request(f"http://{HOST}:{port}{path}", json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as response:
            return json.load(response)

    return await trio.to_thread.run_sync(blocking)


async def test_opening_a_stream_on_a_connection_of_its_own_and_leaving_it(relay: Relay) -> None:
    async def open_and_leave() -> None:
        await relay.open_stream()
        relay.clients.pop().close()
        # The worker gets the cancellation, and reports that the work has stopped.
        call = relay.calls.pop()
        while not any(
            isinstance(event, Cancel) and event.call == call for event in await relay.worker.receive_events()
        ):
            pass
        relay.worker.session.done(call)
        relay.worker.flush()
        await trio.testing.wait_all_tasks_blocked()

    counted = await count(ROUNDS, open_and_leave)
    check("opening a stream and leaving it, master", counted, ROUNDS, steps=11, calls=855)


class Model:
    """A model whose calls wait for the test, and then put one token each."""

    def __init__(self) -> None:
        self._next = trio.Event()

    async def answer(self, request: ChatRequest) -> AsyncIterator[str]:
        yield "begun "
        while True:
            await self._next.wait()
            yield "token "

    def go(self) -> None:
        now, self._next = self._next, trio.Event()
        now.set()


async def receive_tokens(master: FarMaster, tokens: int, mark: bytes = b"token ") -> None:
    """Receive so many tokens; all of them must arrive in one message."""
    events: list[Any] = []
    while sum(event.data.count(mark) for event in events if isinstance(event, Data)) < tokens:
        assert not events or mark != b"token ", "tokens that were made together came in two messages"
        events += await master.receive_events()
    for event in events:
        if isinstance(event, Data):
            master.session.grant(event.call, len(event.data))
    master.flush()


@pytest.mark.parametrize(
    ("streams", "steps", "calls"),
    [
        # One step of its handler, and two of the link's writer: it wakes, and lingers for other tokens.
        pytest.param(1, 3, 125, id="alone"),
        # The step of its handler, and a share of the writer's. The calls include those of the handler itself.
        pytest.param(STREAMS, 1.1, 53, id="together"),
    ],
)
async def test_a_token_on_its_way_out_of_a_worker(
    streams: int, steps: float, calls: float, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    make_writes_visible(monkeypatch)
    model, worker = Model(), node()
    worker.register_chat("m", model.answer)
    with socket.create_server((HOST, 0)) as listener:
        nursery.start_soon(worker.run_as_worker, HOST, listener.getsockname()[1])
        master = await FarMaster.accept(listener)
    for _ in range(streams):
        call = master.session.open(endpoint="chat.completions", kind="chat", model="m", size=len(BODY))
        master.session.send_body(call, BODY, last=True)
    master.flush()
    await receive_tokens(master, streams, b"begun ")

    async def round_of_tokens() -> None:
        model.go()
        await receive_tokens(master, streams)
        # Longer than the linger, so that the next tokens find an idle link.
        await trio.sleep(0.005)

    counted = await count(ROUNDS, round_of_tokens)
    check(f"a token with {streams - 1} others, worker", counted, ROUNDS * streams, steps=steps, calls=calls)
    assert counted.system_calls == {"write": ROUNDS}
    nursery.cancel_scope.cancel()
    master.close()


def test_a_request_and_a_token_do_not_travel_further_through_the_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls and moves between files for a whole request: on the master, on the worker, and back."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    walk = importlib.import_module("walk")
    request, token = trio.run(walk.walk)
    print(request.describe(), token.describe(), sep="\n")
    assert request.calls <= 475, request.functions
    assert request.moves <= 293, request.files
    assert token.calls <= 76, token.functions
    assert token.moves <= 60, token.files


@pytest.mark.parametrize(
    ("replicas", "size", "bound"), [(1, 100, 0), (2, 100, 48), (20, 100, 120), (2, 100_000, 52)]
)
def test_choosing_a_replica_by_cost(replicas: int, size: int, bound: int) -> None:
    """Function calls from choosing among replicas to forgetting the call, beyond those of the call itself."""
    body = json.dumps({"model": "m", "messages": ["x" * size]}).encode()
    counted = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal counted
        counted += event == "call"

    def ask(router: Router) -> int:
        nonlocal counted
        counted = 0
        sys.setprofile(profile)
        try:
            call = router.open(Request("chat.completions", "chat", "m", body))
            call.put(Head())
            call.put(Done(Usage(100, 10, 5)))
            call.release()
        finally:
            sys.setprofile(None)
        return counted

    counts = []
    for policy in (LeastCost(clock=lambda: 0.0), _First()):
        router = Router(policy)
        for number in range(replicas):
            router.catalog.add(ModelInfo("m", "chat"), _Idle(f"w{number}"), replicate=True)
        for _ in range(replicas + 1):
            count_of_one = ask(router)
        counts.append(count_of_one)
    print(counts)
    assert counts[0] - counts[1] <= bound


class _First:
    """The policy that costs nothing."""

    why = "the first"

    def pick(self, replicas: Sequence[Backend], request: Request) -> Backend | None:
        return replicas[0]


@attrs.define(eq=False)
class _Idle:
    """A replica that is never busy."""

    name: str
    load: float = 0.0
    elsewhere: int = 0
    health: Health = attrs.field(factory=Health)

    def open(self, request: Request) -> Call:
        return Call(request, served_by=self.name)
