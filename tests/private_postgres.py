"""A PostgreSQL server of the tests' own: in a temporary directory, on a socket there, and on no network."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["PrivatePostgres", "open_postgres"]

#: The server does not run as root.
_USER = "postgres"


class PrivatePostgres:
    """A server that can be killed and started again.

    Attributes:
        directory: where its data and its socket are.
    """

    def __init__(self, programs: Path, directory: Path) -> None:
        self.directory = directory
        self._programs = programs
        self._made = False
        self._run("initdb", "-D", self._data, "-A", "trust", "-U", "tester", "--no-sync", "-E", "UTF8")
        self.start()

    @property
    def _data(self) -> str:
        return str(self.directory / "data")

    def url(self, name: str) -> str:
        """Return the URL of a database."""
        return f"postgresql://tester@/{name}?host={self.directory}"

    def create_database(self) -> str:
        """Return the URL of an empty database: the same one each time, since making one takes a thousand files."""
        import psycopg

        with psycopg.connect(
            host=str(self.directory), user="tester", dbname="postgres", autocommit=True
        ) as connection:
            if not self._made:
                connection.execute("CREATE DATABASE test")
                self._made = True
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'test'"
            )
        with psycopg.connect(
            host=str(self.directory), user="tester", dbname="test", autocommit=True
        ) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return self.url("test")

    def start(self) -> None:
        """Start the server, and wait until it takes connections."""
        options = f"-k {self.directory} -c listen_addresses='' -c fsync=off -c max_connections=50"
        log = str(self.directory / "log")
        # After a kill, the memory of the old server may be in use for a moment, and the new one refuses to start.
        for tries_left in reversed(range(50)):
            try:
                self._run("pg_ctl", "-D", self._data, "-o", options, "-l", log, "-w", "start")
                return
            except subprocess.CalledProcessError:
                if not tries_left:
                    raise
                time.sleep(0.2)

    def kill(self) -> None:
        """Kill the server and its connections, without any chance to clean up."""
        pid = int((self.directory / "data" / "postmaster.pid").read_text().split()[0])
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        for process in (pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def stop(self) -> None:
        """Stop the server."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", _USER, "--", *command]
        quiet = subprocess.DEVNULL
        subprocess.run(command, check=True, stdout=quiet, stderr=quiet, cwd="/", timeout=60)


@contextlib.contextmanager
def open_postgres() -> Iterator[PrivatePostgres]:
    """Run a server for the length of a block; skip the test, and say why, where that is not possible."""
    pytest.importorskip("psycopg")
    found = shutil.which("initdb")
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found is None and not versions:
        pytest.skip("PostgreSQL is not installed")
    programs = (Path(found).resolve() if found is not None else versions[-1]).parent
    # Short, since the path of a socket has at most a hundred characters.
    directory = Path(tempfile.mkdtemp(prefix="tcpg-"))
    try:
        if os.geteuid() == 0:
            try:
                user = pwd.getpwnam(_USER)
            except KeyError:
                pytest.skip(f"PostgreSQL does not run as root, and there is no user {_USER}")
            if shutil.which("runuser") is None:
                pytest.skip("PostgreSQL does not run as root, and there is no runuser")
            os.chown(directory, user.pw_uid, user.pw_gid)
        server = PrivatePostgres(programs, directory)
        try:
            yield server
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
