"""pydantic-ai: python pydantic_ai_program.py URL FEATURE."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, Embedder
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, FEATURE = sys.argv[1:]
PROVIDER = OpenAIProvider(base_url=URL, api_key="a-key")
MODEL = OpenAIChatModel("concierge", provider=PROVIDER)


class Weather(BaseModel):
    """What it is like in a city."""

    city: str
    degrees: int


async def chat() -> Any:
    return (await Agent(MODEL).run("Hello?")).output


async def stream() -> Any:
    async with Agent(MODEL).run_stream("Hello?") as running:
        return [piece async for piece in running.stream_text(delta=True, debounce_by=None)]


async def tools() -> Any:
    agent = Agent(MODEL)

    @agent.tool_plain
    def temperature(city: str) -> str:
        """Return the temperature in a city."""
        return f"21 degrees in {city}"

    return (await agent.run("What is it like in Kyoto?")).output


async def structured() -> Any:
    return (await Agent(MODEL, output_type=Weather).run("What is it like in Kyoto?")).output.model_dump()


async def embeddings() -> Any:
    embedder = Embedder(OpenAIEmbeddingModel("vectors", provider=PROVIDER))
    return [list(each) for each in (await embedder.embed_documents(["a", "bcd"])).embeddings]


print(json.dumps(asyncio.run(globals()[FEATURE]())))
