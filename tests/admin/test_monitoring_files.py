"""What is in ``deploy/`` for Prometheus and Grafana: the tools accept it, and it asks for metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from test_request_metrics import Metrics, played, scrape_of
from trio.testing import MockClock

ROOT = Path(__file__).parent.parent.parent
RULES = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "trio-cluster.json"
OPERATIONS = ROOT / "docs" / "operations.md"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


def promtool(*args: str | Path) -> None:
    """Run promtool, which must succeed."""
    command = ["promtool", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    # Duplicates and the like fail, too.
    promtool("check", "rules", "--lint-fatal", RULES / "alerts.yml", RULES / "recording-rules.yml")
    promtool("check", "config", "--lint-fatal", RULES / "prometheus.yml")


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_when_it_should_not() -> None:
    promtool("test", "rules", RULES / "tests.yml")


def test_each_alert_has_tests_both_ways() -> None:
    tests = (RULES / "tests.yml").read_text(encoding="utf-8")
    for alert in alerts():
        assert f"name: {alert} fires\n" in tests
        assert f"name: {alert} does not fire\n" in tests


def alerts() -> dict[str, str]:
    """Return the text of each alert, by its name."""
    text = (RULES / "alerts.yml").read_text(encoding="utf-8")
    _, *pieces = re.split(r"^      - alert: ", text, flags=re.M)
    return {piece.partition("\n")[0]: piece for piece in pieces}


@pytest.mark.parametrize("alert", alerts())
def test_each_alert_says_what_it_means_and_where_to_read_what_to_do(alert: str) -> None:
    text = alerts()[alert]
    for annotation in ("summary", "description"):
        assert re.search(rf"^          {annotation}: \S", text, re.M), annotation
    assert f"          runbook_url: docs/operations.md#{alert.lower()}\n" in text
    assert re.search(r"^          severity: (critical|warning|info)$", text, re.M)


@pytest.mark.skipif(not OPERATIONS.exists(), reason="there is no page about operations")
@pytest.mark.parametrize("alert", alerts())
def test_each_alert_has_its_section_on_the_page_about_operations(alert: str) -> None:
    headings = re.findall(r"^#+ `?(\w+)`?$", OPERATIONS.read_text(encoding="utf-8"), re.M)
    assert alert in headings


def expressions() -> Iterator[tuple[str, str]]:
    """Yield where each expression of the dashboard stands, and the expression."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if isinstance(variable["query"], dict):
            yield (
                variable["name"],
                re.sub(r"label_values\((.*), (\w+)\)", r"count by (\2) (\1)", variable["query"]["query"]),
            )


@needs_promtool
def test_the_expressions_of_the_dashboard_can_be_read(tmp_path: Path) -> None:
    lines = ["groups:", "- name: dashboard", "  rules:"]
    for number, (_, expression) in enumerate(expressions()):
        expression = (
            expression.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$model", ".*")
        )
        lines += [f"  - record: dashboard:{number}", f"    expr: {json.dumps(expression)}"]
    file = tmp_path / "dashboard.yml"
    file.write_text("\n".join(lines), encoding="utf-8")
    promtool("check", "rules", file)


def test_the_panels_of_the_dashboard_do_not_overlap_and_have_each_a_description() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        taken = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in taken) < 24, panel["title"]
        cells |= taken
    assert len({panel["id"] for panel in panels}) == len(panels)


async def real_metrics() -> Metrics:
    """Return the metrics of a master that has had requests, as an operator gets them."""
    async with played() as cluster:
        client = cluster.client(authorization="Bearer alice")
        assert (await client.chat("m", "0.2")).status == 200
        assert (await client.chat("m", "fails")).status == 502
        return await scrape_of(cluster)


def used(text: str) -> set[tuple[str, frozenset[str]]]:
    """Return the metrics that expressions ask for, each with the labels by which it selects."""
    return {
        (name, frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers or "")))
        for name, matchers in re.findall(r"\b(trio_cluster_\w+)(?:\{([^}]*)\})?", text)
    }


#: Prometheus adds these.
TARGET = {"job", "instance"}


async def test_what_the_dashboard_and_the_rules_ask_for_is_there(autojump_clock: MockClock) -> None:
    metrics = await real_metrics()
    there: dict[str, set[str]] = {}
    for (name, labels), _ in metrics.values.items():
        there.setdefault(name, set()).update(dict(labels))
    # What had no reason to be counted has a type all the same, and the labels of its sisters.
    for family in metrics.families:
        label = {"key": "key", "worker": "worker"}.get(family.name.split("_")[2], "model")
        for suffix in {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(
            family.type, ("",)
        ):
            there.setdefault(family.name + suffix, {label, "le"})
    texts: dict[str, Any] = {f"the panel or variable {title}": text for title, text in expressions()}
    for name in ("alerts.yml", "recording-rules.yml"):
        lines = (RULES / name).read_text(encoding="utf-8").splitlines()
        texts[name] = "\n".join(line for line in lines if not re.match(r"\s*(#|- name:)", line))
    recorded = set(re.findall(r"record: (\S+)", texts["recording-rules.yml"]))
    for where, text in texts.items():
        assert set(re.findall(r"\bmodel:[\w:]+", text)) <= recorded, where
        for name, labels in used(re.sub(r"\bmodel:[\w:]+", "", text)):
            assert name in there, f"{where} asks for {name}"
            assert labels <= there[name] | TARGET, f"{where} selects {name} by {set(labels)}"
    # It is one dashboard of all that people watch.
    asked = {name for _, text in expressions() for name, _ in used(text)}
    assert len(asked) > 25


#: A field of answers, and no metric.
FIELDS = {"trio_cluster_via"}


def written(text: str) -> set[str]:
    """Return the metrics that a page names. Names of folders, modules and recording rules are others."""
    # The first pattern takes paths, modules and rules whole, so that the second one does not find a part of them.
    found = re.findall(
        r"[\w:./]*[:./]trio_cluster\w*|\btrio_cluster[/.][\w/.]+|\b(trio_cluster_[a-z_]+)\b", text
    )
    return {name for name in found if name} - FIELDS


async def test_the_metrics_that_the_pages_name_are_there(autojump_clock: MockClock) -> None:
    metrics = await real_metrics()
    there = {family.name + suffix for family in metrics.families for suffix in ("", "_total", "_bucket")}
    recorded = set(re.findall(r"record: (\S+)", (RULES / "recording-rules.yml").read_text(encoding="utf-8")))
    named: set[str] = set()
    for page in OPERATIONS.parent.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        named |= written(text)
        assert written(text) <= there, page.name
        assert set(re.findall(r"\bmodel:trio_cluster[\w:]+", text)) <= recorded, page.name
    assert "trio_cluster_requests_total" in named


@needs_promtool
async def test_promtool_reads_the_metrics(autojump_clock: MockClock) -> None:
    metrics = await real_metrics()

    def check() -> str:
        command = ["promtool", "check", "metrics"]
        done = subprocess.run(
            command, input=metrics.text, capture_output=True, text=True, timeout=60, check=False
        )
        # 1: it cannot be read; 3: there is advice.
        assert done.returncode in (0, 3), done.stderr
        return done.stderr

    assert await trio.to_thread.run_sync(check) == ""
