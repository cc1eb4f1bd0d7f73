"""The names and addresses of this machine, for a certificate."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress

from .sockets import outward_address

__all__ = ["own_names"]


def own_names(host: str, extra: Sequence[str] = ()) -> list[str]:
    """Return the names and addresses of this machine under which a server on ``host`` may be reached. Blocks.

    Args:
        host: the address on which it listens; all addresses of the machine if it is a wildcard.
        extra: further names and addresses.
    """
    found = {"localhost", "127.0.0.1", "::1", socket.gethostname(), *extra}
    if host in ("0.0.0.0", "::", ""):
        found.add(outward_address())
        with suppress(OSError):
            found |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    else:
        found.add(host)
    # A zone is a matter of this machine, and not a part of an address in a certificate.
    return sorted(name for name in found if name and name.isascii() and "%" not in name)
