"""PNG files and scaling."""

from __future__ import annotations

import struct
import zlib

import pytest

np = pytest.importorskip("numpy")

from trio_cluster.demo import png  # noqa: E402


def test_a_picture_can_be_decoded_by_the_rules_of_the_format() -> None:
    pixels = np.arange(35, dtype=np.uint8).reshape(5, 7)
    data = png.encode_grey(pixels)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, chunks = 8, {}
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + size]
        (checksum,) = struct.unpack_from(">I", data, position + 8 + size)
        assert checksum == zlib.crc32(kind + body)
        chunks[kind] = body
        position += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (7, 5, 8, 0, 0, 0, 0)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(5, 8)
    assert (rows[:, 0] == 0).all()
    assert (rows[:, 1:] == pixels).all()


def test_scaling_keeps_a_uniform_picture_uniform_and_a_gradient_a_gradient() -> None:
    assert np.allclose(png.scale(np.full((8, 8), 0.3), 100, 37), 0.3, atol=1e-6)
    slope = np.tile(np.arange(8.0), (8, 1))
    wide = png.scale(slope, 8, 80)
    assert wide.shape == (8, 80)
    assert np.allclose(np.diff(wide[:, 20:60], axis=1), 0.1, atol=1e-5)


def test_scaling_to_the_same_size_changes_nothing() -> None:
    picture = np.random.default_rng(1).random((8, 8))
    assert np.allclose(png.scale(picture, 8, 8), picture, atol=1e-6)
