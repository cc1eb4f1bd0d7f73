"""The commands ``keys``, ``usage`` and ``audit``: they ask a running node, over HTTP.

A new key is the only thing on standard output, so that ``KEY=$(trio-cluster keys create NAME)`` works; what there is to
say about it goes to standard error.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, urlencode

from ..accounts.usage_row import COUNTS
from ..core.durations import parse_duration
from ..errors import OptionsError
from .admin_client import NodeAddress, printable, request_json
from .tables import describe_audit, describe_keys, describe_usage

__all__ = ["audit", "keys", "usage"]

_KEY: Final = ("name", "role", "models")
#: The columns of the audit log, as they are called in the node's JSON.
_ENTRY: Final = ("time", "principal", "address", "action", "target", "details")
#: Words that take a limit away.
_NO_LIMIT: Final = frozenset({"none", "never"})


def keys(arguments: argparse.Namespace, node: NodeAddress, key: str | None) -> int:
    """Run ``trio-cluster keys ...``; return the exit code.

    Args:
        arguments: of the command line.
        node: where the node is.
        key: the key to send to it.

    Raises:
        ClusterError: the node cannot be reached, or refuses the request.
        OptionsError: a flag has a wrong value.
    """
    return _KEYS[arguments.keys_command](arguments, node, key)


def usage(arguments: argparse.Namespace, node: NodeAddress, key: str | None) -> int:
    """Run ``trio-cluster usage``; see :func:`keys`."""
    parameters = {
        name: value
        for name, value in (
            ("since", arguments.since),
            ("until", arguments.until),
            ("group_by", arguments.group_by),
        )
        if value is not None
    }
    content = request_json(node, f"/cluster/usage?{urlencode(parameters)}", key, expected=("data",))
    if arguments.json:
        print(json.dumps(content, indent=2))
        return 0
    groups = [name.strip() for name in arguments.group_by.split(",") if name.strip()]
    if arguments.csv:
        _print_csv(content["data"], [*groups, *COUNTS])
    else:
        print(describe_usage(content, groups))
    return 0


def audit(arguments: argparse.Namespace, node: NodeAddress, key: str | None) -> int:
    """Run ``trio-cluster audit``; see :func:`keys`."""
    content = request_json(node, f"/cluster/audit?limit={arguments.limit}", key, expected=("data",))
    if arguments.json:
        print(json.dumps(content, indent=2))
    elif arguments.csv:
        _print_csv(content["data"], _ENTRY)
    else:
        print(describe_audit(content))
    return 0


def _print_csv(rows: object, columns: Sequence[str]) -> None:
    """Print rows of a node's JSON, which are not trusted to be rows."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            writer.writerow([_cell(row.get(column)) for column in columns])


def _cell(value: object) -> str:
    """Return a cell for a spreadsheet, which would take a name that begins like a formula for one."""
    if isinstance(value, dict):
        value = json.dumps(value)
    text = "" if value is None else printable(value)
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


def _create(arguments: argparse.Namespace, node: NodeAddress, key: str | None) -> int:
    fields = {"name": arguments.name, **_fields(arguments)}
    content = request_json(node, "/cluster/keys", key, expected=("key", *_KEY), body=fields)
    return _print_new(content, "made; this is the only time that it is shown")


def _rotate(arguments: argparse.Namespace, node: NodeAddress, key: str | None) -> int:
    grace = 0 if arguments.grace is None else _seconds("--grace", arguments.grace)
    content = request_json(
        node, f"{_path(arguments)}/rotate", key, expected=("key", *_KEY), body={"grace": grace}
    )
    until = f"the old one works for {arguments.grace}" if grace else "the old one no longer works"
    return _print_new(content, f"replaced; {until}")


def _print_new(content: Mapping[str, Any], what: str) -> int:
    print(
        f"key '{printable(content['name'])}', role {printable(content['role'])}: {what}",
        file=sys.stderr,
        flush=True,
    )
    print(printable(content["key"]))
    return 0


def _list(arguments: argparse.Namespace, node: NodeAddress, key: str | None) -> int:
    content = request_json(node, "/cluster/keys", key, expected=("data",))
    print(json.dumps(content, indent=2) if arguments.json else describe_keys(content))
    return 0


def _show(arguments: argparse.Namespace, node: NodeAddress, key: str | None) -> int:
    _print_key(request_json(node, _path(arguments), key, expected=_KEY))
    return 0


def _change(arguments: argparse.Namespace, node: NodeAddress, key: str | None) -> int:
    changes = _fields(arguments)
    if arguments.disabled is not None:
        changes["disabled"] = arguments.disabled == "yes"
    if not changes:
        raise OptionsError("nothing to change: give one of the flags; see trio-cluster keys change --help")
    _print_key(request_json(node, _path(arguments), key, expected=_KEY, body=changes, method="PATCH"))
    return 0


def _revoke(arguments: argparse.Namespace, node: NodeAddress, key: str | None) -> int:
    request_json(node, _path(arguments), key, expected=("revoked",), method="DELETE")
    print(f"key '{arguments.name}': revoked")
    return 0


def _print_key(content: Mapping[str, Any]) -> None:
    for name, value in content.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        print(f"{printable(name)}: {printable(shown)}")


def _path(arguments: argparse.Namespace) -> str:
    return f"/cluster/keys/{quote(arguments.name, safe='')}"


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a key that flags set, as JSON has them. The node checks them."""
    fields: dict[str, Any] = {}
    for name in ("role", "priority"):
        if (word := getattr(arguments, f"key_{name}")) is not None:
            fields[name] = word
    for name in ("requests_per_minute", "tokens_per_minute", "max_concurrency"):
        if (text := getattr(arguments, f"key_{name}")) is not None:
            fields[name] = None if text in _NO_LIMIT else _count(f"--{name.replace('_', '-')}", text)
    if arguments.key_models is not None:
        fields["models"] = [each.strip() for each in arguments.key_models.split(",") if each.strip()]
    if arguments.key_weight is not None:
        fields["weight"] = arguments.key_weight
    if arguments.key_budget is not None:
        fields["budget"] = None if arguments.key_budget in _NO_LIMIT else _budget(arguments.key_budget)
    if arguments.key_expires is not None:
        fields["expires_at"] = _expiry(arguments.key_expires)
    return fields


def _count(flag: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise OptionsError(f"{flag}: expected a whole number, or none, got {text!r}")
    return int(text)


def _budget(text: str) -> dict[str, Any]:
    tokens, slash, period = text.partition("/")
    if not slash or not (tokens.isascii() and tokens.isdigit() and len(tokens) < 19):
        raise OptionsError(f"--budget: expected TOKENS/day, TOKENS/week, TOKENS/month or none, got {text!r}")
    return {"tokens": int(tokens), "per": period}


def _seconds(flag: str, text: str) -> int:
    try:
        return int(parse_duration(text))
    except ValueError as error:
        raise OptionsError(f"{flag}: {error}") from None


def _expiry(text: str) -> Any:
    if text in _NO_LIMIT:
        return None
    if re.match(r"[0-9]{4}-", text):
        return text
    return int(time.time()) + _seconds("--expires", text)


_KEYS: Final[Mapping[str, Callable[[argparse.Namespace, NodeAddress, str | None], int]]] = {
    "create": _create,
    "list": _list,
    "show": _show,
    "change": _change,
    "revoke": _revoke,
    "rotate": _rotate,
}
