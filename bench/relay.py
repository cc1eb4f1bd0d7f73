"""What a request and a token cost in the middle: this project beside the bare stack, a pipe, and what is installed.

All systems are up at the same time and get the same load in turn, in several rounds, of which the medians are told; an
idle one costs nothing. CPU is that of the system's own processes (user and system), without the worker or the backend
behind it: a busy machine blurs it less than it blurs rates. Every figure has its ratio to the pipe's in the same run,
which does nothing but take bytes from one socket and put them into another.

- *request*: plain requests on 16 connections that stay open;
- *open*: a connection, a request on it, and the first token of its stream;
- *token*: one more of a stream, when so many are open; each gets 50, 20 or 10 tokens in a second;
- *+ms*: the time to the first token on an idle system, less what the backend takes when it is asked directly;
- *MB*: resident memory with the most streams.

    python bench/relay.py [--streams 64,256,1000] [--rounds 3] [--seconds 4] [--quick] [--save FILE]
    python bench/relay.py --tls ...
    python bench/relay.py --watched ...

With ``--tls``, it is this project and nginx, each with and without TLS; the ratio is to the same without TLS. A master
with TLS has it on both ports, so that a token is decrypted and encrypted again.

With ``--watched``, it is this project while its page is open, beside the same while it is not: a client reads
``/cluster/events``, as the page does. Both are measured on the same streams, in turn.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import attrs
import trio
from peers import NGINX_PLAIN, NGINX_WITH_TLS, PEERS, installed, try_to_run
from running import (
    TLS_PORTS,
    connect,
    cost_of_requests,
    cpu_seconds,
    crowd,
    drop,
    first_token,
    free_port,
    group,
    interval,
    memory,
    raise_descriptor_limit,
    save,
    start,
    start_master,
    start_node,
    wait_for_model,
    weather,
)

PIPE = "a pipe on trio"
DIRECT = "the backend itself"


@attrs.define
class System:
    """Something that is measured."""

    name: str
    port: int
    pids: Callable[[], list[int]]
    figures: dict[str, list[float]] = attrs.field(factory=dict)

    def note(self, name: str, value: float) -> None:
        """Take down a figure of one round."""
        self.figures.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """Return the figure of all rounds."""
        values = self.figures.get(name)
        return statistics.median(values) if values else math.nan


async def start_systems(nursery: trio.Nursery, stack: AsyncExitStack) -> list[System]:
    """Start all that there is."""
    backend = await start(nursery, "backend.py")
    nursery.start_soon(drop, backend.lines)
    systems = []

    def add(name: str, port: int, *pids: int) -> None:
        systems.append(System(name, port, lambda: list(pids)))

    port, master = await start_master(nursery)
    worker = await start(nursery, "worker.py", port)
    nursery.start_soon(drop, worker.lines)
    add("trio_cluster: master, a handler on a worker", port, master.pid)
    port, master = await start_master(nursery)
    serve = f"openai:http://127.0.0.1:{backend.port}/v1"
    await start_node(nursery, "worker", "127.0.0.1", str(port), "--serve", serve)
    await wait_for_model(port)
    add("trio_cluster: master, the backend behind a worker", port, master.pid)
    floor = await start(nursery, "floor.py", free_port())
    add("hypercorn, bare ASGI, its own model", floor.port, floor.pid)
    pipe = await start(nursery, "pipe.py", backend.port)
    add(PIPE, pipe.port, pipe.pid)
    for peer in PEERS:
        if not installed(peer):
            print(f"{peer.name} is not installed, and skipped")
        elif (found := await try_to_run(peer, backend.port, stack)) is None:
            print(f"{peer.name} does not come up, and is skipped")
        else:
            systems.append(System(peer.name, *found))
    add(DIRECT, backend.port, backend.pid)
    return systems


async def start_with_and_without_tls(nursery: trio.Nursery, stack: AsyncExitStack) -> list[System]:
    """Start what is compared with and without TLS; the one without comes first."""
    backend = await start(nursery, "backend.py")
    nursery.start_soon(drop, backend.lines)
    state = stack.enter_context(tempfile.TemporaryDirectory())
    systems = []
    for tls in (False, True):
        flags = ("--tls", "auto", "--state-dir", state, "--allow-anonymous-workers") if tls else ()
        port, master = await start_master(nursery, *flags)
        if tls:
            TLS_PORTS.add(port)
        worker = await start(nursery, "worker.py", port, *(("--tls", f"{state}/ca.pem") if tls else ()))
        nursery.start_soon(drop, worker.lines)
        name = "trio_cluster: master, a handler on a worker" + ", TLS" * tls
        systems.append(System(name, port, lambda pid=master.pid: [pid]))  # type: ignore[misc]
    for peer in (NGINX_PLAIN, NGINX_WITH_TLS):
        if not installed(peer):
            print("nginx is not installed, and skipped")
            break
        certificate = f"{state}/server.pem" if peer is NGINX_WITH_TLS else ""
        found = await try_to_run(peer, backend.port, stack, certificate)
        if found is None:
            print(f"{peer.name} does not come up, and is skipped")
        else:
            systems.append(System(peer.name, *found))
    return systems


def report_tls(systems: list[System], counts: list[int]) -> str:
    """Return a line for each figure of each pair."""
    lines = []
    for plain, tls in zip(systems[::2], systems[1::2], strict=True):
        for name in ("request", f"open {counts[-1]}", *(f"token {count}" for count in counts)):
            before, after = plain.median(name), tls.median(name)
            lines.append(
                f"{plain.name:45} {name:12} {before:8.1f} us, with TLS {after:8.1f} us ({after / before:.2f}x)"
            )
    return "\n".join(lines)


async def measure(system: System, counts: Iterable[int], seconds: float) -> None:
    """Give one system the whole load once."""
    pids = system.pids()
    system.note("request", 1e6 * await cost_of_requests(system.port, seconds, pids))
    for _ in range(10):
        system.note("first", 1e3 * await first_token(system.port))
    for count in counts:
        opening = cpu_seconds(*pids)
        async with crowd(system.port, count, 3600.0) as idle:
            system.note(f"open {count}", 1e6 * (cpu_seconds(*pids) - opening) / count)
            system.note(f"memory {count}", sum(memory(pid) for pid in pids) / 1e6)
        async with crowd(system.port, count, interval(count)) as busy:
            if idle.failed or busy.failed:
                print(f"{system.name}: {idle.failed + busy.failed} of {count} streams did not begin")
            await trio.sleep(min(1.0, seconds))
            cost, rate = await busy.cost(seconds, *pids)
            system.note(f"token {count}", 1e6 * cost)
            system.note(f"rate {count}", rate)


async def measure_watched(system: System, counts: Iterable[int], seconds: float) -> None:
    """Measure what a token costs while the page is open, and while it is not."""
    pids = system.pids()
    for count in counts:
        async with crowd(system.port, count, interval(count)) as busy:
            if busy.failed:
                print(f"{busy.failed} of {count} streams did not begin")
            before, _ = await busy.cost(seconds, *pids)
            for _ in range(3):
                async with events(system.port) as received:
                    # The first event, of everything, comes once.
                    await trio.sleep(min(1.0, seconds))
                    received[0] = 0
                    watched, rate = await busy.cost(seconds, *pids)
                after, _ = await busy.cost(seconds, *pids)
                # What else the machine does changes slowly, so neighbours are compared.
                system.note(f"token {count}", 5e5 * (before + after))
                system.note(f"watched {count}", 1e6 * watched)
                system.note(f"ratio {count}", 2 * watched / (before + after))
                system.note(f"events {count}", received[0] / seconds)
                system.note(f"rate {count}", rate)
                before = after


def report_watched(system: System, counts: list[int]) -> str:
    """Return a line for each number of streams."""
    lines = []
    for count in counts:
        before, after = system.median(f"token {count}"), system.median(f"watched {count}")
        lines.append(
            f"{count} streams: {before:.1f} us/token, while the page is open {after:.1f} us/token "
            f"({system.median(f'ratio {count}'):.3f}x); {system.median(f'events {count}') / 1e6:.2f} MB/s of events"
        )
    return "\n".join(lines)


@asynccontextmanager
async def events(port: int) -> AsyncIterator[list[int]]:
    """Read the events of a master during the block; yields the number of bytes that have come."""
    received = [0]

    async def read(stream: trio.abc.ReceiveStream) -> None:
        async for data in stream:
            received[0] += len(data)

    async with await connect(port) as stream, trio.open_nursery() as nursery:
        await stream.send_all(b"GET /cluster/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        nursery.start_soon(read, stream)
        yield received
        nursery.cancel_scope.cancel()


def report(systems: list[System], counts: list[int]) -> str:
    """Return the table."""
    (pipe,) = [system for system in systems if system.name == PIPE]
    (direct,) = [system for system in systems if system.name == DIRECT]
    most = counts[-1]
    columns = {"request": "us/request", f"open {most}": "us/open"}
    columns |= {f"token {count}": f"us/token, {count}" for count in counts}
    lines = [["", *columns.values(), "first token +ms", "MB"]]
    for system in systems:
        cells = []
        for name in columns:
            value = system.median(name)
            cells.append(f"{value:.0f} ({value / pipe.median(name):.2f}x)" if value >= 100 else
                         f"{value:.1f} ({value / pipe.median(name):.2f}x)")  # fmt: skip
        added = system.median("first") - direct.median("first")
        megabytes = system.median(f"memory {most}")
        ratio = megabytes / pipe.median(f"memory {most}")
        lines.append([system.name, *cells, f"{added:+.2f}", f"{megabytes:.0f} ({ratio:.2f}x)"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


async def compare(arguments: Any) -> None:
    """Measure and print."""
    before = weather()
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(group())
        if arguments.watched:
            port, master = await start_master(nursery)
            worker = await start(nursery, "worker.py", port)
            nursery.start_soon(drop, worker.lines)
            systems = [System("trio_cluster: master, a handler on a worker", port, lambda: [master.pid])]
        elif arguments.tls:
            systems = await start_with_and_without_tls(nursery, stack)
        else:
            systems = await start_systems(nursery, stack)
        for system in systems:
            await cost_of_requests(system.port, 0.3, system.pids())
        for _ in range(arguments.rounds):
            for system in systems:
                measuring = measure_watched if arguments.watched else measure
                await measuring(system, arguments.streams, arguments.seconds)
        if arguments.watched:
            print(f"CPU of the master, {arguments.rounds} rounds ({before}):")
            print(report_watched(systems[0], arguments.streams), flush=True)
            return
        if arguments.tls:
            print(f"CPU in the middle, {arguments.rounds} rounds ({before}):")
            print(report_tls(systems, arguments.streams), flush=True)
            return
        print(f"CPU in the middle, {arguments.rounds} rounds ({before}); in brackets the ratio to the pipe:")
        print(report(systems, arguments.streams), flush=True)
    save(
        arguments.save,
        "relay",
        [{"name": each.name} | {name: each.median(name) for name in each.figures} for each in systems],
    )


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--streams", type=lambda text: [int(each) for each in text.split(",")], default=[64, 256, 1000]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--tls", action="store_true", help="what TLS costs, here and in nginx")
    parser.add_argument("--watched", action="store_true", help="what it costs that the page is open")
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.rounds, arguments.seconds = [10, 20], 1, 0.2
    raise_descriptor_limit()
    trio.run(compare, arguments)


if __name__ == "__main__":
    main()
