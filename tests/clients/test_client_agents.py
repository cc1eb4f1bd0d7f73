"""Whole agents in front of a model that uses tools: the AI SDK, and Codex as it is installed.

They are tested where they are installed. ``nox -s clients`` installs the AI SDK; Codex is large and is looked for in
the folder of the Node clients and on the path.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from client_drivers import NODE_FOLDER
from served import Served, until
from test_client_stream_failures import sdk_folder
from test_client_tools import CONCLUSION, QUESTION, Concierge

from trio_cluster import ApiError, ChatRequest, OutputChunk


def codex() -> str:
    """Return the path of the Codex CLI; skip the test if there is none."""
    installed = Path(os.environ.get(NODE_FOLDER, ".")) / "node_modules" / ".bin" / "codex"
    found = str(installed) if installed.is_file() else shutil.which("codex")
    if found is None:
        pytest.skip("the Codex CLI is not installed; see docs/testing.md")
    return found


async def test_the_ai_sdk_uses_tools_and_goes_on_for_a_second_turn(served: Served) -> None:
    concierge = Concierge()
    served.back.register_chat("concierge", concierge.answer)
    await until(lambda: served.front.has_model("concierge"))
    program = Path(__file__).parent / "node" / "ai_sdk_agent.mjs"
    command = ["node", str(program), str(sdk_folder()), f"{served.url}/v1", "concierge", QUESTION]
    with trio.fail_after(60):
        completed = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT)
    outcomes = json.loads(completed.stdout.splitlines()[-1])
    # The default provider believes that items are stored, and refers to them.
    ways = ["compatible", "openai default", "openai previousResponseId", "openai store=false", "openai.chat"]
    assert sorted(outcomes) == ways
    for way, outcome in outcomes.items():
        assert outcome == {"text": CONCLUSION, "steps": 2, "second": CONCLUSION, "thrown": None}, way
    # Whatever was sent, the model was given all of it.
    for request in concierge.requests:
        roles = [message["role"] for message in request.messages if message["role"] != "system"]
        assert roles in (["user"], ["user", "assistant", "tool", "tool"], [*roles[:4], "assistant", "user"])


async def test_the_ai_sdk_is_told_what_to_do_where_nothing_is_stored(served: Served) -> None:
    served.front.options.stored_responses = 0
    concierge = Concierge()
    served.back.register_chat("concierge", concierge.answer)
    await until(lambda: served.front.has_model("concierge"))
    program = Path(__file__).parent / "node" / "ai_sdk_agent.mjs"
    command = ["node", str(program), str(sdk_folder()), f"{served.url}/v1", "concierge", QUESTION]
    with trio.fail_after(60):
        completed = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT)
    outcomes = json.loads(completed.stdout.splitlines()[-1])
    thrown = outcomes.pop("openai default")["thrown"]
    assert thrown["name"] == "AI_APICallError"
    for way_out in ("store", "openai.chat"):
        assert way_out in thrown["message"]
    assert outcomes.pop("openai previousResponseId")["thrown"]["name"] == "AI_APICallError"
    assert sorted(outcomes) == ["compatible", "openai store=false", "openai.chat"]
    for way, outcome in outcomes.items():
        assert outcome == {"text": CONCLUSION, "steps": 2, "second": CONCLUSION, "thrown": None}, way


async def test_the_agents_sdk_uses_tools_and_goes_on_for_a_second_turn_in_every_way(served: Served) -> None:
    # A folder of tests has the name of its package, so that is not what to look for.
    if not list(importlib.metadata.distributions(name="openai-agents")):
        pytest.skip("openai-agents is not installed")
    concierge = Concierge()
    served.back.register_chat("concierge", concierge.answer)
    await until(lambda: served.front.has_model("concierge"))
    program = Path(__file__).parent / "python" / "agents_sdk.py"
    command = [sys.executable, str(program), f"{served.url}/v1", "concierge", QUESTION]
    with trio.fail_after(60):
        completed = await trio.run_process(
            command, capture_stdout=True, stderr=subprocess.STDOUT, check=False
        )
    assert completed.returncode == 0, completed.stdout.decode()
    outcomes = json.loads(completed.stdout.splitlines()[-1])
    ways = ["conversation", "input", "previous_response_id", "session"]
    assert sorted(outcomes) == sorted([*ways, *(f"{way} streamed" for way in ways)])
    for way, outcome in outcomes.items():
        assert outcome == [CONCLUSION, CONCLUSION], way
    roles = [
        [each["role"] for each in request.messages if each["role"] != "system"]
        for request in concierge.requests
    ]
    first, loop = ["user"], ["user", "assistant", "tool", "tool"]
    second = [*loop, "assistant", "user"]
    assert roles == [first, loop, second] * len(outcomes)


# Codex


@attrs.define
class Coder:
    """A model that has a command run, and then says what came of it.

    Attributes:
        requests: all that it was asked.
    """

    requests: list[ChatRequest] = attrs.field(factory=list)

    async def answer(self, request: ChatRequest) -> AsyncIterator[Any]:
        """Be the handler."""
        self.requests.append(request)
        last = request.messages[-1]
        names = {tool["function"]["name"] for tool in request.tools or () if tool["type"] == "function"}
        if "Fail" in request.last_text:
            yield "Well, "
            raise ApiError(500, "the model broke", code="my_code")
        if last["role"] == "tool":
            yield OutputChunk.reasoning("Now I know.")
            yield f"It was: {last['content']}"
        elif "Close" in request.last_text:
            (name,) = (name for name in names if name.endswith("__close_agent"))
            yield OutputChunk.tool_call(name, {"target": "x"}, id="call_1")
        else:
            assert "exec_command" in names
            yield OutputChunk.reasoning("Let me look.")
            yield OutputChunk.tool_call("exec_command", {"cmd": "cat a.txt"}, id="call_1")
        yield OutputChunk.usage(10, 5)


@pytest.fixture
async def coder(served: Served) -> Coder:
    model = Coder()
    served.back.register_chat("coder", model.answer)
    await until(lambda: served.front.has_model("coder"))
    return model


async def ask_codex(served: Served, folder: Path, prompt: str) -> tuple[int, str]:
    """Run ``codex exec`` once, and return its exit code and its output."""
    home = folder / "home"
    home.mkdir()
    (folder / "a.txt").write_text("the content of the file")
    (home / "config.toml").write_text(
        f"""
