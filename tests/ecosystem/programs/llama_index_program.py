"""LlamaIndex: python llama_index_program.py URL FEATURE."""

from __future__ import annotations

import json
import sys
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

URL, FEATURE = sys.argv[1:]
MODEL = OpenAILike(
    model="concierge",
    api_base=URL,
    api_key="a-key",
    is_chat_model=True,
    is_function_calling_model=True,
    max_retries=0,
)


class Weather(BaseModel):
    """What it is like in a city."""

    city: str
    degrees: int


def temperature(city: str) -> str:
    """Return the temperature in a city."""
    return f"21 degrees in {city}"


def chat() -> Any:
    return MODEL.complete("Hello?").text


def stream() -> Any:
    return [piece.delta for piece in MODEL.stream_chat([ChatMessage("Hello?")]) if piece.delta]


def tools() -> Any:
    tool = FunctionTool.from_defaults(temperature)
    return MODEL.predict_and_call([tool], user_msg="What is it like in Kyoto?").response


def structured() -> Any:
    return MODEL.as_structured_llm(Weather).complete("What is it like in Kyoto?").raw.model_dump()


def embeddings() -> Any:
    model = OpenAILikeEmbedding(model_name="vectors", api_base=URL, api_key="a-key")
    return model.get_text_embedding_batch(["a", "bcd"])


print(json.dumps(globals()[FEATURE]()))
