"""Open WebUI in a browser: its list of models, an answer that is streamed, and its button that stops one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from ecosystem_libraries import ECOSYSTEM_FOLDER, PROGRAMS
from served import Served, until

from trio_cluster import ChatRequest

pytestmark = pytest.mark.processes

HELLO = ["Hello", ", ", "there", "!"]


async def test_a_chat_is_streamed_and_stopped(served: Served, tmp_path: Path) -> None:
    python = Path(os.environ.get(ECOSYSTEM_FOLDER, "/nonexistent"), "open_webui", "bin", "python")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or not list(python.parent.glob("../lib/*/site-packages/playwright")):
        pytest.skip("Open WebUI, or a chromium, is not installed; `nox -s ecosystem` installs the first")
    stopped: list[float] = []

    async def concierge(request: ChatRequest) -> AsyncIterator[str]:
        if not request.stream:
            # It asks for a title, for tags, and for what the user could ask next.
            yield "{}"
        elif "forever" not in request.last_text:
            for piece in HELLO:
                yield piece
                await trio.sleep(0.3)
        else:
            began, number = trio.current_time(), 0
            try:
                while True:
                    number += 1
                    yield f"word{number} "
                    await trio.sleep(0.1)
            finally:
                stopped.append(trio.current_time() - began)

    served.back.register_chat("concierge", concierge)
    await until(lambda: served.front.has_model("concierge"))
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment.pop("PYTHONPATH", None)
    program = [
        str(python),
        str(PROGRAMS / "open_webui_program.py"),
        f"{served.url}/v1",
        browser,
        str(tmp_path),
    ]
    with trio.fail_after(400):
        completed = await trio.run_process(
            program, env=environment, capture_stdout=True, capture_stderr=True, check=False
        )
    assert completed.returncode == 0, completed.stderr.decode()
    seen = json.loads(completed.stdout.splitlines()[-1])
    assert "concierge" in seen["models"]
    assert seen["answer"][-1] == "".join(HELLO)
    # It was shown while it came.
    assert len(seen["answer"]) > 2
    assert len(stopped) == 1
    calls = (await served.in_flight(0))["calls"]
    assert calls["cancelled"] == 1
    assert calls["completed"] == calls["admitted"] - 1
