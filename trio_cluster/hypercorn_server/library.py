"""What is used of hypercorn, all of it beyond its documentation. No other module of the package imports it.

The assumptions, to which ``tests/hypercorn_server/test_hypercorn_library.py`` holds the installed version:

1. ``TCPServer(app, config, context, state, stream).run()`` speaks HTTP/1.1 and HTTP/2 on one connection, and closes
   it. Of the stream it uses ``receive_some``, ``send_all``, ``send_eof``, ``aclose``, and the family and addresses of
   ``socket``. A stream without ``do_handshake`` is one without TLS; of one with it, the methods ``do_handshake`` and
   ``selected_alpn_protocol`` and the ``socket`` of ``transport_stream`` are used, too.
2. For each request it calls ``app(scope, receive, send, sync_spawn, call_soon)`` in a task of its own. ``receive``
   gives the body, and ``http.disconnect`` when the client has left or the answer has ended. What is not received holds
   up the reading of the whole connection.
3. ``WorkerContext(None)`` is what the connections of a server have in common. Once its ``terminated`` is set, idle ones
   close at once and the others when they become idle.
4. A request's ``send`` is a bound method of an ``HTTPStream``, whose ``send`` is, in HTTP/2, a bound method of the
   ``H2Protocol`` of its connection. That has the attributes ``connection`` (of the h2 library), ``stream_buffers`` and
   ``priority`` (by the number of a stream), ``has_data`` (an event that wakes its writing task) and ``send``.
5. What a request sends is pushed into the buffer of its stream; its end is ``set_complete()`` and ``drain()``. The
   writing task calls ``pop(limit)``, asks whether the buffer is ``complete``, and writes the end of the stream then. If
   ``pop`` raises ``h2.exceptions.StreamClosedError``, it closes the buffer and forgets the stream.
6. The ``protocol`` of a ``TCPServer`` is there from the beginning of ``run()``, and its own ``protocol`` is an
   ``H2Protocol`` as soon as the connection speaks HTTP/2.
7. The ``keep_alive_requests`` of an ``H2Protocol`` counts the streams of the connection. It counts each when the stream
   is made; the task in which ``app`` is called begins later.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import h2.exceptions
from h2.errors import ErrorCodes
from hypercorn.config import Config
from hypercorn.events import RawData
from hypercorn.protocol.h2 import BufferCompleteError, H2Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hyperframe.frame import GoAwayFrame

from ..http1.asgi import Send

__all__ = [
    "BufferCompleteError",
    "Config",
    "ConnectionState",
    "H2Protocol",
    "RawData",
    "TCPServer",
    "WorkerContext",
    "announce_goodbye",
    "count_streams",
    "http2_stream",
    "say_goodbye",
]

#: The largest number that a stream can have.
_LAST_STREAM: Final = 2**31 - 1


def http2_stream(send: Send) -> tuple[H2Protocol, int]:
    """Return the connection and the number of the stream to which the ``send`` of an HTTP/2 request writes."""
    stream = getattr(send, "__self__", None)
    assert isinstance(stream, HTTPStream)
    protocol = getattr(stream.send, "__self__", None)
    assert isinstance(protocol, H2Protocol)
    return protocol, stream.stream_id


def count_streams(server: TCPServer) -> int:
    """Return how many streams an HTTP/2 connection has had; 0 if it is none. Synchronous."""
    protocol = _http2_protocol(server)
    return 0 if protocol is None else protocol.keep_alive_requests


async def announce_goodbye(server: TCPServer) -> None:
    """Ask the client of an HTTP/2 connection to send no more requests on it. A checkpoint.

    Those that are under way are processed, as those that have begun (RFC 9113, 6.8). The library h2 knows only a
    ``GOAWAY`` that ends everything, so it is not asked.
    """
    protocol = _http2_protocol(server)
    assert protocol is not None
    frame = GoAwayFrame(0, last_stream_id=_LAST_STREAM, error_code=ErrorCodes.NO_ERROR)
    await protocol.send(RawData(frame.serialize()))


async def say_goodbye(server: TCPServer) -> None:
    """Announce the end of an HTTP/2 connection, which has no requests. A checkpoint.

    Requests that the client has sent meanwhile are not processed; it knows that from the frame (``GOAWAY``).
    """
    protocol = _http2_protocol(server)
    assert protocol is not None
    with suppress(h2.exceptions.ProtocolError):
        protocol.connection.close_connection()
    data = protocol.connection.data_to_send()
    if data:
        await protocol.send(RawData(data))


def _http2_protocol(server: TCPServer) -> H2Protocol | None:
    protocol = getattr(getattr(server, "protocol", None), "protocol", None)
    return protocol if isinstance(protocol, H2Protocol) else None
