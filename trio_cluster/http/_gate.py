"""The gate that every request passes: an ASGI application in front of the framework's.

It keeps out what must not get in, and holds together what the server and the framework do not:

- *Order.* A request is judged by its head first (protocol version, key, declared length), and its body is read
  afterwards: a client without a key cannot make the node store anything. The body is read whole, under a size limit
  and two deadlines, before anybody works on the request.
- *Routes of models* are answered here, by the relay; the framework, which would cost more than all the rest, gets
  what is not hot.
- *An answer to an unread body.* An HTTP/1.1 connection whose request was answered before it was read is in no state
  to be used again, and closing it at once makes the client lose the answer. So a refusal first reads and drops a small
  rest; a large one it answers at once, with ``Connection: close``, and goes on dropping for a while before it closes.
- *The last byte.* The framework cancels the request's tasks as soon as it has given away the end of the answer, and a
  write that is cancelled is the end of its connection. So the last one is shielded.
- *Leaving.* Whatever a request has opened ends with it, in a ``finally`` that no way of leaving can pass by.
- *Cutting.* The framework ends every body well. The gate withholds the end of one that has failed, and the server
  then closes the connection without the terminating chunk.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

import trio

from .._errors import ApiError, HandlerFailed, InvalidRequest
from .._ports import shown_address
from ..openai import ENDPOINTS, Endpoint
from ._exchange import Exchange
from ._relay import relay
from ._reply import Reply, error_reply
from ._short import Connection
from ._site import Site

__all__ = ["MODEL_ROUTES", "PREFIXES", "App", "Gate", "Receive", "Scope", "Send"]

logger = logging.getLogger("trio_cluster.http")

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Paths that need no key. What they show are states and numbers; names and contents they do not.
OPEN_PATHS: Final = frozenset({"/", "/health", "/metrics"})

#: Seconds that a client may be silent in the middle of its body, and that the whole body may take.
BODY_SILENCE = 30.0
BODY_TIME = 600.0

#: How much of a refused request's body is read before the refusal is sent, so that the connection stays
#: usable.
DRAIN_BYTES = 1 << 20
DRAIN_TIME = 2.0

#: How much more is read after a refusal that ends the connection, so that the client gets to see it.
LINGER_BYTES = 1 << 27
LINGER_TIME = 10.0

#: Where the server leaves the connection of a request, for those who may have to break it.
CONNECTION_KEY: Final = "trio_cluster.connection"

#: Every route of the OpenAI API is served under each of these.
PREFIXES: Final = ("/v1", "")

#: The routes that are answered by models.
MODEL_ROUTES: Final = {
    prefix + endpoint.path: endpoint for endpoint in ENDPOINTS.values() for prefix in PREFIXES
}

_VERSIONS: Final = frozenset({"1.0", "1.1"})


class Gate:
    """See the top of this module.

    Args:
        app: the ASGI application behind the gate.
        site: the node; its options are read on each request.
    """

    def __init__(self, app: App, site: Site) -> None:
        self._app = app
        self._site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "http":
            await _Passage(self._app, self._site, scope, receive, send).run()
        elif scope["type"] == "websocket":
            await _refuse_websocket(scope, send)
        else:
            await self._app(scope, receive, send)


class _Passage:
    """One request on its way through the gate and back."""

    def __init__(self, app: App, site: Site, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._site = site
        self._scope = scope
        self._receive = receive
        self._send = send
        self._exchange = Exchange(scope["headers"], _address(scope))
        self._received = 0
        self._complete = False  # the request's body has arrived
        self._handed_on = False  # ... and the application has been given it
        self._left = False  # the client is gone
        self._started = False  # the head of the answer has been sent
        self._finished = False  # ... and its end

    async def run(self) -> None:
        exchange = self._exchange
        try:
            path = self._admit()
            await self._read_body()
        except ApiError as error:
            await self._refuse(error)
            return
        if self._left:
            return
        endpoint = MODEL_ROUTES.get(path.rstrip("/")) if self._scope["method"] == "POST" else None
        try:
            if endpoint is not None:
                await self._relay(endpoint)
            else:
                scope = {**self._scope, "path": path}
                exchange.enter(scope)
                await self._app(scope, self._receive_for_app, self._send_for_app)
        except* Exception as group:
            logger.error(
                "the application failed on %s %s", self._scope["method"], path, exc_info=group,
                extra={"fields": {"request_id": exchange.request_id}},
            )  # fmt: skip
        finally:
            self._left = self._left or self._is_gone()
            exchange.abandon("client left" if self._left else "the exchange has ended")
            self._site.end_answer(exchange)
        if not (self._started or self._left):
            await self._refuse(HandlerFailed("The server failed to answer this request"))
        elif exchange.cut and self._scope["http_version"] == "1.0":
            # Without chunks, the end of the connection is the end of the answer.
            self._reset()

    async def _relay(self, endpoint: Endpoint) -> None:
        """Answer a request for a model, without the framework: it would take as long as all the rest."""
        try:
            reply = await relay(self._site, endpoint, self._exchange)
        except ApiError as error:
            reply = error_reply(error)
        self._started = True
        await self._send(_start(reply, self._exchange.request_id))
        if isinstance(reply.body, bytes):
            await self._send({"type": "http.response.body", "body": reply.body})
            return
        try:
            while True:
                piece = await reply.body.receive()
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                reply.body.shorten(self._connection)
        except trio.EndOfChannel:
            if not self._exchange.cut:
                await self._send({"type": "http.response.body", "body": b""})

    # Judging the head

    def _admit(self) -> str:
        """Return the path that is asked for.

        Raises:
            ApiError: the request is refused for its head alone.
        """
        version = self._scope["http_version"]
        if version not in _VERSIONS:
            raise InvalidRequest(f"HTTP/{version} is not spoken here; use HTTP/1.1", status=505)
        if (self._exchange.header(b"upgrade") or b"").lower() == b"websocket":
            raise InvalidRequest("There are no websockets here", status=404)
        path: str = self._scope["path"]
        if "://" in path and not path.startswith("/"):
            path = "/" + path.partition("://")[2].partition("/")[2]
        if not path.startswith("/"):
            raise InvalidRequest(f"Unknown URL: {path!r}", status=404)
        if (path.rstrip("/") or "/") not in OPEN_PATHS:
            self._check_key()
        length, limit = self._declared_length(), self._site.options.server.max_body_size
        if length is not None and length > limit:
            raise _too_large(limit)
        return path

    def _check_key(self) -> None:
        key = self._site.options.server.api_key
        if key is None:
            return
        scheme, _, given = (self._exchange.header(b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            message = "This server needs a key: send it as 'Authorization: Bearer KEY'"
        elif not hmac.compare_digest(given.strip(), key.encode()):
            message = "The key is not valid here"
        else:
            return
        raise ApiError(401, message, code="invalid_api_key")

    def _declared_length(self) -> int | None:
        """Return the length of the body if it is known; the server has checked that it is a number."""
        length = self._exchange.header(b"content-length")
        if length is not None:
            return int(length)
        return None if self._exchange.header(b"transfer-encoding") else 0

    # Reading the body

    async def _next_piece(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._left = True
            return b""
        piece: bytes = message.get("body", b"")
        self._received += len(piece)
        self._complete = not message.get("more_body", False)
        return piece

    async def _read_body(self) -> None:
        limit = self._site.options.server.max_body_size
        pieces = []
        last = trio.current_time() + BODY_TIME
        with trio.CancelScope() as scope:
            while not (self._complete or self._left):
                scope.deadline = min(trio.current_time() + BODY_SILENCE, last)
                pieces.append(await self._next_piece())
                if self._received > limit:
                    raise _too_large(limit)
        if scope.cancelled_caught:
            raise InvalidRequest("The body of the request did not arrive in time", status=408)
        self._exchange.body = b"".join(pieces)

    async def _drop_body(self, limit: int, seconds: float) -> None:
        """Read on and keep nothing, until the body has arrived, the client has left, or it is enough."""
        limit += self._received
        with trio.move_on_after(seconds):
            while not (self._complete or self._left) and self._received <= limit:
                await self._next_piece()

    # Answering

    async def _refuse(self, error: ApiError) -> None:
        """Answer with ``error`` in place of the application."""
        length = self._declared_length()
        if length is None or length - self._received <= DRAIN_BYTES:
            await self._drop_body(DRAIN_BYTES, DRAIN_TIME)
        if self._left:
            return
        reply = error_reply(error)
        head = _start(reply, self._exchange.request_id)
        if not self._complete and self._scope["http_version"] in _VERSIONS:
            head["headers"].append((b"connection", b"close"))
        await self._send(head)
        await self._send({"type": "http.response.body", "body": reply.body, "more_body": True})
        await self._drop_body(LINGER_BYTES, LINGER_TIME)
        end = {"type": "http.response.body", "body": b"", "more_body": False}
        if self._complete or self._left:
            await self._send_last(end)
            return
        # The server's reader may be waiting for room to hand over more of the body, and would wait for ever.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drop_for_ever)
            await self._send_last(end)
            nursery.cancel_scope.cancel()

    async def _drop_for_ever(self) -> None:
        while True:
            await self._receive()

    async def _send_last(self, message: Message) -> None:
        self._finished = True
        # What may keep it is a client that does not read, and for that the socket has its own time limit.
        with trio.CancelScope(shield=True):
            await self._send(message)

    @property
    def _connection(self) -> Connection | None:
        connection: Connection | None = self._scope.get("state", {}).get(CONNECTION_KEY)
        return connection

    def _is_gone(self) -> bool:
        return self._connection is not None and self._connection.gone

    def _reset(self) -> None:
        if self._connection is not None:
            self._connection.reset()

    # What the application is given

    async def _receive_for_app(self) -> Message:
        if not self._handed_on:
            self._handed_on = True
            return {"type": "http.request", "body": self._exchange.body, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._finished:
            self._left = True
            self._exchange.abandon("client left")
        return message

    async def _send_for_app(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = list(message.get("headers", ()))
            if not any(name.lower() == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", self._exchange.request_id.encode("ascii")))
            await self._send({**message, "headers": headers})
        elif message["type"] != "http.response.body" or message.get("more_body", False):
            await self._send(message)
        elif not self._exchange.cut:
            await self._send_last(message)


def _address(scope: Scope) -> str:
    client = scope.get("client")
    if not client:
        return ""
    return shown_address(*client[:2])


def _too_large(limit: int) -> ApiError:
    return InvalidRequest(
        f"The body of the request is larger than the {limit} bytes that are taken here", status=413
    )


def _start(reply: Reply, request_id: str) -> Message:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers]
    if isinstance(reply.body, bytes):
        headers.append((b"content-length", b"%d" % len(reply.body)))
    headers.append((b"x-request-id", request_id.encode("ascii")))
    return {"type": "http.response.start", "status": reply.status, "headers": headers}


async def _refuse_websocket(scope: Scope, send: Send) -> None:
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1000})
        return
    reply = error_reply(InvalidRequest("There are no websockets here", status=404))
    head = _start(reply, Exchange(scope["headers"]).request_id)
    head["headers"].append((b"connection", b"close"))
    await send({**head, "type": "websocket.http.response.start"})
    await send({"type": "websocket.http.response.body", "body": reply.body, "more_body": False})
