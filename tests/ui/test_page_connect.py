"""Connect a client: what the page says to paste works, and is what the documents say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from watched import Watched
from web_cluster import WebCluster, open_web_cluster

Open = Callable[..., Watched]
CLIENTS = Path(__file__).parents[2] / "docs" / "clients.md"
KEY = "secret-key"


@pytest.fixture
def with_key(tmp_path: Path) -> Iterator[WebCluster]:
    """A cluster that needs a key."""
    with open_web_cluster(tmp_path, api_key=KEY) as opened:
        yield opened


def _open(cluster: WebCluster, watched: Open, client: str, model: str = "echo", key: str = "") -> Any:
    page = watched(f"{cluster.page}#connect/{client}", permissions=["clipboard-read", "clipboard-write"]).page
    if key:
        page.get_by_label("API key").fill(key)
        page.get_by_label("API key").press("Enter")
    page.get_by_label("Model", exact=True).select_option(model)
    return page


def _snippets(page: Any) -> list[str]:
    return list(page.locator(".recipe pre").all_inner_texts())


def _documented(title: str, cluster: WebCluster) -> str:
    """Return the first block of code of a section, filled in with the address and a model of the cluster."""
    section = CLIENTS.read_text().split(f"### {title}\n", 1)[1]
    match = re.search(r"```\w+\n(.*?)```", section, re.DOTALL)
    assert match is not None
    block = match[1].replace("http://master.lan:8080", cluster.url).replace("sk-for-clients", "YOUR_KEY")
    return block.replace("qwen", "echo").strip()


@pytest.mark.parametrize(
    ("client", "title"),
    [
        ("codex", "Codex CLI"),
        ("claude-code", "Claude Code"),
        ("opencode", "opencode"),
        ("open-webui", "Open WebUI"),
    ],
)
def test_agents_are_configured_as_documented(
    with_key: WebCluster, watched: Open, client: str, title: str
) -> None:
    page = _open(with_key, watched, client, key=KEY)
    shown, expected = _snippets(page)[0], _documented(title, with_key)
    if client == "codex":
        assert tomllib.loads(shown) == tomllib.loads(expected)
    elif client == "opencode":
        assert json.loads(shown) == json.loads(expected)
    elif client == "claude-code":
        assert shown == f"{expected}\nclaude"
    else:
        assert shown == expected
    assert KEY not in page.content()


def test_without_a_key_codex_does_not_ask_for_one(cluster: WebCluster, watched: Open) -> None:
    page = _open(cluster, watched, "codex")
    assert "env_key" not in _snippets(page)[0]
    page.get_by_text("This server needs no key").wait_for()


def test_only_models_that_fit_can_be_chosen(cluster: WebCluster, watched: Open) -> None:
    page = _open(cluster, watched, "codex")
    options = page.get_by_label("Model", exact=True).locator("option")
    assert options.all_inner_texts() == ["broken", "echo", "slow", "tools"]
    page.get_by_role("link", name="curl").click()
    page.get_by_label("Model", exact=True).select_option("vectors")
    assert "/v1/embeddings" in _snippets(page)[-1]
    # The choice goes along, where it fits.
    page.get_by_role("link", name="Python").click()
    page.get_by_text("client.embeddings.create").wait_for()


def test_curl_works_as_pasted(with_key: WebCluster, watched: Open, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    page = _open(with_key, watched, "curl", key=KEY)
    for model in ("echo", "vectors", "speech", "pictures", "order", "judge"):
        page.get_by_label("Model", exact=True).select_option(model)
        export, command = _snippets(page)
        script = f"{export.replace('YOUR_KEY', KEY)}\n{command} --fail -sS"
        done = subprocess.run(
            ["sh", "-c", script], capture_output=True, cwd=tmp_path, timeout=60, check=False
        )
        assert done.returncode == 0, (model, done.stderr)
        if model == "echo":
            assert json.loads(done.stdout)["choices"][0]["message"]["content"].strip() == "Hello"
    assert (tmp_path / "speech.wav").read_bytes().startswith(b"RIFF")


def test_python_works_as_pasted(with_key: WebCluster, watched: Open, tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="openai is not installed")
    page = _open(with_key, watched, "python", key=KEY)
    programs = []
    for model in ("echo", "vectors", "speech", "hearing", "pictures", "judge"):
        page.get_by_label("Model", exact=True).select_option(model)
        programs.append(_snippets(page)[-1].replace("YOUR_KEY", KEY))
    # All in one process, since the client takes long to import.
    run = "import sys\nfor program in sys.argv[1:]:\n    exec(program, {})\n    print()"
    done = subprocess.run(
        [sys.executable, "-c", run, *programs], capture_output=True, cwd=tmp_path, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[0].strip() == "Hello"
    assert "3244 bytes were said" in lines
    assert (tmp_path / "boat.png").read_bytes().startswith(b"\x89PNG")


def test_another_address_is_filled_in_and_copied(cluster: WebCluster, watched: Open) -> None:
    page = _open(cluster, watched, "claude-code")
    page.get_by_text("This address is reached from this machine only.").wait_for()
    page.get_by_label("Address of this server").fill("https://gpu.example:8443/v1/")
    assert "export ANTHROPIC_BASE_URL=https://gpu.example:8443\n" in _snippets(page)[0]
    assert not page.get_by_text("This address is reached from this machine only.").is_visible()
    page.get_by_role("button", name="Copy").first.click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("() => navigator.clipboard.readText()") == _snippets(page)[0]


def test_names_are_quoted_for_shells(cluster: WebCluster, watched: Open) -> None:
    page = _open(cluster, watched, "curl")
    quoted = page.evaluate(
        """async () => {
          const { shell } = await import("./views/connect/clients.js");
          return ["a/b:c", "two words", "it's", "$(x)"].map(shell);
        }"""
    )
    assert quoted == ["a/b:c", "'two words'", "'it'\\''s'", "'$(x)'"]


def test_without_models_it_says_so(tmp_path: Path, watched: Open) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        page = watched(f"{cluster.page}#connect").page
        page.get_by_role("heading", name="No model fits").wait_for()
