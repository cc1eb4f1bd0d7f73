"""Amounts of memory as people write them."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["format_size", "parse_size"]

_SIZE: Final = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]{1,9})?)\s*(?P<unit>[A-Za-z]*)")
#: The bytes of each unit: those with an ``i`` by 1024, the others by 1000, as disks and the kernel count them.
_UNITS: Final = {
    "": 1,
    "b": 1,
    **{
        f"{letter}{infix}b": base**power
        for power, letter in enumerate("kmgt", 1)
        for infix, base in (("i", 1024), ("", 1000))
    },
}


def parse_size(value: object) -> int:
    """Return a number of bytes: a whole number of them, or a text such as ``20GiB``, ``512 MiB`` or ``1.5GB``.

    Synchronous.

    Raises:
        ValueError: it is neither, or not more than 0; the message says what was expected.
    """
    size = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (found := _SIZE.fullmatch(value.strip())) is not None:
        unit = _UNITS.get(found["unit"].lower())
        size = 0 if unit is None else round(float(found["number"]) * unit)
    if not 0 < size < 1 << 63:
        raise ValueError(f"expected an amount of memory such as 20GiB or 512MiB, got {value!r}")
    return size


def format_size(size: float) -> str:
    """Return a number of bytes as people read it: ``20 GiB``. Synchronous."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
