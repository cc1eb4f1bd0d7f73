"""Which models a set of ``.gguf`` files has: in a folder of this machine, or in a repository of a model hub.

A large model may be split into files ``NAME-00001-of-00003.gguf``; llama.cpp is given the first one, and finds the
others beside it. Files whose names begin with ``mmproj`` are parts of multimodal models and no models of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import attrs

__all__ = ["GgufModel", "choose_model", "find_models", "find_parts", "model_name"]

_SUFFIX: Final = ".gguf"
_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
#: The quantization that most people want: small, and hardly worse than the original.
_USUAL: Final = "Q4_K_M"
#: Files that an error lists at most.
_LISTED: Final = 20


@attrs.frozen
class GgufModel:
    """A model that consists of one file or more."""

    name: str
    """The name of its file, without folder, number and suffix."""
    path: str
    """The path of its files, without number and suffix."""
    files: Sequence[str]
    """Its files, in order."""
    missing: int = 0
    """How many of its files are missing."""


def find_models(paths: Iterable[str]) -> list[GgufModel]:
    """Return the models that files belong to, sorted by their paths.

    Args:
        paths: of all files, with ``/`` between their parts. Those of other kinds are left out.
    """
    parts: dict[tuple[str, int], list[str]] = {}
    for path in sorted(paths):
        name = PurePosixPath(path).name
        if not name.lower().endswith(_SUFFIX) or name.lower().startswith("mmproj"):
            continue
        stem = path[: -len(_SUFFIX)]
        part = _PART.fullmatch(stem)
        key = (stem, 1) if part is None else (part["stem"], int(part["count"]))
        parts.setdefault(key, []).append(path)
    return [
        GgufModel(PurePosixPath(stem).name, stem, files, count - len(files))
        for (stem, count), files in parts.items()
    ]


def model_name(path: str) -> str:
    """Return the name of the model whose first file has this path."""
    models = find_models([path])
    return models[0].name if models else PurePosixPath(path).stem


def find_parts(first: Path) -> list[Path]:
    """Return all files of the model whose first file is given. Blocks."""
    models = find_models([path.name for path in first.parent.iterdir()])
    found = next((model.files for model in models if first.name in model.files), [first.name])
    return [first.parent / name for name in found]


def choose_model(models: Sequence[GgufModel], wanted: str | None) -> GgufModel:
    """Return the model that a person means.

    Args:
        models: those that there are.
        wanted: the path or the name of a file, with or without ``.gguf``; or a part of its name, such as ``Q8_0``.
            Upper and lower case are the same. ``None``: the only one, or the only one of the usual quantization,
            ``Q4_K_M``.

    Raises:
        ValueError: there is none, or several; the message lists them.
    """
    if not models:
        raise ValueError("it has no .gguf files")
    found = _matching(models, wanted or _USUAL)
    if wanted is None and len(models) == 1:
        found = list(models)
    if len(found) != 1:
        listed = [model.files[0] for model in found or models]
        more = "" if len(listed) <= _LISTED else f" and {len(listed) - _LISTED} more"
        why = (
            f"'{wanted}' is in the names of several files"
            if found and wanted
            else f"no file is meant by '{wanted}'"
            if wanted
            else "it has several .gguf files; name one"
        )
        raise ValueError(f"{why}: {', '.join(listed[:_LISTED])}{more}")
    (model,) = found
    if model.missing:
        raise ValueError(f"{model.missing} of the files of {model.path} are missing")
    return model


def _matching(models: Sequence[GgufModel], wanted: str) -> list[GgufModel]:
    plain = wanted.lower().removesuffix(_SUFFIX)
    part = re.compile(rf"(^|[-./]){re.escape(plain)}($|[-./])", re.IGNORECASE)
    ways = (
        lambda model: plain in (model.path.lower(), *(file.lower()[: -len(_SUFFIX)] for file in model.files)),
        lambda model: plain == model.name.lower(),
        lambda model: part.search(model.name) is not None,
        lambda model: part.search(model.path) is not None,
    )
    for way in ways:
        if found := [model for model in models if way(model)]:
            return found
    return []
