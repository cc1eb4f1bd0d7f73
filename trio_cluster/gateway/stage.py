"""The interface of the gateway's stages, and the pipeline that they form."""

from __future__ import annotations

from typing import Protocol

import attrs

from ..http1.asgi import App
from .context import RequestContext
from .node_context import NodeContext

__all__ = ["HasRoute", "Pipeline", "Stage"]


class Stage(Protocol):
    """One step that a request passes. The stages run one after the other, in the task of the request.

    A stage may wait, for instance for a database. It puts what it finds out into the context, for the stages after it.
    """

    async def admit(self, context: RequestContext) -> None:
        """Return to let a request pass.

        Raises:
            ApiError: the request is refused; later stages do not see it.
        """
        ...


class HasRoute(Protocol):
    """Tells whether an application has a path."""

    def __call__(self, path: str, method: str | None = None, /) -> bool:
        """Return whether it has ``path`` for ``method``; without that, for any method."""
        ...


@attrs.define
class Pipeline:
    """The stages of a gateway, and the application behind them."""

    node_context: NodeContext
    admission: tuple[Stage, ...]
    """The stages that every request passes before its body is read."""
    dispatch: tuple[Stage, ...]
    """The stages that a request for a model passes after that; the last one opens the call."""
    limited_dispatch: tuple[Stage, ...]
    """The same for the requests of a key that has limits."""
    app: App
    """The ASGI application that answers requests that are not for a model."""
    has_route: HasRoute
    """Returns whether the application has a path; with a method, whether it has it for that one."""
