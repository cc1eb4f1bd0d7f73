"""One request/response cycle of the gateway: the admission of a request, its answer, and its end.

- *Order.* The head of a request is checked first (protocol version, key, declared length), and its body is read
  afterwards. So a client without a key cannot make the node store anything.
- *A body that is not read.* Nothing is kept of a body on a path that requires no key, of one that no route of the
  application takes, and of a preflight's.
- *Answering an unread body.* An HTTP/1.1 connection whose request was answered before it was read cannot be used again,
  and if it is closed at once, the client may lose the answer. So before a refusal is sent, a small rest of the body is
  read and dropped. A large rest is refused at once, with ``Connection: close``, and then read and dropped for a while
  before the connection is closed.
- *The last byte.* The web framework cancels the request's tasks as soon as it has handed over the end of the answer,
  and a cancelled write breaks the connection. So the last write is shielded.
- *Disconnects.* The calls that were opened for a request are cancelled when it ends, in a ``finally``.
- *Aborting.* The web framework ends every body properly. If an answer failed, that end is withheld, and the server
  closes the connection without the terminating chunk.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Final
from urllib.parse import quote

import trio

from ..core import clock
from ..core.join_paths import JOIN_PATHS, MAX_JOIN_BODY
from ..errors import ApiError, HandlerFailed, InvalidRequest, ModelNotFound, ModelUnavailable
from ..http1.asgi import CONNECTION_KEY, Message, Receive, Scope, Send
from ..net.sockets import shown_address
from ..openai import OPENAI_ERRORS, Endpoint, endpoint_named
from .auth import hide_models, is_open
from .body import ClientLeft, RequestBody
from .capture import capture
from .context import RequestContext
from .cors import answer_preflight, cors_headers
from .direct import Connection
from .key_limits import with_limit_headers
from .relay import relay
from .response import Body, Reply, error_reply, reply_head
from .routes import MODEL_ROUTES, canonical_path, custom_route, error_family, may_be_custom
from .stage import Pipeline
from .stories import CLIENT_LEFT, error_facts

__all__ = ["RequestCycle"]

logger = logging.getLogger("trio_cluster.http")

#: How much of a refused request's body is read before the refusal is sent, so that the connection can be used again: in
#: bytes, and in seconds.
DRAIN_BYTES = 1 << 25
DRAIN_TIME = 2.0

#: How much more is read after a refusal that ends the connection, so that the client can read it: in bytes and seconds.
LINGER_BYTES = 1 << 27
LINGER_TIME = 10.0

#: The header with the milliseconds from the arrival of the request to the beginning of its answer.
_PROCESSING: Final = "openai-processing-ms"

#: The headers with the model and the node that answer.
_MODEL: Final = "x-trio-cluster-model"
_WORKER: Final = "x-trio-cluster-worker"

#: Their requests have no content that would mean anything (RFC 9110, section 9.3).
_BODILESS_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

_VERSIONS: Final = frozenset({"1.0", "1.1"})

#: Cached, since a client sends many requests from one address.
_shown_address = lru_cache(maxsize=1024)(shown_address)


class RequestCycle:
    """One request on its way through the gateway, and its answer on the way back.

    Args:
        pipeline: the stages that the request passes, and the application behind them.
        scope, receive, send: the ASGI arguments of the request.

    Attributes:
        context: the request context.
    """

    def __init__(self, pipeline: Pipeline, scope: Scope, receive: Receive, send: Send) -> None:
        self._pipeline = pipeline
        self._node_context = pipeline.node_context
        self._scope = scope
        self._receive = receive
        self._send = send
        self._connection: Connection | None = scope.get("state", {}).get(CONNECTION_KEY)
        client = scope.get("client")
        self.context = RequestContext(
            scope["headers"],
            _shown_address(*client[:2]) if client else "",
            scope["path"],
            query=scope.get("query_string", b""),
            http2=scope["http_version"] == "2",
        )
        self._request_body = self.context.request_body = RequestBody(
            receive, self._node_context.options.server.max_body_size, self._connection
        )
        self._body = b""  # for the application
        self._handed_on = False  # the application has received the body
        self._left = False  # the client has disconnected
        self._started = False  # the head of the answer was sent
        self._finished = False  # the end of the answer was sent
        self._closes = False  # a refusal ends the connection
        self._written: Body | None = None  # all that was received of this body was written

    @property
    def client_left(self) -> bool:
        """Whether the client disconnected before the response was complete."""
        return self._left

    async def run(self) -> None:
        """Admit the request and answer it. When this returns, the calls that were opened for it have ended."""
        context = self.context
        try:
            if self._scope["method"] == "OPTIONS" and await self._answer_preflight():
                return
            self._check_head()
            for stage in self._pipeline.admission:
                await stage.admit(context)
            context.endpoint = self._endpoint(context.path)
            if context.endpoint is None:
                await self._take_body_for_app()
        except ApiError as error:
            context.error = error_facts(error)
            self._node_context.request_stats.refused(context.principal.name, context.error)
            await self._refuse(self._error_reply(error))
            return
        except ClientLeft:
            self._left = True
            return
        try:
            if context.endpoint is not None:
                self._node_context.stories.live[context] = None
                await self._answer_with_model()
            else:
                scope = {**self._scope, "path": context.path}
                context.attach_to(scope)
                await self._pipeline.app(scope, self._receive_for_app, self._send_for_app)
        except* ClientLeft:
            self._left = True
        except* Exception as group:
            logger.error(
                "the application failed on %s %s", self._scope["method"], context.path, exc_info=group,
                extra={"fields": {"request_id": context.request_id}},
            )  # fmt: skip
            context.error = error_facts(HandlerFailed("The server failed to answer this request"))
        finally:
            self._left = self._left or self._is_gone()
            if self._left and self._written is not None and self._written.is_satisfying:
                # It has the whole answer, so nothing was cut off.
                self._left = False
                context.delivered = True
                context.satisfy_call("client left after the last event")
            context.cancel_calls(CLIENT_LEFT if self._left else "the request has ended")
            if context.spool is not None:
                context.spool.close()
            self._node_context.end_answer(context)
            if context.endpoint is not None:
                self._node_context.stories.end(context, left=self._left)
        if not (self._started or self._left):
            await self._refuse(self._error_reply(HandlerFailed("The server failed to answer this request")))
        elif context.aborted and self._scope["http_version"] == "1.0":
            # HTTP/1.0 has no chunks, so the client would take a closed connection for the end of the answer.
            self._reset()

    async def _take_body_for_app(self) -> None:
        """Read the body for the application, or drop it while it comes if nothing in the application would read it."""
        body, method, path = self._request_body, self._scope["method"], self.context.path
        limit = self._node_context.options.server.max_json_size
        if method in _BODILESS_METHODS or is_open(path) or not self._pipeline.has_route(path, method):
            await body.skip(limit)
            return
        body.limit = min(body.limit, MAX_JOIN_BODY if path in JOIN_PATHS else limit)
        self._body = await body.read(body.limit)

    def _check_head(self) -> None:
        """Check the version, the path and the upgrade of the request, and normalize the path of the context.

        Raises:
            ApiError: the request is refused.
        """
        context, version = self.context, self._scope["http_version"]
        http2 = version == "2" and self._node_context.options.server.http == "hypercorn"
        if version not in _VERSIONS and not http2:
            raise InvalidRequest(f"HTTP/{version} is not supported; use HTTP/1.1", status=505)
        if (context.header(b"upgrade") or b"").lower() == b"websocket":
            # What comes next on this connection may already be a frame.
            self._closes = True
            raise InvalidRequest("This server has no websocket endpoints", status=404)
        path = context.path
        if "://" in path and not path.startswith("/"):
            path = "/" + path.partition("://")[2].partition("/")[2]
        if not path.startswith("/"):
            raise InvalidRequest(f"Unknown URL: {path!r}", status=404)
        # A client whose base URL ends with a slash sends two. The web framework would take that for an unknown path.
        context.path = path = "/" + path.lstrip("/")
        endpoint = MODEL_ROUTES.get(path)
        if endpoint is not None:
            context.errors = endpoint.errors
        else:
            context.path, context.model_in_path = canonical_path(self._scope["method"], path)
            context.errors = error_family(context.path)

    def _endpoint(self, path: str) -> Endpoint | None:
        """Return the endpoint of a request for a model; ``None`` if the application answers the request."""
        if self._scope["method"] != "POST":
            return None
        path = path.rstrip("/")
        endpoint = MODEL_ROUTES.get(path)
        if endpoint is not None or (self._pipeline.has_route(path) and not may_be_custom(path)):
            return endpoint
        name = custom_route(path)
        return endpoint_named(name) if self._node_context.router.catalog.answers(name) else None

    async def _answer_with_model(self) -> None:
        """Answer a request for a model. It does not pass the web framework, which would double its cost."""
        context, body = self.context, self._request_body
        try:
            pipeline = self._pipeline
            for stage in pipeline.dispatch if context.principal.limits is None else pipeline.limited_dispatch:
                await stage.admit(context)
            reply = await relay(self._node_context, context)
            if context.stored is not None:
                reply = await capture(reply, context.stored)
        except ApiError as error:
            context.error = error_facts(error)
            if isinstance(error, (ModelNotFound, ModelUnavailable)):
                context.missing_model = error.name
            # The call may keep this error as its end. With a traceback, the call and the error would refer to each
            # other, and wait for the garbage collector.
            reply = self._error_reply(hide_models(context.principal, error).with_traceback(None))
            # Otherwise a backend would go on waiting for the rest of the body.
            context.cancel_calls("the request was refused")
        call = getattr(context, "call", None)
        if call is not None:
            # Written out here, since a function would cost every request a call.
            for name, value in ((_MODEL, call.request.model), (_WORKER, call.served_by)):
                reply.headers.append((name, value if value.isascii() else quote(value)))
        if not reply.early and _PROCESSING not in dict(reply.headers):
            took = clock.now() - context.began
            reply.headers.append((_PROCESSING, str(round(took * 1000))))
        if isinstance(reply.body, bytes) and not body.complete:
            await self._refuse(reply)
            context.delivered = not body.left
            return
        self._started = True
        head = self._start(reply)
        context.early = reply.early
        if context.principal.limits is not None:
            head["headers"] = await with_limit_headers(self._node_context, context, head["headers"])
        if not body.complete:
            head["headers"].append((b"connection", b"close"))
        await self._send(head)
        if isinstance(reply.body, bytes):
            await self._send({"type": "http.response.body", "body": reply.body})
            context.delivered = True
            return
        try:
            while not reply.body.complete:
                piece = await reply.body.receive()
                # The last piece and the end are one write.
                more = not reply.body.complete
                self._written = None
                await self._send({"type": "http.response.body", "body": piece, "more_body": more})
                self._written = reply.body
                reply.body.enable_direct_write(self._connection)
            context.delivered = True
        except trio.EndOfChannel:
            if not context.aborted:
                await self._send({"type": "http.response.body", "body": b""})
                context.delivered = True

    # Answering

    async def _answer_preflight(self) -> bool:
        """Answer the request if it is a CORS preflight. Return whether it is one."""
        origins = self._node_context.options.server.cors_origins
        headers = answer_preflight(self.context, origins)
        if headers is None:
            return False
        await self._request_body.skip(self._node_context.options.server.max_json_size)
        headers.append((b"x-request-id", self.context.request_id.encode("ascii")))
        await self._send({"type": "http.response.start", "status": 204, "headers": headers})
        await self._send({"type": "http.response.body", "body": b""})
        return True

    def _error_reply(self, error: ApiError) -> Reply:
        return error_reply(error, self.context.errors, self.context.request_id)

    def _start(self, reply: Reply) -> Message:
        head = reply_head(reply, self.context.request_id)
        self.context.status, self.context.answered_at = reply.status, clock.now()
        if self.context.errors is not OPENAI_ERRORS:
            head["headers"] = self._with_request_id(head["headers"])
        head["headers"] += cors_headers(self.context, self._node_context.options.server.cors_origins)
        return head

    def _with_request_id(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers of an answer with those of its error family for the id of the request.

        A server behind a model may have sent its own id in the same header; that one gets another name.
        """
        name = self.context.errors.request_id
        if not name:
            return headers
        renamed = [(b"x-upstream-request-id" if each == name else each, value) for each, value in headers]
        return [*renamed, (name, self.context.request_id.encode("ascii"))]

    async def _refuse(self, reply: Reply) -> None:
        """Answer with ``reply``, also if the body of the request has not been read."""
        request_body, length = self._request_body, self.context.declared_length()
        self._started = True
        # A client that waits to be told to go on has not sent its body, and is not told to (RFC 9110, section 10.1.1).
        if not self._awaits_continue and (length is None or length - request_body.received <= DRAIN_BYTES):
            await request_body.drop(DRAIN_BYTES, DRAIN_TIME)
        if request_body.left:
            return
        head = self._start(reply)
        if self.context.principal.limits is not None:
            head["headers"] = await with_limit_headers(self._node_context, self.context, head["headers"])
        if self._closes or (not request_body.complete and self._scope["http_version"] in _VERSIONS):
            head["headers"].append((b"connection", b"close"))
        await self._send(head)
        await self._send({"type": "http.response.body", "body": reply.body, "more_body": True})
        await request_body.drop(LINGER_BYTES, LINGER_TIME)
        end = {"type": "http.response.body", "body": b"", "more_body": False}
        if request_body.complete or request_body.left:
            await self._send_last(end)
            return
        # The server's reader may be waiting for room for more of the body. It must go on for the last write to end.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drop_forever)
            await self._send_last(end)
            nursery.cancel_scope.cancel()

    async def _drop_forever(self) -> None:
        while True:
            await self._receive()

    async def _send_last(self, message: Message) -> None:
        self._finished = True
        # The write can block if the client does not read. The socket has a time limit of its own for that.
        with trio.CancelScope(shield=True):
            await self._send(message)

    @property
    def _awaits_continue(self) -> bool:
        if (self.context.header(b"expect") or b"").lower() != b"100-continue":
            return False
        arrived = self._connection is not None and self._connection.arrived
        return not (arrived or self._request_body.received or self._request_body.complete)

    def _is_gone(self) -> bool:
        connection = self._connection
        return connection is not None and connection.gone and not connection.closed

    def _reset(self) -> None:
        if self._connection is not None:
            self._connection.reset()

    # The ASGI callables of the application

    async def _receive_for_app(self) -> Message:
        if not self._handed_on:
            self._handed_on = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._finished:
            self._left = True
            self.context.cancel_calls(CLIENT_LEFT)
        return message

    async def _send_for_app(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = list(message.get("headers", ()))
            if not any(name.lower() == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", self.context.request_id.encode("ascii")))
            headers = self._with_request_id(headers)
            headers += cors_headers(self.context, self._node_context.options.server.cors_origins)
            if self.context.principal.limits is not None:
                headers = await with_limit_headers(self._node_context, self.context, headers)
            await self._send({**message, "headers": headers})
        elif message["type"] != "http.response.body" or message.get("more_body", False):
            await self._send(message)
        elif not self.context.aborted:
            await self._send_last(message)
