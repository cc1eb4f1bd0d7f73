"""The HTTP face of a node: the OpenAI API, health and metrics, on Quart-trio and hypercorn.

A request comes in through ``_serving`` (sockets, hypercorn) and ``_gate`` (key, limits, request id, what the
two libraries do not do together), reaches a view in ``_routes``, and becomes a call in ``_relay``.
``_exchange`` is the one thing that gate and relay share: it holds the request's calls and ends them.
"""

from ._app import create_app, gate
from ._gate import App
from ._relay import GRACE, PING_EVERY
from ._serving import KEEP_ALIVE, UNREAD_TIME, prepare_socket, serve_http
from ._site import Measure, Site

__all__ = [
    "GRACE",
    "KEEP_ALIVE",
    "PING_EVERY",
    "UNREAD_TIME",
    "App",
    "Measure",
    "Site",
    "create_app",
    "gate",
    "prepare_socket",
    "serve_http",
]
