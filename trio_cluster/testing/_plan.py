"""The plan of a schedule: every decision in it, drawn from one seed before anything happens.

Nothing is drawn while the schedule runs, so what is done does not depend on how the cluster reacts, and a plan can be
read, printed and compared. What is known only at run time, such as which connections exist that could be cut, is drawn
as a number that then selects one of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final, Literal

import attrs

from ..core.model import Kind
from ._scripts import Failure, Script

__all__ = [
    "MEMORY",
    "START_FAILED",
    "ClientBehavior",
    "Fault",
    "FaultKind",
    "ModelSpec",
    "Plan",
    "ResidentSpec",
    "SimulatedRequest",
    "Start",
    "draw_plan",
    "replica_name",
    "take_over_name",
]

#: The faults that can be injected into a cluster.
FaultKind = Literal[
    "worker killed",
    "worker frozen",
    "worker stopped",
    "worker drained",
    "worker partitioned",
    "link cut",
    "link reset",
    "link delayed",
    "link partitioned",
    "master killed",
    "master stopped",
    "master frozen",
    "client partitioned",
    "connection cut",
    "connection reset",
    "connection delayed",
    "model unregistered",
    "slots changed",
    "call cancelled",
    "failover broken",
    "replica failing",
    "replica stuck",
    "master replaced",
    "resident died",
    "resident unloaded",
    "resident loaded",
]

#: The name of the second master, and the share of the schedules that have one.
_SECOND: Final = "master-2"
_TWO_MASTERS: Final = 0.25

# How often each of them is drawn, relative to the others.
_WEIGHTS: Final[dict[FaultKind, int]] = {
    "worker killed": 8,
    "worker frozen": 8,
    "worker stopped": 6,
    "worker drained": 4,
    "worker partitioned": 6,
    "link cut": 6,
    "link reset": 6,
    "link delayed": 5,
    "link partitioned": 6,
    "master killed": 2,
    "master stopped": 2,
    "master frozen": 2,
    "client partitioned": 4,
    "connection cut": 4,
    "connection reset": 4,
    "connection delayed": 4,
    "model unregistered": 5,
    "slots changed": 6,
    "call cancelled": 5,
    "failover broken": 8,
}

#: How often a master is replaced in a schedule in which that happens, at least and at most.
_TAKE_OVERS: Final = (1, 3)

#: How many replicas fail or hang in a schedule in which some of them do, at least and at most.
_TROUBLES: Final = (6, 12)
#: How often the requests of such a schedule are for a model with several replicas, where they were for another chat.
_SHARED: Final = 0.9
#: The part of the schedule in which that happens.
_BUSY: Final = 0.5

_FAILURES: Final[list[Failure | None]] = [*[None] * 14, "api_error", "exception"]

#: How many resets of links a schedule has that cuts them all the time.
_CUTS: Final = 30

#: The share of the schedules that have models on demand, and of their requests for chats that are for these.
_ON_DEMAND: Final = 0.25
_COLD_REQUESTS: Final = 0.5
#: Bytes for the models on demand of a worker, and what they need: not all of them fit at the same time.
MEMORY: Final = 100
_MEMORIES: Final = [(60, 50), (100, 10), (60, 50, 40), (40, 70, 30), (50, 50, 50)]
#: How often models on demand die, are loaded and unloaded, at least and at most.
_RESIDENT_FAULTS: Final = (3, 8)
#: How the history names a start that has failed, or the failure of a resident that was ready.
START_FAILED: Final = "start failed"

# Bytes of files that are forwarded while they are uploaded: even half of the larger one exceeds what is spooled.
_UPLOAD_SIZES: Final = [1_200_000, 2_600_000]

# Characters of padding that the inputs of some kinds have room for.
_MAX_PADDING: Final[dict[Kind, int]] = {"tts": 1_000, "image_generation": 30_000}

#: What a client does besides waiting for its response.
ClientBehavior = Literal["waits", "leaves", "resets", "aborts upload", "reads slowly"]


@attrs.frozen
class ModelSpec:
    """A model of the cluster, and the nodes that serve it."""

    name: str
    kind: Kind
    hosts: tuple[str, ...]
    yields: bool
    """The handler is an async generator; otherwise it pushes."""


@attrs.frozen
class Start:
    """How one start of a model on demand goes.

    Attributes:
        seconds: how long it takes.
        fails: it fails then.
    """

    seconds: float
    fails: bool = False


@attrs.frozen
class ResidentSpec:
    """A model on demand. Durations are seconds.

    Attributes:
        model: the name of the model.
        host: the worker that serves it.
        memory: the bytes that it needs.
        idle: how long it may be without a request; 0: as long as its memory is not needed.
        start_timeout: how long a start may take, and the wait for memory before it.
        stop: how long its end takes.
        starts: how its starts go, one after the other, and then from the first one again.
    """

    model: str
    host: str
    memory: int
    idle: float
    start_timeout: float
    stop: float
    starts: tuple[Start, ...]


def take_over_name(master: str) -> str:
    """Return how the history names what happens when a master is replaced. It is no fault of the master's machine."""
    return f"the place of {master}"


