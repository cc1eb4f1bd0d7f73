"""Agents edit a file in a repository, over several turns, with a model that uses their tools.

Each is run as its registry has it, without a terminal, in a home of its own. It reaches the server, and no other
machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from agent_bench import Bench, Run
from agent_cases import AGENTS_FOLDER, NEW
from scripted_coder import ScriptedCoder, text_of

if AGENTS_FOLDER not in os.environ:
    pytest.skip("they are not installed; `nox -s agents` installs and runs them", allow_module_level=True)

pytestmark = pytest.mark.processes

PROMPT = "Let the greeting in greeting.py be: hello, world"


async def check_edited(bench: Bench, coder: ScriptedCoder, run: Run, turns: int) -> None:
    """Fail unless the file was edited in that many turns, and each request was answered."""
    assert run.code == 0, run.output
    assert NEW in bench.file, run.output
    assert "all is well" in run.output
    assert len(coder.requests) == turns
    assert set(run.statuses) == {200}
    assert {request.path for request in run.requests} == {bench.agent.route}
    calls = (await bench.served.in_flight(0))["calls"]
    assert calls["completed"] == calls["admitted"] == len(run.requests)


@pytest.mark.feature("edits a file over several turns")
async def test_a_file_is_edited(bench: Bench) -> None:
    coder = ScriptedCoder(bench.agent.turns(bench.folder))
    await bench.add_model(coder)
    run = await bench.run(PROMPT)
    bench.keep(run)
    turns = len(coder.turns) + 1 if bench.agent.uses_tools else 2
    await check_edited(bench, coder, run, turns)
    assert all(request.stream for request in coder.requests)
    if bench.agent.uses_tools:
        # The results of both tools of the first turn are in the second, in whatever order the tools were ready.
        tools = [each for each in coder.requests[1].messages if each["role"] == "tool"]
        results = {each["tool_call_id"]: text_of(each) for each in tools}
        assert sorted(results) == ["call_0_0", "call_0_1"]
        assert "def greeting" in results["call_0_0"]
        assert "all is well" in results["call_0_1"]


@pytest.mark.feature("tool of an MCP server")
async def test_the_tool_of_an_mcp_server_is_used(bench: Bench) -> None:
    if not bench.agent.mcp:
        pytest.skip(f"{bench.agent.title} has no MCP")
    coder = ScriptedCoder(bench.agent.mcp_turns())
    await bench.add_model(coder)
    run = await bench.run("What is the lucky number of Ada?", mcp=True)
    assert run.code == 0, run.output
    assert "Ada has 4711" in run.output
    assert len(coder.requests) == len(coder.turns) + 1
    assert set(run.statuses) == {200}


@pytest.mark.feature("first token after 20 s")
async def test_a_silent_model_is_waited_for(bench: Bench) -> None:
    coder = ScriptedCoder(bench.agent.turns(bench.folder), silence=20)
    await bench.add_model(coder)
    run = await bench.run(PROMPT)
    await check_edited(bench, coder, run, len(coder.turns) + 1 if bench.agent.uses_tools else 2)


@pytest.mark.feature("a stream that fails")
async def test_a_stream_that_fails_is_repeated_or_the_reason_is_said(
    bench: Bench, note: Callable[[str], None]
) -> None:
    coder = ScriptedCoder(bench.agent.turns(bench.folder), failures=1)
    await bench.add_model(coder)
    run = await bench.run(PROMPT)
    if NEW in bench.file:
        note("is repeated")
        assert run.code == 0
        assert "all is well" in run.output
    else:
        note("ends the run, with the reason")
        assert "the model broke" in run.output
    calls = (await bench.served.in_flight(0))["calls"]
    assert calls["failed"] == 1
