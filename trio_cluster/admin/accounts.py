"""The routes for keys, usage and the audit log.

Who may use which is decided before they are reached; see ``gateway/auth.py``. All that blocks is done by the accounts,
in threads.
"""

from __future__ import annotations

import time
from typing import Final

from quart import request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from ..accounts.accounts import Accounts
from ..accounts.fields import read_changes, read_grace, read_new, read_time, show_key, show_time
from ..accounts.usage_row import GROUPS, UsageQuery
from ..errors import ApiError, InvalidRequest
from ..gateway.context import RequestContext, request_context
from ..gateway.node_context import NodeContext
from ..gateway.origin import refuse_foreign_pages
from ..gateway.response import json_reply
from ..gateway.routes import PREFIXES
from .body import json_object
from .views import AuditEntryView, AuditView, KeysView, KeyView, NewKeyView, RevokedView, UsageView
from .web import respond

__all__ = ["add_account_routes"]

#: Entries of the audit log in one answer: at most, and if the request does not say how many.
_MOST_ENTRIES: Final = 10_000
_ENTRIES: Final = 100

_USAGE_PARAMETERS: Final = frozenset({"since", "until", "group_by"})


def add_account_routes(app: QuartTrio, node_context: NodeContext) -> None:
    """Add the routes to an application."""
    _add_keys(app, node_context)
    _add_usage(app, node_context)
    _add_audit(app, node_context)


def _add_keys(app: QuartTrio, node_context: NodeContext) -> None:
    async def list_keys() -> TrioResponse:
        records = _accounts(node_context).records
        return respond(json_reply(KeysView("list", [KeyView(**show_key(record)) for record in records])))

    async def create() -> TrioResponse:
        accounts, context = _accounts(node_context), _acting()
        record = read_new(await json_object(), time.time())
        key = await accounts.create_key(record, context.principal, context.client)
        return respond(json_reply(NewKeyView(key=key, **show_key(record)), 201))

    async def retrieve(name: str) -> TrioResponse:
        return respond(json_reply(KeyView(**show_key(_accounts(node_context).record(name)))))

    async def change(name: str) -> TrioResponse:
        accounts, context = _accounts(node_context), _acting()
        changes = read_changes(await json_object())
        record = await accounts.change_key(name, changes, context.principal, context.client)
        return respond(json_reply(KeyView(**show_key(record))))

    async def revoke(name: str) -> TrioResponse:
        accounts, context = _accounts(node_context), _acting()
        await accounts.revoke_key(name, context.principal, context.client)
        return respond(json_reply(RevokedView(name, True)))

    async def rotate(name: str) -> TrioResponse:
        accounts, context = _accounts(node_context), _acting()
        grace = read_grace(await json_object())
        key = await accounts.rotate_key(name, grace, context.principal, context.client)
        return respond(json_reply(NewKeyView(key=key, **show_key(accounts.record(name)))))

    add = app.add_url_rule
    add("/cluster/keys", "keys", list_keys, methods=["GET"])
    add("/cluster/keys", "create_key", create, methods=["POST"])
    add("/cluster/keys/<name>", "key", retrieve, methods=["GET"])
    add("/cluster/keys/<name>", "change_key", change, methods=["PATCH"])
    add("/cluster/keys/<name>", "revoke_key", revoke, methods=["DELETE"])
    add("/cluster/keys/<name>/rotate", "rotate_key", rotate, methods=["POST"])


def _add_usage(app: QuartTrio, node_context: NodeContext) -> None:
    async def usage() -> TrioResponse:
        accounts = _accounts(node_context)
        return respond(json_reply(UsageView("list", await accounts.usage(_query(None)))))

    async def own_usage() -> TrioResponse:
        accounts, name = _accounts(node_context), request_context(request.scope).principal.name
        return respond(json_reply(UsageView("list", await accounts.usage(_query(name)))))

    app.add_url_rule("/cluster/usage", "usage", usage, methods=["GET"])
    for prefix in PREFIXES:
        app.add_url_rule(f"{prefix}/usage", f"{prefix}usage of a key", own_usage, methods=["GET"])


def _add_audit(app: QuartTrio, node_context: NodeContext) -> None:
    async def audit() -> TrioResponse:
        entries = await _accounts(node_context).audit_entries(_limit())
        views = [
            AuditEntryView(
                time=show_time(entry.time),
                principal=entry.principal,
                address=entry.address,
                action=entry.action,
                target=entry.target,
                details=dict(entry.details),
            )
            for entry in entries
        ]
        return respond(json_reply(AuditView("list", views)))

    app.add_url_rule("/cluster/audit", "audit", audit, methods=["GET"])


def _accounts(node_context: NodeContext) -> Accounts:
    """Return the accounts of the node.

    Raises:
        ApiError: 409: it has none.
    """
    if node_context.accounts is None:
        raise ApiError(
            409,
            "This node keeps no keys and no usage, since it has no database; set the option 'state_dir' or 'database'",
            code="no_database",
        )
    return node_context.accounts


def _acting() -> RequestContext:
    """Return the context of a request that changes something.

    Raises:
        ApiError: 403: it comes from a page of another site, and without a key.
    """
    context = request_context(request.scope)
    refuse_foreign_pages(context)
    return context


def _query(key: str | None) -> UsageQuery:
    """Return which usage the request asks for.

    Args:
        key: the name of the principal whose usage it is; ``None``: that of all.

    Raises:
        InvalidRequest: a parameter is unknown or not valid.
    """
    parameters = request.args
    for name in parameters:
        if name not in _USAGE_PARAMETERS:
            raise InvalidRequest(
                f"Unknown parameter: {name!r}; there are since, until and group_by",
                param=name,
                code="unknown_parameter",
            )
    group_by = tuple(dict.fromkeys(name.strip() for name in parameters.get("group_by", "").split(",")))
    if group_by == ("",):
        group_by = ()
    for name in group_by:
        if name not in GROUPS:
            raise InvalidRequest(
                f"group_by: expected some of {', '.join(GROUPS)}, with commas between them; got {name[:64]!r}",
                param="group_by",
                code="invalid_value",
            )
    since, until = _time("since"), _time("until")
    if since is not None and until is not None and until < since:
        raise InvalidRequest("until: is before since", param="until", code="invalid_value")
    return UsageQuery(group_by, since, until, key)


def _time(name: str) -> float | None:
    text = request.args.get(name)
    if text is None:
        return None
    # The sign of a time zone arrives as a space if it was not escaped.
    head, space, zone = text.rpartition(" ")
    return read_time(name, f"{head}+{zone}" if space and "T" in head else text)


def _limit() -> int:
    text = request.args.get("limit", str(_ENTRIES))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= _MOST_ENTRIES):
        raise InvalidRequest(
            f"limit: expected a whole number from 1 to {_MOST_ENTRIES}", param="limit", code="invalid_value"
        )
    return int(text)
