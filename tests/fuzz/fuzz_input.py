"""What all fuzz targets share: how an input is cut into pieces, how it grows, and what it may cost.

An input has a prefix of :data:`PREFIX` bytes: the part of the target that is meant, how the rest is cut into pieces,
and which part of it is repeated, how often. The rest is the data. The repetition is there since a fuzzer finds large
inputs slowly, and it takes large inputs to find a cost that is not proportional.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

import attrs

__all__ = ["PREFIX", "Bytecode", "Input", "TooSlow", "seed", "timed"]

#: Bytes of the prefix: part, cuts, repetition, start and length of what is repeated.
PREFIX: Final = 5
#: From this value on, the byte means a repetition: 2, 4, 8 ... times.
_REPEATED: Final = 0xF0
#: Bytes of data at most, with all repetitions.
_LARGEST: Final = 72 * 1024
#: Data up to this size may come byte by byte; larger data in this many pieces at most.
_BYTEWISE: Final = 1024
_PIECES: Final = 64

#: Seconds of CPU time that 64 KiB of input may take; less input may take as much.
_BUDGET: Final = 0.05
_UNIT: Final = 64 * 1024
#: And for each piece, which costs its sender a packet.
_PER_PIECE: Final = 25e-6

T = TypeVar("T")


class TooSlow(AssertionError):
    """An input costs more CPU time than its size justifies, three times in a row."""


class Slowdown:
    """By which factor this process is slower than what is measured, for instance since it counts branches."""

    factor = 1.0


def timed(function: Callable[[], T], size: int, pieces: int = 1) -> T:
    """Call a function, and check what it costs: the best of three times, if once is too much.

    Args:
        function: must do the same each time.
        size: bytes of its input.
        pieces: in how many pieces they come.

    Raises:
        TooSlow: it costs more than the input may cost.
    """
    budget = (_BUDGET * max(1.0, size / _UNIT) + _PER_PIECE * pieces) * Slowdown.factor
    spent = []
    for _ in range(3):
        before = time.thread_time()
        result = function()
        spent.append(time.thread_time() - before)
        if spent[-1] <= budget:
            return result
    raise TooSlow(f"{size} bytes in {pieces} pieces took {min(spent):.3f} s; the budget is {budget:.3f} s")


@attrs.frozen
class Input:
    """An input, taken apart.

    Attributes:
        part: which part of the target is meant.
        data: the data, with its repetitions.
        pieces: the same, cut into pieces.
    """

    part: int
    data: bytes
    pieces: list[bytes]

    @classmethod
    def of(cls, encoded: bytes) -> Input:
        """Return what the bytes of a fuzzer mean; there are none that mean nothing."""
        part, cuts, repetition, start, length = encoded[:PREFIX].ljust(PREFIX, b"\0")
        data = encoded[PREFIX:]
        if repetition >= _REPEATED and (unit := data[start : start + length]):
            times = min(2 << (repetition & 0x0F), max(1, (_LARGEST - len(data)) // len(unit) + 1))
            data = data[:start] + unit * times + data[start + length :]
        data = data[:_LARGEST]
        return cls(part, data, _cut(data, cuts))


def _cut(data: bytes, cuts: int) -> list[bytes]:
    if cuts == 0 or len(data) < 2:
        return [data]
    if cuts == 1:
        size = 1 if len(data) <= _BYTEWISE else len(data) // _PIECES
        return [data[at : at + size] for at in range(0, len(data), size)]
    chance = random.Random(cuts)
    ends = sorted({int(chance.random() * len(data)) for _ in range(1 + cuts % 9)} - {0})
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


def seed(
    data: bytes, *, part: int = 0, cuts: int = 0, times: int = 1, start: int = 0, length: int = 0
) -> bytes:
    """Return an input: the other way round. ``times`` is rounded to a power of two."""
    repetition = _REPEATED + times.bit_length() - 2 if times > 1 else 0
    return bytes((part, cuts, repetition, start, length)) + data


class Bytecode:
    """Reads bytes as a program; behind their end there are zeros.

    Attributes:
        over: all bytes have been read.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def over(self) -> bool:
        """Whether all bytes have been read."""
        return self._at >= len(self._data)

    def byte(self) -> int:
        """Return the next byte."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def number(self, size: int) -> int:
        """Return the next bytes as one number."""
        return int.from_bytes(bytes(self.byte() for _ in range(size)), "big")

    def pick(self, options: list[T]) -> T:
        """Return one of several things, by the next byte."""
        return options[self.byte() % len(options)]

    def text(self) -> bytes:
        """Return some of the next bytes, up to 255."""
        size = self.byte()
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken
