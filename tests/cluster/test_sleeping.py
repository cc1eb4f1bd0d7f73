"""Machines that sleep: what wakes them, who waits for them, and for how long. The packets are real, the time is not."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_cluster import ClusterServer, OptionsError, RawCall
from trio_cluster.cluster.sleeping import PACKET_INTERVAL, SleepingWorkers
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.core.wake_target import WakeTarget, read_wake_target
from trio_cluster.errors import ClusterError
from trio_cluster.gateway.body import SPOOL_THRESHOLD
from trio_cluster.options import ClusterServerOptions
from trio_cluster.routing.catalog import Catalog
from trio_cluster.testing import SimulatedCluster, open_cluster, settle, worker

MAC: Final = "02:42:ac:11:00:02"
PACKET: Final = b"\xff" * 6 + bytes.fromhex("0242ac110002") * 16


class Card:
    """The network card of a machine that sleeps."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @property
    def target(self) -> str:
        """A value of the option ``wake`` that reaches it."""
        return f"{MAC}@127.0.0.1:{self._socket.getsockname()[1]}"

    def packets(self) -> int:
        """Return how many magic packets have come since the last time. Nothing else may come."""
        count = 0
        while True:
            try:
                assert self._socket.recv(1000) == PACKET
            except BlockingIOError:
                return count
            count += 1


@pytest.fixture
def card() -> Iterator[Card]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        yield Card(sock)


async def hello(request: Any) -> str:
    return "hello"


def refuse(*args: Any) -> Any:
    raise ClusterError("not this time")


def machine(name: str = "w", *models: str, **options: Any) -> ClusterServer:
    server = worker(name, **options)
    for model in models or ("m",):
        server.register_chat(model, hello)
    return server


@asynccontextmanager
async def asleep(card: Card, **options: Any) -> AsyncIterator[SimulatedCluster]:
    """Open a cluster whose worker ``w`` had the model ``m``, and has gone to sleep."""
    async with open_cluster(wake={"w": card.target}, **options) as cluster:
        node = await cluster.start_worker(machine())
        assert (await cluster.client().chat("m", stream=False)).status == 200
        node.stop()
        await node.over.wait()
        await trio.sleep(3600)
        assert card.packets() == 0
        yield cluster
        await settle(cluster)
        assert not cluster.master.server.router.live


@pytest.mark.parametrize(
    ("text", "target"),
    [
        (MAC, WakeTarget(bytes.fromhex("0242ac110002"))),
        (MAC.upper().replace(":", "-"), WakeTarget(bytes.fromhex("0242ac110002"))),
        (MAC + "@192.168.1.255", WakeTarget(bytes.fromhex("0242ac110002"), ("192.168.1.255", 9))),
        (MAC + "@10.0.0.255:7", WakeTarget(bytes.fromhex("0242ac110002"), ("10.0.0.255", 7))),
    ],
)
def test_a_machine_is_named_by_its_hardware_address(text: str, target: WakeTarget) -> None:
    assert read_wake_target(text) == target
    assert target.packet == PACKET


@pytest.mark.parametrize(
    "text",
    ["", "02:42:ac:11:00", MAC + ":03", MAC + "@", MAC + "@host", MAC + "@1.2.3.999", MAC + "@1.2.3.4:0"],
)
def test_what_is_no_such_address_is_refused_with_the_name_of_the_worker(text: str) -> None:
    with pytest.raises(OptionsError, match="wake: gaming-pc: "):
        ClusterServerOptions(wake={"gaming-pc": text})


@pytest.mark.parametrize("value", [["w"], {"w": 7}, "w=1"])
def test_a_table_is_expected(value: Any) -> None:
    with pytest.raises(TypeError, match="wake: expected a"):
        ClusterServerOptions(wake=value)


