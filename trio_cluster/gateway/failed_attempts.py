"""Slowing down clients that guess API keys.

Each address has a level: a wrong key raises it by one, and it falls by :data:`FREE` a minute. Above :data:`FREE`, every
further refusal of this address waits, twice as long each time, up to :data:`MAX_DELAY`. A few refusals of one address
may wait at once; further ones are refused with 429 without a wait.

A valid key is not affected, also one from the same address: behind one address there may be a whole office. A key of
256 random bits is not guessed at any speed; what this makes slow is guessing the options ``api_key`` and
``operator_key``, which people may have made up.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import Final

import attrs
import trio

from ..errors import ApiError

__all__ = ["FREE", "MAX_ADDRESSES", "MAX_DELAY", "FailedAttempts"]

#: Wrong keys of one address in a minute that cost it nothing.
FREE: Final = 10

#: Seconds that a refusal waits: the first one that does, and at most.
_FIRST_DELAY: Final = 0.25
MAX_DELAY: Final = 4.0

#: Addresses that are remembered. The one that was refused least recently makes room.
MAX_ADDRESSES: Final = 4096

#: Refusals that wait at once: of one address, and of all.
_MAX_WAITING: Final = 8
_MAX_ALL_WAITING: Final = 256


@attrs.define
class _Attempts:
    level: float = 0.0
    at: float = 0.0
    """The trio time of the level."""
    waiting: int = 0


class FailedAttempts:
    """Counts the wrong keys of each address."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, _Attempts] = OrderedDict()
        self._waiting = 0

    def __len__(self) -> int:
        return len(self._addresses)

    async def refused(self, client: str) -> None:
        """Count a wrong key, and wait if there were many. A checkpoint if there were.

        Args:
            client: the address from which it came, with its port.

        Raises:
            ApiError: 429: too many of this address wait already.
        """
        attempts = self._attempts(_network_of(client))
        now = trio.current_time()
        attempts.level = max(0.0, attempts.level - (now - attempts.at) * FREE / 60) + 1
        attempts.at = now
        if attempts.level <= FREE:
            return
        # The exponent is bounded: the level of a client that goes on and on may be any number.
        delay = min(MAX_DELAY, _FIRST_DELAY * 2 ** min(attempts.level - FREE, 10))
        if attempts.waiting >= _MAX_WAITING or self._waiting >= _MAX_ALL_WAITING:
            raise ApiError(
                429,
                "Too many requests without a valid API key came from this address",
                code="too_many_failures",
                retry_after=MAX_DELAY,
            )
        attempts.waiting += 1
        self._waiting += 1
        try:
            await trio.sleep(delay)
        finally:
            attempts.waiting -= 1
            self._waiting -= 1

    def _attempts(self, network: str) -> _Attempts:
        attempts = self._addresses.get(network)
        if attempts is None:
            attempts = self._addresses[network] = _Attempts()
            if len(self._addresses) > MAX_ADDRESSES:
                self._addresses.popitem(last=False)
        self._addresses.move_to_end(network)
        return attempts


def _network_of(client: str) -> str:
    """Return what counts as one address: an IPv4 address, or the /64 of an IPv6 address, which one user may have."""
    host = client.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
