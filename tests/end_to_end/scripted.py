"""Models of every kind that do as they are told, and a trace of what their handlers went through."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy
import patience
import trio

from trio_cluster import (
    ApiError,
    ASRRequest,
    ChatRequest,
    ClusterServer,
    CustomRequest,
    EmbeddingRequest,
    ImageEditRequest,
    ImageGenRequest,
    ModerationRequest,
    OutputChunk,
    Provider,
    RerankRequest,
    TTSRequest,
)

__all__ = ["ENDLESS", "JUNK", "PNG", "SHAPES", "SILENT", "Trace", "add_models"]

#: The six shapes in which a handler may be written.
SHAPES: Final = (
    "async-generator",
    "async-value",
    "async-push",
    "thread-generator",
    "thread-value",
    "thread-push",
)

#: Models that answer for ever, and models that never begin to.
ENDLESS: Final = tuple(f"endless/{shape}" for shape in SHAPES if not shape.endswith("value"))
SILENT: Final = tuple(f"silent/{shape}" for shape in SHAPES)

PNG: Final = b"\x89PNG\r\n\x1a\n" + bytes(range(256))

#: One piece of what the model ``flood`` gives, and how many of them.
JUNK: Final = "x" * 100_000
_JUNK_PIECES: Final = 1000

_PAUSE: Final = 0.01


class Trace:
    """What the handlers of one server went through. To be made inside the trio run."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.pieces = 0
        """How many pieces the model ``flood`` has got rid of."""
        self.released = trio.Event()
        """What the models ``held`` and ``pausing`` wait for."""
        self._token = trio.lowlevel.current_trio_token()
        self._starts = trio.open_memory_channel[Any](10_000)
        self._ends = trio.open_memory_channel[str](10_000)

    @contextmanager
    def of(self, request: Any) -> Iterator[None]:
        """Be around everything that a handler does for ``request``, in whatever thread."""
        self.requests.append(request)
        self._token.run_sync_soon(self._starts[0].send_nowait, request)
        how = "finished"
        try:
            yield
        except (trio.Cancelled, GeneratorExit):
            how = "cancelled"
            raise
        except BaseException:
            how = "failed"
            raise
        finally:
            self._token.run_sync_soon(self._ends[0].send_nowait, how)

    async def started(self) -> Any:
        """Return the request of the next handler that starts."""
        with trio.fail_after(5):
            return await self._starts[1].receive()

    async def ended(self, within: float = 5) -> str:
        """Return how the next handler ended: ``finished``, ``cancelled`` or ``failed``."""
        with patience.fail_after(within):
            return await self._ends[1].receive()


def add_models(server: ClusterServer, trace: Trace) -> None:
    """Register all scripted models on ``server``."""
    _add_texts(server, trace)
    _add_failures(server, trace)
    _add_shapes(server, trace)
    _add_endless(server, trace)
    _add_silent(server, trace)
    _add_media(server, trace)
    _add_pictures(server, trace)
    _add_judges(server, trace)


def _add_texts(server: ClusterServer, trace: Trace) -> None:
    @server.chat("echo")
    async def echo(request: ChatRequest) -> AsyncIterator[Any]:
        with trace.of(request):
            words = request.last_text.split(" ")
            for i, word in enumerate(words):
                yield word if i == 0 else f" {word}"
            yield OutputChunk.usage(len(words), 2 * len(words))

    @server.chat("mirror")
    async def mirror(request: ChatRequest) -> str:
        with trace.of(request):
            return json.dumps(request.raw, sort_keys=True)

    @server.chat("choices")
    async def choices(request: ChatRequest) -> AsyncIterator[Any]:
        with trace.of(request):
            for part in ("one", "two"):
                for index in range(request.n):
                    yield OutputChunk.text_delta(f"{part} of {index};", index)
            yield OutputChunk.finish("length", 0)

    @server.chat("tools")
    async def tools(request: ChatRequest) -> AsyncIterator[Any]:
        with trace.of(request):
            function = {"name": "weather", "arguments": '{"city":'}
            yield {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]}
            yield {"tool_calls": [{"index": 0, "function": {"arguments": ' "Kyoto"}'}}]}

    @server.chat(
        "org/vision-model", supports_vision=True, context_window=4096, extra_fields={"license": "MIT"}
    )
    async def vision(request: ChatRequest) -> str:
        with trace.of(request):
            return "an image" if request.has_image_inputs else "no image"

    @server.chat("held")
    async def held(request: ChatRequest) -> str:
        with trace.of(request):
            await trace.released.wait()
            return "released"

    @server.chat("pausing")
    async def pausing(request: ChatRequest) -> AsyncIterator[str]:
        with trace.of(request):
            yield "one moment"
            await trace.released.wait()
            yield ", please"

    @server.chat("flood")
    async def flood(request: ChatRequest, provider: Provider) -> None:
        with trace.of(request):
            for _ in range(_JUNK_PIECES):
                await provider.push(JUNK)
                trace.pieces += 1


