"""The floor of what this project could have stood on: hypercorn with a plain ASGI application of a few lines.

It is its own model, so there is no other process behind it. Prints ``port N`` when it is there.

    python bench/floor.py PORT
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

import hypercorn.trio
import trio
from backend import EVENT, EVERY, INTERVAL, PLAIN, STREAM
from hypercorn.config import Config
from node import end_with_standard_input


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
    streams, said = STREAM.search(body), EVERY.search(body)
    kind = b"text/event-stream" if streams else b"application/json"
    headers = [(b"content-type", kind)]
    if not streams:
        headers.append((b"content-length", b"%d" % len(PLAIN)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if not streams:
        await send({"type": "http.response.body", "body": PLAIN})
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream, send, float(said[1]) if said else INTERVAL)
        while (await receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel()


async def stream(send: Any, every: float) -> None:
    """Stream for ever."""
    due = trio.current_time()
    await send({"type": "http.response.body", "body": EVENT % b"begun", "more_body": True})
    while True:
        due += every
        await trio.sleep_until(due)
        await send({"type": "http.response.body", "body": EVENT % b"token", "more_body": True})


async def main() -> None:
    """Serve until the end."""
    config = Config()
    config.bind = [f"127.0.0.1:{sys.argv[1]}"]
    config.accesslog = None
    config.backlog = 4096
    config.errorlog = logging.getLogger("quiet")
    config.errorlog.addHandler(logging.NullHandler())
    config.errorlog.propagate = False
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(hypercorn.trio.serve, app, config))  # type: ignore[arg-type]
        print("port", sys.argv[1], flush=True)


if __name__ == "__main__":
    end_with_standard_input()
    trio.run(main)
