"""One request, between hypercorn and the application.

Theory of operation
===================

The application may rely on three things that hypercorn does not give:

- *When the client leaves, the application is cancelled*, whatever it is doing. hypercorn only puts a message into a
  queue, which an application that computes an answer does not look at. So a task here receives all the time, at most
  :data:`~trio_cluster.http1.connection.UNREAD` bytes ahead of the application, and cancels it.
- *A cancelled ``send`` does no harm.* hypercorn awaits in the middle of its changes of state; cancelled there, it
  leaves a connection that is neither used nor closed, or loses a frame of a connection that others use too. So a task
  here sends, and nothing cancels it; the application only waits for it.
- *A ``send`` ends when the client has left*, even one that is shielded from cancellation. The waiting is ended here.

If the application returns before it has ended its answer, hypercorn closes the connection in HTTP/1.1; in HTTP/2, the
stream is reset here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from ..http1.asgi import CONNECTION_KEY, App, Message, Receive, Scope, Send
from ..http1.connection import UNREAD
from .http2 import Http2Stream

__all__ = ["HypercornRequest"]


class HypercornRequest:
    """One request, and its answer. The application finds it in its scope, in the place of a connection.

    Args:
        app: the ASGI application.
        scope, receive, send: what hypercorn gives for the request.
        abort: breaks the connection.

    Attributes:
        gone: the client has left, or the connection was closed here.
        closed: it was closed here before the client had left.
        ready: whether pieces of the body can be written past the task. They cannot.
    """

    ready = False

    def __init__(
        self, app: App, scope: Scope, receive: Receive, send: Send, abort: Callable[[], None]
    ) -> None:
        self.gone = self.closed = False
        self._app = app
        self._scope = {**scope, "state": {**scope.get("state", {}), CONNECTION_KEY: self}}
        self._receive = receive
        self._send = send
        self._abort = abort
        self._http2 = Http2Stream(send, self.lose) if scope["http_version"] == "2" else None
        self._running = trio.CancelScope()
        # A step that was handed over has to be taken, even if all of this was cancelled in between.
        self._taking_steps = trio.CancelScope(shield=True)
        # What has come of the body.
        self._pieces: list[bytes] = []
        self._unread = 0
        self._complete = self._handed_over = False
        self._body_changed = trio.lowlevel.ParkingLot()
        # Where the answer stands.
        self._started = self._ended = False
        self._step: Callable[[], Awaitable[None]] | None = None
        self._step_changed = trio.lowlevel.ParkingLot()
        self._failure: Exception | None = None

    # What the application may see of its connection

    @property
    def arrived(self) -> bool:
        """Whether something of the body waits to be received, or all has come."""
        return bool(self._pieces) or self._complete

    def send_nowait(self, body: bytes | memoryview, *, droppable: bool = False) -> bool:
        """Send nothing. Raises ``trio.WouldBlock``, since this is never :attr:`ready`."""
        raise trio.WouldBlock

    def reset(self) -> None:
        """Break the connection, so that the peer gets an error instead of an end of file."""
        self._abort()

    async def run(self) -> None:
        """Run the application for the request.

        Raises:
            Exception: the application failed; in an exception group.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive_all)
            nursery.start_soon(self._take_steps)
            try:
                with self._running:
                    await self._app(self._scope, self._receive_message, self._send_message)
            finally:
                # Also when the application has failed or was cancelled.
                with trio.CancelScope(shield=True):
                    await self._break_off()
            nursery.cancel_scope.cancel(reason="the request was answered")

    def lose(self, reason: str) -> None:
        """Cancel the application: the client has left, or does not take its answer. Synchronous, idempotent."""
        if self.gone:
            return
        self.gone = True
        self._running.cancel(reason=reason)
        if self._http2 is not None:
            self._http2.close()
        self._body_changed.unpark_all()
        self._step_changed.unpark_all()

    # The body of the request

    async def _receive_all(self) -> None:
        """Receive ahead of the application, and drop what comes after the answer: hypercorn waits until it is taken."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                # hypercorn says so after the end of an answer, too.
                if not self._ended or (self._http2 is not None and not self._http2.ended):
                    self.lose("client left")
                return
            if self._ended or self.gone:
                continue
            piece = message.get("body", b"")
            if piece:
                self._pieces.append(piece)
                self._unread += len(piece)
            self._complete = not message.get("more_body", False)
            self._body_changed.unpark_all()
            while self._unread > UNREAD and not (self._ended or self.gone):
                await self._body_changed.park()

    async def _receive_message(self) -> Message:
        await trio.lowlevel.checkpoint()
        while not (self._ended or self.gone):
            if self._pieces or (self._complete and not self._handed_over):
                body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
                self._pieces.clear()
                self._unread = 0
                self._handed_over = self._complete
                self._body_changed.unpark_all()
                return {"type": "http.request", "body": body, "more_body": not self._complete}
            await self._body_changed.park()
        return {"type": "http.disconnect"}

    # The answer

    async def _send_message(self, message: Message) -> None:
        if self.gone:
            # The application is cancelled; it must not run on because it never waits for anything else.
            await trio.lowlevel.checkpoint()
            return
        kind = message["type"]
        if kind == "http.response.start":
            self._started = True
        elif kind == "http.response.body" and not message.get("more_body", False):
            self._ended = True
            self._body_changed.unpark_all()
            if self._http2 is not None and not self._complete:
                if message.get("body"):
                    await self._take_step(partial(self._send, {**message, "more_body": True}))
                await self._take_step(self._http2.end_early)
                return
        await self._take_step(partial(self._send, message))

    async def _take_step(self, step: Callable[[], Awaitable[None]]) -> None:
        """Have something sent, and wait for that.

        Raises:
            Exception: what hypercorn raised.
        """
        while self._step is not None and not self.gone:
            await self._step_changed.park()
        self._step = step
        self._step_changed.unpark_all()
        while self._step is step and not self.gone:
            await self._step_changed.park()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._step is step:
            # The application is cancelled, and must not take this for sent.
            await trio.lowlevel.checkpoint()

    async def _break_off(self) -> None:
        """Wait until what was sent is written, and let the client see that an answer without an end is none."""
        while self._step is not None:
            await self._step_changed.park()
        self._taking_steps.cancel(reason="the application has ended")
        if self._http2 is not None and (self._started or self.gone) and not self._http2.ended:
            await self._http2.abort()

    async def _take_steps(self) -> None:
        with self._taking_steps:
            while True:
                while self._step is None:
                    await self._step_changed.park()
                try:
                    # It ends when the connection, or the stream on it, is closed.
                    await self._step()
                except Exception as error:
                    self._failure = error
                self._step = None
                self._step_changed.unpark_all()
