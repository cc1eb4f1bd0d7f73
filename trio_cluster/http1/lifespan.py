"""The lifespan of an ASGI application: it is told when serving begins and when it has ended.

An application that does not know the lifespan protocol, which it shows by failing or returning before it has answered,
is served without it. Only a graceful end is told to the application: when serving is cancelled, or fails, the
application's lifespan task is cancelled like every other task.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from .asgi import App, Message

__all__ = ["LifespanError", "open_lifespan"]

logger = logging.getLogger("trio_cluster.http")

#: Seconds that an application may take to start, and to shut down.
_TIMEOUT: Final = 60.0


class LifespanError(RuntimeError):
    """The application could not start, or could not shut down; the message has its reason."""


@asynccontextmanager
async def open_lifespan(app: App, state: dict[str, Any]) -> AsyncIterator[None]:
    """Start an application for the length of a block, and shut it down when the block ends without an exception.

    Args:
        app: the ASGI application.
        state: the application may put things into it, which each request is to find in its ``scope["state"]``.

    Raises:
        LifespanError: the application says that it has failed, or takes too long. Raised in an exception group, before
            the block or after it.
    """
    async with trio.open_nursery() as nursery:
        lifespan = _Lifespan(app, state)
        nursery.start_soon(lifespan.run)
        await lifespan.startup.wait("start")
        yield
        lifespan.stopping.set()
        await lifespan.shutdown.wait("shut down")
        nursery.cancel_scope.cancel(reason="the application has shut down")


class _Step:
    """One of the two things that an application does: it is complete, or failed."""

    def __init__(self) -> None:
        self._over = trio.Event()
        self._failure: str | None = None

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def end(self, failure: str | None = None) -> None:
        self._failure = failure
        self._over.set()

    async def wait(self, name: str) -> None:
        with trio.move_on_after(_TIMEOUT):
            await self._over.wait()
        if not self.is_over:
            raise LifespanError(f"the application did not {name} within {_TIMEOUT:g} s")
        if self._failure is not None:
            raise LifespanError(f"the application failed to {name}: {self._failure}")


class _Lifespan:
    """The task in which an application lives, and the messages that it exchanges with the server."""

    def __init__(self, app: App, state: dict[str, Any]) -> None:
        self.startup = _Step()
        self.shutdown = _Step()
        self.stopping = trio.Event()
        self._app = app
        self._scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": state,
        }
        self._received_startup = False

    async def run(self) -> None:
        """Run the application until it returns; its failure is logged, and is not the server's."""
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception as error:
            if self.startup.is_over:
                logger.exception("the lifespan of the application failed")
            else:
                logger.warning("the application is served without a lifespan: %r", error)
        # An application that has returned has nothing more to say.
        for step in (self.startup, self.shutdown):
            if not step.is_over:
                step.end()

    async def _receive(self) -> Message:
        if not self._received_startup:
            self._received_startup = True
            await trio.lowlevel.checkpoint()
            return {"type": "lifespan.startup"}
        await self.stopping.wait()
        if self.shutdown.is_over:
            # There are no more messages; the task is about to be cancelled.
            await trio.sleep_forever()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        await trio.lowlevel.checkpoint()
        if kind == "lifespan.startup.complete":
            self.startup.end()
        elif kind == "lifespan.startup.failed":
            self.startup.end(message.get("message", ""))
        elif kind == "lifespan.shutdown.complete":
            self.shutdown.end()
        elif kind == "lifespan.shutdown.failed":
            self.shutdown.end(message.get("message", ""))
        else:
            raise RuntimeError(f"not a message of the lifespan protocol: {kind!r}")
