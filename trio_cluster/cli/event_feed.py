"""The events of a node (``GET /cluster/events``) for a command: followed for as long as the command runs.

A connection that is lost is made again, after a pause that grows. Each begins with a snapshot, so nothing has to be
made up for.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

import msgspec
import trio

from ..engines._base_url import BaseURL
from ..engines._http_client import HttpClient, HttpRequest, HttpResponse
from ..engines._http_response import HttpError
from ..security.contexts import client_context
from .admin_client import NodeAddress, printable

__all__ = ["EventFeed", "EventReader"]

#: Seconds of the first pause before a connection is made again, and of the longest one.
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 10.0
#: Seconds of silence after which the connection counts as lost: more than two of the comments that a silent node sends.
_SILENCE: Final = 25.0
#: Bytes of the longest event.
_EVENT_MAX: Final = 256 * 1024 * 1024
#: Characters of an answer that says why there are no events.
_REASON_MAX: Final = 200
#: Seconds by which two clocks may differ without being corrected.
_SAME_CLOCK: Final = 1.0


class EventReader:
    """Takes server-sent events out of bytes. Synchronous."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self._searched = 0

    def feed(self, data: bytes) -> list[tuple[str, Any]]:
        """Return the events that are complete with these bytes: names, and contents as JSON.

        Raises:
            ValueError: these are no such events.
        """
        self._unread += data
        events = []
        while (end := self._unread.find(b"\n\n", self._searched)) >= 0:
            event = bytes(self._unread[:end])
            del self._unread[: end + 2]
            self._searched = 0
            name, content = "", b""
            for line in event.split(b"\n"):
                field, _, value = line.partition(b": ")
                if field == b"event":
                    name = value.decode("utf-8", "replace")
                elif field == b"data":
                    content += value
            if content:
                events.append((name, msgspec.json.decode(content)))
        self._searched = max(0, len(self._unread) - 1)
        if self._searched > _EVENT_MAX:
            raise ValueError("an event has no end")
        return events


class EventFeed:
    """Follows the events of a node.

    Args:
        address: the node.
        api_key: the key to send, if any.
        on_event: called with the name and the content of each event. Synchronous.
        on_state: called when the connection is there (with an empty text), or is not: with the reason. Synchronous.

    Attributes:
        clock_ahead: by how many seconds the clock of the node is ahead of the one here.

    Raises:
        CertificateError: the file of authorities cannot be used.
    """

    def __init__(
        self,
        address: NodeAddress,
        api_key: str | None,
        on_event: Callable[[str, Any], None],
        on_state: Callable[[str], None],
    ) -> None:
        self.clock_ahead = 0.0
        base = BaseURL.parse(address.url)
        tls: ssl.SSLContext | None = None
        if base.scheme == "https":
            tls = client_context(ca_file=address.ca_file)
        self._client = HttpClient(base, tls=tls)
        self._headers = [("Accept", "text/event-stream")]
        if api_key is not None:
            self._headers.append(("Authorization", f"Bearer {api_key}"))
        self._on_event = on_event
        self._on_state = on_state
        self._connected = False

    async def run(self) -> NoReturn:
        """Follow the events until cancelled."""
        pause = _FIRST_PAUSE
        while True:
            self._connected = False
            try:
                reason = await self._follow()
            except (HttpError, ValueError) as error:
                reason = str(error)
            if self._connected:
                pause = _FIRST_PAUSE
            self._on_state(printable(reason))
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _follow(self) -> str:
        """Follow the events of one connection, and return why it is over. A checkpoint.

        Raises:
            HttpError, ValueError: the connection is lost, or what comes is not understood.
        """
        reason = "the node has ended the connection"

        async def take(response: HttpResponse) -> None:
            nonlocal reason
            if response.status != 200:
                reason = await _refusal(response)
                return
            self._note_clock(response.header("x-trio-cluster-time"))
            reader = EventReader()
            while data := await response.receive():
                silence.deadline = trio.current_time() + _SILENCE
                for name, content in reader.feed(data):
                    if not self._connected:
                        self._connected = True
                        self._on_state("")
                    self._on_event(name, content)

        # A node that is stuck accepts the connection, and does not even send a head.
        with trio.move_on_after(_SILENCE) as silence:
            await self._client.send(HttpRequest("GET", "/cluster/events", self._headers), take)
        return f"nothing came for {_SILENCE:g} s" if silence.cancelled_caught else reason

    def _note_clock(self, at: str) -> None:
        try:
            ahead = float(at) - time.time()
        except ValueError:
            return
        self.clock_ahead = ahead if _SAME_CLOCK < abs(ahead) < float("inf") else 0.0


async def _refusal(response: HttpResponse) -> str:
    """Return why a node sends no events."""
    body = b""
    while len(body) < 64 * 1024 and (piece := await response.receive()):
        body += piece
    try:
        message = msgspec.json.decode(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = ""
    return f"HTTP {response.status}" + (f": {str(message)[:_REASON_MAX]}" if message else "")