model = "coder"
model_provider = "cluster"

[model_providers.cluster]
name = "cluster"
base_url = "{served.url}/v1"
wire_api = "responses"
stream_max_retries = 1
"""
    )
    command = [codex(), "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", prompt]
    environment = {**os.environ, "HOME": str(home), "CODEX_HOME": str(home)}
    with trio.fail_after(60):
        completed = await trio.run_process(
            command,
            cwd=folder,
            env=environment,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return completed.returncode, completed.stdout.decode()


@pytest.mark.processes
async def test_codex_runs_a_command_and_concludes(served: Served, coder: Coder, tmp_path: Path) -> None:
    code, output = await ask_codex(served, tmp_path, "What does a.txt say?")
    assert code == 0, output
    assert "It was: " in output
    assert "the content of the file" in output
    first, second = coder.requests
    assert first.stream
    assert [message["role"] for message in second.messages[-2:]] == ["assistant", "tool"]


@pytest.mark.processes
async def test_codex_finds_its_function_in_a_namespace(served: Served, coder: Coder, tmp_path: Path) -> None:
    code, output = await ask_codex(served, tmp_path, "Close an agent.")
    assert code == 0, output
    assert "unsupported call" not in output
    assert len(coder.requests) == 2


@pytest.mark.processes
async def test_codex_says_why_a_stream_has_failed(served: Served, coder: Coder, tmp_path: Path) -> None:
    code, output = await ask_codex(served, tmp_path, "Fail, please.")
    assert code == 1, output
    assert "stream disconnected before completion: the model broke" in output
    assert len(coder.requests) == 2
