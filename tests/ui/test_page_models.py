"""The view of the models: where they run, loading and unloading, aliases, and what a key for inference sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clients import streaming
from watched import Watched
from web_cluster import WebCluster, open_web_cluster


def card(page: Any, name: str) -> Any:
    return page.locator(".card").filter(has=page.get_by_role("heading", name=name, exact=True))


def test_models_show_their_replicas(cluster: WebCluster, watched: Callable[..., Watched]) -> None:
    page = watched(f"{cluster.page}#models").page
    card(page, "slow").get_by_text("w2").wait_for()
    assert card(page, "slow").get_by_role("listitem").all_text_contents() == [
        "w1ready0 in flight",
        "w2ready0 in flight",
    ]
    card(page, "echo").get_by_text("chat with images").wait_for()
    card(page, "hearing").get_by_text("transcription").wait_for()
    with streaming(cluster.url, "req_a"):
        card(page, "slow").get_by_text("1 in flight").wait_for()
    page.get_by_label("Filter the models").fill("embeddings w1")
    card(page, "slow").wait_for(state="detached")
    assert card(page, "vectors").count() == 1
    assert card(page, "vectors").get_by_role("button").count() == 0


def test_a_model_on_demand_is_loaded_and_unloaded(tmp_path: Path, watched: Callable[..., Watched]) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        page = watched(f"{cluster.page}#models").page
        page.get_by_role("heading", name="No model is registered").wait_for()
        cluster.start_worker("w3")
        cold = card(page, "cold")
        cold.get_by_text("cold", exact=True).first.wait_for()
        cold.get_by_role("button", name="Load", exact=True).click()
        cold.get_by_text("starting", exact=True).first.wait_for()
        page.get_by_text("cold is loaded").wait_for()
        cold.get_by_text("ready", exact=True).first.wait_for()
        cold.get_by_role("button", name="Unload").click()
        page.get_by_text("cold is unloaded").wait_for()
        cold.get_by_role("button", name="Load", exact=True).wait_for()


def test_aliases_say_what_they_stand_for(cluster: WebCluster, watched: Callable[..., Watched]) -> None:
    aliases = {"fast": "echo", "good": ["slow", "echo"], "canary": {"echo": 3, "slow": 1}}
    cluster.master.run_sync(cluster.server.set_aliases, aliases)
    page = watched(f"{cluster.page}#models").page
    rows = page.locator("tbody tr")
    rows.first.wait_for()
    assert rows.all_text_contents() == [
        "canaryecho (75 %), slow (25 %)",
        "fastecho",
        "goodslow, then echo",
    ]


def test_a_key_for_inference_sees_the_models_that_it_may_use(
    tmp_path: Path, watched: Callable[..., Watched]
) -> None:
    with open_web_cluster(tmp_path, api_key="client", operator_key="op") as cluster:
        seen = watched(f"{cluster.page}#models")
        page = seen.page
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.get_by_label("API key").fill("client")
        page.get_by_label("API key").press("Enter")
        card(page, "slow").get_by_text("ready").wait_for()
        assert card(page, "slow").get_by_role("listitem").count() == 0
        assert not any("/cluster/" in url for url in asked)
