"""Models of a model hub: what ``hf:REPO[:FILE]`` means, and how its files get here.

The work is done by a process of its own, ``_hub_process.py``, which has the theory. This is the parent's side: it
starts that process, logs its progress, and ends it when the engine is cancelled.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from trio_cluster.errors import ClusterError

from ._engine import install_command
from ._gguf_files import choose_model, find_models

__all__ = ["HubReference", "download"]

logger = logging.getLogger("trio_cluster.engines")

_PREFIX: Final = "hf:"
_REPO: Final = r"[\w.-]+(/[\w.-]+)?"
_REFERENCE: Final = re.compile(rf"(?P<repo>{_REPO})(@(?P<revision>[^:@\s]+))?(:(?P<file>[^:]+))?")
_PROGRAM: Final = Path(__file__).with_name("_hub_process.py")

#: Seconds between two lines of the log about one download.
_LOG_INTERVAL: Final = 10.0
#: Bytes of the errors of the process that are kept.
_MAX_ERRORS: Final = 65536


@attrs.frozen
class HubReference:
    """A model of the hub, as a person names it."""

    repo: str
    revision: str = "main"
    file: str | None = None
    """The name of a file, or a part of it; see :func:`~._gguf_files.choose_model`."""

    @classmethod
    def parse(cls, text: str) -> HubReference | None:
        """Return what a text means; ``None`` if it does not begin with ``hf:``.

        Raises:
            ValueError: it is not of the form ``hf:REPO[@REVISION][:FILE]``.
        """
        if not text.startswith(_PREFIX):
            return None
        found = _REFERENCE.fullmatch(text.removeprefix(_PREFIX))
        if found is None:
            raise ValueError(
                f"expected hf:REPO or hf:REPO:FILE, such as hf:owner/model-GGUF:Q4_K_M; got '{text}'"
            )
        return cls(found["repo"], found["revision"] or "main", found["file"])

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{_PREFIX}{self.repo}{revision}{'' if self.file is None else f':{self.file}'}"

    def check(self) -> None:
        """Check that the library is there. Synchronous.

        Raises:
            ClusterError: it is not; the message says how to install it.
        """
        if importlib.util.find_spec("huggingface_hub") is None:
            raise ClusterError(
                f"{self}: this needs huggingface_hub, not installed here;"
                f" install it with: {install_command('trio-cluster[hf]')}"
            )


async def download(reference: HubReference) -> Path:
    """Return the path of the first file of a model, downloaded if it is not in the cache. A checkpoint.

    Cancellation ends the download at once. The next one goes on where it has ended.

    Raises:
        ClusterError: the model cannot be had; the message says why.
    """
    # -P: the modules beside the program must not be taken for libraries of their names.
    command = [sys.executable, "-P", str(_PROGRAM), reference.repo, reference.revision]
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    failure: ClusterError | None = None
    paths: list[Path] = []
    errors = bytearray()
    try:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
    except OSError as error:
        raise ClusterError(f"{reference}: cannot start a process to download it: {error}") from error
    assert process.stderr is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_collect, process.stderr, errors)
        try:
            paths = await _converse(reference, process)
            await process.wait()
        except ClusterError as error:
            # Raised below, outside the nursery, which would wrap it in an exception group.
            failure = error
        finally:
            # It has nothing to clean up: what it leaves is what the next one goes on with.
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
        # All of its errors are there, unless something that it has started holds the other end.
        nursery.cancel_scope.deadline = trio.current_time() + 1
    if failure is not None:
        raise failure
    if not paths:
        lines = errors.decode(errors="replace").split("\n")
        why = next((line.strip() for line in reversed(lines) if line.strip()), "the process has ended")
        raise ClusterError(f"{reference}: {why}")
    return paths[0]


async def _converse(reference: HubReference, process: trio.Process) -> list[Path]:
    """Tell the process which files are wanted, and log its progress.

    Returns:
        Their paths; none if the process has ended without a word.

    Raises:
        ClusterError: they cannot be had.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    paths: list[Path] = []
    failure, done = "", False
    async with trio.open_nursery() as nursery:
        progress = trio.CancelScope()
        events = _Events(process.stdout)
        while (event := await events.next()) is not None:
            progress.cancel(reason="the download of this file has ended")
            match event:
                case {"event": "files", "files": files, "offline": offline}:
                    try:
                        model = choose_model(find_models(files), reference.file)
                    except ValueError as error:
                        failure = str(error)
                        if offline:
                            failure = f"the hub cannot be asked ({offline}), and of what was downloaded before, {error}"
                        break
                    if offline:
                        text = "using what was downloaded before: the hub cannot be asked"
                        logger.warning(text, extra={"fields": {"model": str(reference), "why": offline}})
                    with suppress(trio.BrokenResourceError):
                        await process.stdin.send_all(json.dumps(model.files).encode() + b"\n")
                case {"event": "downloading", **figures}:
                    progress = trio.CancelScope()
                    nursery.start_soon(_log_progress, reference, figures, progress)
                case {"event": "verifying", "file": file}:
                    logger.info("checking what was downloaded", extra={"fields": {"file": file}})
                case {"event": "waiting", "file": file}:
                    text = "another process is downloading this file; waiting for it"
                    logger.info(text, extra={"fields": {"file": file}})
                case {"event": "have", "path": path}:
                    paths.append(Path(path))
                case {"event": "done"}:
                    done = True
                case {"event": "failed", "why": why}:
                    failure = why
                    break
        nursery.cancel_scope.cancel(reason="the process has told all")
    if failure:
        raise ClusterError(f"{reference}: {failure}")
    return paths if done else []


class _Events:
    """The events in the output of the process."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._lines: list[bytes] = []
        self._left = b""

    async def next(self) -> dict[str, Any] | None:
        """Return the next event; ``None`` if the output has ended. A checkpoint, unless it is there already."""
        while True:
            while self._lines:
                line = self._lines.pop(0)
                # A library might print something, too.
                if line.startswith(b'{"event"'):
                    event: dict[str, Any] = json.loads(line)
                    return event
            piece = await self._stream.receive_some()
            if not piece:
                return None
            *self._lines, self._left = (self._left + piece).split(b"\n")


async def _collect(stream: trio.abc.ReceiveStream, kept: bytearray) -> None:
    async for piece in stream:
        kept += piece
        del kept[:-_MAX_ERRORS]


async def _log_progress(reference: HubReference, event: dict[str, Any], scope: trio.CancelScope) -> None:
    """Log at once and every ten seconds how much of a file is there, until the scope is cancelled."""
    size, before = event["size"], event["have"]
    began, have = trio.current_time(), before
    fields = {"model": str(reference), "file": event["file"], "megabytes": round(size / 1e6)}
    if have:
        fields["there_already"] = f"{have / size:.0%}"
    logger.info("downloading", extra={"fields": fields})
    with scope:
        while True:
            await trio.sleep(_LOG_INTERVAL)
            try:
                # A stat of a local file.
                have = os.stat(event["partial"]).st_size
            except OSError:
                continue
            rate = (have - before) / (trio.current_time() - began)
            fields = {
                "file": event["file"],
                "done": f"{have / size:.0%}",
                "megabytes_per_second": f"{rate / 1e6:.1f}",
            }
            if rate > 0:
                fields["seconds_left"] = round((size - have) / rate)
            logger.info("downloading", extra={"fields": fields})
