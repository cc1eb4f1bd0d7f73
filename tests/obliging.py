"""Models of every kind that have an answer to whatever may be asked: what goes wrong is not their fault.

``-a obliging:server`` serves them from the command line, for whoever wants to try that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, TypeAlias

import trio

from trio_cluster import (
    ApiError,
    ASRRequest,
    ChatRequest,
    ClusterServer,
    ClusterServerOptions,
    EmbeddingRequest,
    ImageGenRequest,
    OutputChunk,
    RawCall,
    ServerOptions,
    TTSRequest,
)
from trio_cluster.core.model import Kind

__all__ = [
    "LONGEST_VECTOR",
    "MODELS",
    "ODD_MODEL",
    "OWN_ROUTE",
    "RAW_MODEL",
    "Placement",
    "add_models",
    "open_obliging",
    "server",
]

#: Where the models are: in the process that has the API, or in a worker to which it forwards.
Placement: TypeAlias = Literal["local", "forwarded"]

#: A model of each kind.
MODELS: Final[dict[Kind, str]] = {
    "chat": "chat",
    "embedding": "embedding",
    "asr": "asr",
    "tts": "tts",
    "image_generation": "image",
    "image_edit": "image",
    "rerank": "rerank",
    "moderation": "moderation",
}
#: A chat model with a name that is hard to write.
ODD_MODEL: Final = "org/h\xe9 %2F?#\u4e2d:7b"
#: A model that answers every route, with what was sent, and looks at nothing of it.
RAW_MODEL: Final = "raw"
#: A route that only one of them answers.
OWN_ROUTE: Final = "/v1/own/route"

_PNG: Final = b"\x89PNG\r\n\x1a\n" + bytes(50)

#: Dimensions that the vectors have at most; more than these are refused.
LONGEST_VECTOR: Final = 1024


async def _embedding(request: EmbeddingRequest) -> list[list[float]]:
    size = request.dimensions or 3
    if size > LONGEST_VECTOR:
        raise ApiError(400, f"vectors have {LONGEST_VECTOR} dimensions at most", param="dimensions")
    return [[float(number + 1)] * size for number, _ in enumerate(request.inputs)]


async def _asr(request: ASRRequest) -> dict[str, Any]:
    times = [(0.0, 1.0), (1.0, 2.5)]
    return {
        "language": "english",
        "duration": 2.5,
        "segments": [
            {"start": start, "end": end, "text": f" {len(request.audio)}.", "speaker": "A"}
            for start, end in times
        ],
        "words": [{"start": start, "end": end, "word": "n"} for start, end in times],
    }


async def _image(request: ImageGenRequest) -> AsyncIterator[bytes]:
    for _ in range(request.n):
        yield _PNG


async def _rerank(request: Any) -> Any:
    return OutputChunk.scores([1 / (1 + number) for number, _ in enumerate(request.documents)])


async def _moderation(request: Any) -> list[dict[str, float]]:
    return [{"violence": 0.25} for _ in request.inputs]


async def _own(request: Any) -> dict[str, Any]:
    return {"path": request.path, "bytes": len(request.body)}


async def _raw(call: RawCall) -> None:
    call.begin(200, "application/octet-stream")
    while data := await call.receive():
        await call.send(data)


def _count(request: ChatRequest) -> int:
    return len(request.messages)


def add_models(server: ClusterServer, *, pause: float = 0.0) -> None:
    """Register all of them.

    Args:
        server: where.
        pause: seconds that answers take which come in pieces: time for a client to leave.
    """

    async def chat(request: ChatRequest) -> AsyncIterator[Any]:
        for index in range(request.n):
            yield OutputChunk.text_delta(request.last_text[:100], index)
        await trio.sleep(pause)
        for index in range(request.n):
            yield OutputChunk.text_delta("!", index)
        yield OutputChunk.usage(1, 2 * request.n)

    async def tts(request: TTSRequest) -> AsyncIterator[bytes]:
        yield b"sound of "
        await trio.sleep(pause)
        for word in request.input.split():
            yield word.encode()

    server.chat("chat", count_tokens=_count, supports_vision=True, accepts_token_ids=True)(chat)
    server.chat(ODD_MODEL, count_tokens=_count, supports_vision=True, accepts_token_ids=True)(chat)
    server.embedding("embedding")(_embedding)
    server.asr("asr")(_asr)
    server.tts("tts")(tts)
    server.image_generation("image")(_image)
    server.image_edit("image")(_image)
    server.rerank("rerank")(_rerank)
    server.moderation("moderation", supports_vision=True)(_moderation)
    server.route(OWN_ROUTE, "chat", _own)
    server.register_raw(RAW_MODEL, _raw)


@asynccontextmanager
async def open_obliging(placement: Placement, **options: Any) -> AsyncIterator[ClusterServer]:
    """Serve all of them on loopback; give the server that has the API, and check in the end that no call is left.

    Args:
        placement: where the models are: in the process that has the API, or in a worker behind it.
        options: fields of ``ServerOptions``.
    """

    def new_server() -> ClusterServer:
        return ClusterServer(
            ClusterServerOptions(server=ServerOptions(host="127.0.0.1", **options), drain_timeout=5)
        )

    front = new_server()
    back = front if placement == "local" else new_server()
    add_models(back)
    async with trio.open_nursery() as nursery:
        if placement == "local":
            await nursery.start(front.run_as_standalone, 0)
        else:
            await nursery.start(front.run_as_master, 0)
            await nursery.start(back.run_as_worker, "127.0.0.1", front.internal_port)
        yield front
        with trio.fail_after(10):
            while front.router.live or back.router.live:  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


server = ClusterServer()
add_models(server)
