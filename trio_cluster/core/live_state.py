"""What a node shows live: encoded items of three kinds, each with an id. See ``admin/events.py``.

The types are here, since two folders that know nothing of each other use them: the admin application, which makes the
items, and the group, which collects those of several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Final, Protocol, TypeAlias

__all__ = ["LIVE_KINDS", "LiveSiblings", "LiveState"]

LIVE_KINDS: Final = ("requests", "workers", "models")

#: Everything that is shown: for each kind the items as JSON objects, by their ids. What has not changed from one look
#: to the next stays the same object.
LiveState: TypeAlias = Mapping[str, Mapping[str, bytes]]


class LiveSiblings(Protocol):
    """The other processes of a group, as sources of what is shown."""

    own: Callable[[], LiveState]
    """Returns what this process has to show, for the others. Synchronous. To be set by the one who knows it."""

    def watching(self) -> AbstractContextManager[None]:
        """Return a context during which the states of the others are collected."""
        ...

    async def wait_known(self) -> None:
        """Wait until the others have answered once, for a moment at most. A checkpoint."""
        ...

    def merged(self, own: LiveState) -> LiveState:
        """Return the state of all processes, as far as it is known now. Synchronous.

        Args:
            own: that of this process.
        """
        ...
