"""How a piece of a body is put on the connection."""

from __future__ import annotations

import pytest

from trio_cluster.http1.framing import pieces_to_write


@pytest.mark.parametrize(
    ("body", "chunked", "last", "written"),
    [
        (b"ab", False, False, b"HEADab"),
        (b"ab", False, True, b"HEADab"),
        (b"", False, True, b"HEAD"),
        (b"ab", True, False, b"HEAD2\r\nab\r\n"),
        (b"ab", True, True, b"HEAD2\r\nab\r\n0\r\n\r\n"),
        (b"", True, True, b"HEAD0\r\n\r\n"),
        (b"", True, False, b"HEAD"),
    ],
)
def test_a_piece_is_framed_and_written_in_one_go(
    body: bytes, chunked: bool, last: bool, written: bytes
) -> None:
    assert pieces_to_write(b"HEAD", body, chunked=chunked, last=last) == [written]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_large_piece_is_framed_alike_and_not_copied(chunked: bool, last: bool) -> None:
    body = bytes(1 << 20)
    pieces = pieces_to_write(b"HEAD", body, chunked=chunked, last=last)
    assert any(piece is body for piece in pieces)
    size = b"100000\r\n" if chunked else b""
    end = (b"\r\n" if chunked else b"") + (b"0\r\n\r\n" if chunked and last else b"")
    assert b"".join(pieces) == b"HEAD" + size + body + end
