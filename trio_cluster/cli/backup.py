"""``trio-cluster backup`` and ``restore``: the state directory of a node as one file, and back.

Theory of operation
===================

*A backup is made while the node runs.* Its database is copied by SQLite's own online backup, in one step, so the copy
is the database as it was at one moment. All other files are replaced as a whole by the node, or only grow (the logs of
``limits/ledger.py``, of which every beginning is a state that there was). If one was replaced while they were read,
they are read again, so that they fit together.

*The archive* is a gzipped tar file: ``manifest.json`` first, which has a checksum for each file, then ``state/NAME``.
It has private keys in it, so only its owner may read it.

*A restore is all or nothing.* Everything is unpacked beside its place and compared with the manifest before anything
is touched. Only names that a backup can have are accepted, and only plain files. Then directories are renamed; what was
there before is kept. In a directory that is a mount, and so cannot be renamed, that is done file by file, and undone if
one of the steps fails. A directory that a running node uses is left alone.

A PostgreSQL database is not in a backup: it has tools for that, which the messages name.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import IO, Any, Final

from .._version import __version__
from ..core.state_dir import default_state_dir, path_of, reserved
from ..errors import ClusterError
from ..options import ClusterServerOptions
from .admin_client import printable
from .arguments import options_from

__all__ = ["backup", "restore"]

_VERSION: Final = 1
_MANIFEST: Final = "manifest.json"
_FOLDER: Final = "state/"
#: What a file of a state directory may be called.
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
#: What a database is called that the options name, and that is elsewhere.
_DATABASE: Final = "database.db"
_SQLITE: Final = b"SQLite format 3\0"
#: The files of a database beside it. The copy needs none.
_PARTS: Final = ("-wal", "-shm", "-journal")
_MANIFEST_MAX: Final = 1024 * 1024
_CHUNK: Final = 1024 * 1024
_TRIES: Final = 10


class BackupError(ClusterError):
    """The backup cannot be made or used; nothing has changed."""


def backup(arguments: argparse.Namespace) -> int:
    """Write the state of a node into a file.

    Raises:
        BackupError, OptionsError: that is not possible; there is no file then.
    """
    options = options_from(arguments)
    state, target = _state_dir(options), Path(arguments.file).expanduser()
    if not state.is_dir():
        raise BackupError(
            f"{state}: there is no such directory; give --state-dir DIR, or the PORT of the master"
        )
    if target.exists():
        raise BackupError(f"{target}: is there already")
    database = _other_database(options, state)
    try:
        with tempfile.TemporaryDirectory(prefix=".backup.", dir=target.absolute().parent) as folder:
            copies = _copy_state(state, Path(folder))
            if database is not None:
                _copy_database(database, copy := Path(folder, _DATABASE))
                copies[_DATABASE] = copy
            if not copies:
                raise BackupError(f"{state}: there is nothing in it")
            archive = Path(folder, "archive")
            size = _write_archive(archive, copies, state, database, has_postgresql=_is_postgresql(options))
            archive.replace(target)
    except OSError as error:
        raise BackupError(f"{error.filename or target}: {error.strerror or error}") from error
    except sqlite3.Error as error:
        raise BackupError(f"the database cannot be copied: {error}") from error
    print(f"wrote {target}: {len(copies)} files of {state}, {size} bytes")
    print("it has private keys and whatever else is secret in it: only you may read it, and keep it so")
    for line in _what_is_missing(options):
        print(line)
    return 0


def restore(arguments: argparse.Namespace) -> int:
    """Make a state directory of a backup.

    Raises:
        BackupError, StateDirError, OptionsError: that is not possible, and nothing has changed.
    """
    options = options_from(arguments)
    source = Path(arguments.file).expanduser()
    # The link that systemd makes for StateDirectory= with DynamicUser= stays where it is.
    state = Path(os.path.realpath(_state_dir(options)))
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    is_mount = state.is_mount()
    old: Path | None = None
    try:
        if state.exists():
            with reserved(state):
                entries = _entries(state)
                if entries and not arguments.force:
                    raise BackupError(f"{state}: there is something in it; --force moves that aside")
                if entries:
                    old = (
                        state / f"before-{stamp}"
                        if is_mount
                        else state.with_name(f"{state.name}.before-{stamp}")
                    )
                manifest = _replace(source, state, old, entries)
        else:
            state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            manifest = _replace(source, state, None, [])
    except OSError as error:
        raise BackupError(f"{error.filename or state}: {error.strerror or error}") from error
    files = manifest["files"]
    print(f"restored {len(files)} files of {printable(manifest['created'])} to {state}")
    if old is not None:
        print(f"what was there before is in {old}")
    if _DATABASE in files:
        print(
            f"the database of the option 'database' is {state / _DATABASE}: move it to where the option says, or set "
            f"database to sqlite:///{state / _DATABASE}"
        )
    if manifest.get("postgresql"):
        print(
            "the PostgreSQL database of that node is not in a backup: restore it with pg_restore, if it is lost, too"
        )
    print("keys and workers that were revoked since the backup are valid again: revoke them again")
    return 0


def _state_dir(options: ClusterServerOptions) -> Path:
    return path_of(options.state_dir) or default_state_dir(os.environ, f"master-{options.server.port}")


def _other_database(options: ClusterServerOptions, state: Path) -> Path | None:
    """Return the SQLite database that the options name, if it is not in the state directory."""
    if options.database is None or not options.database.startswith("sqlite:///"):
        return None
    path = Path(options.database.removeprefix("sqlite:///")).absolute()
    return None if path.parent.resolve() == state.resolve() else path


def _is_postgresql(options: ClusterServerOptions) -> bool:
    return options.database is not None and options.database.startswith("postgres")


def _what_is_missing(options: ClusterServerOptions) -> Iterator[str]:
    if _is_postgresql(options):
        yield (
            "keys, usage, the audit log and stored responses are in PostgreSQL and NOT in it; back them up with: "
            "pg_dump --format=custom --file=FILE DATABASE"
        )
    if options.limits is not None:
        yield "what keys have used of their limits is in Redis or Valkey and not in it"
    if options.server.tls_cert is not None:
        yield "the certificate and the key of --tls-cert and --tls-key are not in it"


# Making one


def _entries(state: Path) -> list[str]:
    """Return the names in a directory that are of some interest: not sockets, and not what is half written."""
    return sorted(
        entry.name for entry in os.scandir(state) if not entry.name.startswith(".") and not _is_socket(entry)
    )


def _is_socket(entry: os.DirEntry[str]) -> bool:
    return not (
        entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False) or entry.is_symlink()
    )


def _files(state: Path) -> list[Path]:
    """Return the files that are backed up."""
    return [
        path
        for path in map(state.joinpath, _entries(state))
        if _NAME.fullmatch(path.name)
        and not path.name.endswith(_PARTS)
        and path.is_file()
        and not path.is_symlink()
    ]


def _copy_state(state: Path, folder: Path) -> dict[str, Path]:
    """Copy the files of a state directory, such that they fit together."""
    for _ in range(_TRIES):
        copies: dict[str, Path] = {}
        # Open until they are compared: the file system does not give the number of an open file to another one.
        with ExitStack() as opened:
            try:
                files = {path: opened.enter_context(open(path, "rb")) for path in _files(state)}
                before = {path.name: os.fstat(file.fileno()).st_ino for path, file in files.items()}
                for path, file in files.items():
                    copy = copies[path.name] = folder / path.name
                    if file.read(len(_SQLITE)) == _SQLITE:
                        copy.unlink(missing_ok=True)
                        _copy_database(path, copy)
                    else:
                        shutil.copyfile(path, copy)
            except FileNotFoundError:
                # A log that was made superfluous by a snapshot.
                continue
            if _versions(state) == before:
                return copies
    raise BackupError(f"{state}: its files change all the time")


def _versions(state: Path) -> dict[str, int]:
    """Return which files there are, by the numbers of their inodes: a file that is replaced gets another one."""
    found = {}
    for path in _files(state):
        with suppress(FileNotFoundError):
            found[path.name] = path.stat().st_ino
    return found


def _copy_database(path: Path, copy: Path) -> None:
    if not path.exists():
        raise BackupError(f"{path}: there is no such database")
    # It is not created, but opened for writing: reading a log that is not merged yet needs that.
    with (
        closing(sqlite3.connect(f"file:{_quoted(path)}?mode=rw", uri=True, timeout=30)) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
        # One file, whatever the original is made of.
        target.execute("PRAGMA journal_mode = DELETE")
        (result,) = target.execute("PRAGMA quick_check(1)").fetchone()
    if result != "ok":
        raise BackupError(f"{path}: the database is damaged: {result}")


def _quoted(path: Path) -> str:
    """Return a path as a part of a URI of SQLite."""
    return "".join(f"%{ord(each):02x}" if each in "%?#" else each for each in str(path.absolute()))


def _write_archive(
    archive: Path, copies: Mapping[str, Path], state: Path, database: Path | None, *, has_postgresql: bool
) -> int:
    manifest = {
        "version": _VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "trio_cluster": __version__,
        "state_dir": str(state),
        "database": None if database is None else str(database),
        "postgresql": has_postgresql,
        "files": {
            name: {"size": path.stat().st_size, "sha256": _digest(path)}
            for name, path in sorted(copies.items())
        },
    }
    content = json.dumps(manifest, indent=1).encode()
    handle = os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "wb") as raw:
        with tarfile.open(fileobj=raw, mode="w:gz") as tar:
            _add(tar, _MANIFEST, len(content), io.BytesIO(content))
            for name, path in sorted(copies.items()):
                with open(path, "rb") as file:
                    _add(tar, f"{_FOLDER}{name}", path.stat().st_size, file)
        raw.flush()
        os.fsync(handle)
        return raw.tell()


def _add(tar: tarfile.TarFile, name: str, size: int, file: IO[bytes]) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o600, int(time.time())
    tar.addfile(info, file)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Using one


def _replace(source: Path, state: Path, old: Path | None, entries: Iterable[str]) -> dict[str, Any]:
    """Put what is in an archive in the place of what is there; return the manifest.

    Args:
        source: the archive.
        state: where it is to be.
        old: where what is there is moved to; ``None``: there is nothing.
        entries: the names of what is there.
    """
    is_mount = state.is_mount()
    where = state if is_mount else state.parent
    with tempfile.TemporaryDirectory(prefix=".restore.", dir=where) as folder:
        staging = Path(folder, "state")
        staging.mkdir(mode=0o700)
        manifest = _unpack(source, staging)
        if state.exists():
            _give_to_owner(state, staging)
        moves: list[tuple[Path, Path]] = []
        if not is_mount:
            if old is not None:
                moves.append((state, old))
            elif state.exists():
                # What is left in it is of no interest, such as the socket of a node that was killed.
                moves.append((state, Path(folder, "empty")))
            moves.append((staging, state))
        else:
            if old is not None:
                old.mkdir(mode=0o700)
                moves += [(state / name, old / name) for name in entries]
            moves += [(path, state / path.name) for path in staging.iterdir()]
        _move_all(moves)
    return manifest


def _move_all(moves: Iterable[tuple[Path, Path]]) -> None:
    """Rename files, all or none."""
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise


def _give_to_owner(state: Path, staging: Path) -> None:
    """Give what is restored by root to the user whom the directory belongs to."""
    status = state.stat()
    if os.geteuid() == 0 and status.st_uid != 0:
        for path in (staging, *staging.iterdir()):
            os.chown(path, status.st_uid, status.st_gid)


def _unpack(source: Path, staging: Path) -> dict[str, Any]:
    """Unpack an archive into a directory of its own, and make sure that it is whole; return its manifest.

    Raises:
        BackupError: it is not, or it is no backup.
    """
    try:
        with tarfile.open(source, mode="r:gz") as tar:
            members = iter(tar)
            manifest = _read_manifest(source, tar, next(members, None))
            wanted: dict[str, Any] = dict(manifest["files"])
            for member in members:
                name = member.name.removeprefix(_FOLDER)
                expected = wanted.pop(name, None)
                if expected is None or member.name != f"{_FOLDER}{name}" or not member.isreg():
                    raise BackupError(f"{source}: is no backup: it has '{printable(member.name)}' in it")
                if member.size != expected["size"]:
                    raise BackupError(f"{source}: is damaged: {name} is not what it was")
                file = tar.extractfile(member)
                assert file is not None
                if _write_file(staging / name, file) != (expected["size"], expected["sha256"]):
                    raise BackupError(f"{source}: is damaged: {name} is not what it was")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise BackupError(f"{source}: is no backup, or is damaged: {error}") from error
    if wanted:
        raise BackupError(f"{source}: is damaged: {', '.join(sorted(wanted))} is missing")
    return manifest


def _read_manifest(source: Path, tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> dict[str, Any]:
    no_backup = BackupError(f"{source}: is no backup of trio-cluster")
    if member is None or member.name != _MANIFEST or not member.isreg() or member.size > _MANIFEST_MAX:
        raise no_backup
    file = tar.extractfile(member)
    assert file is not None
    try:
        manifest: dict[str, Any] = json.loads(file.read())
        version, files = manifest["version"], manifest["files"]
        is_valid = isinstance(manifest["created"], str) and all(
            _NAME.fullmatch(name) and isinstance(each["size"], int) and isinstance(each["sha256"], str)
            for name, each in files.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise no_backup from None
    if not isinstance(version, int) or version > _VERSION:
        raise BackupError(f"{source}: was made by a later version of trio_cluster")
    if not is_valid:
        raise no_backup
    return manifest


def _write_file(path: Path, file: IO[bytes]) -> tuple[int, str]:
    """Write a file for its owner only; return its size and its checksum."""
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "wb") as target:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(handle)
    return size, digest.hexdigest()
