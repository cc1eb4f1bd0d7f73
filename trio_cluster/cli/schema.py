"""What the file of options may have in it: as a JSON Schema for editors, and in words for people.

The description of an option is the text under its field in ``options.py``, which is also the one in the reference. It
is read from the source of that module, so that there is only one text to keep true.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs

from .. import options as options_module
from ..core.sizes import format_size
from ..core.state_dir import path_of
from ..errors import ClusterError, OptionsError
from ..net.sockets import INTERNAL_OFFSET, shown_address
from ..options import ClusterServerOptions, ServerOptions, is_secret, option_schema, when_applied
from ..security.contexts import client_context, server_context
from .arguments import master_addresses
from .settings import (
    PROCESS_SETTINGS,
    SECRET_FILES,
    WORKER_OPTIONS,
    load_node_settings,
    load_options,
    load_process_settings,
    load_serve_tables,
)

if TYPE_CHECKING:
    from ..engines import ServeSpec

__all__ = ["configuration_schema", "describe_configuration", "option_descriptions", "shown_value"]

_Field: TypeAlias = "attrs.Attribute[Any]"

_PROCESS_TEXTS: Final = {
    "log_level": "The lowest level of what is logged.",
    "log_format": "Whether the log is for people or for machines.",
}


@cache
def option_descriptions() -> Mapping[str, str]:
    """Return what each option is, by its name."""
    found: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(options_module)).body:
        if isinstance(node, ast.ClassDef) and node.name in ("ServerOptions", "ClusterServerOptions"):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                    and isinstance(text.value.value, str)
                ):
                    found[field.target.id] = _plain(text.value.value)
    return found


def _plain(text: str) -> str:
    """Return the text of a docstring without its markup, in one line."""
    words = " ".join(text.split()).replace("``math.inf``", "``inf``").replace("``None``", "left out")
    return re.sub(r"``(.*?)``", r"\1", words)


def _fields() -> Iterator[tuple[str, _Field, Any]]:
    """Yield the name in the file, the field and the type of each option."""
    for prefix, cls in (("server.", ServerOptions), ("", ClusterServerOptions)):
        kinds = typing.get_type_hints(cls)
        for field in attrs.fields(cls):
            if field.name != "server":
                yield f"{prefix}{field.name}", field, kinds[field.name]


def configuration_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a file of options."""
    server: dict[str, Any] = {}
    top: dict[str, Any] = {
        "server": {
            "type": "object",
            "description": "The options of every process that serves.",
            "properties": server,
            "additionalProperties": False,
        },
        **{
            name: {"type": "string", "enum": list(values), "description": _PROCESS_TEXTS[name]}
            for name, values in PROCESS_SETTINGS.items()
        },
    }
    for option, field, kind in _fields():
        table = server if "." in option else top
        about = f"{option_descriptions()[field.name]} A new value applies {when_applied(field)}."
        table[field.name] = {**option_schema(field, kind), "description": about}
        if field.default is not None:
            table[field.name]["default"] = field.default
        if f"{field.name}_file" in SECRET_FILES:
            table[f"{field.name}_file"] = {
                "type": "string",
                "minLength": 1,
                "description": f"A file that has {field.name} in it.",
            }
    top["worker"] = {
        "type": "object",
        "description": "Options of a worker, which may also stand outside of this table, and its masters.",
        "properties": {
            **{name: top[name] for name in sorted(WORKER_OPTIONS)},
            "masters": {
                "type": "array",
                "description": "The addresses of the masters; what HOST says on the command line.",
                "items": {"type": "string", "minLength": 1, "pattern": "^[^,]+$"},
                "minItems": 1,
            },
        },
        "additionalProperties": False,
    }
    top["app"] = {
        "type": "string",
        "description": "The application, MODULE:ATTRIBUTE; what `--app` says on the command line.",
        "pattern": "^[^:]+:.+$",
    }
    top["serve"] = {
        "type": "array",
        "description": "Engines, each [[serve]]; what `--serve` says on the command line.",
        "items": {
            "type": "object",
            "description": "An engine; its other keys are the options of this engine.",
            "properties": {
                "engine": {"type": "string", "minLength": 1},
                "argument": {"type": "string", "minLength": 1},
            },
            "required": ["engine"],
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of trio_cluster",
        "type": "object",
        "properties": top,
        "additionalProperties": False,
    }


def describe_configuration(file: Path) -> str:
    """Return what a file of options says, without a line break at the end. Blocks.

    Environment and flags do not count. Certificates that the file names are read.

    Raises:
        OptionsError: the file is wrong; the message names all errors.
    """
    from ..engines import read_serve

    options = load_options(config=file, environ={}, flags={})
    _check_together(file, options)
    specs = []
    for where, table in load_serve_tables(file):
        specs.append(spec := read_serve(table, where))
        need = spec.options.get("memory")
        if options.memory_size is not None and need is not None and need > options.memory_size:
            raise OptionsError(
                f"{where}: it needs {format_size(need)} of memory, and memory is {options.memory}"
            )
    settings, node = load_process_settings(file), load_node_settings(file)
    if node.masters is not None:
        master_addresses(node.masters, None, f"{file}: worker.masters")
    lines = [
        f"{file} has no errors. A node with it:",
        *(f"  - {line}" for line in _consequences(options)),
        *([] if node.app is None else [f"  - serves the models of the application {node.app}"]),
        *(f"  - serves {_served(spec)}" for spec in specs),
        *(
            []
            if node.masters is None
            else [f"  - as a worker, links to {node.masters.replace(',', ' and ')}"]
        ),
        "",
    ]
    for name, value in settings.items():
        lines += [f"{name} = {value}", f"    {_PROCESS_TEXTS[name]}"]
    for option, field, _ in _fields():
        value = getattr(options.server if "." in option else options, field.name)
        if value != field.default:
            default = "" if field.default is None else f"   (default: {shown_value(field.default)})"
            lines.append(f"{option} = {'(a secret)' if is_secret(field) else shown_value(value)}{default}")
            lines.append(f"    {option_descriptions()[field.name]}")
    lines.append("All other options have their defaults.")
    return "\n".join(lines)


def _served(spec: ServeSpec) -> str:
    """Return which models an engine serves, as far as the file says that."""
    models = spec.options.get("models") or spec.options.get("name") or ()
    names = models if isinstance(models, str) else ", ".join(models)
    where = f"the engine {spec.engine}{f' ({spec.argument})' if spec.argument else ''}"
    return f"{names} with {where}" if names else f"models with {where}"


def _check_together(file: Path, options: ClusterServerOptions) -> None:
    """Check what a node checks when it starts.

    Raises:
        OptionsError: it would not start.
    """
    server = options.server
    certificate, key, ca_file = map(path_of, (server.tls_cert, server.tls_key, options.ca_file))
    problems = []
    if key is not None and certificate is None:
        problems.append("server.tls_key: it needs tls_cert, the certificate that it is for")
    if options.internal_port is None and server.port + INTERNAL_OFFSET > 65535:
        problems.append(
            f"server.port: there is no port {server.port} + {INTERNAL_OFFSET} for workers; set internal_port"
        )
    try:
        if certificate is not None:
            server_context(certificate, key, alpn=[])
        if ca_file is not None:
            client_context(ca_file=ca_file)
    except ClusterError as error:
        problems.append(str(error))
    if problems:
        raise OptionsError("; ".join(f"{file}: {problem}" for problem in problems))


def _consequences(options: ClusterServerOptions) -> Iterator[str]:
    server = options.server
    scheme = "https" if server.has_tls else "http"
    yield f"serves the API at {scheme}://{shown_address(server.host, server.port)}"
    keys = [name for name in ("api_key", "operator_key") if getattr(server, name) is not None]
    yield (
        f"asks clients for a key ({' or '.join(keys)}, or one that was made)"
        if server.api_key
        else ("asks clients for no key, unless one was made with `trio-cluster keys create`")
    )
    internal = options.internal_port or (server.port + INTERNAL_OFFSET if server.port else 0)
    host = options.internal_host or server.host
    if options.cluster_token is not None:
        how = "with the cluster_token" + (" or a certificate" if server.has_tls else "")
    elif server.has_tls and not options.allow_anonymous_workers:
        how = "that were invited"
    else:
        how = "without a token"
    if not options.enable_cluster:
        yield "is alone: `trio-cluster run` takes no workers"
    else:
        yield f"takes workers {how} at {shown_address(host, internal)}, if it is a master"
    for name, targets in (options.aliases or {}).items():
        yield f"answers requests for {name} with {_targets(targets)}"


def _targets(targets: Any) -> str:
    if isinstance(targets, str):
        return targets
    if isinstance(targets, Mapping):
        return " or ".join(f"{name} (weight {shown_value(weight)})" for name, weight in targets.items())
    return ", else ".join(targets)


def shown_value(value: object) -> str:
    """Return the value of an option in words; ``none`` for ``None``."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, Mapping) else str(value)
