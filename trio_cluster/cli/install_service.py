"""``trio-cluster install-service``: writes the files that make a node a service of this machine.

The command line of the node is read by the parser that the node itself is started with, and its options are checked as
at a start, so what is written down works. Every relative path in it is made absolute. Nothing is started: the commands
that do that are printed.

A file that is there already is replaced if it is as it was written the last time. One that was changed by hand, or is
somebody else's, stops the command before it has written anything, unless ``--force`` is given.
"""

from __future__ import annotations

import argparse
import getpass
import grp
import math
import os
import pwd
import re
import shlex
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from ..core.state_dir import replace_file
from ..errors import ClusterError, OptionsError
from ..net.sockets import INTERNAL_OFFSET
from ..options import ClusterServerOptions
from .arguments import (
    arguments_of,
    config_file,
    options_from,
    parse_arguments,
    read_service_flags,
    serve_tables,
)
from .service_files import Service, is_as_written, launchd_plist, systemd_units
from .settings import SECRET_FILES, load_node_settings

__all__ = ["check_reachable", "install_service"]

#: Flags of a node whose value is a path.
_PATHS: Final = frozenset({"config", "tls_cert", "tls_key", "ca_file", "state_dir", *SECRET_FILES})

#: Seconds for which the event loop of a master without models may be stuck.
_WATCHDOG: Final = 30.0
#: Seconds that a node with models has more than its models may be silent.
_WATCHDOG_MARGIN: Final = 60.0

_HOMES: Final = ("/home", "/root", "/run/user", "/Users", "/var/root")

_NAME: Final = re.compile(r"[A-Za-z0-9:_.][A-Za-z0-9:_.-]*")


class _ChangedFile(ClusterError):
    """A file that would be replaced is not as it was written."""


@attrs.frozen
class _File:
    path: Path
    content: str
    mode: int = 0o644
    is_secret: bool = False


def install_service(arguments: argparse.Namespace) -> int:
    """Write the files of a service, or print them. Prints what to do next.

    Raises:
        OptionsError: the command line of the node is wrong, or makes no service.
        ClusterError: a file was changed by hand, or cannot be written.
    """
    read_service_flags(arguments)
    manager: Literal["systemd", "launchd"] = arguments.manager or (
        "launchd" if sys.platform == "darwin" else "systemd"
    )
    service, secrets = _service(arguments, manager)
    places = _Places.of(manager, service)
    prefix = Path("/") if arguments.prefix is None else Path(arguments.prefix).absolute()
    files = [
        _File(places.secrets / name, f"{value}\n", 0o600, is_secret=True) for name, value in secrets.items()
    ]
    if manager == "launchd":
        text = launchd_plist(service, str(places.log))
        # An invitation is in it, and it is read by launchd and its user only.
        mode = 0o600 if _has_invitation(service) else 0o644
        files.append(_File(places.units / f"{service.name}.plist", text, mode))
    else:
        files += [_File(places.units / name, text) for name, text in systemd_units(service).items()]
    files = [attrs.evolve(each, path=prefix / each.path.relative_to("/")) for each in files]
    if arguments.dry_run:
        for each in files:
            print(f"# {each.path}" + (" (for its owner only)" if each.mode == 0o600 else ""))
            print("(a secret)\n" if each.is_secret else each.content)
    else:
        _write(files, force=arguments.force, owner=service.run_as if manager == "launchd" else None)
    for line in _next_steps(service, manager, places, files):
        print(line, file=sys.stderr)
    return 0


def _has_invitation(service: Service) -> bool:
    """Tell whether the command line of a service has an invitation in it."""
    return "--join" in service.arguments


@attrs.frozen
class _Places:
    """Where files are, without the prefix."""

    units: Path
    secrets: Path
    log: Path

    @classmethod
    def of(cls, manager: Literal["systemd", "launchd"], service: Service) -> _Places:
        name = service.name
        if manager == "systemd":
            config = _config_home() if service.is_user else Path("/etc")
            units = config / "systemd" / ("user" if service.is_user else "system")
            return cls(units, config / "trio-cluster" / name, Path("/"))
        if service.is_user:
            library = Path.home() / "Library"
            support = library / "Application Support" / "trio-cluster" / name
            return cls(library / "LaunchAgents", support, library / "Logs" / f"{name}.log")
        secrets = Path("/usr/local/etc/trio-cluster") / name
        return cls(Path("/Library/LaunchDaemons"), secrets, Path("/Library/Logs") / f"{name}.log")


