"""What a stage of the gateway is."""

from __future__ import annotations

from typing import Protocol

from .context import RequestContext

__all__ = ["Stage"]


class Stage(Protocol):
    """One step of admission. Stages run one after the other, each in the task of the request.

    A stage may wait, for instance for a database. Whatever it finds out goes into the context, for the stages behind it.
    """

    async def admit(self, context: RequestContext) -> None:
        """Let a request pass.

        Raises:
            ApiError: the request is refused; no later stage sees it.
        """
        ...
