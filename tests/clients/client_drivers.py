"""The official clients, each in a process of its own that is told what to ask.

Each client lives in a *driver*: a small program in the client's own language, which reads orders from its standard
input and tells what became of them on its standard output, one JSON object a line. What is asked and what has to
come of it can so be written once, for all clients.

An order is ``{"id", "do"}`` with one of

- ``ask``: use the client. ``client`` are its settings, ``method`` is the way to one of its methods
  (``chat.completions.create``), ``positional`` and ``body`` are what it is given, ``headers`` are sent as well. A file
  in a body is ``{"$file": name, "base64", "type"}``. ``take`` events of a stream are read, or all. ``as_pieces``
  reads speech as it comes;
- ``abort``: have the client give up that call;
- ``forget``: close all connections.

What comes of it is any number of ``{"id", "event"}``, and in the end ``{"id", "end": true, "attempts"}`` with either
``value``, as JSON or base64, or ``error``. ``attempts`` are the times at which a request was sent, in seconds since
the first. ``complaints`` is what the client's own types say against an answer.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import attrs
import patience
import trio

__all__ = ["CLIENTS", "Answer", "Asking", "Client", "Driver", "Failure", "command_of", "file"]

#: The environment variable that says where the Node client has been installed.
NODE_FOLDER: Final = "OPENAI_NODE_FOLDER"

CLIENTS: Final = ("python", "node")

HERE: Final = Path(__file__).parent

_PATIENCE: Final = 30.0


def command_of(client: str) -> list[str] | str:
    """Return the command line of a driver, or say why there is none on this machine."""
    if client == "python":
        return [sys.executable, str(HERE / "python" / "driver.py")]
    node, folder = shutil.which("node"), os.environ.get(NODE_FOLDER)
    if node is None:
        return "there is no node on this machine"
    if folder is None or not (Path(folder) / "node_modules" / "openai").is_dir():
        return f"{NODE_FOLDER} does not name a folder with the Node client in it; see docs/testing.md"
    return [node, str(HERE / "node" / "driver.mjs"), folder]


def file(name: str, data: bytes, content_type: str) -> dict[str, str]:
    """Return what stands for a file in a body."""
    return {"$file": name, "base64": base64.b64encode(data).decode(), "type": content_type}


@attrs.frozen
class Failure:
    """The exception that a client has raised."""

    name: str
    """Its class, by the name that it has in Python; ``aborted`` if the call was given up."""
    is_api_error: bool
    """Whether it is one of the client's own for what the server has done, and not one of the library beneath."""
    message: str
    status: int | None = None
    code: str | None = None
    type: str | None = None
    param: str | None = None
    request_id: str | None = None


@attrs.frozen
class Answer:
    """What became of a call."""

    events: list[Any]
    value: Any
    """Of a stream, nothing."""
    failure: Failure | None
    attempts: list[float]
    complaints: list[str]
    request_id: str | None
    content_type: str | None

    @property
    def data(self) -> bytes:
        """The value, if it is sound."""
        assert self.failure is None, self.failure
        return base64.b64decode(self.value)