async def test_a_request_wakes_the_machine_and_is_answered_there(
    card: Card, autojump_clock: MockClock
) -> None:
    async with asleep(card) as cluster, trio.open_nursery() as nursery:
        assert "m" in (await cluster.client().get("/v1/models")).body.decode()
        answers = []

        async def ask() -> None:
            answers.append(await cluster.client().chat("m"))

        for expected in ("", ", about 12 s"):
            for _ in range(2):
                nursery.start_soon(ask)
            await trio.sleep(12)
            assert card.packets() == 3
            node = await cluster.start_worker(machine())
            await trio.sleep(3)
            for answer in answers:
                assert answer.status == 200
                assert b"hello" in answer.body
                assert answer.body.endswith(b"data: [DONE]\n\n")
                comment = answer.body.partition(b"\n\n")[0].decode()
                assert comment.startswith(": waking w")
            if expected:
                # It is known by now how long that takes; ten seconds of it are over when the comment is sent.
                assert answers[-1].body.startswith(b": waking w, about 2 s\n\n")
            assert len(answers) == 2
            answers.clear()
            assert (await cluster.client().chat("m", stream=False)).headers["x-trio-cluster-worker"] == "w"
            assert card.packets() == 0
            node.stop()
            await node.over.wait()


async def test_a_plain_request_waits_for_longer_than_a_model_may_be_silent(
    card: Card, autojump_clock: MockClock
) -> None:
    async with asleep(card, default_timeout=20) as cluster, trio.open_nursery() as nursery:

        async def ask() -> None:
            assert (await cluster.client().chat("m", stream=False)).status == 200

        nursery.start_soon(ask)
        await trio.sleep(100)
        await cluster.start_worker(machine())


