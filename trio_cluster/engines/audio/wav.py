"""WAV files and raw samples, in numpy: reading them at any rate, and writing samples.

The standard library's ``wave`` reads neither floating-point samples nor, before Python 3.12, the "extensible" headers
that many programs write for 24 bits. It also trusts the length in the header, which a streamed file does not have. So
the few chunks that matter are read here.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from math import gcd
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["ACCEPTED", "OtherFormatError", "WavError", "read", "resample", "to_pcm16"]

Samples = NDArray[np.float32]

#: The formats that :func:`read` accepts, for error messages.
ACCEPTED: Final = "WAV with 8, 16, 24 or 32-bit PCM or 32 or 64-bit floating-point samples"

_PCM: Final = 1
_FLOAT: Final = 3
_EXTENSIBLE: Final = 0xFFFE

# Offset and bytes by which other audio files are recognized, so that an error can name their format.
_OTHERS: Final = (
    (0, b"ID3", "MP3"),
    (0, b"\xff\xfb", "MP3"),
    (0, b"\xff\xf3", "MP3"),
    (0, b"\xff\xf2", "MP3"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (0, b"OggS", "Ogg"),
    (0, b"fLaC", "FLAC"),
    (4, b"ftyp", "MP4 or M4A"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska"),
    (0, b"FORM", "AIFF"),
)


class WavError(ValueError):
    """The bytes cannot be read as audio; the message says why, and what is accepted."""


class OtherFormatError(WavError):
    """The bytes may be audio, but not of a kind that :func:`read` accepts.

    Attributes:
        kind: what they are, such as ``MP3``; ``None`` if that is not known.
    """

    def __init__(self, message: str, kind: str | None) -> None:
        super().__init__(message)
        self.kind = kind


def read(data: bytes, *, max_seconds: float) -> tuple[Samples, int]:
    """Read a WAV file.

    A truncated file, or a streamed one that does not state its length, is read as far as it goes.

    Args:
        data: the whole file.
        max_seconds: the longest audio that is accepted.

    Returns:
        The samples, mixed down to one channel, from -1 to 1, in the shape (samples,); and their rate in Hz.

    Raises:
        OtherFormatError: it is not a WAV file, or not one of the :data:`ACCEPTED` kinds.
        WavError: it is damaged, or longer than ``max_seconds``.
    """
    if not data:
        raise WavError("the audio file is empty")
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        for offset, magic, name in _OTHERS:
            if data[offset : offset + len(magic)] == magic:
                raise OtherFormatError(f"this is {name} audio; send {ACCEPTED}", name)
        raise OtherFormatError(f"this is not a known audio file; send {ACCEPTED}", None)
    layout: tuple[int, int, int, int] | None = None
    position = 12
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        position += 8
        if name == b"fmt ":
            layout = _layout(data[position : position + size])
        elif name == b"data":
            if layout is None:
                break
            return _samples(data, position, min(position + size, len(data)), layout, max_seconds), layout[2]
        position += size + size % 2
    raise WavError("the WAV file is damaged: it has no samples, or no format of them")


def _layout(chunk: bytes) -> tuple[int, int, int, int]:
    """Return (encoding, channels, rate in Hz, bits) from a format chunk."""
    if len(chunk) < 16:
        raise WavError("the WAV file is damaged: its format chunk is too short")
    encoding, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if encoding == _EXTENSIBLE and len(chunk) >= 26:
        (encoding,) = struct.unpack_from("<H", chunk, 24)
    if not 1 <= channels <= 64:
        raise WavError(f"the WAV file has {channels} channels; accepted are 1 to 64")
    if not 1000 <= rate <= 384_000:
        raise WavError(f"the WAV file has {rate} samples per second; accepted are 1000 to 384000")
    known = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}
    if bits not in known.get(encoding, ()):
        raise OtherFormatError(
            f"the WAV file has samples of encoding {encoding} with {bits} bits; send {ACCEPTED}", "WAV"
        )
    return encoding, channels, rate, bits


def _samples(
    data: bytes, begin: int, end: int, layout: tuple[int, int, int, int], max_seconds: float
) -> Samples:
    encoding, channels, rate, bits = layout
    width = bits // 8
    frames = (end - begin) // (width * channels)
    if frames > max_seconds * rate:
        raise WavError(f"the audio is {frames / rate:.0f} s long; send at most {max_seconds:.0f} s")
    raw = np.frombuffer(data, np.uint8, frames * width * channels, begin)
    values: NDArray[Any]
    if encoding == _FLOAT:
        values = raw.view(f"<f{width}").astype(np.float32)
        values = np.clip(np.nan_to_num(values), -1.0, 1.0)
    elif bits == 8:
        values = (raw.astype(np.float32) - 128.0) / 128.0
    elif bits == 24:
        padded = np.zeros((frames * channels, 4), np.uint8)
        padded[:, 1:] = raw.reshape(-1, 3)
        values = padded.view("<i4")[:, 0].astype(np.float32) / 2.0**31
    else:
        values = raw.view(f"<i{width}").astype(np.float32) / 2.0 ** (bits - 1)
    mono: Samples = values if channels == 1 else values.reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return mono


# One filter at a time: between two rates that share no divisor there are thousands, which would take gigabytes.
@lru_cache(maxsize=512)
def _filter(phase: int, up: int, down: int) -> Samples:
    """Return the windowed sinc for the position ``phase / up`` between two input samples.

    It has :func:`_half_width` samples on either side.
    """
    half = _half_width(up, down)
    cutoff = min(1.0, up / down)
    offsets = np.arange(-half + 1, half + 1) - phase / up
    window = 0.5 + 0.5 * np.cos(np.pi * np.clip(offsets / half, -1.0, 1.0))
    values = cutoff * np.sinc(cutoff * offsets) * window
    found: Samples = (values / values.sum()).astype(np.float32)
    return found


def _half_width(up: int, down: int) -> int:
    return int(np.ceil(16 / min(1.0, up / down)))


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """Return ``samples`` at another rate, without the frequencies that the lower of the two rates cannot represent.

    Args:
        samples: in the shape (samples,).
        rate: their rate in Hz.
        wanted: the new rate in Hz.
    """
    if rate == wanted or not len(samples):
        return samples
    divisor = gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    half = _half_width(up, down)
    count = len(samples) * up // down
    result = np.empty(count, np.float32)
    padded = np.pad(samples, (half - 1, half + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)
    # Output k is at the position k * down / up of the input. Outputs at the same position between two inputs share one
    # filter, and their inputs are `down` apart.
    for first in range(min(up, count)):
        base, phase = divmod(first * down, up)
        result[first::up] = windows[base::down][: len(range(first, count, up))] @ _filter(phase, up, down)
    return result


def to_pcm16(samples: Samples) -> bytes:
    """Return samples from -1 to 1 as 16-bit little-endian PCM; larger ones are clipped."""
    return (np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()
