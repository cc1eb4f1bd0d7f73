"""Agents in front of llama.cpp's own server, by way of the ``openai`` engine.

The model is made here and its words are noise, so nothing comes of its answers. What is tested is that both ends speak:
the server takes what the agents send, tools and all, and the agents take what it answers, to the end of a run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import trio
from agent_bench import Bench
from agent_cases import AGENTS_FOLDER
from served import until
from tiny_model import write_tiny_model

from trio_cluster.engines import parse_serve, serve_engine

if AGENTS_FOLDER not in os.environ:
    pytest.skip("they are not installed; `nox -s agents` installs and runs them", allow_module_level=True)

pytestmark = [pytest.mark.processes, pytest.mark.engines]

SERVER = Path(__file__).parent.parent / "clients" / "llama_upstream.py"

#: In bytes, which are this model's tokens. No message is read to its end, but there are many.
CONTEXT = 32768


@pytest.fixture(scope="module")
def llama_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """llama.cpp's server, which has the model ``smollm2``."""
    for library in ("xllamacpp", "gguf"):
        if find_spec(library) is None:
            pytest.skip(f"needs {library}")
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    # The agents' instructions are long, and this is about what surrounds them.
    write_tiny_model(path, context=CONTEXT, reads=400)
    options = ["--slots", "1", "--context", str(CONTEXT), "--longest", "32"]
    with subprocess.Popen(
        [sys.executable, str(SERVER), str(path), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().decode().strip()
        finally:
            process.kill()


@pytest.mark.feature("in front of llama.cpp's server")
async def test_the_exchange_is_complete(bench: Bench, llama_url: str) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(
            serve_engine,
            parse_serve(f"openai:{llama_url}/v1,poll=0.5,rename=smollm2:coder"),
            bench.served.back,
        )
        await until(lambda: bench.served.front.has_model("coder"), within=10)
        run = await bench.run("What is in greeting.py?")
        assert run.code == 0, run.output
        assert run.requests
        assert set(run.statuses) == {200}, run.output
        calls = (await bench.served.in_flight(0))["calls"]
        # Codex closes the connection when it has the last event, which may be before the server behind has ended.
        assert calls["completed"] + calls["cancelled"] == calls["admitted"] == len(run.requests)
        nursery.cancel_scope.cancel()
