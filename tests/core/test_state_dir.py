"""The directory for what survives a restart: who may have access, and what a reader finds."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from trio_cluster.core.state_dir import StateDir, StateDirError, default_state_dir


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_created_for_its_owner_only_with_those_above_it(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "a" / "b")
    state.write("f", b"x")
    assert [mode(path) for path in (tmp_path / "a", state.path, state.path / "f")] == [0o700, 0o700, 0o600]


def test_what_was_written_is_read_and_leaves_nothing_else(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    assert state.read("f") is None
    state.write("f", b"one")
    state.write("f", b"two")
    assert StateDir(tmp_path).read("f") == b"two"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_it_is_refused_if_others_may_write_to_it(bits: int, tmp_path: Path) -> None:
    tmp_path.chmod(0o700 | bits)
    with pytest.raises(StateDirError, match=r"others may write.*chmod"):
        StateDir(tmp_path)


def test_it_is_refused_if_it_is_a_file_or_below_one(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(StateDirError, match="not a directory"):
        StateDir(tmp_path / "f")
    with pytest.raises(StateDirError, match="state_dir"):
        StateDir(tmp_path / "f" / "g")


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateDir(tmp_path)
    state.write("f", b"old")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StateDirError, match="No space left"):
        state.write("f", b"new")
    assert state.read("f") == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_the_default_follows_the_base_directory_specification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_state_dir({"XDG_STATE_HOME": str(tmp_path)}, "n") == tmp_path / "trio_cluster" / "n"
    monkeypatch.setenv("HOME", "/home/someone")
    expected = Path("/home/someone/.local/state/trio_cluster/n")
    assert default_state_dir({}, "n") == expected
    assert default_state_dir({"XDG_STATE_HOME": "relative"}, "n") == expected
