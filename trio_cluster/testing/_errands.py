"""The clients of a schedule: each makes one request in its own manner, and remembers exactly how it ended."""

from __future__ import annotations

from typing import Final, Literal

import attrs
import trio

from ._client import SimulatedClient, StreamingAnswer
from ._history import History
from ._network import SimulatedNetwork
from ._plan import Errand

__all__ = ["SLOW_READS", "Outcome", "run_errand"]

#: Reads after which a slow client goes on at full speed; without an end to it nothing could be said about time.
SLOW_READS: Final = 6

#: How an errand ended: with an answer, be it complete or not; the client left; there was no answer, because nobody
#: was there or because the connection was lost; nothing happened for longer than it may.
Ending = Literal["answered", "left", "refused", "lost", "overdue"]


@attrs.define(eq=False)
class Outcome:
    """What became of an errand.

    Attributes:
        errand: which.
        began, ended: when, in seconds since the schedule began.
        ending: how.
        status: of the answer, 0 if there was none.
        content_type: of the answer.
        body: of the answer, as far as it came.
        complete: the body ended as HTTP says that it ends.
        verdict: one word for the statistics; filled in by those who judge it.
    """

    errand: Errand
    began: float
    ended: float
    ending: Ending
    status: int = 0
    content_type: str = ""
    body: bytes = b""
    complete: bool = False
    verdict: str = ""


async def run_errand(
    errand: Errand, network: SimulatedNetwork, history: History, port: int, bound: float
) -> Outcome:
    """Run an errand, and return what became of it.

    Args:
        errand: what to do.
        network: where the client and ``master`` are.
        history: where the time is kept.
        port: the master's.
        bound: seconds after which the client gives up, which then is an ``overdue`` answer.
    """
    began = history.now
    answers: list[StreamingAnswer] = []
    ending: Ending = "answered"
    leaves = errand.manner in ("leaves", "resets")
    with trio.move_on_after(min(errand.patience, bound) if leaves else bound) as waiting:
        try:
            if errand.manner == "aborts upload":
                await _abort_upload(errand, network, port)
                ending = "left"
            else:
                await _ask(errand, network, port, answers)
        except ConnectionRefusedError:
            ending = "refused"
        except ConnectionResetError:
            ending = "lost"
    if waiting.cancelled_caught:
        ending = "left" if leaves else "overdue"
        if errand.manner == "resets":
            for connection in network.connections_of(errand.host):
                connection.client_stream.close(reset=True)
    outcome = Outcome(errand, began, history.now, ending)
    for answer in answers:
        outcome.status = answer.status
        outcome.content_type = answer.headers.get("content-type", "")
        outcome.body = answer.received
        outcome.complete = answer.complete
    return outcome


async def _ask(errand: Errand, network: SimulatedNetwork, port: int, answers: list[StreamingAnswer]) -> None:
    path, body, content_type = errand.script.request(errand.model, stream=errand.stream, route=errand.route)
    headers = {"content-type": content_type, "x-request-id": f"r{errand.number}"}
    if errand.budget is not None:
        headers["x-request-timeout"] = str(errand.budget)
    if errand.listens is not None:
        headers["x-stainless-read-timeout"] = str(errand.listens)
    client = SimulatedClient(network.host(errand.host), "master", port)
    async with client.open("POST", path, body, headers=headers) as answer:
        answers.append(answer)
        try:
            for _ in range(SLOW_READS if errand.manner == "reads slowly" else 0):
                await answer.receive()
                await trio.sleep(errand.patience)
        except trio.EndOfChannel:
            return
        await answer.finish()


async def _abort_upload(errand: Errand, network: SimulatedNetwork, port: int) -> None:
    path, body, content_type = errand.script.request(errand.model, stream=errand.stream, route=errand.route)
    stream = await network.host(errand.host).connect("master", port)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: master\r\ncontent-type: {content_type}\r\n"
        f"content-length: {len(body)}\r\nx-request-id: r{errand.number}\r\n\r\n"
    )
    try:
        await stream.send_all(head.encode() + body[: len(body) // 2])
        await trio.sleep(errand.patience)
    except trio.BrokenResourceError:
        pass
    finally:
        stream.close(reset=errand.number % 2 == 0)