def replica_name(node: str, model: str) -> str:
    """Return how the history names one replica of a model."""
    return f"{model} on {node}"


@attrs.frozen
class SimulatedRequest:
    """A request, and how its client behaves.

    Attributes:
        at: when it is sent, in seconds since the schedule began.
        model: the name of the model that it is for.
        others: the models that may answer instead: the request asks for an alias, a list of ``model`` and these.
        script: what the model is to do.
        stream: ask for a stream.
        route: which of the routes of a chat model: ``chat``, ``completions`` or ``messages``.
        total_timeout: seconds that the client sends as ``x-request-timeout``; ``None``: it does not.
        idle_timeout: seconds that the client sends as ``x-stainless-read-timeout``; ``None``: it does not.
        behavior: how the client behaves.
        delay: seconds after which it leaves, or for which it pauses after each of its first reads.
        master: the master that it is sent to.
    """

    at: float
    model: str
    script: Script
    stream: bool = True
    route: str = "chat"
    total_timeout: float | None = None
    idle_timeout: float | None = None
    behavior: ClientBehavior = "waits"
    delay: float = 0.0
    others: tuple[str, ...] = ()
    master: str = "master"

    @property
    def asked(self) -> str:
        """The name that it asks for."""
        return f"{self.model}-or-else" if self.others else self.model

    @property
    def models(self) -> tuple[str, ...]:
        """The models that may answer it."""
        return (self.model, *self.others)

    @property
    def number(self) -> int:
        """The number of the request."""
        return self.script.number

    @property
    def host(self) -> str:
        """The machine of its client; every client has one of its own."""
        return f"client-{self.number}"


@attrs.frozen
class Fault:
    """A fault to inject.

    Attributes:
        at: when, in seconds since the schedule began.
        duration: seconds for which it lasts, if it is not over at once.
        kind: which fault.
        target: the name of a worker or a master, or empty where ``choice`` selects the target.
        choice: selects one of the clients, connections or models that exist at that time.
        amount: how much, where that has a meaning: seconds of delay or of ``Retry-After``, a number of slots.
    """

    at: float
    duration: float
    kind: FaultKind
    target: str
    choice: int
    amount: float


