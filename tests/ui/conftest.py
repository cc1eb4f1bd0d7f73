"""The page in a real browser, before a real cluster: a master, two workers and scripted models, each on its own thread.

Chromium is Debian's, steered by Playwright. Without either, these tests are skipped. They are plain functions, since
Playwright's blocking interface cannot be used in a trio run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from watched import Watched, close_pages, open_page
from web_cluster import WebCluster, open_web_cluster

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[WebCluster]:
    """A cluster that needs no key."""
    with open_web_cluster(tmp_path) as opened:
        yield opened


@pytest.fixture
def watched(browser: object) -> Iterator[Callable[..., Watched]]:
    """Opens pages. At the end, none of them may have logged an error, or asked for anything from elsewhere."""
    opened: list[Watched] = []

    def open_one(url: str, **options: object) -> Watched:
        opened.append(open_page(browser, url, **options))
        return opened[-1]

    yield open_one
    close_pages()
    for each in opened:
        assert each.problems == []
