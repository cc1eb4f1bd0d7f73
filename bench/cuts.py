"""What it takes that links are cut and resumed: errors, memory, CPU time, and the time until a link goes on.

Master and worker are processes of the command line; ``cutter.py`` lies between them, and cuts.

- *Streams*: so many at once, over a link that is reset every two seconds for a minute, and then black-holed for ten:
  all that passes is swallowed, and the connection never passes anything again. The same streams run over a link that is
  left alone, in turn, each time with a new master and a new worker. Told are what clients have got that they should not
  have, whether each answer is the same, byte for byte (but for its id and its time), the peak of the resident memory,
  and the CPU time for a token during the minute.
- *Resumed*: the time from a cut until a token that was made after it has reached its client. A model makes one in every
  2 ms (10 ms with a delay). The streams tell it as well, when the machine is busy with them.

With ``--netns``, master and worker are in two network namespaces, with ``--delay`` milliseconds each way between them
(``tc netem``; or ``delay.py``, where the kernel has no netem). The cutter is on the worker's side, as a router at home.
Only *resumed* is measured then. For this one has to be root.

    python bench/cuts.py [--streams 500] [--seconds 60] [--hole 10] [--rounds 3] [--cuts 200] [--quick] [--save FILE]
    python bench/cuts.py --netns [--delay 50] [--cuts 100]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import trio
from running import (
    HOST,
    MB,
    Running,
    connect,
    cpu_seconds,
    group,
    memory,
    percentile,
    raise_descriptor_limit,
    receive_until,
    save,
    start,
    start_master,
    start_node,
    wait_for_model,
    weather,
)

#: Seconds between two resets.
RESET_INTERVAL = 2.0
#: Seconds between the tokens of a stream.
TOKEN_INTERVAL = 0.1
#: Seconds between the tokens of the stream by which the time is taken. With a delay there are fewer of them: what has
#: accumulated meanwhile would not fit into the first flight of a new TCP connection.
PROBE_INTERVAL, PROBE_INTERVAL_WITH_DELAY = 0.002, 0.01
#: Heartbeat intervals of silence after which a worker tries another connection, and one more.
SILENCE = 3.5
#: Seconds that it may take to open all streams. The first ones are not to end too early.
OPENING = 15.0
#: Seconds within which a link must have been resumed.
PATIENCE = 60.0
STAMP = re.compile(rb"token@(\d+)")
#: The addresses in the two namespaces: the master's and the worker's.
ADDRESSES = ("10.214.0.1", "10.214.0.2")


@attrs.frozen
class Cluster:
    """A master and a worker, with what is between them."""

    port: int
    master: int
    worker: int
    cutter: Running

    async def cut(self, what: str) -> int:
        """Cut the link, and return when, in nanoseconds."""
        await self.cutter.process.stdin.send_all(what.encode() + b"\n")  # type: ignore[union-attr]
        return int(await self.cutter.lines.receive())

    def end(self) -> None:
        """Kill both, since a master would wait for its last stream."""
        for pid in (self.worker, self.master):
            os.kill(pid, signal.SIGKILL)

    def spent(self) -> tuple[float, float]:
        """Return the CPU time of master and worker so far."""
        return cpu_seconds(self.master), cpu_seconds(self.worker)


async def start_cluster(nursery: trio.Nursery, flags: Sequence[str], other: str = "") -> Cluster:
    """Start one; the worker in another namespace, if there is a name of one."""
    within = ("ip", "netns", "exec", other) if other else ()
    master_flags = (*flags, "--host", "0.0.0.0") if other else flags
    port, master = await start_master(nursery, *master_flags)
    cutter = await start(nursery, "cutter.py", ADDRESSES[0] if other else HOST, port + 1000, within=within)
    worker = await start_node(
        nursery,
        "worker", HOST, str(port), "--internal-port", str(cutter.port), "--app", "counting:server", *flags,
        within=within,
    )  # fmt: skip
    await wait_for_model(port, "probe")
    # `ip netns exec` becomes the program that it runs.
    return Cluster(port, master.pid, worker.pid, cutter)


class Probe:
    """A client of the model ``probe``, which knows when each token was made, and when it came.

    Args:
        every: seconds between two tokens.
    """

    def __init__(self, every: float = PROBE_INTERVAL) -> None:
        self._question = {"role": "user", "content": str(every)}
        self._last_made = 0
        self._news = trio.lowlevel.ParkingLot()

    async def run(self, port: int, *, task_status: trio.TaskStatus[None]) -> None:
        """Read its stream."""
        body = json.dumps({"model": "probe", "stream": True, "messages": [self._question]})
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        async with await connect(port) as stream:
            await stream.send_all(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            await receive_until(stream, b"begun")
            task_status.started()
            while data := await stream.receive_some(65536):
                if b'"error"' in data:
                    raise SystemExit(f"the stream that is measured has failed: {data!r}")
                if stamps := STAMP.findall(data):
                    self._last_made = int(stamps[-1])
                    self._news.unpark_all()
        raise SystemExit("the stream that is measured has ended")

    async def resumed(self, cut: int) -> float:
        """Wait for a token that was made after a cut, and return how many seconds after the cut it has come."""
        with trio.fail_after(PATIENCE):
            while self._last_made < cut:
                await self._news.park()
        return (time.monotonic_ns() - cut) / 1e9


@attrs.frozen
class Run:
    """What one run of the streams has shown."""

    tokens: int
    cpu: tuple[float, float]
    """The CPU time of master and worker for a token, in seconds."""
    peaks: tuple[float, float]
    """The most memory that master and worker had, in bytes."""
    errors: Counter[str]
    wrong: int
    digests: list[str]
    resumed: list[float]
    hole: float
    """Seconds from the beginning of the black hole until a token came again."""


async def count_tokens(clients: Running) -> int:
    """Return how many tokens have come."""
    await clients.process.stdin.send_all(b"count\n")  # type: ignore[union-attr]
    line = await clients.lines.receive()
    if not line.startswith("tokens"):
        raise SystemExit(f"all streams have ended too early: {line[:200]}")
    return int(line.split()[1])


async def run_streams(arguments: Any, flags: Sequence[str], *, cuts: bool) -> Run:
    """Run the streams once, over a link that is cut or one that is left alone."""
    # After the hole, it takes a worker some heartbeats to know that nothing comes any more.
    rest = max(arguments.hole, SILENCE * arguments.heartbeat_interval) + OPENING
    count = round((arguments.seconds + rest) / TOKEN_INTERVAL)
    async with group() as nursery:
        cluster = await start_cluster(nursery, flags)
        probe = Probe()
        await nursery.start(probe.run, cluster.port)
        clients = await start(nursery, "checked.py", cluster.port, arguments.streams, count, TOKEN_INTERVAL)
        resumed: list[float] = []
        spent, tokens, begun = cluster.spent(), await count_tokens(clients), trio.current_time()
        for number in range(1, int(arguments.seconds / RESET_INTERVAL) + 1):
            if cuts:
                resumed.append(await probe.resumed(await cluster.cut("reset")))
            await trio.sleep_until(begun + number * RESET_INTERVAL)
        tokens = await count_tokens(clients) - tokens
        master, worker = (after - before for before, after in zip(spent, cluster.spent(), strict=True))
        hole = math.nan
        if cuts:
            hole = await probe.resumed(await cluster.cut(f"swallow {arguments.hole}"))
        report = json.loads(await clients.lines.receive())
        peaks = memory(cluster.master, "VmHWM"), memory(cluster.worker, "VmHWM")
        cluster.end()
        cpu = master / tokens, worker / tokens
        errors = Counter(report["errors"])
        return Run(tokens, cpu, peaks, errors, report["wrong"], report["digests"], resumed, hole)


async def run_resumed(cuts: int, flags: Sequence[str], other: str) -> list[float]:
    """Return the seconds until the link of a cluster that has nothing else to do was resumed, for each cut."""
    async with group() as nursery:
        cluster = await start_cluster(nursery, flags, other)
        probe = Probe(PROBE_INTERVAL_WITH_DELAY if other else PROBE_INTERVAL)
        await nursery.start(probe.run, cluster.port)
        times = []
        for _ in range(cuts):
            await trio.sleep(random.uniform(0.2, 0.4))
            times.append(await probe.resumed(await cluster.cut("reset")))
        cluster.end()
        return times


def told(times: Sequence[float]) -> str:
    """Say how long it took."""
    p50, p99 = (1000 * percentile(times, share) for share in (0.5, 0.99))
    return f"p50 {p50:.1f} ms  p99 {p99:.1f} ms  max {1000 * max(times):.1f} ms  n={len(times)}"


def report_streams(runs: dict[bool, list[Run]]) -> list[dict[str, Any]]:
    """Print what the runs have shown, and return rows of it."""
    errors = sum((run.errors for run in runs[True]), Counter[str]())
    wrong = sum(run.wrong for run in runs[True])
    reference = runs[False][0].digests
    same = all(run.digests == reference for each in runs.values() for run in each)
    answers = sum(len(run.digests) for run in runs[True])
    print(f"  client errors with cuts: {errors.total()} {dict(errors) or ''}")
    print(f"  whole answers with cuts: {answers}, of which {wrong} have a wrong text; "
          f"byte for byte as without: {'yes' if same else 'NO'}")  # fmt: skip
    if left := sum((run.errors for run in runs[False]), Counter[str]()):
        print(f"  client errors without cuts: {dict(left)}")
    rows = []
    for place, name in enumerate(("master", "worker")):
        cpu = {cuts: [1e6 * run.cpu[place] for run in each] for cuts, each in runs.items()}
        peak = {cuts: max(run.peaks[place] for run in each) / MB for cuts, each in runs.items()}
        medians = {cuts: statistics.median(each) for cuts, each in cpu.items()}
        print(
            f"  {name}: {medians[True]:.1f} us a token with cuts, {medians[False]:.1f} without "
            f"({medians[True] / medians[False]:.3f}x; rounds "
            f"{', '.join(f'{a / b:.3f}' for a, b in zip(cpu[True], cpu[False], strict=True))}); "
            f"peak {peak[True]:.0f} MB, {peak[False]:.0f} without"
        )
        for cuts in (False, True):
            rows.append({"node": name, "cuts": cuts, "us": medians[cuts], "MB": peak[cuts]})
    print(f"  resumed, with the streams: {told([each for run in runs[True] for each in run.resumed])}")
    print(f"  black-holed: tokens again after {max(run.hole for run in runs[True]):.1f} s")
    return [{**row, "errors": errors.total(), "wrong": wrong, "same": same} for row in rows]


async def measure(arguments: Any) -> None:
    """Measure and print."""
    flags = [f"--heartbeat-interval={arguments.heartbeat_interval}"]
    flags += [f"--worker-timeout={6 * arguments.heartbeat_interval}"]
    rows: list[dict[str, Any]] = []
    before = weather()
    if not arguments.other:
        runs: dict[bool, list[Run]] = {False: [], True: []}
        for _ in range(arguments.rounds):
            for cuts in (False, True):
                runs[cuts].append(await run_streams(arguments, flags, cuts=cuts))
        print(f"{arguments.streams} streams, reset every {RESET_INTERVAL:g} s for {arguments.seconds:g} s and "
              f"black-holed for {arguments.hole:g} s, {arguments.rounds} rounds ({before}):")  # fmt: skip
        rows += report_streams(runs)
    times = await run_resumed(arguments.cuts, flags, arguments.other)
    where = f"with {arguments.delay:g} ms each way" if arguments.other else "loopback"
    print(f"from a cut until it is resumed, {where} ({before}): {told(times)}", flush=True)
    rows.append(
        {"where": where, "p50": percentile(times, 0.5), "p99": percentile(times, 0.99), "n": len(times)}
    )
    save(arguments.save, "cuts", rows)


def ip(*words: str) -> None:
    """Run ``ip``."""
    subprocess.run(["ip", *words], check=True)


@contextmanager
def namespaces(delay: float) -> Iterator[tuple[str, str]]:
    """Give the names of two network namespaces that are joined, and of which nothing is left afterwards."""
    names = f"cuts-{os.getpid()}-m", f"cuts-{os.getpid()}-w"
    program: subprocess.Popen[bytes] | None = None
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            "cuts",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cuts",
            "netns",
            names[1],
        )
        words = f"qdisc add dev cuts root netem delay {delay}ms limit 100000".split()
        for name in names:
            if subprocess.run(["tc", "-n", name, *words], stderr=subprocess.DEVNULL).returncode:
                print("this kernel has no netem: packets are delayed by delay.py", flush=True)
                ip("-n", name, "link", "del", "cuts")
                command = [sys.executable, str(Path(__file__).with_name("delay.py")), *names, str(delay)]
                program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                assert program.stdout is not None
                program.stdout.readline()
                break
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/30", "dev", "cuts")
            ip("-n", name, "link", "set", "cuts", "up")
        yield names
    finally:
        if program is not None:
            program.kill()
            program.wait()
        for name in names:
            # A guardian may be there for a moment longer, and the namespace with it; not so the wire.
            subprocess.run(["ip", "-n", name, "link", "del", "cuts"], stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "del", name])


def main() -> None:
    """Read the arguments and measure."""
    parser: Any = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long the link is reset again and again"
    )
    parser.add_argument("--hole", type=float, default=10.0, help="how long it is black-holed then")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cuts", type=int, default=200, help="of a cluster that has nothing else to do")
    parser.add_argument("--heartbeat-interval", type=float, default=5.0, help="of both ends")
    parser.add_argument("--netns", action="store_true", help="with a delay, in network namespaces")
    parser.add_argument("--delay", type=float, default=50.0, help="milliseconds each way")
    parser.add_argument("--other", default="", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.seconds, arguments.hole, arguments.rounds = 20, 4.0, 1.0, 1
        arguments.cuts, arguments.heartbeat_interval = 5, 0.5
    if arguments.netns and not arguments.other:
        # So that nothing is left of the namespaces in that case, either.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
        with namespaces(arguments.delay) as (here, other):
            command = ["ip", "netns", "exec", here, sys.executable, *sys.argv, "--other", other]
            sys.exit(subprocess.run(command).returncode)
    raise_descriptor_limit()
    trio.run(measure, arguments)


if __name__ == "__main__":
    main()
