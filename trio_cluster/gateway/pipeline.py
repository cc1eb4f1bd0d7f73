"""The gate that every request passes: an ASGI application in front of the framework's.

It keeps out what must not get in, and holds together what the server and the framework do not:

- *Order.* A request is judged by its head first (protocol version, key, declared length), and its body is read
  afterwards: a client without a key cannot make the node store anything.
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
import time
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, Final, TypeAlias

import trio

from ..core.log_context import current_request
from ..errors import ApiError, HandlerFailed, InvalidRequest
from ..net.sockets import shown_address
from ..openai import ENDPOINTS, Endpoint, endpoint_named
from .body import ClientLeft, RequestBody, too_large
from .context import RequestContext
from .cors import answer_preflight, cors_headers
from .direct import Connection
from .node_context import NodeContext
from .relay import relay
from .response import Reply, error_reply

__all__ = ["MODEL_ROUTES", "PREFIXES", "App", "Gate", "Receive", "Scope", "Send", "own_route"]

logger = logging.getLogger("trio_cluster.http")

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Paths that need no key. What they show are states and numbers; names and contents they do not.
OPEN_PATHS: Final = frozenset({"/", "/health", "/metrics", "/openapi.json"})

#: How much of a refused request's body is read before the refusal is sent, so that the connection stays
#: usable.
DRAIN_BYTES = 1 << 25
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

#: Milliseconds from the request's coming to the beginning of its answer.
_PROCESSING: Final = "openai-processing-ms"

_VERSIONS: Final = frozenset({"1.0", "1.1"})


def own_route(path: str) -> str:
    """Return what a path is called if it is that of a route which the OpenAI API does not have."""
    path = path.rstrip("/")
    return path if path.startswith("/v1/") else "/v1" + path


class Gate:
    """See the top of this module.

    Args:
        app: the ASGI application behind the gate.
        node_context: the node; its options are read on each request.
        has_route: tells whether the application has a path, whatever the method.
    """

    def __init__(
        self, app: App, node_context: NodeContext, has_route: Callable[[str], bool] = lambda path: True
    ) -> None:
        self._app = app
        self._node_context = node_context
        self._has_route = has_route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "http":
            passage = _Passage(self, scope, receive, send)
            # The task of a connection has one request after the other.
            token = current_request.set(passage.request_id)
            try:
                await passage.run()
            finally:
                current_request.reset(token)
        elif scope["type"] == "websocket":
            await _refuse_websocket(scope, send)
        else:
            await self._app(scope, receive, send)


class _Passage:
    """One request on its way through the gate and back."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = gate._app
        self._node_context = gate._node_context
        self._has_route = gate._has_route
        self._scope = scope
        self._receive = receive
        self._send = send
        self._connection: Connection | None = scope.get("state", {}).get(CONNECTION_KEY)
        self._context = RequestContext(scope["headers"], _address(scope))
        self._request_body = self._context.request_body = RequestBody(
            receive, self._node_context.options.server.max_body_size, partial(_has_arrived, self._connection)
        )
        self._body = b""  # for the application
        self._handed_on = False  # ... which has been given it
        self._left = False  # the client is gone
        self._started = False  # the head of the answer has been sent
        self._finished = False  # ... and its end

    @property
    def request_id(self) -> str:
        return self._context.request_id

    async def run(self) -> None:
        context = self._context
        try:
            if self._scope["method"] == "OPTIONS" and await self._answer_preflight():
                return
            path = self._admit()
            endpoint = self._endpoint(path)
            if endpoint is None:
                self._request_body.limit = min(
                    self._request_body.limit, self._node_context.options.server.max_json_size
                )
                self._body = await self._request_body.read(self._request_body.limit)
        except ApiError as error:
            await self._refuse(error_reply(error))
            return
        except ClientLeft:
            return
        try:
            if endpoint is not None:
                await self._relay(endpoint)
            else:
                scope = {**self._scope, "path": path}
                context.attach_to(scope)
                await self._app(scope, self._receive_for_app, self._send_for_app)
        except* ClientLeft:
            self._left = True
        except* Exception as group:
            logger.error(
                "the application failed on %s %s", self._scope["method"], path, exc_info=group,
                extra={"fields": {"request_id": context.request_id}},
            )  # fmt: skip
        finally:
            self._left = self._left or self._is_gone()
            context.cancel_calls("client left" if self._left else "the exchange has ended")
            self._node_context.end_answer(context)
        if not (self._started or self._left):
            await self._refuse(error_reply(HandlerFailed("The server failed to answer this request")))
        elif context.aborted and self._scope["http_version"] == "1.0":
            # Without chunks, the end of the connection is the end of the answer.
            self._reset()

    def _endpoint(self, path: str) -> Endpoint | None:
        """Return what the relay is to answer, and not the application."""
        if self._scope["method"] != "POST":
            return None
        path = path.rstrip("/")
        endpoint = MODEL_ROUTES.get(path)
        if endpoint is not None or self._has_route(path):
            return endpoint
        name = own_route(path)
        return endpoint_named(name) if self._node_context.registry.answers(name) else None

    async def _relay(self, endpoint: Endpoint) -> None:
        """Answer a request for a model, without the framework: it would take as long as all the rest."""
        try:
            reply = await relay(self._node_context, endpoint, self._context)
        except ApiError as error:
            # It is also what its call has ended with; with a traceback, both would hold each other.
            reply = error_reply(error.with_traceback(None))
            # What is still to come of the body need not be waited for by whoever is to answer.
            self._context.cancel_calls("the request was refused")
        if _PROCESSING not in dict(reply.headers):
            took = time.monotonic() - self._context.began
            reply.headers.append((_PROCESSING, str(round(took * 1000))))
        if isinstance(reply.body, bytes) and not self._request_body.complete:
            await self._refuse(reply)
            return
        self._started = True
        head = self._start(reply)
        if not self._request_body.complete:
            head["headers"].append((b"connection", b"close"))
        await self._send(head)
        if isinstance(reply.body, bytes):
            await self._send({"type": "http.response.body", "body": reply.body})
            return
        try:
            while not reply.body.complete:
                piece = await reply.body.receive()
                # The last piece and the end are one write.
                more = not reply.body.complete
                await self._send({"type": "http.response.body", "body": piece, "more_body": more})
                reply.body.enable_direct_write(self._connection)
        except trio.EndOfChannel:
            if not self._context.aborted:
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
        if (self._context.header(b"upgrade") or b"").lower() == b"websocket":
            raise InvalidRequest("There are no websockets here", status=404)
        path: str = self._scope["path"]
        if "://" in path and not path.startswith("/"):
            path = "/" + path.partition("://")[2].partition("/")[2]
        if not path.startswith("/"):
            raise InvalidRequest(f"Unknown URL: {path!r}", status=404)
        # A base URL that ends with a slash makes two of them. The framework does not see the difference.
        path = "/" + path.lstrip("/")
        if (path.rstrip("/") or "/") not in OPEN_PATHS:
            self._check_key()
        length, limit = self._context.declared_length(), self._node_context.options.server.max_body_size
        if length is not None and length > limit:
            raise too_large(limit)
        return path

    def _check_key(self) -> None:
        key = self._node_context.options.server.api_key
        if key is None:
            return
        scheme, _, given = (self._context.header(b"authorization") or b"").partition(b" ")
        if not scheme:
            # The clients of the Messages API send it so.
            given = self._context.header(b"x-api-key") or b""
            scheme = b"bearer" if given else b""
        if scheme.lower() != b"bearer":
            message = "This server needs a key: send it as 'Authorization: Bearer KEY'"
        elif not hmac.compare_digest(given.strip(), key.encode()):
            message = "The key is not valid here"
        else:
            return
        raise ApiError(401, message, code="invalid_api_key")

    # Answering

    async def _answer_preflight(self) -> bool:
        """Answer a browser that asks what it may ask; return whether it was one."""
        origins = self._node_context.options.server.cors_origins
        headers = answer_preflight(self._context, origins)
        if headers is None:
            return False
        await self._request_body.read(self._request_body.limit)
        headers.append((b"x-request-id", self._context.request_id.encode("ascii")))
        await self._send({"type": "http.response.start", "status": 204, "headers": headers})
        await self._send({"type": "http.response.body", "body": b""})
        return True

    def _start(self, reply: Reply) -> Message:
        head = _start(reply, self._context.request_id)
        head["headers"] += cors_headers(self._context, self._node_context.options.server.cors_origins)
        return head

    async def _refuse(self, reply: Reply) -> None:
        """Answer with ``reply``, whatever is still to come of the request's body."""
        request_body, length = self._request_body, self._context.declared_length()
        self._started = True
        if length is None or length - request_body.received <= DRAIN_BYTES:
            await request_body.drop(DRAIN_BYTES, DRAIN_TIME)
        if request_body.left:
            return
        head = self._start(reply)
        if not request_body.complete and self._scope["http_version"] in _VERSIONS:
            head["headers"].append((b"connection", b"close"))
        await self._send(head)
        await self._send({"type": "http.response.body", "body": reply.body, "more_body": True})
        await request_body.drop(LINGER_BYTES, LINGER_TIME)
        end = {"type": "http.response.body", "body": b"", "more_body": False}
        if request_body.complete or request_body.left:
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

    def _is_gone(self) -> bool:
        return self._connection is not None and self._connection.gone

    def _reset(self) -> None:
        if self._connection is not None:
            self._connection.reset()

    # What the application is given

    async def _receive_for_app(self) -> Message:
        if not self._handed_on:
            self._handed_on = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._finished:
            self._left = True
            self._context.cancel_calls("client left")
        return message

    async def _send_for_app(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = list(message.get("headers", ()))
            if not any(name.lower() == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", self._context.request_id.encode("ascii")))
            headers += cors_headers(self._context, self._node_context.options.server.cors_origins)
            await self._send({**message, "headers": headers})
        elif message["type"] != "http.response.body" or message.get("more_body", False):
            await self._send(message)
        elif not self._context.aborted:
            await self._send_last(message)


def _address(scope: Scope) -> str:
    client = scope.get("client")
    if not client:
        return ""
    return shown_address(*client[:2])


def _start(reply: Reply, request_id: str) -> Message:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers]
    if isinstance(reply.body, bytes):
        headers.append((b"content-length", b"%d" % len(reply.body)))
    headers.append((b"x-request-id", request_id.encode("ascii")))
    return {"type": "http.response.start", "status": reply.status, "headers": headers}


def _has_arrived(connection: Connection | None) -> bool:
    # No method: a passage that something of its own refers to is there until the garbage collector comes.
    return connection is not None and connection.arrived


async def _refuse_websocket(scope: Scope, send: Send) -> None:
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1000})
        return
    reply = error_reply(InvalidRequest("There are no websockets here", status=404))
    head = _start(reply, RequestContext(scope["headers"]).request_id)
    head["headers"].append((b"connection", b"close"))
    await send({**head, "type": "websocket.http.response.start"})
    await send({"type": "websocket.http.response.body", "body": reply.body, "more_body": False})
