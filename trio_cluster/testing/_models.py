"""Fake models: handlers whose pace, failures and misbehaviour are set by a test.

A fake model can be registered for every kind, and its output is known beforehand: the pieces ``t0 ``, ``t1 `` and so
on, as text or as the bytes of audio or images, or vectors, scores and verdicts. So a test can compare what a client has
received with what the model has given, and what the model has given with what it should have given.

It records what happens to it: how many calls it has had, how many of them were cancelled, and whether each of them
could clean up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import attrs
import trio

from ..errors import ApiError
from ..local.adapters import Provider, ThreadProvider
from ..openai import (
    ASRRequest,
    ChatRequest,
    EmbeddingRequest,
    ImageEditRequest,
    ImageGenRequest,
    ModelRequest,
    ModerationRequest,
    OutputChunk,
    RerankRequest,
    TTSRequest,
)

__all__ = ["FakeModel", "ThreadedFakeModel"]

#: One step of a script: seconds to wait, an exception to raise, or a piece of output to give.
_Step: TypeAlias = float | Exception | OutputChunk

#: The signature of a PNG file. The rest of a fake image is not one.
_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


def _seconds(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{attribute.name} must be a finite number of seconds, at least 0, not {value!r}")


@attrs.define(eq=False, kw_only=True)
class FakeModel:
    """A handler with a script, which can be registered for any kind of model. Durations are seconds.

    It gives ``tokens`` pieces for text and audio, a vector for each input of a request for embeddings, a score for each
    document of a rerank request, a verdict on each input of a moderation, and as many images as the request asks for.
    ``fail_at`` and ``stall_at`` count these.

    Attributes:
        tokens: how many pieces a response has.
        first_after: how long it waits before the first piece.
        interval: how long it waits before each of the others.
        piece_size: bytes of each piece, which is padded with dots; 0 leaves it as short as it is. Large pieces fill the
            windows and buffers on the path to a client that does not read.
        marked: the output depends on the text of the request, so that a test sees whether responses were mixed up.
            Pieces of text, audio and images begin with it: the last text of a chat, the input of speech, the prompt of
            an image or a transcript. Documents are scored with the query in front of each. Vectors and verdicts depend
            on their inputs in any case. A route that the OpenAI API does not have has no text that is known.
        fail_at: after how many pieces it fails; ``None``: never.
        error: what it then raises. An ``ApiError`` is sent to the client; anything else becomes a 500.
        stall_at: after how many pieces it stalls; ``None``: never.
        stall_for: for how long it stalls; by default for ever.
        ignore_cancellation_for: how long it continues after it was cancelled.
        hang_in_cleanup: how long its cleanup takes, however it has ended. The cleanup cannot be cancelled.
        started: calls that have begun.
        finished: calls that got their whole response.
        failed: calls in which it raised ``error``.
        cancelled: calls that were cancelled, for any reason; a deadline is one.
        cleaned_up: calls whose cleanup has run to its end.
        running: calls that run now.
        max_running: the largest number of calls that ran at the same time.
        requests: the requests, in the order in which they came.
        allowed: for each request, how long it might have taken: the seconds to the deadline when it began.
    """

    tokens: int = 3
    first_after: float = attrs.field(default=0.0, converter=float, validator=_seconds)
    interval: float = attrs.field(default=0.0, converter=float, validator=_seconds)
    piece_size: int = 0
    marked: bool = False
    fail_at: int | None = None
    error: Exception = attrs.field(factory=lambda: ApiError(500, "the fake model fails", code="fake_failure"))
    stall_at: int | None = None
    stall_for: float = attrs.field(default=math.inf, converter=float)
    ignore_cancellation_for: float = attrs.field(default=0.0, converter=float, validator=_seconds)
    hang_in_cleanup: float = attrs.field(default=0.0, converter=float, validator=_seconds)

    started: int = attrs.field(default=0, init=False)
    finished: int = attrs.field(default=0, init=False)
    failed: int = attrs.field(default=0, init=False)
    cancelled: int = attrs.field(default=0, init=False)
    cleaned_up: int = attrs.field(default=0, init=False)
    running: int = attrs.field(default=0, init=False)
    max_running: int = attrs.field(default=0, init=False)
    requests: list[ModelRequest] = attrs.field(factory=list, init=False, repr=False)
    allowed: list[float] = attrs.field(factory=list, init=False, repr=False)
    _changed: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False, repr=False)

    def text(self, pieces: int | None = None, *, mark: str = "") -> str:
        """Return the text of a response, or of its first ``pieces`` pieces. Synchronous.

        Args:
            pieces: how many; by default all that come before it ends or fails.
            mark: the text of the request, for a model that is ``marked``.
        """
        if pieces is None:
            pieces = self.tokens if self.fail_at is None else min(self.tokens, self.fail_at)
        return "".join(self._piece(number, mark) for number in range(pieces))

    async def wait_until(self, condition: Callable[[FakeModel], bool]) -> None:
        """Wait until a condition of this model holds, for instance ``lambda m: m.running == 2``. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while not condition(self):
            await self._changed.park()

    def vector(self, number: int, text: Any = "") -> list[float]:
        """Return the vector that it gives for input ``number`` of a request for embeddings, whose text is ``text``."""
        return [float(number), float(len(text))]

    def score(self, text: str) -> float:
        """Return the score, between 0 and 1, that it gives a document or an input with this text.

        A model that is ``marked`` scores a document of a rerank request as the text of the query followed by that of
        the document.
        """
        return len(text) / (len(text) + 10)

    def image(self, number: int, *, mark: str = "") -> bytes:
        """Return the image that it gives as number ``number``.

        Args:
            number: counted from 0.
            mark: the prompt, for a model that is ``marked``.
        """
        return _PNG_SIGNATURE + self._piece(number, mark).encode()

    async def __call__(self, request: Any, provider: Provider) -> None:
        """Handle a request. A checkpoint."""
        self._begin(request)
        try:
            for step in self._script(request):
                if isinstance(step, float):
                    await trio.sleep(step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    await provider.push(step)
            self._count("finished")
        except trio.Cancelled:
            self._count("cancelled")
            with trio.move_on_after(self.ignore_cancellation_for, shield=True):
                await trio.sleep_forever()
            raise
        except Exception:
            self._count("failed")
            raise
        finally:
            with trio.move_on_after(self.hang_in_cleanup, shield=True):
                await trio.sleep_forever()
            self._end()

    def _script(self, request: Any) -> Iterator[_Step]:
        """Yield the steps of the script for a request."""
        pieces = self._pieces(request)
        for number, piece in enumerate(pieces):
            yield from self._stalls_and_failures(number)
            yield self.interval if number else self.first_after
            yield from piece
        yield from self._stalls_and_failures(len(pieces))

    def _stalls_and_failures(self, given: int) -> Iterator[_Step]:
        if given == self.stall_at:
            yield self.stall_for
        if given == self.fail_at:
            yield self.error

    def _pieces(self, request: Any) -> list[list[OutputChunk]]:
        mark = self._mark(request)
        texts = [self._piece(number, mark) for number in range(self.tokens)]
        match request:
            case EmbeddingRequest():
                vectors = [self.vector(number, text) for number, text in enumerate(request.inputs)]
                return [[OutputChunk.embedding(vector, index)] for index, vector in enumerate(vectors)]
            case RerankRequest():
                return [[OutputChunk.scores([self.score(mark + text)])] for text in request.documents]
            case ModerationRequest():
                return [[OutputChunk.json({"violence": self.score(text)})] for text in request.texts]
            case ImageGenRequest() | ImageEditRequest():
                images = [self.image(number, mark=mark) for number in range(request.n or 1)]
                return [[OutputChunk.image(image, "image/png")] for image in images]
            case TTSRequest():
                return [[OutputChunk.audio(text.encode(), "audio/mpeg")] for text in texts]
            case ChatRequest():
                return [[OutputChunk.text_delta(text, index) for index in range(request.n)] for text in texts]
            case _:
                return [[OutputChunk.text_delta(text)] for text in texts]

    def _mark(self, request: Any) -> str:
        """Return what the output for a request is marked with; nothing if it is not ``marked``."""
        return _text_of(request) if self.marked else ""

    def _piece(self, number: int, mark: str) -> str:
        return f"{mark if self.marked else ''}t{number} ".ljust(self.piece_size, ".")

    def _begin(self, request: ModelRequest) -> None:
        self.requests.append(request)
        self.allowed.append(trio.current_effective_deadline() - trio.current_time())
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        self._count("started")

    def _end(self) -> None:
        self.running -= 1
        self._count("cleaned_up")

    def _count(self, what: str) -> None:
        setattr(self, what, getattr(self, what) + 1)
        self._changed.unpark_all()


class ThreadedFakeModel(FakeModel):
    """A :class:`FakeModel` that is a plain function, and so runs in a thread for each call.

    The thread waits in trio (``trio.from_thread``), so it waits in virtual time if the clock is virtual.
    """

    def __call__(self, request: Any, provider: ThreadProvider) -> None:  # type: ignore[override]
        """Handle a request, in a thread."""
        trio.from_thread.run_sync(self._begin, request)
        try:
            for step in self._script(request):
                if isinstance(step, float):
                    trio.from_thread.run(trio.sleep, step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    provider.push(step)
            trio.from_thread.run_sync(self._count, "finished")
        except trio.Cancelled:
            trio.from_thread.run_sync(self._count, "cancelled")
            trio.from_thread.run(_sleep_shielded, self.ignore_cancellation_for)
            raise
        except Exception:
            trio.from_thread.run_sync(self._count, "failed")
            raise
        finally:
            trio.from_thread.run(_sleep_shielded, self.hang_in_cleanup)
            trio.from_thread.run_sync(self._end)


async def _sleep_shielded(seconds: float) -> None:
    """Sleep, and ignore cancellation."""
    with trio.move_on_after(seconds, shield=True):
        await trio.sleep_forever()


def _text_of(request: Any) -> str:
    """Return the text by which requests of one kind are told apart; nothing if there is none, or several."""
    match request:
        case ChatRequest():
            return request.last_text
        case TTSRequest():
            return request.input
        case RerankRequest():
            return request.query
        case ImageGenRequest() | ImageEditRequest() | ASRRequest():
            return request.prompt or ""
        case _:
            return ""
