"""What ``nox -s release`` refuses, and how it judges its steps."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import previous_release
import pytest
import release_checks
from release_checks import markdown, obstacle, outcome, previous_commit, problems, summary

ROOT = Path(__file__).parents[2]

CHANGELOG = """\
# Changelog

## Unreleased

## 1.2.0 - 2026-11-28

- It is better.

## 1.1.0 - 2026-11-01

- It is there.
"""
PAGES = {
    "README.md": "These hold in version 1.2.0. They do.",
    "docs/install.md": "pip install ./dist/trio_cluster-1.2.0-py3-none-any.whl",
    "docs/upgrading.md": "# Upgrading\n\n## From 1.1.0 to 1.2.0\n",
    "CHANGELOG.md": CHANGELOG,
}


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.net", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of which version 1.2.0 can be released."""
    (tmp_path / "docs").mkdir()
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text)
    try:
        git(tmp_path, "init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    commit(tmp_path)
    return tmp_path


def commit(folder: Path) -> None:
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "all")


def test_a_clean_tree_with_its_changelog_may_be_released(project: Path) -> None:
    assert problems(project, "1.2.0") == []


def test_a_dirty_tree_is_refused(project: Path) -> None:
    (project / "README.md").write_text(PAGES["README.md"] + "\n")
    assert problems(project, "1.2.0") == ["not committed: README.md"]
    for name in "abc":
        (project / name).write_text("new")
    assert problems(project, "1.2.0") == ["not committed: README.md, a, b and 1 more"]


def test_a_folder_that_is_no_checkout_is_refused(project: Path, tmp_path: Path) -> None:
    (project / ".git").rename(tmp_path / "elsewhere")
    assert "this is no checkout" in problems(project, "1.2.0")[0]


@pytest.mark.parametrize("version", ["1.2.0.dev0", "1.2", "1.2.0rc1"])
def test_a_version_that_is_none_for_a_release_is_refused(project: Path, version: str) -> None:
    assert any(f"the version is {version}" in each for each in problems(project, version))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (
            "## 1.2.0 - 2026-11-28",
            "## 1.1.9 - 2026-11-28",
            "the newest section of the changelog is '1.1.9 - 2026",
        ),
        ("## 1.2.0 - 2026-11-28", "## 1.2.0", "the newest section of the changelog is '1.2.0', and not"),
        ("2026-11-28", "2026-11-31", "a date that there is not: 2026-11-31"),
        ("- It is better.\n", "", "the changelog says nothing about 1.2.0"),
        ("## Unreleased\n", "## Unreleased\n\n- And more.\n", "changes under Unreleased"),
        (CHANGELOG, "# Changelog\n", "the newest section of the changelog is 'nothing'"),
    ],
)
def test_a_version_without_its_section_in_the_changelog_is_refused(
    project: Path, old: str, new: str, why: str
) -> None:
    (project / "CHANGELOG.md").write_text(CHANGELOG.replace(old, new))
    commit(project)
    (found,) = problems(project, "1.2.0")
    assert why in found


@pytest.mark.parametrize("page", ["README.md", "docs/install.md", "docs/upgrading.md"])
def test_pages_of_another_version_are_refused(project: Path, page: str) -> None:
    (project / page).write_text(PAGES[page].replace("1.2.0", "1.1.0"))
    commit(project)
    assert problems(project, "1.2.0") == [f"{page} is about 1.1.0, and not about 1.2.0"]


def test_the_pages_of_this_project_name_a_version() -> None:
    assert [each for each in release_checks._problems_of_pages(ROOT, "0") if "no version" in each] == []


def test_what_cannot_be_run_is_said() -> None:
    here = {"index": True, "node": True, "npm": True, "git": True}
    for programs in release_checks.STEPS.values():
        assert obstacle(programs, here) is None
    assert obstacle(("node", "npm"), {**here, "npm": False}) == "there is no npm"
    assert (
        obstacle(("node", "npm"), {"index": True, "npm": False, "node": False})
        == "there is no node and no npm"
    )
    assert obstacle((), {**here, "index": False}) == "packages cannot be installed from here"


def sessions(*results: str) -> dict[str, Any]:
    return {"sessions": [{"name": f"s{i}", "result": result} for i, result in enumerate(results)]}


@pytest.mark.parametrize(
    ("report", "output", "result", "said"),
    [
        (sessions("success"), "nox > fine", "passed", ""),
        (sessions("success"), "12 passed, 3 skipped in 4.56s", "passed", "12 passed, 3 skipped"),
        (
            sessions("success"),
            "5 passed in 1.00s\n2 skipped in 0.10s (0:00:01)",
            "passed",
            "5 passed; 2 skipped",
        ),
        (sessions("success"), "7 skipped in 0.30s", "skipped", "no test was run: 7 skipped"),
        (sessions("skipped"), "", "skipped", "nox skipped it"),
        (sessions("success", "skipped"), "1 passed in 1.00s", "passed", "1 passed; not run: s1"),
        (
            sessions("success"),
            "nox > left out: the demo's check\n1 passed in 1.00s",
            "passed",
            "1 passed; not run: left out: the demo's check",
        ),
        (sessions("failed"), "1 failed, 2 passed in 1.00s", "failed", "s0; 1 failed, 2 passed"),
        (sessions("success", "failed"), "", "failed", "s1"),
        ({}, "nox > could not begin", "failed", ""),
    ],
)
def test_a_step_has_passed_only_if_something_was_run(
    report: dict[str, Any], output: str, result: str, said: str
) -> None:
    assert outcome(report, output) == (result, said)


def test_the_report_is_a_table() -> None:
    rows: list[release_checks.Row] = [
        ("check", "passed", 431.4, "9 passed"),
        ("agents", "skipped", 0.0, "there is no npm"),
    ]
    wanted = ["check", "agents"]
    assert markdown("1.2.0", "abc", rows, wanted) == (
        "# Release of 1.2.0\n\n"
        "Commit abc. Not everything was run: agents.\n\n"
        "| session | result | seconds | |\n"
        "| --- | --- | ---: | --- |\n"
        "| check | passed | 431 | 9 passed |\n"
        "| agents | skipped | 0 | there is no npm |\n"
    )
    assert summary(rows[:1], wanted) == "Not everything was run: agents."
    assert summary(rows[:1], wanted[:1]) == "Everything has passed."
    assert summary([("check", "failed", 1.0, ""), *rows[1:]], wanted) == "Not to be released: failed: check."


def test_the_previous_release_is_the_one_from_which_the_tests_upgrade() -> None:
    assert previous_commit(ROOT) == previous_release.COMMIT
