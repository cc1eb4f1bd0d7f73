"""The scenario in which the law of lifetimes is tested: a simulated cluster, one scripted handler, one client."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Literal

import attrs
import h11
import trio

from trio_cluster import AsyncioLoop, ClusterServer, from_asyncio
from trio_cluster.core.answer import Failed
from trio_cluster.core.call import Call
from trio_cluster.core.observer import Observer
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.net.sockets import Network
from trio_cluster.testing import Response, SimulatedCluster, StreamingResponse, open_cluster, worker

__all__ = [
    "ENDPOINTS",
    "LATENCY",
    "MODEL",
    "Caller",
    "Endpoint",
    "How",
    "LimitedKey",
    "Scenario",
    "Script",
    "open_scenario",
]

#: Seconds from any machine to any other.
LATENCY: Final = 0.01

MODEL: Final = "m"
REQUEST_ID: Final = "the-one"

#: Characters of one large piece of output; half a dozen of them fill every window and buffer on the path. Not a
#: multiple of any buffer size, so that what is split on the path is not split where a piece ends.
LARGE: Final = 200_001

Phase = Literal["waiting", "streaming", "blocked", "ending"]
How = Literal["async", "threaded", "asyncio"]


# Requests, and how their responses are checked


@attrs.frozen
class Endpoint:
    """A route, a request for it, and how to check its response."""

    path: str
    kind: str
    delivery: Literal["events", "audio", "whole"]
    """How the response is sent: as events, as audio while it is made, or when it is complete."""
    fields: Mapping[str, Any]
    outputs: tuple[Any, Any]
    check: Callable[[Response, list[Any]], None]
    """Fails if a complete response does not hold exactly what the handler gave."""
    statuses: Mapping[int, int] = attrs.field(factory=dict)
    """The statuses of errors that are others on this route."""
    error_members: frozenset[str] = frozenset({"message", "type", "param", "code"})
    """The members that every error has."""

    @property
    def large(self) -> Any:
        return bytes(LARGE) if self.kind == "tts" else "x" * LARGE

    def request(self, padding: int = 0) -> tuple[bytes, str]:
        """Return the body of a request, made longer by about ``padding`` bytes, and its content type."""
        if self.kind == "asr":
            return _form(bytes(100 + padding)), "multipart/form-data; boundary=B"
        body = {"model": MODEL, **self.fields, "padding": "p" * padding}
        return json.dumps(body).encode(), "application/json"


def _form(audio: bytes) -> bytes:
    part = b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    return (
        part % (b"model", b"", MODEL.encode()) + part % (b"file", b'; filename="a.wav"', audio) + b"--B--\r\n"
    )


def _check_events(response: Response, outputs: list[Any]) -> None:
    assert response.report().text == "".join(outputs)


def _check_chat(response: Response, outputs: list[Any]) -> None:
    assert response.json()["choices"][0]["message"]["content"] == "".join(outputs)


def _check_message(response: Response, outputs: list[Any]) -> None:
    assert response.json()["content"] == [{"type": "text", "text": "".join(outputs)}]


def _check_vectors(response: Response, outputs: list[Any]) -> None:
    assert [each["embedding"] for each in response.json()["data"]] == outputs


def _check_transcription(response: Response, outputs: list[Any]) -> None:
    assert response.json()["text"] == "".join(outputs)


def _check_audio(response: Response, outputs: list[Any]) -> None:
    assert response.body == b"".join(outputs)


def _check_images(response: Response, outputs: list[Any]) -> None:
    assert [base64.b64decode(each["b64_json"]) for each in response.json()["data"]] == outputs


_MESSAGES: Final = [{"role": "user", "content": "hi"}]
_WORDS: Final = ("some ", "words")
_MESSAGE: Final[dict[str, Any]] = {"messages": _MESSAGES, "max_tokens": 9}
_OF_MESSAGES: Final[dict[str, Any]] = {
    "statuses": {503: 529},
    "error_members": frozenset({"message", "type", "code"}),
}
_SOUND: Final = (b"RIFF....WAVE", b"samples")

ENDPOINTS: Final[dict[str, Endpoint]] = {
    "chat-stream": Endpoint(
        "chat/completions", "chat", "events", {"messages": _MESSAGES, "stream": True}, _WORDS, _check_events
    ),
    "chat": Endpoint("chat/completions", "chat", "whole", {"messages": _MESSAGES}, _WORDS, _check_chat),
    "completions-stream": Endpoint(
        "completions", "chat", "events", {"prompt": "hi", "stream": True}, _WORDS, _check_events
    ),
    "messages-stream": Endpoint(
        "messages", "chat", "events", _MESSAGE | {"stream": True}, _WORDS, _check_events, **_OF_MESSAGES
    ),
    "messages": Endpoint("messages", "chat", "whole", _MESSAGE, _WORDS, _check_message, **_OF_MESSAGES),
    "embeddings": Endpoint(
        "embeddings", "embedding", "whole", {"input": ["a", "b"]}, ([0.5, 1.0], [2.0, 4.0]), _check_vectors
    ),
    "transcriptions": Endpoint("audio/transcriptions", "asr", "whole", {}, _WORDS, _check_transcription),
    "speech": Endpoint("audio/speech", "tts", "audio", {"input": "hi", "voice": "v"}, _SOUND, _check_audio),
    "images": Endpoint(
        "images/generations",
        "image_generation",
        "whole",
        {"prompt": "hi", "n": 2},
        (b"one", b"two"),
        _check_images,
    ),
}


# The handler


class Script:
    """What the handler is to do, and the record of what it did.

    Attributes:
        endpoint: that it answers.
        phase: in which it waits for :attr:`go`.
        fails: it raises when it continues.
        hangs: seconds for which it continues after it was cancelled.
        log: what happened in it, each event with its time.
        given: the output it has given.
        deadline: the effective deadline that it had when it last waited.
    """

    def __init__(self, endpoint: Endpoint, phase: Phase) -> None:
        self.endpoint = endpoint
        self.phase: Phase = phase
        self.fails = False
        self.hangs = 0.0
        self.go = trio.Event()
        self.log: list[tuple[float, str]] = []
        self.given: list[Any] = []
        self.deadline = 0.0
        self._loop = AsyncioLoop()
        # These two work in every thread.
        self._now = trio.lowlevel.current_clock().current_time
        self._token = trio.lowlevel.current_trio_token()

    def note(self, word: str) -> None:
        self.log.append((self._now(), word))

    @property
    def words(self) -> list[str]:
        return [word for _, word in self.log]

    def steps(self) -> Iterator[Any]:
        """Yield each piece of output to give, and ``None`` where to wait."""
        first, last = self.endpoint.outputs
        if self.phase == "waiting":
            yield None
        yield first
        if self.phase == "streaming":
            yield None
        while self.phase == "blocked" and not self.go.is_set():
            yield self.endpoint.large
        yield last
        if self.phase == "ending":
            yield None

    async def wait(self) -> None:
        self.deadline = trio.current_effective_deadline()
        await self.go.wait()
        self.fail_if_it_should()

    def fail_if_it_should(self) -> None:
        if self.fails:
            self.note("raises")
            raise RuntimeError("the script says so")

    async def hang(self) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(self.hangs)

    def handler(self, how: How) -> Any:
        """Return the handler, of one of the three kinds."""
        handlers = {
            "async": self._async,
            "threaded": self._plain,
            "asyncio": from_asyncio(self._asyncio, self._loop),
        }
        return handlers[how]

    async def _async(self, request: Any) -> AsyncIterator[Any]:
        self.note("starts")
        try:
            for step in self.steps():
                if step is None:
                    await self.wait()
                else:
                    self.given.append(step)
                    yield step
            self.note("finishes")
        except (trio.Cancelled, GeneratorExit):
            self.note("cancelled")
            if self.hangs:
                await self.hang()
            raise
        finally:
            self.note("cleaned up")

    def _plain(self, request: Any) -> Iterator[Any]:
        trio.from_thread.run_sync(self.note, "starts")
        try:
            for step in self.steps():
                if step is None:
                    trio.from_thread.run(self.wait)
                else:
                    self.given.append(step)
                    yield step
            trio.from_thread.run_sync(self.note, "finishes")
        except (trio.Cancelled, GeneratorExit):
            trio.from_thread.run_sync(self.note, "cancelled")
            if self.hangs:
                trio.from_thread.run(self.hang)
            raise
        finally:
            trio.from_thread.run_sync(self.note, "cleaned up")

    async def _asyncio(self, request: Any) -> AsyncIterator[Any]:
        self.note("starts")
        try:
            for step in self.steps():
                if step is None:
                    await self._in_trio(self.go.wait)
                    self.fail_if_it_should()
                else:
                    self.given.append(step)
                    yield step
            self.note("finishes")
        except (asyncio.CancelledError, GeneratorExit):
            self.note("cancelled")
            if self.hangs:
                await self._in_trio(self.hang)
            raise
        finally:
            self.note("cleaned up")

    async def _in_trio(self, function: Callable[[], Awaitable[None]]) -> None:
        """Wait, in asyncio, until a function of trio has returned: in virtual time, if that is what trio has."""
        done, scope, run = asyncio.Event(), trio.CancelScope(), self._loop.running
        assert run is not None

        async def call() -> None:
            with scope:
                await function()
                run.post(done.set)

        self._token.run_sync_soon(trio.lowlevel.spawn_system_task, call)
        try:
            await done.wait()
        finally:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(scope.cancel)


async def endless(request: Any) -> AsyncIterator[str]:
    """A handler that keeps its slot, and is never silent."""
    while True:
        yield "more "
        await trio.sleep(1)


# The client


class Caller:
    """A client that sends one request.

    Args:
        cluster: where it runs.
        endpoint: that it sends the request to.
        padding: bytes by which the body is made longer.
        whole: send the whole body at once; otherwise its second half waits for :attr:`send_rest`.
        reads: read at once; otherwise not before :attr:`read_on`.
        headers: sent with the request.

    Attributes:
        response: as far as it was received; ``None`` if there was none.
        asked_at: when it began to send.
        ended_at: when nothing more could come; ``None`` until then.
        left: the client closed the connection.
        pace: seconds for which it pauses after each piece that it reads.
    """

    def __init__(
        self,
        cluster: SimulatedCluster,
        endpoint: Endpoint,
        *,
        padding: int,
        whole: bool,
        reads: bool,
        **headers: str,
    ) -> None:
        self._cluster = cluster
        self._endpoint = endpoint
        self._padding = padding
        self._headers = headers
        self._stream: Any = None
        self.send_rest = trio.Event()
        self.read_on = trio.Event()
        if whole:
            self.send_rest.set()
        if reads:
            self.read_on.set()
        self.response: Response | None = None
        self.asked_at = math.nan
        self.ended_at: float | None = None
        self.left = False
        self.pace = 0.0

    async def run(self) -> None:
        """Send the request, and receive its response."""
        self._stream = await self._cluster.network_of("client").connect("master", 8080)
        self.asked_at = trio.current_time()
        try:
            self.response = await self._send_and_receive()
        finally:
            self.ended_at = trio.current_time()
            self._stream.close()

    def leave(self, *, reset: bool = False) -> None:
        """Close the connection, or reset it. Synchronous."""
        self.left = True
        if reset:
            self._stream.abort()
        else:
            self._stream.close()

    async def _send_and_receive(self) -> Response | None:
        body, content_type = self._endpoint.request(self._padding)
        headers = {
            "host": "localhost",
            "content-type": content_type,
            "content-length": str(len(body)),
            "x-request-id": REQUEST_ID,
        }
        http = h11.Connection(h11.CLIENT)
        head = h11.Request(
            method="POST",
            target=f"/v1/{self._endpoint.path}",
            headers=list((headers | self._headers).items()),
        )
        half = len(body) // 2
        await self._stream.write((http.send(head) or b"") + (http.send(h11.Data(body[:half])) or b""))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_rest, http, body[half:])
            await self.read_on.wait()
            response = await self._receive(http)
            nursery.cancel_scope.cancel()
        return response

    async def _send_rest(self, http: h11.Connection, rest: bytes) -> None:
        await self.send_rest.wait()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.write(
                (http.send(h11.Data(rest)) or b"") + (http.send(h11.EndOfMessage()) or b"")
            )

    async def _receive(self, http: h11.Connection) -> Response | None:
        try:
            event = http.next_event()
            while event is h11.NEED_DATA:
                http.receive_data(await self._stream.read(1 << 16))
                event = http.next_event()
            response = StreamingResponse(self._stream, http, event)
            with suppress(trio.EndOfChannel):
                while self.pace:
                    await response.receive()
                    await trio.sleep(self.pace)
            return await response.finish()
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            return None
        except trio.ClosedResourceError:
            assert self.left
            return None


# The scenario


class LimitedKey:
    """An authenticator: all clients have one key, with limits that they do not reach."""

    async def authenticate(self, context: Any) -> Principal:
        limits = Limits(1000, 100_000_000, 100, 1_000_000_000, "day")
        return Principal("limited", "admin", limits=limits)


class ReservationWatch(Observer):
    """Notes how many reservations there are when the work of a call has stopped."""

    def __init__(self, call: Call, limiter: Any) -> None:
        self._call = call
        self._limiter = limiter
        self.before = 0

    def on_ended(self, call: Call, outcome: str) -> None:
        if call is self._call:
            self.before = self._limiter.open_reservations


class Scenario:
    """Everything that one test needs: the cluster, the handler and the clients."""

    def __init__(
        self, cluster: SimulatedCluster, back: ClusterServer, script: Script, nursery: trio.Nursery
    ) -> None:
        self.cluster = cluster
        self.back = back
        self.script = script
        self.nursery = nursery
        #: Of the master; there when it has ended, too.
        self.stories = cluster.master.server.stories
        self.calls: dict[str, Call] = {}
        self.released: dict[str, float] = {}
        #: For each call of a limited key on the master: reservations before its release, and after it; and whether
        #: the request may still be retried then.
        self.reserved: list[tuple[int, int, bool]] = []
        self._neighbour = trio.CancelScope()

    @property
    def master(self) -> ClusterServer:
        return self.cluster.master.server

    def occupy(self) -> None:
        """Take the only slot, by a request of another client."""
        self.nursery.start_soon(self._run_neighbour)

    async def _run_neighbour(self) -> None:
        with self._neighbour, suppress(OSError):
            await self.cluster.client("neighbour").chat("endless")

    def free_the_slot(self) -> None:
        """End what :meth:`occupy` began."""
        self._neighbour.cancel()

    def watch(self) -> None:
        """Find the call on every node, and record when its slot is released there."""
        for name, server in {"master": self.master, "back": self.back}.items():
            for call in server.router.calls_of(REQUEST_ID):
                if name not in self.calls:
                    self.calls[name] = call
                    call.on_release(lambda name=name: self._release(name))  # type: ignore[misc]
                    if name == "master" and call.request.principal.limits is not None:
                        self._watch_reservation(call, server.limiter)

    def _watch_reservation(self, call: Call, limiter: Any) -> None:
        watch = ReservationWatch(call, limiter)
        # Observers are told of the end of a call before anything else is freed by it.
        self.master.router.observers.add(watch)

        def released() -> None:
            retryable = isinstance(call.end, Failed) and call.end.retryable and not call.begun
            self.reserved.append((watch.before, limiter.open_reservations, retryable))

        call.on_release(released)

    def _release(self, name: str) -> None:
        self.released[name] = trio.current_time()


@asynccontextmanager
async def open_scenario(
    endpoint: Endpoint,
    phase: Phase,
    *,
    forwarded: bool,
    how: How = "async",
    fast_path: bool = True,
    above: Callable[[Network], Network] = lambda network: network,
    authenticator: Any = None,
    other_master: bool = False,
    name: str = MODEL,
    more: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Scenario]:
    """Open a cluster that serves one model, on a worker or on the master itself; the worker may have another master.

    Args:
        name, more: of the model, and with what else it is registered.
    """
    script = Script(endpoint, phase)
    async with (
        open_cluster(
            latency=LATENCY, fast_path=fast_path, above=above, authenticator=authenticator, **options
        ) as cluster,
        trio.open_nursery() as nursery,
    ):
        back = worker("w", **options) if forwarded else cluster.master.server
        back.register_chat("endless", endless)
        getattr(back, f"register_{endpoint.kind}")(name, script.handler(how), **(more or {}))
        if other_master:
            await cluster.start_master(name="other")
        if forwarded:
            await cluster.start_worker(back)
        yield Scenario(cluster, back, script, nursery)
        nursery.cancel_scope.cancel(reason="the test is over")
