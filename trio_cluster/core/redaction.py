"""API keys, and invitations of workers, in text that is not meant to have any.

Clients, and people at a terminal, put keys where they do not belong: into the header with a request's id, or in the
place of a key's name. Such text is logged, and some of it is stored. What looks like a key that was made here is
therefore taken out of every line of the log, and not accepted as a request id.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["has_key", "without_keys"]

_MARKS: Final = ("tc-", "tcj-")
_KEY: Final = re.compile(r"(tcj?-)[0-9A-Za-z_-]{32,}")


def has_key(text: str) -> bool:
    """Tell whether there is something in ``text`` that looks like an API key or an invitation."""
    return any(mark in text for mark in _MARKS) and _KEY.search(text) is not None


def without_keys(text: str) -> str:
    """Return ``text`` with ``tc-...`` or ``tcj-...`` in the place of what looks like an API key or an invitation."""
    return _KEY.sub(r"\1...", text) if any(mark in text for mark in _MARKS) else text
