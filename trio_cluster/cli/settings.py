"""Loading of the options from a file, the environment and the command line; later sources override earlier ones.

Theory of operation
===================

The base, the file, the environment and the flags are merged into one tree of plain values, with a label for each leaf
that names its source. Then the tree is structured once, each leaf through the validator of its field in ``options.py``.
So all sources obey the same rules as code does, every error names the place to correct, and all errors are reported at
once. The two options classes have no field name in common, so that environment variables need no nesting.

A secret may be given in a file of its own, as containers get them: each source takes ``api_key_file`` beside
``api_key``, and so on. To the tree it is the same setting, with another label.

The file also has settings that are not options of a server, but of the command line: those of the whole process, which
the log belongs to (:data:`PROCESS_SETTINGS`); what a node serves and which masters it links to
(:class:`NodeSettings`); and the engines, ``[[serve]]``. Each has a function that reads it. What is wrong with the first
two is for :func:`load_options` to report, so that there is one error for the whole file.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeGuard, cast

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, override

from ..errors import OptionsError
from ..options import ClusterServerOptions, ServerOptions, is_secret, parse_boolean
from . import logs

__all__ = [
    "PROCESS_SETTINGS",
    "SECRET_FILES",
    "WORKER_OPTIONS",
    "NodeSettings",
    "load_node_settings",
    "load_options",
    "load_process_settings",
    "load_serve_tables",
]

_Field: TypeAlias = "attrs.Attribute[Any]"

_PREFIX: Final = "TRIO_CLUSTER_"

# Variables of this package that are not options: the command line and the engines read them.
_OTHER_VARIABLES: Final = frozenset({"CACHE", "CONFIG", "LOG_FORMAT", "LOG_LEVEL"})

# Kubernetes sets variables with the address of every service in every container. A service called "trio-cluster" sets
# TRIO_CLUSTER_SERVICE_HOST, TRIO_CLUSTER_PORT=tcp://10.0.0.1:8080 and more, which are not meant as options.
_SERVICE_LINK: Final = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_SERVICE_PORT: Final = re.compile(r"(tcp|udp|sctp)://")

#: What the file may have at its top level besides options, with the values that each may have.
PROCESS_SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "log_level": logs.LEVELS,
    "log_format": logs.FORMATS,
}

#: The names of :class:`NodeSettings`: the application stands at the top level, and the masters in the table
#: ``[worker]``.
_APP: Final = "app"
_MASTERS: Final = "masters"

#: The options that may be given in a file of their own: the name of that setting, and the name of the option.
SECRET_FILES: Final[Mapping[str, str]] = {
    f"{field.name}_file": field.name
    for options in (ServerOptions, ClusterServerOptions)
    for field in attrs.fields(options)
    if is_secret(field)
}

#: Bytes of a file with a secret, at most.
_MAX_SECRET: Final = 65536

_Path: TypeAlias = tuple[str, ...]


def _paths() -> dict[str, tuple[_Path, Any]]:
    """Return the path in the tree and the type of each option, by its name."""
    paths: dict[str, tuple[_Path, Any]] = {}
    for field, kind in typing.get_type_hints(ServerOptions).items():
        paths[field] = (("server", field), kind)
    for field, kind in typing.get_type_hints(ClusterServerOptions).items():
        if field != "server":
            paths[field] = ((field,), kind)
    return paths


_PATHS: Final = _paths()


def load_options(
    *,
    config: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
    base: ClusterServerOptions | None = None,
) -> ClusterServerOptions:
    """Return the options from a file, the environment and flags, over ``base``; later sources override earlier ones.

    Args:
        config: a TOML file. Its top level has the fields of :class:`ClusterServerOptions`, its table ``[server]``
            those of :class:`ServerOptions`. Its table ``[worker]`` may have some of the first. ``None``: there is none.
        environ: the environment. ``TRIO_CLUSTER_`` and the name of a field of either class, in capitals, sets that
            field.
        flags: the values of flags by the name of the field; ``None`` for a flag that was not given. In all three, a
            name of :data:`SECRET_FILES` stands for the option that is in that file.
        base: the values that no source sets; the defaults if ``None``. It is not changed.

    Returns:
        New options; nothing in them is shared with ``base``.

    Raises:
        OptionsError: the file cannot be read, a key or a variable is unknown, or a value is wrong. The message names
            the source and the key; if several are wrong, all of them.
    """
    tree = attrs.asdict(base if base is not None else ClusterServerOptions())
    labels: dict[_Path, str] = {}
    problems: list[str] = []
    for settings in (_read_file(config), _read_environment(environ), _read_flags(flags)):
        given: dict[_Path, str] = {}
        for path, label, value in settings:
            if path in given:
                problems.append(f"{label}: is given twice: {given[path]} is the same option")
                continue
            given[path] = label
            if isinstance(value, _Problem):
                problems.append(f"{label}: {value.text}")
                continue
            table = tree[path[0]] if len(path) == 2 else tree
            table[path[-1]] = value
            labels[path] = label
    if not problems:
        try:
            return _structure(tree)
        except cattrs.BaseValidationError as error:
            problems = list(_explain(error, labels))
    raise OptionsError("; ".join(dict.fromkeys(problems)))


@attrs.frozen
class _Problem:
    """What is wrong with a setting; stands in the place of its value."""

    text: str


_Setting: TypeAlias = tuple[_Path, str, object]


#: The options that the file may have under ``[worker]``, too.
WORKER_OPTIONS: Final = ("memory",)


def load_serve_tables(config: Path | None) -> list[tuple[str, dict[str, object]]]:
    """Return the tables ``[[serve]]`` of a file, which name engines: for each its place in the file, and its content.

    Args:
        config: the file; ``None``: there is none.

    Raises:
        OptionsError: the file cannot be read, or ``serve`` is something else.
    """
    tables = _parse_file(config).get("serve", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise OptionsError(f"{config}: serve: must be tables, each [[serve]]")
    return [(f"{config}: [[serve]] {number}", table) for number, table in enumerate(tables, 1)]


def load_process_settings(config: Path | None) -> dict[str, str]:
    """Return the settings of a file that are not options of a server, by name; see :data:`PROCESS_SETTINGS`.

    Args:
        config: the file; ``None``: there is none.

    Returns:
        Those that are there and valid. What is wrong with the file is for :func:`load_options` to report.
    """
    try:
        content = _parse_file(config)
    except OptionsError:
        return {}
    return {name: content[name] for name, values in PROCESS_SETTINGS.items() if content.get(name) in values}


@attrs.frozen
class NodeSettings:
    """What a file says in the place of arguments of the command line: what a node serves, and its masters.

    Attributes:
        app: the application, as for ``--app``; ``None``: the file does not say.
        masters: the addresses of a worker's masters, with commas between them, as for HOST; ``None``: it does not say.
    """

    app: str | None = None
    masters: str | None = None


def load_node_settings(config: Path | None) -> NodeSettings:
    """Return the application and the masters that a file names. Blocks.

    Args:
        config: the file; ``None``: there is none.

    Returns:
        What is there and has the right form. What is wrong with the file is for :func:`load_options` to report.
    """
    try:
        content = _parse_file(config)
    except OptionsError:
        return NodeSettings()
    worker = content.get("worker")
    app, masters = content.get(_APP), worker.get(_MASTERS) if isinstance(worker, dict) else None
    return NodeSettings(
        app if _is_app(app) else None,
        ",".join(masters) if _are_masters(masters) else None,
    )


def _is_app(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and all(value.partition(":"))


def _are_masters(value: object) -> TypeGuard[list[str]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, str) and each and "," not in each for each in value)
    )


def _parse_file(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        return tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionsError(f"{config}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionsError(f"{config}: is not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise OptionsError(f"{config}: is not TOML: {error}") from error


def _read_file(config: Path | None) -> Iterator[_Setting]:
    content = _parse_file(config)
    for name, values in PROCESS_SETTINGS.items():
        if name in content and (value := content.pop(name)) not in values:
            yield (name,), f"{config}: {name}", _Problem(f"must be one of {', '.join(values)}, got {value!r}")
    # For `load_serve_tables`.
    content.pop("serve", None)
    # These two are for `load_node_settings`.
    if _APP in content and not _is_app(app := content.pop(_APP)):
        yield (_APP,), f"{config}: {_APP}", _Problem(f"expected MODULE:ATTRIBUTE, got {app!r}")
    worker = content.pop("worker", {})
    if not isinstance(worker, dict):
        yield ("worker",), f"{config}: worker", _Problem("must be a table, [worker]")
        worker = {}
    if _MASTERS in worker and not _are_masters(masters := worker.pop(_MASTERS)):
        problem = _Problem(
            f"expected a list of addresses, such as ['a.lan:8080', 'b.lan:8080'], got {masters!r}"
        )
        yield ("worker", _MASTERS), f"{config}: worker.{_MASTERS}", problem
    for key, value in worker.items():
        label = f"{config}: worker.{key}"
        if key not in WORKER_OPTIONS:
            yield ("worker", key), label, _Problem(f"unknown key{_hint(key, set(WORKER_OPTIONS))}")
        else:
            # A second one, at the top level, is noticed by the caller.
            yield (key,), label, value

    known = {".".join(path) for path, _ in _PATHS.values()} | PROCESS_SETTINGS.keys()
    secrets = {".".join((*_PATHS[name][0][:-1], file)): name for file, name in SECRET_FILES.items()}
    server = content.pop("server", {})
    if not isinstance(server, dict):
        yield ("server",), f"{config}: server", _Problem("must be a table, [server]")
        server = {}
    for path, value in [
        *(((key,), value) for key, value in content.items()),
        *((("server", key), value) for key, value in server.items()),
    ]:
        dotted = ".".join(path)
        if dotted in known:
            yield path, f"{config}: {dotted}", value
        elif dotted in secrets:
            yield _read_secret(secrets[dotted], f"{config}: {dotted}", value)
        else:
            hint = _hint(dotted, known | secrets.keys())
            if hint and len(path) == 2 and "server." not in hint:
                hint += " It stands outside of [server]: above all tables"
            elif not hint and isinstance(value, dict):
                hint = "; there are the tables [server], [worker], [aliases] and [wake]; other options stand above them"
            yield path, f"{config}: {dotted}", _Problem(f"unknown key{hint}")


def _read_secret(option: str, label: str, file: object) -> _Setting:
    """Return the setting of an option that is given in a file of its own, without the spaces and newlines around it."""
    path, value = _PATHS[option][0], _Problem(f"expected the name of a file, got {file!r}")
    if not isinstance(file, (str, Path)) or not str(file):
        return path, label, value
    label = f"{label} ({file})"
    try:
        with Path(file).expanduser().open("rb") as opened:
            content = opened.read(_MAX_SECRET + 1)
        text = content.decode().strip()
    except OSError as error:
        return path, label, _Problem(f"cannot be read: {error.strerror}")
    except ValueError:
        return path, label, _Problem("is not UTF-8 text")
    if len(content) > _MAX_SECRET:
        return path, label, _Problem("is too large for a secret")
    return path, label, text or _Problem("is empty")


def _read_environment(environ: Mapping[str, str]) -> Iterator[_Setting]:
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX):
            continue
        name = variable.removeprefix(_PREFIX)
        if name in _OTHER_VARIABLES or _SERVICE_LINK.fullmatch(name):
            continue
        if name.endswith("PORT") and _SERVICE_PORT.match(text):
            continue
        if name == name.upper() and name.lower() in SECRET_FILES:
            yield _read_secret(SECRET_FILES[name.lower()], variable, text)
            continue
        if name != name.upper() or name.lower() not in _PATHS:
            known = {_PREFIX + option.upper() for option in (*_PATHS, *SECRET_FILES)}
            yield (variable,), variable, _Problem(f"unknown variable{_hint(variable, known)}")
            continue
        path, kind = _PATHS[name.lower()]
        yield path, variable, _parse(text, kind)


def _read_flags(flags: Mapping[str, object]) -> Iterator[_Setting]:
    for name, value in flags.items():
        label = _FLAG_NAMES.get(name, "--" + name.replace("_", "-"))
        if value is not None and name in SECRET_FILES:
            yield _read_secret(SECRET_FILES[name], label, value)
        elif value is not None:
            yield _PATHS[name][0], label, value


# Flags whose name is not that of their option.
_FLAG_NAMES: Final = {
    "default_timeout": "--timeout",
    "worker_id": "--name",
    "guardian": "--no-guardian",
    "port": "PORT",
}


def _hint(wrong: str, known: set[str]) -> str:
    """Return a suggestion: the known name most like ``wrong``, whichever table either is in; empty if none is."""
    last = {name.rpartition(".")[2]: name for name in known}
    # The names of flags are known best.
    last |= {
        flag[2:]: last[option] for option, flag in _FLAG_NAMES.items() if flag[:2] == "--" and option in last
    }
    close = difflib.get_close_matches(wrong.rpartition(".")[2], last, n=1, cutoff=0.75)
    return f"; did you mean {last[close[0]]}?" if close else ""


_CONVERTERS: Final[Mapping[Any, Callable[[str], object]]] = {bool: parse_boolean, int: int, float: float}


def _parse(text: str, kind: Any) -> object:
    """Convert the text of a variable to ``kind``. What cannot be converted stays text, for the validator to refuse."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (member for member in typing.get_args(kind) if member is not types.NoneType)
    try:
        return _CONVERTERS.get(kind, str)(text)
    except ValueError:
        return text


