"""The server in its four ways to run, on real sockets."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio
from nodes import free_pair
from trio.testing import wait_all_tasks_blocked

import trio_cluster
from trio_cluster import (
    ChatModelOptions,
    ChatRequest,
    ClusterMode,
    ClusterPortError,
    ClusterServer,
    ClusterServerOptions,
    HandshakeRefused,
    ServerOptions,
    check_is_cluster_server,
)
from trio_cluster.core.model import KINDS

HOST = "127.0.0.1"


def make(**options: Any) -> ClusterServer:
    server = {
        name: options.pop(name) for name in ("max_concurrency", "worker_id", "api_key") if name in options
    }
    return ClusterServer(ClusterServerOptions(server=ServerOptions(host=HOST, port=0, **server), **options))


async def echo(request: ChatRequest) -> AsyncIterator[str]:
    for word in request.last_text.split():
        yield word + " "


def ask(model: str, *, stream: bool = False, content: str = "a b") -> dict[str, Any]:
    return {"model": model, "stream": stream, "messages": [{"role": "user", "content": content}]}


async def answer(server: ClusterServer, model: str = "echo") -> str:
    async with httpx.AsyncClient(base_url=str(server.url), verify=False) as client:
        response = await client.post("/v1/chat/completions", json=ask(model))
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content


# Registering


def test_a_model_is_registered_by_each_method_and_each_decorator() -> None:
    server = make()
    for kind in sorted(set(KINDS) - {"any", "custom"}):
        getattr(server, f"register_{kind}")(f"{kind}-1", echo)
        assert getattr(server, kind)(f"{kind}-2")(echo) is echo
    assert len(server.list_models()) == 16
    assert server.has_model("tts-2")
    assert server.unregister_model("tts-2")
    assert not server.has_model("tts-2")
    assert not server.unregister_model("tts-2")


def test_a_taken_name_is_a_value_error() -> None:
    server = make()
    server.register_chat("m", echo)
    with pytest.raises(ValueError, match="'m'"):
        server.register_chat("m", echo)


@pytest.mark.parametrize("name", ["", "x" * 600, "line\nbreak", 3, None])
def test_what_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        make().register_chat(name, echo)


def test_a_handler_of_no_known_shape_is_a_type_error_and_registers_nothing() -> None:
    server = make()
    with pytest.raises(TypeError):
        server.register_chat("m", lambda: "x")
    assert server.list_models() == []


def test_options_of_a_decorator_are_those_of_a_chat_model() -> None:
    server = make()
    server.chat("m", supports_vision=True, context_window=4096, extra_fields={"x": 1})(echo)
    with pytest.raises(TypeError):
        server.chat("n", vision=True)


def test_extra_fields_must_be_json() -> None:
    with pytest.raises(ValueError, match="extra_fields"):
        ChatModelOptions(extra_fields={"x": object()})


@pytest.mark.parametrize("options", ["8080", 3.5, True, object()])
def test_a_server_takes_a_port_or_options(options: Any) -> None:
    with pytest.raises(TypeError):
        ClusterServer(options)
    assert ClusterServer(9000).options.server.port == 9000


def test_the_exports_are_there() -> None:
    for name in trio_cluster.__all__:
        assert hasattr(trio_cluster, name)


# Modes


async def test_a_standalone_server_serves_and_stops() -> None:
    server = make()
    server.register_chat("echo", echo)
    async with trio.open_nursery() as nursery:
        mode = await nursery.start(server.run_as_standalone)
        assert mode is ClusterMode.STANDALONE
        assert (server.mode, server.is_running, server.internal_port) == (mode, True, None)
        assert server.app is not None
        assert server.worker_manager is None
        assert server.worker_client is None
        assert await answer(server) == "a b "
        server.stop()
    assert (server.mode, server.is_running, server.url, server.app) == (None, False, None, None)


async def test_a_master_and_a_worker_find_each_other() -> None:
    master, worker = make(), make(worker_id="w1")
    worker.register_chat("echo", echo)
    async with trio.open_nursery() as nursery:
        assert await nursery.start(master.run_as_master) is ClusterMode.MASTER
        assert master.internal_port == (master.port or 0) + 1000
        assert await nursery.start(worker.run_as_worker, HOST, master.internal_port) is ClusterMode.WORKER
        assert master.list_models() == ["echo"]
        assert worker.worker_client is not None
        assert worker.worker_client.rejected_models == {}
        assert master.worker_manager is not None
        assert list(master.worker_manager.workers) == ["w1"]
        assert await answer(master) == "a b "
        worker.register_chat("late", echo)
        async with httpx.AsyncClient(base_url=str(master.url), verify=False) as client:
            with trio.fail_after(5):
                while (await client.get("/v1/models/late")).status_code != 200:
                    await trio.lowlevel.checkpoint()
        worker.stop()
        master.stop()


async def test_run_is_a_master_where_the_port_is_free_and_a_worker_where_a_master_has_it() -> None:
    port = free_pair()
    first, second = make(), make(worker_id="second")
    first.register_chat("here", echo)
    second.register_chat("there", echo)
    modes: list[ClusterMode] = []

    async def run(server: ClusterServer, *, task_status: Any) -> None:
        modes.append(await server.run(port, task_status=task_status))

    async with trio.open_nursery() as nursery:
        assert await nursery.start(run, first) is ClusterMode.MASTER
        assert await nursery.start(run, second) is ClusterMode.WORKER
        assert first.list_models() == ["here", "there"]
        assert second.list_models() == ["there"]
        assert await answer(first, "there") == "a b "
        second.stop()
        first.stop()
    assert sorted(modes) == [ClusterMode.MASTER, ClusterMode.WORKER]


async def test_servers_that_start_at_the_same_time_end_up_as_one_cluster() -> None:
    port = free_pair()
    servers = [make(worker_id=f"n{number}") for number in range(4)]
    for number, server in enumerate(servers):
        server.register_chat(f"m{number}", echo)
    modes: list[ClusterMode] = []

    async def start(server: ClusterServer) -> None:
        modes.append(await nursery.start(server.run, port))

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as starting:
            for server in servers:
                starting.start_soon(start, server)
        assert sorted(modes) == [ClusterMode.MASTER] + 3 * [ClusterMode.WORKER]
        (master,) = [server for server in servers if server.mode is ClusterMode.MASTER]
        assert master.list_models() == ["m0", "m1", "m2", "m3"]
        nursery.cancel_scope.cancel()


async def test_run_without_a_cluster_is_standalone() -> None:
    server = make(enable_cluster=False)
    async with trio.open_nursery() as nursery:
        assert await nursery.start(server.run) is ClusterMode.STANDALONE
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("which", [0, 1000])
async def test_a_port_that_another_program_has_is_named(which: int) -> None:
    port = free_pair()
    with socket.socket() as sock:
        sock.bind((HOST, port + which))
        sock.listen()
        with pytest.raises(ClusterPortError, match=str(port + which)) as caught:
            await make().run(port)
        assert caught.value.port == port + which
        with pytest.raises(ClusterPortError, match=str(port + which)):
            await make().run_as_master(port)
    if not which:
        assert "not a trio_cluster master" in str(caught.value)


async def test_a_master_needs_a_port_that_has_a_second_one_above_it() -> None:
    with pytest.raises(ClusterPortError, match="66000"):
        await make().run_as_master(65_000)


async def test_a_host_that_is_not_ours_is_a_port_error() -> None:
    server = ClusterServer(ClusterServerOptions(server=ServerOptions(host="192.0.2.1", port=0)))
    with pytest.raises(ClusterPortError, match=r"192\.0\.2\.1"):
        await server.run_as_standalone()


async def test_a_server_does_not_run_twice_at_a_time_but_again_and_again() -> None:
    server = make()
    server.register_chat("echo", echo)
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            with pytest.raises(RuntimeError, match="runs already"):
                await server.run_as_standalone()
            with pytest.raises(RuntimeError, match="runs already"):
                await server.run_as_master(0)
            with pytest.raises(RuntimeError, match="while the server runs"):
                server.options = ClusterServerOptions()
            assert await answer(server) == "a b "
            server.stop()


async def test_a_refused_worker_raises_at_once() -> None:
    master, worker = make(cluster_token="right"), make(cluster_token="wrong")
    async with trio.open_nursery() as nursery:
        await nursery.start(master.run_as_master)
        with pytest.raises(HandshakeRefused, match="token"), trio.fail_after(5):
            await worker.run_as_worker(HOST, master.internal_port or 0)
        assert not worker.is_running
        # The port of the API instead of the workers' port.
        with pytest.raises(HandshakeRefused, match="plus 1000"), trio.fail_after(5):
            await worker.run_as_worker(HOST, master.port or 0)
        assert await check_is_cluster_server(HOST, master.internal_port or 0)
        assert not await check_is_cluster_server(HOST, master.port or 0)
        nursery.cancel_scope.cancel()


# Stopping


async def test_cancelling_the_surrounding_scope_leaves_no_socket_behind() -> None:
    port = free_pair()
    for _ in range(3):
        master, worker = make(), make()
        worker.register_chat("echo", echo)
        async with trio.open_nursery() as nursery:
            await nursery.start(master.run_as_master, port)
            await nursery.start(worker.run_as_worker, HOST, port + 1000)
            assert await answer(master) == "a b "
            nursery.cancel_scope.cancel()
        for number in (port, port + 1000):
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((HOST, number))


async def test_a_stop_lets_running_requests_finish_and_refuses_new_ones() -> None:
    server = make()
    begun, go = trio.Event(), trio.Event()

    @server.chat("waits")
    async def waits(request: ChatRequest) -> AsyncIterator[str]:
        yield "first "
        begun.set()
        await go.wait()
        yield "last"

    results: list[httpx.Response] = []

    async def request(client: httpx.AsyncClient) -> None:
        results.append(await client.post("/v1/chat/completions", json=ask("waits", stream=True)))

    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone)
        async with (
            httpx.AsyncClient(base_url=str(server.url), verify=False) as client,
            trio.open_nursery() as asking,
        ):
            asking.start_soon(request, client)
            await begun.wait()
            server.stop()
            await wait_all_tasks_blocked()
            refused = await client.post("/v1/chat/completions", json=ask("waits"))
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert (await client.get("/health")).status_code == 503
            go.set()
    assert results[0].text.endswith("data: [DONE]\n\n")
    assert "last" in results[0].text


async def test_past_the_drain_timeout_what_is_left_is_cancelled_with_an_error_event() -> None:
    server = make(drain_timeout=0.2)
    stopped = trio.Event()

    @server.chat("waits")
    async def waits(request: ChatRequest) -> AsyncIterator[str]:
        try:
            yield "first "
            await trio.sleep_forever()
        finally:
            stopped.set()

    received = b""

    async def listen(client: httpx.AsyncClient) -> None:
        nonlocal received
        async with client.stream("POST", "/v1/chat/completions", json=ask("waits", stream=True)) as response:
            async for piece in response.aiter_raw():
                received += piece
                server.stop()

    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone)
        async with httpx.AsyncClient(base_url=str(server.url), verify=False) as client:
            await listen(client)
    assert stopped.is_set()
    assert b'"error"' in received
    assert b"[DONE]" not in received


async def test_a_worker_that_is_stopped_finishes_its_calls_and_leaves() -> None:
    master, worker = make(), make(worker_id="w1")
    begun, go = trio.Event(), trio.Event()

    @worker.chat("waits")
    async def waits(request: ChatRequest) -> str:
        begun.set()
        await go.wait()
        return "done"

    answers: list[str] = []

    async def request() -> None:
        answers.append(await answer(master, "waits"))

    async with trio.open_nursery() as nursery:
        await nursery.start(master.run_as_master)
        async with trio.open_nursery() as working:
            await working.start(worker.run_as_worker, HOST, master.internal_port)
            working.start_soon(request)
            await begun.wait()
            worker.stop()
            await wait_all_tasks_blocked()
            go.set()
        assert answers == ["done"]
        with trio.fail_after(5):
            while master.list_models():
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_a_worker_that_its_master_drains_stops_as_if_it_had_been_stopped_itself() -> None:
    master, worker = make(), make(worker_id="rack 1/w1")
    begun, go = trio.Event(), trio.Event()

    @worker.chat("waits")
    async def waits(request: ChatRequest) -> str:
        begun.set()
        await go.wait()
        return "done"

    answers: list[str] = []
    modes: list[ClusterMode] = []

    async def request() -> None:
        answers.append(await answer(master, "waits"))

    async def work(*, task_status: trio.TaskStatus[ClusterMode]) -> None:
        modes.append(await worker.run_as_worker(HOST, master.internal_port or 0, task_status=task_status))

    async with trio.open_nursery() as nursery:
        await nursery.start(master.run_as_master)
        async with trio.open_nursery() as working:
            await working.start(work)
            working.start_soon(request)
            await begun.wait()
            async with httpx.AsyncClient(base_url=str(master.url), verify=False) as client:
                accepted = await client.post("/cluster/workers/rack%201%2Fw1/drain")
                assert accepted.status_code == 202
                drained = accepted.json()
                assert (drained["id"], drained["draining"], drained["in_flight"]) == ("rack 1/w1", True, 1)
                (listed,) = (await client.get("/cluster/status")).json()["workers"]
                assert listed["instance"] == drained["instance"]
                refused = await client.post("/v1/chat/completions", json=ask("waits"))
                assert refused.status_code == 503
            go.set()
        assert answers == ["done"]
        assert modes == [ClusterMode.WORKER]
        with trio.fail_after(5):
            while master.list_models():
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_a_forwarded_call_is_listed_where_it_runs_and_cancelled_there() -> None:
    master, worker = make(), make(worker_id="w1", max_concurrency=1)
    stopped = trio.Event()

    @worker.chat("waits")
    async def waits(request: ChatRequest) -> AsyncIterator[str]:
        try:
            yield "first"
            await trio.sleep_forever()
        finally:
            stopped.set()

    worker.set_worker_listen_address(HOST, 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(master.run_as_master)
        await nursery.start(worker.run_as_worker, HOST, master.internal_port)

        async def request(request_id: str) -> None:
            async with httpx.AsyncClient(base_url=str(master.url), verify=False) as client:
                await client.post(
                    "/v1/chat/completions",
                    json=ask("waits"),
                    headers={"x-request-id": request_id, "x-request-timeout": "4"},
                )

        async def phases(server: ClusterServer) -> dict[str, tuple[str, str]]:
            async with httpx.AsyncClient(base_url=str(server.url), verify=False) as client:
                calls = (await client.get("/cluster/calls")).json()["calls"]
            return {call["request_id"]: (call["node"], call["phase"]) for call in calls}

        async with trio.open_nursery() as asking:
            for request_id in ("one", "two"):
                asking.start_soon(request, request_id)
            with trio.fail_after(5):
                while set((await phases(worker)).values()) != {("local", "streaming"), ("local", "queued")}:
                    pass
            # That one of them is queued, a master learns from a heartbeat.
            assert set((await phases(master)).values()) <= {
                ("w1", "streaming"),
                ("w1", "waiting"),
                ("w1", "queued"),
            }
            async with httpx.AsyncClient(base_url=str(master.url), verify=False) as client:
                for request_id in ("one", "two"):
                    await client.post(f"/cluster/calls/{request_id}/cancel")
        with trio.fail_after(5):
            await stopped.wait()
            while await phases(worker) or await phases(master):
                pass
        nursery.cancel_scope.cancel()


async def test_a_worker_that_never_found_its_master_can_be_stopped() -> None:
    worker = make()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run_as_worker, HOST, free_pair())
        await wait_all_tasks_blocked()
        worker.stop()


def test_stop_is_harmless_while_nothing_runs() -> None:
    make().stop()


# Configuration while it runs


async def test_a_key_that_is_set_is_required_at_once() -> None:
    server = make()
    server.register_chat("echo", echo)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone)
        assert await answer(server) == "a b "
        server.set_api_key("k1")
        async with httpx.AsyncClient(base_url=str(server.url), verify=False) as client:
            assert (await client.get("/v1/models")).status_code == 401
            key = {"Authorization": "Bearer k1"}
            assert (await client.get("/v1/models", headers=key)).status_code == 200
        nursery.cancel_scope.cancel()


async def test_more_concurrency_and_another_timeout_act_at_once() -> None:
    server = make(max_concurrency=1)

    @server.chat("silent")
    async def silent(request: ChatRequest) -> str:
        await trio.sleep_forever()
        return "x"

    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone)
        server.set_timeout(0.05)
        server.set_max_concurrency(7)
        async with httpx.AsyncClient(base_url=str(server.url), verify=False) as client:
            response = await client.post("/v1/chat/completions", json=ask("silent"))
            assert response.status_code == 504
            status = (await client.get("/cluster/status")).json()
            assert status["slots"]["capacity"] == 7
        nursery.cancel_scope.cancel()


async def test_a_worker_serves_its_own_api_on_its_listen_address() -> None:
    master, worker = make(), make()
    worker.register_chat("echo", echo)
    worker.set_worker_listen_address(HOST)
    async with trio.open_nursery() as nursery:
        await nursery.start(master.run_as_master)
        await nursery.start(worker.run_as_worker, HOST, master.internal_port)
        first = worker.url
        assert await answer(worker) == "a b "
        assert await answer(master) == "a b "
        worker.set_worker_listen_address(HOST, 0)
        with trio.fail_after(5):
            while worker.url in (None, first):
                await trio.lowlevel.checkpoint()
            assert await answer(worker) == "a b "
            worker.set_worker_listen_address(None)
            while worker.url is not None:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_a_listen_address_that_cannot_be_had_fails_at_once() -> None:
    worker = make()
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        sock.listen()
        worker.set_worker_listen_address(HOST, sock.getsockname()[1])
        with pytest.raises(ClusterPortError):
            await worker.run_as_worker(HOST, 1)


async def test_models_are_listed_with_what_is_known_of_them_local_and_far() -> None:
    master, worker = make(), make()
    options = ChatModelOptions(supports_vision=True, context_window=4096, extra_fields={"quality": "fine"})
    master.register_chat("near/with/slashes", echo, options)
    worker.register_chat("far/with/slashes", echo, options)
    async with trio.open_nursery() as nursery:
        await nursery.start(master.run_as_master)
        await nursery.start(worker.run_as_worker, HOST, master.internal_port)
        async with httpx.AsyncClient(base_url=str(master.url), verify=False) as client:
            entries = (await client.get("/v1/models")).json()["data"]
            assert [entry["id"] for entry in entries] == ["far/with/slashes", "near/with/slashes"]
            for entry in entries:
                assert entry["capabilities"] == {"vision": True}
                assert entry["context_window"] == 4096
                assert entry["quality"] == "fine"
                assert (await client.get(f"/models/{entry['id']}")).json() == entry
        nursery.cancel_scope.cancel()


def test_one_line_is_enough_to_run(capfd: pytest.CaptureFixture[str]) -> None:
    server = make()
    server.register_chat("echo", echo)

    async def stop_when_it_serves() -> None:
        while server.url is None:
            await trio.lowlevel.checkpoint()
        server.stop()

    async def main() -> ClusterMode:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_when_it_serves)
            return await server.run(0)
        raise AssertionError

    assert trio.run(main) is ClusterMode.MASTER
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        sock.listen()
        with pytest.raises(ClusterPortError):
            trio.run(server.run, sock.getsockname()[1])


@pytest.mark.parametrize("mode", ["run_as_master", "run_as_standalone"])
async def test_a_blocked_event_loop_is_logged_without_any_link(
    mode: str, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    server = ClusterServer()
    server.options.server.host = "127.0.0.1"
    server.options.heartbeat_interval = 0.1
    await nursery.start(getattr(server, mode), 0)

    def messages() -> list[str]:
        # The loop of a busy machine may also be late on its own.
        logged = [each.message for each in caplog.records if each.name == "trio_cluster.pulse"]
        own = [number for number, each in enumerate(logged) if "is blocked: test_server.py:" in each]
        return logged[own[0] :] if own else []

    until = time.monotonic() + 10
    while not messages() and time.monotonic() < until:
        time.sleep(0.1)  # noqa: ASYNC251  (what a beginner's handler does)
    with trio.move_on_after(10):
        while len(messages()) < 2:  # noqa: ASYNC110  (the log has no event)
            await trio.sleep(0.01)
    blocked, recovered, *_ = messages()
    assert re.search(r"the event loop is blocked: test_server\.py:\d+ in", blocked)
    assert recovered == "the event loop runs again"
