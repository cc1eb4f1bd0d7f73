"""What a large cluster costs each of its parts, before one has it: up to 100 masters and 10 000 workers.

    python bench/paper_scale.py [--workers 100] [--shapes 1x1000,10x100,100x10] [--quick] [--save FILE]

Three things are measured, and one is computed from them:

- *Heartbeats* at a real master: its CPU with so many workers on real links that send heartbeats more often than they
  would, so that it has to do as much as with up to 10 000 workers. And what a worker's joining takes.
- *Messages*, counted in virtual time: clusters of masters and workers in one process, on a network in memory. Idle; and
  with busy workers, which also tell each master what the others do.
- *The database and Valkey*: statements, and calls of the script, of a real master that is idle, and for its requests.
  Valkey or Redis is asked where it is installed.

The last table multiplies: each worker has a link to each master, so a master pays for all workers, and a worker for all
masters.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy.event
import trio
import trio.testing
from limits import start_limited, start_redis
from running import (
    HOST,
    ask_on_connections,
    cpu_seconds,
    drop,
    free_port,
    group,
    memory,
    raise_descriptor_limit,
    save,
    start,
    start_master,
    table,
    weather,
)
from scale import MODELS, SHARE, numbers, start_workers

from trio_cluster import ChatRequest, ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.protocol import OtherMasters, session
from trio_cluster.testing import SimulatedCluster, open_cluster, worker

#: Seconds between two heartbeats: the default, and others that are as much work for a master as more workers are.
DEFAULT_INTERVAL = 5.0
INTERVALS = (5.0, 1.0, 0.25, 0.1)
#: Clusters of the last table: masters and workers.
PAPER = (
    (1, 10),
    (1, 200),
    (2, 200),
    (2, 1000),
    (4, 1000),
    (1, 10_000),
    (10, 1000),
    (100, 100),
    (100, 10_000),
)

Row = dict[str, float]

BEATS = {"heartbeats/s": "!.0f", "as workers": "!.0f", "% of a core": "!.1f", "us each": ".0f"}
MESSAGES = {
    "workers": "!.0f",
    "links": "!.0f",
    "a master receives/s": "!.1f",
    "of each link": ".3f",
    "us of CPU a second for each link": ".0f",
}
REPORTS = {"for each link/s": "!.2f", "bytes": "!.0f", "us to decode": ".1f", "a worker sends, KB/s": "!.1f"}
LARGE = {
    "workers": "!.0f",
    "heartbeats, % of a core": "!.1f",
    "reports, % of a core": "!.1f",
    "MB": "!.0f",
    "all workers join, s": "!.1f",
    "a worker's heartbeats, %": "!.2f",
    "its reports, KB/s": "!.1f",
    "idle: statements/s": "!.0f",
}


# --- Heartbeats and joining, at a real master ---------------------------------------------------------------------


async def measure_beats(workers: int, seconds: float) -> tuple[list[Row], Row]:
    """Return what heartbeats cost at several intervals, and what the joining of a worker costs."""
    rows: list[Row] = []
    joining: Row = {}
    for interval in INTERVALS:
        flags = ("--heartbeat-interval", str(interval), "--worker-timeout", "60")
        async with group() as nursery:
            port, master = await start_master(nursery, *flags)
            await trio.sleep(min(1.0, seconds))
            alone = await _share_of_a_core(master.pid, seconds)
            cpu, grown = cpu_seconds(master.pid), memory(master.pid)
            processes = await start_workers(
                nursery, port, workers, "--models", str(MODELS), "--heartbeat-interval", str(interval)
            )
            cpu, grown = cpu_seconds(master.pid) - cpu, memory(master.pid) - grown
            if not joining:
                joining = {"us": 1e6 * cpu / workers, "KB": grown / 1e3 / workers}
            await trio.sleep(min(2.0, seconds))
            theirs = cpu_seconds(*(each.pid for each in processes))
            share = await _share_of_a_core(master.pid, seconds) - alone
            theirs = (cpu_seconds(*(each.pid for each in processes)) - theirs) / seconds
        # Each end sends one; receiving one and sending one is what a master does for a worker in each interval.
        beats = workers / interval
        rows.append(
            {
                "interval": interval,
                "heartbeats/s": beats,
                "as workers": beats * DEFAULT_INTERVAL,
                "% of a core": 100 * share,
                "us each": 1e6 * share / beats,
                "worker's us": 1e6 * theirs / beats,
                # Many workers share a process, so that it is as if one had many masters.
                "of a process/s": min(SHARE, workers) / interval,
            }
        )
    return rows, joining


async def _share_of_a_core(pid: int, seconds: float) -> float:
    before, began = cpu_seconds(pid), time.monotonic()
    await trio.sleep(seconds)
    return (cpu_seconds(pid) - before) / (time.monotonic() - began)


# --- Messages, in virtual time ------------------------------------------------------------------------------------


class Counter:
    """Counts what sessions receive.

    Attributes:
        received: websocket messages.
        reports: those that report on other masters.
    """

    def __init__(self) -> None:
        self.received = 0
        self.reports: list[bytes] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count for the length of a block."""
        decode = session.decode

        def counted(data: bytes) -> list[Any]:
            messages: list[Any] = decode(data)
            self.received += 1
            if any(isinstance(message, OtherMasters) for message in messages):
                self.reports.append(data)
            return messages

        session.decode = counted
        try:
            yield
        finally:
            session.decode = decode


