"""Make the pictures of the web page for the documentation: docs/_static/ui/*.png.

    python scripts/screenshots.py [FOLDER] [--views requests,models] [--width 1280]

It starts a cluster of scripted models in this process: a master with keys and aliases, three workers and a machine that
sleeps. Clients ask it while a browser looks at each view, in both themes. Needs playwright, chromium and Pillow, which
makes the files small.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import trio
from PIL import Image
from playwright.sync_api import sync_playwright

from trio_cluster import (
    ChatRequest,
    ClusterServer,
    ClusterServerOptions,
    EmbeddingRequest,
    ServerOptions,
    TTSRequest,
    serve_in_thread,
)
from trio_cluster.engines import ServedModel, not_loaded, serve_on_demand

FOLDER: Final = Path(__file__).parents[1] / "docs" / "_static" / "ui"
#: The views, and the names of their pictures. A story needs a request, which is found by its id.
VIEWS: Final = {
    "requests": "requests",
    "story": "requests/req_why-so-slow",
    "workers": "workers",
    "models": "models",
    "playground": "playground",
    "keys": "keys",
}
#: Seconds for which the cluster is asked before the pictures are taken, so that there is something to see.
WARM_UP: Final = 30.0
COLOURS: Final = 256
GIB: Final = 1024**3
TEXT: Final = "The quick brown fox jumps over the lazy dog and then sits down to think about queues. " * 40

LIMITS: Final = {"tokens_per_minute": 60_000, "budget": {"tokens": 2_000_000, "per": "month"}}

#: Who asks what, again and again: key, model, words of the answer, seconds of pause, and the time limit.
CLIENTS: Final = (
    ("alice", "assistant", 220, 2.0, ""),
    ("alice", "qwen3-8b", 90, 1.0, ""),
    ("build-server", "qwen3-8b", 150, 0.5, "120"),
    ("build-server", "qwen3-8b", 60, 0.5, "120"),
    ("build-server", "qwen3-8b", 260, 0.5, "120"),
    ("build-server", "qwen3-32b", 320, 0.5, "600"),
    ("chat", "qwen3-8b", 180, 1.0, ""),
    ("chat", "qwen3-32b", 240, 1.5, ""),
    ("chat", "qwen3-8b", 120, 1.0, ""),
    ("research", "coder-30b", 400, 3.0, "900"),
)


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--views", default=",".join(VIEWS))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--raw", action="store_true", help="do not make the files small")
    parsed = parser.parse_args()
    parsed.folder.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with open_cluster() as (url, key), sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        pages = {}
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": parsed.width, "height": 800}, color_scheme=scheme, locale="en-GB"
            )
            pages[scheme] = context.new_page()
            sign_in(pages[scheme], url, key)
        # The charts of the workers begin when the page is opened.
        time.sleep(WARM_UP)
        for name in parsed.views.split(","):
            for scheme, page in pages.items():
                page.evaluate("hash => { location.hash = hash; }", VIEWS[name])
                page.wait_for_timeout(2500)
                write(page.screenshot(), parsed.folder / f"{name}-{scheme}.png", parsed.raw)
        browser.close()


def sign_in(page: Any, url: str, key: str) -> None:
    """Open the page in a page of the browser."""
    page.goto(f"{url}/ui/#workers")
    page.get_by_label("API key").fill(key)
    page.get_by_label("API key").press("Enter")


def write(picture: bytes, path: Path, raw: bool) -> None:
    """Write a picture to a file, with few colours unless ``raw`` is true."""
    if raw:
        path.write_bytes(picture)
        return
    small = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


# The cluster


@contextmanager
def open_cluster() -> Iterator[tuple[str, str]]:
    """Start the cluster and its clients; yield the address of its API, and the key of an admin."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        master = ClusterServer(
            ClusterServerOptions(
                server=ServerOptions(host="127.0.0.1", port=0),
                state_dir=folder,
                on_conflict="replicate",
                aliases={
                    "assistant": ["qwen3-32b", "qwen3-8b"],
                    "gpt-4o": "qwen3-32b",
                    "canary": {"qwen3-8b": 0.95, "coder-30b": 0.05},
                },
                wake={"attic": "02:42:ac:11:00:02"},
            )
        )
        front = serve_in_thread(master, master.run_as_master, 0)
        stack.callback(front.stop)
        assert front.url is not None
        port = master.internal_port
        for name, speed, capacity, chats in (
            ("gpu-1", 30.0, 6, ("qwen3-8b", "qwen3-32b")),
            ("gpu-2", 45.0, 3, ("qwen3-8b",)),
            ("laptop", 12.0, 4, ()),
        ):
            server = ClusterServer(
                ClusterServerOptions(
                    server=ServerOptions(host="127.0.0.1", worker_id=name, max_concurrency=capacity),
                    memory="24GiB",
                )
            )
            for chat in chats:
                add_chat(server, chat, speed)
            if name == "laptop":
                add_others(server)
            run = run_with_coder if name == "gpu-2" else run_as_worker
            stack.callback(serve_in_thread(server, run(server), "127.0.0.1", port).stop)
        add_sleeper(port)
        admin = add_key(front.url, "ops", role="admin")
        keys = {
            key: add_key(front.url, key, admin, **LIMITS) for key in sorted({client[0] for client in CLIENTS})
        }
        over = threading.Event()
        threads = [
            threading.Thread(target=ask_again, args=(front.url, keys[client[0]], over, number, *client[1:]))
            for number, client in enumerate(CLIENTS)
        ]
        threads.append(threading.Thread(target=ask_slowly, args=(front.url, keys["research"], over)))
        for thread in threads:
            thread.start()
        stack.callback(over.set)
        yield front.url, admin


