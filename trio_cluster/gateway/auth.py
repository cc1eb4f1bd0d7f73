"""The authenticate stage: determines who sends a request, and whether the sender may use the path.

Every path below ``/cluster`` is for operators (:func:`is_for_operators`), except the status and those with which
workers join, so a route that is added
there is protected from the start. Such a path requires a principal whose role is more than ``"inference"``, whichever
authenticator determined the principal.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import Final, Protocol

import attrs

from ..core.join_paths import JOIN_PATHS
from ..core.log_context import current_principal
from ..core.principal import ANONYMOUS, Principal
from ..errors import ApiError
from ..options import ClusterServerOptions
from .access_log import RefusedKeys
from .context import RequestContext

__all__ = ["OPEN_PATHS", "Authenticate", "Authenticator", "SingleKey", "is_for_operators", "is_open"]

#: Paths that require no key. They show states and figures, and neither names nor contents of requests. ``/ready``
#: tells whether a model is served whose name the client knows already: load balancers ask for that without a key.
OPEN_PATHS: Final = frozenset({"/", "/health", "/metrics", "/openapi.json", "/ready"})

#: The only path below ``/cluster`` that is not for operators: it shows which models there are, and the load.
_STATUS: Final = "/cluster/status"

#: The principals of requests that have the node's API key, and its operator key.
_CLIENT: Final = Principal("default", "inference")
_OPERATOR: Final = Principal("operator", "operator")

#: Headers that proxies add. A request with one of them does not come from this machine, even if its connection does.
_PROXY_HEADERS: Final = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via")


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
        self._refused_keys = RefusedKeys()

    async def admit(self, context: RequestContext) -> None:
        """See ``Stage``.

        Raises:
            ApiError: 401: as the authenticator says; 403: the path is for operators, and the principal is none.
        """
        if not is_open(context.path) and context.path not in JOIN_PATHS:
            try:
                context.principal = principal = await self._authenticator.authenticate(context)
            except ApiError as error:
                if error.status == 401:
                    self._refused_keys.refused(context, error.message)
                raise
            if principal.name:
                current_principal.set(principal.name)
            if principal.role == "inference" and is_for_operators(context.path):
                raise ApiError(
                    403,
                    "This is for operators. Send the operator key of this node (option 'operator_key'); without such "
                    "an option, only clients on the same machine, without a proxy, may do this",
                    code="role_required",
                )


class SingleKey:
    """Requires the API key of the options, if there is one, and knows the operator key. See ``Authenticator``.

    The operator key allows everything. If the options have none, clients on this machine may do what operators may.

    Args:
        options: read for each request, so that a new key applies to the next one.
    """

    def __init__(self, options: ClusterServerOptions) -> None:
        self._options = options

    async def authenticate(self, context: RequestContext) -> Principal:
        """See ``Authenticator``."""
        options = self._options.server
        key, operator_key = options.api_key, options.operator_key
        if key is None and operator_key is None:
            return _with_role(ANONYMOUS, context)
        given = key_of(context)
        if operator_key is not None:
            if given is not None and hmac.compare_digest(given, operator_key.encode()):
                return _OPERATOR
            if key is None and not is_for_operators(context.path):
                return ANONYMOUS
        if given is None:
            raise ApiError(
                401,
                "This server requires an API key: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
        if key is None or not hmac.compare_digest(given, key.encode()):
            raise ApiError(401, "The API key is not valid", code="invalid_api_key")
        return _CLIENT if operator_key is not None else _with_role(_CLIENT, context)


def is_for_operators(path: str) -> bool:
    """Tell whether a path, which begins with one slash, is for operators only."""
    return path.startswith("/cluster") and path.rstrip("/") != _STATUS and path not in JOIN_PATHS


def _with_role(principal: Principal, context: RequestContext) -> Principal:
    """Return a principal as one that may do everything, if it asks for what is for operators from this machine."""
    if is_for_operators(context.path) and _is_local(context):
        return attrs.evolve(principal, role="admin")
    return principal


def _is_local(context: RequestContext) -> bool:
    """Tell whether a request was made on this machine.

    A client without a numeric address has not come over a network: it is in this process, a test of an application or
    of a simulated cluster.
    """
    if any(context.header(name) is not None for name in _PROXY_HEADERS):
        return False
    try:
        address = ipaddress.ip_address(context.client.rpartition(":")[0].strip("[]"))
    except ValueError:
        return True
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def key_of(context: RequestContext) -> bytes | None:
    """Return the API key of a request: the bearer token, ``x-api-key`` as clients of the Messages API send it, or
    ``api-key`` as clients of Azure do.
    """
    scheme, _, given = (context.header(b"authorization") or b"").partition(b" ")
    if not scheme:
        return context.header(b"x-api-key") or context.header(b"api-key") or None
    return given.strip() if scheme.lower() == b"bearer" else None
