"""A seed makes a run reproducible: the same in every process, and another one for another seed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from trio_cluster.core import randomness
from trio_cluster.testing import open_cluster, seeded
from trio_cluster.testing._trio_internals import reproducible_scheduler


def output_of_program(seed: int, hash_seed: int) -> bytes:
    program = Path(__file__).with_name("seeded_program.py")
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, str(program), str(seed), str(1000 * hash_seed)]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout


def test_the_same_seed_gives_the_same_run_to_the_byte_in_every_process() -> None:
    one, again, other = output_of_program(7, 1), output_of_program(7, 2), output_of_program(8, 1)
    assert one == again
    assert len(one.splitlines()) > 100
    assert one != other


def test_everything_random_is_seeded() -> None:
    with reproducible_scheduler() as scheduler:
        pass

    def draws() -> list[object]:
        return [random.random(), randomness.token(8), randomness.uniform(0, 1), scheduler.random()]

    with seeded(3) as mine:
        first, own = draws(), mine.random()
    with seeded(3) as mine:
        assert (draws(), mine.random()) == (first, own)
    with seeded(4):
        assert draws() != first


def test_the_states_of_all_generators_are_restored() -> None:
    with reproducible_scheduler() as scheduler:
        pass
    generators = [random, randomness.generator, scheduler]
    before = [each.getstate() for each in generators]
    with pytest.raises(ZeroDivisionError), seeded(3):
        _ = random.random() + len(randomness.token(3)) / 0
    assert [each.getstate() for each in generators] == before


def test_a_program_that_seeds_random_does_not_repeat_ids() -> None:
    random.seed(0)
    one = randomness.token(16)
    random.seed(0)
    assert randomness.token(16) != one


async def test_a_cluster_can_be_opened_with_a_seed(autojump_clock: trio.testing.MockClock) -> None:
    ids = []
    for _ in range(2):
        async with open_cluster(seed=5) as cluster:
            ids.append((await cluster.client().get("/health")).headers["x-request-id"])
    assert ids[0] == ids[1]
