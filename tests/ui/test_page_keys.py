"""Keys and usage: what the page makes, changes and takes away is so for the API, and what it shows is what was used."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from watched import Watched, wait_until
from web_cluster import WebCluster, open_web_cluster

from trio_cluster.accounts.store import Store

Open = Callable[..., Watched]
ADMIN = "secret-key"
DAY = 86_400.0


@pytest.fixture
def with_key(tmp_path: Path) -> Iterator[WebCluster]:
    """A cluster that needs a key."""
    with open_web_cluster(tmp_path, api_key=ADMIN) as opened:
        yield opened


def _ask(cluster: WebCluster, key: str, path: str, body: object = None) -> tuple[int, Any]:
    """Send a request as any other client would, and return its status and its JSON."""
    request = urllib.request.Request(
        f"{cluster.url}/{path}",
        None if body is None else json.dumps(body).encode(),
        {"authorization": f"Bearer {key}", "content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def _chat(cluster: WebCluster, key: str, model: str = "tools") -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    return _ask(cluster, key, "v1/chat/completions", body)[0]


def _make(cluster: WebCluster, **fields: object) -> str:
    status, made = _ask(cluster, ADMIN, "cluster/keys", fields)
    assert status == 201
    return str(made["key"])


def _sign_in(page: Any, key: str) -> Any:
    page.get_by_label("API key").fill(key)
    page.get_by_label("API key").press("Enter")
    page.get_by_role("heading", level=2, name="Usage").wait_for()
    return page


def _open(cluster: WebCluster, watched: Open, key: str = ADMIN, **options: Any) -> Any:
    return _sign_in(watched(f"{cluster.page}#keys", **options).page, key)


def _row(page: Any, name: str) -> Any:
    return page.get_by_role("row", name=re.compile(rf"^{name}\b"))


def _shown_key(page: Any) -> str:
    text = page.get_by_role("dialog").locator("pre").inner_text()
    assert text.startswith("tc-")
    return str(text)


def test_a_key_that_is_made_works_and_is_shown_once(with_key: WebCluster, watched: Open) -> None:
    page = _open(with_key, watched)
    page.get_by_role("heading", name="No keys").wait_for()
    page.get_by_role("button", name="New key").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("app")
    dialog.get_by_label("Models").fill("tools, ech*")
    dialog.get_by_label("Requests per minute").fill("600")
    dialog.get_by_label("Tokens per minute").fill("90000")
    dialog.get_by_label("Requests at the same time").fill("4")
    dialog.get_by_label("Budget, in tokens").fill("5000000")
    dialog.get_by_label("Period of the budget").select_option("week")
    dialog.get_by_label("Priority").select_option("low")
    dialog.get_by_label("Weight").fill("2.5")
    dialog.get_by_label("Expires").fill("2199-12-31T12:00")
    dialog.get_by_role("button", name="Create the key").click()
    page.get_by_text("Copy it now: it is shown this once.").wait_for()
    key = _shown_key(page)
    # It is not lost by a click beside it.
    page.keyboard.press("Escape")
    page.mouse.click(5, 5)
    assert _shown_key(page) == key
    assert _chat(with_key, key) == 200
    assert _chat(with_key, key, "slow") == 403
    _, entry = _ask(with_key, ADMIN, "cluster/keys/app")
    assert entry["models"] == ["tools", "ech*"]
    assert (entry["requests_per_minute"], entry["tokens_per_minute"], entry["max_concurrency"]) == (
        600,
        90000,
        4,
    )
    assert entry["budget"] == {"tokens": 5_000_000, "per": "week"}
    assert (entry["priority"], entry["weight"], entry["role"]) == ("low", 2.5, "inference")
    assert entry["expires_at"].startswith("2199-12-31")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("dialog").wait_for(state="detached")
    _row(page, "app").get_by_text("600 requests/min").wait_for()
    assert key not in page.content()


def test_limits_are_changed_and_taken_away(with_key: WebCluster, watched: Open) -> None:
    _make(with_key, name="app", requests_per_minute=5, expires_at="2199-12-31T12:34:56Z", models=["a*"])
    page = _open(with_key, watched)
    page.get_by_role("button", name="Change app").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Requests per minute").fill("")
    dialog.get_by_label("Role").select_option("operator")
    dialog.get_by_label("Models").fill("")
    dialog.get_by_role("button", name="Save").click()
    _row(page, "app").get_by_text("operator").wait_for()
    _, entry = _ask(with_key, ADMIN, "cluster/keys/app")
    assert (entry["requests_per_minute"], entry["role"], entry["models"]) == (None, "operator", [])
    # What was not touched is not sent: the field for the end has no seconds.
    assert entry["expires_at"] == "2199-12-31T12:34:56Z"


def test_a_key_is_disabled_replaced_and_revoked(with_key: WebCluster, watched: Open) -> None:
    key = _make(with_key, name="app")
    page = _open(with_key, watched)
    page.get_by_role("button", name="Disable app").click()
    page.get_by_role("dialog").get_by_role("button", name="Disable").click()
    page.get_by_text("app is refused from now on").wait_for()
    assert _chat(with_key, key) == 401
    page.get_by_role("button", name="Enable app").click()
    page.get_by_text("app works again").wait_for()
    assert _chat(with_key, key) == 200

    page.get_by_role("button", name="Rotate app").click()
    page.get_by_label("How long does the old key go on to work?").select_option("3600")
    page.get_by_role("button", name="Replace the key").click()
    page.get_by_text("The old key works for an hour beside it.").wait_for()
    new = _shown_key(page)
    assert new != key
    assert (_chat(with_key, key), _chat(with_key, new)) == (200, 200)
    page.get_by_role("button", name="Done").click()

    page.get_by_role("button", name="Revoke app").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep").click()
    assert _chat(with_key, new) == 200
    page.get_by_role("button", name="Revoke app").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    page.get_by_role("heading", name="No keys").wait_for()
    assert (_chat(with_key, key), _chat(with_key, new)) == (401, 401)


def test_a_key_is_replaced_once_however_often_the_button_is_pressed(
    with_key: WebCluster, watched: Open
) -> None:
    _make(with_key, name="app")
    page = _open(with_key, watched)
    replaced: list[str] = []
    page.on("request", lambda request: request.url.endswith("/rotate") and replaced.append(request.url))
    page.get_by_role("button", name="Rotate app").click()
    page.get_by_role("button", name="Replace the key").evaluate(
        "button => { button.click(); button.click(); }"
    )
    page.get_by_text("The old key is refused from now on.").wait_for()
    assert len(replaced) == 1


def test_an_older_list_of_keys_does_not_take_the_place_of_a_newer_one(
    with_key: WebCluster, watched: Open
) -> None:
    _make(with_key, name="app")
    page = _open(with_key, watched)
    late: list[Any] = []

    def hold(route: Any) -> None:
        late.append((route, route.fetch()))

    def disable() -> None:
        page.get_by_role("button", name="Disable app").click()
        page.get_by_role("dialog").get_by_role("button", name="Disable").click()

    page.route("**/cluster/keys", hold, times=1)
    with page.expect_request("**/cluster/keys"):
        disable()
    wait_until(page, "document.querySelector('dialog') === null")
    _make(with_key, name="newer")
    disable()
    _row(page, "newer").wait_for()
    [(route, response)] = late
    with page.expect_response("**/cluster/usage?group_by=key&since=*") as caught:
        route.fulfill(response=response)
    caught.value.finished()
    assert _row(page, "newer").count() == 1


def test_a_mistake_is_told_in_the_form(with_key: WebCluster, watched: Open) -> None:
    _make(with_key, name="app")
    page = _open(with_key, watched, expected=[409])
    page.get_by_role("button", name="New key").click()
    page.get_by_role("dialog").get_by_label("Name").fill("app")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").get_by_text("name_taken").wait_for()
    assert page.get_by_role("dialog").get_by_label("Name").input_value() == "app"


def test_the_first_key_ends_the_time_without(cluster: WebCluster, watched: Open) -> None:
    page = watched(f"{cluster.page}#keys").page
    page.get_by_text("Requests need no key: all who reach this node may use it.").wait_for()
    page.get_by_role("button", name="New key").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("This node needs no key yet.").wait_for()
    assert dialog.get_by_label("Role").input_value() == "admin"
    dialog.get_by_label("Name").fill("me")
    dialog.get_by_role("button", name="Create the key").click()
    key = _shown_key(page)
    page.get_by_role("button", name="Sign in with this key").click()
    page.get_by_text("me · admin").wait_for()
    assert _chat(cluster, "wrong") == 401
    assert _chat(cluster, key) == 200


def test_usage_is_counted_by_day_model_and_key(with_key: WebCluster, watched: Open, tmp_path: Path) -> None:
    key = _make(with_key, name="app", budget={"tokens": 100, "per": "month"})
    for _ in range(4):
        assert _chat(with_key, key) == 200
    (database,) = tmp_path.rglob("accounts.db")
    store = Store(database)
    before = time.time() - 3 * DAY
    old = (
        before,
        "old-app",
        "llama",
        "",
        "w1",
        "chat.completions",
        7000,
        500,
        0,
        "completed",
        0.1,
        1.0,
        "req_1",
    )
    store.add_usage("test", 1, [old])
    store.close()
    page = _open(with_key, watched)
    sums = page.get_by_role("region", name="Sums")
    sums.get_by_role("row", name="tools 4 0 0 80 0 20").wait_for()
    sums.get_by_role("row", name="llama 1 0 0 7,000 0 500").wait_for()
    # What the budget has left is seen beside the limits.
    meter = page.get_by_role("meter", name="Budget of app")
    assert meter.get_attribute("aria-valuetext") == "100 of 100 tokens this month"
    chart = page.get_by_role(
        "img", name=re.compile("Tokens by day for 30 days: 7.60 k in all, most on .* with 7.50 k")
    )
    chart.wait_for()
    assert chart.locator("rect[class^=series-]").count() == 2
    page.get_by_text("As a table").click()
    day = time.strftime("%Y-%m-%d", time.gmtime(before))
    page.get_by_role("region", name="Tokens by day").get_by_role("row", name=f"{day} 7,500 0").wait_for()
    page.get_by_label("Grouped").select_option("key")
    sums.get_by_role("row", name="app 4 0 0 80 0 20").wait_for()
    page.get_by_label("For how long").select_option("7")
    page.get_by_label("What is counted").select_option("requests")
    page.get_by_role("img", name=re.compile("Requests by day for 7 days: 5 in all")).wait_for()


def test_a_key_without_a_role_sees_its_own_usage_only(with_key: WebCluster, watched: Open) -> None:
    key, other = _make(with_key, name="app"), _make(with_key, name="other")
    assert (_chat(with_key, key), _chat(with_key, other), _chat(with_key, other)) == (200, 200, 200)
    page = _open(with_key, watched, key)
    page.get_by_role("row", name="tools 1 0 0 20 0 5").wait_for()
    assert page.get_by_role("heading", level=2, name="Keys").count() == 0
    assert page.get_by_label("Whose usage").count() == 0


def test_an_operator_sees_the_usage_of_all_and_no_keys(with_key: WebCluster, watched: Open) -> None:
    operator, other = _make(with_key, name="ops", role="operator"), _make(with_key, name="other")
    assert _chat(with_key, other) == 200
    page = _open(with_key, watched, operator)
    page.get_by_role("row", name="tools 1 0 0 20 0 5").wait_for()
    assert page.get_by_role("heading", level=2, name="Keys").count() == 0
    page.get_by_label("Whose usage").select_option("own")
    page.get_by_text("No requests in 30 days.").wait_for()


def test_a_key_that_is_revoked_leads_to_signing_in(with_key: WebCluster, watched: Open) -> None:
    page = _open(with_key, watched, _make(with_key, name="ann"), expected=[401])
    page.get_by_role("link", name="Playground").click()
    page.get_by_label("Model").wait_for()
    request = urllib.request.Request(
        f"{with_key.url}/cluster/keys/ann", method="DELETE", headers={"authorization": f"Bearer {ADMIN}"}
    )
    with urllib.request.urlopen(request):
        pass
    # A conversation stays where it is; the next look at something else asks for a key.
    page.get_by_role("textbox", name="Message").fill("hello")
    page.get_by_role("textbox", name="Message").press("Enter")
    page.get_by_text("The API key is not valid").wait_for()
    page.get_by_role("link", name="Models").click()
    page.get_by_text("The key is no longer valid.").wait_for()
    page.get_by_label("API key").wait_for()


def test_without_the_node_the_models_say_once_that_they_are_old(with_key: WebCluster, watched: Open) -> None:
    page = _open(with_key, watched, _make(with_key, name="ann"), expected=[0])
    for loaded in ("views/models.js", "keyed.js"):
        wait_until(
            page,
            "name => performance.getEntriesByType('resource').some((each) => each.name.endsWith(name))",
            loaded,
        )
    with_key.master.stop()
    page.get_by_role("link", name="Models").click()
    page.get_by_text("The node cannot be reached: what is shown may be old.").wait_for()
    assert page.locator(".toast").count() == 0


def test_a_wrong_clock_of_the_browser_changes_nothing(with_key: WebCluster, watched: Open) -> None:
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 5 * DAY))
    key = _make(with_key, name="ann", expires_at=expires, budget={"tokens": 1000, "per": "month"})
    assert _chat(with_key, key) == 200
    seen = watched(
        with_key.page + "#keys", prepare=lambda page: page.clock.set_system_time(time.time() + 40 * DAY)
    )
    page = _sign_in(seen.page, ADMIN)
    row = page.get_by_role("row", name="ann")
    row.get_by_text("25 of 1.00 k tokens this month").wait_for()
    assert row.get_by_text("expired").count() == 0
    assert row.get_by_text("1 request", exact=True).count() == 1


def test_without_a_database_it_says_what_to_set(cluster: WebCluster, watched: Open) -> None:
    seen = watched(cluster.page, expected=[409])
    answer = {"error": {"message": "no database", "type": "invalid_request_error", "code": "no_database"}}
    seen.page.route("**/cluster/usage*", lambda route: route.fulfill(status=409, json=answer))
    seen.page.route("**/cluster/keys", lambda route: route.fulfill(status=409, json=answer))
    seen.page.get_by_role("link", name="Keys and usage").click()
    seen.page.get_by_role("heading", name="This node keeps no keys and no usage").wait_for()
    seen.page.get_by_text("--state-dir").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_screens(with_key: WebCluster, watched: Open, scheme: str) -> None:
    _make(
        with_key,
        name="x" * 64,
        models=["y" * 40],
        budget={"tokens": 10**9, "per": "month"},
        requests_per_minute=5,
    )
    page = _open(with_key, watched, width=400, scheme=scheme)
    page.get_by_role("button", name="Change xxx").wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") == 400
