"""A folder of ``.gguf`` files: each is a model that is loaded when it is asked for.

The folder is looked through again every ten seconds, with the folders below it. A file that was added is a model when
two looks in a row have found it with the same size, for a file that is being copied grows; one that is gone, or has
changed, is no model any more: its requests end first. A file that cannot be a model is left out, and the log says why,
once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final, TypeAlias

import attrs
import trio

from trio_cluster.core.threads import NoThread, run_in_thread
from trio_cluster.errors import ClusterError

from ._gguf_files import find_models
from ._gguf_header import read_header

__all__ = ["FolderModel", "find_in_folder", "follow_folder"]

logger = logging.getLogger("trio_cluster.engines")

#: Seconds between two looks at the folder.
_LOOK: Final = 10.0


@attrs.frozen
class FolderModel:
    """A model in a folder. Equal if no file of it has changed."""

    name: str
    path: Path
    """Its first file."""
    size: int
    """Bytes of its files."""
    changed: int
    """When its files were changed last."""


#: Serves one model until cancelled: ``serve(model, task_status=...)``.
Serve: TypeAlias = Callable[..., Awaitable[None]]


def find_in_folder(folder: Path) -> tuple[list[FolderModel], Mapping[Path, str]]:
    """Return the models in a folder and in those below it, and why other files are none. Blocks.

    Of two models of one name, the first one by its path counts.

    Raises:
        OSError: the folder cannot be read.
    """
    os.listdir(folder)
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    models: dict[str, FolderModel] = {}
    refused: dict[Path, str] = {}
    for found in find_models(paths):
        files = [folder / file for file in found.files]
        first = files[0]
        try:
            stats = [file.stat() for file in files]
            if found.missing:
                refused[first] = f"{found.missing} of its files are missing"
            elif not (header := read_header(first)).is_chat:
                kind = f"is of the kind {header.architecture}" if header.is_model else "is no whole model"
                refused[first] = f"it {kind}, and cannot be asked"
            elif found.name in models:
                refused[first] = f"{models[found.name].path} has the same name"
            else:
                changed = max(stat.st_mtime_ns for stat in stats)
                size = sum(stat.st_size for stat in stats)
                models[found.name] = FolderModel(found.name, first, size, changed)
        except (OSError, ValueError) as error:
            refused[first] = str(error)
    return list(models.values()), refused


async def follow_folder(
    folder: Path, serve: Serve, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve the models of a folder until cancelled, whatever is added and removed.

    Args:
        folder: where they are.
        serve: serves one of them.
        task_status: ``started()`` is called when those that are there are served.

    Raises:
        ClusterError: the folder cannot be read, or one of the models that are there cannot be served.
    """
    failure: ClusterError | None = None
    served: dict[FolderModel, trio.CancelScope] = {}
    told: dict[Path, str] = {}

    async def serve_one(model: FolderModel, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope() as scope:
            served[model] = scope
            try:
                await serve(model, task_status=task_status)
            finally:
                del served[model]

    async def serve_later(model: FolderModel) -> None:
        try:
            await serve_one(model, task_status=trio.TASK_STATUS_IGNORED)
        except ClusterError as error:
            logger.warning("a model of the folder cannot be served: %s", error)

    async def look() -> list[FolderModel]:
        models, refused = await run_in_thread(find_in_folder, folder)
        for path, why in refused.items():
            if told.get(path) != why:
                logger.warning("%s is no model: %s", path, why)
        told.clear()
        told.update(refused)
        return models

    async with trio.open_nursery() as nursery:
        try:
            before = await look()
            for model in before:
                await nursery.start(serve_one, model)
        except (OSError, NoThread, ClusterError) as error:
            # Raised below, outside the nursery, which would wrap it in an exception group.
            failure = error if isinstance(error, ClusterError) else ClusterError(f"{folder}: {error}")
            nursery.cancel_scope.cancel(reason="the folder cannot be served")
        else:
            if not before:
                logger.warning("there are no models in %s yet", folder)
            task_status.started()
            while True:
                await trio.sleep(_LOOK)
                try:
                    now = await look()
                except (OSError, NoThread) as error:
                    # A disk that is away for a moment takes no models away.
                    logger.warning("%s cannot be looked through: %s", folder, error)
                    continue
                names = {model.name for model in served}
                for model in list(served):
                    if model not in now:
                        logger.info("a model has left the folder", extra={"fields": {"model": model.name}})
                        served[model].cancel(reason="its file is gone, or has changed")
                for model in now:
                    # One whose file has changed comes with the next look, when the old one has gone.
                    if model in before and model.name not in names:
                        logger.info("a model is new in the folder", extra={"fields": {"model": model.name}})
                        nursery.start_soon(serve_later, model)
                before = now
    if failure is not None:
        raise failure
