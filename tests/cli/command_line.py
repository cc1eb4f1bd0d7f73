"""The command line as its tests run it: an application to serve, and what comes out of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import attrs

from trio_cluster.server import ClusterServer

__all__ = ["APP", "Main", "Ran", "one_line"]

#: The source of a module with an application in it.
APP = """
from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions

server = ClusterServer(ClusterServerOptions(ServerOptions(max_concurrency=3, queue_timeout=7.0)))

@server.chat("echo")
async def echo(request):
    yield request.last_text

@server.chat("slow")
async def slow(request):
    import trio
    yield "begun"
    await trio.sleep_forever()

class nested:
    server = server

text = "not a server"
"""

#: Runs the command in this process; returns the exit code, standard output and standard error.
Main: TypeAlias = Callable[..., tuple[int, str, str]]


@attrs.define
class Ran:
    """Which ``run*`` method was called, its arguments, the server, whether it was to connect with TLS, and what
    else was given by name.
    """

    method: str
    arguments: tuple[Any, ...]
    server: ClusterServer
    tls: bool = False
    named: dict[str, Any] = attrs.field(factory=dict)


def one_line(err: str) -> str:
    """Return the error that is the only line of ``err``, without the prefix of all errors."""
    assert err.count("\n") == 1
    assert err.startswith("trio-cluster: error: ")
    return err.removeprefix("trio-cluster: error: ").rstrip("\n")
