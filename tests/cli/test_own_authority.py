"""Commands that ask a node with TLS find its authority, if its state directory is on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from trio_cluster.cli import commands
from trio_cluster.cli.arguments import parse_arguments

LOCAL = "https://127.0.0.1:8080"
NAMED = "https://gpu.lan:8080"


def authority_for(*words: str) -> Path | None:
    """Return what a command trusts besides the authorities of the system."""
    address, _ = commands._node_and_key(parse_arguments(["status", *words]))
    return address.ca_file


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for state directories, none of which is there yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(commands, "_STATE_OF_SERVICE", tmp_path / "service")
    return tmp_path


def has_authority(folder: Path) -> Path:
    folder.mkdir(parents=True)
    path = folder / "ca.pem"
    path.write_text("a certificate")
    return path


def test_that_of_the_service_is_found_after_those_of_the_user(states: Path) -> None:
    assert authority_for(LOCAL) is None
    of_service = has_authority(states / "service")
    assert authority_for(LOCAL) == of_service
    of_user = has_authority(states / "trio_cluster/master-8080")
    assert authority_for(LOCAL) == of_user
    assert authority_for("https://localhost:8081") == of_service


def test_a_state_directory_that_is_named_holds_for_every_name_of_its_machine(states: Path) -> None:
    has_authority(states / "service")
    named = has_authority(states / "named")
    for url in (LOCAL, NAMED):
        assert authority_for(url, "--state-dir", str(named.parent)) == named
    assert authority_for(NAMED) is None
    assert authority_for(NAMED, "--state-dir", str(states / "empty")) is None
    other = has_authority(states / "other")
    assert authority_for(NAMED, "--state-dir", str(named.parent), "--ca-file", str(other)) == other


def test_no_authority_is_looked_for_without_tls(states: Path) -> None:
    named = has_authority(states / "named")
    assert authority_for("http://127.0.0.1:8080", "--state-dir", str(named.parent)) is None
