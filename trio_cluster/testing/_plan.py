"""The plan of a schedule: every decision in it, drawn from one seed before anything happens.

Nothing is drawn while the schedule runs, so what is done does not depend on how the cluster takes it, and a plan can be
read, printed and compared. What can only be known later, for instance which connections there are to be cut, is drawn
as a number that then picks one.
"""

from __future__ import annotations

import random
from typing import Any, Final, Literal

import attrs

from ..core.model import Kind
from ._scripts import Failure, Script

__all__ = ["Errand", "Fault", "FaultKind", "Model", "Plan", "draw_plan"]

#: What can be done to a cluster.
FaultKind = Literal[
    "worker killed",
    "worker frozen",
    "worker stopped",
    "worker drained",
    "worker cut off",
    "link cut",
    "link reset",
    "link delayed",
    "link silent",
    "master killed",
    "master stopped",
    "master frozen",
    "client cut off",
    "connection cut",
    "connection reset",
    "connection delayed",
    "model taken back",
    "slots changed",
    "call cancelled",
    "call pursued",
]

# How often each of them happens, compared to the others.
_WEIGHTS: Final[dict[FaultKind, int]] = {
    "worker killed": 8,
    "worker frozen": 8,
    "worker stopped": 6,
    "worker drained": 4,
    "worker cut off": 6,
    "link cut": 6,
    "link reset": 6,
    "link delayed": 5,
    "link silent": 6,
    "master killed": 2,
    "master stopped": 2,
    "master frozen": 2,
    "client cut off": 4,
    "connection cut": 4,
    "connection reset": 4,
    "connection delayed": 4,
    "model taken back": 5,
    "slots changed": 6,
    "call cancelled": 5,
    "call pursued": 8,
}

_FAILURES: Final[list[Failure | None]] = [*[None] * 14, "told", "untold"]

# Bytes of files that do not come whole before their request is passed on: half of the large one is too much for that.
_UPLOADS: Final = [1_200_000, 2_600_000]

# Characters of filling that the inputs of some kinds have room for.
_ROOM: Final[dict[Kind, int]] = {"tts": 1_000, "image_generation": 30_000}

#: What a client does besides waiting for its answer.
Manner = Literal["stays", "leaves", "resets", "aborts upload", "reads slowly"]


@attrs.frozen
class Model:
    """A model of the cluster, and who serves it."""

    name: str
    kind: Kind
    hosts: tuple[str, ...]
    yields: bool
    """The handler is an async generator; otherwise it pushes."""


@attrs.frozen
class Errand:
    """A request, and how its client behaves.

    Attributes:
        at: when it begins.
        model: whom it is for.
        script: what the model is to do.
        stream: whether a stream is asked for.
        route: of two routes to a chat model.
        budget: what the client says in ``x-request-timeout``.
        listens: what the client says in ``x-stainless-read-timeout``.
        manner: how the client behaves.
        patience: after how long it leaves, or how long it rests after each of its first reads.
    """

    at: float
    model: str
    script: Script
    stream: bool = True
    route: str = "chat"
    budget: float | None = None
    listens: float | None = None
    manner: Manner = "stays"
    patience: float = 0.0

    @property
    def number(self) -> int:
        """The number of the request."""
        return self.script.number

    @property
    def host(self) -> str:
        """The machine of its client; each has one of its own."""
        return f"client-{self.number}"


@attrs.frozen
class Fault:
    """Something that is done to the cluster.

    Attributes:
        at: when.
        lasts: for how long, if it is not over at once.
        kind: what.
        target: the name of a worker, ``master``, or empty where ``pick`` picks.
        pick: picks one of those that there are.
        amount: how much, where that means something: seconds of delay, a number of slots.
    """

    at: float
    lasts: float
    kind: FaultKind
    target: str
    pick: int
    amount: float


