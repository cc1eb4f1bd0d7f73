"""Compare routing policies in a simulation: time to first token and cache hits, for rising load, in virtual time.

    python bench/routing.py                     # 16 replicas, loads up to saturation
    python bench/routing.py --replicas 2 --slow 0.5
    python bench/routing.py --masters 3         # several masters that share nothing

The traffic is that of coding agents: a few kinds of agents, each with a system prompt and tools that all of its
conversations share; conversations of about eight turns, each of which adds a tool's result to the prompt; and a pause
between turns. A replica batches: it reads prompts one after the other, at half its speed while it answers others, and
each answer gets slower the more there are at once. Its prompt cache forgets what was used longest ago.

The policies are the real ones, with the real router; only the replicas, the clients and the clock are simulated.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Final

import attrs

from trio_cluster.core.answer import Done, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.observer import Observer
from trio_cluster.core.request import Request
from trio_cluster.routing.backend import Backend
from trio_cluster.routing.cost import LeastCost
from trio_cluster.routing.health import Health
from trio_cluster.routing.policy import LeastBusy, RoutingPolicy
from trio_cluster.routing.prefix_cache import PrefixCache
from trio_cluster.routing.prompt import read_prompt
from trio_cluster.routing.router import Router

#: Bytes of a token.
TOKEN: Final = 4


class Simulation:
    """A clock, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), event))

    def run(self) -> None:
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()


@attrs.define(eq=False)
class Job:
    """A request at a replica."""

    call: Call
    new: int
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


class Replica:
    """A model server that batches. Its speed is the factor by which it is faster than the usual one."""

    def __init__(self, simulation: Simulation, name: str, options: argparse.Namespace, speed: float) -> None:
        self.name = name
        self.health = Health()
        self.calls = 0
        self._simulation = simulation
        self._slots = options.slots
        self._bytes_per_second = options.read * TOKEN * speed
        self._step = 1 / (options.say * speed)
        self.cache = PrefixCache(options.cache * TOKEN)
        self._waiting: deque[Job] = deque()
        self._reading: Job | None = None
        self._left = 0.0
        # By the number of tokens that every answer has had when it is complete.
        self._saying: list[tuple[float, int, Job]] = []
        self._said = 0.0
        self._at = 0.0
        self._version = 0
        self._numbers = count()

    @property
    def load(self) -> float:
        return self.calls / self._slots

    def open(self, request: Request) -> Call:
        call = Call(request, served_by=self.name)
        self.calls += 1
        prompt = read_prompt(request)
        job = Job(call, prompt.size, prompt.size // TOKEN, 0, int(request.headers["answer"]))
        self._advance()
        self._waiting.append(job)
        self._plan()
        return call

    def _pace(self) -> tuple[float, float]:
        """Bytes read per second, and tokens of each answer per second."""
        saying = len(self._saying)
        # A step of a batch takes longer the larger it is: twice as long for 16.
        tokens = 1 / (self._step * (1 + saying / 16)) if saying else 0.0
        if self._reading is None:
            return 0.0, tokens
        return self._bytes_per_second * (0.5 if saying else 1.0), tokens / 2

    def _advance(self) -> None:
        elapsed, self._at = self._simulation.now - self._at, self._simulation.now
        reading, saying = self._pace()
        self._left -= reading * elapsed
        self._said += saying * elapsed
        if self._reading is not None and self._left <= 1e-6:
            job, self._reading = self._reading, None
            heapq.heappush(self._saying, (self._said + job.answer_tokens, next(self._numbers), job))
            job.call.put(Head())
        while self._saying and self._saying[0][0] <= self._said + 1e-6:
            job = heapq.heappop(self._saying)[2]
            job.call.put(Done(Usage(job.prompt_tokens, job.answer_tokens, job.cached_tokens)))
            self.calls -= 1
            job.call.release()
        if self._reading is None and self._waiting and len(self._saying) < self._slots:
            job = self._reading = self._waiting.popleft()
            prompt = read_prompt(job.call.request)
            # A server finds text, and not the name of a conversation.
            cached = self.cache.hit(attrs.evolve(prompt, conversation=""))
            self.cache.add(prompt)
            job.cached_tokens = cached // TOKEN
            self._left = float(prompt.size - cached + TOKEN)

    def _plan(self) -> None:
        self._advance()
        self._version += 1
        version, (reading, saying) = self._version, self._pace()
        ends = []
        if self._reading is not None:
            ends.append(self._left / reading)
        if self._saying:
            ends.append((self._saying[0][0] - self._said) / saying)
        if ends:
            self._simulation.at(
                self._simulation.now + max(0.0, min(ends)) + 1e-9,
                lambda: self._plan() if version == self._version else None,
            )


class Random:
    """Chooses any replica."""

    why = "random"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, replicas: Sequence[Backend], request: Request) -> Backend | None:
        return self._random.choice(replicas)


class BoundedRing:
    """Consistent hashing of conversations with bounded loads: past 1.25 times the mean, the next one on the ring."""

    why = "ring"

    def pick(self, replicas: Sequence[Backend], request: Request) -> Backend | None:
        def digest(text: str) -> bytes:
            return hashlib.blake2b(text.encode(), digest_size=8).digest()

        ring = sorted((digest(f"{each.name}/{point}"), each.name) for each in replicas for point in range(50))
        key, by_name = digest(request.headers["x-session-affinity"]), {each.name: each for each in replicas}
        start = next((index for index, (point, _) in enumerate(ring) if point >= key), 0)
        bound = 1.25 * (sum(each.load for each in replicas) + 1 / 16) / len(replicas)
        for index in range(len(ring)):
            replica = by_name[ring[(start + index) % len(ring)][1]]
            if replica.load <= bound:
                return replica
        return None


