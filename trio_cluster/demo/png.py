"""Grey pictures as PNG files, with nothing but numpy and zlib."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["encode_grey", "scale"]


def encode_grey(pixels: NDArray[np.uint8]) -> bytes:
    """Return a PNG file of ``pixels`` in the shape (height, width): rows from the top, 0 is black, 255 is white."""
    height, width = pixels.shape
    # The filter type before each row: 0 means that the row is stored unfiltered.
    rows = np.zeros((height, width + 1), np.uint8)
    rows[:, 1:] = pixels

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    depth, grey = 8, 0
    head = struct.pack(">IIBBBBB", width, height, depth, grey, 0, 0, 0)
    packed = zlib.compress(rows.tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def scale(picture: NDArray[np.floating[Any]], height: int, width: int) -> NDArray[np.float32]:
    """Return ``picture`` at another size in pixels, with bicubic interpolation (Catmull-Rom)."""
    rows, columns = picture.shape
    scaled = _weights(rows, height) @ picture @ _weights(columns, width).T
    return np.asarray(scaled, np.float32)


def _weights(old: int, new: int) -> NDArray[np.float32]:
    """Return the matrix, in the shape (new, old), that interpolates along one axis and repeats the edges."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((new, old), np.float32)
    for tap in range(4):
        distance = np.abs(centre - (first + tap))
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1.0
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4.0 * distance + 2.0
        weight = np.where(distance <= 1.0, near, np.where(distance < 2.0, far, 0.0))
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return matrix