def _structuring() -> cattrs.Converter:
    """Return a converter that passes every leaf of the tree through the converter and validator of its field."""
    converter = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)

    def checked(field: _Field) -> Any:
        def structure(value: Any, _: Any) -> Any:
            if field.converter is not None:
                value = cast("Callable[[Any], Any]", field.converter)(value)
            assert field.validator is not None
            field.validator(None, field, value)
            return value

        return override(struct_hook=structure)

    for options in (ServerOptions, ClusterServerOptions):
        hooks = {field.name: checked(field) for field in attrs.fields(options) if field.name != "server"}
        converter.register_structure_hook(options, make_dict_structure_fn(options, converter, **hooks))
    return converter


_converter: Final = _structuring()


def _structure(tree: Mapping[str, object]) -> ClusterServerOptions:
    return _converter.structure(tree, ClusterServerOptions)


def _explain(
    error: cattrs.BaseValidationError, labels: Mapping[_Path, str], above: _Path = ()
) -> Iterator[str]:
    """Yield a sentence for each error that cattrs has found, beginning with the source of the value."""
    assert isinstance(error, cattrs.ClassValidationError)
    with_notes, without = error.group_exceptions()
    for problem, note in with_notes:
        path = (*above, note.name)
        if isinstance(problem, cattrs.BaseValidationError):
            yield from _explain(problem, labels, path)
        else:
            # The validators' messages begin with the field's name; the label, which has the source too, replaces it.
            yield f"{labels.get(path, '.'.join(path))}: {str(problem).removeprefix(note.name + ': ')}"
    for problem in without:
        yield str(problem)
