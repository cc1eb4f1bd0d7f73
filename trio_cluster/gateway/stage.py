"""The interface of the gateway's stages."""

from __future__ import annotations

from typing import Protocol

from .context import RequestContext

__all__ = ["Stage"]


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
