"""Which masters a worker serves: those of a list, or those at the addresses that a DNS name has.

A source of masters runs for as long as the worker does, and calls back whenever the masters are others than before. It
knows nothing of links: a master that does not answer stays on the list.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Final, NoReturn, Protocol

import trio

from ..net.sockets import resolve, why_not_connected
from .dialer import Dialer

__all__ = ["ListedMasters", "Masters", "ResolvedMasters"]

logger = logging.getLogger("trio_cluster.client")

#: Seconds between two resolutions of a name. Names of services in orchestrators live for 5 to 30 s in caches.
_RESOLVE_INTERVAL: Final = 5.0
#: Resolutions in a row without an address after which it counts as gone: some servers give only a part of the addresses
#: each time.
_GONE_AFTER: Final = 3


class Masters(Protocol):
    """Says which masters there are."""

    async def run(self, follow: Callable[[Iterable[Dialer]], None]) -> NoReturn:
        """Call ``follow`` with a dialer for each master, and again whenever they change, until cancelled.

        A master keeps its dialer for as long as it is there.
        """
        ...


class ListedMasters:
    """Masters that do not change.

    Args:
        dialers: one for each; all are run, too.
        helper: is run as well; ``None``: nothing is.
    """

    def __init__(self, dialers: Sequence[Dialer], helper: Dialer | None = None) -> None:
        self._dialers = dialers
        self._helper = helper

    async def run(self, follow: Callable[[Iterable[Dialer]], None]) -> NoReturn:
        """See ``Masters``."""
        follow(self._dialers)
        async with trio.open_nursery() as nursery:
            for dialer in self._dialers if self._helper is None else (*self._dialers, self._helper):
                nursery.start_soon(dialer.run)
        raise AssertionError("unreachable: dialers run until this is cancelled")


class ResolvedMasters:
    """The masters at all addresses that a name has, which is resolved again and again.

    A resolution that fails changes nothing. An address that is missing in three resolutions in a row is gone.

    Args:
        name: the DNS name.
        make_dialer: makes the dialer of an address.
        helper: is run as well; ``None``: nothing is.
        addresses_of: resolves a name; raises ``OSError`` if that fails.
    """

    def __init__(
        self,
        name: str,
        make_dialer: Callable[[str], Dialer],
        helper: Dialer | None = None,
        addresses_of: Callable[[str], Awaitable[Collection[str]]] = resolve,
    ) -> None:
        self._name = name
        self._make_dialer = make_dialer
        self._helper = helper
        self._addresses_of = addresses_of
        self._dialers: dict[str, Dialer] = {}
        # How many resolutions in a row each address was missing in.
        self._missing: dict[str, int] = {}
        self._failing = False

    async def run(self, follow: Callable[[Iterable[Dialer]], None]) -> NoReturn:
        """See ``Masters``."""
        async with trio.open_nursery() as nursery:
            if self._helper is not None:
                nursery.start_soon(self._helper.run)
            while True:
                if await self._resolve():
                    follow(self._dialers.values())
                await trio.sleep(_RESOLVE_INTERVAL)
        raise AssertionError("unreachable: the name is resolved until this is cancelled")

    async def _resolve(self) -> bool:
        """Resolve the name, and return whether the masters are others than before."""
        fields: dict[str, object] = {"name": self._name}
        try:
            found = await self._addresses_of(self._name)
        except OSError as error:
            if not self._failing:
                known = len(self._dialers)
                why = why_not_connected(error)
                text = "the name of the masters cannot be resolved: %s"
                logger.warning(text, why, extra={"fields": fields | {"known": known}})
            self._failing = True
            return False
        if self._failing:
            self._failing = False
            logger.info("the name of the masters is resolved again", extra={"fields": fields})
        before = set(self._dialers)
        for address in sorted(found):
            self._missing.pop(address, None)
            if address not in self._dialers:
                self._dialers[address] = self._make_dialer(address)
        for address in before.difference(found):
            self._missing[address] = self._missing.get(address, 0) + 1
            if self._missing[address] >= _GONE_AFTER:
                del self._missing[address], self._dialers[address]
        changed = before != set(self._dialers)
        if changed:
            logger.info("masters found", extra={"fields": fields | {"addresses": sorted(self._dialers)}})
        return changed
