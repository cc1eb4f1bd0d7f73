"""The paths of a master's API with which workers join a cluster; they need no key."""

from __future__ import annotations

from typing import Final

__all__ = ["CA_PATH", "JOIN_PATH", "JOIN_PATHS", "MAX_JOIN_BODY", "RENEW_PATH"]

#: The certificates of the cluster's authority, which are public.
CA_PATH: Final = "/cluster/ca.pem"
#: Where a worker shows the secret of its invitation.
JOIN_PATH: Final = "/cluster/join"
#: Where a worker gets a new certificate for the one that it has.
RENEW_PATH: Final = "/cluster/renew"
JOIN_PATHS: Final = frozenset({CA_PATH, JOIN_PATH, RENEW_PATH})

#: Bytes of the body of a request to them, which anybody may send.
MAX_JOIN_BODY: Final = 32 * 1024
