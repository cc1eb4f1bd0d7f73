"""Durations as people write them."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["parse_duration"]

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([smhdw])")


def parse_duration(text: str) -> float:
    """Return a duration in seconds.

    Args:
        text: a number and a unit: ``s``, ``m``, ``h``, ``d`` or ``w``.

    Raises:
        ValueError: it is none.
    """
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"expected a duration such as 30m, 12h or 2d (s, m, h, d, w), got {text!r}")
    return float(found[1]) * _UNITS[found[2]]
