"""A process that is a node and nothing else: its limit of descriptors, and its garbage collector."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: nobody else's limits and collector are to be changed.
LIMITS = """
import resource
from trio_cluster.cli.process import allow_connections
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
told = allow_connections()
print(told, *resource.getrlimit(resource.RLIMIT_NOFILE))
"""

COLLECTOR = """
import gc, weakref
from trio_cluster.cli.process import calm_collector
class Node: pass
node = Node(); node.itself = node; garbage = weakref.ref(node); del node
before = gc.get_threshold()
calm_collector(rarely={rarely})
after = gc.get_threshold()
print(gc.get_freeze_count() > 1000, garbage() is None, after[:2] == before[:2], after[2] - before[2])
"""


def run(program: str) -> list[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.split()


@pytest.mark.parametrize(("soft", "hard", "then"), [(256, 1500, 1500), (1500, 1500, 1500)])
def test_the_process_may_have_as_many_descriptors_as_the_system_allows(
    soft: int, hard: int, then: int
) -> None:
    assert run(LIMITS.format(soft=soft, hard=hard)) == [str(then), str(then), str(hard)]


@pytest.mark.parametrize("rarely", [True, False])
def test_the_collector_leaves_alone_what_is_there_except_garbage(rarely: bool) -> None:
    *facts, change = run(COLLECTOR.format(rarely=rarely))
    assert facts == ["True"] * 3
    # From 3.14 on, Python has no third generation to set a threshold for.
    assert int(change) > 0 if rarely and sys.version_info < (3, 14) else int(change) == 0
