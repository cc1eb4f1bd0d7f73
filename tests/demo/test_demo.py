"""The demo, with one small model of this package in place of its five, so that it can run anywhere."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

pytest.importorskip("numpy")

from trio_cluster import ClusterServer, OutputChunk
from trio_cluster.demo import cluster, questions as asked, run_demo
from trio_cluster.demo.snippets import how_to_try
from trio_cluster.errors import ClusterError, ClusterPortError

FAR = 60.0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the demo to the model ``digits``."""
    questions = tuple(each for each in asked.QUESTIONS if each.model == "digits")
    monkeypatch.setattr(cluster, "QUESTIONS", questions)
    monkeypatch.setattr(cluster, "WEIGHTS", {})
    monkeypatch.setattr(cluster, "_WORKERS", {"worker-1": ("digits",)})


def nodes() -> set[int]:
    """Return the process ids of the demo nodes that this process has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_node = b"trio_cluster.demo.node" in (path / "cmdline").read_bytes()
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if is_node and parent == os.getpid():
            found.add(int(path.name))
    return found


class WatchedOutput(io.StringIO):
    """Sets an event when a text has been written."""

    def __init__(self, awaited: str) -> None:
        super().__init__()
        self.awaited, self.written = awaited, trio.Event()

    def write(self, text: str) -> int:
        if self.awaited in text:
            self.written.set()
        return super().write(text)


@pytest.mark.processes
async def test_check_shows_questions_and_answers_and_stops_everything(small: None) -> None:
    out = io.StringIO()
    with trio.fail_after(FAR):
        assert await run_demo(0, check=True, out=out) == 0
    text = out.getvalue()
    assert "ready after" in text
    assert "asked:    draw: a handwritten seven" in text
    assert "bytes of PNG, 64 by 64" in text
    assert text.endswith("all models answered\n")
    assert nodes() == set()


@pytest.mark.processes
async def test_a_wrong_answer_is_shown_and_is_a_failure(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = asked.Question(
        "image_generation", "digits", "draw a cat", lambda api, shared: _ask_for_a_cat(api)
    )
    monkeypatch.setattr(cluster, "QUESTIONS", (wrong,))
    out = io.StringIO()
    with trio.fail_after(FAR):
        assert await run_demo(0, check=True, out=out) == 1
    assert "answered: FAILED: 400 " in out.getvalue()
    assert "This model draws single digits" in out.getvalue()


def _ask_for_a_cat(api: asked.Api) -> str:
    return api.post("/images/generations", {"model": "digits", "prompt": "a cat"}).decode()


@pytest.mark.processes
async def test_without_check_the_demo_shows_snippets_and_runs_until_cancelled(small: None) -> None:
    out = WatchedOutput("Ctrl-C ends the demo.")
    with trio.fail_after(FAR):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: run_demo(0, check=False, out=out))
            await out.written.wait()
            assert len(nodes()) == 2
            began = trio.current_time()
            nursery.cancel_scope.cancel()
    assert nodes() == set()
    # The nodes have stopped within their grace period, so they were not killed.
    assert trio.current_time() - began < cluster._GRACE
    text = out.getvalue()
    for route in (
        "chat/completions",
        "embeddings",
        "audio/speech",
        "audio/transcriptions",
        "images/generations",
    ):
        assert f"/v1/{route}" in text


@pytest.mark.processes
async def test_a_node_that_ends_early_is_reported_with_the_end_of_its_log(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_WORKERS", {"worker-1": ("digits",), "worker-2": ("digits,name=",)})
    monkeypatch.setattr(cluster, "parse_serve", lambda spec: None)
    out = io.StringIO()
    with trio.fail_after(FAR), pytest.raises(ClusterError, match="worker-2 has ended with exit code 2"):
        await run_demo(0, check=False, out=out)
    assert "the end of its log:" in out.getvalue()
    assert "trio-cluster: error: --serve" in out.getvalue()
    assert nodes() == set()


async def test_a_taken_port_is_an_error_that_names_it(small: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterPortError, match=f"port {port}: .*in use"):
            await run_demo(port, check=True, out=io.StringIO())
    assert nodes() == set()


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is not None, reason="its libraries are installed here"
)
async def test_missing_libraries_are_named_with_what_to_install() -> None:
    with pytest.raises(ClusterError, match=r"install them with: pip install .*'\.\[demo\]' .*needs"):
        await run_demo(0, check=True, out=io.StringIO())


def test_the_snippets_can_be_pasted() -> None:
    shell, _, python = how_to_try("http://127.0.0.1:8080/v1").partition("# Python (pip install openai)\n")
    bodies = re.findall(r"^  -d '(.*)'$", shell, re.M)
    assert [json.loads(body)["model"] for body in bodies] == [
        "smollm2",
        "all-MiniLM-L6-v2",
        "hibari",
        "digits",
    ]
    code, _, _ = python.partition("\nCtrl-C")
    compile(code, "snippet", "exec")


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 800)
    return buffer.getvalue()


async def test_what_is_printed_runs(tmp_path: Path) -> None:
    """Each shell command as it is printed, and the Python as a program and as it is typed into an interpreter."""
    pytest.importorskip("openai")
    server = ClusterServer()
    server.options.server.host = "127.0.0.1"
    server.register_chat("smollm2", lambda request: "It is large.")
    server.register_embedding("all-MiniLM-L6-v2", lambda request: [[0.5, 1.0]] * len(request.inputs))
    server.register_tts("hibari", lambda request: OutputChunk.audio(sound(), "audio/wav"))
    server.register_asr("whisper-tiny.en", lambda request: f"{len(request.audio)} bytes")
    server.register_image_generation("digits", lambda request: b"\x89PNG")
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}

    async def run(*command: str, stdin: str = "") -> str:
        done = await trio.run_process(
            command, cwd=tmp_path, env=environment, stdin=stdin.encode(), capture_stdout=True,
            capture_stderr=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
        assert b"Error" not in done.stderr, done.stderr
        return done.stdout.decode()

    with trio.fail_after(FAR):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run_as_standalone, 0)
            printed = how_to_try(f"{server.url}/v1")
            shell, _, python = printed.partition("# Python (pip install openai)\n")
            commands = [part for part in shell.split("\n\n") if "curl " in part]
            assert len(commands) == 5
            for command in commands:
                answer = await run("sh", "-c", command.replace("curl ", "curl --fail-with-body -sS "))
                assert '"error"' not in answer
            assert (tmp_path / "speech.wav").read_bytes() == sound()
            code, _, _ = python.partition("\nCtrl-C")
            said = f"It is large.{len(sound())} bytes\n"
            assert await run(sys.executable, "-c", code) == said
            assert (tmp_path / "seven.png").read_bytes() == b"\x89PNG"
            # An interpreter ends a loop at an empty line only.
            assert "It is large." in await run(sys.executable, "-i", "-q", stdin=code + "\n")
            nursery.cancel_scope.cancel()


@pytest.fixture
def node() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A master as the demo starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trio_cluster.demo.node", "master", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
    assert process.stderr is not None
    # The first line of the log appears when the node serves.
    process.stderr.readline()
    yield process, port
    process.kill()
    process.communicate()


@pytest.mark.processes
def test_a_node_stops_when_the_demo_has_ended(node: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = node
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
        assert answer.status == 200
    assert process.stdin is not None
    # As the kernel closes the pipe when the demo is killed.
    process.stdin.close()
    process.stdin = None
    assert process.wait(timeout=15) == 0


@pytest.mark.processes
def test_a_node_stops_on_sigterm_while_the_demo_runs(node: tuple[subprocess.Popen[bytes], int]) -> None:
    process, _ = node
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 0


@pytest.mark.engines
@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the demo extra")
async def test_all_five_models_answer() -> None:
    from trio_cluster.engines._pinned_weights import WEIGHTS
    from trio_cluster.engines._weights import cache_folder

    if not all((cache_folder() / weights.folder_name).is_dir() for weights in WEIGHTS.values()):
        pytest.skip("not all weights are in the cache; `trio-cluster demo --check` fetches them")
    out = io.StringIO()
    with trio.fail_after(120):
        assert await run_demo(0, check=True, out=out) == 0
    assert out.getvalue().count("asked:") == 5
