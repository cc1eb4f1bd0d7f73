"""The ``trio-cluster`` command: it runs a node, or asks one, and reports failures in one line.

Theory of operation
===================

*Exit codes.* 0: stopped as asked, by one or two signals or by the application itself. 1: failed at run time. 2: bad
usage, which is a wrong flag, a wrong option from any source, an application that cannot be found, or a worker that has
nothing to serve. An error is one line on standard error; its traceback is logged at level ``debug``.

*Signals.* The first SIGINT or SIGTERM makes the server drain and stop. Before the server is up, it stops the process
instead. The second one cancels everything. If a thread does not react to that, the third one kills the process.

SIGHUP means two things, and both are wanted: an administrator asks a server to read its configuration again, or the
terminal of the process was closed. A server without a file of options has nothing to read, so it stops. One that has a
file stops if the terminal that it was started from is gone; otherwise, or if it was started under nohup, it reads.

*Imports.* A command that only asks a node, such as ``trio-cluster status``, does not import a server: that takes most
of a second. So what only a node needs is imported in the functions that start one.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

import attrs
import trio

from ..core.addresses import split_address
from ..core.redaction import without_keys
from ..core.state_dir import StateDir, StateDirError, default_state_dir, path_of
from ..errors import ClusterError, OptionsError
from ..net.activation import ActivatedNetwork, activated_sockets
from ..net.service_manager import ServiceManager
from ..net.sockets import INTERNAL_OFFSET, close_all, open_pair, outward_address, port_of, shown_address
from ..options import ClusterMode, ClusterServerOptions
from . import account_commands, logs
from .admin_client import DEFAULT_PORT, NodeAddress, node_url, printable, request_json
from .arguments import (
    add_node_settings,
    config_file,
    log_settings,
    master_addresses,
    options_from,
    parse_arguments,
    serve_tables,
)
from .configuration import Configuration, reload_on_signal
from .process import has_terminal, raise_descriptor_limit, tune_garbage_collector
from .schema import configuration_schema, describe_configuration
from .service import ServiceSuccessorStarter, replace
from .tables import describe_calls, describe_reload, describe_status, describe_story

if TYPE_CHECKING:
    from ..engines import ServeSpec
    from ..group.member import Member
    from ..group.messages import Up
    from ..group.supervisor import Supervisor
    from ..limits.memory import MemoryLimiter
    from ..server import ClusterServer

__all__ = ["main", "run_application"]

logger = logging.getLogger(__name__)

#: Addresses that only this machine reaches.
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")

#: The state directory of the master that ``install-service`` makes a service of the system.
_STATE_OF_SERVICE: Final = Path("/var/lib/trio-cluster-master")

_PACKAGE: Final = f"{Path(__file__).parent.parent}{os.sep}"

#: Seconds for each look whether a worker was given the wrong port.
_PROBE_TIMEOUT: Final = 10.0

#: Seconds between two polls of a worker that drains.
_DRAIN_POLL: Final = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Blocks until the command has ended.

    Args:
        argv: the arguments; ``sys.argv[1:]`` if ``None``.

    Returns:
        The exit code; see the top of this module. Errors have been printed.
    """
    return _main(argv, None)


def run_application(server: ClusterServer, argv: Sequence[str] | None = None) -> int:
    """Run a server as the command line would; see :meth:`ClusterServer.main`.

    Args:
        server: what ``--app`` would name.
        argv: the arguments, ``[run | master | worker] ...``; ``sys.argv[1:]`` if ``None``.

    Returns:
        The exit code; see the top of this module. Errors have been printed.
    """
    return _main(argv, server)


def _main(argv: Sequence[str] | None, application: ClusterServer | None) -> int:
    debug = False
    _escape_what_cannot_be_encoded()
    try:
        arguments = parse_arguments(argv, None if application is None else Path(sys.argv[0]).name or "python")
        arguments.application = application
        add_node_settings(arguments, is_application=application is not None)
        arguments.argv = None if argv is None else list(argv)
        level, log_format = log_settings(arguments)
        debug = level == "debug"
        logs.configure(level, log_format)
        code = _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who reads our output has read enough, as `head` does. What is still buffered would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as exit:
        # Raised by argparse for --help and --version, and perhaps by the application while it is imported.
        return exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except KeyboardInterrupt:
        return 0
    except (Exception, BaseExceptionGroup) as error:
        causes = [
            cause for cause in _causes(error) if not isinstance(cause, (KeyboardInterrupt, trio.Cancelled))
        ]
        if not causes:
            return 0
        if debug:
            logger.debug("the command failed", exc_info=error)
        sentences = dict.fromkeys(_describe_error(cause) for cause in causes)
        print(without_keys(f"trio-cluster: error: {'; '.join(sentences)}"), file=sys.stderr)
        return 2 if all(isinstance(cause, OptionsError) for cause in causes) else 1


