"""A server in a thread, inside a program that does not run on trio."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio
from thread_shortage import no_threads

from trio_cluster import (
    ClusterError,
    ClusterMode,
    ClusterPortError,
    ClusterServer,
    ServerThread,
    from_asyncio,
    serve_in_thread,
)

PATIENCE = 20


async def echo(request: Any) -> AsyncIterator[str]:
    yield request.last_text


def a_server(**handlers: Any) -> ClusterServer:
    server = ClusterServer()
    server.options.server.host = "127.0.0.1"
    for name, handler in ({"echo": echo} | handlers).items():
        server.register_chat(name, handler)
    return server


def ask(thread: ServerThread, model: str = "echo") -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}]}).encode()
    request = urllib.request.Request(
        f"{thread.url}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=PATIENCE) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"trio_cluster server", "trio_cluster asyncio"}


def test_a_program_without_a_loop_serves() -> None:
    server = a_server()
    with serve_in_thread(server, port=0) as thread:
        assert thread.is_running
        assert (thread.mode, server.is_running) == (ClusterMode.MASTER, True)
        assert thread.url == f"http://127.0.0.1:{thread.port}"
        assert ask(thread) == "hello"
    assert not thread.is_running
    assert (thread.mode, thread.url, thread.port) == (None, None, None)
    thread.stop()
    thread.cancel()
    with serve_in_thread(server, server.run_as_standalone, 0) as thread:
        assert thread.mode is ClusterMode.STANDALONE
        assert ask(thread) == "hello"


def test_a_worker_serves_in_a_thread_beside_its_master() -> None:
    master, back = a_server(), a_server(far=echo)
    back.unregister_model("echo")
    with (
        serve_in_thread(master, port=0) as front,
        serve_in_thread(back, back.run_as_worker, "127.0.0.1", master.internal_port) as thread,
    ):
        assert thread.mode is ClusterMode.WORKER
        assert ask(front, "far") == "hello"


def test_an_asyncio_program_serves_and_its_loop_goes_on() -> None:
    async def program() -> str:
        thread = await asyncio.to_thread(serve_in_thread, a_server(), port=0)
        try:
            return await asyncio.to_thread(ask, thread)
        finally:
            await asyncio.to_thread(thread.stop)

    assert asyncio.run(program()) == "hello"


def test_handlers_of_asyncio_run_on_a_loop_of_their_own_there() -> None:
    loops: list[object] = []

    async def handler(request: Any) -> str:
        loops.append(asyncio.get_running_loop())
        return "asyncio"

    async def program() -> None:
        loops.append(asyncio.get_running_loop())
        thread = await asyncio.to_thread(serve_in_thread, a_server(m=from_asyncio(handler)), port=0)
        assert await asyncio.to_thread(ask, thread, "m") == "asyncio"
        await asyncio.to_thread(thread.stop)

    asyncio.run(program())
    assert len({id(loop) for loop in loops}) == 2


def test_what_keeps_a_server_from_starting_is_raised_as_it_is() -> None:
    server = a_server()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterPortError, match=str(port)):
            serve_in_thread(server, server.run_as_standalone, port)
    with pytest.raises(TypeError):
        serve_in_thread(server, colour="blue")


def test_without_a_thread_it_does_not_start() -> None:
    server = a_server()
    with no_threads(), pytest.raises(ClusterError, match="can start no more threads"):
        serve_in_thread(server, port=0)


def test_what_ends_a_server_later_is_logged_and_raised_where_it_is_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fails = trio.Event()

    async def run(*, task_status: Any) -> ClusterMode:
        task_status.started(ClusterMode.MASTER)
        await fails.wait()
        raise OSError("the network is gone")

    thread = serve_in_thread(a_server(), run)
    thread.run_sync(fails.set)
    for _ in range(2):
        with pytest.raises(OSError, match="the network is gone"):
            thread.wait(PATIENCE)
    assert not thread.is_running
    assert "the server has failed in its thread" in caplog.text
    with pytest.raises(RuntimeError, match="the server has ended"):
        thread.run_sync(int)
    with pytest.raises(ValueError, match="of the block"), thread:
        raise ValueError("of the block")
    with pytest.raises(OSError, match="the network is gone"):
        thread.stop()


def test_a_running_server_is_changed_in_its_thread() -> None:
    server = a_server()
    with serve_in_thread(server, port=0) as thread:
        thread.run_sync(server.register_chat, "late", echo)
        assert ask(thread, "late") == "hello"
        with pytest.raises(ValueError, match="late"):
            thread.run_sync(server.register_chat, "late", echo)


def test_stopping_lets_requests_finish_and_a_timeout_is_said() -> None:
    began, may_end = threading.Event(), trio.Event()

    async def slow(request: Any) -> str:
        began.set()
        await may_end.wait()
        return "finished"

    answers: list[str] = []
    thread = serve_in_thread(a_server(slow=slow), port=0)
    client = threading.Thread(target=lambda: answers.append(ask(thread, "slow")))
    client.start()
    assert began.wait(PATIENCE)
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.01 s"):
        thread.stop(0.01)
    thread.run_sync(may_end.set)
    thread.stop()
    client.join()
    assert answers == ["finished"]


def test_cancelling_ends_its_work_at_once() -> None:
    began, log = threading.Event(), []

    async def endless(request: Any) -> str:
        began.set()
        try:
            await trio.sleep_forever()
        finally:
            log.append("cleaned up")
        return ""

    def ask_in_vain() -> None:
        with pytest.raises(OSError):  # noqa: PT011
            ask(thread, "endless")

    thread = serve_in_thread(a_server(endless=endless), port=0)
    client = threading.Thread(target=ask_in_vain)
    client.start()
    assert began.wait(PATIENCE)
    thread.cancel()
    thread.wait(PATIENCE)
    client.join()
    assert log == ["cleaned up"]


def test_the_server_s_own_thread_does_not_wait_for_itself() -> None:
    server = a_server()
    with serve_in_thread(server, port=0) as thread:
        for method in (thread.wait, thread.stop, lambda: thread.run_sync(int)):
            with pytest.raises(RuntimeError):
                thread.run_sync(method)
        # A stop was requested all the same.
        thread.wait(PATIENCE)


@pytest.mark.processes
def test_a_program_that_ends_without_stopping_the_server_cancels_its_work() -> None:
    program = """
import threading
import trio
from trio_cluster import ClusterServer, serve_in_thread
import urllib.request, json

began = threading.Event()
server = ClusterServer()
server.options.server.host = "127.0.0.1"

@server.chat("m")
async def m(request):
    began.set()
    try:
        await trio.sleep_forever()
    finally:
        print("cleaned up", flush=True)
    yield ""

thread = serve_in_thread(server, server.run_as_standalone, 0)
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
ask = urllib.request.Request(thread.url + "/v1/chat/completions", body, {"Content-Type": "application/json"})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
def client():
    try:
        opener.open(ask)
    except OSError:
        pass
threading.Thread(target=client, daemon=True).start()
began.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (0, "cleaned up\n"), done.stderr
