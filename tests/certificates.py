"""Certificates for tests: an authority that is made once, and contexts for both ends of a connection."""

from __future__ import annotations

import datetime
import functools
import ssl
import tempfile
from pathlib import Path

from trio_cluster.core.state_dir import StateDir
from trio_cluster.net.sockets import Listeners, Network
from trio_cluster.net.streams import ByteStream
from trio_cluster.net.tls import TlsListener, connect_tls
from trio_cluster.security.authority import MASTER_NAME, Authority
from trio_cluster.security.contexts import client_context, server_context

__all__ = ["TlsEverywhere", "authority", "client_side", "now", "server_side"]


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    # Removed when the process ends.
    return tempfile.TemporaryDirectory()


@functools.cache
def authority() -> Authority:
    return Authority(StateDir(Path(_directory().name) / "authority"), now())


@functools.cache
def server_side() -> ssl.SSLContext:
    """Return the context of a port whose certificate is for this machine."""
    certificate = authority().server_certificate(["127.0.0.1", "localhost"], now())
    return server_context(certificate, None, alpn=["http/1.1"], clients=authority().trusted, tickets=False)


@functools.cache
def client_side() -> ssl.SSLContext:
    return client_context(authority=authority().trusted)


class TlsEverywhere:
    """A network on which every connection speaks TLS, with the same certificate on every port."""

    def __init__(self, network: Network) -> None:
        self._network = network

    async def listen(self, host: str, port: int) -> Listeners:
        return [TlsListener(each, server_side) for each in await self._network.listen(host, port)]

    async def connect(self, host: str, port: int) -> ByteStream:
        return await connect_tls(await self._network.connect(host, port), client_side(), MASTER_NAME)