@attrs.frozen
class Plan:
    """A schedule that has not begun.

    Attributes:
        seed: what it was drawn from.
        seconds: for how long requests and faults begin.
        latency: of the network, in seconds one way.
        fast_path: tokens are written to their client in the task that receives them.
        limited_keys: two thirds of the clients have keys with limits.
        options: of all nodes.
        slots: of each node.
        models: all models, and the nodes that serve them.
        requests, faults: in the order of time.
        masters: the names of the masters. All workers have all of them; the first one has models of its own.
        residents: the models on demand, which are among ``models``; mostly there are none.
    """

    seed: int
    seconds: float
    latency: float
    fast_path: bool
    limited_keys: bool
    options: dict[str, Any]
    slots: dict[str, int]
    models: tuple[ModelSpec, ...]
    requests: tuple[SimulatedRequest, ...]
    faults: tuple[Fault, ...]
    masters: tuple[str, ...] = ("master",)
    residents: tuple[ResidentSpec, ...] = ()

    @property
    def workers(self) -> list[str]:
        """The names of the workers."""
        return [name for name in self.slots if name not in self.masters]

    @property
    def longest_delay(self) -> float:
        """Seconds that the network takes at most for anything that it delivers."""
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
        # Not drawn, and neither is the fast path: any twelve consecutive seeds play every path of a token.
        "batch_wait": 0.0 if seed % 4 == 0 else 0.001,
        # Often enough that most streams get comments before their answer, in two of five schedules.
        "keepalive": 0.3 if seed % 5 < 2 else 0.0,
        "resume_window": 0.0 if seed % 5 == 4 else 15.0,
    }
    models = _draw_models(rng, workers)
    drawn = [_draw_request(rng, number, seconds, models, options) for number in range(1, requests + 1)]
    drawn.sort(key=lambda request: request.at)
    count = rng.randint(0, 3) if rng.random() < 0.2 else rng.randint(faults // 2, faults)
    # Faults one after the other find other bugs than many faults within seconds, so schedules have either.
    window = rng.uniform(1, 4) if rng.random() < 0.3 else seconds
    begins = rng.uniform(0, seconds - window)
    drawn_faults = [_draw_fault(rng, begins, window, workers, options) for _ in range(count)]
    if seed % 3 == 1:
        drawn_faults += _draw_cuts(seed, seconds, workers)
    drawn = [_draw_upload(rng, request) for request in drawn]
    if seed % 3 == 2:
        drawn_faults += _draw_troubles(seed, seconds, models)
        drawn = sorted(_share(seed, drawn, models), key=lambda request: request.at)
        options |= _draw_ejection(seed)
    drawn = _draw_aliases(seed, drawn, models, options)
    residents = _draw_residents(seed, workers)
    if residents:
        models += tuple(
            ModelSpec(each.model, "chat", (each.host,), index % 2 > 0) for index, each in enumerate(residents)
        )
        drawn = _ask_for_residents(seed, drawn, residents)
        drawn_faults += _draw_resident_faults(seed, seconds, residents[0].host)
    # A generator of its own, so that the rest of the schedule is the same with one master and with two.
    of_masters = random.Random(f"the masters of {seed}")
    masters = ("master", _SECOND) if of_masters.random() < _TWO_MASTERS else ("master",)
    if len(masters) > 1:
        slots = {"master": slots["master"], _SECOND: 1, **slots}
        # What only the first master serves, its clients ask there.
        drawn = [
            request
            if "only-master" in request.models
            else attrs.evolve(request, master=of_masters.choice(masters))
            for request in drawn
        ]
        drawn_faults = [
            attrs.evolve(fault, target=of_masters.choice(masters)) if fault.target == "master" else fault
            for fault in drawn_faults
        ]
    if seed % 4 == 1:
        drawn_faults += _draw_take_overs(seed, seconds, masters)
    return Plan(
        seed=seed,
        seconds=seconds,
        latency=latency,
        fast_path=seed % 3 != 0,
        limited_keys=seed % 2 == 1,
        options=options,
        slots=slots,
        models=models,
        requests=tuple(drawn),
        faults=tuple(sorted(drawn_faults, key=lambda fault: fault.at)),
        masters=masters,
        residents=residents,
    )


def _draw_models(rng: random.Random, workers: list[str]) -> tuple[ModelSpec, ...]:
    """Draw the models: one on every worker, one on two, one of each other kind, and one on each node alone."""
    some = tuple(rng.sample(workers, 2))
    shared = [
        ModelSpec("everywhere", "chat", tuple(workers), rng.random() < 0.5),
        ModelSpec("twice", "chat", some, rng.random() < 0.5),
        ModelSpec("speech", "tts", (rng.choice(workers),), rng.random() < 0.5),
        ModelSpec("hearing", "asr", (rng.choice(workers),), rng.random() < 0.5),
        ModelSpec("vectors", "embedding", tuple(rng.sample(workers, 2)), rng.random() < 0.5),
        ModelSpec("pictures", "image_generation", (rng.choice(workers),), rng.random() < 0.5),
    ]
    alone = [ModelSpec(f"only-{name}", "chat", (name,), rng.random() < 0.5) for name in [*workers, "master"]]
    return (*shared, *alone)


def _draw_request(
    rng: random.Random, number: int, seconds: float, models: tuple[ModelSpec, ...], options: dict[str, Any]
) -> SimulatedRequest:
    model = rng.choice([*models[:2], *models])
    script = _draw_script(rng, number, model.kind, options)
    behavior: ClientBehavior = rng.choices(
        ("waits", "leaves", "resets", "aborts upload", "reads slowly"), (60, 18, 8, 4, 10)
    )[0]
    delays = {
        "leaves": rng.choice([0.0, 0.01, rng.uniform(0, 2 + script.duration)]),
        "resets": rng.uniform(0, 2 + script.duration),
        "aborts upload": rng.uniform(0, 1),
        "reads slowly": rng.choice([0.1, 0.5, 2.0]),
    }
    return SimulatedRequest(
        at=round(rng.uniform(0, seconds), 3),
        model=model.name,
        script=script,
        stream=model.kind in ("chat", "asr") and rng.random() < 0.65,
        route=rng.choice(["chat", "chat", "completions", "messages"]),
        total_timeout=round(0.2 + script.duration * rng.uniform(0.4, 1.6), 2)
        if rng.random() < 0.25
        else None,
        idle_timeout=rng.choice([2.0, 5.0]) if rng.random() < 0.1 else None,
        behavior=behavior,
        delay=round(delays.get(behavior, 0.0), 3),
    )


def _draw_script(rng: random.Random, number: int, kind: Kind, options: dict[str, Any]) -> Script:
    single = kind in ("embedding", "image_generation")
    # Sizes on both sides of every limit on the path: pieces, windows, buffers.
    large = not single and rng.random() < 0.12
    pieces = 1 if single else rng.choice([1, 2, 5, 10]) if large else rng.randint(1, 20)
    size = rng.choice([20_000, 65_536, 70_000, 150_000]) if large else rng.choice([0, 0, 0, 40, 900])
    fails: Failure | None = rng.choice(_FAILURES)
    timeout = options["default_timeout"]
    stalls = rng.random() < 0.08
    padding = rng.choice([0, 0, 0, 0, 0, 0, 0, 1_000, 66_000, 262_144, 400_000])
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
        ignore_cancellation_for=round(rng.uniform(0.1, 3), 2) if rng.random() < 0.08 else 0.0,
        padding=min(padding, _MAX_PADDING.get(kind, padding)),
    )


