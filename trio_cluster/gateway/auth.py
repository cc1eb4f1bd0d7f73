"""The authenticate stage: determines who sends a request, and whether the sender may use the path.

Every path below ``/cluster`` is for operators (:func:`is_for_operators`), except the status and those with which
workers join, so a route that is added there is protected from the start. Such a path requires a principal whose role is
more than ``"inference"``, whichever authenticator determined the principal. Keys, the audit log, and who belongs to the
cluster are for admins (:func:`is_for_admins`).

Who is an admin. The first thing that is done on a new node is to make a key, and that cannot take one. So a client on
the same machine needs no key for what is below ``/cluster`` as long as there is no admin: no option ``api_key`` or
``operator_key``, and no valid key of the role ``admin``. If the last admin key is lost, one of the two options mends
that; if it has expired or was revoked, the machine itself is the admin again.
"""

from __future__ import annotations

import hmac
import ipaddress
import time
from fnmatch import fnmatchcase
from typing import Final, Protocol

import attrs

from ..accounts.keys import KeyTable
from ..core.join_paths import JOIN_PATHS
from ..core.log_context import current_principal
from ..core.principal import ANONYMOUS, Principal
from ..errors import ApiError, ModelNotFound
from ..options import ClusterServerOptions
from .access_log import RefusedKeys
from .context import RequestContext
from .failed_attempts import FailedAttempts

__all__ = [
    "OPEN_PATHS",
    "SESSION_PATH",
    "ApiKeys",
    "Authenticate",
    "Authenticator",
    "hide_models",
    "is_for_admins",
    "is_for_operators",
    "is_open",
    "may_use",
    "require_model",
]

#: Paths that require no key. They show states and figures, and neither names nor contents of requests; to operators,
#: ``/metrics`` shows the names of keys, too. ``/ready`` tells whether a model is served whose name the client knows
#: already: load balancers ask for that without a key.
OPEN_PATHS: Final = frozenset({"/", "/health", "/metrics", "/openapi.json", "/ready"})

#: Below this, the files of the page for people need no key: it is the page that asks for one.
_PAGE: Final = "/ui/"
#: Who the page's user is, by the key; nothing else below ``/ui/`` needs one.
SESSION_PATH: Final = "/ui/session"

#: The path without a key that shows more to operators: what is counted by key.
_METRICS: Final = "/metrics"

#: The only path below ``/cluster`` that is not for operators: it shows which models there are, and the load.
_STATUS: Final = "/cluster/status"

#: What admins only may do. Whatever begins like one of these is for them, and revoking a worker.
_FOR_ADMINS: Final = ("/cluster/keys", "/cluster/audit", "/cluster/invites", "/cluster/ca/")

#: The principals of requests that have the API key of the options: where there is an operator key, and where there is
#: none; and of requests that have the operator key.
_CLIENT: Final = Principal("default", "inference")
_DEFAULT: Final = Principal("default", "admin")
_OPERATOR: Final = Principal("operator", "admin")

#: Headers that proxies add. A request with one of them does not come from this machine, even if its connection does.
_PROXY_HEADERS: Final = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via")


def is_open(path: str) -> bool:
    """Return whether a path requires no key."""
    return (path.rstrip("/") or "/") in OPEN_PATHS or (
        (path.startswith(_PAGE) or path == "/ui") and path.rstrip("/") != SESSION_PATH
    )


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
        self._failed_attempts = FailedAttempts()

    async def admit(self, context: RequestContext) -> None:
        """See ``Stage``.

        Raises:
            ApiError: 401: as the authenticator says; 403: the path is for operators or admins, and the principal is
                none; 429: too many wrong keys came from this address.
        """
        if not is_open(context.path) and context.path not in JOIN_PATHS:
            refusal: ApiError | None = None
            try:
                context.principal = principal = await self._authenticator.authenticate(context)
            except ApiError as error:
                refusal = error
            if refusal is not None:
                if refusal.status == 401:
                    self._refused_keys.refused(context, refusal.message)
                    if key_of(context) is not None:
                        await self._failed_attempts.refused(context.client)
                try:
                    raise refusal
                finally:
                    # Otherwise the error and this frame would refer to each other.
                    del refusal
            if principal.name:
                current_principal.set(principal.name)
            if principal.role != "admin" and is_for_operators(context.path):
                _check_role(principal, context.path)
        elif context.path.rstrip("/") == _METRICS and key_of(context) is not None:
            await self._know_operator(context)

    async def _know_operator(self, context: RequestContext) -> None:
        """Find out who asks for what needs no key, and shows more to operators. A wrong key is like none."""
        try:
            context.principal = await self._authenticator.authenticate(context)
        except ApiError as error:
            if error.status == 401:
                self._refused_keys.refused(context, error.message)
                await self._failed_attempts.refused(context.client)