def _config_home() -> Path:
    given = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".config"


def _service(
    arguments: argparse.Namespace, manager: Literal["systemd", "launchd"]
) -> tuple[Service, dict[str, str]]:
    """Return what is to run, and the secrets that are to be written, by the name of the option."""
    node: Literal["master", "worker"] = arguments.node
    given = parse_arguments([node, *arguments.arguments])
    app = given.app or load_node_settings(config_file(given)).app
    _check_environment()
    options = options_from(_without_missing_secrets(given))
    has_models = bool(app or given.serve or serve_tables(given))
    if node == "worker" and not has_models:
        raise OptionsError("a worker needs something to serve: give --app MODULE:ATTRIBUTE or --serve SPEC")
    if node == "master" and options.server.port == 0:
        raise OptionsError("PORT: a service needs a port of its own, and not a free one each time")
    name = arguments.unit or f"trio-cluster-{node}"
    if not _NAME.fullmatch(name):
        raise OptionsError(f"--unit: expected letters, digits and any of . _ : -, got {name!r}")
    is_user, run_as = arguments.user, arguments.run_as
    if is_user and run_as:
        raise OptionsError("--run-as: a service of a user runs as this user; leave --user or --run-as out")
    if options.state_dir is not None and not is_user and not run_as and manager == "systemd":
        raise OptionsError(
            f"--state-dir: the service has one of its own, /var/lib/{name}; leave it out, or say with --run-as whose "
            "it is"
        )
    if manager == "launchd" and not is_user and not run_as:
        raise OptionsError(
            "--run-as: say as which user the service runs, or make it one of yours with --user"
        )
    secrets, files = _secrets(given, options)
    state_dir = None if given.state_dir is None else str(Path(given.state_dir).expanduser().absolute())
    if manager == "launchd" and not is_user and state_dir is None:
        state_dir = f"/usr/local/var/lib/trio-cluster/{name}"
    program = [arguments.program] if arguments.program else _program()
    directory = str(Path.cwd()) if app is not None or _has_file_of_model(given) else None
    words = list(_words(given))
    join_file = None
    service = Service(
        name=name,
        node=node,
        program=program,
        arguments=words,
        made_by=shlex.join(["trio-cluster", "install-service", *_shown(arguments, given)]),
        is_user=is_user,
        run_as=run_as,
        has_models=has_models,
        can_be_replaced=node == "master" and options.processes == 1,
        has_config=given.config is not None,
        listens=_listens(options) if node == "master" and manager == "systemd" else (),
        port=options.server.port,
        state_dir=state_dir,
        directory=directory,
        drain_timeout=options.drain_timeout,
        watchdog=_watchdog(arguments.watchdog, options, has_models=has_models),
        has_guardian=node == "worker" and options.guardian is not False,
    )
    places = _Places.of(manager, service)
    if (token := getattr(given, "join", None)) is not None:
        if manager == "launchd":
            words += ["--join", token]
        else:
            secrets["join"] = f"JOIN={token}"
            join_file = str(places.secrets / "join")
    files |= {option: str(places.secrets / option) for option in secrets if option != "join"}
    if not is_user:
        try:
            check_reachable([*program[:1], *([directory] if directory else [])], run_as)
        except OptionsError as error:
            # What is only shown, or is for a package, may be meant for another place.
            if not (arguments.dry_run or arguments.prefix):
                raise
            print(f"trio-cluster: warning: {error}", file=sys.stderr)
    needed = [program[0], os.path.realpath(program[0]), *([directory] if directory else [])]
    needed += [str(given.config.absolute())] if given.config is not None else []
    in_home = any(path.startswith(f"{home}/") for path in needed for home in _HOMES)
    return attrs.evolve(
        service, arguments=words, secrets=files, join_file=join_file, shows_home=in_home
    ), secrets


def _check_environment() -> None:
    """Make sure that no variable has an effect here that it would not have on the service.

    Raises:
        OptionsError: one has.
    """
    harmless = {"CACHE", "LOG_LEVEL", "LOG_FORMAT"}
    harmless |= {name.upper() for name in (*SECRET_FILES, *SECRET_FILES.values())}
    for variable in sorted(os.environ):
        prefix, found, name = variable.partition("TRIO_CLUSTER_")
        if found and not prefix and name not in harmless:
            raise OptionsError(f"{variable}: is set here, and not for the service; give a flag in its place")


