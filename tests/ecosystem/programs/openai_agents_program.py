"""OpenAI Agents SDK: python openai_agents_program.py URL FEATURE. It speaks /v1/responses."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from agents import (
    Agent,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

URL, FEATURE = sys.argv[1:]
set_default_openai_client(AsyncOpenAI(base_url=URL, api_key="a-key", max_retries=0))
set_tracing_disabled(True)


class Weather(BaseModel):
    """What it is like in a city."""

    city: str
    degrees: int


@function_tool
def temperature(city: str) -> str:
    """Return the temperature in a city."""
    return f"21 degrees in {city}"


async def chat() -> Any:
    return (await Runner.run(Agent(name="a", model="concierge"), "Hello?")).final_output


async def stream() -> Any:
    running = Runner.run_streamed(Agent(name="a", model="concierge"), "Hello?")
    return [
        event.data.delta
        async for event in running.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]


async def tools() -> Any:
    agent = Agent(name="a", model="concierge", tools=[temperature])
    return (await Runner.run(agent, "What is it like in Kyoto?")).final_output


async def structured() -> Any:
    agent = Agent(name="a", model="concierge", output_type=Weather)
    return (await Runner.run(agent, "What is it like in Kyoto?")).final_output.model_dump()


print(json.dumps(asyncio.run(globals()[FEATURE]())))