def _escape_what_cannot_be_encoded() -> None:
    """Let names that the terminal's encoding does not have be shown as escapes, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group, however deep; an exception that is no group itself."""
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _causes(member)
    else:
        yield error


def _describe_error(error: BaseException) -> str:
    """Return one line about an error; with the place in the code if it is not one of the expected kinds."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (ClusterError, OSError)):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        frames = traceback.extract_tb(error.__traceback__)
        if frames:
            # The user's own line rather than the one of this package that has refused what it does.
            own = [frame for frame in frames if not frame.filename.startswith((_PACKAGE, "<"))]
            frame = (own or frames)[-1]
            text += f" ({Path(frame.filename).name}, line {frame.lineno}; see --log-level debug)"
    return " ".join(text.split())


def _run(arguments: argparse.Namespace) -> int:
    server = _server(arguments)
    if server.options.processes > 1:
        raise OptionsError("processes: only `trio-cluster master` can be several processes, and not `run`")
    return _serve(server, partial(server.run, server.options.server.port), arguments)


def _run_group(server: ClusterServer, arguments: argparse.Namespace) -> int:
    """Run a master that is several processes, of which this one is the supervisor."""
    if arguments.take_over:
        raise OptionsError(
            "--take-over: a master of several processes cannot take over yet; stop the other one"
        )
    raise_descriptor_limit()
    manager = ServiceManager.from_environ(os.environ, os.getpid())
    return trio.run(_supervise, server, arguments, manager, restrict_keyboard_interrupt_to_checkpoints=True)


async def _supervise(
    server: ClusterServer, arguments: argparse.Namespace, manager: ServiceManager | None
) -> int:
    from ..group.supervisor import Supervisor

    options = server.options
    limiter = None if options.limits is not None else _group_limiter(options)
    host, internal_host = options.server.host, options.internal_host or options.server.host
    clients, workers = await open_pair(
        server.network, host, options.server.port, internal_host, options.internal_port
    )
    supervisor = Supervisor(
        options.processes,
        options.server.worker_id or f"{socket.gethostname()}-{os.getpid()}",
        _same_command(arguments),
        os.environ,
        clients,
        workers,
        limiter,
    )

    if server.reloader is not None:
        supervisor.reloader = supervisor.reload_members

    def started(up: Up) -> None:
        fields = _serving_fields(
            options, up.url, port_of(clients), ClusterMode.MASTER, up.models, port_of(workers)
        )
        logger.info("serving", extra={"fields": {**fields, "processes": options.processes}})
        if manager is not None:
            manager.ready(f"serving {up.url} in {options.processes} processes")

    code = 0
    try:
        async with nullcontext() if limiter is None else limiter.opened(), trio.open_nursery() as nursery:
            await nursery.start(_stop_on_signals, nursery.cancel_scope, supervisor, manager)
            if manager is not None:
                nursery.start_soon(manager.run)
            code = await supervisor.run(started)
            nursery.cancel_scope.cancel(reason="the group has ended")
    finally:
        close_all([*clients, *workers])
    return code


def _group_limiter(options: ClusterServerOptions) -> MemoryLimiter:
    """Return what counts the requests of keys for all processes of a group, with what was used before."""
    from ..limits.memory import MemoryLimiter

    port = options.server.port
    if options.state_dir is None and port == 0:
        return MemoryLimiter()
    try:
        path = path_of(options.state_dir) or default_state_dir(os.environ, f"master-{port}")
        return MemoryLimiter(state_dir=StateDir(path))
    except StateDirError as error:
        if options.state_dir is not None:
            raise
        logger.warning("what keys have used will not survive a restart: %s", error)
        return MemoryLimiter()


def _same_command(arguments: argparse.Namespace) -> list[str]:
    """Return what starts this command once more."""
    if arguments.application is not None:
        # A program of the user's, which may have been started as a file or as a module.
        return [sys.executable, *sys.orig_argv[1:]]
    return [
        sys.executable,
        "-m",
        "trio_cluster",
        *(sys.argv[1:] if arguments.argv is None else arguments.argv),
    ]


async def _run_in_group(
    server: ClusterServer, sock: socket.socket, *, task_status: _Announcer
) -> ClusterMode:
    """Run one process of a master that is several."""
    from ..group.member import Member

    member = await Member.join(sock)
    return await server.run_in_group(member, started=attrs.evolve(task_status, member=member).started)


def _master(arguments: argparse.Namespace) -> int:
    from ..group.member import socket_to_supervisor

    to_supervisor = socket_to_supervisor(os.environ)
    server = _server(arguments)
    if to_supervisor is not None:
        return _serve(server, partial(_run_in_group, server, to_supervisor), arguments)
    if server.options.processes > 1:
        return _run_group(server, arguments)
    run = partial(server.run_as_master, server.options.server.port, take_over=arguments.take_over)
    return _serve(server, run, arguments)


def _replace(arguments: argparse.Namespace) -> int:
    options = options_from(arguments)
    if options.processes > 1:
        raise OptionsError("processes: a master of several processes cannot be taken over yet; restart it")
    return replace(options.state_dir, options.server.port)


def _worker(arguments: argparse.Namespace) -> int:
    has_engine = arguments.serve or serve_tables(arguments)
    if arguments.app is None and arguments.application is None and not has_engine:
        raise OptionsError("a worker needs something to serve: give --app MODULE:ATTRIBUTE or --serve SPEC")
    if arguments.masters_from is not None and arguments.master_host is not None:
        raise OptionsError("--masters-from: it says where the masters are; leave HOST out")
    several = arguments.master_host is not None and "," in arguments.master_host
    if arguments.join is not None and (
        arguments.connect_tls or (arguments.master_host is not None and not several)
    ):
        raise OptionsError("--join: the invitation says where the master is; leave HOST out")
    name = _masters_from(arguments)
    if arguments.master_host is None:
        server = _server(arguments)
        named: dict[str, Any] = {}
        if name is not None:
            named = {"masters_from": (name[0], _internal_port(server, name[1]))}
        if arguments.join is not None:
            return _serve(server, partial(server.run_as_member, arguments.join, **named), arguments)
        if _has_joined(server.options.state_dir):
            return _serve(server, partial(server.run_as_member, **named), arguments)
        if named:
            run = partial(server.run_as_worker, **named, tls=arguments.connect_tls)
            return _serve(server, run, arguments)
        arguments.master_host = "127.0.0.1"
    given, tls = master_addresses(arguments.master_host, arguments.port, arguments.host_label)
    tls = tls or arguments.connect_tls
    if arguments.port is None and given[0][1] is not None:
        arguments.port = given[0][1]
    server = _server(arguments)
    masters = [(host, server.options.server.port if port is None else port) for host, port in given]
    internal = [(host, _internal_port(server, port)) for host, port in masters]
    if arguments.join is not None:
        run = partial(server.run_as_member, arguments.join, masters=internal)
        return _serve(server, run, arguments)
    run = partial(_run_as_worker, server, internal, tls)
    if server.options.internal_port is None:
        run = partial(_run_worker, server, masters, tls)
    return _serve(server, run, arguments)


def _masters_from(arguments: argparse.Namespace) -> tuple[str, int] | None:
    """Return the name and the port of ``--masters-from``, if it was given."""
    if arguments.masters_from is None:
        return None
    try:
        name, port = split_address(arguments.masters_from)
    except ValueError:
        raise OptionsError(f"--masters-from: expected NAME:PORT, got {arguments.masters_from!r}") from None
    return name, port


def _internal_port(server: ClusterServer, port: int) -> int:
    """Return the port for workers of a master with this port of its API."""
    if server.options.internal_port is not None:
        return server.options.internal_port
    if port == 0 or port + INTERNAL_OFFSET > 65535:
        raise OptionsError(
            f"PORT: a master on port {port} has no port {port} + {INTERNAL_OFFSET} for workers; "
            "give that port with --internal-port"
        )
    return port + INTERNAL_OFFSET


async def _run_as_worker(
    server: ClusterServer,
    masters: Sequence[tuple[str, int]],
    tls: bool,
    *,
    task_status: trio.TaskStatus[ClusterMode],
) -> ClusterMode:
    """Run a worker of one or more masters, which are given by their hosts and their ports for workers."""
    if len(masters) == 1:
        return await server.run_as_worker(*masters[0], tls=tls, task_status=task_status)
    return await server.run_as_worker(masters=masters, tls=tls, task_status=task_status)


async def _run_worker(
    server: ClusterServer,
    masters: Sequence[tuple[str, int]],
    tls: bool,
    *,
    task_status: trio.TaskStatus[ClusterMode],
) -> ClusterMode:
    """Run a worker, and find out meanwhile whether it was given a port for workers instead of an API's.

    The port that follows from a right one is tried first: the master is silent about that, while an API has a line in
    its access log for each attempt.

    Args:
        server: the worker.
        masters: the hosts of the masters and the ports of their APIs.
        tls: whether they speak TLS.
        task_status: see :meth:`ClusterServer.run_as_worker`.

    The port that follows from a right one is tried first: the master is silent about that, while an API has a line in
    its access log for each attempt.

    Raises:
        ClusterError: it was.
    """
    from ..cluster.probe import check_is_cluster_server

    mistaken: tuple[str, int] | None = None
    mode = ClusterMode.WORKER
    async with trio.open_nursery() as nursery:

        async def probe(host: str, port: int) -> None:
            nonlocal mistaken
            if await check_is_cluster_server(host, port + INTERNAL_OFFSET, _PROBE_TIMEOUT):
                return
            if await check_is_cluster_server(host, port, _PROBE_TIMEOUT):
                mistaken = host, port
                nursery.cancel_scope.cancel(reason="the port is the one for workers")

        for host, port in masters:
            nursery.start_soon(probe, host, port)
        internal = [(host, port + INTERNAL_OFFSET) for host, port in masters]
        mode = await _run_as_worker(server, internal, tls, task_status=task_status)
        nursery.cancel_scope.cancel(reason="the worker has stopped")
    if mistaken is not None:
        host, port = mistaken
        raise ClusterError(
            f"{host}: {port} is the master's port for workers; give the port of its API, which is "
            f"{port - INTERNAL_OFFSET}, or --internal-port {port}"
        )
    return mode


def _has_joined(state_dir: str | None) -> bool:
    """Tell whether the worker of this machine has joined a cluster."""
    directory = path_of(state_dir) or default_state_dir(os.environ, "worker")
    return (directory / "membership.json").exists()


def _server(arguments: argparse.Namespace) -> ClusterServer:
    from ..server import ClusterServer

    base = None
    if arguments.app is None and arguments.application is None:
        server = ClusterServer(options_from(arguments))
    else:
        server = arguments.application or _load_app(arguments.app, arguments.app_label)
        base = server.options
        server.options = options_from(arguments, base=base)
    if (file := config_file(arguments)) is not None:
        server.reloader = Configuration(
            server,
            file,
            server.options,
            log_settings(arguments),
            partial(options_from, arguments, base),
            partial(log_settings, arguments),
            partial(_checked_engines, arguments),
        ).reload
    if arguments.command != "worker":
        _use_activated_sockets(server)
    if server.options.guardian is None and arguments.command != "master":
        server.options.guardian = True
    if getattr(arguments, "listen", None) is not None:
        server.set_worker_listen_address(*arguments.listen)
    return server


def _checked_engines(arguments: argparse.Namespace) -> list[tuple[str, dict[str, object]]]:
    """Return the engines that the file names, when they have been checked.

    Raises:
        OptionsError, ClusterError: one of them cannot serve.
    """
    tables = serve_tables(arguments)
    if tables:
        from ..engines import read_serve

        for label, table in tables:
            read_serve(table, label)
    return tables


def _use_activated_sockets(server: ClusterServer) -> None:
    """Serve on the sockets that systemd has opened, if it has."""
    sockets = activated_sockets(os.environ, os.getpid())
    if sockets:
        port = server.options.server.port
        internal_port = server.options.internal_port or port + INTERNAL_OFFSET
        server.network = ActivatedNetwork(sockets, (port, internal_port))


def _load_app(text: str, label: str) -> ClusterServer:
    """Import an application. The current directory is searched first, as for a script.

    Args:
        text: ``MODULE:ATTRIBUTE``.
        label: where it was given; begins the messages of errors.
    """
    module_name, _, attribute = text.partition(":")
    names = [*module_name.split("."), *attribute.split(".")]
    if not all(map(str.isidentifier, names)) or module_name.endswith(".py"):
        raise OptionsError(f"{label}: expected MODULE:ATTRIBUTE, for instance app:server, got {text!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Bad usage only if the module itself or a package above it is missing, not a module that it imports.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise OptionsError(
            f"{label}: there is no module {error.name!r}, neither in {here} nor installed; start in its directory"
        ) from error
    from ..server import ClusterServer

    found: object = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise OptionsError(f"{label}: module {module_name!r} has no attribute {attribute!r}") from error
    if not isinstance(found, ClusterServer):
        raise OptionsError(f"{label}: {text} is of type {type(found).__name__}, not a ClusterServer")
    return found


def _serve(
    server: ClusterServer, run: Callable[..., Awaitable[ClusterMode]], arguments: argparse.Namespace
) -> int:
    specs: list[ServeSpec] = []
    tables = serve_tables(arguments)
    if arguments.serve or tables:
        from ..engines import parse_serve, read_serve

        specs = [read_serve(table, label) for label, table in tables]
        try:
            specs += [parse_serve(text) for text in arguments.serve]
        except ValueError as error:
            raise OptionsError(f"--serve: {error}") from error
    raise_descriptor_limit()
    manager = ServiceManager.from_environ(os.environ, os.getpid())
    if manager is not None and arguments.command == "master":
        server.successor_starter = ServiceSuccessorStarter(manager, _same_command(arguments))
    # A worker is up before it has found a master: that one may be started later, on another machine.
    ready_at_once = arguments.command == "worker"
    trio.run(
        _serve_until_stopped, server, run, specs, manager, ready_at_once,
        restrict_keyboard_interrupt_to_checkpoints=True,
    )  # fmt: skip
    return 0


async def _serve_until_stopped(
    server: ClusterServer,
    run: Callable[..., Awaitable[ClusterMode]],
    specs: Sequence[ServeSpec],
    manager: ServiceManager | None,
    ready_at_once: bool,
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signals, nursery.cancel_scope, server, manager)
        if manager is not None:
            nursery.start_soon(manager.run)
        if specs:
            from ..engines import serve_engine

            # One after the other, and before the server, so that a worker registers with all of its models.
            for spec in specs:
                await nursery.start(serve_engine, spec, server)
        if manager is not None and ready_at_once:
            manager.ready("looking for its master")
        await run(task_status=_Announcer(server, len(specs), manager=manager))
        if manager is not None:
            # When the main process has ended, the manager kills what is left of the service.
            with trio.move_on_after(server.options.drain_timeout):
                await manager.wait_predecessor()
            manager.close()
        nursery.cancel_scope.cancel(reason="the server has stopped")


@attrs.frozen
class _Announcer:
    """The ``task_status`` of the server: logs that it is up. Synchronous.

    The server is not started with ``nursery.start``, which raises an error if a task ends before it has called
    ``started()``. Stopping a server before it is up is not an error.

    Attributes:
        server: the server.
        engines: how many engines serve on it.
        member: this process is one of several of a master, whose supervisor says that it is up; ``None``: it is not.
        manager: is told, too; ``None``: there is none.
    """

    server: ClusterServer
    engines: int = 0
    member: Member | None = None
    manager: ServiceManager | None = None

    def started(self, mode: ClusterMode) -> None:
        models = self.server.list_models()
        if self.manager is not None:
            is_worker = mode is ClusterMode.WORKER
            what = "registered with its master" if is_worker else f"serving {self.server.url}"
            self.manager.ready(what)
        tune_garbage_collector(rare=mode is ClusterMode.MASTER and not models)
        if mode is ClusterMode.WORKER:
            client = self.server.worker_client
            accepted = [name for name in models if client is None or name not in client.rejected_models]
            logger.info("registered with the master", extra={"fields": {"models": accepted}})
            if len(accepted) < len(models):
                logger.warning(
                    "models of this worker are refused, because the master has others of that name; to have one"
                    " model in several processes, start the master with --on-conflict replicate",
                    extra={"fields": {"models": [name for name in models if name not in accepted]}},
                )
            if not models and self.engines:
                logger.warning("this worker has no models yet: the servers behind --serve do not answer")
            elif not models:
                logger.warning("this worker has no models; give --app or --serve")
            return
        options, url = self.server.options, self.server.url or ""
        if self.member is None:
            internal_port = self.server.internal_port if mode is ClusterMode.MASTER else None
            fields = _serving_fields(options, url, self.server.port or 0, mode, models, internal_port)
            logger.info("serving", extra={"fields": fields})
        else:
            self.member.announce(url, models)
            if self.member.process > 0:
                # The first one warns for all.
                return
        if options.server.host not in _LOOPBACK and (open_for := self._open_for(mode)):
            logger.warning(
                "open on the network: %s; or listen on this machine only, with --host 127.0.0.1",
                "; ".join(open_for),
            )

    def _open_for(self, mode: ClusterMode) -> list[str]:
        """Return what anybody may do who reaches this node, and how that is changed."""
        options = self.server.options
        encrypted = (self.server.url or "").startswith("https:")
        found = []
        if not encrypted:
            found.append("keys, prompts and answers are not encrypted (start it with --tls auto)")
        if not self.server.requires_key:
            url = "" if self.server.url == f"http://127.0.0.1:{DEFAULT_PORT}" else f" {self.server.url}"
            # Without an operator key, only clients on loopback may make keys; a node on another address has none.
            on_loopback = urlsplit(self.server.url or "").hostname in _LOOPBACK
            needs_key = not on_loopback and options.server.operator_key is None
            first = "set TRIO_CLUSTER_OPERATOR_KEY for both, and " if needs_key else ""
            found.append(
                f"its models can be used without a key (set TRIO_CLUSTER_API_KEY, or {first}make keys with: "
                f"trio-cluster keys create NAME{url})"
            )
        workers_need_nothing = not encrypted or options.allow_anonymous_workers
        if mode is ClusterMode.MASTER and options.cluster_token is None and workers_need_nothing:
            found.append("workers can join without a token (set TRIO_CLUSTER_CLUSTER_TOKEN, or use TLS)")
        return found


def _serving_fields(
    options: ClusterServerOptions,
    url: str,
    port: int,
    mode: ClusterMode,
    models: Sequence[str],
    internal_port: int | None,
) -> dict[str, object]:
    """Return what the log says of a node that begins to serve."""
    fields: dict[str, object] = {"url": url, "page": f"{url}/ui/", "mode": str(mode), "models": models}
    if internal_port is not None:
        fields["workers_join_at"] = internal_port
    if options.server.host in ("0.0.0.0", "::"):
        fields["from_other_machines"] = f"{url.partition(':')[0]}://{shown_address(outward_address(), port)}"
    return fields


async def _stop_on_signals(
    scope: trio.CancelScope,
    server: ClusterServer | Supervisor | None = None,
    manager: ServiceManager | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Stop ``server`` at the first signal; cancel ``scope`` at the second, or at the first if nothing runs yet.

    ``manager`` is told what happens.

    SIGHUP reads the configuration again instead if there is one; see the top of this module.
    """
    stopping = False
    reload = None if server is None else server.reloader
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    had_terminal = not under_nohup and has_terminal()
    hangup = [] if under_nohup and reload is None else [signal.SIGHUP]
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, *hangup) as signals:
            task_status.started()
            async for number in signals:
                name = signal.Signals(number).name
                if (
                    number == signal.SIGHUP
                    and reload is not None
                    and not (had_terminal and not has_terminal())
                ):
                    # In a task of its own, so that other signals are not kept waiting.
                    nursery.start_soon(_reload_for, manager, reload)
                    continue
                if server is None or stopping or not server.is_running:
                    scope.cancel(reason=f"stopped at once by {name}")
                    break
                stopping = True
                if manager is not None:
                    manager.stopping()
                logger.info("stopping; a second signal stops at once", extra={"fields": {"signal": name}})
                server.stop()
        nursery.cancel_scope.cancel(reason="the process is being stopped")
    # Loading a model in a thread cannot be cancelled. The signal receiver has restored SIGTERM, which kills the
    # process; from here on, Ctrl-C does so too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