def _without_missing_secrets(given: argparse.Namespace) -> argparse.Namespace:
    """Return arguments without the files of secrets that are not there yet, or that only root may read."""
    checked = argparse.Namespace(**vars(given))
    for option in SECRET_FILES:
        file = getattr(given, option, None)
        if file is not None and not os.access(file, os.R_OK):
            setattr(checked, option, None)
            print(f"note: {file} is to be there when the service is started", file=sys.stderr)
    return checked


def _has_file_of_model(given: argparse.Namespace) -> bool:
    """Tell whether a node finds the file of a model in the current directory."""
    words = [word for spec in given.serve for word in re.split("[:,=]", spec)]
    return any(word and Path(word).exists() for word in words)


def _secrets(
    given: argparse.Namespace, options: ClusterServerOptions
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the secrets that are to be written into files, and the files of those that are in one already.

    Both by the name of the option. Secrets in the file of options stay there.
    """
    values: dict[str, str] = {}
    files: dict[str, str] = {}
    for file_option, option in SECRET_FILES.items():
        variable = f"TRIO_CLUSTER_{option.upper()}"
        from_flag = getattr(given, option, None), getattr(given, file_option, None)
        value, file = from_flag
        if from_flag == (None, None):
            value, file = os.environ.get(variable), os.environ.get(f"{variable}_FILE")
        if not hasattr(given, option):
            # A worker has no use for it.
            continue
        if file is not None:
            files[option] = str(Path(file).expanduser().absolute())
        elif value is not None:
            values[option] = value
    return values, files


def _words(given: argparse.Namespace) -> Iterator[str]:
    """Yield the arguments of a node: without secrets and the state directory, and with absolute paths."""
    hidden = {*SECRET_FILES, *SECRET_FILES.values(), "state_dir", "join", "help"}
    flags: list[str] = []
    for action in arguments_of(given.command):
        value = getattr(given, action.dest, None)
        if action.dest in hidden or value is None or value is False or value == []:
            if action.dest in ("access_log", "guardian") and value is False and action.const is False:
                flags.append(action.option_strings[-1])
            continue
        if not action.option_strings:
            yield str(value)
            continue
        flag = action.option_strings[-1]
        if action.nargs == 0:
            flags.append(flag)
            continue
        for each in value if isinstance(value, list) else [value]:
            text = _text_of(each)
            flags += [flag, str(Path(text).expanduser().absolute()) if action.dest in _PATHS else text]
    yield from flags


def _text_of(value: Any) -> str:
    if isinstance(value, tuple):
        host, port = value
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(arguments: argparse.Namespace, given: argparse.Namespace) -> Iterator[str]:
    """Yield the command line for the heading of the files, without secrets."""
    for flag in ("user", "manager", "unit", "run_as", "program", "watchdog"):
        value = getattr(arguments, flag)
        if value is True:
            yield f"--{flag}"
        elif value not in (None, False):
            yield from (f"--{flag.replace('_', '-')}", _text_of(value))
    yield arguments.node
    yield from _words(given)


def _program() -> list[str]:
    script = Path(sys.executable).with_name("trio-cluster")
    return [str(script)] if script.exists() else [sys.executable, "-m", "trio_cluster"]


def _listens(options: ClusterServerOptions) -> list[tuple[str, int]]:
    """Return the addresses on which a master listens."""
    host, port = options.server.host, options.server.port
    internal_port = options.internal_port or port + INTERNAL_OFFSET
    found: list[tuple[str, int]] = []
    for each, number in ((host, port), (options.internal_host or host, internal_port)):
        try:
            infos = socket.getaddrinfo(each, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise OptionsError(f"'{each}': {error.strerror or error}") from error
        found += sorted({(str(address[0]), number) for *_, address in infos})
    return list(dict.fromkeys(found))


def _watchdog(given: float | None, options: ClusterServerOptions, *, has_models: bool) -> float | None:
    if given is not None:
        return given or None
    if not has_models:
        return _WATCHDOG
    # A handler may block the event loop: such a node is busy and not dead, for as long as a model may be silent.
    silence = options.server.default_timeout + _WATCHDOG_MARGIN
    return None if math.isinf(silence) else silence


def check_reachable(paths: Sequence[str], run_as: str | None) -> None:
    """Make sure that the user of the service can reach what it needs, as far as that can be told.

    Raises:
        OptionsError: it cannot.
    """
    for path in paths:
        if path.startswith(("/tmp/", "/var/tmp/")):
            raise OptionsError(f"{path}: the service has a /tmp of its own; start in another directory")
        for each in [path, os.path.realpath(path)]:
            for folder in reversed(Path(each).parents):
                try:
                    status = folder.stat()
                except OSError:
                    break
                if not _may_enter(status, run_as):
                    who = "a user of its own" if run_as is None else f"'{run_as}'"
                    raise OptionsError(
                        f"{path}: the service runs as {who}, which cannot enter {folder}; install trio_cluster "
                        "elsewhere (python3 -m venv /opt/trio-cluster), start in another directory, or give "
                        "--run-as USER"
                    )


def _may_enter(status: os.stat_result, run_as: str | None) -> bool:
    if status.st_mode & stat.S_IXOTH:
        return True
    if run_as is None:
        return False
    try:
        user = pwd.getpwnam(run_as)
    except KeyError:
        return True
    if user.pw_uid == 0 or (user.pw_uid == status.st_uid and status.st_mode & stat.S_IXUSR):
        return True
    groups = {user.pw_gid, *(group.gr_gid for group in grp.getgrall() if run_as in group.gr_mem)}
    return bool(status.st_mode & stat.S_IXGRP) and status.st_gid in groups


def _write(files: Sequence[_File], *, force: bool, owner: str | None) -> None:
    """Write files, all or none, as far as that can be known before.

    Args:
        files: to write.
        force: replace also those that are not as they were written.
        owner: the user to whom secrets belong; ``None``: the user of this process.

    Raises:
        ClusterError: one is not as it was written, or cannot be written.
    """
    try:
        if not force:
            for each in files:
                _check_unchanged(each)
        user = None if owner is None else _user_number(owner)
        for each in files:
            each.path.parent.mkdir(mode=0o700 if each.is_secret else 0o755, parents=True, exist_ok=True)
            replace_file(
                each.path, each.content.encode(), mode=each.mode, user=user if each.is_secret else None
            )
            print(f"wrote {each.path}" + (" (for its owner only)" if each.mode == 0o600 else ""))
    except OSError as error:
        hint = "; give --user for a service of your own" if isinstance(error, PermissionError) else ""
        # Only what opens a file knows its name.
        raise ClusterError(f"{error.filename or each.path}: {error.strerror}{hint}") from error


def _user_number(name: str) -> int | None:
    """Return the number of a user; ``None`` if there is none of that name on this machine."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def _check_unchanged(file: _File) -> None:
    try:
        found = file.path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    if found != file.content and (file.is_secret or not is_as_written(found)):
        what = "has another secret" if file.is_secret else "was changed, or is not from this command"
        raise _ChangedFile(f"{file.path}: it {what}; nothing was written (--force replaces it)")


def _next_steps(service: Service, manager: str, places: _Places, files: Sequence[_File]) -> Iterator[str]:
    """Yield lines that say what to do next."""
    if manager == "launchd":
        path = shlex.quote(str(places.units / f"{service.name}.plist"))
        yield "next:"
        if service.is_user:
            yield f"  launchctl bootstrap gui/$(id -u) {path}"
        else:
            assert service.state_dir is not None
            assert service.run_as is not None
            user, folder = shlex.quote(service.run_as), shlex.quote(service.state_dir)
            yield f"  sudo install -d -m 700 -o {user} {folder}"
            yield f"  sudo launchctl bootstrap system {path}"
        return
    control = "systemctl --user" if service.is_user else "systemctl"
    units = " ".join([*([f"{service.name}.socket"] if service.listens else []), f"{service.name}.service"])
    yield "next:"
    yield f"  {control} daemon-reload"
    yield f"  {control} enable --now {units}"
    if service.is_user:
        yield f"  loginctl enable-linger {getpass.getuser()}    # so that it runs without a login"
    yield f"and to see how it does: {control} status {service.name}"
    if service.can_be_replaced:
        yield f"a new version, or a changed file of options, without a gap: {control} reload {service.name}"
