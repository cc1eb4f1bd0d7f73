"""The commit that ``trio-cluster --version`` shows, wherever the package comes from."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from trio_cluster.cli.commit import FILE, commit_of_installation, commit_of_sources

ROOT = Path(__file__).parents[2]
ARCHIVAL = ROOT / ".git_archival.txt"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.net", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit."""
    root = tmp_path / "checkout"
    (root / "trio_cluster").mkdir(parents=True)
    (root / "pyproject.toml").write_text("")
    (root / "trio_cluster" / "__init__.py").write_text("")
    (root / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    if ARCHIVAL.exists():
        (root / ".git_archival.txt").write_bytes(ARCHIVAL.read_bytes())
    try:
        git(root, "init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "all")
    return root


def test_a_checkout_asks_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert commit_of_sources(checkout) == commit
    # As in a hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(checkout.parent / "another"))
    assert commit_of_installation(checkout / "trio_cluster") == commit
    (checkout / "not in it").write_text("")
    assert commit_of_sources(checkout) == commit
    (checkout / "pyproject.toml").write_text("[changed]")
    assert commit_of_sources(checkout) == f"{commit}-modified"


def test_an_archive_of_the_repository_has_its_commit(checkout: Path, tmp_path: Path) -> None:
    # An sdist says it in another file, so that it is the same wherever it is built.
    if not ARCHIVAL.exists() or not ARCHIVAL.read_text().startswith("$Format"):
        pytest.skip("this is an archive or an sdist itself")
    git(checkout, "archive", "-o", str(tmp_path / "archive.tar"), "HEAD")
    with tarfile.open(tmp_path / "archive.tar") as files:
        files.extractall(tmp_path / "archive", filter="data")
    assert commit_of_sources(tmp_path / "archive") == git(checkout, "rev-parse", "HEAD")


def test_a_package_says_what_it_was_built_from(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "trio_cluster"
    package.mkdir(parents=True)
    assert commit_of_installation(package) is None
    (package / FILE).write_text(f"{COMMIT}\n")
    assert commit_of_installation(package) == COMMIT
    (package / FILE).write_text("anything else")
    assert commit_of_installation(package) is None


def test_the_sources_of_an_sdist_say_it(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(f"{COMMIT}-modified\n")
    assert commit_of_sources(tmp_path) is None, "these are not the sources of a project"
    (tmp_path / "pyproject.toml").write_text("")
    assert commit_of_sources(tmp_path) == f"{COMMIT}-modified"


def test_the_repository_that_a_package_is_installed_in_is_not_asked(checkout: Path) -> None:
    package = checkout / ".venv" / "lib" / "site-packages" / "trio_cluster"
    package.mkdir(parents=True)
    assert commit_of_installation(package) is None


def test_nothing_is_known_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit_of_sources(checkout) is None


def test_git_is_not_asked_before_the_version_is() -> None:
    # Trio starts a program when it is imported (ldconfig, to find a library).
    code = (
        "import sys; sys.addaudithook(lambda name, what: 'git' in map(str, what[:1]) and sys.exit('git'));"
        "import trio_cluster.cli.commands; trio_cluster.cli.arguments.parse_arguments(['master'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
