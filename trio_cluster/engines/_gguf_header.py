"""The beginning of a ``.gguf`` file: what kind of model it is, and how much memory that will take.

Only the facts that stand before the vocabulary are read, which are a few kilobytes. The file comes from somewhere, so
nothing in it is trusted: sizes are bounded, and a file that breaks the format is refused.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any, Final

import attrs

__all__ = ["GgufHeader", "read_header"]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
#: The formats of the plain types, by number; 8 is text, and 9 a list.
_PLAIN: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT: Final = 8
_LIST: Final = 9
#: Facts that are read, bytes of a text, and items of a list, at most.
_MAX_FACTS: Final = 1000
_MAX_TEXT: Final = 1 << 20
_MAX_ITEMS: Final = 10_000
#: Architectures of models that give vectors, and no text.
_EMBEDDING: Final = (
    "bert",
    "nomic-bert",
    "nomic-bert-moe",
    "jina-bert-v2",
    "jina-bert-v3",
    "neo-bert",
    "gemma-embedding",
)


@attrs.frozen
class GgufHeader:
    """What a model says of itself. A size that is not known is 0."""

    architecture: str
    context: int = 0
    """The tokens of context that it was trained for."""
    bytes_per_token: int = 0
    """The memory that each token of context takes."""
    is_model: bool = True
    """Whether it is a whole model, and not an addition to one."""

    @property
    def is_chat(self) -> bool:
        """Whether it generates text."""
        return self.is_model and self.architecture not in _EMBEDDING


def read_header(path: Path) -> GgufHeader:
    """Read the header of a file. Blocks for a short time.

    Raises:
        ValueError: it is no ``.gguf`` file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            facts = _read_facts(file)
        except (struct.error, UnicodeDecodeError, EOFError) as error:
            raise ValueError("it is damaged, or not complete") from error
    architecture = str(facts.get("general.architecture", ""))

    def number(name: str) -> int:
        value = facts.get(f"{architecture}.{name}", 0)
        # Some models have a number for each layer.
        value = max(value, default=0) if isinstance(value, list) else value
        return value if isinstance(value, int) and 0 <= value < 1 << 40 else 0

    heads = number("attention.head_count") or 1
    size = number("embedding_length") // heads
    keys, values = number("attention.key_length") or size, number("attention.value_length") or size
    of_heads = number("attention.head_count_kv") or heads
    return GgufHeader(
        architecture,
        number("context_length"),
        # In 16 bits.
        number("block_count") * of_heads * (keys + values) * 2,
        facts.get("general.type", "model") == "model",
    )


def _read_facts(file: IO[bytes]) -> dict[str, Any]:
    magic, version = file.read(4), _unpack(file, "I")
    if magic != _MAGIC:
        raise ValueError("it is no .gguf file")
    if version not in _VERSIONS:
        raise ValueError(f"its format has the version {version}, which is not known")
    _unpack(file, "Q")
    facts: dict[str, Any] = {}
    for _ in range(min(_unpack(file, "Q"), _MAX_FACTS)):
        name = _read_text(file)
        if name.startswith("tokenizer."):
            # The vocabulary follows, and after it nothing that is needed here.
            break
        facts[name] = _read_value(file, _unpack(file, "I"))
    return facts


def _read_value(file: IO[bytes], kind: int) -> Any:
    if kind == _TEXT:
        return _read_text(file)
    if kind == _LIST:
        item, count = _unpack(file, "I"), _unpack(file, "Q")
        if count > _MAX_ITEMS or item == _LIST:
            raise EOFError
        return [_read_value(file, item) for _ in range(count)]
    if kind not in _PLAIN:
        raise EOFError
    return _unpack(file, _PLAIN[kind])


def _read_text(file: IO[bytes]) -> str:
    length = _unpack(file, "Q")
    if length > _MAX_TEXT:
        raise EOFError
    found = file.read(length)
    if len(found) < length:
        raise EOFError
    return found.decode()


def _unpack(file: IO[bytes], form: str) -> Any:
    form = f"<{form}"
    (value,) = struct.unpack(form, file.read(struct.calcsize(form)))
    return value
