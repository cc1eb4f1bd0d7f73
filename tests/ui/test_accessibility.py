"""Each view in both themes and at both widths, as axe-core judges it: no finding that is serious or critical."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from clients import streaming
from watched import Watched
from web_cluster import WebCluster, open_web_cluster

VIEWS = ("requests", "workers", "models", "playground", "keys", "connect")

#: Runs in the page, after axe-core. The rules of WCAG 2.2, levels A and AA, and what is good practice.
RUN = """async () => {
  const { violations } = await axe.run(document, { resultTypes: ["violations"] });
  return violations
    .filter((each) => each.impact === "serious" || each.impact === "critical")
    .map(({ id, nodes }) => `${id}: ${nodes.map((node) => `${node.html} (${node.failureSummary})`).join("; ")}`);
}"""


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core, which is in a package of Python."""
    spec = find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe-playwright-python is not installed")
    return (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def findings(page: Any, axe: str) -> list[str]:
    """Return what is wrong with a page as it is now, and whether it is wider than its window."""
    page.evaluate(axe)
    found: list[str] = page.evaluate(RUN)
    wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return [*found, *([f"the page is {wider} pixels wider than its window"] if wider > 0 else [])]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
def test_no_view_has_a_serious_finding(
    cluster: WebCluster, watched: Callable[..., Watched], axe: str, scheme: str, width: int
) -> None:
    page = watched(cluster.page, scheme=scheme, width=width).page
    cluster.master.run_sync(cluster.server.set_aliases, {"fast": ["echo", "slow"]})
    found: dict[str, list[str]] = {}
    with streaming(cluster.url, "req_a", "req_b"):
        for view in VIEWS:
            page.evaluate("view => { location.hash = view; }", view)
            page.locator(f".view.{view} > *").first.wait_for(state="attached")
            if view == "requests":
                page.get_by_role("row").filter(has_text="req_a").wait_for()
            page.wait_for_timeout(200)
            found[view] = findings(page, axe)
        page.evaluate("location.hash = 'requests/req_a'")
        page.get_by_role("heading", name="What happened").wait_for()
        found["story"] = findings(page, axe)
        page.evaluate("location.hash = 'workers'")
        page.get_by_role("button", name="Add a worker").click()
        found["adding a worker"] = findings(page, axe)
    assert {view: each for view, each in found.items() if each} == {}


def test_signing_in_and_what_is_empty_have_no_serious_finding(
    tmp_path: Path, watched: Callable[..., Watched], axe: str
) -> None:
    with open_web_cluster(tmp_path, serve=False, api_key="secret-key") as cluster:
        page = watched(cluster.page, width=400, scheme="dark").page
        field = page.get_by_label("API key")
        found = {"signing in": findings(page, axe)}
        field.fill("secret-key")
        field.press("Enter")
        for view in ("requests", "workers", "models"):
            page.evaluate("view => { location.hash = view; }", view)
            page.locator(f".view.{view} .empty h2").first.wait_for()
            page.get_by_text("Connecting …").wait_for(state="detached")
            found[view] = findings(page, axe)
    assert {view: each for view, each in found.items() if each} == {}
