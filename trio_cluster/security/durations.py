"""Durations as people write them."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["parse_duration"]

_UNITS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw]?)")


def parse_duration(text: str) -> float:
    """Return a duration in seconds.

    Args:
        text: a number and a unit, ``s``, ``m``, ``h``, ``d`` or ``w``; without a unit it is seconds.

    Raises:
        ValueError: it is none.
    """
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"expected a duration such as 30m, 1h or 2d, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]
