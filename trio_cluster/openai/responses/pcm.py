"""Samples as bytes, and the header of a WAV file, for handlers that make audio. Numpy is used, but not needed.

The length in the header of a WAV file comes before the samples, and a stream does not know it yet. Both lengths are
then the largest possible, as in OpenAI's own streamed answers, and players read to the end of the file.
"""

from __future__ import annotations

import struct
import sys
from array import array
from typing import Any, Final

__all__ = ["to_pcm16", "wav_header"]

#: The length in the header of a streamed file.
_UNKNOWN: Final = 0xFFFFFFFF
#: The format "PCM" in the header.
_PCM: Final = 1
#: The largest sample of 16 bits.
_PEAK: Final = 32767


def wav_header(rate: int, *, channels: int = 1, length: int | None = None) -> bytes:
    """Return the header of a WAV file of 16-bit PCM.

    Args:
        rate: samples per second and channel.
        channels: how many channels there are.
        length: bytes of samples that follow; ``None``: that is not known yet.
    """
    riff, data = (_UNKNOWN, _UNKNOWN) if length is None else (36 + length, length)
    frame = 2 * channels
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, _PCM, channels, rate, frame * rate, frame, 16)
    return struct.pack("<4sI4s", b"RIFF", riff, b"WAVE") + form + struct.pack("<4sI", b"data", data)


def to_pcm16(samples: Any, channels: int) -> bytes:
    """Return samples as 16-bit little-endian PCM.

    Args:
        samples: ``bytes``, which are 16-bit little-endian PCM already; or numbers: a list, an ``array.array`` or an
            array of any library. Integers are 16-bit samples, other numbers are from -1 to 1; larger ones are clipped,
            and NaN is silence. With several channels, either the samples of all channels in turn, or an array of the
            shape (frames, channels).
        channels: how many channels there are.

    Raises:
        TypeError: it is none of these.
        ValueError: the samples do not fill the channels of the last frame.
    """
    if isinstance(samples, bytes | bytearray | memoryview):
        data = bytes(samples)
        if len(data) % (2 * channels):
            raise ValueError(f"{len(data)} bytes are not a whole number of frames of {2 * channels} bytes")
        return data
    shape = getattr(samples, "shape", None)
    if shape is not None:
        if not (len(shape) == 1 or (len(shape) == 2 and shape[1] == channels)):
            raise ValueError(f"samples must have the shape (n,) or (n, {channels}), not {tuple(shape)}")
        samples = _flat(samples)
    elif not isinstance(samples, list | tuple | array):
        raise TypeError(f"samples must be bytes, a list of numbers or an array, not {type(samples).__name__}")
    values = samples if isinstance(samples, array) else _numbers(samples)
    if len(values) % channels:
        raise ValueError(f"{len(values)} samples are not a whole number of frames of {channels} channels")
    if values.typecode in "fd":
        values = array("h", [_scaled(value) for value in values])
    elif values.typecode != "h":
        values = array("h", [max(-_PEAK - 1, min(_PEAK, value)) for value in values])
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def _flat(samples: Any) -> array[Any]:
    """Return the samples of an array of any library, in the order of time."""
    integers = "int" in str(samples.dtype)
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(samples, numpy.ndarray):
        # In C, since speech has 24000 samples a second.
        if integers:
            samples = numpy.clip(samples, -_PEAK - 1, _PEAK)
        else:
            samples = numpy.rint(
                numpy.clip(numpy.nan_to_num(samples, posinf=1.0, neginf=-1.0), -1.0, 1.0) * _PEAK
            )
        return array("h", samples.astype(numpy.int16).tobytes())
    rows = samples.tolist()
    flat = [value for row in rows for value in row] if len(samples.shape) == 2 else rows
    return array("q" if integers else "d", flat)


def _numbers(samples: list[Any] | tuple[Any, ...]) -> array[Any]:
    """Return the numbers of a list: as integers if all of them are."""
    try:
        if all(isinstance(value, int) and not isinstance(value, bool) for value in samples):
            return array("q", samples)
        return array("d", samples)
    except TypeError as exc:
        raise TypeError(f"samples must be numbers: {exc}") from None
    except OverflowError:
        raise ValueError("a sample is larger than 64 bits") from None


def _scaled(value: float) -> int:
    if value != value:
        return 0
    return round(max(-1.0, min(1.0, value)) * _PEAK)
