"""How fast the death of a process is noticed that leaves a reset behind: ``kill -9`` under load, with unread bytes.

Both ways, and each with links that can be resumed (``resume_window`` of 15 s) and without (0):

- A *worker* is killed under its master's eyes. Told are the time until its streams have their error event, and until
  requests that it has not answered are answered by another replica.
- A *master* is killed under its worker's eyes. Told is the time until the handlers of its streams are cancelled.

The process is stopped for a moment before it is killed, so that there is always something that it has not read. All
processes read the same monotonic clock, so this is Linux, on one machine.

    python bench/killed.py [--kills 200] [--streams 8] [--quick] [--save FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from typing import Any

import trio
from running import (
    HOST,
    Running,
    connect,
    free_port,
    group,
    open_stream,
    percentile,
    read_answer,
    receive_until,
    save,
    start,
    wait_for_model,
    wait_for_port,
    weather,
)

#: Seconds that a process is stopped before it is killed.
STOPPED = 0.05
#: Seconds within which everything has to be over.
PATIENCE = 40.0


class Forks:
    """Processes that are forks of one.

    Args:
        program: ``forks.py``.
    """

    def __init__(self, program: Running) -> None:
        self._program = program
        self.cancelled: list[int] = []

    async def start(self, *words: object) -> int:
        """Start one, and return its number."""
        await self._program.process.stdin.send_all(" ".join(map(str, words)).encode() + b"\n")  # type: ignore[union-attr]
        return int(await self.told("pid"))

    async def told(self, word: str) -> str:
        """Return what is told with a word; what is told with others meanwhile is forgotten, but cancellations."""
        with trio.fail_after(PATIENCE):
            while True:
                first, _, rest = (await self._program.lines.receive()).partition(" ")
                if first == "cancelled":
                    self.cancelled.append(int(rest))
                if first == word:
                    return rest


async def open_streams(port: int, count: int) -> list[Any]:
    """Open streams, all at once."""
    opened: list[Any] = []

    async def one(number: int) -> None:
        opened.append(await open_stream(port, number))

    async with trio.open_nursery() as opening:
        for number in range(count):
            opening.start_soon(one, number)
    return opened


async def ask_shared(port: int, began: list[float], times: list[float]) -> None:
    """Ask a model that both workers have, and note how long after the kill it has answered."""
    message = {"role": "user", "content": "x" * 20_000}
    body = json.dumps({"model": "shared", "messages": [message]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    async with await connect(port) as stream:
        await stream.send_all(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await read_answer(stream)
    times.append(time.monotonic() - began[0])


async def kill_workers(forks: Forks, window: float, kills: int, streams: int) -> dict[str, list[float]]:
    """Kill a worker again and again."""
    port = free_port()
    failed: list[float] = []
    retried: list[float] = []
    master = await forks.start("master", port, window)
    await wait_for_port(port + 1000)
    other = await forks.start("worker", port, window, "shared,elsewhere", 1)
    await forks.told("ready")

    async def wait_for_error(stream: Any, began: list[float]) -> None:
        await receive_until(stream, b"worker_lost")
        failed.append(time.monotonic() - began[0])
        await trio.aclose_forcefully(stream)

    for _ in range(kills):
        victim = await forks.start("worker", port, window, "bench,shared", 1000)
        await forks.told("ready")
        # Its guardian takes a moment to start.
        await trio.sleep(0.5)
        opened = await open_streams(port, streams)
        began: list[float] = [0.0]
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                os.kill(victim, signal.SIGSTOP)
                # More than the other worker has slots, so that some are for the one that is killed.
                for _ in range(4):
                    nursery.start_soon(ask_shared, port, began, retried)
                for stream in opened:
                    nursery.start_soon(wait_for_error, stream, began)
                await trio.sleep(STOPPED)
                began[0] = time.monotonic()
                os.kill(victim, signal.SIGKILL)
    for pid in (master, other):
        os.kill(pid, signal.SIGKILL)
    # Those that the other worker took at once were answered before the kill.
    return {"error event": failed, "retried": [each for each in retried if 0 < each < PATIENCE]}


async def kill_masters(forks: Forks, window: float, kills: int, streams: int) -> dict[str, list[float]]:
    """Kill a master again and again."""
    port = free_port()
    times: list[float] = []
    worker = 0
    for _ in range(kills):
        master = await forks.start("master", port, window)
        await wait_for_port(port + 1000)
        if not worker:
            worker = await forks.start("worker", port, window, "bench", 1000)
        await wait_for_model(port)
        opened = await open_streams(port, streams)
        forks.cancelled.clear()
        os.kill(master, signal.SIGSTOP)
        await trio.sleep(STOPPED)
        began = time.monotonic_ns()
        os.kill(master, signal.SIGKILL)
        while len(forks.cancelled) < streams:
            await forks.told("cancelled")
        times += [(each - began) / 1e9 for each in forks.cancelled]
        for stream in opened:
            await trio.aclose_forcefully(stream)
    os.kill(worker, signal.SIGKILL)
    return {"handlers cancelled": times}


async def measure(kills: int, streams: int) -> list[dict[str, Any]]:
    """Return a row for each of the four, and print it."""
    rows = []
    for what, kill in (("worker", kill_workers), ("master", kill_masters)):
        for window in (0.0, 15.0):
            async with group() as nursery:
                forks = Forks(await start(nursery, "forks.py"))
                for name, times in (await kill(forks, window, kills, streams)).items():
                    p50, p99 = (1000 * percentile(times, share) for share in (0.5, 0.99))
                    row = {"killed": what, "resume_window": window, "until": name, "p50": p50, "p99": p99}
                    rows.append({**row, "max": 1000 * max(times), "n": len(times)})
                    print(
                        f"{what} killed {kills} times, resume_window {window:g}: until {name}: "
                        f"p50 {p50:.1f} ms  p99 {p99:.1f} ms  max {1000 * max(times):.1f} ms  n={len(times)}",
                        flush=True,
                    )
    return rows


def main() -> None:
    """Measure and print."""
    parser: Any = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills = 3
    print(f"kill -9 with unread bytes, {arguments.streams} streams, {HOST} ({weather()}):", flush=True)
    save(arguments.save, "killed", trio.run(measure, arguments.kills, arguments.streams))


if __name__ == "__main__":
    main()
