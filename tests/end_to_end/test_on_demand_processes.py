"""Programs that a worker of the command line has started on demand end with it, whatever way it ends.

``ON_DEMAND_KILLS`` in the environment says how many workers are killed, at random moments of a start and of an answer;
by default a few.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from nodes import NOT_RESUMED, Node, Nodes
from served import until

pytestmark = pytest.mark.processes

PROGRAM = Path(__file__).parents[1] / "engines" / "tiny_server.py"
KILLS = int(os.environ.get("ON_DEMAND_KILLS", "3"))


def configure(directory: Path, *flags: str, **more: Any) -> Path:
    """Write the file of a worker that serves the program, and return it."""
    words = [sys.executable, "-I", "-S", str(PROGRAM), "{port}", f"mark={directory}", *flags]
    lines = ["[worker]", 'memory = "1GiB"', "[[serve]]", 'engine = "command"', f"command = {words!r}"]
    lines += ['models = ["tiny"]', 'memory = "10MiB"', "grace = 2"]
    lines += [f"{key} = {value!r}" for key, value in more.items()]
    path = directory / "worker.toml"
    path.write_text("\n".join(lines).replace("'", '"') + "\n")
    return path


def programs(directory: Path) -> set[int]:
    """Return the processes that run the program, be it that they are still shells that wait to execute it."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"mark={directory}".encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def children(log: Path) -> set[int]:
    """Return the other processes of the groups that run still."""
    lines = log.read_text().splitlines() if log.exists() else []
    pids = {int(line.split()[1]) for line in lines if line.startswith("child ")}
    return {pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists()}


async def start_worker(nodes: Nodes, master: Node, name: str, config: Path) -> Node:
    return await nodes.start(
        "worker",
        "127.0.0.1",
        master.port,
        "--name",
        name,
        "--config",
        str(config),
        variables={"TINY_LOG": str(nodes.directory / "log")},
    )


async def ask(master: Node, prompt: str, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}]} | fields
    async with httpx.AsyncClient(base_url=master.url, trust_env=False, verify=False, timeout=20) as client:
        return await client.post("/v1/chat/completions", json=body)


async def test_a_killed_worker_leaves_no_program_behind(nodes: Nodes) -> None:
    master = await nodes.master(*NOT_RESUMED)
    config = configure(nodes.directory, "child", "slow=0.05")
    log = nodes.directory / "log"
    seen = 0
    for number in range(KILLS):
        worker = await start_worker(nodes, master, f"w{number}", config)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask(master, "go on", stream=True))
            # From before the program is started to the middle of its answer.
            await trio.sleep(random.uniform(0, 0.4))
            seen += bool(programs(nodes.directory))
            worker.send(signal.SIGKILL)
            await until(lambda: not programs(nodes.directory) and not children(log), within=5)
        await worker.exit_code()
        # Nothing was started after that either: a shell that has not got its line ends.
        assert not programs(nodes.directory)
    print(f"{KILLS} workers killed, {seen} of them with a program")


async def test_a_worker_that_is_stopped_finishes_the_answer_and_stops_its_program(nodes: Nodes) -> None:
    master = await nodes.master()
    worker = await start_worker(nodes, master, "w", configure(nodes.directory, "child"))
    assert (await ask(master, "hi")).json()["said"] == "hi"
    log = nodes.directory / "log"
    assert programs(nodes.directory)
    assert children(log)
    await worker.log("tiny is ready")
    assert worker.logged("tiny: loading the model")
    worker.send(signal.SIGTERM)
    assert await worker.exit_code() == 0
    assert not programs(nodes.directory)
    await until(lambda: not children(log), within=5)


async def test_a_table_that_is_wrong_is_one_line_and_exit_code_2(nodes: Nodes) -> None:
    config = configure(nodes.directory, idle="soon")
    worker = await nodes.start("worker", "127.0.0.1", 1, "--config", str(config), ready=False)
    assert await worker.exit_code() == 2
    assert f"{config}: [[serve]] 1: idle: expected a number from 0" in worker.noise[0]
