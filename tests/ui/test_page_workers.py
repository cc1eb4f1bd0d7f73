"""The view of the workers: their state, what an operator may have them do, and how one is added."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clients import streaming
from feed import SCRIPT, Feed
from watched import Watched
from web_cluster import WebCluster, open_web_cluster


def card(page: Any, name: str) -> Any:
    return page.locator(".card").filter(has=page.get_by_role("heading", name=name, exact=True))


def live_worker(name: str, **values: Any) -> dict[str, Any]:
    """Return an item of the kind ``workers``."""
    return {
        "id": name, "instance": "", "address": "10.0.0.7:4321", "version": "1.0", "state": "ok", "draining": False,
        "stalled": "", "admitted": "certificate", "connected_since": None, "lag": 0.0, "running": 1, "waiting": 0,
        "capacity": 4, "in_flight": 1, "in_flight_elsewhere": 0, "waiting_by": {}, "models": ["qwen3-8b"],
        "model_states": {}, "ejected": {},
    } | values  # fmt: skip


def test_workers_show_their_load(cluster: WebCluster, watched: Callable[..., Watched]) -> None:
    page = watched(f"{cluster.page}#workers").page
    card(page, "w1").get_by_text("0 of 10 slots taken").wait_for()
    with streaming(cluster.url, "req_a", "req_b"):
        card(page, "w1").get_by_text("1 of 10 slots taken").wait_for()
        card(page, "w2").get_by_text("1 of 10 slots taken").wait_for()
        page.get_by_text("2 of 20").wait_for()
        # The chart is drawn while the page is open, also while another view is shown.
        page.get_by_role("link", name="Models").click()
        page.get_by_role("link", name="Workers").click()
        chart = card(page, "w1").get_by_role("img", name=re.compile("now 10 %, at most 10 %"))
        chart.wait_for()
        assert "M" in chart.locator(".curve").get_attribute("d")


def test_drain_asks_and_then_has_the_worker_finish(
    cluster: WebCluster, watched: Callable[..., Watched]
) -> None:
    page = watched(f"{cluster.page}#workers").page
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    with streaming(cluster.url, "req_a", "req_b") as clients:
        card(page, "w2").get_by_text("1 of 10 slots taken").wait_for()
        card(page, "w2").get_by_role("button", name="Drain").click()
        page.get_by_role("dialog").get_by_role("button", name="Keep").click()
        page.get_by_role("dialog").wait_for(state="detached")
        card(page, "w2").get_by_role("button", name="Drain").click()
        assert sent == []
        page.get_by_role("dialog").get_by_role("button", name="Drain").click()
        card(page, "w2").get_by_text("draining", exact=True).wait_for()
        assert card(page, "w2").get_by_role("button", name="Drain").count() == 0
        assert not any(client.over.is_set() for client in clients)
    card(page, "w2").wait_for(state="detached")
    card(page, "w1").get_by_text("ok", exact=True).wait_for()


def test_without_workers_the_page_says_how_to_add_one(
    tmp_path: Path, watched: Callable[..., Watched]
) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        page = watched(f"{cluster.page}#workers").page
        page.get_by_role("heading", name="No worker is connected").wait_for()
        port = cluster.url.rpartition(":")[2]
        page.get_by_text(f"trio-cluster worker 127.0.0.1 {port} --app models:server --name NAME").wait_for()
        cluster.start_worker("w1")
        card(page, "w1").wait_for()
        assert page.get_by_role("heading", name="No worker is connected").count() == 0
        page.get_by_role("button", name="Add a worker").click()
        page.get_by_role("dialog").get_by_text(
            f"trio-cluster worker 127.0.0.1 {port} --serve openai"
        ).wait_for()


def test_with_tls_a_worker_is_invited(tmp_path: Path, watched: Callable[..., Watched]) -> None:
    pytest.importorskip("cryptography")
    with open_web_cluster(tmp_path, serve=False, tls="auto") as cluster:
        page = watched(f"{cluster.page}#workers", ignore_https_errors=True).page
        page.get_by_role("button", name="Make an invitation").click()
        page.get_by_text(re.compile(r"^trio-cluster worker --join tcj-\S+$")).wait_for()


def test_after_the_master_has_restarted_the_workers_that_are_left_are_shown(
    tmp_path: Path, watched: Callable[..., Watched]
) -> None:
    with open_web_cluster(tmp_path) as cluster:
        page = watched(f"{cluster.page}#workers", expected=[0]).page
        card(page, "w2").wait_for()
        port = cluster.master.port
        cluster.master.stop()
        page.get_by_text(re.compile("Connection lost")).wait_for()
        cluster.stop_worker("w2")
        cluster.restart(port)
        card(page, "w1").get_by_text("ok", exact=True).wait_for()
        page.get_by_text(re.compile("Connection lost")).wait_for(state="detached")
        assert card(page, "w2").count() == 0


def test_revoke_wake_and_what_is_wrong_with_workers(tmp_path: Path, watched: Callable[..., Watched]) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        page = watched(f"{cluster.page}#workers", script=SCRIPT).page
        sent: list[tuple[str, Any]] = []

        def answer(route: Any) -> None:
            sent.append((route.request.url.removeprefix(cluster.url), json.loads(route.request.post_data)))
            route.fulfill(json={})

        page.route("**/cluster/workers/**", answer)
        page.route("**/cluster/models/**", answer)
        workers = [
            live_worker("good one"),
            live_worker("token", admitted="token"),
            live_worker(
                "bad", state="stalled", stalled="its disk is full", ejected={"qwen3-8b": "502 broken"}
            ),
            live_worker("busy", running=4, waiting=3, waiting_by={"alice": 2, "": 1}, lag=0.4),
            live_worker("away", state="asleep", admitted=None, models=["a/b"], capacity=0, running=0),
        ]
        feed = Feed(page)
        feed.send("snapshot", requests=[], workers=workers, models=[])
        assert card(page, "token").get_by_role("button", name="Revoke").count() == 0
        card(page, "bad").get_by_text("its disk is full").wait_for()
        card(page, "bad").get_by_text("left alone").wait_for()
        card(page, "busy").get_by_text("3 waiting (alice 2, without a key 1)").wait_for()
        card(page, "busy").get_by_text("lag 0.4 s").wait_for()
        card(page, "good one").get_by_role("button", name="Revoke").click()
        page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        page.get_by_text("The certificate of good one is refused").wait_for()
        card(page, "away").get_by_role("button", name="Wake").click()
        page.get_by_text("away is awake").wait_for()
        assert sent == [
            ("/cluster/workers/good%20one/revoke", {}),
            ("/cluster/models/a%2Fb/load", {"worker": "away, asleep"}),
        ]


def test_of_many_models_the_first_are_shown_and_those_that_fail(
    tmp_path: Path, watched: Callable[..., Watched]
) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        page = watched(f"{cluster.page}#workers", script=SCRIPT).page
        models = [f"model-{number:03}" for number in range(200)]
        workers = [live_worker("many", models=models, ejected={"model-150": "no memory"}), live_worker("few")]
        Feed(page).send("snapshot", requests=[], workers=workers, models=[])
        card(page, "many").get_by_role("link", name="and 160 more models").wait_for()
        assert card(page, "many").get_by_role("listitem").count() == 40
        assert card(page, "many").get_by_text("left alone").count() == 1
        assert card(page, "few").get_by_role("link").count() == 0
        card(page, "many").get_by_role("link").click()
        page.get_by_role("heading", level=1, name="Models").wait_for()


def test_only_an_admin_may_revoke(tmp_path: Path, watched: Callable[..., Watched]) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        session = {"name": "op", "role": "operator", "requires_key": False}
        session |= {"mode": "master", "node_id": "m", "version": "1"}

        def prepare(page: Any) -> None:
            page.route("**/ui/session", lambda route: route.fulfill(json=session))

        page = watched(f"{cluster.page}#workers", script=SCRIPT, prepare=prepare).page
        Feed(page).send("snapshot", requests=[], workers=[live_worker("w")], models=[])
        card(page, "w").get_by_role("button", name="Drain").wait_for()
        assert card(page, "w").get_by_role("button", name="Revoke").count() == 0