@pytest.mark.parametrize("stream", [True, False])
async def test_a_machine_that_does_not_wake_up_is_an_error_in_time(
    stream: bool, card: Card, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with asleep(card, wake_timeout=60) as cluster:
        began = trio.current_time()
        answer = await cluster.client().chat("m", stream=stream)
        assert trio.current_time() - began == pytest.approx(60, abs=0.1)
        assert card.packets() == 12
        if stream:
            assert answer.status == 200
            assert b"model_start_failed" in answer.body
            assert b"[DONE]" not in answer.body
        else:
            assert (answer.status, answer.error["code"]) == (503, "model_start_failed")
            assert "did not wake up within 60 s" in answer.error["message"]
            assert "retry-after" in answer.headers
        assert "a machine did not wake up" in caplog.text
        await trio.sleep(100)
        assert card.packets() == 0


async def test_no_packet_is_sent_for_clients_that_have_left(card: Card, autojump_clock: MockClock) -> None:
    async with asleep(card) as cluster:
        with trio.move_on_after(7):
            await cluster.client().chat("m")
        assert card.packets() == 2
        await settle(cluster)
        await trio.sleep(100)
        assert card.packets() == 0


@pytest.mark.parametrize("rule", ["reject", "replicate"])
async def test_a_model_that_another_worker_has_wakes_no_machine(
    rule: str, card: Card, autojump_clock: MockClock
) -> None:
    async with asleep(card, on_conflict=rule) as cluster, trio.open_nursery() as nursery:

        async def ask() -> None:
            answer = await cluster.client().chat("m", stream=False)
            assert answer.headers["x-trio-cluster-worker"] == "other"

        nursery.start_soon(ask)
        await trio.sleep(6)
        assert card.packets() == 2
        other = await cluster.start_worker(machine("other"))
        for _ in range(3):
            await ask()
        assert card.packets() == 0
        other.stop()
        await other.over.wait()
        await trio.sleep(PACKET_INTERVAL)
        with trio.move_on_after(1):
            await cluster.client().chat("m", stream=False)
        assert card.packets() == 1


async def test_what_a_worker_brings_no_more_when_it_is_awake_is_not_waited_for(
    card: Card, autojump_clock: MockClock
) -> None:
    async with asleep(card) as cluster, trio.open_nursery() as nursery:

        async def ask() -> None:
            answer = await cluster.client().chat("m", stream=False)
            assert (answer.status, answer.error["code"]) == (503, "model_unavailable")

        nursery.start_soon(ask)
        await trio.sleep(6)
        await cluster.start_worker(machine("w", "another"))
        await trio.sleep(31)
        await ask()
        await trio.sleep(130)
        assert (await cluster.client().chat("m", stream=False)).status == 404
        assert card.packets() == 2


async def test_a_model_that_is_taken_back_is_not_remembered(card: Card, autojump_clock: MockClock) -> None:
    async with open_cluster(wake={"w": card.target}) as cluster:
        server = machine("w", "a", "b")
        node = await cluster.start_worker(server)
        server.unregister_model("a")
        await trio.sleep(1)
        node.stop()
        await node.over.wait()
        await trio.sleep(130)
        assert (await cluster.client().chat("a", stream=False)).status == 404
        with trio.move_on_after(1):
            await cluster.client().chat("b", stream=False)
        assert card.packets() == 1


async def test_what_sleeps_is_remembered_over_a_restart_of_the_master(
    card: Card, tmp_path: Path, autojump_clock: MockClock
) -> None:
    state = tmp_path / "state"
    async with open_cluster(wake={"w": card.target}, state_dir=str(state)) as cluster:
        node = await cluster.start_worker(machine("w", "m", "n"))
        await trio.sleep(2)
        node.stop()
        await trio.sleep(2)
        for end in ("stop", "kill"):
            getattr(cluster.master, end)()
            await cluster.master.over.wait()
            await trio.sleep(3600)
            await cluster.start_master(ClusterServer(attrs.evolve(cluster.options)))
            listed = json.loads((await cluster.client().get("/v1/models")).body)
            assert [each["id"] for each in listed["data"]] == ["m", "n"]
            with trio.move_on_after(1):
                await cluster.client().chat("n", stream=False)
            assert card.packets() == 1
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                assert (await cluster.client().chat("m", stream=False)).status == 200

            nursery.start_soon(ask)
            await trio.sleep(3)
            await cluster.start_worker(machine("w", "m", "n"))
    # A worker that the option names no longer is forgotten, and so is a file that is damaged.
    for content, wake in (((state / "sleeping.json").read_bytes(), {"x": MAC}), (b"{", {"w": MAC})):
        (state / "sleeping.json").write_bytes(content)
        (state / "models.json").unlink()
        async with open_cluster(wake=wake, state_dir=str(state)) as cluster:
            assert (await cluster.client().chat("m", stream=False)).status == 404


async def test_a_body_that_is_not_kept_is_refused_and_wakes_the_machine(
    card: Card, autojump_clock: MockClock
) -> None:
    async def listen(request: Any) -> str:
        return "heard"

    async with open_cluster(wake={"w": card.target}) as cluster:
        server = worker("w")
        server.register_asr("ears", listen)
        node = await cluster.start_worker(server)
        node.stop()
        await node.over.wait()
        head = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nears\r\n--B\r\n'
        part = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        body = head + part + b"x" * (4 * SPOOL_THRESHOLD) + b"\r\n--B--\r\n"
        headers = {"content-type": "multipart/form-data; boundary=B"}
        answer = await cluster.client().post("/v1/audio/transcriptions", body, headers=headers)
        assert (answer.status, answer.error["code"]) == (503, "model_unavailable")
        assert "retry-after" in answer.headers
        await trio.sleep(1)
        assert card.packets() == 1


async def test_an_alias_goes_on_when_the_machine_does_not_wake_up(
    card: Card, autojump_clock: MockClock
) -> None:
    async with asleep(card, wake_timeout=20, aliases={"a": ["m", "spare"]}) as cluster:
        cluster.master.server.register_chat("spare", hello)
        answer = await cluster.client().chat("a", stream=False)
        assert (answer.status, answer.headers["x-trio-cluster-model"]) == (200, "spare")


async def test_a_packet_that_cannot_be_sent_is_a_line_in_the_log_and_the_request_waits(
    card: Card,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NoNetwork(socket.socket):
        def sendto(self, *args: Any) -> int:
            raise OSError(101, "Network is unreachable")

    async with asleep(card) as cluster, trio.open_nursery() as nursery:
        monkeypatch.setattr("trio_cluster.cluster.sleeping.socket.socket", NoNetwork)

        async def ask() -> None:
            assert (await cluster.client().chat("m", stream=False)).status == 200

        with caplog.at_level(logging.WARNING):
            nursery.start_soon(ask)
            await trio.sleep(2 * PACKET_INTERVAL + 1)
        assert caplog.text.count("no packet could be sent: [Errno 101] Network is unreachable") == 3
        monkeypatch.undo()
        await cluster.start_worker(machine())


@pytest.mark.parametrize("stream", [True, False])
async def test_an_alias_goes_on_when_its_patience_is_over(
    stream: bool, card: Card, autojump_clock: MockClock
) -> None:
    aliases = {"a": ["m", "spare"], "only": ["m", "nobody"]}
    async with asleep(card, aliases=aliases, start_patience=13) as cluster, trio.open_nursery() as nursery:
        cluster.master.server.register_chat("spare", hello)
        began = trio.current_time()
        answer = await cluster.client().chat("a", stream=stream)
        assert trio.current_time() - began == pytest.approx(13, abs=0.1)
        assert answer.status == 200
        assert b"hello" in answer.body
        if stream:
            assert answer.body.startswith(b": waking w\n\n")
        else:
            assert answer.headers["x-trio-cluster-model"] == "spare"
        await settle(cluster)
        assert card.packets() == 3

        # Without another name that can be asked, it is waited for.
        async def ask() -> None:
            answer = await cluster.client().chat("only", stream=stream)
            assert (answer.status, b"hello" in answer.body) == (200, True)

        nursery.start_soon(ask)
        await trio.sleep(40)
        await cluster.start_worker(machine())


@pytest.mark.parametrize("stream", [True, False])
async def test_what_was_waited_for_a_machine_does_not_count_for_any_of_the_next_names(
    stream: bool, card: Card, autojump_clock: MockClock
) -> None:
    async def busy(call: RawCall) -> None:
        call.begin(503, "application/json")

    async def slow(request: Any) -> str:
        await trio.sleep(15)
        return "hello"

    options = {"aliases": {"a": ["m", "busy", "slow"]}, "start_patience": 13, "default_timeout": 20}
    async with asleep(card, **options) as cluster:
        cluster.master.server.register_raw("busy", busy)
        cluster.master.server.register_chat("slow", slow)
        began = trio.current_time()
        answer = await cluster.client().chat("a", stream=stream)
        assert (answer.status, b"hello" in answer.body) == (200, True)
        assert trio.current_time() - began == pytest.approx(28, abs=0.1)


async def test_the_list_of_models_and_the_status_say_that_the_machine_sleeps(
    card: Card, autojump_clock: MockClock
) -> None:
    async with asleep(card) as cluster, trio.open_nursery() as nursery:

        async def state() -> str:
            listed = json.loads((await cluster.client().get("/v1/models")).body)["data"]
            shown = json.loads((await cluster.client().get("/cluster/status")).body)["models"]
            assert [each["state"] for each in listed] == [each["state"] for each in shown]
            return str(listed[0]["state"])

        assert await state() == "cold"
        with trio.move_on_after(1):
            await cluster.client().chat("m")
        await settle(cluster)
        assert await state() == "cold"
        nursery.start_soon(cluster.client().chat, "m")
        await trio.sleep(1)
        assert await state() == "starting"
        await cluster.start_worker(machine())
        assert await state() == "ready"


async def test_an_operator_can_wake_a_machine_and_does_not_by_unloading(
    card: Card, autojump_clock: MockClock
) -> None:
    async with asleep(card) as cluster, trio.open_nursery() as nursery:
        client = cluster.client()
        assert (await client.post("/cluster/models/m/unload", {})).status == 503
        await trio.sleep(1)
        assert card.packets() == 0

        async def load() -> None:
            answer = await client.post("/cluster/models/m/load", {})
            assert answer.status == 200
            assert answer.json() == {"model": "m", "state": "ready", "nodes": ["w"]}

        nursery.start_soon(load)
        await trio.sleep(6)
        assert card.packets() == 2
        await cluster.start_worker(machine())


async def test_a_request_that_comes_while_the_machine_is_awake_does_not_wake_it_later(
    card: Card, autojump_clock: MockClock
) -> None:
    async with asleep(card) as cluster:
        node = await cluster.start_worker(machine("w", "another"))
        with trio.move_on_after(1):
            await cluster.client().chat("m")
        node.stop()
        await node.over.wait()
        await trio.sleep(60)
        assert card.packets() == 0
        models = (await cluster.client().get("/v1/models")).json()["data"]
        assert {each["id"]: each["state"] for each in models} == {"m": "cold", "another": "cold"}


async def test_a_machine_that_goes_away_again_before_it_brings_the_model_is_woken_again_at_once(
    card: Card, autojump_clock: MockClock
) -> None:
    async with asleep(card) as cluster, trio.open_nursery() as nursery:
        answers = []

        async def ask() -> None:
            answers.append(await cluster.client().chat("m", stream=False))

        nursery.start_soon(ask)
        await trio.sleep(6)
        node = await cluster.start_worker(machine("w", "another"))
        assert card.packets() == 2
        node.stop()
        await node.over.wait()
        await trio.sleep(PACKET_INTERVAL + 1)
        assert card.packets() > 0
        await cluster.start_worker(machine())
        await trio.sleep(1)
        assert [answer.status for answer in answers] == [200]


async def test_what_is_asked_in_the_moment_in_which_a_worker_joins_sends_no_packet_when_it_has_left(
    autojump_clock: MockClock,
) -> None:
    catalog, sent = Catalog(), []
    sleeping = SleepingWorkers(catalog, ClusterServerOptions(wake={"w": MAC}), send=sent.append)
    sleeping.registered("w", ModelInfo("m", "chat"))
    (backend,) = catalog.replicas("m")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeping.run)
        await trio.testing.wait_all_tasks_blocked()
        call = backend.open(Request("chat.completions", "chat", "m", b"{}"))
        sleeping.joined("w")
        call.cancel("the client left")
        sleeping.registered("w", ModelInfo("m", "chat"))
        await trio.sleep(40)
        sleeping.left("w")
        sleeping.registered("w", ModelInfo("n", "chat"))
        sleeping.joined("w")
        sleeping.left("w")
        await trio.sleep(40)
        assert sent == []
        nursery.cancel_scope.cancel()


async def test_what_an_older_connection_of_the_worker_brought_is_not_waited_for(
    autojump_clock: MockClock,
) -> None:
    catalog = Catalog()
    sleeping = SleepingWorkers(catalog, ClusterServerOptions(wake={"w": MAC}), send=lambda target: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeping.run)
        sleeping.joined("w")
        sleeping.registered("w", ModelInfo("m", "chat"))
        sleeping.joined("w")
        (backend,) = catalog.replicas("m")
        call = backend.open(Request("chat.completions", "chat", "m", b"{}"))
        await trio.sleep(40)
        assert call.ended
        assert catalog.info("m") is None
        nursery.cancel_scope.cancel()


async def test_a_start_of_the_master_that_fails_leaves_no_stand_in_to_the_next_one(
    card: Card, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_cluster(wake={"w": card.target}, state_dir=str(tmp_path / "state")) as cluster:
        node = await cluster.start_worker(machine())
        await trio.sleep(2)
        node.stop()
        await node.over.wait()
        cluster.master.stop()
        await cluster.master.over.wait()
        server = ClusterServer(attrs.evolve(cluster.options))
        with monkeypatch.context() as patch:
            patch.setattr("trio_cluster.node.WorkerManager", refuse)
            with pytest.raises(ClusterError, match="not this time"):
                await cluster.start_master(server)
        assert server.router.catalog.info("m") is None
        await cluster.start_master(server)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                assert (await cluster.client().chat("m", stream=False)).status == 200

            nursery.start_soon(ask)
            await trio.sleep(3)
            assert card.packets() == 1
            await cluster.start_worker(machine())
