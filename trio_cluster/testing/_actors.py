"""The models of a schedule: handlers that do what the request tells them, and the record of all that they did.

A :class:`Run` is one handler running once. The laws about handlers are laws about runs: how many there may be for a
request, where, and for how long after their client has gone.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import attrs
import trio

from ..errors import ApiError
from ..local.adapters import Provider
from ._history import History
from ._plan import Model
from ._scripts import Script, ScriptedFailure, read_script

__all__ = ["Actors", "Run"]


@attrs.define(eq=False)
class Run:
    """A handler that runs, or ran.

    Attributes:
        script: what it was told.
        model: of which model.
        node: on which machine.
        life: in which process there; each process has a number of its own.
        began, ended: when, in seconds since the schedule began.
        given: how many pieces of output the node has taken from it.
        stopped: it was made to end.
    """

    script: Script
    model: str
    node: str
    life: int
    began: float
    ended: float = math.inf
    given: int = 0
    stopped: bool = False


class Actors:
    """All models of all nodes.

    Attributes:
        runs: all that there have been, in the order in which they began.
        busy: for each process that ever was, how many handlers run there.
        most: for each machine, the most handlers that have run there at a time since it was last set to 0.
    """

    def __init__(self, history: History) -> None:
        self.runs: list[Run] = []
        self.busy: dict[int, int] = {}
        self.most: dict[str, int] = {}
        self._history = history

    def runs_of(self, number: int) -> list[Run]:
        """Return the runs for a request."""
        return [run for run in self.runs if run.script.number == number]

    def handler(self, model: Model, node: str, life: int) -> Callable[..., Any]:
        """Return the handler of a model in one process."""

        async def play(request: Any) -> AsyncGenerator[Any, None]:  # noqa: ASYNC900  (one shape of handlers)
            script = read_script(_text_of(request, model.kind))
            run = self._begin(script, model.name, node, life)
            done = False
            try:
                await trio.sleep(script.first_after)
                for index in range(script.pieces):
                    await self._disturb(script, index)
                    yield script.value(index)
                    run.given += 1
                    await trio.sleep(script.interval)
                await self._disturb(script, script.pieces)
                done = True
            except (ApiError, ScriptedFailure):
                done = True
                raise
            finally:
                run.stopped = not done
                if script.clings and not done:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(script.clings)
                self._end(run)

        async def push(request: Any, provider: Provider) -> None:
            async with aclosing(play(request)) as pieces:
                async for piece in pieces:
                    await provider.push(piece)

        return play if model.yields else push

    @staticmethod
    async def _disturb(script: Script, index: int) -> None:
        if script.stalls_at == index:
            await trio.sleep(script.stall)
        if script.fails is not None and script.fails_at == index:
            if script.fails == "told":
                raise ApiError(429, "as it was told", code="scripted")
            raise ScriptedFailure

    def _begin(self, script: Script, model: str, node: str, life: int) -> Run:
        run = Run(script, model, node, life, self._history.now)
        self.runs.append(run)
        self.busy[life] = self.busy.get(life, 0) + 1
        running = sum(1 for each in self.runs if each.node == node and each.ended == math.inf)
        self.most[node] = max(self.most.get(node, 0), running)
        self._history.note(f"{node}: handler of {model} begins with request {script.number}")
        return run

    def _end(self, run: Run) -> None:
        run.ended = self._history.now
        self.busy[run.life] -= 1
        self._history.note(
            f"{run.node}: handler of {run.model} ends with request {run.script.number}, "
            f"{run.given}/{run.script.pieces} given{', stopped' if run.stopped else ''}"
        )


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
