"""Whole agents, as they are installed, in front of this server."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from agent_bench import Bench
from agent_cases import AGENTS, BEFORE, CHECK, FILE, Agent
from client_table import ClientTable
from served import open_served
from wiretap import open_outbound, open_wiretap

TABLE = ClientTable("agents", "agent", {agent.name: agent.title for agent in AGENTS})


def pytest_configure(config: pytest.Config) -> None:
    """Have the table of docs/clients.md written."""
    config.pluginmanager.register(TABLE)


@pytest.fixture(params=AGENTS, ids=lambda agent: agent.name)
def agent(request: pytest.FixtureRequest) -> Agent:
    """One of the agents."""
    value: Agent = request.param
    return value


def version_of(program: str) -> str:
    """Return the version of a program, as it says itself."""
    with tempfile.TemporaryDirectory() as home:
        said = subprocess.run(
            [program, "--version"],
            env=os.environ | {"HOME": home},
            capture_output=True,
            text=True,
            timeout=60,
        )
    found = re.search(r"\d+\.\d+\.\d+", said.stdout)
    return found[0] if found else "unknown"


@pytest.fixture
def program(agent: Agent) -> str:
    """Its program; without one, the test is skipped."""
    found = agent.executable()
    if found is None:
        pytest.skip(f"{agent.title} is not installed; `nox -s agents` installs it")
    if agent.name not in TABLE.versions:
        TABLE.versions[agent.name] = version_of(found)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with a file to edit, and one that checks it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / FILE).write_text(BEFORE)
    (folder / "check.py").write_text(CHECK)
    (folder / ".gitignore").write_text("__pycache__\n.aider*\n")
    author = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "Begin"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    for name, value in (("user.name", "Ada"), ("user.email", "ada@example.org")):
        subprocess.run(["git", "config", name, value], cwd=folder, check=True)
    return folder


@pytest.fixture
async def bench(agent: Agent, program: str, folder: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    """All of it. The server must be idle when the agent is gone."""
    home = tmp_path / "home"
    home.mkdir()
    async with (
        open_served("forwarded") as served,
        open_wiretap(int(served.url.rpartition(":")[2])) as wiretap,
        open_outbound() as outbound,
    ):
        yield Bench(agent, program, served, wiretap, outbound, folder, home)


@pytest.fixture
def note(agent: Agent, request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say in the table what the test has seen, in place of ``yes``."""

    def note(text: str) -> None:
        marker = request.node.get_closest_marker("feature")
        TABLE.notes[agent.name, marker.args[0]] = text

    return note
