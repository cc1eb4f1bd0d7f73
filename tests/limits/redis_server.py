"""A private Redis or Valkey server for tests: on a free port of this machine, with its files in its own directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["REDIS", "RedisServer", "redis_server"]

#: The program; ``None`` if neither is installed.
REDIS = shutil.which("redis-server") or shutil.which("valkey-server")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class RedisServer:
    """The server. Everything here blocks, for moments."""

    def __init__(self, directory: Path, *tls: str) -> None:
        self._directory = directory
        self._tls = tls
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"{'rediss' if self._tls else 'redis'}://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        assert REDIS is not None
        self._process = subprocess.Popen(
            [REDIS, "--bind", "127.0.0.1", "--dir", str(self._directory),
             *(("--port", "0", "--tls-port") if self._tls else ("--port",)), str(self.port), *self._tls,
             "--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--daemonize", "no"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 10
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 1) as client,
            ):
                client.sendall(b"PING\r\n")
                if self._tls or client.recv(100).startswith(b"+PONG"):
                    return
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.02)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        assert self._process is not None
        self._signal(signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)


@contextlib.contextmanager
def redis_server(directory: Path, *tls: str) -> Iterator[RedisServer]:
    """Run a server for the length of a block.

    Args:
        directory: for its files.
        tls: options, with which it speaks TLS.
    """
    server = RedisServer(directory, *tls)
    try:
        yield server
    finally:
        with contextlib.suppress(OSError):
            server.kill()
