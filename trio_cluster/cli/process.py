"""What belongs to a process that is a node and nothing else: file descriptors, garbage collector, terminal.

Only the command line changes them. A library must not change what belongs to the whole process of its user.
"""

from __future__ import annotations

import gc
import os
import resource
from typing import Final

__all__ = ["has_terminal", "raise_descriptor_limit", "tune_garbage_collector"]

#: The limit that is asked for. Each client takes one descriptor, and many systems allow a process 1024 by default.
_DESCRIPTORS: Final = 1 << 16

#: Collections of the middle generation between two full ones, where full ones are to be rare; Python's default is 10.
_RARE_THRESHOLD: Final = 1000


def has_terminal() -> bool:
    """Tell whether this process has a terminal, and that has not been closed. Synchronous."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def raise_descriptor_limit() -> int:
    """Raise this process's limit of file descriptors to the hard limit, or to 65536 if that is less. Synchronous.

    Returns:
        The limit afterwards. It is the old one if that was higher, or if the system refuses.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        # Some systems (macOS) have a lower limit, which getrlimit does not show.
        return soft
    return wanted


def tune_garbage_collector(*, rare: bool) -> None:
    """Exempt all objects of now from garbage collection, and so shorten its pauses. Blocks for one collection.

    A full collection looks at every object that is not new, and the event loop stands still meanwhile. With 5000
    streams there are 800 000 objects, which took a third of a second, eight times while the streams were opened.

    Args:
        rare: also make full collections a hundred times rarer. This is for a process in which no garbage waits for
            them: this package's requests leave no reference cycles behind, as a test makes sure. Users' handlers may.
    """
    gc.collect()
    gc.freeze()
    if rare:
        youngest, middle, _ = gc.get_threshold()
        gc.set_threshold(youngest, middle, _RARE_THRESHOLD)