def _draw_upload(rng: random.Random, request: SimulatedRequest) -> SimulatedRequest:
    """Give some of the requests that upload a file a large one."""
    if request.script.kind != "asr" or rng.random() < 0.4:
        return request
    script = attrs.evolve(request.script, padding=rng.choice(_UPLOAD_SIZES), model_last=rng.random() < 0.5)
    return attrs.evolve(request, script=script)


def _draw_aliases(
    seed: int, requests: list[SimulatedRequest], models: tuple[ModelSpec, ...], options: dict[str, Any]
) -> list[SimulatedRequest]:
    """Let some of the requests for chats ask for a list of two chats. The options get the aliases for that."""
    # As for the cuts below.
    rng = random.Random(f"the aliases of {seed}")
    chats = [model.name for model in models if model.kind == "chat"]
    other = {name: rng.choice([each for each in chats if each != name]) for name in chats}
    # The first name is that of a model that never was, so every request goes on at least once.
    options["aliases"] = {f"{name}-or-else": ["none", name, other[name]] for name in chats}
    return [
        attrs.evolve(request, others=(other[request.model],))
        if request.model in other and rng.random() < 0.3
        else request
        for request in requests
    ]


def _draw_cuts(seed: int, seconds: float, workers: list[str]) -> list[Fault]:
    """Return resets of links all the time, for a schedule in which everything has to go on in spite of them."""
    # A generator of their own, so that the rest of the schedule is the same with them and without.
    rng = random.Random(f"the cuts of {seed}")
    return _draw_moments(rng, seconds, "link reset", workers, _CUTS)


def _draw_troubles(seed: int, seconds: float, models: tuple[ModelSpec, ...]) -> list[Fault]:
    """Return faults of single replicas, for a schedule in which they are to be ejected."""
    # As for the cuts.
    rng = random.Random(f"the replicas of {seed}")
    targets = [node for model in models if len(model.hosts) > 1 for node in model.hosts]
    return [
        Fault(
            at=round(rng.uniform(0, _BUSY * seconds), 3),
            duration=round(rng.uniform(0.1, 0.5) * _BUSY * seconds, 3),
            kind=rng.choice(["replica failing", "replica failing", "replica stuck"]),
            target=rng.choice(targets),
            choice=rng.randrange(1 << 20),
            amount=rng.choice([0.0, 0.0, 1.5, 5.0]),
        )
        for _ in range(rng.randint(*_TROUBLES))
    ]


def _share(
    seed: int, requests: list[SimulatedRequest], models: tuple[ModelSpec, ...]
) -> list[SimulatedRequest]:
    """Let most requests for a chat ask for one with replicas, in a shorter time, so that these have much to do."""
    rng = random.Random(f"the shared models of {seed}")
    chats = {model.name for model in models if model.kind == "chat" and len(model.hosts) == 1}
    return [
        attrs.evolve(request, model=rng.choice(["everywhere", "twice", "twice"]), at=_BUSY * request.at)
        if request.model in chats and rng.random() < _SHARED
        else request
        for request in requests
    ]


