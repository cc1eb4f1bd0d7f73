"""One request/response cycle of the gateway: its admission, its answer, and its end, whatever way that comes.

- *Order.* A request is judged by its head first (protocol version, key, declared length), and its body is read afterwards:
  a client without a key cannot make the node store anything.
- *A body that is not read.* Nothing is kept of a body on a path that requires no key, of one that no route of the
  application takes, and of a preflight's.
- *An answer to an unread body.* An HTTP/1.1 connection whose request was answered before it was read cannot be used again,
  and closing it at once makes the client lose the answer. So a refusal first reads and drops a small rest; a large rest is
  answered at once, with ``Connection: close``, and read and dropped for a while before the connection is closed.
- *The last byte.* The web framework cancels the request's tasks as soon as it has handed over the end of the answer, and a
  cancelled write is the end of its connection. So the last write is shielded.
- *Disconnects.* Whatever a request has opened ends with it, in a ``finally``.
- *Aborting.* The web framework ends every body properly. The end of a body that failed is withheld, and the server then
  closes the connection without the terminating chunk.
"""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import trio

from ..errors import ApiError, HandlerFailed, InvalidRequest
from ..http1.asgi import CONNECTION_KEY, Message, Receive, Scope, Send
from ..net.sockets import shown_address
from ..openai import Endpoint, endpoint_named
from .auth import is_open
from .body import ClientLeft, RequestBody
from .context import RequestContext
from .cors import answer_preflight, cors_headers
from .direct import Connection
from .relay import relay
from .response import Reply, error_reply, reply_head
from .routes import MODEL_ROUTES, own_route

if TYPE_CHECKING:
    from .pipeline import Gateway

__all__ = ["RequestCycle"]

logger = logging.getLogger("trio_cluster.http")

#: How much of a refused request's body is read before the refusal is sent, so that the connection stays usable: bytes, and
#: seconds.
DRAIN_BYTES = 1 << 25
DRAIN_TIME = 2.0

#: How much more is read after a refusal that ends the connection, so that the client gets to see the refusal.
LINGER_BYTES = 1 << 27
LINGER_TIME = 10.0

#: Milliseconds from the arrival of the request to the beginning of its answer.
_PROCESSING: Final = "openai-processing-ms"

#: Their requests have no content that would mean anything (RFC 9110, section 9.3).
_BODILESS_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

_VERSIONS: Final = frozenset({"1.0", "1.1"})

#: A client sends many requests from one address.
_shown_address = lru_cache(maxsize=1024)(shown_address)