async def _reload_for(manager: ServiceManager | None, reload: Callable[[], Awaitable[object]]) -> None:
    """Read the configuration again because of a signal, and tell the service manager when that begins and ends."""
    if manager is not None:
        manager.reloading()
    await reload_on_signal(reload)
    if manager is not None:
        manager.reloaded()


def _demo(arguments: argparse.Namespace) -> int:
    return trio.run(
        _demo_until_stopped, arguments.port, arguments.check, arguments.host,
        restrict_keyboard_interrupt_to_checkpoints=True,
    )  # fmt: skip


async def _demo_until_stopped(port: int, check: bool, host: str) -> int:
    from ..demo import run_demo

    # The exit code if a signal ends the demo.
    code = 0
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signals, nursery.cancel_scope)
        code = await run_demo(port, check=check, host=host)
        nursery.cancel_scope.cancel(reason="the demo has ended")
    return code


def _status(arguments: argparse.Namespace) -> int:
    status = _request_status(*_node_and_key(arguments))
    print(json.dumps(status, indent=2) if arguments.json else describe_status(status))
    return 0


def _calls(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    calls = request_json(node, "/cluster/calls", key, expected=("calls",))
    print(json.dumps(calls, indent=2) if arguments.json else describe_calls(calls))
    return 0


def _why(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    path = f"/cluster/requests/{quote(arguments.request_id, safe='')}"
    story = request_json(node, path, key, expected=("outcome", "steps"))
    print(json.dumps(story, indent=2) if arguments.json else describe_story(story))
    return 0


def _top(arguments: argparse.Namespace) -> int:
    try:
        from .top import run_top
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "rich":
            raise
        from ..engines._engine import install_command

        command = install_command("trio-cluster[top]")
        raise ClusterError(f"top needs rich (the extra `top`): install it with: {command}") from error
    run_top(*_node_and_key(arguments))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    path = f"/cluster/calls/{quote(arguments.request_id, safe='')}/cancel"
    content = request_json(node, path, key, expected=("cancelled",), body={"reason": arguments.reason})
    count = content["cancelled"]
    if count == 0:
        print("no call was cancelled: the request has ended already, and its handler is about to stop")
    else:
        print("1 call was cancelled" if count == 1 else f"{printable(count)} calls were cancelled")
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    path = f"/cluster/workers/{quote(arguments.worker, safe='')}/drain"

    def drain() -> dict[str, Any]:
        return request_json(node, path, key, expected=("id", "instance", "in_flight"), body={})

    worker = drain()
    if arguments.no_wait:
        print(_drain_progress(worker))
        return 0
    try:
        _wait_until_drained(worker, drain, partial(_request_status, node, key))
    except KeyboardInterrupt:
        raise ClusterError(f"stopped waiting; the worker '{arguments.worker}' drains on") from None
    return 0


def _check_config(arguments: argparse.Namespace) -> int:
    print(describe_configuration(arguments.file))
    return 0


def _schema(_: argparse.Namespace) -> int:
    print(json.dumps(configuration_schema(), indent=2))
    return 0


def _install_service(arguments: argparse.Namespace) -> int:
    from .install_service import install_service

    return install_service(arguments)


def _backup(arguments: argparse.Namespace) -> int:
    from .backup import backup

    return backup(arguments)


def _restore(arguments: argparse.Namespace) -> int:
    from .backup import restore

    return restore(arguments)


def _reload(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    content = request_json(
        node, "/cluster/reload", key, expected=("file", "applied", "needs_restart"), body={}
    )
    print(describe_reload(content))
    return 0


def _load(arguments: argparse.Namespace) -> int:
    content = _control_model(arguments, "load")
    print(f"{printable(content['model'])} is {printable(content['state'])} on {_names(content['nodes'])}")
    return 0


def _unload(arguments: argparse.Namespace) -> int:
    content = _control_model(arguments, "unload")
    nodes = _names(content["nodes"])
    print(f"{printable(content['model'])} " + (f"was unloaded from {nodes}" if nodes else "is not loaded"))
    return 0


def _control_model(arguments: argparse.Namespace, what: str) -> dict[str, Any]:
    node, key = _node_and_key(arguments)
    path = f"/cluster/models/{quote(arguments.model, safe='')}/{what}"
    body = {} if arguments.worker is None else {"worker": arguments.worker}
    try:
        # It takes as long as the start, or the answers that are being given.
        return request_json(node, path, key, expected=("model", "state", "nodes"), body=body, waits=True)
    except KeyboardInterrupt:
        raise ClusterError(f"stopped waiting for the {what} of '{arguments.model}'") from None


def _names(names: Any) -> str:
    return ", ".join(map(printable, names)) if isinstance(names, list) else ""


def _keys(arguments: argparse.Namespace) -> int:
    return account_commands.keys(arguments, *_node_and_key(arguments))


def _usage(arguments: argparse.Namespace) -> int:
    return account_commands.usage(arguments, *_node_and_key(arguments))


def _audit(arguments: argparse.Namespace) -> int:
    return account_commands.audit(arguments, *_node_and_key(arguments))


def _wait_until_drained(
    worker: dict[str, Any], drain: Callable[[], object], request_status: Callable[[], dict[str, Any]]
) -> None:
    """Return when a worker's process is no longer connected. Prints its progress. Blocks.

    Args:
        worker: what the master says about the worker, when it was asked to drain it.
        drain: asks the master to drain the worker.
        request_status: returns the master's status.
    """
    printed = ""
    process = worker["id"], worker["instance"]
    while True:
        line = _drain_progress(worker)
        if line != printed:
            # Flushed for a reader at the other end of a pipe.
            print(line, flush=True)
            printed = line
        time.sleep(_DRAIN_POLL)
        workers = [each for each in request_status().get("workers") or () if isinstance(each, dict)]
        # Another process may have connected under the same name meanwhile; it is not the one to wait for.
        found = [each for each in workers if (each.get("id"), each.get("instance")) == process]
        if not found:
            print(f"{printable(process[0])} has left", flush=True)
            return
        worker = found[0]
        if not worker.get("draining"):
            # The worker lost its connection before the request reached it, and has reconnected.
            drain()


def _drain_progress(worker: dict[str, Any]) -> str:
    count = printable(worker.get("in_flight"))
    return f"{printable(worker['id'])} drains: {count} {'request' if count == '1' else 'requests'} in flight"


def _node_and_key(arguments: argparse.Namespace) -> tuple[NodeAddress, str | None]:
    """Return the node that the command line names, and the key to send to it."""
    options = options_from(arguments)
    server = options.server
    default = f"{'https' if server.has_tls else 'http'}://127.0.0.1:{server.port}"
    try:
        url = node_url(arguments.url if arguments.url is not None else default)
    except ValueError as error:
        raise OptionsError(f"URL: {error}") from error
    ca_file = path_of(options.ca_file) or _own_authority(url, path_of(options.state_dir))
    return NodeAddress(url, ca_file), server.operator_key or server.api_key


def _own_authority(url: str, state_dir: Path | None) -> Path | None:
    """Return the file with the authority of the node at ``url``, if its state directory is on this machine.

    A directory that is named holds for every URL, since a node may be asked by the name of its machine. Otherwise it is
    looked for in the places of this user's nodes, and of the service, by an address that is this machine's.
    """
    parts = urlsplit(url)
    if parts.scheme != "https":
        return None
    if state_dir is not None:
        directories = [state_dir]
    elif parts.hostname in _LOOPBACK:
        names = (f"master-{parts.port or 443}", f"standalone-{parts.port or 443}")
        directories = [*(default_state_dir(os.environ, name) for name in names), _STATE_OF_SERVICE]
    else:
        return None
    # The directory of the service is closed to all users but root.
    return next((path for each in directories if os.access(path := each / "ca.pem", os.R_OK)), None)


def _invite(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    wanted = {"name": arguments.name, "expires": arguments.expires, "addresses": arguments.address}
    post = {name: value for name, value in wanted.items() if value is not None}
    invitation = request_json(node, "/cluster/invites", key, expected=("token", "command"), body=post)
    # Only the line to paste goes to standard output.
    where, until = ", ".join(map(printable, invitation["addresses"])), printable(invitation["expires_at"])
    print(f"valid once, until {until}; the worker connects to {where}", file=sys.stderr)
    print(printable(invitation["command"]))
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    path = f"/cluster/workers/{quote(arguments.worker, safe='')}/revoke"
    content = request_json(node, path, key, expected=("revoked", "was_connected"), body={})
    name = printable(arguments.worker)
    print(f"{name} is refused from now on" if content["revoked"] else f"{name} had no certificate")
    if content["was_connected"]:
        print("its link was ended")
    return 0


def _ca(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    content = request_json(node, "/cluster/ca/rotate", key, expected=("fingerprint",), body={})
    print(f"the new authority is {printable(content['fingerprint'])}; invitations for the old one are void")
    return 0


def _request_status(node: NodeAddress, key: str | None) -> dict[str, Any]:
    return request_json(node, "/cluster/status", key, expected=("mode", "models", "calls"))


_COMMANDS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "demo": _demo,
    "run": _run,
    "master": _master,
    "worker": _worker,
    "status": _status,
    "calls": _calls,
    "why": _why,
    "top": _top,
    "cancel": _cancel,
    "drain": _drain,
    "replace": _replace,
    "reload": _reload,
    "check-config": _check_config,
    "schema": _schema,
    "install-service": _install_service,
    "backup": _backup,
    "restore": _restore,
    "load": _load,
    "unload": _unload,
    "keys": _keys,
    "usage": _usage,
    "audit": _audit,
    "invite": _invite,
    "revoke": _revoke,
    "ca": _ca,
}
