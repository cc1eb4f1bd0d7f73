"""A model of each kind, in pure Python: chat, embedding, speech, images, ranking, moderation, and a route of its own.

    python all_kinds.py [PORT]

None of them is clever. They show what a handler of each kind is given and what it gives back, so that a
real engine can take their place. ``client.py`` asks all of them something.
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
    """Give the words of the last message in reverse order, one piece each, and report how many there were."""
    words = request.last_text.split()
    for word in reversed(words):
        yield word + " "
    # Only what a handler reports is shown as usage; nothing is estimated.
    yield OutputChunk.usage(prompt_tokens=len(words), completion_tokens=len(words))


@server.route("/v1/tokenize", "reverser")
def tokenize(request: CustomRequest) -> dict[str, object]:
    """Give the words of a prompt. The OpenAI API has no such route; the model has it beside the chat."""
    words = str(request.raw.get("prompt", "")).split()
    return {"tokens": words, "count": len(words)}


@server.embedding("letters")
def embed(request: EmbeddingRequest) -> list[list[float]]:
    """Give one vector for each input: how often each letter occurs, scaled to length one."""
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
    """Write down not what a WAV file says but how long it is. Segments make subtitles (srt, vtt) possible."""
    try:
        with wave.open(io.BytesIO(request.audio)) as audio:
            seconds = audio.getnframes() / audio.getframerate()
    except (wave.Error, EOFError):
        raise ApiError(400, "This model reads WAV files only", param="file") from None
    text = f"A sound of {seconds:.2f} seconds."
    return {"duration": seconds, "segments": [{"start": 0.0, "end": seconds, "text": text}]}


@server.tts("beeper")
def beep(request: TTSRequest) -> Iterator[OutputChunk]:
    """Beep once for each word, at the pitch of its first letter; each beep is sent when it is computed."""
    words = request.input.split()
    beep_frames = int(RATE * 0.1 / request.speed)
    yield OutputChunk.audio(wav_header(beep_frames * len(words)), "audio/wav")
    for word in words:
        pitch = 300 + 20 * (ord(word[0]) % 32)
        samples = (int(8000 * math.sin(2 * math.pi * pitch * n / RATE)) for n in range(beep_frames))
        yield OutputChunk.audio(struct.pack(f"<{beep_frames}h", *samples), "audio/wav")


def wav_header(frames: int) -> bytes:
    """Return the beginning of a WAV file of 16-bit mono samples."""
    size = 2 * frames
    sound = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE") + sound + struct.pack("<4sI", b"data", size)


@server.image_generation("stripes")
def draw(request: ImageGenRequest) -> Iterator[bytes]:
    """Draw ``n`` pictures of stripes, whose colours the prompt decides."""
    width, height = min(request.width or 64, 512), min(request.height or 64, 512)
    for number in range(request.n):
        colour = zlib.crc32(f"{request.prompt} {number}".encode()).to_bytes(4, "big")[:3]
        rows = b"".join(
            b"\x00" + (colour if (y // 8) % 2 else b"\xff\xff\xff") * width for y in range(height)
        )
        yield png(width, height, rows)


def png(width: int, height: int, rows: bytes) -> bytes:
    """Return a PNG file of 8-bit RGB rows, each with its filter byte in front."""

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
    """Give the pictures back as they are, as a model would that has learned nothing."""
    yield from request.images[: request.n]


@server.rerank("overlap")
def rank(request: RerankRequest) -> list[float]:
    """Give each document the share of the query's words that are in it; whoever asked gets the best ones first."""
    words = set(request.query.lower().split())
    return [len(words & set(text.lower().split())) / max(len(words), 1) for text in request.documents]


@server.moderation("shouting")
def judge(request: ModerationRequest) -> Iterator[dict[str, float]]:
    """Say how much of each text is in capitals; the rest of the official form is filled in."""
    for text in request.texts:
        letters = [letter for letter in text if letter.isalpha()]
        yield {"harassment": sum(map(str.isupper, letters)) / max(len(letters), 1)}


async def main(port: int) -> None:
    """Serve all of them in one process until a signal asks for the end."""
    server.options.server.host = "127.0.0.1"
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run_as_standalone, port)
            print(f"serving {', '.join(server.list_models())} at {server.url}/v1", flush=True)
            await anext(signals)
            server.stop()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8080)
