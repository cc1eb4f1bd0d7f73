"""A page of the browser, and what goes wrong in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import attrs

__all__ = ["Watched", "close_pages", "open_page", "wait_until"]

_open: list[Watched] = []


@attrs.define
class Watched:
    """One page of the browser.

    Attributes:
        page: of Playwright.
        context: its browser context, which has nothing in common with others.
        problems: errors and warnings of the console, exceptions, and requests to elsewhere.
        expected: the statuses of failed requests that the test causes; Chromium logs each as an error.
    """

    page: Any
    context: Any
    problems: list[str] = attrs.field(factory=list)
    expected: Collection[int] = ()


def close_pages() -> None:
    """Close all pages that are open. To be called before their node is stopped: what they ask then is an error."""
    while _open:
        _open.pop().context.close()


def open_page(
    browser: Any,
    url: str,
    *,
    width: int = 1280,
    height: int = 800,
    scheme: str = "light",
    expected: Collection[int] = (),
    script: str = "",
    prepare: Callable[[Any], None] = lambda page: None,
    **context: Any,
) -> Watched:
    """Open a page, and watch it from the start.

    Args:
        browser: of Playwright.
        url: its address.
        width, height: of its window.
        scheme: ``light`` or ``dark``.
        expected: see :class:`Watched`.
        script: runs in it before its own scripts.
        prepare: gets the page before it goes to its address.
        context: further options of its browser context.
    """
    opened = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **context)
    opened.set_default_timeout(15_000)
    page = opened.new_page()
    if script:
        page.add_init_script(script)
    watched = Watched(page, opened, expected=expected)
    _open.append(watched)

    def on_console(message: Any) -> None:
        if message.type not in ("error", "warning"):
            return
        if any(f"status of {status}" in message.text for status in watched.expected):
            return
        if 0 in watched.expected and "net::ERR_" in message.text:
            return
        watched.problems.append(f"{message.type}: {message.text}")

    def on_request(request: Any) -> None:
        if not request.url.startswith((url.split("/ui")[0], "data:", "blob:")):
            watched.problems.append(f"a request to elsewhere: {request.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: watched.problems.append(f"exception: {error}"))
    page.on("request", on_request)
    prepare(page)
    page.goto(url)
    return watched


def wait_until(page: Any, expression: str, arg: Any = None) -> None:
    """Wait until a JavaScript expression, or a function of ``arg``, is true in a page.

    ``page.wait_for_function`` evaluates text in the page when it looks again, which the page's policy forbids.
    """
    deadline = time.monotonic() + 15
    while not page.evaluate(expression, arg):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)