class Asking:
    """A call that is under way."""

    def __init__(self, driver: Driver, number: int) -> None:
        self._driver = driver
        self._number = number
        self._told: list[dict[str, Any]] = []
        self._news = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    @property
    def events(self) -> list[Any]:
        """What has come of its stream."""
        return [each["event"] for each in self._told if "event" in each]

    def hear(self, said: dict[str, Any]) -> None:
        """Take what the driver says about it. Called in the thread that listens to the driver."""

        def take() -> None:
            self._told.append(said)
            self._news.set()

        # A test that is over did not want to know.
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(take)

    async def receive_until(self, enough: Callable[[list[Any]], bool]) -> None:
        """Wait until the events that have come are enough; fail if there are no more."""
        with trio.fail_after(_PATIENCE):
            while not enough(self.events):
                assert not self.is_over, f"the answer is over: {self._told[-1]}"
                await self._wait()

    async def answer(self, within: float = _PATIENCE) -> Answer:
        """Wait until it is over."""
        with patience.fail_after(within):
            while not self.is_over:
                await self._wait()
        end = self._told[-1]
        return Answer(
            self.events,
            end.get("value"),
            self._failure(end.get("error")),
            end["attempts"],
            [complaint for each in self._told for complaint in each.get("complaints", ())],
            end.get("request_id"),
            end.get("type"),
        )

    async def abort(self) -> None:
        """Have the client give it up."""
        await self._driver.say({"id": self._number, "do": "abort"})

    @property
    def is_over(self) -> bool:
        """Whether there is an answer."""
        return bool(self._told) and "end" in self._told[-1]

    async def _wait(self) -> None:
        self._news = trio.Event()
        await self._news.wait()

    def _failure(self, error: dict[str, Any] | None) -> Failure | None:
        if error is None:
            return None
        name = error.pop("class")
        if name == "APIConnectionTimeoutError":
            name = "APITimeoutError"
        elif name == "APIError" and error["status"] is not None:
            # Node has one class for a status that has no class of its own and for an error in a stream.
            name = "APIStatusError"
        return Failure(name, **error)


class Driver:
    """A driver that runs.

    Attributes:
        client: the name of its client.
    """

    def __init__(self, client: str, command: list[str]) -> None:
        self.client = client
        self._asking: dict[int, Asking] = {}
        self._numbers = 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self._listener = threading.Thread(target=self._listen, name=f"driver of {client}")
        self._listener.start()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while data := self._process.stdout.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                asking = self._asking.get(said["id"])
                if "end" in said:
                    self._asking.pop(said["id"], None)
                if asking is not None:
                    asking.hear(said)

    async def say(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        data = json.dumps(order).encode() + b"\n"
        stdin = self._process.stdin

        def write() -> None:
            view = memoryview(data)
            while view:
                view = view[stdin.write(view) or 0 :]

        await trio.to_thread.run_sync(write)

    async def start(self, order: dict[str, Any]) -> Asking:
        """Have it do something, and return what is under way then."""
        self._numbers += 1
        asking = self._asking[self._numbers] = Asking(self, self._numbers)
        await self.say({"id": self._numbers, **order})
        return asking

    def client_of(self, url: str, **settings: Any) -> Client:
        """Return a client of a server: ``api_key``, ``max_retries``, ``timeout`` (seconds) are its settings."""
        defaults = {"api_key": "a-key", "max_retries": 0, "timeout": 10}
        return Client(self, {"base_url": f"{url}/v1", **defaults, **settings})

    async def forget(self) -> str:
        """Have it close all connections; return the version of the client."""
        asking = await self.start({"do": "forget"})
        version: str = (await asking.answer()).value
        return version


@attrs.define
class Client:
    """A client of one server.

    Attributes:
        driver: what drives it.
        settings: of the client itself.
    """

    driver: Driver
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Which of the clients it is."""
        return self.driver.client

    async def ask(self, method: str, *positional: Any, **more: Any) -> Answer:
        """Call a method of the client, and wait for what becomes of it; see :meth:`asking`."""
        async with self.asking(method, *positional, **more) as asking:
            return await asking.answer()

    @asynccontextmanager
    async def asking(
        self,
        method: str,
        *positional: Any,
        headers: dict[str, str] | None = None,
        take: int | None = None,
        as_pieces: bool = False,
        **body: Any,
    ) -> AsyncIterator[Asking]:
        """Call a method of the client, and be there while it is under way.

        Args:
            method: the way to it.
            positional: what it is given before the body.
            headers: what is sent beside the client's own.
            take: of how many events the client has enough.
            as_pieces: take the answer, which is sound, as it comes.
            body: the fields of the request.
        """
        order = {
            "do": "ask", "client": self.settings, "method": method, "positional": list(positional),
            "headers": headers or {}, "take": take, "as_pieces": as_pieces, "body": body,
        }  # fmt: skip
        asking = await self.driver.start(order)
        try:
            yield asking
        finally:
            if not asking.is_over:
                with trio.move_on_after(1, shield=True):
                    await asking.abort()
