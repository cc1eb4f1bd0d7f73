"""The program that gets the files of a model from a model hub, for ``_hub.py``. It is run, and never imported.

Theory of operation
===================

It is a process of its own so that a download ends at once when it is cancelled, which the library ``huggingface_hub``,
whose calls block, does not offer. It ends when its standard input does: with its parent, in whatever way that ends. It
imports nothing of this package, so that it starts fast.

The library's own cache is used, by its rules: where it is, what is in it already, the token, the proxy, and whether
the network may be used at all (``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and so on). Other
programs find there what is downloaded here, and the other way round.

Only the download of a file that is missing is done here and not by ``hf_hub_download``, which begins again when a
process was ended, and does not check the content. The bytes go into a file beside the library's own, named by the hash
of the content, under the library's lock for it. A later process goes on where an earlier one has ended. When all is
there, the hash is checked, and the file is renamed to the name that the library looks for; ``hf_hub_download`` then
finds it and does the rest.

Standard output has a JSON object in each line: what happens (``event``), and its figures. The first one has the names
of the files that there are; the parent answers with those that it wants, on standard input.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import huggingface_hub
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    build_hf_headers,
)

#: Bytes that are read at a time.
_CHUNK: Final = 1 << 20
#: The hub serves larger files only through a storage of its own, which the library knows.
_MAX_SIZE: Final = 50 * 1000**3
_SHA256: Final = re.compile("[0-9a-f]{64}")
_SHA1: Final = re.compile("[0-9a-f]{40}")


class Refused(Exception):
    """The files cannot be had; the message is for the user."""


def tell(event: str, **fields: Any) -> None:
    """Write an event for the parent."""
    print(json.dumps({"event": event, **fields}), flush=True)


def main(repo: str, revision: str) -> None:
    """Tell which files there are, and get those that the parent wants."""
    try:
        folder = _find_files(repo, revision)
        wanted: list[str] = json.loads(sys.stdin.readline() or "[]")
        threading.Thread(target=_end_with_parent, daemon=True).start()
        for file in wanted:
            path = folder / file if folder is not None else _get_file(repo, revision, file)
            tell("have", path=str(path))
        tell("done")
    except Refused as error:
        tell("failed", why=str(error))
    except Exception as error:
        tell("failed", why=_one_line(error))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _find_files(repo: str, revision: str) -> Path | None:
    """Tell which files a repository has; return where they are if the hub cannot be asked."""
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=30)
    except GatedRepoError as error:
        raise Refused(
            "its owner must grant access; accept its terms on its page, and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise Refused(
            "there is no such repository, or it is private and HF_TOKEN has no access to it"
        ) from error
    except RevisionNotFoundError as error:
        raise Refused(f"there is no revision '{revision}'") from error
    except HFValidationError as error:
        raise Refused(str(error)) from error
    except Exception as error:
        # Offline, by choice or not. The library raises errors of several other libraries then.
        return _find_cached(repo, revision, error)
    tell("files", files=[file.rfilename for file in info.siblings or ()], offline=None)
    return None


def _folder(repo: str) -> Path:
    """Return where the library keeps the files of a repository."""
    return Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _find_cached(repo: str, revision: str, error: Exception) -> Path:
    """Tell which files were downloaded before; return where they are."""
    folder = _folder(repo)
    try:
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision
    snapshot = folder / "snapshots" / commit
    # `is_file` follows the link to the content, which may have been removed.
    files = [
        path.relative_to(snapshot).as_posix()
        for path in (snapshot.rglob("*") if snapshot.is_dir() else ())
        if path.is_file()
    ]
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    tell("files", files=files, offline="HF_HUB_OFFLINE is set" if offline else _one_line(error))
    return snapshot


def _get_file(repo: str, revision: str, file: str) -> Path:
    url = huggingface_hub.hf_hub_url(repo, file, revision=revision)
    try:
        metadata = huggingface_hub.get_hf_file_metadata(url, timeout=30)
    except EntryNotFoundError as error:
        raise Refused(f"there is no file {file}") from error
    etag, size = metadata.etag, metadata.size
    if etag is not None and size is not None and size <= _MAX_SIZE and re.fullmatch(r"[\w.-]+", etag):
        _download(url, repo, etag, size, file)
    return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))


def _download(url: str, repo: str, etag: str, size: int, file: str) -> None:
    """Download a file to where the library looks for it, if it is not there; go on with one that was begun."""
    folder = _folder(repo)
    blob = folder / "blobs" / etag
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{etag}.partial")
    with _locked(folder.parent / ".locks" / folder.name / f"{etag}.lock", file):
        if not blob.exists():
            _fill(partial, url, size, file)
            tell("verifying", file=file, size=size)
            if not _is_right(partial, etag):
                partial.unlink()
                raise Refused(
                    f"{file} does not have the content that the hub says; it was removed, start again"
                )
            partial.rename(blob)


def _fill(partial: Path, url: str, size: int, file: str) -> None:
    """Download the rest of a file."""
    with partial.open("ab") as opened:
        have = opened.tell()
        if have > size:
            have = opened.truncate(0)
        tell("downloading", file=file, size=size, have=have, partial=str(partial))
        try:
            http_get(url, opened, resume_size=have, headers=build_hf_headers(), expected_size=size)
            opened.flush()
            os.fsync(opened.fileno())
        except Exception as error:
            raise Refused(
                f"the download of {file} has failed: {_one_line(error)}; start again to go on with it"
            ) from error


@contextmanager
def _locked(path: Path, file: str) -> Iterator[None]:
    """Hold a lock between processes. The kernel releases it when the process ends, however that happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting", file=file)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_right(path: Path, etag: str) -> bool:
    """Tell whether a file has the content that its name on the hub stands for."""
    if _SHA256.fullmatch(etag):
        digest = hashlib.sha256()
    elif _SHA1.fullmatch(etag):
        # A file that git keeps itself: its hash includes a header.
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        return True
    with path.open("rb") as opened:
        while block := opened.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest() == etag


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
