"""Schemathesis, which knows nothing of us but our description, finds nothing that differs from it.

It runs against real servers, as a program of its own. Where it is not installed, this is skipped; ``nox -s fuzz``
brings it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from obliging import LONGEST_VECTOR, MODELS, Placement, open_obliging

from trio_cluster.admin.description import description
from trio_cluster.gateway import failed_attempts
from trio_cluster.openai import ENDPOINTS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)

KEY = "a-key"

# What is sent in a form is text, so that of a wrong type there is nothing left to see. 503 is an answer of /ready.
CONFIGURATION = """\
[[operations]]
include-path-regex = "{forms}"
checks.negative_data_rejection.enabled = false

[[operations]]
include-path = "/ready"
checks.not_a_server_error.enabled = false
"""


def narrowed() -> dict[str, Any]:
    """Return the description with what only these models know: their names, and how long their vectors are."""
    document: dict[str, Any] = json.loads(description(True))
    for endpoint in ENDPOINTS.values():
        content = document["paths"][f"/v1{endpoint.path}"]["post"]["requestBody"]["content"]
        for sent in content.values():
            properties = sent["schema"]["properties"]
            properties["model"]["enum"] = [MODELS[endpoint.optional or endpoint.kind]]
            if "dimensions" in properties:
                properties["dimensions"]["maximum"] = LONGEST_VECTOR
    # It does not end.
    del document["paths"]["/cluster/events"]
    return document


@pytest.mark.parametrize("placement", ["local", "forwarded"])
async def test_schemathesis_finds_nothing(
    placement: Placement, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It tries wrong keys with every operation, and would be slowed down.
    monkeypatch.setattr(failed_attempts, "FREE", 1_000_000)
    forms = "|".join(f"/v1{each.path}$" for each in ENDPOINTS.values() if each.table and each.table.is_form)
    config, document = tmp_path / "schemathesis.toml", tmp_path / "openapi.json"
    config.write_text(CONFIGURATION.format(forms=forms))
    document.write_text(json.dumps(narrowed()))
    hooks = Path(__file__).with_name("schemathesis_hooks.py")
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": hooks.stem,
        "PYTHONPATH": str(hooks.parent),
        "NO_PROXY": "*",
        "NO_COLOR": "1",
    }
    async with open_obliging(placement, api_key=KEY) as front:
        result = await trio.run_process(
            [
                sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", str(document),
                "--url", front.url or "", "--header", f"Authorization: Bearer {KEY}",
                "--max-examples", os.environ.get("FUZZ", "10"), "--continue-on-failure",
                "--suppress-health-check", "all", "--request-timeout", "30", "--generation-database", "none",
            ],
            capture_stdout=True, check=False, cwd=tmp_path, env=environment,
        )  # fmt: skip
    report = result.stdout.decode(errors="replace")
    assert result.returncode == 0, report
    assert "No failures" in report or "Tested" in report, report
    assert [each.getMessage() for each in caplog.records if each.levelname in ("ERROR", "CRITICAL")] == []
