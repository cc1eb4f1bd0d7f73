#!/usr/bin/env python3
"""What ``nox -s package`` builds and checks: sdist and wheel, their contents, hashes, and the list of what they need.

The files are reproducible: hatchling sorts what it packs, and takes all times from ``SOURCE_DATE_EPOCH``, which is the
time of the commit here. So two builds of one commit are the same bytes, wherever they are made; :func:`differences`
says what is not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

__all__ = [
    "SUMS",
    "build",
    "build_twice",
    "differences",
    "finish_sbom",
    "list_components",
    "names",
    "sdist_problems",
    "sha256_sums",
    "source_date_epoch",
    "unpack",
    "wheel_problems",
]

ROOT: Final = Path(__file__).resolve().parents[1]
#: The file with the hashes, beside the packages.
SUMS: Final = "SHA256SUMS"

#: Where git does not know the time of the commit: the time that hatchling takes by default.
_DEFAULT_EPOCH: Final = 1580601600

#: What must be in each, as paths in the sdist's folder, or in the wheel.
_IN_WHEEL: Final = ("trio_cluster/py.typed", "trio_cluster/limits/script.lua", "pytest_trio_cluster.py")
_IN_SDIST: Final = (
    *_IN_WHEEL,
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "docs/index.md",
    "hatch_build.py",
    "noxfile.py",
    "pyproject.toml",
    "tests/conftest.py",
)
#: What may be at the top of a wheel, beside its metadata.
_TOP_OF_WHEEL: Final = {"trio_cluster", "pytest_trio_cluster.py"}
#: What is in no package, wherever in it.
_NOWHERE: Final = {
    ".git",
    ".nox",
    ".venv",
    "__pycache__",
    ".hypothesis",
    ".mypy_cache",
    ".ruff_cache",
    "_build",
}


def source_date_epoch(root: Path) -> int:
    """Return the time that all files of a package get, in seconds: ``SOURCE_DATE_EPOCH``, or that of the commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    if (root / ".git").exists():
        command = ["git", "log", "-1", "--format=%ct"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return int(done.stdout)
    return _DEFAULT_EPOCH


def build(root: Path, folder: Path, *, kinds: Sequence[str] = ("sdist", "wheel")) -> list[Path]:
    """Build packages of a folder with sources, with the hatchling of this interpreter.

    Args:
        root: the folder with ``pyproject.toml``.
        folder: where the packages are written; made if it is missing.
        kinds: ``sdist``, ``wheel`` or both.

    Returns:
        Their paths, in the order of ``kinds``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(source_date_epoch(root))}
    built = []
    for kind in kinds:
        code = f"import hatchling.build, sys; print(hatchling.build.build_{kind}(sys.argv[1]))"
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        built.append(folder / done.stdout.split()[-1])
    return built


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack an sdist, and return the folder with its sources."""
    with tarfile.open(sdist) as files:
        files.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def names(package: Path) -> list[str]:
    """Return the paths of the files in a package; those of an sdist without the folder that all are in."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as files:
            return [name for name in files.namelist() if not name.endswith("/")]
    with tarfile.open(package) as files:
        return [member.name.partition("/")[2] for member in files if member.isfile()]


def wheel_problems(found: Iterable[str], sources: Iterable[str]) -> list[str]:
    """Return what is wrong with the contents of a wheel, as sentences.

    Args:
        found: the paths in it.
        sources: the paths of the files of the package in the sources, from their root.
    """
    found = set(found)
    problems = [f"{name} is missing" for name in sorted({*_IN_WHEEL, *sources} - found)]
    for name in sorted(found):
        top = name.partition("/")[0]
        if top not in _TOP_OF_WHEEL and not top.endswith(".dist-info"):
            problems.append(f"{name} does not belong into the wheel")
    return problems + _litter(found)


def sdist_problems(found: Iterable[str]) -> list[str]:
    """Return what is wrong with the contents of an sdist, as sentences."""
    found = set(found)
    return [f"{name} is missing" for name in sorted({*_IN_SDIST} - found)] + _litter(found)


def _litter(found: Iterable[str]) -> list[str]:
    return [
        f"{name} does not belong into a package"
        for name in sorted(found)
        if _NOWHERE & {*PurePosixPath(name).parts} or name.endswith((".pyc", ".orig", ".rej"))
    ]


def differences(first: Path, second: Path) -> list[str]:
    """Return in what two packages differ that should be the same, as sentences; nothing if their bytes are the same."""
    if first.read_bytes() == second.read_bytes():
        return []
    one, other = _contents(first), _contents(second)
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return [f"{first.name}: {name} differs" for name in differing] or [
        f"{first.name}: the files are the same, and their order, times or modes differ"
    ]


def _contents(package: Path) -> dict[str, bytes]:
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as files:
            return {name: files.read(name) for name in files.namelist()}
    with tarfile.open(package) as files:
        members = [member for member in files if member.isfile()]
        return {member.name: _read(files, member) for member in members}


def _read(files: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = files.extractfile(member)
    assert content is not None
    return content.read()


def sha256_sums(files: Iterable[Path]) -> str:
    """Return the hashes of files, as ``sha256sum`` writes and ``sha256sum --check`` reads them."""
    lines = [f"{_sha256(path)}  {path.name}\n" for path in files]
    return "".join(sorted(lines, key=lambda line: line.split("  ")[1]))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finish_sbom(sbom: Mapping[str, Any], wheel: Path) -> dict[str, Any]:
    """Return the list of an environment's components as that of the wheel that is installed there.

    The wheel becomes the component that the list is about, with its hash. Where files lay on the machine that built it
    is left out.

    Args:
        sbom: a document of CycloneDX, as read from JSON.
        wheel: the file.

    Raises:
        ValueError: the wheel's project is not in the environment.
    """
    project, version = wheel.name.split("-")[:2]
    project = project.replace("_", "-")
    components = [_without_local_places(each) for each in sbom.get("components", [])]
    mains = [each for each in components if each["name"].lower().replace("_", "-") == project]
    if len(mains) != 1 or mains[0]["version"] != version:
        raise ValueError(f"{project} {version} is not what is installed")
    main = mains[0]
    main["type"] = "application"
    main["hashes"] = [{"alg": "SHA-256", "content": _sha256(wheel)}]
    return {
        **sbom,
        "metadata": {**sbom.get("metadata", {}), "component": main},
        "components": [each for each in components if each is not main],
    }


def _without_local_places(component: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(component)
    links = [each for each in found.get("externalReferences", []) if not each["url"].startswith("file:")]
    found.pop("externalReferences", None)
    if links:
        found["externalReferences"] = links
    return found


def build_twice(folder: Path, scratch: Path) -> int:
    """Build sdist and wheel into a folder, check both, and print what is wrong.

    Args:
        folder: where the packages are written.
        scratch: an empty folder. The sources of the sdist are unpacked into it, and are there afterwards.

    Returns:
        The exit code.
    """
    # The sources of the sdist have no history to take it from.
    os.environ["SOURCE_DATE_EPOCH"] = str(source_date_epoch(ROOT))
    sdist, direct = build(ROOT, scratch / "direct")
    # As `python -m build` does: the wheel is made of what is in the sdist.
    sources = unpack(sdist, scratch)
    (wheel,) = build(sources, folder, kinds=["wheel"])
    (again,) = build(ROOT, folder, kinds=["sdist"])
    package = [
        str(path.relative_to(sources)) for path in (sources / "trio_cluster").rglob("*") if path.is_file()
    ]
    problems = [
        *differences(sdist, again),
        *differences(direct, wheel),
        *wheel_problems(names(wheel), package),
        *sdist_problems(names(again)),
    ]
    print(*problems or [f"{wheel.name} and {again.name}: two builds are the same bytes"], sep="\n")
    return 1 if problems else 0


def list_components(dist: Path, python: str) -> int:
    """Write the list of components and the hashes beside the packages. Returns the exit code.

    Args:
        dist: the folder with the packages.
        python: the interpreter of an environment in which the wheel is installed, and what it needs, and nothing else.
    """
    (wheel,) = dist.glob("*.whl")
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(source_date_epoch(ROOT))}
    command = [
        sys.executable,
        "-m",
        "cyclonedx_py",
        "environment",
        "--short-PURLs",
        "--output-reproducible",
        python,
    ]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    sbom = finish_sbom(json.loads(done.stdout), wheel)
    name = "-".join(wheel.name.split("-")[:2])
    (dist / f"{name}.cdx.json").write_text(json.dumps(sbom, indent=2, ensure_ascii=False) + "\n", "utf-8")
    files = sorted(path for path in dist.iterdir() if path.name != SUMS)
    (dist / SUMS).write_text(sha256_sums(files), "ascii")
    print(f"{name}.cdx.json: {len(sbom['components'])} components")
    return 0


def main() -> int:
    """Run one step of the session. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Build and describe the packages.")
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("build", help="build sdist and wheel twice, and check both")
    step.add_argument("folder", type=Path, help="where the packages are written")
    step.add_argument("scratch", type=Path, help="an empty folder, for the second build")
    step.set_defaults(run=lambda given: build_twice(given.folder, given.scratch))
    step = steps.add_parser("list", help="write the list of components (CycloneDX) and the hashes")
    step.add_argument("folder", type=Path, help="where the packages are")
    step.add_argument("python", help="of an environment with the wheel and nothing else")
    step.set_defaults(run=lambda given: list_components(given.folder, given.python))
    arguments = parser.parse_args()
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
