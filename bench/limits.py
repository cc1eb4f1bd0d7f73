"""What limits of keys cost: plain requests through a master with limits and without, all in one run.

The masters are up at the same time and get the same load in turn, in several rounds, of which the medians are told.
Redis is measured where ``redis-server`` or ``valkey-server`` is installed.

    python bench/limits.py [--rounds 5] [--seconds 4] [--quick] [--save FILE]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio
from running import (
    HOST,
    Running,
    ask_on_connections,
    cpu_seconds,
    drop,
    free_port,
    group,
    run,
    save,
    start,
    start_node,
    swallow,
    wait_for_model,
    weather,
)


async def start_redis(nursery: trio.Nursery, directory: Path) -> str | None:
    """Start a private server that keeps nothing, and return its URL; ``None`` if there is no such program."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        return None
    port = free_port()
    process = await run(
        nursery, [program, "--bind", HOST, "--port", str(port), "--dir", str(directory), "--save", ""]
    )
    nursery.start_soon(swallow, process.stdout)
    return f"redis://{HOST}:{port}/0"


async def start_limited(nursery: trio.Nursery, backend: int, where: str, state: Path) -> tuple[int, Running]:
    """Start a master with limits, and a worker that has its model from a backend.

    Args:
        nursery: ends them.
        backend: the port of the backend.
        where: the master keeps its limits: ``off``, ``memory``, or the URL of a Redis server.
        state: the folder of the master.

    Returns:
        The port of the master's API, and the master.
    """
    port = free_port()
    master = await start(nursery, "limited.py", port, where, state)
    nursery.start_soon(drop, master.lines)
    await start_node(nursery, "worker", HOST, str(port), "--serve", f"openai:http://{HOST}:{backend}/v1")
    await wait_for_model(port)
    return port, master


async def compare(arguments: Any) -> None:
    """Measure and print."""
    before = weather()
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(group())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        backend = await start(nursery, "backend.py")
        nursery.start_soon(drop, backend.lines)
        places = {"no limits": "off", "limits, in memory and on disk": "memory"}
        url = await start_redis(nursery, directory)
        if url is None:
            print("redis-server is not installed, and skipped")
        else:
            places["limits, in Redis"] = url
        systems: dict[str, tuple[int, int]] = {}
        for name, where in places.items():
            state = directory / f"state-{len(systems)}"
            port, master = await start_limited(nursery, backend.port, where, state)
            systems[name] = (port, master.pid)
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
        for number in range(arguments.rounds + 1):
            for name, (port, pid) in systems.items():
                cpu, began = cpu_seconds(pid), trio.current_time()
                done = await ask_on_connections(port, arguments.seconds)
                took = trio.current_time() - began
                if number:  # the first round warms up
                    figures[name].append((1e6 * (cpu_seconds(pid) - cpu) / done, done / took))
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in figures.items()
    }
    first = medians["no limits"]
    print(f"plain requests on 16 connections through a master, {arguments.rounds} rounds ({before}):")
    for name, (microseconds, rate) in medians.items():
        print(
            f"{name:32} {microseconds:6.0f} us of the master's CPU a request ({microseconds / first[0]:.2f}x), "
            f"{rate:6.0f} requests/s ({rate / first[1]:.2f}x)"
        )
    rows = [{"name": name, "us": each[0], "rate": each[1]} for name, each in medians.items()]
    save(arguments.save, "limits", rows)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 0.2
    trio.run(compare, arguments)


if __name__ == "__main__":
    main()
