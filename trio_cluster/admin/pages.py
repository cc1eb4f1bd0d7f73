"""The page for people, ``/ui/``: files of the package, sent as they are, and who its user is.

The page is made of what every other client may use: the API, ``/cluster/...`` and ``/cluster/events``. Its files are in
``trio_cluster/ui``. They need no key, since it is the page that asks for one; what it shows does.

The policy of its content forbids everything that does not come from this node, inline scripts and styles, being shown
in a frame, and making HTML out of text: what models and clients write is shown as text.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Final

from quart import request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from .._version import __version__
from ..errors import ApiError
from ..gateway.auth import SESSION_PATH
from ..gateway.context import request_context
from ..gateway.node_context import NodeContext
from ..gateway.response import Reply, json_reply
from .views import SessionView
from .web import respond

__all__ = ["add_page_routes"]

#: The types of the files. Nothing else is sent, whatever lies there.
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_INDEX: Final = "index.html"
#: What the index has in the place of whether requests for models need a key.
_REQUIRES_KEY: Final = b"{{requires_key}}"

_HEADERS: Final = (
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("permissions-policy", "microphone=(self), camera=(), geolocation=()"),
    # Asked again each time, and answered with 304: a new version of the node has a new page.
    ("cache-control", "no-cache"),
)


def add_page_routes(app: QuartTrio, node_context: NodeContext) -> None:
    """Add the routes of the page to an application."""

    async def to_index() -> TrioResponse:
        # Relative, so that it holds behind a proxy that serves the node below a path of its own.
        return respond(Reply(302, [("location", "ui/")], b""))

    async def index() -> TrioResponse:
        text = _contents()[_INDEX].replace(_REQUIRES_KEY, str(node_context.requires_key).lower().encode())
        return _file(_INDEX, text)

    async def file(name: str) -> TrioResponse:
        content = _contents().get(name)
        if content is None or name == _INDEX:
            raise ApiError(404, f"Unknown URL: GET {request.path}")
        return _file(name, content)

    async def session() -> TrioResponse:
        principal = request_context(request.scope).principal
        return respond(
            json_reply(
                SessionView(
                    name=principal.name,
                    role=principal.role,
                    requires_key=node_context.requires_key,
                    mode=node_context.mode,
                    node_id=node_context.node_id,
                    version=__version__,
                )
            )
        )

    add = app.add_url_rule
    # Rules for paths that begin alike: the map matches exact paths first.
    add("/ui", "page", to_index, methods=["GET"], strict_slashes=True)
    add("/ui/", "page index", index, methods=["GET"], strict_slashes=True)
    add(SESSION_PATH, "page session", session, methods=["GET"])
    add("/ui/<path:name>", "page file", file, methods=["GET"])


@cache
def _contents() -> dict[str, bytes]:
    """Return the files of the page, by their paths. They are read once, when the page is first asked for."""
    contents: dict[str, bytes] = {}
    folders = [("", files("trio_cluster") / "ui")]
    for prefix, folder in folders:
        for each in folder.iterdir():
            if each.is_dir():
                folders.append((f"{prefix}{each.name}/", each))
            elif f".{each.name.rpartition('.')[2]}" in _TYPES:
                contents[prefix + each.name] = each.read_bytes()
    return contents


def _file(name: str, content: bytes) -> TrioResponse:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = [("content-type", _TYPES[f".{name.rpartition('.')[2]}"]), ("etag", tag), *_HEADERS]
    if tag in request.headers.get("if-none-match", ""):
        return respond(Reply(304, headers, b""))
    return respond(Reply(200, headers, content))
