"""Backup and restore of a state directory: what is in a backup, and what is no backup."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import sqlite3
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, one_line

from trio_cluster.cli import backup as module
from trio_cluster.core.state_dir import StateDir


@pytest.fixture
def state(place: Path) -> Path:
    """The directory of a node: a file, a log, a database in use, and what is no state."""
    path = place / "state"
    directory = StateDir(path)
    directory.write("authority.json", b'{"version": 1}')
    directory.write("limits.3.log", b"[1]\n")
    del directory
    with closing(sqlite3.connect(path / "accounts.db")) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE t (n)")
        database.execute("INSERT INTO t VALUES (1)")
        database.commit()
    (path / ".authority.json.77").write_text("half written")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path / "take-over.sock"))
    return path


def rows(path: Path) -> list[tuple[int]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute("SELECT n FROM t").fetchall()


def snapshot(path: Path) -> dict[str, bytes]:
    """Return everything below a directory, sockets aside."""
    return {
        str(each.relative_to(path)): each.read_bytes()
        for each in path.rglob("*")
        if each.is_file() and not each.name.endswith(("-wal", "-shm"))
    }


def archive_of(members: list[tuple[tarfile.TarInfo | str, bytes]]) -> bytes:
    """Return an archive with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def manifest_of(files: dict[str, bytes], **more: Any) -> bytes:
    entries = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    return json.dumps({"version": 1, "created": "2026-01-01T00:00:00Z", "files": entries, **more}).encode()


# Making one


def test_a_backup_has_the_state_and_nothing_else_and_is_for_its_owner(
    main: Main, state: Path, place: Path
) -> None:
    code, out, err = main("backup", "b.tar.gz", "--state-dir", str(state))
    assert (code, err) == (0, "")
    assert "it has private keys" in out
    assert stat.S_IMODE((place / "b.tar.gz").stat().st_mode) == 0o600
    assert sorted(path.name for path in place.iterdir()) == ["b.tar.gz", "state"]
    with tarfile.open("b.tar.gz") as tar:
        names = tar.getnames()
        file = tar.extractfile("manifest.json")
        assert file is not None
        manifest = json.load(file)
    assert names == ["manifest.json", "state/accounts.db", "state/authority.json", "state/limits.3.log"]
    assert (manifest["version"], manifest["state_dir"]) == (1, str(state))
    assert manifest["files"]["limits.3.log"] == {"size": 4, "sha256": hashlib.sha256(b"[1]\n").hexdigest()}


def test_the_database_is_copied_while_it_is_written_to(main: Main, state: Path) -> None:
    # What was committed is in the log beside the database, where a copy of the file alone would miss it.
    with closing(sqlite3.connect(state / "accounts.db")) as writer:
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        writer.execute("INSERT INTO t VALUES (2)")
        writer.commit()
        writer.execute("INSERT INTO t VALUES (3)")
        assert main("backup", "b.tar.gz", "--state-dir", str(state))[0] == 0
        writer.commit()
    assert main("restore", "b.tar.gz", "--state-dir", "new")[0] == 0
    assert rows(Path("new/accounts.db")) == [(1,), (2,)]
    assert not list(Path("new").glob("*-wal"))


def after_copies(monkeypatch: pytest.MonkeyPatch, count: int, do: Callable[[Path], object]) -> list[str]:
    """Do something when a backup has copied so many files, with the last of them.

    Returns:
        The names of what has been copied so far.
    """
    copy, copied = module.shutil.copyfile, list[str]()

    def copy_and_do(source: Path, target: Path) -> None:
        copy(source, target)
        copied.append(source.name)
        if len(copied) == count:
            do(source)

    monkeypatch.setattr(module.shutil, "copyfile", copy_and_do)
    return copied


