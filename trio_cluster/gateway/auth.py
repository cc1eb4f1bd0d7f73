"""The authenticate stage: determines who sends a request."""

from __future__ import annotations

import hmac
from typing import Final, Protocol

from ..core.log_context import current_principal
from ..core.principal import ANONYMOUS, Principal
from ..errors import ApiError
from ..options import ClusterServerOptions
from .context import RequestContext

__all__ = ["OPEN_PATHS", "Authenticate", "Authenticator", "SingleKey", "is_open"]

#: Paths that require no key. They show states and figures, and neither names nor contents of requests.
OPEN_PATHS: Final = frozenset({"/", "/health", "/metrics", "/openapi.json"})

#: The principal of requests that have the node's API key.
_KEY_HOLDER: Final = Principal("default", "admin")


def is_open(path: str) -> bool:
    """Return whether a path requires no key."""
    return (path.rstrip("/") or "/") in OPEN_PATHS


class Authenticator(Protocol):
    """Determines who sends a request."""

    async def authenticate(self, context: RequestContext) -> Principal:
        """Return who sends the request. It may wait, for instance for a database.

        Raises:
            ApiError: 401: the request has no key, or one that is not valid.
        """
        ...


class Authenticate:
    """Puts the principal into the context, on every path that requires a key. See ``Stage``.

    Args:
        authenticator: determines the principal.
    """

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def admit(self, context: RequestContext) -> None:
        """See ``Stage``."""
        if not is_open(context.path):
            context.principal = principal = await self._authenticator.authenticate(context)
            if principal.name:
                current_principal.set(principal.name)


class SingleKey:
    """Requires the API key of the options, if there is one. See ``Authenticator``.

    Args:
        options: read for each request, so that a new key applies to the next one.
    """

    def __init__(self, options: ClusterServerOptions) -> None:
        self._options = options

    async def authenticate(self, context: RequestContext) -> Principal:
        """See ``Authenticator``."""
        key = self._options.server.api_key
        if key is None:
            return ANONYMOUS
        given = key_of(context)
        if given is None:
            raise ApiError(
                401,
                "This server requires an API key: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
        if not hmac.compare_digest(given, key.encode()):
            raise ApiError(401, "The API key is not valid", code="invalid_api_key")
        return _KEY_HOLDER


def key_of(context: RequestContext) -> bytes | None:
    """Return the API key of a request: the bearer token or, as clients of the Messages API send it, ``x-api-key``."""
    scheme, _, given = (context.header(b"authorization") or b"").partition(b" ")
    if not scheme:
        return context.header(b"x-api-key") or None
    return given.strip() if scheme.lower() == b"bearer" else None
