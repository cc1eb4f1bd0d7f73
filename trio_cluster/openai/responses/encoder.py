"""What every encoder is, and what all of them do alike.

An encoder turns the output of one handler into the bytes of one HTTP answer, on the node where the handler
runs. It is fed with whatever the handler gives and says after every piece which bytes may go out. Nothing
here waits, and nothing here knows a socket.

The contract of an answer: ``encode`` any number of times, then ``finish`` once. An error ends it instead;
what an error looks like is for the HTTP face to say, which knows whether anything has been sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Final, NoReturn

from trio_cluster.core.answer import Head, Usage
from trio_cluster.core.model import Kind
from trio_cluster.errors import ApiError

from ..sse import NO_PROXY_BUFFERING
from .chunks import OutputChunk, to_chunk
from .usage import UsageReport

__all__ = ["JSON_HEAD", "SSE_HEAD", "Encoder"]

JSON_HEAD: Final = Head(200, "application/json")

SSE_HEAD: Final = Head(200, "text/event-stream", NO_PROXY_BUFFERING)


class Encoder:
    """The encoding of one answer. Subclasses say how in :meth:`_take` and :meth:`finish`.

    Attributes:
        streaming: bytes go out while the handler works; a plain answer comes whole from :meth:`finish`.
        head: the head of the answer: a plain one's from the start, a streamed one's from its first bytes on.
    """

    kind: ClassVar[Kind]
    #: Whether what a handler gives may be so much that it is better encoded in parts; see :meth:`divide`.
    divisible: ClassVar[bool] = False
    #: Whether a list is the same as what is in it, one by one.
    takes_lists: ClassVar[bool] = False

    streaming: bool = False
    head: Head = JSON_HEAD

    def __init__(self) -> None:
        self._usage = UsageReport()

    @property
    def reported_usage(self) -> Usage | None:
        """The tokens of the answer, as far as the handler has reported them; ``None`` without a report."""
        return self._usage.usage

    def encode(self, value: Any) -> bytes:
        """Return what can be sent once the handler has given ``value``; empty if it is kept for later.

        Raises:
            ApiError: the handler gave an error.
            TypeError: ``value`` is nothing that a handler for this route can give.
            ValueError: it is of the right type, but cannot be part of this answer.
        """
        if self.takes_lists and isinstance(value, list | tuple):
            return b"".join([self.encode(each) for each in value])
        chunk = to_chunk(self.kind, value)
        if chunk.kind == "error":
            status, message, code = chunk.value
            raise ApiError(status, message, code=code)
        if chunk.kind == "usage":
            self._usage.take_counts(*chunk.value)
            return b""
        return self._take(chunk)

    def divide(self, value: Any) -> list[Any]:
        """Return values that say the same as ``value``, none of which takes long to encode; there is at least one."""
        return [value]

    def early(self) -> Iterable[bytes]:
        """Yield what can go out, in parts, before :meth:`finish` is called, when there will be no more values.

        Raises:
            ValueError: what the handler gave does not make an answer.
        """
        return ()

    def finish(self) -> bytes:
        """Return the rest of the answer, which is complete with it. To be called once.

        Raises:
            ValueError: what the handler gave does not make an answer.
        """
        raise NotImplementedError

    def _take(self, chunk: OutputChunk) -> bytes:
        raise NotImplementedError

    def _refuse(self, chunk: OutputChunk) -> NoReturn:
        raise TypeError(f"a handler of kind {self.kind} cannot give OutputChunk.{chunk.kind}")
