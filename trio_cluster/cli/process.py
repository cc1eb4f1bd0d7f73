"""What a process does to itself that is a node and nothing else: room for connections, and a collector that keeps calm.

Only the command line does this. A library that is one of several in somebody's process leaves such things alone.
"""

from __future__ import annotations

import gc
import resource
from typing import Final

__all__ = ["allow_connections", "calm_collector"]

#: Each client is one file descriptor, and many systems let a process have 1024 of them unless it asks.
_DESCRIPTORS: Final = 1 << 16

#: Collections of the middle generation from one look at everything to the next; Python's own number is 10.
_RARELY: Final = 1000


def allow_connections() -> int:
    """Let this process have as many file descriptors as it may, up to 65536; return how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        # Some systems have another limit, of which they do not tell.
        return soft
    return wanted


def calm_collector(*, rarely: bool) -> None:
    """Let Python's garbage collector leave alone what is there now, and so make it quicker.

    A collection looks at every object that is older than it seems worth, and everybody waits meanwhile: with 5000
    streams there are 800 000, which took a third of a second, eight times while they were opened.

    Args:
        rarely: look at everything a hundred times less often than usual. For a process in which nothing waits for that:
            what a request leaves behind refers to nothing in a circle, as a test makes sure. Of users' code nobody
            knows.
    """
    gc.collect()
    gc.freeze()
    if rarely:
        youngest, middle, _ = gc.get_threshold()
        gc.set_threshold(youngest, middle, _RARELY)
