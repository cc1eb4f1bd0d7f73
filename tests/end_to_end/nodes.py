"""Real processes of the ``trio-cluster`` command: started, watched by what they log, and never left behind.

The log is read as JSON, one object a line. Whatever else appears on standard error (a traceback, a warning,
which is an error in these processes too, a library's complaint) fails the test, except for the one line with
which the command says why it exits.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import fork_server
import httpx
import patience
import trio
from fork_server import ForkedProcess
from served import RawStream, until

import trio_cluster

__all__ = ["APP", "NOT_RESUMED", "Node", "Nodes", "Stream", "free_pair", "guardians_of", "open_nodes"]

#: The application that the processes load. ``MODELS`` in the environment names its models.
APP: Final = """\
import hashlib
import os
from pathlib import Path

import trio

from trio_cluster import ClusterServer, OutputChunk

server = ClusterServer()


async def count(request):
    how = "cancelled"
    try:
        for i in range(request.raw.get("ticks", 3)):
            yield f"{i} "
            await trio.sleep(request.raw.get("pause", 0.02))
        how = "finished"
    finally:
        with Path("notes").open("a") as notes:
            notes.write(f"{request.model} {how}\\n")


async def who(request):
    return str(os.getpid())


for name in os.environ["MODELS"].split():
    server.register_chat(name, who if name == "who" else count)


@server.asr(f"digest-{os.getpid()}")
async def digest(request):
    yield hashlib.sha256(request.audio).hexdigest()
"""

#: Arguments of a master that takes a worker for lost as soon as its link ends. The link of a worker that is killed ends
#: with a reset where its kernel had bytes for it, and calls would wait for such a link to be resumed.
NOT_RESUMED: Final = ("--resume-window", "0")

_READY: Final = {"run": "serving", "master": "serving", "worker": "registered with the master"}
_LAST_WORD: Final = "trio-cluster: error: "


def free_pair() -> int:
    """Return a port that is free, as is the one 1000 above it.

    Both lie below those that the system gives to outgoing connections: a server that is started again on its
    old port must not find a client there.
    """
    while True:
        port = random.randrange(12_000, 31_000)
        try:
            for each in (port, port + 1000):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", each))
        except OSError:
            continue
        return port


def guardians_of(node: Node) -> list[int]:
    """Return the processes that watch over a node, be it that it has ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            len(words) > 4
            and words[3].endswith(b"guardian_process.py")
            and words[4] == b"%d" % node.process.pid
        ):
            found.append(int(path.parent.name))
    return found


class Node:
    """One process.

    Attributes:
        port: of the API that it serves or, if it is a worker, of its master's.
        tls: whether that is served with TLS.
        entries: what it has logged.
        noise: other lines on its standard error.
    """

    def __init__(self, process: ForkedProcess | trio.Process, command: str, port: int) -> None:
        self.process = process
        self.command = command
        self.port = port
        self.tls = False
        self.entries: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self._seen = 0
        self._news = trio.Event()

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def log(self, message: str, within: float = 10, **fields: Any) -> dict[str, Any]:
        """Wait for a line in its log, which comes after the one that the last call returned.

        Args:
            message: how the line begins.
            fields: what else has to be in it.
        """
        try:
            with patience.fail_after(within):
                while True:
                    for entry in self.entries[self._seen :]:
                        self._seen += 1
                        if entry["message"].startswith(message) and fields.items() <= entry.items():
                            return entry
                    assert self.process.stderr is not None, f"it has exited: {self._told()}"
                    self._news = trio.Event()
                    await self._news.wait()
        except trio.TooSlowError:
            raise AssertionError(f"no {message!r} with {fields} within {within} s: {self._told()}") from None

    def logged(self, message: str, **fields: Any) -> list[dict[str, Any]]:
        """Return all such lines so far."""
        return [
            entry
            for entry in self.entries
            if entry["message"].startswith(message) and fields.items() <= entry.items()
        ]

    async def exit_code(self, within: float = 10) -> int:
        """Wait until it has exited; its standard error has been read to the end then."""
        try:
            with patience.fail_after(within):
                await self.process.wait()
                while self.process.stderr is not None:
                    self._news = trio.Event()
                    await self._news.wait()
        except trio.TooSlowError:
            raise AssertionError(f"still running after {within} s: {self._told()}") from None
        code = self.process.returncode
        assert code is not None
        return code

    async def read(self) -> None:
        """Read its standard error to the end."""
        assert self.process.stderr is not None
        rest = b""
        async for data in self.process.stderr:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line.decode())
            self._news.set()
        self.process.stderr = None
        self._news.set()

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            self.noise.append(line)
            return
        self.entries.append(entry)
        if entry["message"] == "serving":
            self.port = int(entry["url"].rpartition(":")[2])

    def _told(self) -> str:
        return "\n".join([*map(json.dumps, self.entries), *self.noise])

    def check_was_quiet(self) -> None:
        """Fail if it complained in any way that is not a log line."""
        complaints = [line for line in self.noise if not line.startswith(_LAST_WORD)]
        complaints += [entry["traceback"] for entry in self.entries if "traceback" in entry]
        assert not complaints, "\n".join(complaints)
        assert len(self.noise) <= 1


