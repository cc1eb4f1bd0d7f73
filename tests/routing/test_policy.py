"""Policies choose among replicas, and see nothing else."""

from __future__ import annotations

import attrs
import pytest

from trio_cluster.core.call import Call
from trio_cluster.core.model_state import ModelState, ShownState
from trio_cluster.core.request import Request
from trio_cluster.routing.health import Health
from trio_cluster.routing.policy import LeastBusy

REQUEST = Request(endpoint="chat.completions", kind="chat", model="m", body=b"{}")


@attrs.define(eq=False)
class Replica:
    name: str
    load: float
    elsewhere: int = 0
    health: Health = attrs.field(factory=Health)

    def open(self, request: Request) -> Call:
        raise AssertionError


@pytest.mark.parametrize(
    ("replicas", "chosen"),
    [
        ([("cold", 0.0), ("starting", 0.0), ("ready", 0.9)], 2),
        ([("cold", 0.0), ("starting", 0.5)], 1),
        # The one that is ready is full.
        ([("ready", 1.5), ("starting", 0.0)], 1),
        ([("ready", 2.5), ("cold", 0.0)], 1),
        # What does not run on demand is ready.
        ([("cold", 0.0), (None, 0.5)], 1),
    ],
)
def test_a_model_that_is_ready_comes_before_one_that_starts_and_that_before_a_cold_one(
    replicas: list[tuple[ShownState | None, float]], chosen: int
) -> None:
    made = [Replica(f"w{number}", load) for number, (_, load) in enumerate(replicas)]
    for replica, (state, _) in zip(made, replicas, strict=True):
        if state is not None:
            replica.health.model_states = {"m": ModelState(state), "other": ModelState("cold")}
    assert LeastBusy().pick(made, REQUEST) is made[chosen]


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([], None),
        ([3.0], 0),
        ([0.5, 0.25, 0.75], 1),
        ([0.5, 0.5], 0),
        ([1.5, 1.25], 1),
        ([0.5, 0.0, 0.0], 1),
    ],
)
def test_the_least_busy_replica_is_chosen_and_of_equals_the_first(
    loads: list[float], chosen: int | None
) -> None:
    replicas = [Replica(f"w{number}", load) for number, load in enumerate(loads)]
    expected = None if chosen is None else replicas[chosen]
    assert LeastBusy().pick(replicas, REQUEST) is expected


def test_replicas_behind_an_idle_one_are_not_asked() -> None:
    class Counted(Replica):
        asked = 0

        def __getattribute__(self, name: str) -> object:
            if name == "load":
                Counted.asked += 1
            return super().__getattribute__(name)

    replicas = [Counted("w0", 0.5), Counted("w1", 0.0), Counted("w2", 0.0)]
    assert LeastBusy().pick(replicas, REQUEST) is replicas[1]
    assert Counted.asked == 2
