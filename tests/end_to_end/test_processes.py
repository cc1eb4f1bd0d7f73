"""Real processes and real signals: what is lost when a node dies, and what is not."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import httpx
import patience
import pytest
import trio
from nodes import NOT_RESUMED, Node, Nodes, Stream, free_pair
from served import chat, until

pytestmark = pytest.mark.processes

STOPS = pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


async def request(node: Node, method: str, path: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=node.url, timeout=20, trust_env=False, verify=False) as client:
        return await client.request(method, path, **options)


async def ask(node: Node, model: str, **fields: Any) -> httpx.Response:
    return await request(node, "POST", "/v1/chat/completions", json=chat(model, **fields))


async def models(node: Node) -> set[str]:
    """Return the names of the chat models that a node lists."""
    response = await request(node, "GET", "/v1/models")
    return {entry["id"] for entry in response.json()["data"] if entry["kind"] == "chat"}


async def workers(node: Node) -> dict[str, Any]:
    """Return what a master says about its workers, by name."""
    response = await request(node, "GET", "/cluster/status")
    return {worker["id"]: worker for worker in response.json()["workers"]}


async def models_become(node: Node, expected: set[str], within: float) -> None:
    async def are() -> bool:
        return await models(node) == expected

    await until(are, within)


async def open_stream(nursery: trio.Nursery, node: Node, model: str, **fields: Any) -> Stream:
    """Have a stream that is being read, and of which something has come."""
    stream: Stream = await nursery.start(Stream().read, node.url, chat(model, stream=True, **fields))
    return stream


# A worker that is lost


async def test_of_three_workers_one_is_killed_and_only_its_own_stream_fails(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    master = await nodes.master(*NOT_RESUMED)
    b = await nodes.worker(master, "wb", models="b")
    await nodes.worker(master, "wa", models="a")
    await nodes.worker(master, "wc", models="c")
    assert await models(master) == {"a", "b", "c"}
    streams = {model: await open_stream(nursery, master, model, ticks=60, pause=0.05) for model in "abc"}

    b.send(signal.SIGKILL)
    failed = await streams["b"].end(within=1)
    await models_become(master, {"a", "c"}, within=1)
    assert failed.report.ending == "failed"
    assert failed.report.error is not None
    assert failed.report.error["code"] == "worker_lost"
    assert (await ask(master, "b")).status_code == 503
    assert streams["a"].is_running
    assert streams["c"].is_running

    await nodes.worker(master, "wb", models="b")
    assert (await ask(master, "b")).json()["choices"][0]["message"]["content"] == "0 1 2 "
    for model in "ac":
        finished = await streams[model].end(within=10)
        assert finished.report.ending == "finished"
        assert finished.report.text == "".join(f"{i} " for i in range(60))


async def test_a_request_that_nothing_came_of_is_a_502_when_its_worker_is_killed(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    master = await nodes.master(*NOT_RESUMED)
    worker = await nodes.worker(master, "w", models="m")
    answers: list[httpx.Response] = []

    async def wait_for_answer() -> None:
        answers.append(await ask(master, "m", ticks=1000))

    async def is_asked() -> bool:
        return bool((await workers(master))["w"]["in_flight"])

    async with trio.open_nursery() as waiting:
        waiting.start_soon(wait_for_answer)
        await until(is_asked, within=5)
        worker.send(signal.SIGKILL)
    assert answers[0].status_code == 502
    assert answers[0].json()["error"]["code"] == "worker_lost"


async def test_a_worker_that_freezes_is_given_up_and_comes_back_when_it_thaws(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    patience = ("--worker-timeout", "2", "--heartbeat-interval", "0.5")
    master = await nodes.master(*patience)
    worker = await nodes.worker(master, "w", *patience, models="m")
    stream = await open_stream(nursery, master, "m", ticks=1000)
    worker.send(signal.SIGSTOP)
    try:
        failed = await stream.end(within=3.5)
        await models_become(master, set(), within=1)
    finally:
        worker.send(signal.SIGCONT)
    assert failed.report.ending == "failed"
    await models_become(master, {"m"}, within=5)
    assert (await ask(master, "m")).status_code == 200
    assert nodes.notes() == ["m cancelled", "m finished"]


async def test_a_model_stays_served_when_one_of_its_replicas_is_killed(nodes: Nodes) -> None:
    master = await nodes.master(*NOT_RESUMED, "--on-conflict", "replicate", "--routing", "least-busy")
    first = await nodes.worker(master, "w1", models="who")
    second = await nodes.worker(master, "w2", models="who")

    async def answered_by(requests: int) -> set[int]:
        answers = [await ask(master, "who") for _ in range(requests)]
        assert [answer.text for answer in answers if answer.status_code != 200] == []
        return {int(answer.json()["choices"][0]["message"]["content"]) for answer in answers}

    assert await answered_by(4) == {first.process.pid, second.process.pid}
    # Also those requests have to be answered that come while the master finds out.
    first.send(signal.SIGKILL)
    assert await answered_by(20) == {second.process.pid}


async def test_a_name_that_is_taken_is_refused_and_the_worker_stays(nodes: Nodes) -> None:
    master = await nodes.master()
    first = await nodes.worker(master, "w1", models="who")
    second = await nodes.worker(master, "w2", models="who spare", ready=False)
    refusal = "a model named 'who' is already served by w1"
    await second.log(f"the master refused a model: {refusal}", level="warning", model="who")
    await second.log("registered with the master")
    await master.log(f"model refused: {refusal}", level="warning", worker="w2", model="who")
    status = await workers(master)
    assert "who" in status["w1"]["models"]
    assert "spare" in status["w2"]["models"]
    assert "who" not in status["w2"]["models"]
    for _ in range(3):
        answer = await ask(master, "who")
        assert answer.json()["choices"][0]["message"]["content"] == str(first.process.pid)


# Stopping


@pytest.mark.parametrize(
    "stop", [signal.SIGTERM, signal.SIGINT, None], ids=["SIGTERM", "SIGINT", "from outside"]
)
async def test_a_worker_that_is_stopped_finishes_its_stream_first(
    nodes: Nodes, nursery: trio.Nursery, stop: signal.Signals | None
) -> None:
    master = await nodes.master()
    worker = await nodes.worker(master, "w", models="m")
    stream = await open_stream(nursery, master, "m", ticks=40, pause=0.05)
    if stop is None:
        assert (await request(master, "POST", "/cluster/workers/w/drain")).status_code == 202
        await worker.log("the master asks this worker to stop")
    else:
        worker.send(stop)
    await master.log("worker drains", worker="w")
    refused = await ask(master, "m")
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    finished = await stream.end(within=5)
    assert finished.report.ending == "finished"
    assert finished.report.text.endswith(" 39 ")
    assert await worker.exit_code(within=5) == 0
    left = await master.log("worker left", worker="w")
    assert (left["level"], left["calls_lost"]) == ("info", 0)
    assert await models(master) == set()


@STOPS
async def test_a_master_that_is_stopped_finishes_its_streams_and_takes_no_new_ones(
    nodes: Nodes, nursery: trio.Nursery, stop: signal.Signals
) -> None:
    master = await nodes.master(models="local")
    worker = await nodes.worker(master, "w", models="m")
    streams = [await open_stream(nursery, master, model, ticks=40, pause=0.05) for model in ("m", "local")]
    master.send(stop)
    await master.log("stopping")
    refused = await ask(master, "m")
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert (await request(master, "GET", "/health")).status_code == 503
    for stream in streams:
        assert (await stream.end(within=5)).report.ending == "finished"
    assert await master.exit_code(within=5) == 0
    await worker.log("the master is about to stop")
    await worker.log("lost the master")
    worker.send(stop)
    assert await worker.exit_code(within=5) == 0


@STOPS
@pytest.mark.parametrize("role", ["master", "worker"])
async def test_a_second_signal_stops_at_once(
    nodes: Nodes, nursery: trio.Nursery, stop: signal.Signals, role: str
) -> None:
    master = await nodes.master(models="m" if role == "master" else "")
    node = master if role == "master" else await nodes.worker(master, "w", models="m")
    stream = await open_stream(nursery, master, "m", ticks=1000)
    node.send(stop)
    await node.log("stopping")
    assert stream.is_running
    node.send(stop)
    assert await node.exit_code(within=2) == 0
    assert (await stream.end(within=1)).report.ending != "finished"
    assert nodes.notes() == ["m cancelled"]


@pytest.mark.parametrize(
    ("role", "forwarded"),
    [("master", False), ("master", True), ("worker", True)],
    ids=["a master that answers itself", "a master that forwards", "a worker"],
)
async def test_what_does_not_finish_within_the_drain_timeout_is_cancelled_and_told_so(
    nodes: Nodes, nursery: trio.Nursery, role: str, forwarded: bool
) -> None:
    short = ("--drain-timeout", "0.5")
    stopped = master = await nodes.master(*short, models="" if forwarded else "m")
    if forwarded:
        worker = await nodes.worker(master, "w", *short, models="m")
        stopped = master if role == "master" else worker
    stream = await open_stream(nursery, master, "m", ticks=1000)
    stopped.send(signal.SIGTERM)
    cut = await stream.end(within=3)
    assert cut.report.ending == "failed"
    assert cut.report.error is not None
    assert cut.report.error["code"] == "cancelled"
    assert await stopped.exit_code(within=3) == 0
    await until(lambda: nodes.notes() == ["m cancelled"], within=1)
    if role == "worker":
        await models_become(master, set(), within=1)


async def test_what_a_worker_has_not_begun_within_its_drain_timeout_is_given_to_another_one(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    master = await nodes.master("--on-conflict", "replicate")
    narrow = ("--drain-timeout", "0.5", "--max-concurrency", "1", "--queue-timeout", "30")
    first = await nodes.worker(master, "w1", *narrow, models="m")
    begun = await open_stream(nursery, master, "m", ticks=1000)
    answers: list[httpx.Response] = []

    async def queue() -> None:
        answers.append(await ask(master, "m"))

    async def is_queued() -> bool:
        return bool((await workers(master))["w1"]["in_flight"] == 2)

    async with trio.open_nursery() as queuing:
        queuing.start_soon(queue)
        await until(is_queued, within=5)
        await nodes.worker(master, "w2", models="m")
        first.send(signal.SIGTERM)
        assert (await begun.end(within=3)).report.ending == "failed"
        assert await first.exit_code(within=3) == 0
    assert answers[0].status_code == 200
    assert nodes.notes() == ["m cancelled", "m finished"]


# A master that is lost


async def test_workers_stop_the_work_of_a_master_that_is_killed_and_come_back_to_the_next(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    port = free_pair()
    master = await nodes.start("master", port)
    worker = await nodes.worker(master, "w", models="m")
    stream = await open_stream(nursery, master, "m", ticks=1000)
    master.send(signal.SIGKILL)
    assert (await stream.end(within=1)).report.ending == "cut"
    await until(lambda: nodes.notes() == ["m cancelled"], within=1)
    await worker.log("lost the master")

    master = await nodes.start("master", port)
    await models_become(master, {"m"}, within=10)
    assert (await ask(master, "m")).status_code == 200
    assert nodes.notes() == ["m cancelled", "m finished"]


async def test_a_worker_waits_for_a_master_that_is_not_there_yet(nodes: Nodes) -> None:
    port = free_pair()
    worker = await nodes.start("worker", "127.0.0.1", port, models="m", ready=False)
    await worker.log("no link to the master")
    master = await nodes.start("master", port)
    await worker.log("registered with the master")
    assert (await ask(master, "m")).status_code == 200


# Finding one's part


async def test_the_first_to_run_is_the_master_and_the_second_its_worker(nodes: Nodes) -> None:
    port = free_pair()
    first = await nodes.start("run", port, models="a")
    second = await nodes.start("run", port, models="b", ready=False)
    await second.log("registered with the master")
    assert first.logged("serving", mode="master")
    assert await models(first) == {"a", "b"}
    for model in "ab":
        assert (await ask(first, model)).status_code == 200


@pytest.mark.parametrize("held", [0, 1000], ids=["the port", "the port for workers"])
async def test_a_port_that_something_else_holds_is_named_in_one_line(nodes: Nodes, held: int) -> None:
    port = free_pair()
    with socket.create_server(("127.0.0.1", port + held)):
        node = await nodes.start("run", port, models="m", ready=False)
        assert await node.exit_code() == 1
    assert node.entries == []
    [line] = node.noise
    assert re.match(rf"trio-cluster: error: port {port + held}: .*(held by|taken by|in use)", line)


@pytest.mark.parametrize("token", [(), ("--cluster-token", "wrong")], ids=["no token", "a wrong token"])
async def test_a_worker_without_the_token_says_so_and_exits(nodes: Nodes, token: tuple[str, ...]) -> None:
    master = await nodes.master("--cluster-token", "right")
    worker = await nodes.worker(master, "w", *token, models="m", ready=False)
    assert await worker.exit_code() == 1
    assert worker.noise == ["trio-cluster: error: 127.0.0.1: wrong or missing cluster token"]
    await master.log("connection refused: wrong or missing cluster token", level="warning")
    await nodes.worker(master, "w", "--cluster-token", "right", models="m")
    assert (await ask(master, "m")).status_code == 200


async def test_a_worker_that_is_sent_to_the_wrong_port_says_so_and_exits(nodes: Nodes) -> None:
    master = await nodes.master(models="m")
    worker = await nodes.start("worker", "127.0.0.1", "--internal-port", master.port, models="m", ready=False)
    assert await worker.exit_code() == 1
    [line] = worker.noise
    assert "not the port on which a trio_cluster master takes workers" in line


async def test_a_worker_serves_its_own_models_on_an_address_of_its_own_if_it_is_given_one(
    nodes: Nodes,
) -> None:
    master = await nodes.master(models="a")
    worker = await nodes.worker(master, "w", "--listen", "127.0.0.1:0", models="b", ready=False)
    api = await worker.log("serving this worker's own API")
    await worker.log("registered with the master")
    own = Node(worker.process, "worker", int(api["url"].rpartition(":")[2]))
    assert await models(own) == {"b"}
    assert (await ask(own, "b")).status_code == (await ask(master, "b")).status_code == 200


# Strangers on the port for workers

UPGRADE = (
    b"GET /cluster HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
OURS = UPGRADE + b"Sec-WebSocket-Protocol: trio-cluster.1\r\n\r\n"

NO_WEBSOCKET = "there was no websocket handshake"

MASK = bytes(4)


@attrs.frozen
class Stranger:
    """Somebody who connects to the port for workers and is none."""

    said_of_him: str
    """What the master logs."""
    says: bytes = OURS
    frame: bytes = b""
    """What he sends once the websocket is open."""
    hangs_up: bool = False

    async def visit(self, master: Node) -> str:
        """Connect, and stay until the master hangs up; return the address it was seen from."""
        client = await trio.open_tcp_stream("127.0.0.1", master.port + 1000)
        async with client:
            address = "{}:{}".format(*client.socket.getsockname())
            with patience.fail_after(3), suppress(trio.BrokenResourceError):
                await self._talk(client)
        return address

    async def _talk(self, client: trio.SocketStream) -> None:
        await client.send_all(self.says)
        if self.frame:
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += await client.receive_some()
            await client.send_all(self.frame)
        if self.hangs_up:
            await client.send_eof()
        while await client.receive_some():
            pass


STRANGERS = {
    "a port scan": Stranger(NO_WEBSOCKET, b"", hangs_up=True),
    "half a handshake": Stranger(NO_WEBSOCKET, OURS[:100], hangs_up=True),
    "random bytes": Stranger(NO_WEBSOCKET, b"\xff" + os.urandom(10_000) + b"\r\n\r\n"),
    "zeros": Stranger(NO_WEBSOCKET, bytes(100_000)),
    "a browser": Stranger(NO_WEBSOCKET, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a client of the API": Stranger(
        NO_WEBSOCKET, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    ),
    "TLS": Stranger(NO_WEBSOCKET, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)),
    "another protocol": Stranger(
        "this master supports the subprotocol trio-cluster.1 only", UPGRADE + b"\r\n"
    ),
    "another path": Stranger("workers connect to /cluster", OURS.replace(b"/cluster", b"/chat")),
    "a silent worker": Stranger("the connection broke", hangs_up=True),
    "a truncated frame": Stranger(
        "the connection broke", frame=b"\x82\xfe\x7f\xff" + MASK + b"abc", hangs_up=True
    ),
    "an unmasked frame": Stranger("protocol error: unmasked frame from the client", frame=b"\x82\x05hello"),
    "reserved bits": Stranger(
        "protocol error: reserved bit set, but no extension was negotiated",
        frame=b"\xf2\x85" + MASK + b"hello",
    ),
    "a text message": Stranger(
        "protocol error: text message; this protocol is binary", frame=b"\x81\x85" + MASK + b"hello"
    ),
    "no protocol": Stranger(
        "protocol error: not a msgpack array of at most 4096 messages", frame=b"\x82\x85" + MASK + b"hello"
    ),
}


async def test_strangers_on_the_port_for_workers_cost_one_line_each_and_nothing_else(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    master = await nodes.master()
    await nodes.worker(master, "w", models="m")
    stream = await open_stream(nursery, master, "m", ticks=1000)
    addresses = {}
    for name, stranger in STRANGERS.items():
        address = addresses[name] = await stranger.visit(master)
        line = await master.log("connection refused", address=address)
        assert (name, line["message"]) == (name, f"connection refused: {stranger.said_of_him}")
        assert line["level"] == "warning"
    for name, address in addresses.items():
        assert len(master.logged("", address=address)) == 1, name
    assert (await ask(master, "m")).status_code == 200
    assert stream.is_running
    assert list(await workers(master)) == ["w"]


# Large bodies


def peak_memory(node: Node) -> int:
    """Return the most memory that a process has had so far, in bytes."""
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_large_upload_passes_through_the_master_without_being_copied_often(nodes: Nodes) -> None:
    master = await nodes.master()
    worker = await nodes.worker(master, "w", models="m")
    audio = random_bytes(64 * 1024 * 1024)
    before = peak_memory(master)
    with trio.fail_after(20):
        response = await request(
            master,
            "POST",
            "/v1/audio/transcriptions",
            data={"model": f"digest-{worker.process.pid}", "response_format": "text"},
            files={"file": ("a.wav", audio)},
        )
    assert (response.status_code, response.text) == (200, hashlib.sha256(audio).hexdigest() + "\n")
    assert peak_memory(master) - before < 4.5 * len(audio)
    assert (await ask(master, "m")).status_code == 200


def random_bytes(count: int) -> bytes:
    """Return bytes that no two pieces of are alike; cheaper than asking the system for all of them."""
    block = os.urandom(1 << 20)
    return b"".join(bytes([i & 0xFF]) + block[1:] for i in range(count >> 20))
