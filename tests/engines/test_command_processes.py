"""The engine ``command`` with real programs."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
from clusters import until

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.engines import _child_process, read_serve, serve_engine

pytestmark = pytest.mark.processes

PROGRAM = Path(__file__).with_name("tiny_server.py")


def table(log: Path, *flags: str, **more: Any) -> dict[str, Any]:
    """Return a ``[[serve]]`` of the program."""
    command = [sys.executable, "-I", "-S", str(PROGRAM), "{port}", *flags]
    return {
        "engine": "command",
        "command": command,
        "models": ["tiny"],
        "memory": "10MiB",
        "environment": [f"TINY_LOG={log}"],
    } | more


def lives(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@attrs.define
class Bench:
    """A node that serves the program."""

    log: Path
    server: ClusterServer
    client: httpx.AsyncClient

    def logged(self, word: str) -> list[int]:
        """Return the processes that have logged a word."""
        if not self.log.exists():
            return []
        lines = [line.rpartition(" ") for line in self.log.read_text().splitlines()]
        return [int(pid) for text, _, pid in lines if text == word]

    async def ask(self, prompt: str = "hi", model: str = "tiny") -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
        return await self.client.post("/v1/chat/completions", json=body)

    async def stream(self, prompt: str) -> list[str]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "stream": True}
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            return [line async for line in response.aiter_lines() if line]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@asynccontextmanager
async def serving(log: Path, *tables: dict[str, Any], memory: str = "100MiB") -> AsyncIterator[Bench]:
    options = ServerOptions(host="127.0.0.1", port=0)
    server = ClusterServer(ClusterServerOptions(server=options, memory=memory))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone)
        for number, each in enumerate(tables or (table(log),)):
            await nursery.start(serve_engine, read_serve(each, f"serve {number}"), server)
        assert server.url is not None
        async with httpx.AsyncClient(
            base_url=server.url, trust_env=False, verify=False, timeout=20
        ) as client:
            yield Bench(log, server, client)
        nursery.cancel_scope.cancel()


async def test_many_requests_start_it_once_and_are_all_answered(log: Path) -> None:
    async with serving(log) as bench, trio.open_nursery() as nursery:
        answers: list[Any] = []

        async def request() -> None:
            answers.append((await bench.ask()).json()["said"])

        assert bench.logged("start") == []
        for _ in range(5):
            nursery.start_soon(request)
        await until(lambda: len(answers) == 5, 10)
        assert answers == ["hi"] * 5
        assert (await bench.stream("hi"))[-1] == "data: [DONE]"
        (pid,) = bench.logged("start")
        assert lives(pid)
    assert not lives(pid)


async def test_a_program_that_ends_at_its_start_is_a_503_with_its_last_lines(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "trio_cluster"):
        async with serving(log, table(log, "fail=no such file: a.gguf")) as bench:
            response = await bench.ask()
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (503, "model_start_failed")
            assert error["message"] == (
                "tiny could not be started: it has ended with code 3: loading the model | no such file: a.gguf"
            )
            assert int(response.headers["retry-after"]) >= 1
            assert len(bench.logged("start")) == 1
    assert "tiny: no such file: a.gguf" in caplog.messages


async def test_a_program_that_cannot_be_executed_is_a_503(log: Path, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o755)
    async with serving(log, table(log) | {"command": [str(program), "{port}"]}) as bench:
        response = await bench.ask()
        assert response.json()["error"]["code"] == "model_start_failed"
        assert "code 126" in response.text


async def test_a_program_that_does_not_get_ready_is_ended(log: Path) -> None:
    async with serving(log, table(log, "never", start_timeout=0.5)) as bench:
        response = await bench.ask()
        assert "it was not ready within 0.5 s: loading the model" in response.json()["error"]["message"]
        (pid,) = bench.logged("start")
        assert not lives(pid)


async def test_a_start_that_no_client_waits_for_is_given_up(log: Path) -> None:
    async with serving(log, table(log, "never")) as bench:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bench.ask)
                await until(lambda: bool(bench.logged("start")))
                scope.cancel()
        (pid,) = bench.logged("start")
        await until(lambda: not lives(pid))


async def test_a_program_that_dies_in_a_stream_breaks_that_and_is_started_again(log: Path) -> None:
    async with serving(log) as bench:
        await bench.ask()
        *_, last = await bench.stream("die")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_lost"
        response = await bench.ask()
        assert response.status_code == 200
        first, second = bench.logged("start")
        assert first != second
        # It has answered, so the next death is its first failure. That counts when the request is over.
        resident = bench.server.on_demand.by_model["tiny"].resident
        await until(lambda: not resident.answering and not resident.failures)
        os.kill(second, signal.SIGKILL)
        await until(lambda: bench.server.on_demand.states()["tiny"].state == "cold")
        assert "SIGKILL" in resident.why
        assert (await bench.ask()).status_code == 200


async def test_a_program_that_ignores_sigterm_is_killed_with_its_group(log: Path) -> None:
    async with serving(log, table(log, "deaf", "child", grace=0.2)) as bench:
        await bench.ask()
        (pid,), (child,) = bench.logged("start"), bench.logged("child")
        assert lives(child)
    assert not lives(pid)
    assert not lives(child)


async def test_an_idle_program_is_stopped_and_a_busy_one_is_not(log: Path) -> None:
    async with serving(log, table(log, idle=0.2)) as bench:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.stream, "go on")
            await until(lambda: bool(bench.logged("ask tiny")))
            (pid,) = bench.logged("start")
            await trio.sleep(0.5)
            assert lives(pid)
            nursery.cancel_scope.cancel()
        await until(lambda: not lives(pid))
        # The server has seen that its client left, long before it was stopped.
        assert bench.logged("left") == [pid]


async def test_two_that_do_not_fit_take_turns(log: Path) -> None:
    one = table(log, models=["one"], memory="60MiB")
    two = table(log, models=["two"], memory="60MiB")
    async with serving(log, one, two) as bench:
        for model in ("one", "two", "one"):
            assert (await bench.ask(model=model)).json()["model"] == model
            states = bench.server.on_demand.states()
            assert {name for name, state in states.items() if state.state == "ready"} == {model}
        assert len(set(bench.logged("start"))) == 3


async def test_a_program_of_unknown_size_is_measured(log: Path) -> None:
    one = table(log)
    del one["memory"]
    async with serving(log, one) as bench:
        await bench.ask()
        resident = bench.server.on_demand.by_model["tiny"].resident
        await until(lambda: resident.learned is not None)
        assert (1 << 20) < resident.reserved < (60 << 20)


async def test_a_loaded_program_is_unloaded(log: Path) -> None:
    async with serving(log) as bench:
        tenancy = bench.server.on_demand.by_model["tiny"]
        await bench.server.on_demand.load(tenancy)
        (pid,) = bench.logged("start")
        assert lives(pid)
        await bench.server.on_demand.unload(tenancy)
        assert not lives(pid)


async def test_the_program_gets_its_environment_and_no_keys_of_this_node(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_CLUSTER_API_KEY", "secret")
    seen = tmp_path / "seen"
    command = ["/bin/sh", "-c", f"env > {seen}; exit 1; {{port}}"]
    async with serving(log, table(log) | {"command": command}) as bench:
        await bench.ask()
    assert f"TINY_LOG={log}" in seen.read_text()
    assert "secret" not in seen.read_text()


async def test_much_output_is_throttled_and_cleaned(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); done; "
    script += r'printf "\033[31mred\033[0m\r50%%\r"; exit 1; {port}'
    with caplog.at_level(logging.INFO, "trio_cluster.engines.command"):
        async with serving(log, table(log) | {"command": ["/bin/sh", "-c", script]}) as bench:
            message = (await bench.ask()).json()["error"]["message"]
    assert message.endswith("line 298 | line 299 | red | 50%")
    assert 50 <= len([each for each in caplog.messages if each.startswith("tiny: line")]) < 150


async def test_a_program_has_its_guardian_until_it_has_ended_if_its_start_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may take all of its grace to end, and its node may be killed meanwhile."""
    events = []

    class Recorded:
        async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                events.append("the guardian ends")

        def end_with_us(self, group: int, seconds: float) -> None:
            events.append("guarded")

        def forget(self, group: int) -> None:
            assert not lives(group)
            events.append("forgotten")

    monkeypatch.setattr(_child_process, "GroupGuardian", Recorded)
    with trio.CancelScope() as scope:
        async with _child_process.open_child(
            ["/bin/sleep", "60"], "m", environment={}, grace=10, logger=logging.getLogger("m")
        ):
            scope.cancel()
            await trio.sleep_forever()
    assert events == ["guarded", "forgotten", "the guardian ends"]
