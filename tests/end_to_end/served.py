"""A whole server on loopback: its models in the process that has the API, or in a worker behind it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, TypeAlias, TypeVar

import attrs
import httpx
import openai
import patience
import trio
from scripted import Trace, add_models

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.testing import StreamReport, read_stream

__all__ = ["PLACEMENTS", "Placement", "RawStream", "Served", "chat", "open_served", "until"]

#: Where the handlers run: in the process that has the API, or in a worker to which it forwards.
Placement: TypeAlias = Literal["local", "forwarded"]

PLACEMENTS: Final[tuple[Placement, ...]] = ("local", "forwarded")

T = TypeVar("T")

# No proxies, and no time spent on loading the certificates of the world for every client.
_PLAIN: Final[dict[str, Any]] = {"trust_env": False, "verify": False}


def chat(model: str, text: str = "hi", **fields: Any) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


async def until(holds: Callable[[], bool | Awaitable[bool]], within: float = 1) -> None:
    """Wait until something that can be seen from outside holds, and fail if that takes longer."""
    with patience.fail_after(within):
        while True:
            answer = holds()
            if answer if isinstance(answer, bool) else await answer:
                return
            await trio.sleep(0.01)


@attrs.frozen
class RawStream:
    """What came over the wire in answer to a request for a stream."""

    status: int
    body: bytes
    whole: bool
    """Whether the response ended as HTTP wants it, and not with a broken connection."""

    @property
    def report(self) -> StreamReport:
        """What was in it. Fails if it breaks the grammar of streams, or looks complete when it was cut."""
        report = read_stream(self.body)
        assert self.whole == (report.ending != "cut")
        return report


@attrs.frozen
class Served:
    """The server under test.

    Attributes:
        placement: where its handlers run.
        front: the server that has the API.
        back: the server that has the models; the same one if they are local.
        trace: what the handlers went through.
    """

    placement: Placement
    front: ClusterServer
    back: ClusterServer
    trace: Trace

    @property
    def url(self) -> str:
        assert self.front.url is not None
        return self.front.url

    def http(self, **options: Any) -> httpx.AsyncClient:
        """Return a plain HTTP client."""
        return httpx.AsyncClient(base_url=self.url, timeout=10, **_PLAIN, **options)

    def client(self, base: str = "/v1", **options: Any) -> openai.AsyncOpenAI:
        """Return the official client, which does not try again unless it is told to."""
        settings: dict[str, Any] = {"api_key": "a-key", "max_retries": 0, "timeout": 10} | options
        http_client = openai.DefaultAsyncHttpxClient(**_PLAIN)
        return openai.AsyncOpenAI(base_url=self.url + base, http_client=http_client, **settings)

    async def with_sync_client(self, ask: Callable[[openai.OpenAI], T]) -> T:
        """Run ``ask`` with the official client that knows no event loop, in a thread."""

        def run() -> T:
            http_client = openai.DefaultHttpxClient(**_PLAIN)
            with openai.OpenAI(
                api_key="a-key", base_url=f"{self.url}/v1", max_retries=0, timeout=10, http_client=http_client
            ) as client:
                return ask(client)

        return await trio.to_thread.run_sync(run)

    async def post(self, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        """Send one request and return its answer."""
        async with self.http() as client:
            return await client.post(path, **options)

    async def stream(
        self, body: dict[str, Any], path: str = "/v1/chat/completions", **options: Any
    ) -> RawStream:
        """Ask for a stream and take it to its end, whatever that may be."""
        pieces: list[bytes] = []
        async with self.http() as client, client.stream("POST", path, json=body, **options) as response:
            try:
                async for piece in response.aiter_raw():
                    pieces.append(piece)
            except httpx.RemoteProtocolError:
                return RawStream(response.status_code, b"".join(pieces), whole=False)
        return RawStream(response.status_code, b"".join(pieces), whole=True)

    async def status(self) -> dict[str, Any]:
        """Return what the server says about itself."""
        async with self.http() as client:
            response = await client.get("/cluster/status", headers={"authorization": "Bearer a-key"})
        status: dict[str, Any] = json.loads(response.content)
        return status

    async def in_flight(self, count: int, within: float = 1) -> dict[str, Any]:
        """Wait until the server says that ``count`` calls are in flight; return all that it says."""
        seen: dict[str, Any] = {}

        async def is_so() -> bool:
            seen.update(await self.status())
            return bool(seen["calls"]["in_flight"] == count)

        await until(is_so, within)
        return seen

    async def check_is_idle(self) -> None:
        """Fail if any work outlives its request, or the books do not balance."""
        status = await self.in_flight(0)
        assert status["slots"]["running"] == status["slots"]["waiting"] == 0
        assert all(worker["in_flight"] == 0 for worker in status["workers"])
        calls = status["calls"]
        ended = ("completed", "cancelled", "timed_out", "worker_lost", "failed")
        assert calls["admitted"] == sum(calls[name] for name in ended)


@asynccontextmanager
async def open_served(placement: Placement, **server: Any) -> AsyncIterator[Served]:
    """Serve all scripted models.

    Args:
        placement: where their handlers run.
        server: fields of ``ServerOptions``; they hold for all nodes.
    """

    def new_server(**more: Any) -> ClusterServer:
        return ClusterServer(
            ClusterServerOptions(server=ServerOptions(host="127.0.0.1", **server, **more), drain_timeout=5)
        )

    front = new_server()
    back = front if placement == "local" else new_server(worker_id="w1")
    trace = Trace()
    add_models(back, trace)
    async with trio.open_nursery() as nursery:
        if placement == "local":
            await nursery.start(front.run_as_standalone, 0)
        else:
            await nursery.start(front.run_as_master, 0)
            await nursery.start(back.run_as_worker, "127.0.0.1", front.internal_port)
        served = Served(placement, front, back, trace)
        yield served
        await served.check_is_idle()
        nursery.cancel_scope.cancel()
