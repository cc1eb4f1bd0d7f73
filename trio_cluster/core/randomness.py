"""Chance, in one place: the jitter of waits, and ids that must differ between processes.

It is not Python's own ``random``, which belongs to the user's program. Programs that serve models like to begin with
``random.seed(0)``; with it, a hundred workers would draw the same jitter and come back as one, and two processes would
draw the same id. Nothing here is a secret: whoever knows an id gains nothing by it.

The test kit seeds it, and then a simulation of a cluster draws the same numbers again.
"""

from __future__ import annotations

import os
import random

__all__ = ["generator", "token", "uniform"]

#: Where all chance comes from; seeded by the operating system.
generator = random.Random()

if hasattr(os, "register_at_fork"):
    # Otherwise all children of one parent would draw the same ids.
    os.register_at_fork(after_in_child=generator.seed)


def uniform(low: float, high: float) -> float:
    """Return a number between ``low`` and ``high``."""
    return generator.uniform(low, high)


def token(size: int) -> str:
    """Return an id of ``size`` random bytes, in hexadecimal."""
    return generator.randbytes(size).hex()