class RequestCycle:
    """One request on its way through the gateway, and its answer on the way back.

    Args:
        gateway: whose stages the request passes.
        scope, receive, send: what ASGI gives for the request.

    Attributes:
        context: what is known of the request.
    """

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway = gateway
        self._node_context = gateway.node_context
        self._scope = scope
        self._receive = receive
        self._send = send
        self._connection: Connection | None = scope.get("state", {}).get(CONNECTION_KEY)
        client = scope.get("client")
        self.context = RequestContext(
            scope["headers"], _shown_address(*client[:2]) if client else "", scope["path"]
        )
        self._request_body = self.context.request_body = RequestBody(
            receive, self._node_context.options.server.max_body_size, self._connection
        )
        self._body = b""  # for the application
        self._handed_on = False  # the application was given the body
        self._left = False  # the client is gone
        self._started = False  # the head of the answer was sent
        self._finished = False  # the end of the answer was sent
        self._closes = False  # a refusal ends the connection

    async def run(self) -> None:
        """Admit the request and answer it. The calls that were opened for it have been cancelled when this returns."""
        context = self.context
        try:
            if self._scope["method"] == "OPTIONS" and await self._answer_preflight():
                return
            self._judge_head()
            for stage in self._gateway.admission:
                await stage.admit(context)
            context.endpoint = self._endpoint(context.path)
            if context.endpoint is None:
                await self._take_body_for_app()
        except ApiError as error:
            await self._refuse(error_reply(error))
            return
        except ClientLeft:
            return
        try:
            if context.endpoint is not None:
                await self._answer_with_model()
            else:
                scope = {**self._scope, "path": context.path}
                context.attach_to(scope)
                await self._gateway.app(scope, self._receive_for_app, self._send_for_app)
        except* ClientLeft:
            self._left = True
        except* Exception as group:
            logger.error(
                "the application failed on %s %s", self._scope["method"], context.path, exc_info=group,
                extra={"fields": {"request_id": context.request_id}},
            )  # fmt: skip
        finally:
            self._left = self._left or self._is_gone()
            context.cancel_calls("client left" if self._left else "the exchange has ended")
            if context.spool is not None:
                context.spool.close()
            self._node_context.end_answer(context)
        if not (self._started or self._left):
            await self._refuse(error_reply(HandlerFailed("The server failed to answer this request")))
        elif context.aborted and self._scope["http_version"] == "1.0":
            # Without chunks, the end of the connection is the end of the answer.
            self._reset()

    async def _take_body_for_app(self) -> None:
        """Read the body for the application, or drop it while it comes if nothing in the application would read it."""
        body, method, path = self._request_body, self._scope["method"], self.context.path
        limit = self._node_context.options.server.max_json_size
        if method in _BODILESS_METHODS or is_open(path) or not self._gateway.has_route(path, method):
            await body.skip(limit)
            return
        body.limit = min(body.limit, limit)
        self._body = await body.read(body.limit)

    def _judge_head(self) -> None:
        """Normalize the path of the context.

        Raises:
            ApiError: the request is refused for its request line alone, or wants a websocket.
        """
        context, version = self.context, self._scope["http_version"]
        if version not in _VERSIONS:
            raise InvalidRequest(f"HTTP/{version} is not spoken here; use HTTP/1.1", status=505)
        if (context.header(b"upgrade") or b"").lower() == b"websocket":
            # What comes next on this connection may already be a frame.
            self._closes = True
            raise InvalidRequest("There are no websockets here", status=404)
        path = context.path
        if "://" in path and not path.startswith("/"):
            path = "/" + path.partition("://")[2].partition("/")[2]
        if not path.startswith("/"):
            raise InvalidRequest(f"Unknown URL: {path!r}", status=404)
        # A base URL that ends with a slash makes two of them. The web framework does not see the difference.
        context.path = "/" + path.lstrip("/")

    def _endpoint(self, path: str) -> Endpoint | None:
        """Return what a model is asked for; ``None`` for what the application answers."""
        if self._scope["method"] != "POST":
            return None
        path = path.rstrip("/")
        endpoint = MODEL_ROUTES.get(path)
        if endpoint is not None or self._gateway.has_route(path):
            return endpoint
        name = own_route(path)
        return endpoint_named(name) if self._node_context.router.catalog.answers(name) else None

    async def _answer_with_model(self) -> None:
        """Answer without the web framework, which would take as long as all the rest."""
        context, body = self.context, self._request_body
        try:
            for stage in self._gateway.dispatch:
                await stage.admit(context)
            reply = await relay(self._node_context, context)
        except ApiError as error:
            # The error is also what its call ended with; with a traceback, both would refer to each other.
            reply = error_reply(error.with_traceback(None))
            # The backend need not wait for what is still to come of the body.
            context.cancel_calls("the request was refused")
        if _PROCESSING not in dict(reply.headers):
            took = time.monotonic() - context.began
            reply.headers.append((_PROCESSING, str(round(took * 1000))))
        if isinstance(reply.body, bytes) and not body.complete:
            await self._refuse(reply)
            return
        self._started = True
        head = self._start(reply)
        if not body.complete:
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
            if not context.aborted:
                await self._send({"type": "http.response.body", "body": b""})

    # Answering

    async def _answer_preflight(self) -> bool:
        """Answer a browser that asks what it may ask; return whether it was one."""
        origins = self._node_context.options.server.cors_origins
        headers = answer_preflight(self.context, origins)
        if headers is None:
            return False
        await self._request_body.skip(self._node_context.options.server.max_json_size)
        headers.append((b"x-request-id", self.context.request_id.encode("ascii")))
        await self._send({"type": "http.response.start", "status": 204, "headers": headers})
        await self._send({"type": "http.response.body", "body": b""})
        return True

    def _start(self, reply: Reply) -> Message:
        head = reply_head(reply, self.context.request_id)
        head["headers"] += cors_headers(self.context, self._node_context.options.server.cors_origins)
        return head

    async def _refuse(self, reply: Reply) -> None:
        """Answer with ``reply``, whatever is still to come of the request's body."""
        request_body, length = self._request_body, self.context.declared_length()
        self._started = True
        # A client that waits to be told to go on has not sent its body, and is not told to (RFC 9110, section 10.1.1).
        if not self._awaits_continue and (length is None or length - request_body.received <= DRAIN_BYTES):
            await request_body.drop(DRAIN_BYTES, DRAIN_TIME)
        if request_body.left:
            return
        head = self._start(reply)
        if self._closes or (not request_body.complete and self._scope["http_version"] in _VERSIONS):
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

    @property
    def _awaits_continue(self) -> bool:
        if (self.context.header(b"expect") or b"").lower() != b"100-continue":
            return False
        arrived = self._connection is not None and self._connection.arrived
        return not (arrived or self._request_body.received or self._request_body.complete)

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
            self.context.cancel_calls("client left")
        return message

    async def _send_for_app(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = list(message.get("headers", ()))
            if not any(name.lower() == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", self.context.request_id.encode("ascii")))
            headers += cors_headers(self.context, self._node_context.options.server.cors_origins)
            await self._send({**message, "headers": headers})
        elif message["type"] != "http.response.body" or message.get("more_body", False):
            await self._send(message)
        elif not self.context.aborted:
            await self._send_last(message)
