"""The directory for what must survive a restart of a node.

It is private to its owner. A directory that others may write to is refused: what is read from it decides what the node
does. Files are replaced as a whole, so that a reader, or a node that was killed while it wrote, finds the old content
or the new one.

A node holds a shared lock on its directory for as long as it runs (``flock``): several processes may use it, those of a
group, or two of which one takes the other's place. What replaces the whole of it, a restore, needs it for itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ClusterError

__all__ = ["StateDir", "StateDirError", "default_state_dir", "path_of", "replace_file", "reserved"]

T = TypeVar("T")

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class StateDirError(ClusterError):
    """The directory cannot be used; the message names it and says why."""


def default_state_dir(environ: Mapping[str, str], name: str) -> Path:
    """Return where the state of a node is kept if no option says so.

    Args:
        environ: the environment: ``XDG_STATE_HOME`` counts if it is an absolute path, as its specification demands.
        name: of the node's own directory.

    Raises:
        StateDirError: the user has no home directory.
    """
    base = Path(environ.get("XDG_STATE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".local" / "state"
        except RuntimeError:
            raise StateDirError("there is no directory for the node's state: no home directory") from None
    return base / "trio_cluster" / name


def path_of(text: str | None) -> Path | None:
    """Return the path that an option names; a ``~`` in it is the user's home directory."""
    return None if text is None else Path(text).expanduser()


def replace_file(path: Path, content: bytes, *, mode: int = 0o600, user: int | None = None) -> None:
    """Replace the content of a file as a whole, or create it; it survives a loss of power. Blocks.

    Args:
        path: of the file, in a directory that is there.
        content: the new one.
        mode: of the file from its first moment, less the umask.
        user: the number of its owner, if that is another one than the user of this process.

    Raises:
        OSError: it cannot be written; the old content is still there, and nothing else.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            if user is not None:
                with suppress(PermissionError):
                    os.fchown(handle, user, -1)
            os.fsync(handle)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _sync(directory: Path) -> None:
    """Have the names in a directory survive a loss of power, too, where the file system can do that."""
    # The content is in its place by now, so there is nothing to report.
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Keep nodes from using a directory during the ``with`` statement, and make sure that none does. Blocks.

    Args:
        path: of the directory, which is there.

    Raises:
        StateDirError: a node uses it.
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateDirError(f"state_dir {path}: a node uses it; stop it first") from None
        except OSError:
            # Some file systems have no locks.
            pass
        yield
    finally:
        os.close(handle)


class StateDir:
    """A directory that this process may write to, and nobody but its owner. Everything here blocks.

    Args:
        path: created if it is missing, as are those above it, with access for their owner only.

    Raises:
        StateDirError: it cannot be created or used, or others may write to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._open()
            self._lock()
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; ``None`` if there is none.

        Raises:
            StateDirError: it cannot be read.
        """
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(f"{name}: {error.strerror}") from error

    def write(self, name: str, content: bytes) -> None:
        """Replace the content of a file, or create it, readable for its owner only.

        Raises:
            StateDirError: it cannot be written; the old content is still there.
        """
        try:
            replace_file(self.path / name, content)
        except OSError as error:
            raise self._error(f"{name}: {error.strerror}") from error

    def load(self, name: str, version: int, build: Callable[[dict[str, Any]], T], remedy: str) -> T | None:
        """Return what :meth:`save` has kept; ``None`` if there is nothing.

        Args:
            name: of the file.
            version: the latest version of its content that is understood.
            build: makes of the content what is wanted, and raises an error if it cannot.
            remedy: what to do about a damaged file; ends the message.

        Raises:
            StateDirError: the file cannot be read, is damaged, or was written by a later version.
        """
        content = self.read(name)
        if content is None:
            return None
        try:
            data: dict[str, Any] = json.loads(content)
            is_later = data.pop("version") > version
            if not is_later:
                return build(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateDirError(f"{self.path / name}: it is damaged ({error!r}); {remedy}") from error
        raise StateDirError(f"{self.path / name}: it was written by a later version of trio_cluster")

    def save(self, name: str, version: int, content: Mapping[str, Any]) -> None:
        """Replace a file by a JSON object with its version. See :meth:`write`."""
        self.write(name, json.dumps({"version": version, **content}, indent=1).encode())

    def remove(self, name: str) -> None:
        """Remove a file, if there is one.

        Raises:
            StateDirError: it cannot be removed.
        """
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._error(f"{name}: {error.strerror}") from error

    def _open(self) -> None:
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(mode=0o700, exist_ok=True)
        status = self.path.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise self._error("it is not a directory")
        if hasattr(os, "geteuid"):
            if status.st_uid != os.geteuid():
                raise self._error("it belongs to another user")
            if status.st_mode & _OTHERS_MAY_WRITE:
                raise self._error("others may write to it; take that away with: chmod go-w")
        if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
            raise self._error("it cannot be written to")

    def _lock(self) -> None:
        """Show for as long as this object lives that a node uses the directory."""
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._error("it is being restored from a backup") from None
        except OSError:
            # Some file systems have no locks.
            pass

    def _error(self, why: str) -> StateDirError:
        return StateDirError(f"state_dir {self.path}: {why}")
