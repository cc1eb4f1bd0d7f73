"""Compare routing policies with two replicas of a real model: time to first token, and hits of their prompt caches.

    python bench/routing_llama.py SmolLM2-135M-Instruct.Q4_1.gguf
    python bench/routing_llama.py SmolLM2-135M-Instruct.Q4_1.gguf --slow

Needs the extra ``llama``. Agents have conversations of some turns, with a few KB more in each; all begin with the same
instructions. Each replica has one thread. With ``--slow``, the second one is stopped for half of the time.

Policies are compared by turns in one run, since other work on the machine changes all figures.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
from functools import partial

import attrs
import httpx
import trio

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.routing.cost import LeastCost
from trio_cluster.routing.policy import LeastBusy, RoutingPolicy

HOST = "127.0.0.1"
TEXT = (
    "the server reads a file and writes a test for each function of the module before it runs them all "
    "again because one of the tests did not pass the first time it was tried by another person"
)


@attrs.define
class Outcome:
    """What the clients of one policy saw."""

    first: list[float] = attrs.field(factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0


def words(draw: random.Random, size: int) -> str:
    """Return text of about ``size`` bytes."""
    return " ".join(draw.choice(TEXT.split()) for _ in range(size // 5))


async def converse(url: str, number: int, options: argparse.Namespace, seed: str, outcome: Outcome) -> None:
    """Have one conversation."""
    draw = random.Random(f"{seed}/{number}")
    messages = [{"role": "system", "content": words(random.Random(seed), 1500)}]
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        await trio.sleep(draw.uniform(0, options.pause))
        for _ in range(options.turns):
            messages.append({"role": "user", "content": words(draw, draw.randrange(2000, 4000))})
            body = {"model": "m", "messages": messages, "stream": True, "max_tokens": 16}
            body["stream_options"] = {"include_usage": True}
            begun, answer, first = trio.current_time(), "", True
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    text = "".join(each["delta"].get("content") or "" for each in chunk["choices"])
                    if text and first:
                        outcome.first.append(trio.current_time() - begun)
                        first = False
                    answer += text
                    if usage := chunk.get("usage"):
                        outcome.prompt_tokens += usage["prompt_tokens"]
                        outcome.cached_tokens += (usage.get("prompt_tokens_details") or {}).get(
                            "cached_tokens", 0
                        )
            messages.append({"role": "assistant", "content": answer})
            await trio.sleep(draw.expovariate(1 / options.pause))


class Random:
    """Chooses any replica."""

    why = "random"

    def pick(self, replicas, request):  # type: ignore[no-untyped-def]
        return random.choice(replicas)


async def stop_half_of_the_time(process: trio.Process) -> None:
    """Let a process run for half of the time."""
    try:
        while True:
            process.send_signal(signal.SIGSTOP)
            await trio.sleep(0.05)
            process.send_signal(signal.SIGCONT)
            await trio.sleep(0.05)
    finally:
        process.send_signal(signal.SIGCONT)


async def measure(
    name: str, policy: RoutingPolicy, options: argparse.Namespace, seed: str, outcome: Outcome
) -> None:
    """Run the conversations on new replicas with one policy."""
    server = ClusterServer(
        ClusterServerOptions(ServerOptions(host=HOST, default_timeout=600), on_conflict="replicate")
    )
    server.router.policy = LeastCost(server.router.catalog.cache_tokens) if name == "cost" else policy
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_master, 0)
        assert server.internal_port is not None
        for number in range(2):
            spec = f"llama:{options.model},name=m,ctx={options.context},parallel={options.parallel},threads=1"
            command = [
                sys.executable,
                "-m",
                "trio_cluster",
                "worker",
                f"{HOST}:{server.internal_port - 1000}",
            ]
            command += ["--internal-port", str(server.internal_port), "--timeout", "600"]
            command += ["--serve", spec]
            process = await nursery.start(partial(trio.run_process, command, check=True))
            if number and options.slow:
                nursery.start_soon(stop_half_of_the_time, process)
        while len(server.router.catalog.replicas("m")) < 2:  # noqa: ASYNC110
            await trio.sleep(0.1)
        assert server.url is not None
        async with trio.open_nursery() as conversations:
            for number in range(options.conversations):
                conversations.start_soon(converse, server.url, number, options, seed, outcome)
        nursery.cancel_scope.cancel()


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a .gguf file")
    parser.add_argument("--slow", action="store_true", help="the second replica has half the speed")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--pause", type=float, default=3.0, help="seconds between turns, on average")
    parser.add_argument("--context", type=int, default=32768, help="tokens of all slots together")
    parser.add_argument("--parallel", type=int, default=4, help="slots of each replica")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--policies", default="least-busy,random,cost")
    options = parser.parse_args()
    policies: dict[str, RoutingPolicy] = {"least-busy": LeastBusy(), "random": Random(), "cost": LeastBusy()}
    outcomes = {name: Outcome() for name in options.policies.split(",")}
    for number in range(options.rounds):
        for name, outcome in outcomes.items():
            await measure(name, policies[name], options, f"round {number}", outcome)
    print("| policy | p50 | p90 | cached |\n|---|---|---|---|")
    for name, outcome in outcomes.items():
        first = sorted(outcome.first)
        p50, p90 = (first[int(len(first) * share)] for share in (0.5, 0.9))
        cached = outcome.cached_tokens / max(1, outcome.prompt_tokens)
        print(f"| {name} | {p50:.2f} s | {p90:.2f} s | {cached:.0%} |")


trio.run(main)
