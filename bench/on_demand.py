"""Simulate a day of a home machine whose models run on demand: starts, stops and the wait of requests, in virtual time.

    python bench/on_demand.py [--seeds 1,2,3] [--quick] [--save FILE]

The machine has 24 GiB for five models, which need 20, 14, 8, 6 and 2 GiB. A start takes two seconds and one more for
each GiB, a stop takes one second, and a model is stopped after ten minutes without a request. Over the day:

- Two coding agents work from nine to twelve and from one to half past five, one with the model of 20 GiB, the other
  with that of 14 GiB, which do not fit together. Each works in bursts: some requests, one after the other, with the
  time of a tool between them, and a pause of some minutes after the burst. Some bursts begin with a search, which needs
  embeddings.
- People chat from seven to eleven in the evening, and now and then during the day. Some of them show pictures.
- At three in the night a job embeds documents, four at a time.

What is asked for is drawn before the run, so that each policy gets the same requests, with the same durations and
pauses. A client waits for its answer before it goes on: a request that waits delays those of the same client. A model
answers any number of requests at once, and its speed does not depend on them.

The policies:

- ``schedule``: the real one, ``trio_cluster.on_demand``, on a clock that jumps.
- ``first come``: requests are taken in the order in which they come. If the model of the first one is not loaded, and
  does not fit, the models that were used least recently are stopped when their requests are done; the requests behind
  wait until the start of that model has begun. There is no minimum stay.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Final, Literal, Protocol

import attrs
import trio
import trio.testing
from running import save

from trio_cluster.errors import Overloaded
from trio_cluster.on_demand.residents import OnDemand, Run

GIB: Final = 1024**3
BUDGET: Final = 24
#: The models, and the GiB that each of them needs.
SIZES: Final = {"coder-large": 20, "coder": 14, "chat": 8, "vision": 6, "embedder": 2}
#: Seconds without a request after which a model is stopped.
IDLE: Final = 600.0
STOP: Final = 1.0
HOUR: Final = 3600.0


def start_seconds(model: str) -> float:
    """How long the start of a model takes."""
    return 2.0 + SIZES[model]


# The traffic


@attrs.frozen
class Task:
    """A request: the pause of its client before it, the model, and how long the answer takes."""

    pause: float
    model: str
    seconds: float


@attrs.frozen
class Client:
    """Requests that follow each other, from a time of the day on."""

    begins: float
    tasks: Sequence[Task]


def agent(draw: random.Random, model: str, begins: float, ends: float) -> Client:
    """One coding agent, for as many bursts as there is time for without any wait."""
    tasks: list[Task] = []
    time, pause = begins, draw.uniform(0, 300)
    while time < ends:
        burst = [Task(pause, "embedder", 0.2)] if draw.random() < 0.3 else []
        for _ in range(draw.randint(4, 20)):
            between = pause if not burst else draw.uniform(0.5, 6)
            burst.append(Task(between, model, min(90.0, 2 + draw.expovariate(1 / 10))))
        tasks += burst
        time += sum(task.pause + task.seconds for task in burst)
        pause = draw.uniform(60, 600)
    return Client(begins, tasks)


def chat(draw: random.Random, begins: float) -> Client:
    """A conversation of a person who reads and writes between the answers."""
    pictures = draw.random() < 0.25
    tasks = []
    for turn in range(draw.randint(2, 10)):
        model = "vision" if pictures and draw.random() < 0.4 else "chat"
        tasks.append(Task(draw.uniform(15, 120) if turn else 0.0, model, draw.uniform(3, 25)))
    return Client(begins, tasks)


def day(seed: int, *, hours: float = 24.0) -> list[Client]:
    """The clients of a day, or of its first hours."""
    draw = random.Random(seed)
    clients = [
        agent(draw, model, begins, ends)
        for begins, ends in ((9 * HOUR, 12 * HOUR), (13 * HOUR, 17.5 * HOUR))
        for model in ("coder-large", "coder")
    ]
    clients += [chat(draw, draw.uniform(8 * HOUR, 18 * HOUR)) for _ in range(8)]
    clients += [chat(draw, draw.uniform(19 * HOUR, 23 * HOUR)) for _ in range(30)]
    clients += [
        Client(3 * HOUR, [Task(0.0, "embedder", draw.uniform(0.5, 3)) for _ in range(250)]) for _ in range(4)
    ]
    return [client for client in clients if client.begins < hours * HOUR]


# What is measured


@attrs.define
class Figures:
    """What one model, or all of them together, did in a day; times in seconds."""

    starts: int = 0
    stops: int = 0
    starting: float = 0.0
    refused: int = 0
    waits: list[float] = attrs.field(factory=list)

    def row(self) -> dict[str, float]:
        """The columns of a table."""
        waits = sorted(self.waits)
        p50, p90, p99 = (waits[int(len(waits) * share)] if waits else 0.0 for share in (0.5, 0.9, 0.99))
        return {
            "requests": len(waits) + self.refused,
            "starts": self.starts,
            "stops": self.stops,
            "starting s": round(self.starting),
            "wait p50 s": round(p50, 1),
            "wait p90 s": round(p90, 1),
            "wait p99 s": round(p99, 1),
            "wait max s": round(waits[-1] if waits else 0.0, 1),
            "all waits s": round(sum(waits)),
            "refused": self.refused,
        }


class Machine:
    """Starts and stops models, which takes time; and keeps the figures."""

    def __init__(self) -> None:
        self.figures = {model: Figures() for model in SIZES}
        self._used = 0

    @asynccontextmanager
    async def runs(self, model: str) -> AsyncGenerator[None]:
        """One run of a model, from its start to its stop."""
        figures = self.figures[model]
        self._used += SIZES[model]
        assert self._used <= BUDGET
        figures.starts += 1
        figures.starting += start_seconds(model)
        await trio.sleep(start_seconds(model))
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(STOP)
            figures.stops += 1
            self._used -= SIZES[model]

    def total(self) -> Figures:
        every = self.figures.values()
        return Figures(
            sum(each.starts for each in every),
            sum(each.stops for each in every),
            sum(each.starting for each in every),
            sum(each.refused for each in every),
            [wait for each in every for wait in each.waits],
        )


# The policies


class Policy(Protocol):
    """Decides when models are started and stopped."""

    def use(self, model: str) -> AbstractAsyncContextManager[None]:
        """Wait until a request may use a model; leaving the context is the end of its answer."""


class Scheduled:
    """The real schedule, and the real code that runs what it decides."""

    def __init__(self, machine: Machine, nursery: trio.Nursery) -> None:
        self._on_demand = OnDemand(BUDGET * GIB)

        def open_(model: str, run: Run) -> AbstractAsyncContextManager[None]:
            return machine.runs(model)

        for model, size in SIZES.items():
            tenancy = self._on_demand.add(model, [model], partial(open_, model), memory=size * GIB, idle=IDLE)
            nursery.start_soon(self._on_demand.run, tenancy)

    @asynccontextmanager
    async def use(self, model: str) -> AsyncGenerator[None]:
        use = self._on_demand.ask(self._on_demand.by_model[model])
        try:
            await use.wait()
            yield
        finally:
            use.leave(completed=True)


@attrs.define(eq=False)
class Loaded:
    """A model under first come, first served."""

    name: str
    state: Literal["cold", "starting", "ready", "stopping"] = "cold"
    answering: int = 0
    used_at: float = 0.0
    stop: trio.Event = attrs.field(factory=trio.Event)


class FirstCome:
    """First come, first served. See the top of this program."""

    def __init__(self, machine: Machine, nursery: trio.Nursery) -> None:
        self._machine = machine
        self._nursery = nursery
        self._models = {model: Loaded(model) for model in SIZES}
        # Fair: those that wait for it get it in the order in which they came.
        self._first = trio.Lock()
        self._changed = trio.lowlevel.ParkingLot()

    @asynccontextmanager
    async def use(self, model: str) -> AsyncGenerator[None]:
        loaded = self._models[model]
        async with self._first:
            await self._place(loaded)
            loaded.answering += 1
        while loaded.state == "starting":
            await self._changed.park()
        try:
            yield
        finally:
            loaded.answering -= 1
            loaded.used_at = trio.current_time()
            self._changed.unpark_all()
            self._nursery.start_soon(self._stop_idle, loaded, loaded.used_at)

    async def _place(self, wanted: Loaded) -> None:
        """Have a model loaded, or at least its start begun."""
        while wanted.state == "stopping":
            await self._changed.park()
        if wanted.state != "cold":
            return
        while True:
            running = [each for each in self._models.values() if each.state != "cold"]
            if sum(SIZES[each.name] for each in running) + SIZES[wanted.name] <= BUDGET:
                break
            victim = min(running, key=lambda each: (each.answering > 0, each.used_at))
            if victim.answering or any(each.state == "stopping" for each in running):
                await self._changed.park()
            else:
                self._stop(victim)
        wanted.state, wanted.stop = "starting", trio.Event()
        self._nursery.start_soon(self._run, wanted)

    def _stop(self, loaded: Loaded) -> None:
        loaded.state = "stopping"
        loaded.stop.set()

    async def _run(self, loaded: Loaded) -> None:
        async with self._machine.runs(loaded.name):
            loaded.state = "ready"
            self._changed.unpark_all()
            await loaded.stop.wait()
        loaded.state = "cold"
        self._changed.unpark_all()

    async def _stop_idle(self, loaded: Loaded, used_at: float) -> None:
        await trio.sleep(IDLE)
        if loaded.state == "ready" and not loaded.answering and loaded.used_at == used_at:
            self._stop(loaded)


POLICIES: Final[dict[str, Callable[[Machine, trio.Nursery], Policy]]] = {
    "schedule": Scheduled,
    "first come": FirstCome,
}


async def live(machine: Machine, policy_name: str, clients: Sequence[Client]) -> None:
    """Let the clients of a day ask a machine, until all have their answers."""

    async def ask(policy: Policy, client: Client) -> None:
        await trio.sleep_until(began + client.begins)
        for task in client.tasks:
            await trio.sleep(task.pause)
            figures, asked = machine.figures[task.model], trio.current_time()
            try:
                async with policy.use(task.model):
                    figures.waits.append(trio.current_time() - asked)
                    await trio.sleep(task.seconds)
            except Overloaded:
                figures.refused += 1

    began = trio.current_time()
    async with trio.open_nursery() as background:
        policy = POLICIES[policy_name](machine, background)
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(ask, policy, client)
        # What still runs is stopped because it is idle.
        await trio.sleep(IDLE + 10)
        background.cancel_scope.cancel()


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    columns = list(next(iter(rows.values())))
    print(f"| {title} | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{value:,}'.replace(',', ' ') for value in row.values())} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="1,2,3", help="each is another day")
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    parser.add_argument("--save", help="a JSON file for the figures")
    options = parser.parse_args()
    seeds, hours = options.seeds.split(","), 24.0
    if options.quick:
        seeds, hours = seeds[:1], 10.0
    sums: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        for policy in POLICIES:
            machine = Machine()
            clock = trio.testing.MockClock(autojump_threshold=0)
            trio.run(live, machine, policy, day(int(seed), hours=hours), clock=clock)
            total = machine.total().row()
            print_table(
                f"seed {seed}, {policy}",
                {model: figures.row() for model, figures in machine.figures.items()} | {"all": total},
            )
            sums[f"seed {seed}, {policy}"] = total
    print_table("all models together", sums)
    save(options.save, "on_demand", [{"run": name, **row} for name, row in sums.items()])


if __name__ == "__main__":
    main()
