"""The base class of all encoders.

An encoder turns the output of one handler into the bytes of one HTTP answer, on the node where the handler runs. It
takes each value that the handler gives, and returns the bytes that may be sent with it. It does not wait, and it knows
no socket.

The contract of an answer: ``encode`` any number of times, then ``finish`` once. An error ends the answer instead. The
gateway decides how an error is written, since it knows whether a part of the answer has been sent.
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
    """The encoding of one answer. Subclasses implement :meth:`_take` and :meth:`finish`.

    Attributes:
        streaming: bytes are sent while the handler works; a plain answer comes whole from :meth:`finish`.
        head: the head of the answer. That of a plain answer is valid from the start, that of a stream from its first
            bytes on.
    """

    #: The kind of model whose output is encoded.
    kind: ClassVar[Kind]
    #: Whether a single value may take so long to encode that it should be divided; see :meth:`divide`.
    divisible: ClassVar[bool] = False
    #: Whether a list means the same as its items, one by one.
    takes_lists: ClassVar[bool] = False

    streaming: bool = False
    head: Head = JSON_HEAD
    #: Why the choices of a text ended, with commas; set by :meth:`finish`. Empty for other answers.
    finish_reasons: str = ""

    def __init__(self) -> None:
        self._usage = UsageReport()

    @property
    def reported_usage(self) -> Usage | None:
        """The tokens of the answer, as far as the handler has reported them; ``None`` without a report."""
        return self._usage.usage

    def encode(self, value: Any) -> bytes:
        """Take the next value of the handler, and return the bytes that can be sent now; none if they are sent later.

        Raises:
            ApiError: the handler gave an error.
            TypeError: a handler for this route cannot give such a value.
            ValueError: the value is of the right type, but cannot be part of this answer.
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
        """Return one or more values that together mean the same as ``value``, and are each encoded in a short time."""
        return [value]

    def next_part(self) -> None:
        """Begin the answer to the next of several prompts: what is encoded from now on belongs to that one.

        Only the answers to requests that can have several prompts implement this.
        """
        raise NotImplementedError

    def early(self) -> Iterable[bytes]:
        """Yield the parts of a large answer that are better sent before :meth:`finish`.

        To be called once, after the last value.

        Raises:
            ValueError: the values of the handler do not make an answer.
        """
        return ()

    def finish(self) -> bytes:
        """Return the rest of the answer. To be called once.

        Raises:
            ValueError: the values of the handler do not make an answer.
        """
        raise NotImplementedError

    def _take(self, chunk: OutputChunk) -> bytes:
        raise NotImplementedError

    def _refuse(self, chunk: OutputChunk) -> NoReturn:
        raise TypeError(f"a handler of kind {self.kind} cannot give OutputChunk.{chunk.kind}")
