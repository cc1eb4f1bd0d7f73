"""Random numbers: the jitter of waits, and ids that must differ between processes.

They do not come from Python's global ``random`` generator, which belongs to the user's program. Programs that serve
models often begin with ``random.seed(0)``; a hundred workers that share a seed would draw the same jitter and reconnect
at the same instant, and two processes would draw the same id. None of these ids is a secret; knowing one gives no
access. What is a secret comes from :func:`secret`.

``trio_cluster.testing`` seeds the generator, so that a simulated cluster draws the same numbers again.
"""

from __future__ import annotations

import os
import random
import secrets

__all__ = ["generator", "secret", "token", "uniform"]

#: The generator of all random numbers in this package; seeded by the operating system.
generator = random.Random()

if hasattr(os, "register_at_fork"):
    # Otherwise all child processes of one parent would draw the same ids.
    os.register_at_fork(after_in_child=generator.seed)


def uniform(low: float, high: float) -> float:
    """Return a number between ``low`` and ``high``."""
    return generator.uniform(low, high)


def token(size: int) -> str:
    """Return an id of ``size`` random bytes, as hexadecimal digits."""
    return generator.randbytes(size).hex()


def secret(size: int) -> str:
    """Return ``size`` random bytes that cannot be guessed, as hexadecimal digits. They are never seeded."""
    return secrets.token_hex(size)
