"""How a machine that sleeps is woken: the values of the option ``wake``."""

from __future__ import annotations

import re
import socket
from typing import Final

import attrs

__all__ = ["ASLEEP", "WAKE_PATTERN", "WakeTarget", "read_wake_target"]

#: What follows the name of a worker in the name of the backend that stands in for it while its machine sleeps.
ASLEEP: Final = ", asleep"
#: Where packets go if the option names no address: the network that this machine is in, and the port for "discard".
_BROADCAST: Final = ("255.255.255.255", 9)
_MAC: Final = "(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}"
_TARGET: Final = re.compile(rf"(?P<mac>{_MAC})(?:@(?P<address>[0-9.]+)(?::(?P<port>[0-9]{{1,5}}))?)?")
#: What a value looks like, for the schema of the file of options.
WAKE_PATTERN: Final = f"^{_MAC}(@[0-9.]+(:[0-9]{{1,5}})?)?$"


@attrs.frozen
class WakeTarget:
    """How a machine is woken."""

    mac: bytes
    """The hardware address of its network card: six bytes."""
    address: tuple[str, int] = _BROADCAST
    """Where the packet is sent: the broadcast address of its network, and a port, which does not matter."""

    @property
    def packet(self) -> bytes:
        """The magic packet."""
        return b"\xff" * 6 + self.mac * 16


def read_wake_target(text: str) -> WakeTarget:
    """Return what a value of the option ``wake`` means.

    Args:
        text: ``MAC``, ``MAC@ADDRESS`` or ``MAC@ADDRESS:PORT``.

    Raises:
        ValueError: it is none of these.
    """
    match = _TARGET.fullmatch(text)
    if match is None:
        raise ValueError(
            f"expected a hardware address such as 02:42:ac:11:00:02, perhaps with @BROADCAST, not {text!r}"
        )
    mac = bytes.fromhex(match["mac"].replace(":", "").replace("-", ""))
    host, port = match["address"] or _BROADCAST[0], int(match["port"] or _BROADCAST[1])
    try:
        socket.inet_aton(host)
    except OSError:
        raise ValueError(f"{host} is not an IPv4 address") from None
    if not 0 < port < 1 << 16:
        raise ValueError(f"{port} is not a port")
    return WakeTarget(mac, (host, port))
