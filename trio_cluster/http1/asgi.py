"""The ASGI vocabulary: what passes between a server and the application that it serves (ASGI 3.0).

Both sides import it from here, so that the server does not import the application, and the application no server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

__all__ = ["CONNECTION_KEY", "App", "Message", "Receive", "Scope", "Send"]

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

#: The key in a request's ``scope["state"]`` under which this server puts the connection of the request, which the
#: application may reset, or write to directly. Other servers put nothing there.
CONNECTION_KEY: Final = "trio_cluster.connection"
