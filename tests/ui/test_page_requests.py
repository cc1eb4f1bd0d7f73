"""The view of the requests: the tree, cancelling, the story of one, and ten thousand of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from clients import streaming
from feed import SCRIPT, Feed, live_request
from watched import Watched, wait_until
from web_cluster import WebCluster, open_web_cluster

MANY = 10_000


def row_of(page: Any, request_id: str) -> Any:
    return page.get_by_role("row").filter(has_text=request_id)


def focused(page: Any) -> str:
    """Return the text of the element with the focus; empty: there is none."""
    return str(
        page.evaluate("document.activeElement === document.body ? '' : document.activeElement.textContent")
    )


def test_cancel_ends_the_handler_at_once(cluster: WebCluster, watched: Callable[..., Watched]) -> None:
    page = watched(cluster.page).page
    with streaming(cluster.url, "req_one", "req_two") as (one, two):
        row = row_of(page, "req_one")
        row.get_by_text("streaming").wait_for()
        row.get_by_role("button", name="Cancel", exact=True).click()
        assert cluster.cancelled.wait(20)
        assert one.over.wait(20)
        assert "cancelled" in one.received
        row.wait_for(state="detached")
        assert cluster.stopped == ["req_one says something"]
        row_of(page, "req_two").get_by_text("streaming").wait_for()
        assert not two.over.is_set()


def test_output_is_in_tokens_where_their_size_is_known(
    cluster: WebCluster, watched: Callable[..., Watched]
) -> None:
    page = watched(cluster.page).page
    with streaming(cluster.url, "req_bytes"):
        row_of(page, "req_bytes").get_by_text(re.compile(r"^[\d.]+ k?B$")).first.wait_for()
        page.get_by_text("≈").wait_for(state="detached")
    body = {"model": "slow", "stream": True, "messages": [{"role": "user", "content": "three times"}]}
    httpx.post(f"{cluster.url}/v1/chat/completions", json=body, trust_env=False).raise_for_status()
    with streaming(cluster.url, "req_tokens"):
        row_of(page, "req_tokens").get_by_text(re.compile(r"^≈ [\d.]+ tok$")).first.wait_for()


def test_the_story_grows_until_the_request_is_over(
    cluster: WebCluster, watched: Callable[..., Watched]
) -> None:
    page = watched(cluster.page).page
    with streaming(cluster.url, "req_told") as (client,):
        row_of(page, "req_told").click()
        page.get_by_text(re.compile("^Sent to worker")).wait_for()
        page.get_by_role("cell", name="yes").wait_for()
        first = page.get_by_text(re.compile("^Now: answering")).first
        before = first.text_content()
        wait_until(page, "text => document.querySelector('.story-why').textContent !== text", before)
        page.get_by_role("button", name="Cancel", exact=True).click()
        page.get_by_text(re.compile("^Over: cancelled by an operator")).wait_for()
        page.get_by_role("status").get_by_text("cancelled", exact=True).wait_for()
        assert page.get_by_role("button", name="Cancel", exact=True).count() == 0
        assert client.over.wait(20)


def test_a_request_that_is_over_is_found_by_its_id(
    cluster: WebCluster, watched: Callable[..., Watched]
) -> None:
    page = watched(cluster.page, expected=[404]).page
    with streaming(cluster.url, "req_over", model="echo") as (client,):
        assert client.over.wait(20)
    field = page.get_by_label("Find a request by its id")
    field.fill("req_over")
    field.press("Enter")
    page.get_by_text(re.compile("^Over: the answer was complete")).wait_for()
    page.keyboard.press("Escape")
    field.fill("req_never")
    field.press("Enter")
    page.get_by_text("No request of this id is known").wait_for()


def test_requests_are_filtered_and_grouped(cluster: WebCluster, watched: Callable[..., Watched]) -> None:
    page = watched(cluster.page).page
    with streaming(cluster.url, "req_a", "req_b"):
        row_of(page, "req_a").wait_for()
        row_of(page, "req_b").wait_for()
        page.get_by_label("Filter the requests").fill("REQ_B")
        row_of(page, "req_a").wait_for(state="detached")
        page.get_by_text("1 of 2 match").wait_for()
        page.get_by_label("Filter the requests").fill("")
        page.get_by_label("Group by").select_option("Worker")
        page.locator(".line.group").filter(has_text="w1").wait_for()
        page.locator(".line.group").filter(has_text="w2").wait_for()
        page.get_by_label("Group by").select_option("Nothing")
        page.locator(".line.group").first.wait_for(state="detached")
        assert row_of(page, "req_a").get_attribute("aria-level") == "1"


def test_the_keyboard_does_all_and_keeps_its_place(
    cluster: WebCluster, watched: Callable[..., Watched]
) -> None:
    page = watched(cluster.page).page
    with streaming(cluster.url, "req_a") as _, streaming(cluster.url, "req_b") as _:
        row_of(page, "req_b").wait_for()
        page.get_by_role("button", name="Find").focus()
        page.keyboard.press("Tab")
        assert "127.0.0.1" in focused(page)
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        active = focused(page)
        assert "req_b" in active or "req_a" in active
        request_id = "req_b" if "req_b" in active else "req_a"
        # What is below it is shown and hidden; the focus stays while everything is updated.
        page.keyboard.press("ArrowRight")
        page.get_by_text("1. first attempt").wait_for()
        page.keyboard.press("ArrowLeft")
        page.get_by_text("1. first attempt").wait_for(state="detached")
        output = row_of(page, request_id).locator(".c-output")
        before = output.text_content()
        wait_until(page, "([cell, text]) => cell.textContent !== text", [output.element_handle(), before])
        assert request_id in focused(page)
        page.keyboard.press("Enter")
        page.get_by_text(re.compile("^Sent to worker")).wait_for()
        page.keyboard.press("Escape")
        row_of(page, request_id).wait_for()
        assert request_id in focused(page)
        # Left goes to the group; Tab goes from a row to its button.
        page.keyboard.press("Tab")
        assert focused(page) == "Cancel"
        page.keyboard.press("ArrowLeft")
        assert "127.0.0.1" in focused(page)


def test_the_focus_goes_on_when_its_request_ends(
    cluster: WebCluster, watched: Callable[..., Watched]
) -> None:
    page = watched(cluster.page).page
    with streaming(cluster.url, "req_a", "req_b"):
        row_of(page, "req_a").wait_for()
        row_of(page, "req_b").wait_for()
        page.get_by_role("button", name="Find").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")
        gone = "req_a" if "req_a" in focused(page) else "req_b"
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        row_of(page, gone).wait_for(state="detached")
        assert ("req_b" if gone == "req_a" else "req_a") in focused(page)


def test_without_requests_the_page_says_how_to_send_one(
    cluster: WebCluster, watched: Callable[..., Watched]
) -> None:
    page = watched(cluster.page).page
    page.get_by_role("heading", name="No request runs").wait_for()
    command = page.get_by_text(f"curl -N {cluster.url}/v1/chat/completions").inner_text()
    if shutil.which("curl") is not None:
        # The first model fails in its middle; the command is answered by any other one as it is.
        command = command.replace('"broken"', '"echo"')
        done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False)
        assert done.stdout.rstrip().endswith(b"data: [DONE]"), done


def test_what_a_request_waits_for_and_its_attempts(tmp_path: Path, watched: Callable[..., Watched]) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        page = watched(cluster.page, script=SCRIPT).page
        feed = Feed(page)
        queued = live_request(1, phase="queued", waits_for="a slot of gpu-1")
        failed = live_request(2)["calls"][0] | {"phase": "over", "error": "worker_lost"}
        retried = live_request(2, 300) | {"attempts": 2}
        retried["calls"] = [failed, retried["calls"][0] | {"attempt": 2, "kind": "retry", "node": "gpu-7"}]
        now = page.evaluate("Date.now() / 1000")
        starting = live_request(
            3, phase="waiting", waits_for="starting qwen3-32b", ready_at=now + 45, deadline=now + 90
        )
        feed.send("snapshot", requests=[queued, retried, starting], workers=[], models=[])
        row_of(page, "req_00001").get_by_text("waits for a slot of gpu-1").wait_for()
        row_of(page, "2. retry").get_by_text("gpu-7").wait_for()
        row_of(page, "1. first attempt").get_by_text("failed: worker_lost").wait_for()
        row_of(page, "req_00003").get_by_text(re.compile("starting qwen3-32b, about 4[345] s")).wait_for()
        row_of(page, "req_00003").get_by_text(re.compile("^1:2[789]$")).wait_for()
        row_of(page, "req_00003").get_by_text(re.compile("^1:2[56]$")).wait_for()
        tiles = page.locator(".tile").all_text_contents()
        assert tiles[0] == "1Running"
        assert tiles[1] == "2Waiting"


def test_ten_thousand_requests(tmp_path: Path, watched: Callable[..., Watched]) -> None:
    """Only the rows that can be seen are in the document; updates and scrolling cost a small part of the time."""
    with open_web_cluster(tmp_path, serve=False) as cluster:
        page = watched(cluster.page, script=SCRIPT).page
        feed = Feed(page)
        feed.send_many("snapshot", MANY, 0)
        grid = page.get_by_role("treegrid")
        assert grid.get_attribute("aria-rowcount") == str(MANY + 20 + 1)
        assert page.get_by_role("row").count() < 60

        costs = [feed.send_many("upsert", MANY, update * 1000) for update in range(1, 6)]
        per_update = sum(costs) / len(costs)
        print(f"an update of {MANY} requests: {per_update * 1000:.0f} ms of the main thread")
        page.get_by_text("5.00 kB").first.wait_for()

        began = feed.spent()
        steps = page.evaluate(
            """async () => {
              const list = document.querySelector(".list");
              let steps = 0;
              let most = 0;
              for (; steps < 60; steps++) {
                list.scrollTop += 1500;
                await new Promise((done) => requestAnimationFrame(done));
                most = Math.max(most, list.querySelectorAll(".rows > *").length);
              }
              return [steps, most];
            }"""
        )
        per_step = (feed.spent() - began) / steps[0]
        print(f"a step of scrolling: {per_step * 1000:.1f} ms of the main thread")
        assert steps[1] < 60

        grid.get_by_role("row").last.focus()
        page.keyboard.press("End")
        assert "req_09999" in focused(page)
        # The row with the focus stays in the document when the list is scrolled away from it, and is updated.
        page.evaluate("document.querySelector('.list').scrollTop = 0")
        feed.send("upsert", requests=[live_request(9999, 7_000_000)])
        assert "7.00 MB" in focused(page)
        feed.send("remove", requests=[str(number) for number in range(10, MANY)])
        assert grid.get_attribute("aria-rowcount") == str(10 + 10 + 1)
        assert per_update < 0.25
        assert per_step < 0.05
