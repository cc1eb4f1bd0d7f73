"""The commit that an installation was made from, for ``trio-cluster --version``.

Where the package is built, ``hatch_build.py`` writes the commit into it, as ``commit.txt``; in an sdist that file lies
beside ``pyproject.toml``. A checkout asks git, when the version is asked for and not before. An archive of the
repository (``git archive``) has the commit in a file that git has filled in. Elsewhere it is not known, and nothing is
said.

``hatch_build.py`` runs this module where nothing is installed. So it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Final

__all__ = ["FILE", "commit_of_installation", "commit_of_sources"]

#: The file in the package, or in an sdist.
FILE: Final = "commit.txt"

_ARCHIVED: Final = ".git_archival.txt"
_KNOWN: Final = re.compile(r"[0-9a-f]{40}(-modified)?")
#: By these, git would look into another repository, as where it runs a hook of that one.
_ANOTHER_REPOSITORY: Final = frozenset({"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"})
#: Seconds. A repository on a share that does not answer must not keep the version from being shown.
_TIMEOUT: Final = 10.0


def commit_of_installation(package: Path) -> str | None:
    """Return the commit of an installed package or of a checkout. Blocks; may run git.

    Args:
        package: the folder of the package.

    Returns:
        40 hexadecimal digits, with ``-modified`` behind them if files of that commit had been changed; ``None``: it is
        not known.
    """
    try:
        built = (package / FILE).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return commit_of_sources(package.parent)
    return built if _KNOWN.fullmatch(built) else None


def commit_of_sources(root: Path) -> str | None:
    """Return the commit of a folder with sources; see :func:`commit_of_installation`.

    Args:
        root: the folder with ``pyproject.toml``.
    """
    if not (root / "pyproject.toml").is_file():
        return None
    if (root / ".git").exists():
        return _ask_git(root)
    for name in (FILE, _ARCHIVED):
        try:
            found = (root / name).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if _KNOWN.fullmatch(found):
            return found
    return None


def _ask_git(root: Path) -> str | None:
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    if not _KNOWN.fullmatch(commit):
        return None
    return f"{commit}-modified" if changes else commit


def _git(root: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in _ANOTHER_REPOSITORY}
    return subprocess.run(
        # Reading the state of files must not write into the repository, which may belong to another user.
        ["git", "--no-optional-locks", *arguments],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        text=True,
        timeout=_TIMEOUT,
    ).stdout.strip()
