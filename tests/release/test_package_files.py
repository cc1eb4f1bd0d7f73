"""Sdist and wheel: what is in them, that two builds are the same bytes, and what ``nox -s package`` makes beside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import package_files
import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist and a wheel of these sources."""
    sdist, wheel = package_files.build(ROOT, tmp_path_factory.mktemp("built"))
    return sdist, wheel


def sources() -> list[str]:
    """Return the files of the package that are no products of this machine."""
    return [
        str(path.relative_to(ROOT))
        for path in (ROOT / "trio_cluster").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]


def test_the_wheel_has_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    found = package_files.names(built[1])
    assert package_files.wheel_problems(found, sources()) == []
    assert {name.partition("/")[0] for name in found if ".dist-info/" not in name} == {
        "trio_cluster",
        "pytest_trio_cluster.py",
    }
    # Whatever is not a module: the types' marker, scripts and pages. It is in a wheel because it is in the folder.
    assert {"trio_cluster/py.typed", "trio_cluster/limits/script.lua"} <= set(found)
    ui = {name for name in sources() if name.startswith("trio_cluster/ui/")}
    assert ui <= set(found)


def test_the_wheel_is_small_enough_to_have_no_models(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as files:
        large = {entry.filename for entry in files.infolist() if entry.file_size > 100_000}
    # The demo's smallest model; see "Folders and floors" in docs/design.md.
    assert large == {"trio_cluster/demo/digits.npz"}
    assert built[1].stat().st_size < 1_500_000


def test_the_sdist_has_the_tests_and_the_documentation(built: tuple[Path, Path]) -> None:
    found = package_files.names(built[0])
    assert package_files.sdist_problems(found) == []
    tests = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert tests <= set(found)


def test_the_sdist_has_all_files_of_the_repository(built: tuple[Path, Path]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("these files are in no repository")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    tracked = {name for name in listing.split("\0") if name and (ROOT / name).is_file()}
    # The commit is in commit.txt; PKG-INFO is the metadata of the project.
    assert tracked - {".git_archival.txt"} <= set(package_files.names(built[0])) - {"commit.txt", "PKG-INFO"}


def test_what_is_missing_or_does_not_belong_is_named() -> None:
    found = [*package_files._IN_WHEEL, "trio_cluster/a.py", "trio_cluster-1.dist-info/METADATA"]
    assert package_files.wheel_problems(found, ["trio_cluster/a.py"]) == []
    assert package_files.wheel_problems(found, ["trio_cluster/ui/a.js"]) == [
        "trio_cluster/ui/a.js is missing"
    ]
    assert package_files.wheel_problems([*found, "tests/test_a.py"], []) == [
        "tests/test_a.py does not belong into the wheel"
    ]
    assert package_files.wheel_problems([*found, "trio_cluster/__pycache__/a.pyc"], []) == [
        "trio_cluster/__pycache__/a.pyc does not belong into a package"
    ]
    complete = list(package_files._IN_SDIST)
    assert package_files.sdist_problems(complete) == []
    assert package_files.sdist_problems([*complete, ".git/config"]) == [
        ".git/config does not belong into a package"
    ]
    assert package_files.sdist_problems(complete[1:]) == [f"{complete[0]} is missing"]


def test_a_second_build_elsewhere_is_the_same_bytes(
    built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdist, wheel = built
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(package_files.source_date_epoch(ROOT)))
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    monkeypatch.setenv("PYTHONHASHSEED", "4711")
    copy = package_files.unpack(sdist, tmp_path)
    # Times and modes of a working tree are those of the machine.
    for path in (copy / "trio_cluster").rglob("*.py"):
        os.utime(path, (10**9, 10**9))
        path.chmod(0o600)
    again = package_files.build(copy, tmp_path / "again")
    assert package_files.differences(wheel, again[1]) == []
    assert (
        package_files.differences(sdist, package_files.build(ROOT, tmp_path / "b", kinds=["sdist"])[0]) == []
    )


def test_a_difference_is_named(built: tuple[Path, Path], tmp_path: Path) -> None:
    _, wheel = built
    other = tmp_path / wheel.name
    shutil.copy(wheel, other)
    assert package_files.differences(wheel, other) == []
    with zipfile.ZipFile(other, "a") as files:
        files.writestr("more.txt", "more")
    assert package_files.differences(wheel, other) == [f"{wheel.name}: more.txt differs"]


def test_packages_have_the_time_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert package_files.source_date_epoch(ROOT) == 1_700_000_000
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert package_files.source_date_epoch(tmp_path) == 1_580_601_600


def test_hashes_are_in_the_format_of_sha256sum(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("b", "a")]
    for file in files:
        file.write_text(file.name)
    sums = package_files.sha256_sums(files)
    assert [line.split("  ")[1] for line in sums.splitlines()] == ["a", "b"]
    if shutil.which("sha256sum"):
        (tmp_path / "SHA256SUMS").write_text(sums)
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True)


def test_the_list_of_components_is_that_of_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "trio_cluster-1.2-py3-none-any.whl"
    wheel.write_bytes(b"x")
    local = {"type": "distribution", "url": "file:///somewhere/trio_cluster-1.2-py3-none-any.whl"}
    home = {"type": "website", "url": "https://example.net"}
    environment: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "metadata": {"timestamp": "then"},
        "components": [
            {"name": "trio", "version": "0.31", "type": "library", "externalReferences": [home]},
            {"name": "trio-cluster", "version": "1.2", "type": "library", "externalReferences": [local]},
        ],
        "dependencies": [{"ref": "trio-cluster==1.2", "dependsOn": ["trio==0.31"]}],
    }
    sbom = package_files.finish_sbom(environment, wheel)
    assert [each["name"] for each in sbom["components"]] == ["trio"]
    assert sbom["components"][0]["externalReferences"] == [home]
    assert sbom["dependencies"] == environment["dependencies"]
    assert sbom["metadata"]["timestamp"] == "then"
    main = sbom["metadata"]["component"]
    assert (main["name"], main["version"], main["type"]) == ("trio-cluster", "1.2", "application")
    assert main["hashes"][0]["content"].startswith("2d711642b726b044")
    assert "somewhere" not in json.dumps(sbom)
    with pytest.raises(ValueError, match=r"trio-cluster 1\.3 is not what is installed"):
        package_files.finish_sbom(environment, tmp_path / "trio_cluster-1.3-py3-none-any.whl")
