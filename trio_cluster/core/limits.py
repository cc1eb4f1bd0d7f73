"""Bounds that several rooms share."""

from __future__ import annotations

from typing import Final

__all__ = ["WINDOW"]

#: Bytes of a body that may wait for their consumer, on each node that the body passes and on each link between two
#: nodes; so the credit that a call begins with in each direction.
WINDOW: Final = 256 * 1024