def _add_failures(server: ClusterServer, trace: Trace) -> None:
    @server.chat("failing")
    async def failing(request: ChatRequest) -> AsyncIterator[Any]:
        with trace.of(request):
            for i in range(request.raw.get("pieces", 0)):
                yield f"{i} "
            if "status" in request.raw:
                raise ApiError(request.raw["status"], "as you wish", code="my_code", param="my_param")
            raise RuntimeError("the secret of the house")

    @server.chat("failing/thread")
    def failing_in_thread(request: ChatRequest) -> Iterator[Any]:
        with trace.of(request):
            for i in range(request.raw.get("pieces", 0)):
                yield f"{i} "
            yield OutputChunk.error("my_code", "as you wish", request.raw["status"])

    @server.chat("wrong-type")
    async def wrong_type(request: ChatRequest) -> Any:
        with trace.of(request):
            return 7

    @server.tts("failing/voice")
    async def failing_voice(request: TTSRequest) -> AsyncIterator[bytes]:
        with trace.of(request):
            # More than may wait on the way: some of it has reached the client before this goes wrong.
            for _ in range(16):
                yield bytes(1 << 16)
            raise RuntimeError("the secret of the house")


def _add_shapes(server: ClusterServer, trace: Trace) -> None:
    text = "one two three "

    async def async_generator(request: ChatRequest) -> AsyncIterator[str]:
        for word in text.split():
            yield word + " "

    async def async_value(request: ChatRequest) -> str:
        return text

    async def async_push(request: ChatRequest, provider: Provider) -> None:
        for word in text.split():
            await provider.push(word + " ")
        provider.end()

    def thread_generator(request: ChatRequest) -> Iterator[str]:
        for word in text.split():
            yield word + " "

    def thread_value(request: ChatRequest) -> str:
        return text

    def thread_push(request: ChatRequest, provider: Any) -> None:
        for word in text.split():
            provider.push(word + " ")

    for handler in (async_generator, async_value, async_push, thread_generator, thread_value, thread_push):
        server.register_chat(f"shape/{handler.__name__.replace('_', '-')}", handler)


def _add_endless(server: ClusterServer, trace: Trace) -> None:
    @server.chat("endless/async-generator")
    async def async_generator(request: ChatRequest) -> AsyncIterator[str]:
        with trace.of(request):
            while True:
                yield "tick "
                await trio.sleep(_PAUSE)

    @server.chat("endless/async-push")
    async def async_push(request: ChatRequest, provider: Provider) -> None:
        with trace.of(request):
            while True:
                await provider.push("tick ")
                await trio.sleep(_PAUSE)

    @server.chat("endless/thread-generator")
    def thread_generator(request: ChatRequest) -> Iterator[str]:
        with trace.of(request):
            while True:
                yield "tick "
                time.sleep(_PAUSE)

    @server.chat("endless/thread-push")
    def thread_push(request: ChatRequest, provider: Any) -> None:
        with trace.of(request):
            while True:
                provider.push("tick ")
                time.sleep(_PAUSE)


def _add_silent(server: ClusterServer, trace: Trace) -> None:
    async def async_generator(request: ChatRequest) -> AsyncIterator[str]:
        with trace.of(request):
            await trio.Event().wait()
            yield "never"

    async def async_value(request: ChatRequest) -> str:
        with trace.of(request):
            await trio.Event().wait()
            return "never"

    async def async_push(request: ChatRequest, provider: Provider) -> None:
        with trace.of(request):
            await trio.Event().wait()

    def wait() -> None:
        while True:
            trio.from_thread.check_cancelled()
            time.sleep(_PAUSE)

    def thread_generator(request: ChatRequest) -> Iterator[str]:
        with trace.of(request):
            wait()
            yield ""

    def thread_value(request: ChatRequest) -> str:
        with trace.of(request):
            wait()
            return "never"

    def thread_push(request: ChatRequest, provider: Any) -> None:
        with trace.of(request):
            wait()

    handlers: list[Callable[..., Any]] = [
        async_generator, async_value, async_push, thread_generator, thread_value, thread_push
    ]  # fmt: skip
    for handler in handlers:
        server.register_chat(f"silent/{handler.__name__.replace('_', '-')}", handler)


