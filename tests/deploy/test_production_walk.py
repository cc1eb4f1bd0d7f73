"""The pieces of ``scripts/production_walk.py``. The whole of it is what ``nox -s walk`` does, as root."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from production_walk import ROOT, Failed, Machine, nginx_configuration, tls_to_masters

SYSTEMD = ROOT / "deploy/systemd"


def test_the_changes_of_nginx_are_changes_of_what_the_page_shows(tmp_path: Path) -> None:
    text = nginx_configuration(
        tmp_path, ("b.lan:8080 max_fails=0", "b.lan:8080 down"), tls_to_masters(tmp_path)
    )
    assert "server b.lan:8080 down;" in text
    assert f"proxy_ssl_trusted_certificate {tmp_path}/ca.pem;" in text
    assert "http://masters" not in text
    assert "/etc/" not in text
    with pytest.raises(Failed, match=r"not in docs/deployment\.md: elsewhere"):
        nginx_configuration(tmp_path, ("elsewhere", "anywhere"))


@pytest.mark.parametrize("kind", ["master", "worker"])
def test_a_unit_is_run_as_it_is_written(kind: str, tmp_path: Path) -> None:
    machine = Machine("a", tmp_path)
    name = f"trio-cluster-{kind}"
    root = tmp_path / "a/system"
    units, secrets = root / "etc/systemd/system", root / "etc/trio-cluster"
    units.mkdir(parents=True)
    secrets.mkdir()
    for path in SYSTEMD.glob(f"{name}.*"):
        shutil.copy(path, units)
    for secret in ("api_key", "cluster_token"):
        (secrets / secret).write_text("a secret")
    words, environment = machine.service(name)
    assert not [word for word in words if "%" in word or "$" in word]
    program = words.index("/opt/trio-cluster/bin/trio-cluster")
    assert words[program + 1] == kind
    state = Path(words[words.index("--state-dir") + 1])
    assert state.is_relative_to(root / "var/lib")
    assert state.stat().st_mode & 0o777 == 0o700
    assert Path(words[words.index("--cluster-token-file") + 1]).read_text() == "a secret"
    assert environment["PYTHONFAULTHANDLER"] == "1"
    if kind == "master":
        assert words[:3] == ["systemd-socket-activate", "--listen=0.0.0.0:8080", "--listen=0.0.0.0:9080"]
    else:
        assert program == 0
