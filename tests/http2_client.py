"""A client for HTTP/2 with prior knowledge, frame by frame: it reads and grants credit when a test says so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import h2.config
import h2.connection
import h2.events
import h2.settings
import trio

__all__ = ["Http2Answer", "Http2Client", "connect_http2"]


@attrs.define
class Http2Answer:
    """An answer, as far as it has come.

    Attributes:
        ended: it has ended as HTTP says that an answer ends.
        reset: the error code with which its stream was reset.
    """

    status: int = 0
    headers: dict[str, str] = attrs.field(factory=dict)
    body: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


class Http2Client:
    """One connection.

    Attributes:
        answers: by the number of their stream.
        closed: the server has closed the connection.
        grants: whether credit is given back for what has come.
        goodbyes: the last stream that the server processes, as each ``GOAWAY`` has said.
    """

    def __init__(self, stream: trio.SocketStream, *, window: int, upgrade: bool = False) -> None:
        self.stream = stream
        self.answers: dict[int, Http2Answer] = {}
        self.closed = False
        self.grants = True
        self.goodbyes: list[int] = []
        self._received = bytearray()
        self.protocol = h2.connection.H2Connection(
            config=h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        )
        # Known to be acknowledged: the server has them before it has any request.
        self.protocol.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        if not upgrade:
            self.protocol.initiate_connection()

    async def send(self) -> None:
        """Send what the protocol has to say."""
        with trio.fail_after(5):
            await self.stream.send_all(self.protocol.data_to_send())

    async def ask(
        self, method: str, path: str, body: bytes | None = None, *, ends: bool = True, **headers: str
    ) -> int:
        """Send a request, or the beginning of one; return its number."""
        number = self.protocol.get_next_available_stream_id()
        fields = [(":method", method), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
        if body is not None and "content_type" not in headers:
            fields.append(("content-type", "application/json"))
        fields += [(name.replace("_", "-"), value) for name, value in headers.items()]
        self.answers[number] = Http2Answer()
        self.protocol.send_headers(number, fields, end_stream=body is None and ends)
        if body is not None:
            size = self.protocol.max_outbound_frame_size
            for start in range(0, max(len(body), 1), size):
                last = start + size >= len(body)
                self.protocol.send_data(number, body[start : start + size], end_stream=last and ends)
        await self.send()
        return number

    async def post(self, value: Any, **headers: str) -> int:
        return await self.ask("POST", "/v1/chat/completions", json.dumps(value).encode(), **headers)

    async def upload(self, number: int, data: bytes) -> None:
        """Send the rest of a request, as fast as the server gives credit for it."""
        while data:
            size = min(
                self.protocol.local_flow_control_window(number),
                self.protocol.max_outbound_frame_size,
                len(data),
            )
            if size:
                self.protocol.send_data(number, data[:size], end_stream=size == len(data))
                data = data[size:]
                await self.send()
            else:
                await self.receive()

    async def reset(self, number: int) -> None:
        """Cancel a request."""
        self.protocol.reset_stream(number, error_code=8)
        await self.send()

    async def receive(self) -> None:
        """Take in what comes next."""
        with trio.fail_after(5):
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
        self.closed = not data
        for event in self.protocol.receive_data(self._without_goodbyes(data)) if data else ():
            self._take(event)
        if not self.closed:
            await self.send()

    def _without_goodbyes(self, data: bytes) -> bytes:
        """Take ``GOAWAY`` frames out: for h2 a connection is over with the first one, though its streams go on."""
        self._received += data
        kept = b""
        while len(self._received) >= 9:
            end = 9 + int.from_bytes(self._received[:3], "big")
            if len(self._received) < end:
                break
            frame, self._received = bytes(self._received[:end]), self._received[end:]
            if frame[3] == 7:
                self.goodbyes.append(int.from_bytes(frame[9:13], "big"))
            else:
                kept += frame
        return kept

    async def until(self, number: int, mark: bytes) -> None:
        """Receive until ``mark`` is in the body of an answer."""
        while mark not in self.answers[number].body:
            assert not self.closed, self.answers[number]
            await self.receive()

    async def answer(self, number: int) -> Http2Answer:
        """Receive until an answer is over, whatever way."""
        answer = self.answers[number]
        while not (answer.ended or answer.reset is not None or self.closed):
            await self.receive()
        return answer

    def _take(self, event: Any) -> None:
        answer = self.answers.get(getattr(event, "stream_id", 0) or 0)
        if isinstance(event, h2.events.ResponseReceived):
            assert answer is not None
            answer.headers = dict(event.headers)
            answer.status = int(answer.headers[":status"])
        elif isinstance(event, h2.events.DataReceived):
            assert answer is not None
            answer.body += event.data
            if self.grants:
                self.protocol.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            assert answer is not None
            answer.ended = True
        elif isinstance(event, h2.events.StreamReset):
            assert answer is not None
            answer.reset = int(event.error_code)


@asynccontextmanager
async def connect_http2(
    port: int, *, window: int = 65535, upgrade: bool = False
) -> AsyncIterator[Http2Client]:
    """Connect to a server on this machine.

    Args:
        port: the server's.
        window: bytes of an answer that may come before credit is given back.
        upgrade: the test begins the connection, with a request in HTTP/1.1.
    """
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    try:
        client = Http2Client(stream, window=window, upgrade=upgrade)
        await client.send()
        yield client
    finally:
        stream.socket.close()
