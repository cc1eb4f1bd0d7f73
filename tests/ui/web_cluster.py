"""A real cluster for tests in a browser: a master and two workers in threads, with models that do as they are told."""

from __future__ import annotations

import base64
import io
import threading
import wave
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import trio
from watched import close_pages

from trio_cluster import (
    ApiError,
    ASRRequest,
    ChatRequest,
    ClusterServer,
    ClusterServerOptions,
    EmbeddingRequest,
    ImageEditRequest,
    ImageGenRequest,
    ModerationRequest,
    OutputChunk,
    RerankRequest,
    ServerOptions,
    ServerThread,
    TTSRequest,
    serve_in_thread,
)
from trio_cluster.engines import ServedModel, not_loaded, serve_on_demand

__all__ = ["WebCluster", "open_web_cluster"]

#: A picture of one red pixel.
_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


@attrs.define
class WebCluster:
    """A cluster that runs.

    Attributes:
        url: of the master's API.
        server, master: the master, and its thread.
        workers: the threads of the workers, by name.
        stopped: the prompts of the handlers of ``slow`` that were cancelled.
        cancelled: set when one was.
    """

    url: str
    server: ClusterServer
    master: ServerThread
    workers: dict[str, ServerThread] = attrs.field(factory=dict)
    stopped: list[str] = attrs.field(factory=list)
    cancelled: threading.Event = attrs.field(factory=threading.Event)

    @property
    def page(self) -> str:
        """The address of the page."""
        return f"{self.url}/ui/"

    def restart(self, port: int) -> None:
        """Start the master again, on the port that it had. It must have been stopped."""
        self.master = serve_in_thread(self.server, self.server.run_as_master, port)

    def start_worker(self, name: str) -> None:
        """Start a worker, and wait until its models are served. ``w3`` has one that runs on demand, too."""
        server = ClusterServer(
            ClusterServerOptions(server=ServerOptions(host="127.0.0.1", worker_id=name), memory="1GiB")
        )
        _add_models(server, name, self)
        port = self.server.internal_port
        run = partial(_run_with_cold_model, server) if name == "w3" else server.run_as_worker
        self.workers[name] = serve_in_thread(server, run, "127.0.0.1", port)

    def stop_worker(self, name: str) -> None:
        """Stop a worker, if it runs."""
        if (worker := self.workers.pop(name, None)) is not None:
            worker.stop()


async def _run_with_cold_model(server: ClusterServer, *args: Any, task_status: trio.TaskStatus[Any]) -> Any:
    """Run a worker that serves the model ``cold`` on demand."""

    @asynccontextmanager
    async def load(run: object) -> AsyncIterator[ServedModel]:
        async def answer(request: ChatRequest) -> str:
            return "I am awake"

        await trio.sleep(0.5)
        yield ServedModel("cold", "chat", answer)

    described = ServedModel("cold", "chat", not_loaded)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_on_demand, server, described, load, memory=2**20))
        mode = await server.run_as_worker(*args, task_status=task_status)
        nursery.cancel_scope.cancel()
    return mode


def _speech() -> bytes:
    """Return a tenth of a second of silence."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(b"\0\0" * 1600)
    return file.getvalue()


def _text_of(request: ChatRequest) -> str:
    content = request.messages[-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "picture") for part in content)


def _add_models(server: ClusterServer, name: str, cluster: WebCluster) -> None:
    """Register what a worker serves: chats on both, everything else on ``w1``."""

    @server.chat("echo", supports_vision=True)
    async def echo(request: ChatRequest) -> AsyncIterator[Any]:
        """Repeat what was said, a word at a time; with some reasoning, if it is asked to think."""
        text = _text_of(request)
        if "think" in text:
            yield OutputChunk.reasoning("I shall repeat it.")
        for word in text.split():
            yield f"{word} "

    @server.chat("slow")
    async def slow(request: ChatRequest) -> AsyncIterator[Any]:
        """Say ``tick`` for ever, twenty times in a second; or three times, if that is asked for, with the tokens."""
        try:
            for number in count(1):
                yield "tick "
                if number == 3 and _text_of(request) == "three times":
                    yield OutputChunk.usage(2, 3)
                    return
                await trio.sleep(0.05)
        except trio.Cancelled:
            cluster.stopped.append(_text_of(request))
            cluster.cancelled.set()
            raise

    @server.chat("broken")
    async def broken(request: ChatRequest) -> AsyncIterator[str]:
        """Fail in the middle of the answer."""
        yield "This was "
        raise ApiError(503, "The battery is empty", code="battery_empty")

    @server.chat("tools")
    async def tools(request: ChatRequest) -> AsyncIterator[Any]:
        """Call a tool that was given, and repeat its result."""
        results = [each["content"] for each in request.messages if each["role"] == "tool"]
        if results:
            yield f"The tool says: {' and '.join(results)}"
        else:
            for tool in request.tools or []:
                yield OutputChunk.tool_call(tool["function"]["name"], {"city": "Bonn"}, id="call_1")
        yield OutputChunk.usage(20, 5)

    if name != "w1":
        return

    @server.embedding("vectors")
    async def vectors(request: EmbeddingRequest) -> list[list[float]]:
        return [[float(len(text)), float(str(text).count("a")), 1.0] for text in request.inputs]

    @server.tts("speech")
    async def speech(request: TTSRequest) -> bytes:
        return _speech()

    @server.asr("hearing")
    async def hearing(request: ASRRequest) -> str:
        return f"{len(request.audio)} bytes were said"

    @server.image_generation("pictures")
    async def pictures(request: ImageGenRequest) -> list[bytes]:
        return [_PNG] * request.n

    @server.image_edit("retouch")
    async def retouch(request: ImageEditRequest) -> list[bytes]:
        return [request.images[0]]

    @server.rerank("order")
    async def order(request: RerankRequest) -> list[float]:
        return [float(len(text)) for text in request.documents]

    @server.moderation("judge")
    async def judge(request: ModerationRequest) -> list[dict[str, float]]:
        return [{"violence": 0.9 if "fight" in text else 0.1} for text in request.texts]


@contextmanager
def open_web_cluster(folder: Path, *, serve: bool = True, **options: Any) -> Iterator[WebCluster]:
    """Open a cluster on 127.0.0.1, whose master keeps its state in a folder.

    Args:
        folder: for the master's keys and usage.
        serve: whether there are workers.
        options: of the master's section ``server``, such as ``api_key``.
    """
    master = ClusterServer(
        ClusterServerOptions(
            server=ServerOptions(host="127.0.0.1", port=0, **options),
            state_dir=str(folder),
            on_conflict="replicate",
        )
    )
    with ExitStack() as stack:
        front = serve_in_thread(master, master.run_as_master, 0)
        assert front.url is not None
        cluster = WebCluster(front.url, master, front)
        stack.callback(lambda: cluster.master.stop())
        stack.callback(lambda: [cluster.stop_worker(name) for name in list(cluster.workers)])
        if serve:
            for name in ("w1", "w2"):
                cluster.start_worker(name)
        stack.callback(close_pages)
        yield cluster
