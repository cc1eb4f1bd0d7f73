"""A master whose clients all have one key, with limits that they do not reach; or with none.

It ends with whoever has started it. Prints ``port N`` when it serves.

    python bench/limited.py PORT off|memory|URL STATE_DIR
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import trio
from node import end_with_standard_input

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.core.principal import Limits, Principal

MANY = 10**9


class OneKey:
    """An authenticator."""

    def __init__(self, limits: Limits | None) -> None:
        self._principal = Principal("bench", "admin", limits=limits)

    async def authenticate(self, context: Any) -> Principal:
        """Return who asks."""
        return self._principal


async def serve(port: int, where: str, state_dir: str) -> None:
    """Serve until cancelled."""
    options = ClusterServerOptions(ServerOptions(host="127.0.0.1", port=port), state_dir=state_dir)
    if where not in ("off", "memory"):
        options.limits = where
    server = ClusterServer(options)
    server.authenticator = OneKey(None if where == "off" else Limits(MANY, MANY, MANY, 10**12))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_master)
        print(f"port {port}", flush=True)


if __name__ == "__main__":
    end_with_standard_input()
    logging.basicConfig(level=logging.ERROR)
    trio.run(serve, int(sys.argv[1]), sys.argv[2], sys.argv[3])
