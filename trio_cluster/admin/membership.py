"""The routes with which workers join a cluster, and those with which operators invite and revoke them.

Three of them need no key. The certificates of the authority are public. A worker that joins shows the secret of its
invitation instead, and one that renews its certificate signs its request with the key of the old one.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import attrs
from quart import request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from ..accounts.audit import AuditLog
from ..core.addresses import split_address
from ..core.durations import parse_duration
from ..core.join_paths import CA_PATH, JOIN_PATH, RENEW_PATH
from ..core.state_dir import StateDirError
from ..errors import ApiError, InvalidRequest
from ..gateway.access_log import RefusedKeys
from ..gateway.context import request_context
from ..gateway.origin import refuse_foreign_pages
from ..gateway.response import Reply, json_reply
from ..security.invitations import JoinRefused
from ..security.master_tls import Granted, MasterTls, TlsSuspended, TlsUnavailable
from .body import json_object
from .web import respond

__all__ = ["Membership", "add_membership_routes"]

logger = logging.getLogger("trio_cluster.tls")

#: How long an invitation is valid if it is not said, and at most; in seconds.
_EXPIRES: Final = 3600.0
_EXPIRES_MAX: Final = 30 * 86400.0
#: Addresses in one invitation at most.
_MAX_ADDRESSES: Final = 16


@attrs.frozen
class Membership:
    """What these routes need of a master."""

    tls: MasterTls | None
    """Its certificates; ``None``: it has none."""
    addresses: Callable[[], Sequence[str]]
    """Returns where its API is, ``host:port``, for workers on other machines."""
    drop_worker: Callable[[str, str], bool]
    """``drop_worker(name, reason)`` ends the link of a worker; returns whether it was connected."""
    invite_command: Callable[[], str]
    """Returns the command that makes an invitation, for people on the machine of the master."""


def add_membership_routes(app: QuartTrio, membership: Membership, audit: AuditLog) -> None:
    """Add the routes to an application; what operators do is recorded."""
    refusals = RefusedKeys()

    def tls() -> MasterTls:
        if membership.tls is None:
            raise ApiError(
                409,
                "This master has no TLS, and so neither invitations nor certificates; start it with --tls auto",
                code="tls_required",
            )
        return membership.tls

    async def authority() -> TrioResponse:
        found = tls().authority
        if found is None:
            raise ApiError(404, "This master has no authority of its own", code="no_authority")
        return respond(Reply(200, [("content-type", "application/x-pem-file")], found.trusted.encode()))

    async def join() -> TrioResponse:
        body = await json_object()
        secret, wanted = _text(body, "secret"), _text(body, "request")
        granted = await _granting(tls().join(secret, wanted, _text(body, "name")), refusals, membership)
        fields = {"worker": granted.name, "address": request_context(request.scope).client}
        logger.info("a worker has joined the cluster", extra={"fields": fields})
        return respond(json_reply(granted))

    async def renew() -> TrioResponse:
        body = await json_object()
        certificate, wanted = _text(body, "certificate"), _text(body, "request")
        granted = await _granting(tls().renew(certificate, wanted), refusals, membership)
        logger.info("the certificate of a worker was renewed", extra={"fields": {"worker": granted.name}})
        return respond(json_reply(granted))

    async def invite() -> TrioResponse:
        context = request_context(request.scope)
        refuse_foreign_pages(context)
        body = await json_object()
        name = _text(body, "name") if body.get("name") is not None else None
        expires, addresses = _expires(body), _addresses(body) or list(membership.addresses())
        with _as_api_errors(membership):
            try:
                token = (await tls().invite(addresses, name, expires)).encode()
            except ValueError as error:
                raise InvalidRequest(f"name: {error}", param="name", code="invalid_value") from error
        ends = datetime.datetime.fromtimestamp(time.time() + expires, datetime.UTC)
        content = {
            "token": token,
            "command": f"trio-cluster worker --join {token}",
            "name": name,
            "addresses": addresses,
            "expires_at": ends.isoformat(timespec="seconds"),
        }
        audit.record(
            context.principal,
            context.client,
            "worker.invite",
            name or "",
            addresses=addresses,
            expires_in=expires,
        )
        return respond(json_reply(content, 201))

    async def revoke(name: str) -> TrioResponse:
        context = request_context(request.scope)
        refuse_foreign_pages(context)
        with _as_api_errors(membership):
            known = await tls().revoke(name)
        connected = membership.drop_worker(name, "the certificate of this worker was revoked")
        if not (known or connected):
            raise ApiError(404, f"No worker '{name}' was invited here", code="worker_not_found")
        audit.record(context.principal, context.client, "worker.revoke", name, was_connected=connected)
        return respond(json_reply({"name": name, "revoked": known, "was_connected": connected}))

    async def rotate() -> TrioResponse:
        context = request_context(request.scope)
        refuse_foreign_pages(context)
        with _as_api_errors(membership):
            fingerprint = await tls().rotate()
        audit.record(context.principal, context.client, "authority.rotate", "", fingerprint=fingerprint)
        return respond(json_reply({"fingerprint": fingerprint}))

    add = app.add_url_rule
    add(CA_PATH, "authority", authority, methods=["GET"])
    add(JOIN_PATH, "join", join, methods=["POST"])
    add(RENEW_PATH, "renew", renew, methods=["POST"])
    add("/cluster/invites", "invite", invite, methods=["POST"])
    add("/cluster/workers/<anything:name>/revoke", "revoke", revoke, methods=["POST"])
    add("/cluster/ca/rotate", "rotate", rotate, methods=["POST"])


@contextmanager
def _as_api_errors(membership: Membership) -> Iterator[None]:
    """Raise what stands in the way of a request as the error that the client gets."""
    try:
        yield
    except TlsUnavailable as error:
        raise ApiError(409, str(error), code="tls_required") from error
    except JoinRefused as error:
        hint = f"; make a new one with: {membership.invite_command()}" if error.needs_invitation else ""
        raise ApiError(403, f"{error}{hint}", code="invitation_refused") from error
    except TlsSuspended as error:
        text = "Another process takes the place of this master, and is to be asked: try again on a new connection"
        raise ApiError(503, text, code="being_replaced", retry_after=1.0) from error
    except StateDirError as error:
        raise ApiError(500, str(error), code="state_not_writable") from error


async def _granting(granting: Awaitable[Granted], refusals: RefusedKeys, membership: Membership) -> Granted:
    """Return what a worker is granted, or log and raise why it is not."""
    try:
        with _as_api_errors(membership):
            try:
                return await granting
            except ValueError as error:
                raise InvalidRequest(str(error), param="request", code="invalid_value") from error
    except ApiError as error:
        # Anybody can cause such lines, so they are few.
        refusals.refused(request_context(request.scope), error.message)
        raise


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{field}: expected text", param=field, code="invalid_value")
    return value


def _expires(body: dict[str, Any]) -> float:
    value = body.get("expires")
    if value is None:
        return _EXPIRES
    # Compared before it is made a float, which an integer of JSON may be too long for.
    seconds = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if isinstance(value, str):
        try:
            seconds = parse_duration(value)
        except ValueError as error:
            raise InvalidRequest(f"expires: {error}", param="expires", code="invalid_value") from error
    if seconds is None or not 0 < seconds <= _EXPIRES_MAX:
        raise InvalidRequest(
            "expires: expected seconds, or a text such as 30m, 1h or 2d; at most 30d",
            param="expires",
            code="invalid_value",
        )
    return float(seconds)


def _addresses(body: dict[str, Any]) -> list[str]:
    value = body.get("addresses")
    if value is None:
        return []
    if (
        not isinstance(value, list)
        or not 0 < len(value) <= _MAX_ADDRESSES
        or not all(isinstance(each, str) and _is_address(each) for each in value)
    ):
        raise InvalidRequest(
            f"addresses: expected a list of 1 to {_MAX_ADDRESSES} texts HOST:PORT",
            param="addresses",
            code="invalid_value",
        )
    return value


def _is_address(text: str) -> bool:
    try:
        split_address(text)
    except ValueError:
        return False
    return text.isprintable()