@attrs.frozen
class Plan:
    """A schedule that has not begun.

    Attributes:
        seed: what it was drawn from.
        seconds: for how long requests and faults begin.
        latency: of the network.
        short_way: whether tokens are written to their client where they come in.
        options: of all nodes.
        slots: of each node.
        models: who serves what.
        errands, faults: in the order of time.
    """

    seed: int
    seconds: float
    latency: float
    short_way: bool
    options: dict[str, Any]
    slots: dict[str, int]
    models: tuple[Model, ...]
    errands: tuple[Errand, ...]
    faults: tuple[Fault, ...]

    @property
    def workers(self) -> list[str]:
        """The names of the workers."""
        return [name for name in self.slots if name != "master"]

    @property
    def longest_delay(self) -> float:
        """How long the network may take for anything, if it delivers it at all."""
        return max([self.latency, *(fault.amount for fault in self.faults if "delayed" in fault.kind)])


def draw_plan(seed: int, *, seconds: float, requests: int, faults: int) -> Plan:
    """Draw a plan.

    Args:
        seed: the same one gives the same plan.
        seconds: for how long requests and faults begin.
        requests: how many requests there are.
        faults: how many faults there are at most; a third of the schedules have few.
    """
    rng = random.Random(seed)
    workers = [f"w{number}" for number in range(1, rng.randint(2, 4) + 1)]
    latency = rng.choice([0.0, 0.001, 0.02, 0.02])
    slots = {name: rng.randint(1, 4) for name in [*workers, "master"]}
    heartbeat = rng.choice([0.5, 1.0, 2.0])
    options = {
        "heartbeat_interval": heartbeat,
        "worker_timeout": heartbeat * rng.choice([3.0, 4.0, 6.0]),
        "default_timeout": rng.choice([3.0, 6.0, 12.0]),
        "queue_timeout": rng.choice([0.0, 1.0, 4.0, 4.0]),
        "drain_timeout": rng.choice([1.0, 4.0, 8.0]),
        "on_conflict": "replicate",
        # Not drawn, and neither is the short way: a dozen schedules in a row have every way that a token can go.
        "batch_wait": 0.0 if seed % 4 == 0 else 0.001,
    }
    models = _draw_models(rng, workers)
    drawn = sorted((_draw_errand(rng, number, seconds, models, options) for number in range(1, requests + 1)),
                   key=lambda errand: errand.at)  # fmt: skip
    count = rng.randint(0, 3) if rng.random() < 0.2 else rng.randint(faults // 2, faults)
    # Some troubles come one by one and some all at once, and those are different troubles.
    storm = rng.uniform(1, 4) if rng.random() < 0.3 else seconds
    begins = rng.uniform(0, seconds - storm)
    drawn_faults = [_draw_fault(rng, begins, storm, workers, options) for _ in range(count)]
    drawn = [_draw_upload(rng, errand) for errand in drawn]
    return Plan(
        seed=seed,
        seconds=seconds,
        latency=latency,
        short_way=seed % 3 != 0,
        options=options,
        slots=slots,
        models=models,
        errands=tuple(drawn),
        faults=tuple(sorted(drawn_faults, key=lambda fault: fault.at)),
    )


def _draw_models(rng: random.Random, workers: list[str]) -> tuple[Model, ...]:
    """One model on every worker, one on some, one of each kind somewhere, and one on each node alone."""
    some = tuple(rng.sample(workers, 2))
    shared = [
        Model("everywhere", "chat", tuple(workers), rng.random() < 0.5),
        Model("twice", "chat", some, rng.random() < 0.5),
        Model("speech", "tts", (rng.choice(workers),), rng.random() < 0.5),
        Model("hearing", "asr", (rng.choice(workers),), rng.random() < 0.5),
        Model("vectors", "embedding", tuple(rng.sample(workers, 2)), rng.random() < 0.5),
        Model("pictures", "image_generation", (rng.choice(workers),), rng.random() < 0.5),
    ]
    alone = [Model(f"only-{name}", "chat", (name,), rng.random() < 0.5) for name in [*workers, "master"]]
    return (*shared, *alone)


def _draw_errand(
    rng: random.Random, number: int, seconds: float, models: tuple[Model, ...], options: dict[str, Any]
) -> Errand:
    model = rng.choice([*models[:2], *models])
    script = _draw_script(rng, number, model.kind, options)
    manner: Manner = rng.choices(
        ("stays", "leaves", "resets", "aborts upload", "reads slowly"), (60, 18, 8, 4, 10)
    )[0]
    patience = {"leaves": rng.choice([0.0, 0.01, rng.uniform(0, 2 + script.duration)]),
                "resets": rng.uniform(0, 2 + script.duration),
                "aborts upload": rng.uniform(0, 1),
                "reads slowly": rng.choice([0.1, 0.5, 2.0])}.get(manner, 0.0)  # fmt: skip
    return Errand(
        at=round(rng.uniform(0, seconds), 3),
        model=model.name,
        script=script,
        stream=model.kind in ("chat", "asr") and rng.random() < 0.65,
        route=rng.choice(["chat", "chat", "completions"]),
        budget=round(0.2 + script.duration * rng.uniform(0.4, 1.6), 2) if rng.random() < 0.25 else None,
        listens=rng.choice([2.0, 5.0]) if rng.random() < 0.1 else None,
        manner=manner,
        patience=round(patience, 3),
    )


def _draw_script(rng: random.Random, number: int, kind: Kind, options: dict[str, Any]) -> Script:
    single = kind in ("embedding", "image_generation")
    # Sizes on both sides of everything that is counted on the way: pieces, windows, buffers.
    large = not single and rng.random() < 0.12
    pieces = 1 if single else rng.choice([1, 2, 5, 10]) if large else rng.randint(1, 20)
    size = rng.choice([20_000, 65_536, 70_000, 150_000]) if large else rng.choice([0, 0, 0, 40, 900])
    fails: Failure | None = rng.choice(_FAILURES)
    timeout = options["default_timeout"]
    stalls = rng.random() < 0.08
    filling = rng.choice([0, 0, 0, 0, 0, 0, 0, 1_000, 66_000, 262_144, 400_000])
    return Script(
        number=number,
        kind=kind,
        pieces=pieces,
        size=size,
        first_after=round(rng.choice([0.0, rng.uniform(0, 1), rng.uniform(0, 3)]), 3),
        interval=0.0 if large else rng.choice([0.0, 0.01, 0.1, 0.3]),
        fails=fails,
        fails_at=rng.randint(0, pieces),
        stalls_at=rng.randint(0, pieces) if stalls else -1,
        stall=rng.choice([1.0, timeout * 0.6, timeout * 1.5, 1000.0]) if stalls else 0.0,
        clings=round(rng.uniform(0.1, 3), 2) if rng.random() < 0.08 else 0.0,
        filling=min(filling, _ROOM.get(kind, filling)),
    )


def _draw_upload(rng: random.Random, errand: Errand) -> Errand:
    """Give some of those that bring a file a large one."""
    if errand.script.kind != "asr" or rng.random() < 0.4:
        return errand
    script = attrs.evolve(errand.script, filling=rng.choice(_UPLOADS), model_last=rng.random() < 0.5)
    return attrs.evolve(errand, script=script)


def _draw_fault(
    rng: random.Random, begins: float, seconds: float, workers: list[str], options: dict[str, Any]
) -> Fault:
    kind = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    worker_timeout = options["worker_timeout"]
    target = "master" if kind.startswith("master") else rng.choice(workers)
    if kind in (
        "connection cut",
        "connection reset",
        "connection delayed",
        "client cut off",
        "call cancelled",
        "call pursued",
    ):
        target = ""
    amount = (
        float(rng.randint(1, 5)) if kind == "slots changed" else rng.choice([0.05, 0.2, worker_timeout / 8])
    )
    return Fault(
        at=round(begins + rng.uniform(0, seconds), 3),
        lasts=round(rng.choice([0.0, rng.uniform(0, 1), rng.uniform(0, worker_timeout),
                                rng.uniform(worker_timeout, 2 * worker_timeout)]), 3),
        kind=kind,
        target=target,
        pick=rng.randrange(1 << 20),
        amount=amount,
    )  # fmt: skip
