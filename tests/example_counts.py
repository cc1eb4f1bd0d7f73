"""How many examples Hypothesis draws in the tests whose examples cost most.

In the run that each change has to pass, as many as usually find what a change has broken; ``nox -s fuzz`` multiplies
them by the variable ``EXAMPLE_TIMES``.
"""

from __future__ import annotations

import os
from typing import Final

__all__ = ["examples"]

_TIMES: Final = int(os.environ.get("EXAMPLE_TIMES", "1"))


def examples(count: int) -> int:
    """Return how many examples to draw, where each run draws ``count``."""
    return count * _TIMES
