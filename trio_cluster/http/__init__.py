"""The HTTP face of a node: the OpenAI API, health and metrics.

A request comes in through ``_serving`` (listeners) and ``_http1`` (one connection, read by ``_readers``) and passes
``_gate`` (key, limits, request id). If it is for a model it becomes a call in ``_relay``; if not, the Quart-trio
application in ``_app`` has a view for it. ``_exchange`` is what gate and relay share: it holds the request's calls and
ends them.
"""

from ._app import create_app, gate
from ._gate import MODEL_ROUTES, App
from ._intake import KEPT, Kept
from ._relay import GRACE, PING_EVERY
from ._serving import KEEP_ALIVE, UNREAD_TIME, prepare_socket, serve_http
from ._site import Measure, Site

__all__ = [
    "GRACE",
    "KEEP_ALIVE",
    "KEPT",
    "MODEL_ROUTES",
    "PING_EVERY",
    "UNREAD_TIME",
    "App",
    "Kept",
    "Measure",
    "Site",
    "create_app",
    "gate",
    "prepare_socket",
    "serve_http",
]
