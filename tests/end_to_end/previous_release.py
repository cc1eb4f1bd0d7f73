"""The release before this one, to be run beside it: from its commit, which has to be in the history of the checkout.

By default it runs from its sources with the libraries of this environment, if it allows these versions. With
``PREVIOUS_PYTHON`` in the environment it is what is installed for that interpreter: ``nox -s versions`` installs the
package that is built from the commit, with libraries of its own.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from subprocess import PIPE
from typing import Any, Final

import attrs
import fork_server
import pytest
import trio
from nodes import Node, Nodes
from packaging.requirements import Requirement

__all__ = ["COMMIT", "VERSION", "PreviousRelease", "open_previous_release"]

VERSION: Final = "0.1.0"
#: What was released as that version: the last commit before the changes that the changelog lists after it.
COMMIT: Final = "0c66f619af9a7929bd912b397b03e6a69323ff0f"

_ROOT: Final = Path(__file__).parents[2]
_READY: Final = {"master": "serving", "worker": "registered with the master"}


def unpack(commit: str, folder: Path) -> None:
    """Write the files of a commit into a folder; skip the test where the commit is not known."""
    try:
        archive = subprocess.run(
            ["git", "archive", commit], cwd=_ROOT, capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"the commit of {VERSION} is not here: no git, or a checkout without its history")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def missing_requirements(sources: Path) -> list[str]:
    """Return those dependencies of a project that this environment does not satisfy."""
    project = tomllib.loads((sources / "pyproject.toml").read_text("utf-8"))["project"]
    missing = []
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            missing.append(f"{requirement} (here: {installed})")
    return missing


@attrs.frozen
class PreviousRelease:
    """How the previous release is run."""

    python: str
    sources: Path | None
    """The folder with its package, if this is not installed for ``python``."""

    async def start(self, nodes: Nodes, command: str, *arguments: str | int, models: str = "") -> Node:
        """Start a node of the previous release, and wait until it is ready; compare :meth:`Nodes.start`."""
        words = [command, *map(str, arguments), "--log-format", "json"]
        if command != "worker":
            words += ["--host", "127.0.0.1"]
        if models:
            words += ["--app", "app:server"]
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("TRIO_CLUSTER_") and name != "PYTHONPATH"
        }
        environment |= {"MODELS": models} | ({"PYTHONPATH": str(self.sources)} if self.sources else {})
        process: Any
        if self.sources is None:
            process = await trio.lowlevel.open_process(
                [self.python, "-m", "trio_cluster", *words],
                cwd=nodes.directory,
                env=environment,
                stderr=PIPE,
                start_new_session=True,
            )
        else:
            program = ["-m", "trio_cluster", *words]
            process = fork_server.start(
                program, cwd=nodes.directory, env=environment, old_package=self.sources
            )
        node = Node(process, command, next((word for word in arguments if isinstance(word, int)), 0))
        nodes.watch(node)
        await node.log(_READY[command])
        return node

    async def master(self, nodes: Nodes, *arguments: str | int) -> Node:
        """Start a master, on a pair of ports that it picks itself if it is given none."""
        port = () if any(isinstance(word, int) for word in arguments) else (0,)
        return await self.start(nodes, "master", *port, *arguments)

    async def worker(self, nodes: Nodes, master: Node, name: str, *arguments: str, models: str) -> Node:
        """Start a worker of ``master``."""
        return await self.start(
            nodes, "worker", "127.0.0.1", master.port, "--name", name, *arguments, models=models
        )


def open_previous_release(folder: Path) -> PreviousRelease:
    """Return the previous release, ready to run; skip the test if it cannot be run here.

    Args:
        folder: where its files may be kept.
    """
    python = os.environ.get("PREVIOUS_PYTHON")
    if python:
        release = PreviousRelease(python, None)
    else:
        unpack(COMMIT, folder)
        if missing := missing_requirements(folder):
            pytest.skip(f"{VERSION} does not run with these libraries: {', '.join(missing)}")
        release = PreviousRelease(sys.executable, folder)
    said = subprocess.run(
        [release.python, "-m", "trio_cluster", "--version"],
        env={**os.environ, "PYTHONPATH": str(release.sources or "")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split() == ["trio-cluster", VERSION], said
    return release
