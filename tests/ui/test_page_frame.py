"""Signing in, the way between the views, and a connection that is lost."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from watched import Watched, wait_until
from web_cluster import WebCluster, open_web_cluster


def test_enter_signs_in_and_the_key_is_forgotten_with_the_page(
    tmp_path: Path, watched: Callable[..., Watched]
) -> None:
    with open_web_cluster(tmp_path, serve=False, api_key="secret-key") as cluster:
        seen = watched(cluster.page, expected=[401])
        page = seen.page
        field = page.get_by_label("API key")
        field.fill("wrong")
        field.press("Enter")
        page.get_by_text("This key is not valid.").wait_for()
        # No header can have this: the browser does not even send it.
        field.fill("schl\u00fcssel\u20ac")
        field.press("Enter")
        page.get_by_text("This key is not valid.").wait_for()
        field.fill("secret-key")
        field.press("Enter")
        page.get_by_role("link", name="Workers").wait_for()
        stored = page.evaluate(
            "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        )
        assert "secret-key" not in stored
        page.reload()
        page.get_by_label("API key").wait_for()


def test_each_view_has_an_address(cluster: WebCluster, watched: Callable[..., Watched]) -> None:
    page = watched(cluster.page).page
    for name in ("Requests", "Workers", "Models", "Playground", "Keys and usage", "Connect a client"):
        page.get_by_role("navigation").get_by_role("link", name=name).click()
        page.get_by_role("heading", level=1, name=name).wait_for()
        assert page.get_by_role("link", name=name).get_attribute("aria-current") == "page"
        page.locator(".view > *").first.wait_for(state="attached")


def test_without_an_operator_s_key_there_is_no_view_of_others(
    tmp_path: Path, watched: Callable[..., Watched]
) -> None:
    with open_web_cluster(tmp_path, serve=False, operator_key="op") as cluster:
        page = watched(cluster.page).page
        page.get_by_role("link", name="Playground").wait_for()
        assert page.get_by_role("link", name="Requests").count() == 0
        page.get_by_role("button", name="Sign in").click()
        page.get_by_label("API key").fill("op")
        page.get_by_label("API key").press("Enter")
        page.get_by_role("link", name="Requests").wait_for()


def test_pressing_back_twice_shows_one_page(cluster: WebCluster, watched: Callable[..., Watched]) -> None:
    page = watched(f"{cluster.page}#workers").page
    page.get_by_role("heading", name="w1").wait_for()
    followed: list[str] = []
    page.on(
        "request", lambda request: request.url.endswith("/cluster/events") and followed.append(request.url)
    )
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Back").evaluate("button => { button.click(); button.click(); }")
    wait_until(
        page,
        "performance.getEntriesByType('resource').filter((each) => each.name.endsWith('ui/session')).length === 3",
    )
    page.get_by_role("heading", name="w1").wait_for()
    assert len(followed) == 1


def test_a_lost_connection_is_said_and_comes_back(tmp_path: Path, watched: Callable[..., Watched]) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        page = watched(cluster.page, expected=[0]).page
        page.get_by_role("link", name="Workers").wait_for()
        port = cluster.master.port
        cluster.master.stop()
        page.get_by_text(re.compile("Connection lost.*Trying again in")).wait_for()
        cluster.restart(port)
        page.get_by_text(re.compile("Connection lost")).wait_for(state="detached")


def test_views_are_shown_while_the_node_is_away(tmp_path: Path, watched: Callable[..., Watched]) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        page = watched(cluster.page, expected=[0]).page
        for loaded in ("views/workers.js", "keyed.js"):
            wait_until(
                page,
                "name => performance.getEntriesByType('resource').some((each) => each.name.endsWith(name))",
                loaded,
            )
        cluster.master.stop()
        page.get_by_text(re.compile("Connection lost")).wait_for()
        page.get_by_role("link", name="Workers").click()
        page.get_by_text("No worker is connected").wait_for()


def test_a_view_that_could_not_be_loaded_is_shown_when_the_connection_is_back(
    tmp_path: Path, watched: Callable[..., Watched]
) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:

        def without_workers(page: Any) -> None:
            page.route("**/views/workers.js", lambda route: route.abort())

        page = watched(cluster.page, expected=[0], prepare=without_workers).page
        page.get_by_role("link", name="Workers").click()
        page.get_by_text("This view cannot be loaded").wait_for()
        page.unroute("**/views/workers.js")
        port = cluster.master.port
        cluster.master.stop()
        page.get_by_text(re.compile("Connection lost")).wait_for()
        cluster.restart(port)
        page.get_by_text("No worker is connected").wait_for()


def test_an_address_that_is_not_well_formed_shows_a_view(
    cluster: WebCluster, watched: Callable[..., Watched]
) -> None:
    page = watched(f"{cluster.page}#workers/%").page
    page.get_by_role("heading", level=1, name="Workers").wait_for()
    page.goto(f"{cluster.page}#%E0%A4%A")
    page.get_by_role("heading", level=1, name="Requests").wait_for()


def test_the_page_works_in_a_browser_that_stores_nothing(
    cluster: WebCluster, watched: Callable[..., Watched]
) -> None:
    getter = '{get() { throw new DOMException("", "SecurityError"); }}'
    script = f'Object.defineProperty(window, "localStorage", {getter})'
    page = watched(cluster.page, script=script).page
    page.get_by_role("link", name="Workers").wait_for()
    page.get_by_role("button", name="Theme: system").click()
    page.get_by_role("button", name="Theme: light").wait_for()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_a_key_that_is_an_operator_s_no_longer_shows_what_it_may_see(
    tmp_path: Path, watched: Callable[..., Watched]
) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        keys = f"{cluster.url}/cluster/keys"
        with httpx.Client(trust_env=False) as http:
            admin = http.post(keys, json={"name": "boss", "role": "admin"}).json()["key"]
            http.headers["authorization"] = f"Bearer {admin}"
            key = http.post(keys, json={"name": "ops", "role": "operator"}).json()["key"]
            page = watched(cluster.page, expected=[0, 403]).page
            page.get_by_label("API key").fill(key)
            page.get_by_label("API key").press("Enter")
            page.get_by_role("link", name="Workers").wait_for()
            http.patch(f"{keys}/ops", json={"role": "inference"}).raise_for_status()
            port = cluster.master.port
            cluster.master.stop()
            cluster.restart(port)
        page.get_by_role("link", name="Workers").wait_for(state="detached")
        page.get_by_role("link", name="Playground").wait_for()
