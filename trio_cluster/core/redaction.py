"""API keys in text that is not meant to have any.

Clients, and people at a terminal, put keys where they do not belong: into the header with a request's id, or in the
place of a key's name. Such text is logged, and some of it is stored. What looks like a key that was made here is
therefore taken out of every line of the log, and not accepted as a request id.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["has_key", "without_keys"]

_MARK: Final = "tc-"
_KEY: Final = re.compile(r"tc-[0-9A-Za-z_-]{32,}")


def has_key(text: str) -> bool:
    """Tell whether there is something in ``text`` that looks like an API key."""
    return _MARK in text and _KEY.search(text) is not None


def without_keys(text: str) -> str:
    """Return ``text`` with ``tc-...`` in the place of what looks like an API key."""
    return _KEY.sub("tc-...", text) if _MARK in text else text
