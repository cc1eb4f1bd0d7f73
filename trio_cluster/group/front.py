"""The gateway of a process of a group, as one of the whole: whichever process is asked, all of them answer.

This stands in front of the gateway as an ASGI application. It lets everything pass that is not about the node: requests
for models only have their path looked at. What is about the node is mostly answered by this process alone first, and so
checked; then the others are asked the same, with the same headers, so that each of them checks it, too, and the answers
are merged (``status.py``, ``metrics.py``).

===============================================  =========================================================
request                                          who answers
===============================================  =========================================================
``/cluster/status``, ``/metrics``, ``calls``     all of them, merged
cancel                                           all of them, added up
reload                                           all of them, each for itself; the answer is this one's
drain                                            the first that has a link to the worker
the story of a request                           the one that has answered it
``/cluster/events``                              this one, which follows the others (``live.py``)
usage, audit                                     this one, after the others have written down what they know
changes of keys                                  this one; the others look at the keys before it answers
what is kept in the state directory: inviting,   the process with the smallest number; the others read it again
joining, renewing, revoking, rotating            before the answer goes out
===============================================  =========================================================
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from functools import partial
from typing import Any, Final, Protocol

import msgspec
import trio
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from ..core.join_paths import JOIN_PATH, RENEW_PATH
from ..core.threads import NoThread, run_in_thread
from ..http1.asgi import App, Message, Receive, Scope, Send
from .messages import Notice, Process, Request, Response
from .metrics import is_openmetrics, merge_metrics
from .status import merge_calls, merge_status

__all__ = ["HIDDEN", "SIBLING_KEY", "Front", "Siblings"]

#: Marks, in an ASGI scope, a request that another process of the group has passed on.
SIBLING_KEY: Final = "trio_cluster.sibling"

#: The header with which a process says that a client may see neither ids of requests nor metrics whose names begin with
#: this. Another process is told them all the same, so that what a process has counted is known when it has ended.
HIDDEN: Final = "x-trio-cluster-hidden"

#: Bytes of a body that are read here. One that is longer is not for these routes, and is answered by one process alone.
_MOST: Final = 256 * 1024
#: Bytes of metrics from which on they are merged in a thread, since it would delay other requests.
_MUCH: Final = 100 * 1024
#: Headers of an answer that are for the other processes, or those of one process.
_LENGTH: Final = (b"content-length", HIDDEN.encode())
#: Routes that change what is kept in the state directory.
_KEPT: Final = frozenset({JOIN_PATH, RENEW_PATH, "/cluster/invites", "/cluster/ca/rotate"})
_GATHERED: Final = frozenset({"/metrics", "/cluster/status", "/cluster/calls"})
_WRITTEN: Final = frozenset({"/cluster/usage", "/cluster/audit", "/v1/usage", "/usage"})


class Siblings(Protocol):
    """The other processes; see :class:`~trio_cluster.group.member.Member`."""

    async def ask(
        self, what: Request | Notice | None, *, first: bool = False, own: Response | None = None
    ) -> tuple[list[Process], bytes]:
        """See ``Member``."""
        ...


class Front:
    """See the top of this module. Called as an ASGI application.

    Args:
        app: the gateway.
        siblings: the other processes.
    """

    def __init__(self, app: App, siblings: Siblings) -> None:
        self._app = app
        self._siblings = siblings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        path, rule = "", None
        if scope["type"] == "http":
            # As the gateway and its routes take it, which mind neither a second slash in front nor one at the end.
            path = "/" + scope["path"].strip("/")
            rule = self._rule(scope["method"], path)
        if rule is None:
            await self._app(scope, receive, send)
            return
        body = bytearray()
        while len(body) <= _MOST:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        else:
            await self._app(scope, _replay(body, receive), send)
            return
        request = _request_of(scope, path, bytes(body))
        response = await rule(request)
        headers = [header for header in response.headers if header[0].lower() not in _LENGTH]
        headers.append((b"content-length", str(len(response.body)).encode()))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    async def answer_alone(self, request: Request) -> Response:
        """Answer a request from what this process knows alone. A checkpoint."""
        sent: list[Message] = []
        pending: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if pending:
                return pending.pop()
            await trio.sleep_forever()
            raise AssertionError("unreachable")

        async def send(message: Message) -> None:
            sent.append(message)

        await self._app(_scope_of(request), receive, send)
        head = next((message for message in sent if message["type"] == "http.response.start"), None)
        if head is None:
            return Response(500)
        content = b"".join(message.get("body", b"") for message in sent if message is not head)
        return Response(
            head["status"], [(bytes(name), bytes(value)) for name, value in head["headers"]], content
        )

    def _rule(self, method: str, path: str) -> Callable[[Request], Awaitable[Response]] | None:
        """Return what answers a request; ``None``: the gateway of this process does."""
        if method == "GET":
            if path in _GATHERED:
                return self._gather
            if path.startswith("/cluster/requests/"):
                return self._find
            return self._after_the_others if path in _WRITTEN else None
        if not path.startswith("/cluster/"):
            return None
        if path == "/cluster/keys" or path.startswith("/cluster/keys/"):
            return self._change_keys
        if method == "POST":
            if path in _KEPT or (path.startswith("/cluster/workers/") and path.endswith("/revoke")):
                return self._change_kept
            if path.startswith("/cluster/calls/") and path.endswith("/cancel"):
                return self._cancel
            if path.startswith("/cluster/workers/") and path.endswith("/drain"):
                return self._find
            if path == "/cluster/reload":
                return self._reload
        return None

    async def _gather(self, request: Request) -> Response:
        own = await self.answer_alone(request)
        if own.status != 200:
            return own
        processes, retired = await self._siblings.ask(request, own=own)
        answers = {
            each.process: each.response.body
            for each in processes
            if each.response is not None and each.response.status == 200
        } or {0: own.body}
        if request.path == "/metrics":
            hidden = dict(own.headers).get(HIDDEN.encode(), b"").decode()
            merge = partial(
                merge_metrics,
                list(answers.values()),
                retired,
                _own_families(processes, answers),
                openmetrics=is_openmetrics(own.body),
                hidden=hidden,
            )
            if sum(map(len, answers.values())) < _MUCH:
                body = merge()
            else:
                try:
                    body = await run_in_thread(merge, abandon_on_cancel=True)
                except NoThread:
                    body = merge()
        elif request.path == "/cluster/calls":
            body = merge_calls(list(answers.values()))
        else:
            body = merge_status(own.body, answers, processes)
        return msgspec.structs.replace(own, body=body)

    async def _after_the_others(self, request: Request) -> Response:
        await self._siblings.ask(request)
        return await self.answer_alone(request)

    async def _change_keys(self, request: Request) -> Response:
        response = await self.answer_alone(request)
        if response.status < 300:
            await self._siblings.ask(Notice("keys"))
        return response

    async def _change_kept(self, request: Request) -> Response:
        processes, _ = await self._siblings.ask(request, first=True)
        response = next((each.response for each in processes if each.response is not None), None)
        if response is None:
            response = await self.answer_alone(request)
        if response.status < 300:
            worker = ""
            if request.path.endswith("/revoke"):
                worker = request.path.removeprefix("/cluster/workers/").removesuffix("/revoke")
            await self._siblings.ask(Notice("members", worker))
        return response

    async def _cancel(self, request: Request) -> Response:
        own = await self.answer_alone(request)
        if own.status not in (200, 404):
            return own
        processes, _ = await self._siblings.ask(request)
        found = [
            each.response for each in processes if each.response is not None and each.response.status == 200
        ]
        if own.status == 200:
            found.insert(0, own)
        if not found:
            return own
        content = msgspec.json.decode(found[0].body)
        content["cancelled"] = sum(msgspec.json.decode(each.body)["cancelled"] for each in found)
        return msgspec.structs.replace(found[0], body=msgspec.json.encode(content))

    async def _reload(self, request: Request) -> Response:
        own = await self.answer_alone(request)
        if own.status < 300:
            await self._siblings.ask(request)
        return own

    async def _find(self, request: Request) -> Response:
        """Return the answer of the first process that knows what is asked for."""
        own = await self.answer_alone(request)
        if own.status != 404:
            return own
        processes, _ = await self._siblings.ask(request)
        found = [
            each.response for each in processes if each.response is not None and each.response.status < 300
        ]
        return found[0] if found else own


def _own_families(processes: Collection[Process], answered: Collection[int]) -> list[Any]:
    return [
        GaugeMetricFamily(
            "trio_cluster_processes", "Processes of this master that answer.", value=len(answered)
        ),
        CounterMetricFamily(
            "trio_cluster_process_restarts",
            "How often a process of this master has ended and was started again.",
            value=sum(each.restarts for each in processes),
        ),
    ]


def _request_of(scope: Scope, path: str, body: bytes) -> Request:
    client = scope.get("client")
    return Request(
        scope["method"],
        path,
        scope.get("query_string", b""),
        [(bytes(name), bytes(value)) for name, value in scope["headers"]],
        body,
        scope.get("scheme", "http"),
        None if client is None else (str(client[0]), int(client[1] or 0)),
    )


def _scope_of(request: Request) -> MutableMapping[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.scheme,
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": request.headers,
        "client": request.client,
        "server": None,
        "extensions": {},
        "state": {},
        SIBLING_KEY: True,
    }


def _replay(body: bytearray, receive: Receive) -> Receive:
    """Return what gives a part of a body that was read already, and then the rest."""
    pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": True}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
