"""The models of a schedule: handlers that do what the request tells them, and a record of everything they did.

A :class:`HandlerRun` is one handler running once. The invariants about handlers are invariants about runs: how many
there may be for one request, on which nodes, and for how long after their client has gone.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import attrs
import trio

from ..errors import ApiError, UpstreamLost
from ..local.adapters import Provider
from ._history import History
from ._plan import ModelSpec
from ._scripted_residents import ResidentRun, ScriptedResidents
from ._scripts import Script, ScriptedFailure, read_script

__all__ = ["HandlerRun", "ScriptedModels", "Trouble"]


@attrs.define(eq=False)
class HandlerRun:
    """A handler that runs, or ran.

    Attributes:
        script: what the request told it to do.
        model: the name of its model.
        node: the machine it ran on.
        process: the number of the process it ran in; every process has a number of its own.
        began, ended: when, in seconds since the schedule began; ``ended`` is infinite while it runs.
        given: how many pieces of output the node has taken from it.
        stopped: it was cancelled before its script was over.
        failed: it failed, as its script or a trouble of its replica demanded. A refusal (4xx) is no failure.
        retry_after: seconds after which its replica asked to be tried again; 0 if it did not.
    """

    script: Script
    model: str
    node: str
    process: int
    began: float
    ended: float = math.inf
    given: int = 0
    stopped: bool = False
    failed: bool = False
    retry_after: float = 0.0


@attrs.define
class Trouble:
    """What is wrong with one replica.

    Attributes:
        failures: how many of its calls fail; ``None``: they hang.
        status: with which status they fail.
        retry_after: the seconds of ``Retry-After`` that come with it; 0: there is none.
    """

    failures: int | None
    status: int = 500
    retry_after: float = 0.0


class ScriptedModels:
    """All models of all nodes.

    Attributes:
        runs: every run of a handler so far, in the order in which they began.
        busy: how many handlers run in each process, by its number; includes processes that have ended.
        troubles: what is wrong with replicas, by node and model.
        peak: the largest number of handlers that ran on each machine at the same time, since it was last cleared.
        residents: the models on demand.
    """

    def __init__(self, history: History, residents: ScriptedResidents) -> None:
        self.residents = residents
        self.runs: list[HandlerRun] = []
        self.busy: dict[int, int] = {}
        self.peak: dict[str, int] = {}
        self.troubles: dict[tuple[str, str], Trouble] = {}
        self._history = history

    def runs_of(self, number: int) -> list[HandlerRun]:
        """Return the runs for the request with this number."""
        return [run for run in self.runs if run.script.number == number]

    def handler(self, model: ModelSpec, node: str, process: int) -> Callable[..., Any]:
        """Return the handler of a model in one process."""

        async def play(request: Any) -> AsyncGenerator[Any, None]:  # noqa: ASYNC900  (one shape of handlers)
            script = read_script(_text_of(request, model.kind))
            run = self._begin(script, model.name, node, process)
            done = False
            try:
                resident = self._resident_of(run)
                await self._suffer(run)
                await _sleep(script.first_after, resident)
                for index in range(script.pieces):
                    await self._stall_or_fail(script, index, resident)
                    yield script.value(index)
                    run.given += 1
                    await _sleep(script.interval, resident)
                await self._stall_or_fail(script, script.pieces, resident)
                done = True
            except (ApiError, ScriptedFailure) as error:
                done = True
                run.failed = not isinstance(error, ApiError) or error.status >= 500
                raise
            finally:
                run.stopped = not done
                if script.ignore_cancellation_for and not done:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(script.ignore_cancellation_for)
                self._end(run)

        async def push(request: Any, provider: Provider) -> None:
            async with aclosing(play(request)) as pieces:
                async for piece in pieces:
                    await provider.push(piece)

        return play if model.yields else push

    async def _suffer(self, run: HandlerRun) -> None:
        """Fail or hang if something is wrong with the replica of a run."""
        trouble = self.troubles.get((run.node, run.model))
        if trouble is None or trouble.failures == 0:
            return
        if trouble.failures is None:
            await trio.sleep_forever()
        else:
            trouble.failures -= 1
            run.retry_after = trouble.retry_after
            raise ApiError(
                trouble.status,
                "the replica fails",
                code="replica_failing",
                retry_after=trouble.retry_after or None,
            )

    def _resident_of(self, run: HandlerRun) -> ResidentRun | None:
        """Return what a handler runs on, if its model is one on demand; and check that it can."""
        if not self.residents.is_on_demand(run.model):
            return None
        resident = self.residents.run_of(run.process, run.model)
        if resident is not None and self.residents.has_died(resident):
            # It was ready when the call came. A server whose program has died says so.
            raise UpstreamLost(run.model, "it has died")
        if resident is None or not resident.is_ready:
            self._history.add_violation(f"{run.node}: a handler of {run.model} begins, which is not ready")
        return resident

    def handlers_on(self, process: int, model: str) -> int:
        """Return how many handlers of a model run in a process."""
        return sum((run.process, run.model, run.ended) == (process, model, math.inf) for run in self.runs)

    @staticmethod
    async def _stall_or_fail(script: Script, index: int, resident: ResidentRun | None) -> None:
        if script.stalls_at == index:
            await _sleep(script.stall, resident)
        if script.fails is not None and script.fails_at == index:
            if script.fails == "api_error":
                raise ApiError(429, "the script says so", code="scripted")
            raise ScriptedFailure

    def _begin(self, script: Script, model: str, node: str, process: int) -> HandlerRun:
        run = HandlerRun(script, model, node, process, self._history.now)
        self.runs.append(run)
        self.busy[process] = self.busy.get(process, 0) + 1
        running = sum(1 for each in self.runs if each.node == node and each.ended == math.inf)
        self.peak[node] = max(self.peak.get(node, 0), running)
        self._history.log(f"{node}: handler of {model} begins with request {script.number}")
        return run

    def _end(self, run: HandlerRun) -> None:
        run.ended = self._history.now
        self.busy[run.process] -= 1
        self._history.log(
            f"{run.node}: handler of {run.model} ends with request {run.script.number}, "
            f"{run.given}/{run.script.pieces} given{', stopped' if run.stopped else ''}"
        )


async def _sleep(seconds: float, resident: ResidentRun | None) -> None:
    """Sleep, unless what the handler runs on dies."""
    if resident is None:
        await trio.sleep(seconds)
        return
    with trio.move_on_after(seconds):
        await resident.died.wait()
        raise UpstreamLost(resident.spec.model, "it has died")


def _text_of(request: Any, kind: str) -> str:
    match kind:
        case "chat":
            text = request.last_text
        case "embedding":
            text = request.inputs[0]
        case "asr":
            text = request.audio.decode()
        case "tts":
            text = request.input
        case _:
            text = request.prompt
    return str(text)
