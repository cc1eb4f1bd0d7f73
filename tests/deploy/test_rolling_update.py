"""The rolling update of the masters in the manifests, with their own numbers, in virtual time.

What Kubernetes does is played: a deployment that replaces one pod after the other, the kubelet with its probes and its
grace period, endpoints that proxies learn of late, and a DNS whose answers are old. Masters, workers and clients are
the real ones, on a network in memory.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ChatRequest, server as server_module
from trio_cluster.cluster.masters import ResolvedMasters
from trio_cluster.testing import SimulatedCluster, SimulatedNode, open_cluster, worker
from trio_cluster.testing._cluster import PORT

pytest.importorskip("yaml", reason="PyYAML is not installed; it is in the group deploy")

from kustomized import render

BASE = Path(__file__).parent.parent.parent / "deploy" / "kubernetes" / "base"
#: How old an answer of the DNS may be, and how late a proxy learns that an endpoint is new or gone.
DNS_AGE, PROPAGATION = 30.0, 10.0


@attrs.define
class Numbers:
    """What the manifests say of masters."""

    replicas: int
    initial_delay: float
    period: float
    min_ready: float
    pre_stop: float
    grace: float
    drain_timeout: float
    not_ready_too: bool

    @classmethod
    def read(cls) -> Numbers:
        """Return those of the base."""
        manifests = render(BASE)
        found: dict[tuple[str, str], Any] = {
            (each["kind"], each["metadata"]["name"]): each for each in manifests
        }
        deployment = found["Deployment", "trio-cluster-master"]["spec"]
        assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        pod = deployment["template"]["spec"]
        (container,) = pod["containers"]
        probe = container["readinessProbe"]
        assert probe["httpGet"]["path"] == "/ready"
        config = found["ConfigMap", "trio-cluster-master"]["data"]["config.toml"]
        return cls(
            replicas=deployment["replicas"],
            initial_delay=probe["initialDelaySeconds"],
            period=probe["periodSeconds"],
            min_ready=deployment["minReadySeconds"],
            pre_stop=float(container["lifecycle"]["preStop"]["exec"]["command"][1]),
            grace=pod["terminationGracePeriodSeconds"],
            drain_timeout=tomllib.loads(config)["drain_timeout"],
            not_ready_too=found["Service", "trio-cluster-masters"]["spec"]["publishNotReadyAddresses"],
        )


@attrs.define(eq=False)
class Pod:
    """A pod with a master.

    Attributes:
        node: the master.
        ready: as its readiness probe says.
        leaving: it was asked to end.
    """

    node: SimulatedNode
    ready: trio.Event = attrs.field(factory=trio.Event)
    leaving: bool = False


class Kubernetes:
    """As much of it as replaces pods."""

    def __init__(self, cluster: SimulatedCluster, nursery: trio.Nursery, numbers: Numbers) -> None:
        self.cluster = cluster
        self.numbers = numbers
        self.pods: list[Pod] = []
        self.killed: list[str] = []
        self._nursery = nursery
        self._answers: dict[str, tuple[float, list[str]]] = {}
        self._endpoints: list[str] = []
        self._made = 0

    async def start_pod(self) -> Pod:
        """Start a pod, whose name is an address, and whose probe begins after its delay."""
        self._made += 1
        pod = Pod(await self.cluster.start_master(name=f"master-{self._made}"))
        self.pods.append(pod)
        self._nursery.start_soon(self._probe, pod)
        return pod

    async def _probe(self, pod: Pod) -> None:
        await trio.sleep(self.numbers.initial_delay)
        client = self.cluster.client("kubelet", of=pod.node.name)
        # As the kubelet does.
        while (await client.get("/ready")).status != 200:  # noqa: ASYNC110
            await trio.sleep(self.numbers.period)
        pod.ready.set()
        self._publish()

    def _publish(self) -> None:
        """Let all proxies know the endpoints, late."""
        endpoints = [pod.node.name for pod in self.pods if pod.ready.is_set() and not pod.leaving]

        async def learn() -> None:
            await trio.sleep(PROPAGATION * random.random())
            self._endpoints = endpoints

        self._nursery.start_soon(learn)

    async def end_pod(self, pod: Pod) -> None:
        """End a pod as the kubelet does."""
        pod.leaving = True
        self._publish()
        with trio.move_on_after(self.numbers.grace) as grace:
            await trio.sleep(self.numbers.pre_stop)
            pod.node.stop()
            await pod.node.over.wait()
        if grace.cancelled_caught:
            self.killed.append(pod.node.name)
            pod.node.kill()
        self.pods.remove(pod)

    async def update(self) -> None:
        """Replace all pods: a new one is ready before an old one leaves."""
        for old in list(self.pods):
            new = await self.start_pod()
            with trio.fail_after(600):
                await new.ready.wait()
            await trio.sleep(self.numbers.min_ready)
            self._nursery.start_soon(self.end_pod, old)

    async def addresses_of(self, name: str, *, cache: str) -> Collection[str]:
        """Resolve the name of the headless service, by a cache."""
        now = trio.current_time()
        known = self._answers.get(cache)
        if known is None or now - known[0] >= DNS_AGE:
            found = [pod.node.name for pod in self.pods if pod.ready.is_set() or self.numbers.not_ready_too]
            known = self._answers[cache] = now, found
        if not known[1]:
            raise OSError(name)
        return known[1]

    def choose(self) -> str:
        """Return the master for a request, as a proxy does that balances requests."""
        return random.choice(self._endpoints)


def serve(name: str, *models: str) -> Any:
    """Return a worker with models; each takes as many seconds between its two words as it is asked to."""
    server = worker(name, max_concurrency=1000, default_timeout=600.0)

    async def answer(request: ChatRequest) -> Any:
        yield "begun "
        await trio.sleep(float(request.last_text))
        yield "done"

    for model in models:
        server.register_chat(model, answer)
    return server


async def play(numbers: Numbers, patch: pytest.MonkeyPatch) -> tuple[Kubernetes, list[str]]:
    """Update the masters under load, and return what has failed. The master of the simulated cluster has no pod."""
    random.seed(18)
    failures: list[str] = []
    async with (
        open_cluster(
            seed=18, on_conflict="replicate", drain_timeout=numbers.drain_timeout, default_timeout=600.0
        ) as cluster,
        trio.open_nursery() as nursery,
    ):
        kubernetes = Kubernetes(cluster, nursery, numbers)
        first = [await kubernetes.start_pod() for _ in range(numbers.replicas)]
        for number, models in enumerate([("a", "b"), ("a",), ("c",)]):
            server = serve(f"w{number}", *models)
            server.network = cluster.network_of(f"w{number}")
            resolved = partial(
                ResolvedMasters, addresses_of=partial(kubernetes.addresses_of, cache=f"cache-{number}")
            )
            patch.setattr(server_module, "ResolvedMasters", resolved)
            node = SimulatedNode(cluster, f"w{number}", server)
            run = partial(server.run_as_worker, masters_from=("trio-cluster-masters", PORT + 1000))
            with trio.fail_after(60):
                await nursery.start(partial(node.run, run))
            await trio.sleep(10.0)
        with trio.fail_after(300):
            for pod in first:
                await pod.ready.wait()
        await trio.sleep(PROPAGATION)

        async def ask(number: int) -> None:
            model, master = "abc"[number % 3], kubernetes.choose()
            # Most answers are short; one in ten takes as long as a draining master waits.
            seconds = numbers.drain_timeout - 10 if number % 10 == 0 else number % 4 + 1
            try:
                answer = await cluster.client(f"c{number}", of=master).chat(model, str(int(seconds)))
            except OSError as error:
                failures.append(f"{trio.current_time():.0f}: {master}, {model}: {error!r}")
                return
            if answer.status != 200 or b"[DONE]" not in answer.body:
                failures.append(f"{trio.current_time():.0f}: {master}, {model}: {answer.body[-200:]!r}")

        async def keep_asking() -> None:
            number = 0
            while True:
                nursery.start_soon(ask, number)
                number += 1
                await trio.sleep(1.0)

        with trio.CancelScope() as load:

            async def update() -> None:
                await trio.sleep(20.0)
                await kubernetes.update()
                for pod in first:
                    await pod.node.over.wait()
                await trio.sleep(20.0)
                load.cancel()

            nursery.start_soon(update)
            await keep_asking()
        await trio.sleep(numbers.drain_timeout)
        nursery.cancel_scope.cancel()
    return kubernetes, failures


async def test_no_request_fails(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    kubernetes, failures = await play(Numbers.read(), monkeypatch)
    assert failures == []
    assert kubernetes.killed == []
    assert sorted(pod.node.name for pod in kubernetes.pods) == ["master-3", "master-4"]


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        # Ready with the first model: the others are not known yet.
        ({"initial_delay": 0.0}, "model_not_found"),
        # Proxies still send requests to a master that drains.
        ({"pre_stop": 0.0}, "shutting_down"),
        # What is left after the grace period is lost.
        ({"grace": 60.0}, ""),
    ],
)
async def test_each_number_is_needed(
    change: dict[str, Any], failure: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubernetes, failures = await play(attrs.evolve(Numbers.read(), **change), monkeypatch)
    assert any(failure in each for each in failures), failures[:3]
    assert bool(kubernetes.killed) == ("grace" in change)


async def test_masters_that_are_not_ready_have_to_be_found(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = attrs.evolve(Numbers.read(), not_ready_too=False)
    with pytest.raises(ExceptionGroup) as caught:
        await play(numbers, monkeypatch)
    assert caught.group_contains(trio.TooSlowError)
