"""Models that do what a test tells them: at what pace, how far, how they fail, and how badly they behave.

A fake model answers for every kind, and its answer is known beforehand: the pieces ``t0 ``, ``t1 `` and so on, as text
or as the bytes of audio or images, or vectors, scores and verdicts. So a test can compare what a client has received
with what the model has given, and what the model has given with what it should have.

What happens to it is recorded: how many calls it has had, how many of them were cancelled, and whether it was always
allowed to clean up.
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

#: One thing that a model does: it waits for so long, it fails, or it gives this.
_Step: TypeAlias = float | Exception | OutputChunk

#: Bytes that a picture begins with; what is behind them is a fake.
_PNG: Final = b"\x89PNG\r\n\x1a\n"


def _seconds(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{attribute.name}: seconds that end, not {value!r}")


@attrs.define(eq=False, kw_only=True)
class FakeModel:
    """A handler with a script, in a form that can be registered for any kind of model. Durations are seconds.

    What it gives are ``tokens`` pieces for text and audio, a vector for each input of a request for embeddings, a score
    for each document, a verdict on each input of a moderation, and as many pictures as a request for images wants.
    ``fail_at`` and ``stall_at`` count these.

    Attributes:
        tokens: how many pieces an answer has.
        first_after: how long it thinks before the first piece.
        interval: how long it takes for each of the others.
        piece_size: bytes of each piece, which is filled up with dots; 0 leaves it as short as it is. Large pieces fill
            the windows and buffers on the way to a client that does not read.
        marked: pieces begin with the text of the request, so that answers which were mixed up are told apart.
        fail_at: after how many pieces it fails; ``None``: never.
        error: what it then raises. An ``ApiError`` is for the client; anything else becomes a 500.
        stall_at: after how many pieces it falls silent; ``None``: never.
        stall_for: for how long; for ever, if nobody says.
        ignore_cancellation_for: how long it goes on after it was cancelled.
        hang_in_cleanup: how long its cleanup takes, however it has ended, and whatever anybody wants.
        started: calls it has had.
        finished: calls that have got their whole answer.
        failed: calls in which it has failed.
        cancelled: calls that were cancelled, by whomever; a deadline is one of them.
        cleaned_up: calls whose cleanup has run to its end.
        running: calls that it has now.
        max_running: calls that it had at most at the same time.
        requests: what it was asked, in the order of coming.
        allowed: for each request, how long it might have taken: the deadline it found, from the instant of its start.
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
        """Return the text of an answer, or of its first ``pieces`` pieces.

        Args:
            pieces: how many; all of them, or as many as come before it fails, if nobody says.
            mark: the text of the request, for a model that is marked.
        """
        if pieces is None:
            pieces = self.tokens if self.fail_at is None else min(self.tokens, self.fail_at)
        return "".join(self._piece(number, mark) for number in range(pieces))

    async def wait_until(self, condition: Callable[[FakeModel], bool]) -> None:
        """Wait until something is true of this model, for instance ``lambda m: m.running == 2``. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while not condition(self):
            await self._changed.park()

    def vector(self, number: int, text: Any = "") -> list[float]:
        """Return the vector that is given for input ``number`` of a request for embeddings, whose text is ``text``."""
        return [float(number), float(len(text))]

    def score(self, text: str) -> float:
        """Return the score that is given to a document or an input with this text, between 0 and 1."""
        return len(text) / (len(text) + 10)

    def image(self, number: int, *, mark: str = "") -> bytes:
        """Return the picture that is given as number ``number``."""
        return _PNG + self._piece(number, mark).encode()

    async def __call__(self, request: Any, provider: Provider) -> None:
        """Answer a request, as a handler does."""
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
        """Say what is to be done for a request, step by step."""
        pieces = self._pieces(request)
        for number, piece in enumerate(pieces):
            yield from self._mishaps(number)
            yield self.interval if number else self.first_after
            yield from piece
        yield from self._mishaps(len(pieces))

    def _mishaps(self, given: int) -> Iterator[_Step]:
        if given == self.stall_at:
            yield self.stall_for
        if given == self.fail_at:
            yield self.error

    def _pieces(self, request: Any) -> list[list[OutputChunk]]:
        mark = _mark(request)
        texts = [self._piece(number, mark) for number in range(self.tokens)]
        match request:
            case EmbeddingRequest():
                vectors = [self.vector(number, text) for number, text in enumerate(request.inputs)]
                return [[OutputChunk.embedding(vector, index)] for index, vector in enumerate(vectors)]
            case RerankRequest():
                return [[OutputChunk.scores([self.score(text)])] for text in request.documents]
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
    """A :class:`FakeModel` that is a plain function, and so runs in a thread of its own for each call.

    All of its waiting is done in trio, from the thread, so that it waits in virtual time where that is virtual.
    """

    def __call__(self, request: Any, provider: ThreadProvider) -> None:  # type: ignore[override]
        """Answer a request, as a handler in a thread does."""
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
            trio.from_thread.run(_linger, self.ignore_cancellation_for)
            raise
        except Exception:
            trio.from_thread.run_sync(self._count, "failed")
            raise
        finally:
            trio.from_thread.run(_linger, self.hang_in_cleanup)
            trio.from_thread.run_sync(self._end)


async def _linger(seconds: float) -> None:
    """Go on for a while, whoever wants one to stop."""
    with trio.move_on_after(seconds, shield=True):
        await trio.sleep_forever()


def _mark(request: Any) -> str:
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
