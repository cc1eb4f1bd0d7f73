"""Calls that load and unload a model, which a master sends to the worker that has it.

They are calls like all others, so that they wait, are cancelled and fail like these, on any node. Their kind is one
that no model and no endpoint has, so no client can make one. Nodes of earlier versions refuse them for that reason.
"""

from __future__ import annotations

import json

import trio

from ..core.answer import Data, Done, Head
from ..core.call import Call
from ..core.model_state import LOAD
from ..core.request import Request
from ..errors import ApiError, ModelNotOnDemand
from ..on_demand.residents import OnDemand
from ..options import ClusterServerOptions
from .pool import HandlerPool
from .task import CallTask

__all__ = ["open_control"]


def open_control(pool: HandlerPool, request: Request) -> Call:
    """Open a call that loads or unloads a model of this process. Synchronous.

    Its answer is a JSON object with the name of the model and its state.

    Args:
        pool: where it runs; it takes no slot.
        request: its endpoint says what is to be done: :data:`LOAD` or :data:`UNLOAD`.

    Raises:
        ShuttingDown: the pool is not being served.
    """

    def make_task(call: Call, scope: trio.CancelScope, options: ClusterServerOptions) -> CallTask:
        return _ControlTask(call, scope, options, pool.on_demand)

    return pool.start(request, make_task, None)


class _ControlTask(CallTask):
    def __init__(
        self, call: Call, scope: trio.CancelScope, options: ClusterServerOptions, on_demand: OnDemand
    ) -> None:
        super().__init__(call, scope, options)
        self._on_demand = on_demand

    async def prepare(self) -> None:
        """See ``CallTask``."""

    async def work(self) -> None:
        """See ``CallTask``."""
        # A start and a stop have time limits of their own.
        self.pause_idle_timer()
        request = self.call.request
        try:
            tenancy = self._on_demand.by_model.get(request.model)
            if tenancy is None:
                raise ModelNotOnDemand(request.model)
            if request.endpoint == LOAD:
                await self._on_demand.load(tenancy, self.call.set_model_wait)
            else:
                await self._on_demand.unload(tenancy)
        except ApiError as error:
            self.fail(error)
            return
        if self.call.ended:
            return
        state = self._on_demand.live_states.get(request.model)
        answer = {"model": request.model, "state": "cold" if state is None else state.state}
        self.call.put(Head(200, "application/json"))
        self.call.put(Data(json.dumps(answer).encode()))
        self.call.put(Done())