def test_a_file_that_is_replaced_meanwhile_is_read_again(
    main: Main, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compact(_: Path) -> None:
        # A snapshot makes a log superfluous, after both were read.
        StateDir(state).write("limits.json", b"4")
        (state / "limits.3.log").unlink()

    after_copies(monkeypatch, 2, compact)
    assert main("backup", "b.tar.gz", "--state-dir", str(state))[0] == 0
    with tarfile.open("b.tar.gz") as tar:
        assert tar.getnames()[1:] == ["state/accounts.db", "state/authority.json", "state/limits.json"]


def test_a_file_that_is_replaced_twice_meanwhile_is_read_again(
    main: Main, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(source: Path) -> None:
        number = source.stat().st_ino
        # Most file systems give the number of a file that is gone to the next one.
        for _ in range(20):
            StateDir(state).write(source.name, b"replaced")
            if source.stat().st_ino == number:
                break

    copied = after_copies(monkeypatch, 1, replace)
    assert main("backup", "b.tar.gz", "--state-dir", str(state))[0] == 0
    with tarfile.open("b.tar.gz") as tar:
        file = tar.extractfile(f"state/{copied[0]}")
        assert file is not None
        assert file.read() == b"replaced"


def test_a_database_elsewhere_is_in_it_if_it_is_sqlite(main: Main, state: Path, place: Path) -> None:
    os.rename(state / "accounts.db", place / "other 100%.db")
    url = f"sqlite:///{place / 'other 100%.db'}"
    assert main("backup", "b.tar.gz", "--state-dir", str(state), "--database", url)[0] == 0
    _, out, _ = main("restore", "b.tar.gz", "--state-dir", "new")
    assert rows(Path("new/database.db")) == [(1,)]
    assert f"set database to sqlite:///{place / 'new/database.db'}" in out


def test_a_database_of_postgresql_is_said_to_be_missing(main: Main, state: Path, place: Path) -> None:
    (place / "c.toml").write_text('database = "postgresql://u:secret@db/x"\nlimits = "redis://r"\n')
    code, out, err = main("backup", "b.tar.gz", "--state-dir", str(state), "--config", "c.toml")
    assert code == 0
    assert "NOT in it; back them up with: pg_dump" in out
    assert "in Redis or Valkey and not in it" in out
    assert "secret@" not in out + err
    _, out, _ = main("restore", "b.tar.gz", "--state-dir", "new")
    assert "pg_restore" in out


def test_a_damaged_database_is_no_backup(main: Main, state: Path) -> None:
    path = state / "accounts.db"
    content = bytearray(path.read_bytes())
    content[-2000:] = os.urandom(2000)
    path.write_bytes(content)
    code, _, err = main("backup", "b.tar.gz", "--state-dir", str(state))
    assert code == 1
    assert "database" in one_line(err)
    assert not Path("b.tar.gz").exists()


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("there", "--state-dir", "state"), "there: is there already"),
        (
            ("b", "--state-dir", "nothing"),
            "nothing: there is no such directory; give --state-dir DIR, or the PORT",
        ),
        (("b", "--state-dir", "empty"), "empty: there is nothing in it"),
        (("no/b", "--state-dir", "state"), ": No such file or directory"),
        (
            ("b", "--state-dir", "state", "--database", "sqlite:////no.db"),
            "/no.db: there is no such database",
        ),
    ],
)
def test_what_cannot_be_backed_up_is_one_line(
    main: Main, state: Path, place: Path, argv: tuple[str, ...], error: str
) -> None:
    (place / "there").write_text("")
    (place / "empty").mkdir()
    before = sorted(place.iterdir())
    code, out, err = main("backup", *argv)
    assert (code, out) == (1, "")
    assert error in one_line(err)
    assert sorted(place.iterdir()) == before


# Using one


@pytest.fixture
def made(main: Main, state: Path) -> Path:
    assert main("backup", "b.tar.gz", "--state-dir", str(state))[0] == 0
    return Path("b.tar.gz")


def test_a_restored_directory_is_as_it_was_and_can_be_used(main: Main, made: Path, state: Path) -> None:
    code, out, err = main("restore", str(made), "--state-dir", "a/b/new")
    assert (code, err) == (0, "")
    assert "restored 3 files of 20" in out
    assert "revoke them again" in out
    new = Path("a/b/new")
    assert sorted(path.name for path in new.iterdir()) == ["accounts.db", "authority.json", "limits.3.log"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in new.iterdir()} == {0o600}
    assert stat.S_IMODE(new.stat().st_mode) == 0o700
    assert StateDir(new).read("authority.json") == b'{"version": 1}'
    assert rows(new / "accounts.db") == [(1,)]


