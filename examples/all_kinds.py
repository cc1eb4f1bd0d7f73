"""A model of each kind in pure Python: chat, embedding, speech, images, reranking, moderation, and a custom route.

    python all_kinds.py [PORT]

The models compute next to nothing. They show what the handler of each kind receives and returns, so that a real engine
can take their place. ``client.py`` sends a request to each of them.
"""

from __future__ import annotations

import io
import math
import signal
import struct
import sys
import wave
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

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
    RerankRequest,
    TTSRequest,
)

server = ClusterServer()

RATE = 16_000  # samples per second
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@server.chat("reverser")
async def reverse(request: ChatRequest) -> AsyncIterator[str | OutputChunk]:
    """Yield the words of the last message in reverse order, one piece each, and report the token usage."""
    words = request.last_text.split()
    for word in reversed(words):
        yield word + " "
    # The usage in the response is what the handler reports; nothing is estimated.
    yield OutputChunk.usage(prompt_tokens=len(words), completion_tokens=len(words))


@server.route("/v1/tokenize", "reverser")
def tokenize(request: CustomRequest) -> dict[str, object]:
    """Return the words of a prompt. The OpenAI API has no such route; the model answers it in addition to chat."""
    words = str(request.raw.get("prompt", "")).split()
    return {"tokens": words, "count": len(words)}


@server.embedding("letters")
def embed(request: EmbeddingRequest) -> list[list[float]]:
    """Return one vector for each input: how often each letter occurs, scaled to length one."""
    return [letter_histogram(text) for text in request.inputs]


def letter_histogram(text: str | list[int]) -> list[float]:
    """Return the letter counts of a text, scaled to length one."""
    if not isinstance(text, str):
        raise ApiError(400, "This model reads text, not token ids", param="input")
    counts = Counter(text.lower())
    vector = [float(counts[letter]) for letter in LETTERS]
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]


@server.asr("stopwatch")
async def measure(request: ASRRequest) -> dict[str, object]:
    """Return the length of a WAV file instead of its words. The segments are needed for subtitles (srt, vtt)."""
    try:
        with wave.open(io.BytesIO(request.audio)) as audio:
            seconds = audio.getnframes() / audio.getframerate()
    except (wave.Error, EOFError):
        raise ApiError(400, "This model reads WAV files only", param="file") from None
    text = f"A sound of {seconds:.2f} seconds."
    return {"duration": seconds, "segments": [{"start": 0.0, "end": seconds, "text": text}]}


@server.tts("beeper")
def beep(request: TTSRequest) -> Iterator[OutputChunk]:
    """Yield a beep for each word, at the pitch of its first letter; each beep is sent as soon as it is computed."""
    words = request.input.split()
    beep_frames = int(RATE * 0.1 / request.speed)
    yield OutputChunk.audio(wav_header(beep_frames * len(words)), "audio/wav")
    for word in words:
        pitch = 300 + 20 * (ord(word[0]) % 32)
        samples = (int(8000 * math.sin(2 * math.pi * pitch * n / RATE)) for n in range(beep_frames))
        yield OutputChunk.audio(struct.pack(f"<{beep_frames}h", *samples), "audio/wav")


def wav_header(frames: int) -> bytes:
    """Return the header of a WAV file of 16-bit mono samples."""
    size = 2 * frames
    sound = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE") + sound + struct.pack("<4sI", b"data", size)


@server.image_generation("stripes")
def draw(request: ImageGenRequest) -> Iterator[bytes]:
    """Yield ``n`` pictures of stripes, in colours that depend on the prompt."""
    width, height = min(request.width or 64, 512), min(request.height or 64, 512)
    for number in range(request.n):
        colour = zlib.crc32(f"{request.prompt} {number}".encode()).to_bytes(4, "big")[:3]
        rows = b"".join(
            b"\x00" + (colour if (y // 8) % 2 else b"\xff\xff\xff") * width for y in range(height)
        )
        yield png(width, height, rows)


def png(width: int, height: int, rows: bytes) -> bytes:
    """Return a PNG file of 8-bit RGB rows, each after its filter byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@server.image_edit("stripes")
def keep(request: ImageEditRequest) -> Iterator[bytes]:
    """Yield the pictures unchanged."""
    yield from request.images[: request.n]


@server.rerank("overlap")
def rank(request: RerankRequest) -> list[float]:
    """Return a score for each document: the share of the query's words in it. The response is sorted by score."""
    words = set(request.query.lower().split())
    return [len(words & set(text.lower().split())) / max(len(words), 1) for text in request.documents]


@server.moderation("shouting")
def judge(request: ModerationRequest) -> Iterator[dict[str, float]]:
    """Yield the share of capitals in each text; the other categories of the API are filled in."""
    for text in request.texts:
        letters = [letter for letter in text if letter.isalpha()]
        yield {"harassment": sum(map(str.isupper, letters)) / max(len(letters), 1)}


async def main(port: int) -> None:
    """Serve all models in one process until a signal arrives."""
    server.options.server.host = "127.0.0.1"
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run_as_standalone, port)
            print(f"serving {', '.join(server.list_models())} at {server.url}/v1", flush=True)
            await anext(signals)
            server.stop()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8080)
