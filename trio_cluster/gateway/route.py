"""The route stage: opens the call that answers a request, and forwards a body that is still arriving."""

from __future__ import annotations

from functools import partial

import trio

from ..core import clock
from ..core.channel import ByteChannel
from .context import RequestContext
from .deadlines import ResponseDeadlines
from .node_context import NodeContext

__all__ = ["Route"]


class Route:
    """Opens the call, and forwards the rest of a large form to its backend. See ``Stage``.

    Args:
        node_context: the node, for its router.
    """

    def __init__(self, node_context: NodeContext) -> None:
        self._node_context = node_context

    async def admit(self, context: RequestContext) -> None:
        """See ``Stage``. The call belongs to the context, also if this is cancelled.

        Raises:
            ApiError: no replica can answer; the rest of a form is malformed or names another model; or the
                body is too large, does not arrive in time, or is not taken in time.
            ClientLeft: the client disconnected in the middle of its body.
        """
        request, router = context.request, self._node_context.router
        for listener in router.observers.admitted:
            listener(request)
        context.deadlines = ResponseDeadlines(
            request.idle_timeout, request.total_timeout, trio.current_time()
        )
        context.add_call(router.open(request))
        self._node_context.begin_answer(context)
        if request.upload is not None:
            await _forward_upload(context, request.upload)
            context.uploaded_at = clock.now()
            assert context.spool is not None
            context.spool.close()


async def _forward_upload(context: RequestContext, upload: ByteChannel) -> None:
    """Forward a body as it arrives, until it is complete or the backend takes no more of it.

    If an answer begins meanwhile, it is sent afterwards. Usually it is an error, and then the backend takes no more.
    """
    body, spool, peek, rewriter = (
        context.request_body,
        context.spool,
        context.form_peek,
        context.form_rewriter,
    )
    assert spool is not None
    assert peek is not None
    with trio.CancelScope() as scope:
        upload.on_close(partial(scope.cancel, reason="the backend takes no more of this body"))
        while data := await spool.take():
            if rewriter is not None and not (data := rewriter.feed(data)):
                continue
            upload.put(data)
            await _wait_for_room(context, upload)
        while not body.complete:
            data = await body.next()
            peek.feed(data)
            if rewriter is not None:
                data = rewriter.feed(data) + (rewriter.end() if body.complete else b"")
                if not data:
                    continue
            upload.put(data, last=body.complete)
            await _wait_for_room(context, upload)
        if not upload.complete:
            upload.put(b"" if rewriter is None else rewriter.end(), last=True)


async def _wait_for_room(context: RequestContext, upload: ByteChannel) -> None:
    """Wait until a channel has room for more of a body; time the call out if the backend takes nothing for too long.

    Raises:
        TooSlow: a deadline has passed.
    """
    began = since = last_consumed = trio.current_time()

    def on_consumed(_: int) -> None:
        nonlocal last_consumed
        last_consumed = trio.current_time()

    upload.on_consumed(on_consumed)
    while True:
        with trio.move_on_at(context.deadlines.expires_at(since)):
            await upload.wait_room()
            context.request_body.extend_deadline(trio.current_time() - began)
            return
        if last_consumed <= since:
            raise context.deadlines.time_out(context.call)
        since = last_consumed
