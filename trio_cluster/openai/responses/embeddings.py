"""Embeddings: vectors, encoded as lists of numbers or as base64.

Vectors come as lists of numbers or as arrays of any library; arrays are recognised by their methods, so no array
library is needed here. Each vector is encoded when it comes, and only its text is kept. Every number of a vector is
checked to be finite: JSON cannot represent NaN, and a base64 text would carry it unnoticed into the client's index.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Iterator
from typing import Any, ClassVar, Final

import attrs

from trio_cluster.core.model import Kind
from trio_cluster.errors import ApiError

from ..json_values import dumps
from ..requests.types import EmbeddingRequest
from .choices import read_output
from .chunks import OutputChunk, doubles, to_chunk
from .encoder import Encoder

__all__ = ["EmbeddingEncoder"]

#: Numbers that are encoded at a time. That takes up to three milliseconds, in which the event loop is blocked.
_AT_A_TIME: Final = 4 * 1024

#: Bytes of an answer from which on it is joined and sent in parts, and bytes of a part.
_LARGE: Final = 1 << 20
_PART: Final = 64 * 1024

_BEGINNING: Final = b'{"object":"list","data":['

_SWAPPED: Final = sys.byteorder == "big"


def _is_finite(vector: array[float]) -> bool:
    # The sum is not finite if a number is not, and almost never otherwise. Testing it alone is much faster.
    return math.isfinite(sum(vector)) or all(map(math.isfinite, vector))


class EmbeddingEncoder(Encoder):
    """The answer to an embedding request.

    Vectors longer than the requested ``dimensions`` are cut and normalised to length one, as in the OpenAI API; shorter
    ones are the client's error. There must be as many vectors as inputs, all of one size.
    """

    kind: ClassVar[Kind] = "embedding"
    divisible: ClassVar[bool] = True

    def __init__(self, request: EmbeddingRequest) -> None:
        super().__init__()
        self._model = request.model
        self._wanted = len(request.inputs)
        self._dimensions = request.dimensions
        self._base64 = request.encoding_format == "base64"
        self._items: dict[int, bytes] = {}
        self._next = 0
        self._size: int | None = None
        self._extras: dict[str, Any] = {}
        self._begun = False  # a part of the answer has been returned

    def divide(self, value: Any) -> list[Any]:
        chunk = to_chunk(self.kind, value)
        if chunk.kind != "embeddings" or not chunk.value:
            return [chunk]
        step = max(1, _AT_A_TIME // max(1, len(chunk.value[0])))
        return [
            attrs.evolve(chunk, value=chunk.value[begin : begin + step])
            for begin in range(0, len(chunk.value), step)
        ]

    def _take(self, chunk: OutputChunk) -> bytes:
        if chunk.kind == "embeddings":
            for vector in chunk.value:
                self._add(vector, chunk.index)
        elif chunk.kind == "json":
            self._take_object(chunk.value)
        else:
            self._refuse(chunk)
        return b""

    def _take_object(self, obj: dict[str, Any]) -> None:
        """Take ``usage`` and other members of the answer, except its vectors."""
        if "data" in obj:
            raise TypeError(
                "embeddings are given as vectors or OutputChunk.embeddings, not as 'data' of a dict"
            )
        output = read_output(obj)
        self._usage.take_object(output.usage)
        self._extras |= output.extras

    def _add(self, vector: Any, index: int | None) -> None:
        if index is None:
            while self._next in self._items:
                self._next += 1
            index = self._next
        if index in self._items:
            raise ValueError(f"embedding {index} was given twice")
        if index >= self._wanted:
            raise ValueError(f"embedding {index} has no input: there are {self._wanted}")
        self._items[index] = b'{"object":"embedding","index":%d,"embedding":%s}' % (
            index,
            self._encode_vector(vector),
        )

    def _encode_vector(self, vector: Any) -> bytes:
        size = len(vector)
        if self._size is None:
            self._size = size
        elif self._size != size:
            raise ValueError(f"embeddings of {self._size} and of {size} dimensions in one answer")
        if self._base64 and self._dimensions in (None, size) and hasattr(vector, "astype"):
            # Straight from the array's memory, without making an object of each number.
            memory = vector.astype("<f4")
            if math.isfinite(float(memory.sum())):
                return b'"' + base64.b64encode(memory.tobytes()) + b'"'
        numbers = self._fit(doubles(vector, "an embedding consists of numbers"))
        if not self._base64:
            if not _is_finite(numbers):
                raise ValueError("an embedding contains a number that is not finite")
            return dumps(numbers.tolist())
        floats = array("f", numbers)
        # The floats are checked, not the doubles: a double may be too large for a float.
        if not _is_finite(floats):
            raise ValueError("an embedding contains a number that is not finite")
        if _SWAPPED:
            floats.byteswap()
        return b'"' + base64.b64encode(floats.tobytes()) + b'"'

    def _fit(self, numbers: array[float]) -> array[float]:
        wanted = self._dimensions
        if wanted is None or wanted == len(numbers):
            return numbers
        if wanted > len(numbers):
            raise ApiError(
                400,
                f"The model's embeddings have {len(numbers)} dimensions; {wanted} were asked for",
                param="dimensions",
                code="invalid_value",
            )
        cut = numbers[:wanted]
        length = math.sqrt(math.fsum(number * number for number in cut))
        if length > 0 and math.isfinite(length):
            cut = array("d", [number / length for number in cut])
        return cut

    def early(self) -> Iterator[bytes]:
        items = self._all_items()
        if sum(map(len, items)) < _LARGE:
            return
        self._begun = True
        self._items.clear()
        lead, part, size = _BEGINNING, [], 0
        # Items are removed as they are sent, to free their memory; from the end, where that is cheap.
        items.reverse()
        while items:
            part.append(items.pop())
            size += len(part[-1])
            if not items or size + len(items[-1]) > _PART:
                yield lead + b",".join(part)
                lead, part, size = b",", [], 0

    def _all_items(self) -> list[bytes]:
        if len(self._items) != self._wanted:
            raise ValueError(f"{len(self._items)} embeddings for {self._wanted} inputs")
        return [item for _, item in sorted(self._items.items())]

    def finish(self) -> bytes:
        data = b"" if self._begun else _BEGINNING + b",".join(self._all_items())
        usage = self._usage.for_chat()
        usage.pop("completion_tokens")
        rest = dumps({"model": self._model, "usage": usage} | self._extras)
        return data + b"]," + rest[1:]