def _check_role(principal: Principal, path: str) -> None:
    if principal.role == "inference":
        raise ApiError(
            403,
            "This is for operators: send a key of the role 'operator' or 'admin', or the operator key of this node "
            "(option 'operator_key'). Only where there is neither, clients on the same machine, without a proxy, may "
            "do this without a key",
            code="role_required",
        )
    if is_for_admins(path):
        raise ApiError(403, "This is for admins: send a key of the role 'admin'", code="role_required")


class ApiKeys:
    """Knows the API key and the operator key of the options, and the keys that were made. See ``Authenticator``.

    Nothing is required if there is no API key and no key was ever made. The operator key allows everything. The API key
    does, too, unless there is an operator key: then it is for clients.

    Args:
        options: read for each request, so that a new key applies to the next one.
        table: the keys that were made; ``None``: there is no database.
    """

    def __init__(self, options: ClusterServerOptions, table: KeyTable | None = None) -> None:
        self._options = options
        self._table = KeyTable() if table is None else table

    async def authenticate(self, context: RequestContext) -> Principal:
        """See ``Authenticator``."""
        options, table = self._options.server, self._table
        key, operator_key = options.api_key, options.operator_key
        if key is None and operator_key is None and not table.required:
            return _with_role(ANONYMOUS, context)
        given = key_of(context)
        if given is not None:
            if operator_key is not None and hmac.compare_digest(given, operator_key.encode()):
                return _OPERATOR
            if key is not None and hmac.compare_digest(given, key.encode()):
                return _DEFAULT if operator_key is None else _CLIENT
            entry = table.find(given)
            if entry is not None:
                if entry.disabled:
                    raise ApiError(401, "This API key is disabled", code="invalid_api_key")
                if entry.expires_at <= time.time():
                    raise ApiError(401, "This API key has expired", code="invalid_api_key")
                return entry.principal
        if key is None and not table.required and not is_for_operators(context.path):
            return ANONYMOUS
        if given is not None:
            raise ApiError(401, "The API key is not valid", code="invalid_api_key")
        if key is None and operator_key is None and not table.has_admin:
            principal = _with_role(ANONYMOUS, context)
            if principal.role == "admin":
                return principal
        raise ApiError(
            401,
            "This server requires an API key: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'",
            code="invalid_api_key",
        )


def may_use(principal: Principal, model: str) -> bool:
    """Tell whether a principal may use a model, which need not exist."""
    return not principal.models or any(fnmatchcase(model, pattern) for pattern in principal.models)


def require_model(principal: Principal, model: str) -> None:
    """Refuse a model that a principal may not use, whether it exists or not.

    Raises:
        ApiError: 403.
    """
    if model and not may_use(principal, model):
        raise ApiError(
            403,
            f"This API key may not use the model '{model}'",
            code="model_not_allowed",
            param="model",
        )


def hide_models(principal: Principal, error: ApiError) -> ApiError:
    """Return an error without the names of models that a principal may not use."""
    if principal.models and isinstance(error, ModelNotFound):
        available = [name for name in error.available if may_use(principal, name)]
        return ModelNotFound(error.name, available, alias=error.alias)
    return error


def is_for_operators(path: str) -> bool:
    """Tell whether a path, which begins with one slash, is for operators only."""
    return path.startswith("/cluster") and path.rstrip("/") != _STATUS and path not in JOIN_PATHS


def is_for_admins(path: str) -> bool:
    """Tell whether a path, which begins with one slash, is for admins only."""
    if path.startswith("/cluster/workers/"):
        return path.rstrip("/").endswith("/revoke")
    return path.startswith(_FOR_ADMINS)


def _with_role(principal: Principal, context: RequestContext) -> Principal:
    """Return a principal as one that may do everything, if it asks for what is for operators from this machine.

    The page asks who its user is, since it shows what that user may do.
    """
    if (is_for_operators(context.path) or context.path == SESSION_PATH) and _is_local(context):
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
