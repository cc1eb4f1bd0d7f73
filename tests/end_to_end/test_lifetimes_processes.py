"""The law of lifetimes with real processes, real sockets and real signals: those rows that a kernel takes part in."""

from __future__ import annotations

import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import patience
import pytest
import trio
from nodes import Node, Nodes
from served import until
from test_processes import ask, models_become, open_stream, request

pytestmark = pytest.mark.processes

#: So that a silence of seconds is one.
IMPATIENT = ("--worker-timeout", "1.5", "--heartbeat-interval", "0.3")


class Wire:
    """What is between a worker and its master, and can be broken.

    Attributes:
        port: to connect to in place of the master's.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        # Of the latest connection, and of one that has fallen silent; the next one is not, and may come before its end.
        self._ends: list[trio.SocketStream] = []
        self._silent: list[trio.SocketStream] | None = None

    async def join(self, near: trio.SocketStream, master: int) -> None:
        """Join a connection with one to the master's port, until either end is closed."""
        async with near, await trio.open_tcp_stream("127.0.0.1", master) as far:
            self._ends = ends = [near, far]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, near, far, ends)
                nursery.start_soon(self._pump, far, near, ends)

    def end(self) -> None:
        """Close both connections."""
        for stream in self._ends:
            stream.socket.close()

    def reset(self) -> None:
        """Reset both connections."""
        for stream in self._ends:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.end()

    def fall_silent(self) -> None:
        """Swallow everything from now on, and keep the connections open."""
        self._silent = self._ends

    async def _pump(
        self, source: trio.SocketStream, sink: trio.SocketStream, ends: list[trio.SocketStream]
    ) -> None:
        try:
            while data := await source.receive_some():
                if ends is not self._silent:
                    await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        # Whoever is silent does not pass an end on either; the other one has to find out by himself.
        if ends is not self._silent:
            for stream in ends:
                stream.socket.close()


@asynccontextmanager
async def wire_to(master: Node) -> AsyncIterator[Wire]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    wire = Wire(listener.socket.getsockname()[1])

    async def serve(stream: trio.SocketStream) -> None:
        await wire.join(stream, master.port + 1000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield wire
        nursery.cancel_scope.cancel()


async def calls_are(master: Node, **expected: int) -> None:
    """Wait until a master counts so many calls."""

    async def are() -> bool:
        calls = (await request(master, "GET", "/cluster/status")).json()["calls"]
        return expected.items() <= calls.items()

    await until(are, within=2)


async def notes_are(nodes: Nodes, expected: list[str]) -> None:
    await until(lambda: nodes.notes() == expected, within=2)


async def test_a_client_that_resets_in_the_middle_of_its_upload_leaves_nothing_behind(nodes: Nodes) -> None:
    master = await nodes.master()
    await nodes.worker(master, "w", models="m")
    for reset in (False, True):
        stream = await trio.open_tcp_stream("127.0.0.1", master.port)
        await stream.send_all(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 500_000
        )
        if reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()
    assert (await ask(master, "m")).status_code == 200
    await calls_are(master, admitted=1, completed=1, in_flight=0)
    assert nodes.notes() == ["m finished"]


async def test_a_client_that_resets_its_stream_stops_a_handler_in_another_process(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    master = await nodes.master()
    await nodes.worker(master, "w", models="m")
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": true, "ticks": 10000}'
    for reset in (False, True):
        stream = await trio.open_tcp_stream("127.0.0.1", master.port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: %d\r\n\r\n" % len(body)
        await stream.send_all(head + body)
        await stream.receive_some()
        if reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()
        await notes_are(nodes, ["m cancelled"] * (1 + reset))
    await calls_are(master, admitted=2, cancelled=2, in_flight=0)


async def test_a_worker_that_froze_before_the_first_output_is_a_502_within_its_timeout(nodes: Nodes) -> None:
    master = await nodes.master(*IMPATIENT)
    worker = await nodes.worker(master, "w", *IMPATIENT, models="m")
    worker.send(signal.SIGSTOP)
    try:
        with patience.fail_after(3):
            answer = await ask(master, "m")
    finally:
        worker.send(signal.SIGCONT)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "worker_lost"
    await calls_are(master, admitted=1, worker_lost=1, in_flight=0)
    await models_become(master, {"m"}, within=5)


async def test_a_call_whose_worker_froze_before_the_first_output_is_answered_by_another_one(
    nodes: Nodes,
) -> None:
    master = await nodes.master(*IMPATIENT, "--on-conflict", "replicate")
    first = await nodes.worker(master, "w1", *IMPATIENT, models="who")
    second = await nodes.worker(master, "w2", *IMPATIENT, models="who")
    first.send(signal.SIGSTOP)
    try:
        with trio.fail_after(5):
            answers = [await ask(master, "who") for _ in range(2)]
    finally:
        first.send(signal.SIGCONT)
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {
        str(second.process.pid)
    }
    await calls_are(master, completed=2, worker_lost=1, retried=1, in_flight=0)


@pytest.mark.parametrize("fault", [Wire.end, Wire.reset, Wire.fall_silent], ids=["FIN", "RST", "silence"])
async def test_a_link_that_is_lost_fails_its_streams_and_stops_their_handlers(
    nodes: Nodes, nursery: trio.Nursery, fault: object
) -> None:
    assert callable(fault)
    master = await nodes.master(*IMPATIENT, "--resume-window", "0")
    async with wire_to(master) as wire:
        await nodes.worker(master, "w", *IMPATIENT, "--internal-port", str(wire.port), models="m")
        stream = await open_stream(nursery, master, "m", ticks=10000)
        fault(wire)
        bound = 1.5 + 1 if fault is Wire.fall_silent else 1
        failed = await stream.end(within=bound)
        assert failed.report.ending == "failed"
        assert failed.report.error is not None
        assert failed.report.error["code"] == "worker_lost"
        await notes_are(nodes, ["m cancelled"])
        await models_become(master, {"m"}, within=5)
        assert (await ask(master, "m")).status_code == 200
        await calls_are(master, admitted=2, worker_lost=1, completed=1, in_flight=0)


@pytest.mark.parametrize("fault", [Wire.reset, Wire.fall_silent], ids=["RST", "silence"])
async def test_a_stream_goes_on_when_its_link_is_cut_again_and_again(
    nodes: Nodes, nursery: trio.Nursery, fault: object
) -> None:
    assert callable(fault)
    master = await nodes.master(*IMPATIENT)
    async with wire_to(master) as wire:
        await nodes.worker(master, "w", *IMPATIENT, "--internal-port", str(wire.port), models="m")
        stream = await open_stream(nursery, master, "m", ticks=60, pause=0.05)
        # A silence that follows the last one before that was noticed would be one long silence.
        for _ in range(3 if fault is Wire.reset else 1):
            await trio.sleep(0.4)
            fault(wire)
        ended = await stream.end(within=10)
        assert ended.report.ending == "finished"
        assert ended.report.text == "".join(f"{number} " for number in range(60))
        assert not [note for note in nodes.notes() if "cancelled" in note]
        await calls_are(master, admitted=1, completed=1, worker_lost=0, in_flight=0)