class Nodes:
    """Starts processes in one directory."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.all: list[Node] = []
        self._nursery = nursery
        (directory / "app.py").write_text(APP)

    async def start(
        self,
        command: str,
        *arguments: str | int,
        models: str = "",
        ready: bool = True,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> Node:
        """Start one.

        Args:
            command: of ``trio-cluster``; or the file of a program, which is its own command line.
            arguments: of the command; all that matter to every node are added.
            models: the names of its models; without any it serves none.
            ready: wait until it is.
            variables: of its environment, beside those that it has anyway.
        """
        program = [command] if command.endswith(".py") else ["-m", "trio_cluster", command]
        words = [*program, *map(str, arguments), "--log-format", "json"]
        if command != "worker":
            words += ["--host", "127.0.0.1"]
        if models:
            words += ["--app", "app:server"]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TRIO_CLUSTER_")}
        environ |= {"MODELS": models, "PYTHONPATH": str(Path(trio_cluster.__file__).parents[1]), **variables}
        process = fork_server.start(words, cwd=self.directory, env=environ)
        node = Node(process, command, next((word for word in arguments if isinstance(word, int)), 0))
        self.watch(node)
        if ready:
            await node.log(_READY.get(command, _READY["run"]))
        return node

    def watch(self, node: Node) -> None:
        """Read what a process logs that has been started in another way, and end it with the others."""
        self.all.append(node)
        self._nursery.start_soon(node.read)

    async def master(self, *arguments: str | int, models: str = "") -> Node:
        """Start a master on a pair of ports that it picks itself."""
        return await self.start("master", 0, *arguments, models=models)

    async def worker(self, master: Node, name: str, *arguments: str, models: str, ready: bool = True) -> Node:
        """Start a worker of ``master``."""
        return await self.start(
            "worker", "127.0.0.1", master.port, "--name", name, *arguments, models=models, ready=ready
        )

    def notes(self) -> list[str]:
        """Return what the handlers of all processes have written down when they ended."""
        path = self.directory / "notes"
        return path.read_text().splitlines() if path.exists() else []

    async def end_all(self) -> None:
        """Kill those that run still, and fail if anything of them is left."""
        for node in self.all:
            if node.process.returncode is None:
                node.send(signal.SIGKILL)
        for node in self.all:
            await node.exit_code()
        for node in self.all:
            try:
                os.killpg(node.process.pid, 0)
            except ProcessLookupError:
                pass
            else:
                raise AssertionError(f"{node.command} has left processes behind")
            # A guardian may have to find out that there is no master left.
            await until(lambda node=node: not guardians_of(node), within=10)
            if node.port:
                for port in (node.port, node.port + 1000):
                    with socket.socket() as sock:
                        assert sock.connect_ex(("127.0.0.1", port)) != 0, f"port {port} is still served"


@asynccontextmanager
async def open_nodes(directory: Path) -> AsyncIterator[Nodes]:
    """Be where processes can be started; they are gone afterwards, whatever happens."""
    async with trio.open_nursery() as nursery:
        nodes = Nodes(directory, nursery)
        try:
            yield nodes
        finally:
            with trio.CancelScope(shield=True):
                await nodes.end_all()
        nursery.cancel_scope.cancel()
    for node in nodes.all:
        node.check_was_quiet()


class Stream:
    """A client's view of one streamed answer, which is read in the background."""

    def __init__(self) -> None:
        self._received = b""
        self._news = trio.Event()
        self._result: RawStream | None = None

    async def read(self, url: str, body: dict[str, Any], *, task_status: trio.TaskStatus[Stream]) -> None:
        """Ask for it and read it to its end; started when two pieces of text are there."""
        status, whole = 0, True
        limits: dict[str, Any] = {"timeout": 20, "trust_env": False, "verify": False}
        async with httpx.AsyncClient(base_url=url, **limits) as client:
            try:
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    status = response.status_code
                    begun = False
                    async for piece in response.aiter_raw():
                        self._received += piece
                        if not begun and b"1 " in self._received:
                            begun = True
                            task_status.started(self)
            except (httpx.RemoteProtocolError, httpx.ReadError):
                whole = False
        self._result = RawStream(status, self._received, whole)
        self._news.set()

    @property
    def is_running(self) -> bool:
        return self._result is None

    @property
    def received(self) -> bytes:
        """What has come so far, which is the body as the server has sent it."""
        return self._received

    async def end(self, within: float) -> RawStream:
        """Wait for its end."""
        with patience.fail_after(within):
            await self._news.wait()
        assert self._result is not None
        return self._result
