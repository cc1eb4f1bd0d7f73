"""The workload of a schedule: clients that send one request each, with a behaviour, and record how it ended."""

from __future__ import annotations

from typing import Final, Literal

import attrs
import trio

from ._client import SimulatedClient, StreamingResponse
from ._history import History
from ._network import SimulatedNetwork
from ._plan import SimulatedRequest

__all__ = ["SLOW_READS", "Outcome", "send_request"]

#: Reads after which a slow client continues at full speed. Without a limit, no bound on time could be stated.
SLOW_READS: Final = 6

#: How a request ended. ``answered``: with a response, complete or not. ``left``: the client left. ``refused``: nothing
#: listened. ``lost``: the connection was lost before the response. ``overdue``: no end within the bound.
Ending = Literal["answered", "left", "refused", "lost", "overdue"]


@attrs.define(eq=False)
class Outcome:
    """How a request ended.

    Attributes:
        request: the request.
        began, ended: when, in seconds since the schedule began.
        ending: how.
        status: of the response, 0 if there was none.
        content_type: of the response.
        body: of the response, as far as it was received.
        complete: the body ended as its HTTP framing says.
        verdict: one word for the statistics; set by the checker.
    """

    request: SimulatedRequest
    began: float
    ended: float
    ending: Ending
    status: int = 0
    content_type: str = ""
    body: bytes = b""
    complete: bool = False
    verdict: str = ""


async def send_request(
    request: SimulatedRequest, network: SimulatedNetwork, history: History, port: int, bound: float
) -> Outcome:
    """Send a request as its client behaves, and return how it ended.

    Args:
        request: what to send, and how to behave.
        network: where the client and ``master`` are.
        history: the clock of the schedule.
        port: the master's.
        bound: seconds after which the client stops waiting; the outcome then is ``overdue``.
    """
    began = history.now
    responses: list[StreamingResponse] = []
    ending: Ending = "answered"
    leaves = request.behavior in ("leaves", "resets")
    with trio.move_on_after(min(request.delay, bound) if leaves else bound) as waiting:
        try:
            if request.behavior == "aborts upload":
                await _abort_upload(request, network, port)
                ending = "left"
            else:
                await _receive_response(request, network, port, responses)
        except ConnectionRefusedError:
            ending = "refused"
        except ConnectionResetError:
            ending = "lost"
    if waiting.cancelled_caught:
        ending = "left" if leaves else "overdue"
        if request.behavior == "resets":
            for connection in network.connections_of(request.host):
                connection.client_stream.close(reset=True)
    outcome = Outcome(request, began, history.now, ending)
    for response in responses:
        outcome.status = response.status
        outcome.content_type = response.headers.get("content-type", "")
        outcome.body = response.received
        outcome.complete = response.complete
    return outcome


async def _receive_response(
    request: SimulatedRequest, network: SimulatedNetwork, port: int, responses: list[StreamingResponse]
) -> None:
    path, body, content_type = request.script.request(
        request.asked, stream=request.stream, route=request.route
    )
    headers = {"content-type": content_type, "x-request-id": f"r{request.number}"}
    if request.total_timeout is not None:
        headers["x-request-timeout"] = str(request.total_timeout)
    if request.idle_timeout is not None:
        headers["x-stainless-read-timeout"] = str(request.idle_timeout)
    client = SimulatedClient(network.host(request.host), request.master, port)
    async with client.open("POST", path, body, headers=headers) as response:
        responses.append(response)
        try:
            for _ in range(SLOW_READS if request.behavior == "reads slowly" else 0):
                await response.receive()
                await trio.sleep(request.delay)
        except trio.EndOfChannel:
            return
        await response.finish()


async def _abort_upload(request: SimulatedRequest, network: SimulatedNetwork, port: int) -> None:
    path, body, content_type = request.script.request(
        request.asked, stream=request.stream, route=request.route
    )
    stream = await network.host(request.host).connect(request.master, port)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\n"
        f"content-length: {len(body)}\r\nx-request-id: r{request.number}\r\n\r\n"
    )
    try:
        await stream.send_all(head.encode() + body[: len(body) // 2])
        await trio.sleep(request.delay)
    except trio.BrokenResourceError:
        pass
    finally:
        stream.close(reset=request.number % 2 == 0)
