"""The origin stage: what keeps web pages out of a server that requires no key.

A page that is open in a browser near the server can send requests to it. Two checks stop that, where no key does:

- *Origin.* A browser says which page a request comes from. A page from elsewhere is refused, unless ``cors_origins``
  allows it: that its browser would hide the answer from it is not enough, since the work would have been done.
- *Host.* With DNS rebinding, a page makes its own host name point to the server's address; to the browser, the server
  is then a part of the page's site. But the Host header has the page's name. So it must be an address, ``localhost``,
  or a name in ``allowed_hosts``; no page can have one of these names.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import Final

from ..core.join_paths import JOIN_PATHS
from ..errors import ApiError
from .auth import is_open
from .context import RequestContext
from .cors import is_allowed_origin
from .node_context import NodeContext

__all__ = ["CheckOrigin", "refuse_foreign_pages"]

_METRICS: Final = "/metrics"


class CheckOrigin:
    """Refuses requests without a key that come from a web page, or for an unknown host. See ``Stage``.

    Of the paths that require no key where there is one, only ``/metrics`` is checked, whether there is a key or not: it
    names the workers. The others show neither names nor contents, and health checks may ask under any name.
    """

    def __init__(self, node_context: NodeContext) -> None:
        self._node_context = node_context

    async def admit(self, context: RequestContext) -> None:
        """See ``Stage``."""
        if context.principal.name:
            return
        shows_names = context.path.rstrip("/") == _METRICS
        what = _METRICS if shows_names else "This server"
        options, host = self._node_context.options.server, context.header(b"host")
        # Browsers always send a Host header; HTTP/1.0 need not have one.
        if host is not None and not _is_allowed_host(host, options.allowed_hosts):
            name = _host_name(host)
            error = ApiError(
                403,
                f"{what} requires no API key, so it answers only under an address, localhost, or a name in "
                f"'allowed_hosts', and '{name}' is none of these. Start the server with --allowed-hosts {name}"
                f"{'' if shows_names else ', or with a key'}",
                code="host_not_allowed",
            )
        else:
            origin = context.header(b"origin")
            if (
                origin is None
                or _is_same_origin(origin, host)
                or is_allowed_origin(origin, options.cors_origins)
            ):
                return
            error = ApiError(
                403,
                f"{what} requires no API key, so pages from elsewhere may not use it; 'cors_origins' can allow it",
                code="foreign_origin",
            )
        if shows_names or (not is_open(context.path) and context.path not in JOIN_PATHS):
            raise error


def refuse_foreign_pages(context: RequestContext) -> None:
    """Refuse a request without a key that a page from elsewhere has sent, also one that ``cors_origins`` allows.

    For routes that change something. A client on the same machine may do that without a key, but a web page may not: a
    browser sends a POST on behalf of any page that is open in it, without asking the user, and adds ``Origin`` to it.
    A page of this node may: the pages are its own, and :class:`CheckOrigin` knows the host. A key is in a header that
    no browser sends by itself.

    Raises:
        ApiError: 403.
    """
    origin = context.header(b"origin")
    if (
        origin is not None
        and not context.principal.name
        and not _is_same_origin(origin, context.header(b"host"))
    ):
        raise ApiError(403, "This route does not accept requests from other web pages", code="foreign_origin")


def _is_same_origin(origin: bytes, host: bytes | None) -> bool:
    return host is not None and origin.partition(b"://")[2].lower() == host.lower()


# Clients choose the header; those that are sent all the time are few.
@lru_cache(maxsize=64)
def _is_allowed_host(host: bytes, allowed: str | None) -> bool:
    name = _host_name(host)
    names = {each.strip().lower() for each in (allowed or "").split(",")}
    if name == "localhost" or name.endswith(".localhost") or name in names or "*" in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_name(host: bytes) -> str:
    """Return the name or the address in a Host header, without its port; in lower case."""
    text = host.decode("latin-1").lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    return name.removesuffix(".")