def test_a_directory_with_something_in_it_is_left_alone_without_force(
    main: Main, made: Path, place: Path
) -> None:
    StateDir(place / "new").write("authority.json", b"other")
    code, _, err = main("restore", str(made), "--state-dir", "new")
    assert code == 1
    assert one_line(err).endswith("new: there is something in it; --force moves that aside")
    assert snapshot(place / "new") == {"authority.json": b"other"}

    code, out, _ = main("restore", "--force", str(made), "--state-dir", "new")
    assert code == 0
    (old,) = place.glob("new.before-*")
    assert f"what was there before is in {old}" in out
    assert snapshot(old) == {"authority.json": b"other"}
    assert sorted(snapshot(place / "new")) == ["accounts.db", "authority.json", "limits.3.log"]


def test_a_directory_with_remains_of_a_killed_node_counts_as_empty(
    main: Main, made: Path, place: Path
) -> None:
    (place / "new").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("new/take-over.sock")
    assert main("restore", str(made), "--state-dir", "new")[0] == 0
    assert "take-over.sock" not in os.listdir("new")


def test_the_directory_of_a_running_node_is_left_alone(main: Main, made: Path, place: Path) -> None:
    directory = StateDir(place / "new")
    directory.write("authority.json", b"other")
    code, _, err = main("restore", "--force", str(made), "--state-dir", "new")
    assert code == 1
    assert one_line(err).endswith("new: a node uses it; stop it first")
    assert snapshot(place / "new") == {"authority.json": b"other"}
    del directory
    assert main("restore", "--force", str(made), "--state-dir", "new")[0] == 0


def test_a_link_to_the_directory_stays(main: Main, made: Path, place: Path) -> None:
    (place / "private").mkdir()
    (place / "new").symlink_to("private")
    assert main("restore", str(made), "--state-dir", "new")[0] == 0
    assert (place / "new").is_symlink()
    assert sorted(os.listdir("private")) == ["accounts.db", "authority.json", "limits.3.log"]


def test_a_mount_is_restored_file_by_file(
    main: Main, made: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "new")
    StateDir(place / "new").write("authority.json", b"other")
    inode = (place / "new").stat().st_ino
    code, out, _ = main("restore", "--force", str(made), "--state-dir", "new")
    assert code == 0
    assert (place / "new").stat().st_ino == inode
    (old,) = (place / "new").glob("before-*")
    assert str(old) in out
    assert snapshot(old) == {"authority.json": b"other"}
    assert rows(place / "new/accounts.db") == [(1,)]
    # It may be backed up itself: what was moved aside is no state.
    assert main("backup", "again.tar.gz", "--state-dir", "new")[0] == 0


