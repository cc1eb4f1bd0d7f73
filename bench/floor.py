"""The floor of what this project could have stood on: hypercorn with a plain ASGI application of a few lines.

python bench/floor.py PORT
"""

from __future__ import annotations

import sys
from typing import Any

import hypercorn.trio
import trio
from hypercorn.config import Config

INTERVAL = 0.05
PLAIN = b'{"object":"chat.completion","choices":[{"message":{"content":"' + b"x" * 240 + b'"}}]}'
EVENT = (
    b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"content":"token "}}],"model":"bench"}\n\n'
)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer as the benchmark's model does."""
    if scope["type"] != "http":
        await receive()
        await send({"type": f"{scope['type']}.startup.complete"})
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    streams = b'"stream": true' in body
    kind = b"text/event-stream" if streams else b"application/json"
    headers = [(b"content-type", kind)]
    if not streams:
        headers.append((b"content-length", b"%d" % len(PLAIN)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if not streams:
        await send({"type": "http.response.body", "body": PLAIN})
        return
    await send({"type": "http.response.body", "body": EVENT.replace(b"token", b"begun"), "more_body": True})
    while True:
        await trio.sleep(INTERVAL)
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})


if __name__ == "__main__":
    config = Config()
    config.bind = [f"127.0.0.1:{sys.argv[1]}"]
    config.accesslog = None
    trio.run(hypercorn.trio.serve, app, config)  # type: ignore[arg-type]