def _draw_ejection(seed: int) -> dict[str, Any]:
    """Return options with which a replica is ejected within a schedule, and back again."""
    rng = random.Random(f"the ejections of {seed}")
    return {
        "ejection_failures": rng.choice([2, 3]),
        "ejection_time": rng.choice([0.5, 1.0, 2.0]),
        "ejection_time_max": rng.choice([4.0, 8.0]),
    }


def _draw_take_overs(seed: int, seconds: float, masters: tuple[str, ...]) -> list[Fault]:
    """Return take-overs: another process takes the place of a master. That is to cost no request anything."""
    # As for the cuts.
    rng = random.Random(f"the take-overs of {seed}")
    return _draw_moments(rng, seconds, "master replaced", masters, rng.randint(*_TAKE_OVERS))


def _draw_moments(
    rng: random.Random, seconds: float, kind: FaultKind, targets: Sequence[str], count: int
) -> list[Fault]:
    """Return faults of one kind that last no time."""
    return [
        Fault(
            at=round(rng.uniform(0, seconds), 3),
            duration=0.0,
            kind=kind,
            target=rng.choice(targets),
            choice=rng.randrange(1 << 20),
            amount=0.0,
        )
        for _ in range(count)
    ]


def _draw_residents(seed: int, workers: list[str]) -> tuple[ResidentSpec, ...]:
    """Return models on demand that do not fit together on their worker; none for most schedules."""
    # As for the cuts.
    rng = random.Random(f"the models on demand of {seed}")
    if rng.random() >= _ON_DEMAND:
        return ()
    host, start_timeout = rng.choice(workers), rng.choice([6.0, 15.0])
    return tuple(
        ResidentSpec(
            model=f"cold-{index}",
            host=host,
            memory=memory,
            idle=rng.choice([0.0, 0.0, 2.0]),
            start_timeout=start_timeout,
            stop=rng.choice([0.0, 0.5, 1.5]),
            starts=tuple(_draw_start(rng) for _ in range(8)),
        )
        for index, memory in enumerate(rng.choice(_MEMORIES), start=1)
    )


def _draw_start(rng: random.Random) -> Start:
    seconds = rng.choice([0.0, round(rng.uniform(0, 1), 3), round(rng.uniform(0, 4), 3)])
    if rng.random() < 0.05:
        return Start(1000.0)
    return Start(seconds, fails=rng.random() < 0.2)


def _ask_for_residents(
    seed: int, requests: list[SimulatedRequest], residents: tuple[ResidentSpec, ...]
) -> list[SimulatedRequest]:
    """Let a part of the requests for chats be for models on demand."""
    rng = random.Random(f"the requests for models on demand of {seed}")
    names = [each.model for each in residents]
    return [
        attrs.evolve(request, model=rng.choice(names))
        if request.script.kind == "chat" and not request.others and rng.random() < _COLD_REQUESTS
        else request
        for request in requests
    ]


def _draw_resident_faults(seed: int, seconds: float, host: str) -> list[Fault]:
    """Return what becomes of models on demand: they die, and are loaded and unloaded by an operator."""
    rng = random.Random(f"the faults of models on demand of {seed}")
    return [
        Fault(
            at=round(rng.uniform(0, seconds), 3),
            duration=round(rng.uniform(0.1, 5), 3),
            kind=rng.choice(["resident died", "resident died", "resident unloaded", "resident loaded"]),
            target=host,
            choice=rng.randrange(1 << 20),
            amount=round(rng.choice([0.0, rng.uniform(0, 1)]), 3),
        )
        for _ in range(rng.randint(*_RESIDENT_FAULTS))
    ]


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
        "client partitioned",
        "call cancelled",
        "failover broken",
    ):
        target = ""
    amount = (
        float(rng.randint(1, 5)) if kind == "slots changed" else rng.choice([0.05, 0.2, worker_timeout / 8])
    )
    at = begins + rng.uniform(0, seconds)
    durations = (
        0.0,
        rng.uniform(0, 1),
        rng.uniform(0, worker_timeout),
        rng.uniform(worker_timeout, 2 * worker_timeout),
    )
    return Fault(
        at=round(at, 3),
        duration=round(rng.choice(durations), 3),
        kind=kind,
        target=target,
        choice=rng.randrange(1 << 20),
        amount=amount,
    )