@pytest.mark.parametrize("is_mount", [False, True])
def test_a_restore_that_fails_on_the_way_is_undone(
    main: Main, made: Path, place: Path, monkeypatch: pytest.MonkeyPatch, is_mount: bool
) -> None:
    directory = StateDir(place / "new")
    directory.write("authority.json", b"other")
    directory.write("b.json", b"b")
    del directory
    if is_mount:
        monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "new")
    rename, left = Path.rename, 3 if is_mount else 1

    def failing(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == -1:
            raise OSError(28, "No space left on device", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    code, _, err = main("restore", "--force", str(made), "--state-dir", "new")
    assert code == 1
    assert "No space left on device" in one_line(err)
    found = {name: content for name, content in snapshot(place / "new").items() if "before-" not in name}
    assert found == {"authority.json": b"other", "b.json": b"b"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_gives_what_it_restores_to_the_owner_of_the_directory(
    main: Main, made: Path, place: Path
) -> None:
    (place / "new").mkdir()
    os.chown("new", 1234, 1235)
    assert main("restore", str(made), "--state-dir", "new")[0] == 0
    owners = {(each.stat().st_uid, each.stat().st_gid) for each in [Path("new"), *Path("new").iterdir()]}
    assert owners == {(1234, 1235)}


GOOD = b"content"


def info(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found


FILES = {"a": GOOD}
#: What is no plain file has no content.
EMPTY = {"a": b""}
BAD: dict[str, Callable[[], bytes]] = {
    "not gzip": lambda: b"hello",
    "not tar": lambda: gzip.compress(b"hello"),
    "empty": lambda: archive_of([]),
    "no manifest": lambda: archive_of([("state/a", GOOD)]),
    "manifest is not JSON": lambda: archive_of([("manifest.json", b"{")]),
    "manifest without files": lambda: archive_of([("manifest.json", b'{"version": 1}')]),
    "manifest is a list": lambda: archive_of([("manifest.json", b"[]")]),
    "later version": lambda: archive_of([("manifest.json", manifest_of({}, version=2))]),
    "name with a folder": lambda: archive_of([("manifest.json", manifest_of({"x/a": GOOD}))]),
    "name that goes up": lambda: archive_of(
        [("manifest.json", manifest_of({"../a": GOOD})), ("state/../a", GOOD)]
    ),
    "absolute name": lambda: archive_of([("manifest.json", manifest_of(FILES)), ("/etc/a", GOOD)]),
    "hidden name": lambda: archive_of([("manifest.json", manifest_of({".a": GOOD})), ("state/.a", GOOD)]),
    "file outside of the folder": lambda: archive_of([("manifest.json", manifest_of(FILES)), ("a", GOOD)]),
    "file that is not listed": lambda: archive_of(
        [("manifest.json", manifest_of(FILES)), ("state/a", GOOD), ("state/b", GOOD)]
    ),
    "file that is there twice": lambda: archive_of(
        [("manifest.json", manifest_of(FILES)), ("state/a", GOOD), ("state/a", GOOD)]
    ),
    "file that is missing": lambda: archive_of([("manifest.json", manifest_of(FILES))]),
    "other content": lambda: archive_of([("manifest.json", manifest_of(FILES)), ("state/a", b"CONTENT")]),
    "longer content": lambda: archive_of([("manifest.json", manifest_of(FILES)), ("state/a", GOOD * 2)]),
    "link": lambda: archive_of(
        [("manifest.json", manifest_of(EMPTY)), (info("state/a", tarfile.SYMTYPE, "/etc/passwd"), b"")]
    ),
    "hard link": lambda: archive_of(
        [("manifest.json", manifest_of(EMPTY)), (info("state/a", tarfile.LNKTYPE, "manifest.json"), b"")]
    ),
    "directory": lambda: archive_of(
        [("manifest.json", manifest_of(EMPTY)), (info("state/a", tarfile.DIRTYPE), b"")]
    ),
    "device": lambda: archive_of(
        [("manifest.json", manifest_of(EMPTY)), (info("state/a", tarfile.CHRTYPE), b"")]
    ),
    "cut": lambda: archive_of([("manifest.json", manifest_of(FILES)), ("state/a", os.urandom(9999))])[:-3000],
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_whole_backup_touches_nothing(main: Main, place: Path, name: str) -> None:
    StateDir(place / "new").write("authority.json", b"other")
    (place / "bad.tar.gz").write_bytes(BAD[name]())
    before = snapshot(place)
    code, out, err = main("restore", "--force", "bad.tar.gz", "--state-dir", "new")
    assert (code, out) == (1, "")
    assert "bad.tar.gz: " in one_line(err)
    assert snapshot(place) == before
    assert sorted(each.name for each in place.iterdir()) == ["bad.tar.gz", "new"]
    assert main("restore", "nothing.tar.gz", "--state-dir", "other")[0] == 1
    assert not (place / "other").exists()


def test_the_port_says_which_directory_is_meant(
    main: Main, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(place))
    StateDir(place / "trio_cluster/master-8123").write("a.json", b"{}")
    assert main("backup", "b.tar.gz", "8123")[0] == 0
    assert main("restore", "b.tar.gz", "8124")[0] == 0
    assert snapshot(place / "trio_cluster/master-8124") == {"a.json": b"{}"}


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    """A test that leaves a descriptor behind would keep a directory locked."""
    before = len(os.listdir("/dev/fd"))
    yield
    assert len(os.listdir("/dev/fd")) <= before + 1
