"""The settings of a process that is a node: its limit of file descriptors, and its garbage collector."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Run in another process, so that the limits and the collector of the tests do not change.
LIMITS = """
import resource
from trio_cluster.cli.process import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
limit = raise_descriptor_limit()
print(limit, *resource.getrlimit(resource.RLIMIT_NOFILE))
"""

COLLECTOR = """
import gc, weakref
from trio_cluster.cli.process import tune_garbage_collector
class Node: pass
node = Node(); node.itself = node; garbage = weakref.ref(node); del node
before = gc.get_threshold()
tune_garbage_collector(rare={rare})
after = gc.get_threshold()
print(gc.get_freeze_count() > 1000, garbage() is None, after[:2] == before[:2], after[2] - before[2])
"""


def run(program: str) -> list[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.split()


@pytest.mark.parametrize(("soft", "hard", "then"), [(256, 1500, 1500), (1500, 1500, 1500)])
def test_the_descriptor_limit_is_raised_to_what_the_system_allows(soft: int, hard: int, then: int) -> None:
    assert run(LIMITS.format(soft=soft, hard=hard)) == [str(then), str(then), str(hard)]


@pytest.mark.parametrize("rare", [True, False])
def test_the_collector_frees_garbage_and_exempts_all_other_objects(rare: bool) -> None:
    *facts, change = run(COLLECTOR.format(rare=rare))
    assert facts == ["True"] * 3
    # From 3.14 on, Python has no third generation to set a threshold for.
    assert int(change) > 0 if rare and sys.version_info < (3, 14) else int(change) == 0