async def answer(request: ChatRequest) -> str:
    """Take half a second."""
    await trio.sleep(0.5)
    return "x"


def in_virtual_time(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function with a clock that jumps."""
    return trio.run(function, *args, clock=trio.testing.MockClock(autojump_threshold=0))


async def count_messages(masters: int, workers: int) -> Row:
    """Return the messages of an idle cluster, of which each worker has a link to each master."""
    async with open_cluster(seed=1) as cluster:
        await fill(cluster, masters, workers)
        counter, cpu = Counter(), time.process_time()
        with counter.counting():
            await trio.sleep(60.0)
        cpu = time.process_time() - cpu
    links = masters * workers
    # Both ends receive as many.
    received = counter.received / 2 / 60.0
    return {
        "masters": masters,
        "workers": workers,
        "links": links,
        "a master receives/s": received / masters,
        "of each link": received / links,
        "us of CPU a second for each link": 1e6 * cpu / 60.0 / links,
    }


async def count_reports(masters: int, seconds: float) -> Row:
    """Return what busy workers tell each of their masters about the others."""
    workers = 4
    async with open_cluster(seed=1) as cluster:
        await fill(cluster, masters, workers)
        counter = Counter()
        with counter.counting():
            await load(cluster, workers, seconds)
    rate = len(counter.reports) / seconds / masters / workers
    size = sum(map(len, counter.reports)) / len(counter.reports)
    sample = max(counter.reports, key=len)
    began = time.process_time()
    for _ in range(1000):
        session.decode(sample)
    return {
        "masters": masters,
        "for each link/s": rate,
        "bytes": size,
        "us to decode": 1e3 * (time.process_time() - began),
        "a worker sends, KB/s": masters * rate * size / 1e3,
    }


async def fill(cluster: SimulatedCluster, masters: int, workers: int) -> None:
    """Start masters and workers; each worker has a model of its own."""
    for number in range(1, masters):
        await cluster.start_master(name=f"master-{number}")
    servers = [worker(f"w{number}", max_concurrency=100) for number in range(workers)]
    for number, server in enumerate(servers):
        server.register_chat(f"m{number}", answer)
        await cluster.start_worker(server)
    await trio.sleep(10.0)
    for name in cluster.masters:
        status = await cluster.client(of=name).get("/cluster/status")
        assert len(status.json()["workers"]) == workers


async def load(cluster: SimulatedCluster, workers: int, seconds: float) -> None:
    """Have each worker asked ten times a second, by masters at random, so that its calls change all the time."""
    chance = random.Random(1)
    clients = [cluster.client(f"client-of-{name}", of=name) for name in cluster.masters]

    async def ask_one(number: int) -> None:
        async with trio.open_nursery() as calls:
            for _ in range(int(10 * seconds)):
                calls.start_soon(chance.choice(clients).chat, f"m{number}")
                await trio.sleep(0.2 * chance.random())

    async with trio.open_nursery() as nursery:
        for number in range(workers):
            nursery.start_soon(ask_one, number)


# --- The database and Valkey --------------------------------------------------------------------------------------


async def count_statements(seconds: float) -> Row:
    """Return how many statements a master sends to its database, while it is idle and for its requests."""
    counts = {"statements": 0, "transactions": 0}

    def executed(*_: Any) -> None:
        counts["statements"] += 1

    def committed(*_: Any) -> None:
        counts["transactions"] += 1

    engine = sqlalchemy.engine.Engine
    sqlalchemy.event.listen(engine, "before_cursor_execute", executed)
    sqlalchemy.event.listen(engine, "commit", committed)
    row: Row = {}
    with tempfile.TemporaryDirectory() as place:
        options = ClusterServerOptions(
            ServerOptions(host=HOST, port=(port := free_port())), database=f"sqlite:///{place}/accounts.db"
        )
        server = ClusterServer(options)
        server.register_chat("bench", lambda request: "x")
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run_as_master)
            await trio.sleep(1.0)
            counts.update(statements=0, transactions=0)
            await trio.sleep(seconds)
            row["idle: statements/s"] = counts["statements"] / seconds
            row["idle: transactions/s"] = counts["transactions"] / seconds
            counts.update(statements=0, transactions=0)
            row["requests/s"] = await ask_on_connections(port, seconds, 8) / seconds
            row["loaded: statements/s"] = counts["statements"] / seconds
            row["loaded: transactions/s"] = counts["transactions"] / seconds
            nursery.cancel_scope.cancel(reason="measured")
    sqlalchemy.event.remove(engine, "before_cursor_execute", executed)
    sqlalchemy.event.remove(engine, "commit", committed)
    return row


async def count_calls(seconds: float) -> Row | None:
    """Return how often a master calls Valkey's script; ``None`` if there is no such server here."""
    async with group() as nursery:
        with tempfile.TemporaryDirectory() as place:
            url = await start_redis(nursery, Path(place))
            if url is None:
                nursery.cancel_scope.cancel(reason="there is nothing to measure")
                return None
            backend = await start(nursery, "backend.py")
            nursery.start_soon(drop, backend.lines)
            port, _ = await start_limited(nursery, backend.port, url, Path(place) / "state")
            redis = int(url.rsplit(":", 1)[1].split("/")[0])
            before = await script_calls(redis)
            await trio.sleep(seconds)
            idle = await script_calls(redis)
            done = await ask_on_connections(port, seconds)
            loaded = await script_calls(redis)
            nursery.cancel_scope.cancel(reason="measured")
    return {
        "idle: calls/s": (idle[0] - before[0]) / seconds,
        "calls for each request": (loaded[0] - idle[0]) / max(1, done),
        "us of the server for each request": (loaded[1] - idle[1]) / max(1, done),
    }


async def script_calls(port: int) -> tuple[int, int]:
    """Return how often scripts were called in a Redis server, and how many microseconds they took."""
    async with await trio.open_tcp_stream(HOST, port) as stream:
        await stream.send_all(b"INFO commandstats\r\n")
        received = b""
        while not received.endswith(b"\r\n") or received.count(b"\r\n") < 2:
            received += await stream.receive_some()
    calls = took = 0
    for line in received.decode().splitlines():
        if line.startswith(("cmdstat_eval", "cmdstat_fcall")):
            fields = dict(each.split("=") for each in line.split(":")[1].split(","))
            calls, took = calls + int(fields["calls"]), took + int(fields["usec"])
    return calls, took


# --- The whole ----------------------------------------------------------------------------------------------------


def on_paper(beats: list[Row], joining: Row, reports: list[Row], statements: Row) -> list[Row]:
    """Return what clusters of several sizes cost."""
    rows = []
    for masters, workers in PAPER:
        rate = workers / DEFAULT_INTERVAL
        # The cost of one falls as there are more of them: that of the nearest rate that was measured.
        near = min(beats, key=lambda row: abs(row["heartbeats/s"] - rate))
        busiest = max(beats, key=lambda row: row["heartbeats/s"])
        alike = min(beats, key=lambda row: abs(row["of a process/s"] - masters / DEFAULT_INTERVAL))
        told = min(reports, key=lambda row: abs(row["masters"] - masters))
        # Half of what a heartbeat takes is to receive one, and a report takes longer to decode.
        report = busiest["us each"] / 2 + told["us to decode"]
        rows.append(
            {
                "masters": masters,
                "workers": workers,
                "heartbeats, % of a core": 1e-4 * near["us each"] * rate,
                "reports, % of a core": 1e-4 * report * told["for each link/s"] * workers
                if masters > 1
                else 0.0,
                "MB": 60 + joining["KB"] * workers / 1e3,
                "all workers join, s": 1e-6 * joining["us"] * workers,
                "a worker's heartbeats, %": 1e-4 * alike["worker's us"] * masters / DEFAULT_INTERVAL,
                "its reports, KB/s": told["a worker sends, KB/s"] * masters / told["masters"]
                if masters > 1
                else 0.0,
                "idle: statements/s": masters * statements["idle: statements/s"],
            }
        )
    return rows


def show(title: str, rows: list[Row] | Row) -> None:
    """Print figures that are no table."""
    for row in rows if isinstance(rows, list) else [rows]:
        print(f"{title}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


def measure(arguments: Any) -> None:
    """Measure and print."""
    logging.getLogger("trio_cluster").addHandler(logging.NullHandler())
    print(f"heartbeats of {arguments.workers} workers at one master ({weather()}):")
    beats, joining = trio.run(measure_beats, arguments.workers, arguments.seconds)
    print(table("interval", BEATS, beats), flush=True)
    show("a worker that joins, with 5 models", joining)
    print("\nidle clusters in virtual time; CPU is that of both ends:")
    messages: list[Row] = [in_virtual_time(count_messages, *shape) for shape in arguments.shapes]
    print(table("masters", MESSAGES, messages), flush=True)
    reports: list[Row] = [in_virtual_time(count_reports, each, 5.0) for each in arguments.masters]
    print("\nwhat a busy worker tells its masters about the others, in virtual time:")
    print(table("masters", REPORTS, reports), flush=True)
    print()
    statements = trio.run(count_statements, arguments.seconds)
    show("the database", statements)
    calls = trio.run(count_calls, arguments.seconds)
    if calls is None:
        print("redis-server is not installed, and skipped")
    else:
        show("Valkey", calls)
    large: list[Mapping[str, float]] = [*on_paper(beats, joining, reports, statements)]
    print("\non paper, for each master (heartbeats every 5 s; reports if all workers are busy):")
    print(table("masters", LARGE, large), flush=True)
    for name, rows in {
        "paper beats": beats,
        "paper joining": [joining],
        "paper messages": messages,
        "paper reports": reports,
        "paper statements": [statements],
        "paper calls": [calls] if calls is not None else [],
        "paper": large,
    }.items():
        save(arguments.save, name, rows)


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for each in text.split(","):
        masters, workers = each.split("x")
        shapes.append((int(masters), int(workers)))
    return shapes


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=100, help="on real links")
    parser.add_argument(
        "--shapes", type=_shapes, default=_shapes("1x100,1x1000,10x100,100x10"), help="MASTERSxWORKERS"
    )
    parser.add_argument(
        "--masters", type=numbers, default=[2, 10, 100], help="that a busy worker tells of others"
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    arguments = parser.parse_args()
    raise_descriptor_limit()
    if arguments.quick:
        arguments.workers, arguments.shapes = 3, [(1, 3), (2, 3)]
        arguments.seconds, arguments.masters = 0.5, [2, 3]
    measure(arguments)


if __name__ == "__main__":
    main()