@attrs.define
class Outcome:
    """What clients saw of one run: seconds to the first token of each turn, and tokens."""

    first: list[float] = attrs.field(factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Client:
    """One conversation of an agent."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        draw = self._random = random.Random(f"{world.options.seed}/{number}")
        kind = draw.randrange(world.options.kinds)
        self._messages: list[dict[str, str]] = [
            {"role": "system", "content": world.systems[kind]},
            {"role": "user", "content": draw.randbytes(draw.randrange(500, 3000)).hex()},
        ]
        self._turns = min(30, 1 + int(draw.expovariate(1 / (world.options.turns - 1))))
        self._name = f"conversation-{number}"
        self._router = draw.choice(world.routers)

    def ask(self) -> None:
        world, draw = self._world, self._random
        answer = min(1500, 20 + int(draw.expovariate(1 / 180)))
        headers = {"answer": str(answer)}
        if world.options.named:
            headers["x-session-affinity"] = self._name
        body = json.dumps({"model": "m", "messages": self._messages, "stream": True}).encode()
        asked = world.simulation.now
        call = self._router.open(Request("chat.completions", "chat", "m", body, headers=headers))

        def ended() -> None:
            assert isinstance(call.end, Done)
            usage = call.end.usage
            assert usage is not None
            world.outcome.prompt_tokens += usage.prompt_tokens
            world.outcome.cached_tokens += usage.cached_tokens
            self._messages.append({"role": "assistant", "content": draw.randbytes(2 * answer).hex()})
            self._messages.append(
                {"role": "tool", "content": draw.randbytes(draw.randrange(1000, 2000)).hex()}
            )
            self._turns -= 1
            if self._turns:
                world.simulation.at(
                    world.simulation.now + draw.expovariate(1 / world.options.pause), self.ask
                )

        world.asked[call] = asked
        call.on_release(ended)


class World(Observer):
    """Replicas, masters and clients of one run."""

    def __init__(self, options: argparse.Namespace, policy: str, load: float) -> None:
        self.options = options
        self.simulation = Simulation()
        self.outcome = Outcome()
        draw = random.Random(options.seed)
        self.systems = [draw.randbytes(draw.randrange(4000, 8000)).hex() for _ in range(options.kinds)]
        speeds = [options.slow if index == 0 else 1.0 for index in range(options.replicas)]
        replicas = [
            Replica(self.simulation, f"w{index}", options, speed) for index, speed in enumerate(speeds)
        ]
        self.routers: list[Router] = []
        #: When each call was asked for whose answer has not begun.
        self.asked: dict[Call, float] = {}
        for _ in range(options.masters):
            router = Router(self._policy(policy))
            router.observers.add(self)
            for replica in replicas:
                router.catalog.add(ModelInfo("m", "chat"), replica, replicate=True)
            self.routers.append(router)
        time = 0.0
        for number in range(options.conversations):
            time += draw.expovariate(load * len(replicas))
            client = Client(self, number)
            self.simulation.at(time, client.ask)

    def _policy(self, name: str) -> RoutingPolicy:
        if name == "cost":
            return LeastCost(clock=lambda: self.simulation.now)
        if name == "least-busy":
            return LeastBusy()
        return Random(self.options.seed) if name == "random" else BoundedRing()

    def on_first_byte(self, call: Call) -> None:
        self.outcome.first.append(self.simulation.now - self.asked.pop(call))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument(
        "--masters", type=int, default=1, help="that share nothing; each conversation keeps to one"
    )
    parser.add_argument("--slow", type=float, default=1.0, help="the speed of the first replica")
    parser.add_argument(
        "--loads", default="0.04,0.08,0.12,0.16,0.2,0.24", help="new conversations per second and replica"
    )
    parser.add_argument("--policies", default="random,least-busy,ring,cost")
    parser.add_argument("--conversations", type=int, default=1500)
    parser.add_argument("--turns", type=float, default=8.0, help="of a conversation, on average")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between turns, on average")
    parser.add_argument(
        "--kinds", type=int, default=5, help="of agents, each with its own system prompt and tools"
    )
    parser.add_argument("--slots", type=int, default=16, help="answers at once of a replica")
    parser.add_argument(
        "--read", type=float, default=5000, help="tokens of prompts that a replica reads per second"
    )
    parser.add_argument(
        "--say", type=float, default=100, help="tokens per second of one answer, if it is alone"
    )
    parser.add_argument("--cache", type=int, default=250_000, help="tokens in the prompt cache of a replica")
    parser.add_argument(
        "--no-names", dest="named", action="store_false", help="clients do not name conversations"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("| load | policy | p50 | p90 | p99 | cached |\n|---|---|---|---|---|---|")
    for load in map(float, options.loads.split(",")):
        for policy in options.policies.split(","):
            world = World(options, policy, load)
            world.simulation.run()
            first, outcome = sorted(world.outcome.first), world.outcome
            p50, p90, p99 = (first[int(len(first) * share)] for share in (0.5, 0.9, 0.99))
            cached = outcome.cached_tokens / outcome.prompt_tokens
            print(
                f"| {load:g} | {policy} | {p50:.2f} s | {p90:.2f} s | {p99:.2f} s | {cached:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
