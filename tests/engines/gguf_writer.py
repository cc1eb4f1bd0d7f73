"""Writes the beginnings of ``.gguf`` files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

__all__ = ["header", "write_gguf"]


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<IIQ", 9, 4, len(value)) + b"".join(struct.pack("<I", item) for item in value)


def header(version: int = 3, **facts: Any) -> bytes:
    """Return a header; ``__`` in a name stands for a dot, ``_x_`` for a hyphen."""
    named = {name.replace("_x_", "-").replace("__", "."): value for name, value in facts.items()}
    return (
        b"GGUF"
        + struct.pack("<IQQ", version, 0, len(named))
        + b"".join(_text(name) + _value(value) for name, value in named.items())
    )


def write_gguf(path: Path, size: int = 1000, architecture: str = "llama", **facts: Any) -> None:
    """Write a file of so many bytes that begins like a model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = header(general__architecture=architecture, **facts)
    path.write_bytes(content.ljust(size, b"\0"))
