"""LangChain: python langchain_program.py URL FEATURE."""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

URL, FEATURE = sys.argv[1:]
KEY: Any = "a-key"
MODEL = ChatOpenAI(model="concierge", base_url=URL, api_key=KEY, max_retries=0)


class Weather(BaseModel):
    """What it is like in a city."""

    city: str
    degrees: int


@tool
def temperature(city: str) -> str:
    """Return the temperature in a city."""
    return f"21 degrees in {city}"


def chat() -> Any:
    return MODEL.invoke("Hello?").content


def stream() -> Any:
    return [chunk.content for chunk in MODEL.stream("Hello?") if chunk.content]


def tools() -> Any:
    messages: list[Any] = [HumanMessage("What is it like in Kyoto?")]
    model = MODEL.bind_tools([temperature])
    first = model.invoke(messages)
    messages.append(first)
    for call in first.tool_calls:
        messages.append(ToolMessage(temperature.invoke(call["args"]), tool_call_id=call["id"]))
    return model.invoke(messages).content


def structured() -> Any:
    answer: Any = MODEL.with_structured_output(Weather).invoke("What is it like in Kyoto?")
    return answer.model_dump()


def embeddings() -> Any:
    model = OpenAIEmbeddings(model="vectors", base_url=URL, api_key=KEY, check_embedding_ctx_length=False)
    return model.embed_documents(["a", "bcd"])


print(json.dumps(globals()[FEATURE]()))
