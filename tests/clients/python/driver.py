"""The official Python client as a process that is told what to ask, one JSON object a line.

What it is told and what it tells is described in ``client_drivers.py``; ``driver.mjs`` is the same for Node.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import sys
import time
from contextvars import ContextVar
from typing import Any

import openai
import pydantic

attempts: ContextVar[list[float]] = ContextVar("attempts")
clients: dict[str, openai.AsyncOpenAI] = {}
calls: dict[int, asyncio.Task[None]] = {}


def tell(call: int, **members: Any) -> None:
    print(json.dumps({"id": call, **members}), flush=True)


async def note_attempt(request: Any) -> None:
    attempts.get().append(time.monotonic())


def client_for(settings: dict[str, Any]) -> openai.AsyncOpenAI:
    key = json.dumps(settings)
    if key not in clients:
        # No proxies, and no time spent on the certificates of the world.
        http_client = openai.DefaultAsyncHttpxClient(
            trust_env=False, verify=False, event_hooks={"request": [note_attempt]}
        )
        clients[key] = openai.AsyncOpenAI(http_client=http_client, **settings)
    return clients[key]


def read_value(value: Any) -> Any:
    """Make a file of what stands for one."""
    if isinstance(value, dict) and "$file" in value:
        return (value["$file"], base64.b64decode(value["base64"]), value["type"])
    if isinstance(value, list):
        return [read_value(each) for each in value]
    return value


def plain(value: Any) -> Any:
    return value.to_dict(mode="json") if isinstance(value, pydantic.BaseModel) else value


def complaints(value: Any) -> list[str]:
    """Return what the client's own types say against an answer; the client itself lets nearly all pass."""
    if not isinstance(value, pydantic.BaseModel):
        return []
    try:
        type(value).model_validate(value.to_dict(mode="json"))
    except pydantic.ValidationError as error:
        return [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    return []


class Telling:
    """Tells the events of one call, and has enough of them when it is told so."""

    def __init__(self, call: int, take: int | None) -> None:
        self.call = call
        self.left = take

    def event(self, value: Any) -> bool:
        """Tell one event, and return whether that was the last that is wanted."""
        tell(self.call, event=plain(value), complaints=complaints(value))
        if self.left is not None:
            self.left -= 1
        return self.left == 0


async def ask(call: int, order: dict[str, Any]) -> dict[str, Any]:
    client = client_for(order["client"])
    method: Any = client
    for name in order["method"].split("."):
        method = getattr(method, name)
    body = {name: read_value(value) for name, value in order["body"].items()}
    telling = Telling(call, order["take"])

    if order["method"] in ("get", "post"):
        options: Any = {"headers": order["headers"]}
        arguments = {"body": body} if order["method"] == "post" else {}
        value = await method(*order["positional"], cast_to=object, options=options, **arguments)
        return {"value": value}

    known = inspect.signature(method).parameters
    arguments = {name: value for name, value in body.items() if name in known}
    arguments["extra_headers"] = order["headers"]
    if unknown := {name: value for name, value in body.items() if name not in known}:
        arguments["extra_body"] = unknown

    if order["as_pieces"]:
        wrapped = client.audio.speech.with_streaming_response
        async with wrapped.create(*order["positional"], **arguments) as response:
            whole = b""
            async for piece in response.iter_bytes():
                whole += piece
                if telling.event(len(piece)):
                    break
        return {"value": base64.b64encode(whole).decode(), "type": response.headers["content-type"]}

    if order["method"].endswith(".stream"):
        async with method(*order["positional"], **arguments) as stream:
            final = "get_final_response" if "responses" in order["method"] else "get_final_completion"
            value = await getattr(stream, final)()
        return {"value": plain(value)}

    value = method(*order["positional"], **arguments)
    value = await value if inspect.isawaitable(value) else value
    if isinstance(value, openai.AsyncStream):
        async with value:
            async for event in value:
                if telling.event(event):
                    break
        return {"value": None, "request_id": value.response.headers.get("x-request-id")}
    if hasattr(value, "content") and isinstance(value.content, bytes):
        return {
            "value": base64.b64encode(value.content).decode(),
            "type": value.response.headers["content-type"],
        }
    if order["method"].endswith(".list"):
        return {"value": [plain(each) async for each in value], "complaints": complaints(value)}
    return {
        "value": plain(value),
        "request_id": getattr(value, "_request_id", None),
        "complaints": complaints(value),
    }


def described(error: BaseException) -> dict[str, Any]:
    response = getattr(error, "response", None)
    return {
        "class": type(error).__name__,
        "is_api_error": isinstance(error, openai.APIError),
        "message": str(error),
        "status": getattr(error, "status_code", None),
        "code": getattr(error, "code", None),
        "type": getattr(error, "type", None),
        "param": getattr(error, "param", None),
        "request_id": None if response is None else response.headers.get("x-request-id"),
    }


async def answer(call: int, order: dict[str, Any]) -> None:
    began: list[float] = []
    attempts.set(began)
    outcome: dict[str, Any]
    try:
        outcome = await ask(call, order)
    except asyncio.CancelledError:
        outcome = {"error": {"class": "aborted", "is_api_error": False, "message": ""}}
    except Exception as error:
        outcome = {"error": described(error)}
    tell(call, end=True, attempts=[at - began[0] for at in began], **outcome)
    del calls[call]


async def main() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        call = order["id"]
        if order["do"] == "ask":
            calls[call] = loop.create_task(answer(call, order))
        elif order["do"] == "abort":
            if call in calls:
                calls[call].cancel()
        else:
            for client in clients.values():
                await client.close()
            clients.clear()
            tell(call, end=True, value=openai.__version__, attempts=[])


asyncio.run(main())
