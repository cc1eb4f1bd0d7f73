"""The aliases of a node: those of its configuration, and those that were added in code.

The aliases of the configuration are replaced all at once, so that it can be read again while the node runs: a request
sees either the old ones or the new ones. Where both have a name, the configuration counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.aliases import AliasTarget, AliasTargets, check_loops, read_aliases

__all__ = ["Aliases"]


class Aliases:
    """The aliases of a node.

    Attributes:
        table: all aliases, with what they stand for. It is never changed, only replaced. Empty if there are none.
    """

    def __init__(self) -> None:
        self.table: Mapping[str, AliasTarget] = {}
        self._configured: Mapping[str, AliasTarget] = {}
        self._added: Mapping[str, AliasTarget] = {}

    def configure(self, aliases: AliasTargets | None) -> None:
        """Replace all aliases of the configuration. Synchronous.

        Raises:
            TypeError, ValueError: see :func:`~trio_cluster.core.aliases.read_aliases`; nothing has changed then.
        """
        self._replace({} if aliases is None else read_aliases(aliases), self._added)

    def add(self, name: str, target: str | Sequence[str] | Mapping[str, float]) -> None:
        """Add an alias, or replace one that was added before. Synchronous.

        Raises:
            TypeError, ValueError: see :func:`~trio_cluster.core.aliases.read_aliases`; nothing has changed then.
        """
        self._replace(self._configured, {**self._added, **read_aliases({name: target})})

    def remove(self, name: str) -> bool:
        """Remove an alias that was added. Synchronous.

        Returns:
            Whether it was there. One of the configuration stays.
        """
        if name not in self._added:
            return False
        self._replace(self._configured, {key: value for key, value in self._added.items() if key != name})
        return True

    def _replace(self, configured: Mapping[str, AliasTarget], added: Mapping[str, AliasTarget]) -> None:
        table = {**added, **configured}
        # Each of the two may be without a circle, and both together not.
        check_loops(table)
        self._configured, self._added, self.table = configured, added, table