def add_chat(server: ClusterServer, name: str, speed: float) -> None:
    """Register a chat model that says so many words in a second."""

    @server.chat(name, supports_vision=name.endswith("32b"), context_window=32768)
    async def answer(request: ChatRequest) -> AsyncIterator[Any]:
        async for piece in words(request, speed):
            yield piece


async def words(request: ChatRequest, speed: float) -> AsyncIterator[Any]:
    """Yield words, and say how many."""
    length = int(request.raw.get("max_tokens") or 50)
    said = TEXT.split()
    await trio.sleep(0.3)
    for index in range(length):
        yield f"{said[index % len(said)]} "
        await trio.sleep(1 / speed)
    usage = {"prompt_tokens": 900, "completion_tokens": length, "total_tokens": 900 + length}
    yield {"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 640}}}


def add_others(server: ClusterServer) -> None:
    """Register models of other kinds."""

    @server.embedding("embedder")
    async def embed(request: EmbeddingRequest) -> list[list[float]]:
        return [[float(len(text)), 1.0] for text in request.inputs]

    @server.tts("kokoro")
    async def speak(request: TTSRequest) -> bytes:
        return b""

    @server.rerank("ranker")
    async def rank(request: Any) -> list[float]:
        return [1.0 / (1 + index) for index in range(len(request.documents))]


def run_as_worker(server: ClusterServer) -> Any:
    """Return what runs a worker."""
    return server.run_as_worker


def run_with_coder(server: ClusterServer) -> Any:
    """Return what runs a worker that has two models on demand, too."""

    @asynccontextmanager
    async def open_model(name: str) -> AsyncIterator[ServedModel]:
        await trio.sleep(8)

        async def answer(request: ChatRequest) -> AsyncIterator[Any]:
            async for piece in words(request, 22.0):
                yield piece

        yield ServedModel(name, "chat", answer)

    async def run(*args: Any, task_status: trio.TaskStatus[Any]) -> Any:
        async with trio.open_nursery() as nursery:
            for name in ("coder-30b", "vision-12b"):
                described = ServedModel(name, "chat", not_loaded)
                await nursery.start(
                    lambda task_status, name=name, described=described: serve_on_demand(
                        server,
                        described,
                        lambda run: open_model(name),
                        memory=14 * GIB,
                        task_status=task_status,
                    )
                )
            mode = await server.run_as_worker(*args, task_status=task_status)
            nursery.cancel_scope.cancel()
        return mode

    return run


def add_sleeper(port: int) -> None:
    """Have a worker join and leave, whose machine can be woken."""
    server = ClusterServer(ClusterServerOptions(server=ServerOptions(host="127.0.0.1", worker_id="attic")))
    add_chat(server, "llama-70b", 10.0)
    serve_in_thread(server, server.run_as_worker, "127.0.0.1", port).stop()


# The clients


def add_key(url: str, name: str, admin: str = "", **fields: Any) -> str:
    """Return a new key, made by an admin."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {admin}"} if admin else {})
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/cluster/keys", json.dumps({"name": name} | fields), headers)
    content = json.loads(connection.getresponse().read())
    connection.close()
    return str(content["key"])


def ask_again(
    url: str, key: str, over: threading.Event, number: int, model: str, length: int, pause: float, limit: str
) -> None:
    """Ask again and again, until it is over."""
    turn = 0
    while not over.is_set():
        turn += 1
        ask(url, key, over, model, length, f"req_{number * 7919 + turn * 104729:08x}{turn:04x}", limit)
        over.wait(pause)


def ask_slowly(url: str, key: str, over: threading.Event) -> None:
    """Make the request whose story is shown."""
    over.wait(12.0)
    ask(url, key, over, "vision-12b", 700, "req_why-so-slow", "900")


def ask(
    url: str, key: str, over: threading.Event, model: str, length: int, request_id: str, limit: str
) -> None:
    """Ask once, and read the answer to its end."""
    headers = {
        "content-type": "application/json",
        "authorization": f"Bearer {key}",
        "x-request-id": request_id,
    }
    if limit:
        headers["x-request-timeout"] = limit
    body = {"model": model, "stream": True, "max_tokens": length}
    body["messages"] = [{"role": "user", "content": "Tell me about queues. " * 20}]
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=90)
    with suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        while not over.is_set() and response.read1(65536):
            pass
    connection.close()


if __name__ == "__main__":
    main()
