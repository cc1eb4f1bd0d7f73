"""Run Open WebUI in front of a server, use it in a browser, and print what was seen: ``URL BROWSER FOLDER``."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, TimeoutError, sync_playwright

#: What a user has to set, and what keeps this one off other machines.
SETTINGS = {
    "ENABLE_OLLAMA_API": "False",
    "OPENAI_API_KEY": "a-key",
    "WEBUI_AUTH": "False",
    "WEBUI_SECRET_KEY": "secret",
    "RAG_EMBEDDING_ENGINE": "openai",
    "OFFLINE_MODE": "True",
    "HF_HUB_OFFLINE": "1",
    "ENABLE_VERSION_UPDATE_CHECK": "False",
    "ANONYMIZED_TELEMETRY": "False",
    "SCARF_NO_ANALYTICS": "True",
    "DO_NOT_TRACK": "True",
}

STOP = "button[aria-label=Stop]"


@contextlib.contextmanager
def open_webui(api: str, folder: Path) -> Iterator[str]:
    """Run it, and give its URL when it answers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = os.environ | SETTINGS | {"OPENAI_API_BASE_URL": api, "DATA_DIR": str(folder)}
    command = [str(Path(sys.executable).parent / "open-webui"), "serve", "--host", "127.0.0.1"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=settings)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 200
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    sys.exit((folder / "log.txt").read_text(errors="replace")[-4000:])
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def say(page: Page, text: str) -> None:
    """Write to the model."""
    page.click("#chat-input")
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def texts_until(page: Page, end: str) -> list[str]:
    """Return the different states of the last answer, until it has ``end`` in it."""
    seen: list[str] = []
    until = time.monotonic() + 60
    while time.monotonic() < until and not (seen and end in seen[-1]):
        answers = page.query_selector_all("#response-content-container")
        text = answers[-1].inner_text().strip() if answers else ""
        if text and text not in seen[-1:]:
            seen.append(text)
        page.wait_for_timeout(20)
    return seen


def main() -> None:
    api, browser_path, folder = sys.argv[1:]
    with open_webui(api, Path(folder)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{url}/?models=concierge")
        page.wait_for_selector("#chat-input", timeout=60_000)
        with contextlib.suppress(TimeoutError):
            # The news of its version.
            page.get_by_role("button", name="Okay").click(timeout=5000)
        models = page.evaluate(
            "fetch('/api/models', {headers: {authorization: `Bearer ${localStorage.token}`}}).then(r => r.json())"
        )
        say(page, "hello")
        answer = texts_until(page, "there!")
        # Meanwhile it asks for a title, and for what could be asked next.
        page.wait_for_selector(STOP, state="detached", timeout=60_000)
        page.wait_for_timeout(3000)
        say(page, "go on forever")
        texts_until(page, "word3")
        page.click(STOP)
        page.wait_for_selector(STOP, state="detached", timeout=60_000)
        browser.close()
    print(json.dumps({"models": [each["id"] for each in models["data"]], "answer": answer}))


main()
