"""Embeddings: vectors in, lists of numbers or base64 out.

Vectors come as lists of numbers or as arrays of whatever library; arrays are recognised by what they can do,
so that no array library is needed here. Each is encoded when it comes, and only its text is kept. A vector is
checked whole: JSON has no word for NaN, and a base64 text would carry it unseen into somebody's index.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from typing import Any, ClassVar, Final

from trio_cluster._errors import ApiError
from trio_cluster._models import Kind

from ._choices import read_output
from ._chunks import OutputChunk
from ._encoding import Encoder
from ._json import dumps
from ._requests import EmbeddingRequest

__all__ = ["EmbeddingEncoder"]

_SWAPPED: Final = sys.byteorder == "big"


def _is_finite(vector: array[float]) -> bool:
    # The sum is not finite if an item is not, and almost never otherwise; it is much the faster question.
    return math.isfinite(sum(vector)) or all(map(math.isfinite, vector))


def _read_vector(vector: Any) -> array[float]:
    """Return the numbers of a vector, as the doubles that they are.

    Raises:
        TypeError: there is something else in it.
    """
    tolist = getattr(vector, "tolist", None)
    numbers = vector if tolist is None else tolist()
    try:
        return array("d", numbers)
    except TypeError as exc:
        raise TypeError(f"an embedding consists of numbers: {exc}") from None


class EmbeddingEncoder(Encoder):
    """The answer to an embedding request.

    Vectors longer than the ``dimensions`` that the client asked for are cut and made to have length one
    again, as the OpenAI API does it; shorter ones are the client's error. The number of vectors must be the
    number of inputs, and all must be of one size.
    """

    kind: ClassVar[Kind] = "embedding"

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
        """Take members of the answer: ``usage``, and whatever else it is to carry apart from its vectors."""
        if "data" in obj:
            raise TypeError(
                "embeddings are given as vectors or OutputChunk.embeddings, not as 'data' of a dict"
            )
        output = read_output(obj)
        self._take_usage(output.usage)
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
            # Straight from the array's memory: no number becomes an object.
            memory = vector.astype("<f4")
            if math.isfinite(float(memory.sum())):
                return b'"' + base64.b64encode(memory.tobytes()) + b'"'
        numbers = self._fit(_read_vector(vector))
        if not self._base64:
            if not _is_finite(numbers):
                raise ValueError("an embedding contains a number that is not finite")
            return dumps(numbers.tolist())
        floats = array("f", numbers)
        # Asked of the floats: a double may be too large for one.
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

    def finish(self) -> bytes:
        if len(self._items) != self._wanted:
            raise ValueError(f"{len(self._items)} embeddings for {self._wanted} inputs")
        data = b",".join(item for _, item in sorted(self._items.items()))
        usage = self._usage_object()
        usage.pop("completion_tokens")
        rest = dumps({"model": self._model, "usage": usage} | self._extras)
        return b'{"object":"list","data":[' + data + b"]," + rest[1:]
