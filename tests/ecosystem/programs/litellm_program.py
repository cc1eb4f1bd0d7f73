"""The LiteLLM SDK: python litellm_program.py URL FEATURE."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
from pydantic import BaseModel

URL, FEATURE = sys.argv[1:]
SETTINGS: dict[str, Any] = {"api_base": URL, "api_key": "a-key", "num_retries": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "temperature",
        "description": "Return the temperature in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Weather(BaseModel):
    """What it is like in a city."""

    city: str
    degrees: int


def ask(text: str | list[Any], **more: Any) -> Any:
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return litellm.completion(model="openai/concierge", messages=messages, **SETTINGS, **more)


def chat() -> Any:
    return ask("Hello?").choices[0].message.content


def stream() -> Any:
    pieces = (chunk.choices[0].delta.content for chunk in ask("Hello?", stream=True))
    return [piece for piece in pieces if piece]


def tools() -> Any:
    messages: list[Any] = [{"role": "user", "content": "What is it like in Kyoto?"}]
    message = ask(messages, tools=[TOOL]).choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        city = json.loads(call.function.arguments)["city"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"21 degrees in {city}"})
    return ask(messages, tools=[TOOL]).choices[0].message.content


def structured() -> Any:
    answer = ask("What is it like in Kyoto?", response_format=Weather)
    return Weather.model_validate_json(answer.choices[0].message.content).model_dump()


def embeddings() -> Any:
    answer = litellm.embedding(
        model="openai/vectors", input=["a", "bcd"], encoding_format="float", **SETTINGS
    )
    return [each["embedding"] for each in answer.data]


print(json.dumps(globals()[FEATURE]()))
