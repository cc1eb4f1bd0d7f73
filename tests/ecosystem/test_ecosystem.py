"""What people build upon: each library talks, streams, uses a tool, wants an object, and embeds.

A library lives in a program beside this, which does one thing and prints what came of it as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
from ecosystem_libraries import ECOSYSTEM_FOLDER, Library
from served import Served, until

from trio_cluster import ChatRequest, OutputChunk

if ECOSYSTEM_FOLDER not in os.environ:
    pytest.skip("they are not installed; `nox -s ecosystem` installs and runs them", allow_module_level=True)

pytestmark = pytest.mark.processes

WEATHER = {"city": "Kyoto", "degrees": 21}
HELLO = ["Hello", ", ", "there", "!"]

#: Names under which libraries ask for an object by way of a tool.
OBJECTS = ("Weather", "final_result")


@attrs.define
class Concierge:
    """The model.

    Attributes:
        requests: all that it was asked.
    """

    requests: list[ChatRequest] = attrs.field(factory=list)

    async def answer(self, request: ChatRequest) -> AsyncIterator[Any]:
        """Be the handler."""
        self.requests.append(request)
        names = {tool["function"]["name"] for tool in request.tools or ()}
        results = [message["content"] for message in request.messages if message["role"] == "tool"]
        wanted = names.intersection(OBJECTS)
        if wanted:
            yield OutputChunk.tool_call(wanted.pop(), WEATHER, id="call_a")
        elif (request.response_format or {}).get("type") in ("json_schema", "json_object"):
            yield json.dumps(WEATHER)
        elif results:
            yield f"I see: {results[-1] if isinstance(results[-1], str) else results[-1][0]['text']}."
        elif names:
            yield OutputChunk.tool_call("temperature", {"city": "Kyoto"}, id="call_a")
        else:
            for piece in HELLO:
                yield piece
        yield OutputChunk.usage(10, 5)


@pytest.fixture
async def concierge(served: Served) -> Concierge:
    model = Concierge()
    served.back.register_chat("concierge", model.answer)
    await until(lambda: served.front.has_model("concierge"))
    return model


async def ask(served: Served, library: Library, command: list[str], feature: str) -> Any:
    """Have the library do something, and return what came of it."""
    if feature in library.lacks:
        pytest.skip(f"{library.title} has no {feature}")
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"NO_PROXY": "*", "OPENAI_API_KEY": "a-key", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment.pop("PYTHONPATH", None)
    with trio.fail_after(120):
        completed = await trio.run_process(
            [*command, f"{served.url}/v1", feature],
            env=environment,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    assert completed.returncode == 0, completed.stderr.decode()
    calls = (await served.in_flight(0))["calls"]
    assert calls["completed"] == calls["admitted"] > 0
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.mark.feature("chat")
async def test_it_chats(served: Served, concierge: Concierge, library: Library, command: list[str]) -> None:
    assert await ask(served, library, command, "chat") == "".join(HELLO)
    assert len(concierge.requests) == 1


@pytest.mark.feature("streaming")
async def test_it_streams(served: Served, concierge: Concierge, library: Library, command: list[str]) -> None:
    pieces = await ask(served, library, command, "stream")
    assert "".join(pieces) == "".join(HELLO)
    (request,) = concierge.requests
    assert request.stream


@pytest.mark.feature("tools")
async def test_it_uses_a_tool(
    served: Served, concierge: Concierge, library: Library, command: list[str]
) -> None:
    assert "21 degrees in Kyoto" in await ask(served, library, command, "tools")
    assert concierge.requests[0].tools


@pytest.mark.feature("structured output")
async def test_it_gets_an_object(
    served: Served, concierge: Concierge, library: Library, command: list[str]
) -> None:
    assert await ask(served, library, command, "structured") == WEATHER
    (request,) = concierge.requests
    assert request.response_format or request.tools


@pytest.mark.feature("embeddings")
async def test_it_embeds(served: Served, library: Library, command: list[str]) -> None:
    vectors = await ask(served, library, command, "embeddings")
    assert vectors == [[1.0, 0.5, -0.25, 3.0], [3.0, 0.5, -0.25, 3.0]]
