#!/usr/bin/env python3
"""What ``nox -s release`` decides: whether there may be a release, how each of its steps ended, and the report.

A step is a session of nox. It has passed if nox says so, and if tests were run where it runs tests. What cannot be run
here, because a program is missing or packages cannot be installed, is skipped, and never passed.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

__all__ = [
    "STEPS",
    "Row",
    "changed_files",
    "markdown",
    "obstacle",
    "outcome",
    "previous_commit",
    "problems",
    "summary",
]

#: The sessions, in the order in which they are run, each with the programs without which it says little.
STEPS: Final[Mapping[str, tuple[str, ...]]] = {
    "check": (),
    "law": (),
    "clients": ("node", "npm"),
    "agents": ("node", "npm"),
    "deploy": (),
    "package": ("git",),
    "versions": ("git",),
    "docs": (),
}

Result: TypeAlias = Literal["passed", "failed", "skipped"]
#: Name of the step, result, seconds, and what there is to say.
Row: TypeAlias = tuple[str, Result, float, str]

_PYTEST_END: Final = re.compile(r"^((?:\d+ [a-z]+,? ?)+) in [\d.]+s", re.MULTILINE)
_SECTION: Final = re.compile(r"^## (.*)$", re.MULTILINE)


def changed_files(root: Path) -> list[str]:
    """Return the files of a checkout that are not as they were committed, new ones included.

    Raises:
        OSError, subprocess.CalledProcessError: there is no git, or this is no checkout.
    """
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    lines = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line[3:] for line in lines]


def previous_commit(root: Path) -> str:
    """Return the commit of the previous release, from the tests of upgrades. Nothing needs to be installed for that."""
    source = (root / "tests/end_to_end/previous_release.py").read_text("utf-8")
    (commit,) = re.findall(r'^COMMIT: Final = "(\w+)"$', source, re.MULTILINE)
    return str(commit)


def problems(root: Path, version: str) -> list[str]:
    """Return why there can be no release of a version now, as sentences; nothing if there can.

    Args:
        root: the folder with the sources.
        version: the version that the package has.
    """
    return [
        *_problems_of_tree(root),
        *_problems_of_changelog(root, version),
        *_problems_of_pages(root, version),
    ]


def _problems_of_tree(root: Path) -> list[str]:
    try:
        changed = changed_files(root)
    except (OSError, subprocess.CalledProcessError):
        return ["this is no checkout, or git is not installed; a release is made from a commit"]
    if not changed:
        return []
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return [f"not committed: {', '.join(changed[:3])}{more}"]


def _problems_of_changelog(root: Path, version: str) -> list[str]:
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        return [f"the version is {version}, which is none for a release; see trio_cluster/_version.py"]
    text = (root / "CHANGELOG.md").read_text("utf-8")
    parts = _SECTION.split(text)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    found = []
    if sections.pop("Unreleased", "").strip():
        found.append("the changelog has changes under Unreleased; they belong to a version")
    newest = next(iter(sections), "nothing")
    title = re.fullmatch(rf"{re.escape(version)} - (\d{{4}}-\d\d-\d\d)", newest)
    if title is None:
        found.append(f"the newest section of the changelog is '{newest}', and not '{version} - YYYY-MM-DD'")
        return found
    try:
        datetime.date.fromisoformat(title[1])
    except ValueError:
        found.append(f"the changelog has a date that there is not: {title[1]}")
    if not re.search(r"^- ", sections[newest], re.MULTILINE):
        found.append(f"the changelog says nothing about {version}")
    return found


def _problems_of_pages(root: Path, version: str) -> list[str]:
    """Compare the versions that are named where it is easily forgotten."""
    named = {
        "README.md": r"hold in version ([\w.]+\w)",
        "docs/install.md": r"trio_cluster-([\d.]+\d(?:\.dev\d+)?)-py3",
        "docs/upgrading.md": r"^## From [\d.]+ to ([\d.]+\d)$",
    }
    found = []
    for name, pattern in named.items():
        versions = re.findall(pattern, (root / name).read_text("utf-8"), re.MULTILINE)
        if version not in versions:
            found.append(f"{name} is about {', '.join(versions) or 'no version'}, and not about {version}")
    return found


def obstacle(programs: Sequence[str], found: Mapping[str, bool]) -> str | None:
    """Return why a step cannot be run here, or ``None``.

    Args:
        programs: what it needs.
        found: for each program whether it is installed; and for ``index`` whether packages can be installed.
    """
    if not found["index"]:
        return "packages cannot be installed from here"
    missing = [program for program in programs if not found[program]]
    return f"there is no {' and no '.join(missing)}" if missing else None


def packages_can_be_installed() -> bool:
    """Tell whether pip reaches a package index. Blocks for seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", folder]
        return subprocess.run([*command, "outcome"], capture_output=True, check=False).returncode == 0


def outcome(report: Mapping[str, Any], output: str) -> tuple[Result, str]:
    """Return how a step has ended, and what there is to say of it.

    Args:
        report: what ``nox --report`` has written; empty if it has written nothing.
        output: what the step has printed.
    """
    sessions = report.get("sessions", [])
    results = [each["result"] for each in sessions]
    ends = _PYTEST_END.findall(output)
    said = "; ".join(ends)
    if not results or any(result not in ("success", "skipped") for result in results):
        failed = [each["name"] for each in sessions if each["result"] not in ("success", "skipped")]
        return "failed", "; ".join(filter(None, [", ".join(failed), said]))
    if all(result == "skipped" for result in results):
        return "skipped", "nox skipped it"
    if ends and not any(re.search(r"\b[1-9]\d* passed", end) for end in ends):
        return "skipped", f"no test was run: {said}"
    left_out = [each["name"] for each in sessions if each["result"] == "skipped"]
    # What a session itself has left out, it says by these words.
    left_out += re.findall(r"^nox > (\S+ skipped|left out: .*|.*, so .*|.* left out)$", output, re.MULTILINE)
    return "passed", "; ".join(filter(None, [said, *(f"not run: {each}" for each in left_out)]))


def summary(rows: Sequence[Row], wanted: Sequence[str]) -> str:
    """Return one sentence for all: whether this can be released."""
    failed = [name for name, result, _, _ in rows if result == "failed"]
    skipped = [name for name, result, _, _ in rows if result == "skipped"]
    left_out = [name for name in wanted if name not in [row[0] for row in rows]]
    if failed:
        return f"Not to be released: failed: {', '.join(failed)}."
    if skipped or left_out:
        return f"Not everything was run: {', '.join([*skipped, *left_out])}."
    return "Everything has passed."


def markdown(version: str, commit: str, rows: Sequence[Row], wanted: Sequence[str]) -> str:
    """Return the report.

    Args:
        version: what is to be released.
        commit: from what.
        rows: the steps that were run or skipped.
        wanted: the steps of a whole release.
    """
    lines = [
        f"# Release of {version}",
        "",
        f"Commit {commit}. {summary(rows, wanted)}",
        "",
        "| session | result | seconds | |",
        "| --- | --- | ---: | --- |",
        *(
            f"| {name} | {result} | {round(seconds)} | {said.replace('|', '/')} |"
            for name, result, seconds, said in rows
        ),
    ]
    return "\n".join(lines) + "\n"
