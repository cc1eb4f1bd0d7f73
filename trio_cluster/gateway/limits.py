"""The limit stage: refuses requests that exceed a limit, before their body is read."""

from __future__ import annotations

from .body import too_large
from .context import RequestContext
from .node_context import NodeContext

__all__ = ["LimitSize"]


class LimitSize:
    """Refuses a body whose declared length is larger than ``max_body_size``. See ``Stage``.

    A body of unknown length is refused when it has become too large; see ``RequestBody``.

    Args:
        node_context: the node; its options are read for each request.
    """

    def __init__(self, node_context: NodeContext) -> None:
        self._node_context = node_context

    async def admit(self, context: RequestContext) -> None:
        """See ``Stage``."""
        length, limit = context.declared_length(), self._node_context.options.server.max_body_size
        if length is not None and length > limit:
            raise too_large(limit)