def _add_media(server: ClusterServer, trace: Trace) -> None:
    def vector(of: str | list[int]) -> list[float]:
        return [float(len(of)), 0.5, -0.25, 3.0]

    @server.embedding("vectors")
    async def vectors(request: EmbeddingRequest) -> list[list[float]]:
        with trace.of(request):
            return [vector(each) for each in request.inputs]

    @server.embedding("vectors/numpy")
    def numpy_vectors(request: EmbeddingRequest) -> Iterator[Any]:
        with trace.of(request):
            yield numpy.array([vector(each) for each in request.inputs], dtype=numpy.float32)
            yield OutputChunk.usage(11)

    @server.asr("scribe")
    async def scribe(request: ASRRequest) -> dict[str, Any]:
        with trace.of(request):
            return {
                "language": "english",
                "duration": 2.5,
                "segments": [
                    {"start": 0.0, "end": 1.0, "text": f" {request.filename} of {len(request.audio)} bytes."},
                    {"start": 1.0, "end": 2.5, "text": " The end."},
                ],
            }

    @server.tts("voice")
    async def voice(request: TTSRequest) -> AsyncIterator[bytes]:
        with trace.of(request):
            for word in request.input.split():
                yield word.encode() * 100

    @server.tts("voice/thread")
    def voice_in_thread(request: TTSRequest) -> Iterator[OutputChunk]:
        with trace.of(request):
            for word in request.input.split():
                yield OutputChunk.audio(word.encode() * 100, "audio/x-words")

    @server.asr("scribe/speakers")
    async def speakers(request: ASRRequest) -> AsyncIterator[dict[str, Any]]:
        with trace.of(request):
            for i, name in enumerate(("A", "B")):
                segment = {"start": float(i), "end": i + 1.0, "text": f" I am {name}.", "speaker": name}
                logprobs = [{"token": name, "logprob": -0.5, "bytes": [ord(name)]}]
                yield {"segments": [segment], "logprobs": logprobs}
            yield {"usage": {"type": "tokens", "input_tokens": 7, "output_tokens": 6}}


def _add_pictures(server: ClusterServer, trace: Trace) -> None:
    @server.image_generation("painter")
    async def painter(request: ImageGenRequest) -> AsyncIterator[Any]:
        with trace.of(request):
            for i in range(5):
                yield OutputChunk.partial_image(PNG + bytes([100 + i]))
            for i in range(request.n):
                yield PNG + bytes([i])
            yield OutputChunk.usage(3, 4)

    @server.image_edit("painter")
    async def retoucher(request: ImageEditRequest) -> AsyncIterator[Any]:
        with trace.of(request):
            yield OutputChunk.partial_image(PNG)
            if request.prompt == "fail":
                raise ApiError(500, "the brush broke", code="my_code")
            yield [PNG + image + (request.mask or b"") for image in request.images[: request.n]]


def _add_judges(server: ClusterServer, trace: Trace) -> None:
    @server.rerank("ranker")
    def ranker(request: RerankRequest) -> Iterator[Any]:
        with trace.of(request):
            words = set(request.query.split())
            yield numpy.array(
                [len(words & set(text.split())) for text in request.documents], dtype=numpy.float32
            )
            yield OutputChunk.usage(len(request.documents))

    @server.moderation("judge", supports_vision=True)
    async def judge(request: ModerationRequest) -> list[dict[str, float]]:
        with trace.of(request):
            return [{"violence": 0.9 if "hit" in text else 0.1} for text in request.texts]

    @server.route("/v1/tokenize", "echo")
    async def tokenize(request: CustomRequest) -> AsyncIterator[Any]:
        with trace.of(request):
            for i, word in enumerate(request.raw["prompt"].split()):
                yield {f"token_{i}": word}

    @server.route("/v1/sound", "echo")
    async def sound(request: CustomRequest) -> AsyncIterator[Any]:
        with trace.of(request):
            for data in request.files["file"]:
                yield OutputChunk.data(data[::-1], "audio/x-backwards")
