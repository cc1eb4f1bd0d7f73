"""How long it takes from a client's FIN until the handler on a worker is cancelled, with many live streams.

A master and a worker run as processes of their own. Clients hold streams open; then some of them close their
connection, one after the other, and the worker says when its handler was cancelled. Both ends read the same monotonic
clock, so this is Linux, on one machine.

    python bench/cancellation.py [--streams 256] [--cancels 200] [--interval 0.05]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import trio

HERE = Path(__file__).parent
BUCKETS_MS = (0.5, 1, 2, 5, 10, 20, 50, 100)


async def read_lines(stream: trio.abc.ReceiveStream, send: trio.MemorySendChannel[str]) -> None:
    """Give each line that the worker prints to ``send``."""
    buffer = b""
    async with send:
        async for data in stream:
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                await send.send(line.decode())


async def open_stream(port: int, number: int) -> trio.SocketStream:
    """Ask for a stream, and return the connection when its first token has come."""
    body = json.dumps(
        {"model": "bench", "stream": True, "messages": [{"role": "user", "content": str(number)}]}
    ).encode()
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    await stream.send_all(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    received = b""
    while b"begun" not in received:
        received += await stream.receive_some()
    return stream


async def swallow(stream: trio.SocketStream) -> None:
    """Read and forget, as a client that keeps up does."""
    try:
        async for _ in stream:
            pass
    except (trio.ClosedResourceError, trio.BrokenResourceError):
        pass


async def measure(streams: int, cancels: int, interval: float) -> list[float]:
    """Return the times in seconds."""
    environment = {**os.environ, "BENCH_INTERVAL": str(interval)}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, str(HERE / "worker.py")]
    times = []
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        )
        send, lines = trio.open_memory_channel[str](1000)
        nursery.start_soon(read_lines, process.stdout, send)
        port = int((await lines.receive()).split()[1])
        opened = [await open_stream(port, number) for number in range(streams)]
        for stream in opened:
            nursery.start_soon(swallow, stream)
        for number in range(cancels):
            stream = opened[number % streams]
            if number >= streams:
                stream = await open_stream(port, number)
            left = time.monotonic_ns()
            stream.socket.close()
            with trio.fail_after(10):
                while not (line := await lines.receive()).startswith("cancelled "):
                    pass
            times.append((int(line.split()[1]) - left) / 1e9)
        await process.stdin.aclose()
    return times


def report(times: list[float]) -> str:
    """Return the histogram and the percentiles as text."""
    times = sorted(times)

    def at(share: float) -> float:
        return 1000 * times[min(len(times) - 1, int(share * len(times)))]

    rows = [f"n={len(times)}  p50 {at(0.5):.2f} ms  p99 {at(0.99):.2f} ms  max {1000 * times[-1]:.2f} ms"]
    below = 0
    for bucket in BUCKETS_MS:
        count = sum(1 for each in times if 1000 * each <= bucket)
        rows.append(
            f"<= {bucket:>5} ms  {count - below:>5}  {'#' * round(60 * (count - below) / len(times))}"
        )
        below = count
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between a stream's tokens")
    arguments = parser.parse_args()
    times = trio.run(measure, arguments.streams, arguments.cancels, arguments.interval)
    print(f"from FIN to the handler's cancellation, {arguments.streams} live streams:")
    print(report(times))


if __name__ == "__main__":
    main()
