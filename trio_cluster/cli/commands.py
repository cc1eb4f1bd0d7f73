"""The ``trio-cluster`` command: one run of a server, and failures in one line.

Exit codes: 0, stopped as asked (by a signal, once or twice, or by the application itself); 1, failed at run
time; 2, bad usage: a wrong flag, a wrong option from wherever it comes, an application that cannot be found,
a worker that has nothing to serve. An error is one line on standard error; its traceback is logged at level
``debug``.

The first SIGINT or SIGTERM asks the server to drain and stop; while it is not up yet, that is a plain stop.
The second cancels everything; should something in a thread not heed that, a third kills the process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import attrs
import trio

from ..errors import ClusterError, OptionsError
from ..options import ClusterMode
from ..server import ClusterServer
from . import logs
from .admin_client import ask, node_url, printable
from .arguments import log_settings, master_host, options_from, parse_arguments
from .process import allow_connections, calm_collector
from .tables import describe_calls, describe_status

if TYPE_CHECKING:
    from ..engines import ServeSpec

__all__ = ["main"]

logger = logging.getLogger(__name__)

#: Seconds between two looks at a worker that drains.
_DRAIN_POLL: Final = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv[1:]`` if ``None``) and return the exit code."""
    debug = False
    try:
        arguments = parse_arguments(argv)
        level, log_format = log_settings(arguments)
        debug = level == "debug"
        logs.configure(level, log_format)
        return _COMMANDS[arguments.command](arguments)
    except SystemExit as exit:  # --help and --version; or the application, while it is imported
        return exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except KeyboardInterrupt:
        return 0
    except (Exception, BaseExceptionGroup) as error:
        causes = [
            cause for cause in _leaves(error) if not isinstance(cause, (KeyboardInterrupt, trio.Cancelled))
        ]
        if not causes:
            return 0
        if debug:
            logger.debug("the command failed", exc_info=error)
        sentences = dict.fromkeys(_sentence(cause) for cause in causes)
        print(f"trio-cluster: error: {'; '.join(sentences)}", file=sys.stderr)
        return 2 if all(isinstance(cause, OptionsError) for cause in causes) else 1


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _leaves(member)
    else:
        yield error


def _sentence(error: BaseException) -> str:
    """Say in one line what went wrong, and where if nobody foresaw it."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (ClusterError, OSError)):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        frames = traceback.extract_tb(error.__traceback__)
        if frames:
            text += f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}; see --log-level debug)"
    return " ".join(text.split())


def _run(arguments: argparse.Namespace) -> int:
    server = _server(arguments)
    return _serve(server, partial(server.run, server.options.server.port), arguments.serve)


def _master(arguments: argparse.Namespace) -> int:
    server = _server(arguments)
    return _serve(server, partial(server.run_as_master, server.options.server.port), arguments.serve)


def _worker(arguments: argparse.Namespace) -> int:
    host = master_host(arguments.master_host)
    if arguments.app is None and not arguments.serve:
        raise OptionsError("a worker needs something to serve: give --app MODULE:ATTRIBUTE or --serve SPEC")
    server = _server(arguments)
    port, internal_port = server.options.server.port, server.options.internal_port
    if internal_port is None:
        internal_port = port + 1000
        if port == 0 or internal_port > 65535:
            raise OptionsError(
                f"PORT: a master on port {port} has no port {port} + 1000; name the one it has "
                "with --internal-port"
            )
    return _serve(server, partial(server.run_as_worker, host, internal_port), arguments.serve)


def _server(arguments: argparse.Namespace) -> ClusterServer:
    if arguments.app is None:
        server = ClusterServer(options_from(arguments))
    else:
        server = _load_app(arguments.app)
        server.options = options_from(arguments, base=server.options)
    if getattr(arguments, "listen", None) is not None:
        server.set_worker_listen_address(*arguments.listen)
    return server


def _load_app(text: str) -> ClusterServer:
    """Import the application that ``--app`` names; the current directory comes first, as for a script."""
    module_name, _, attribute = text.partition(":")
    names = [*module_name.split("."), *attribute.split(".")]
    if not all(map(str.isidentifier, names)) or module_name.endswith(".py"):
        raise OptionsError(f"--app: expected MODULE:ATTRIBUTE, for instance app:server, got {text!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only if the module itself is missing, or a package on the way to it, and not something it imports.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise OptionsError(
            f"--app: there is no module {error.name!r}, neither in {here} nor installed"
        ) from error
    found: object = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise OptionsError(f"--app: module {module_name!r} has no attribute {attribute!r}") from error
    if not isinstance(found, ClusterServer):
        raise OptionsError(f"--app: {text} is of type {type(found).__name__}, not a ClusterServer")
    return found


def _serve(server: ClusterServer, run: Callable[..., Awaitable[ClusterMode]], engines: Sequence[str]) -> int:
    specs: list[ServeSpec] = []
    if engines:
        from ..engines import parse_serve

        try:
            specs = [parse_serve(text) for text in engines]
        except ValueError as error:
            raise OptionsError(f"--serve: {error}") from error
    allow_connections()
    trio.run(_serve_until_stopped, server, run, specs, restrict_keyboard_interrupt_to_checkpoints=True)
    return 0


async def _serve_until_stopped(
    server: ClusterServer, run: Callable[..., Awaitable[ClusterMode]], specs: Sequence[ServeSpec]
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signals, nursery.cancel_scope, server)
        if specs:
            from ..engines import serve_engine

            # One after the other, and before the server: what registers with the master is complete.
            for spec in specs:
                await nursery.start(serve_engine, spec, server)
        await run(task_status=_Announcer(server))
        nursery.cancel_scope.cancel(reason="the server has stopped")


@attrs.frozen
class _Announcer:
    """Notes and logs that the server is up. No nursery's task status: a server may be stopped before it is up."""

    server: ClusterServer

    def started(self, mode: ClusterMode) -> None:
        models = self.server.list_models()
        calm_collector(rarely=mode is ClusterMode.MASTER and not models)
        if mode is ClusterMode.WORKER:
            client = self.server.worker_client
            accepted = [name for name in models if client is None or name not in client.rejected_models]
            logger.info("registered with the master", extra={"fields": {"models": accepted}})
            if not models:
                logger.warning("this worker has no models: give --app or --serve, or register some")
            return
        fields: dict[str, object] = {"url": self.server.url, "mode": str(mode), "models": models}
        if mode is ClusterMode.MASTER:
            fields["workers_join_at"] = self.server.internal_port
        logger.info("serving", extra={"fields": fields})


async def _stop_on_signals(
    scope: trio.CancelScope,
    server: ClusterServer | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Ask ``server`` to stop at the first signal; cancel ``scope`` at the second, or if nothing runs yet."""
    asked = False
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            name = signal.Signals(number).name
            if server is None or asked or not server.is_running:
                scope.cancel(reason=f"stopped at once by {name}")
                break
            asked = True
            logger.info("stopping; a second signal stops at once", extra={"fields": {"signal": name}})
            server.stop()
    # A model that is being loaded in a thread cannot be cancelled. Whoever does not want to wait for it can
    # have the process killed, and not only by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _demo(arguments: argparse.Namespace) -> int:
    return trio.run(
        _demo_until_stopped, arguments.port, arguments.check, arguments.host,
        restrict_keyboard_interrupt_to_checkpoints=True,
    )  # fmt: skip


async def _demo_until_stopped(port: int, check: bool, host: str) -> int:
    from ..demo import run_demo

    code = 0  # what it is if a signal ends it
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signals, nursery.cancel_scope)
        code = await run_demo(port, check=check, host=host)
        nursery.cancel_scope.cancel(reason="the demo has ended")
    return code


def _status(arguments: argparse.Namespace) -> int:
    status = _state(*_node_and_key(arguments))
    print(json.dumps(status, indent=2) if arguments.json else describe_status(status))
    return 0


def _calls(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    calls = ask(node, "/cluster/calls", key, expected=("calls",))
    print(json.dumps(calls, indent=2) if arguments.json else describe_calls(calls))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    path = f"/cluster/calls/{quote(arguments.request_id, safe='')}/cancel"
    answer = ask(node, path, key, expected=("cancelled",), post={"reason": arguments.reason})
    count = answer["cancelled"]
    if count == 0:
        print("its answer is over already; the work for it is about to stop")
    else:
        print("1 call was cancelled" if count == 1 else f"{printable(count)} calls were cancelled")
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    node, key = _node_and_key(arguments)
    path = f"/cluster/workers/{quote(arguments.worker, safe='')}/drain"

    def request() -> dict[str, Any]:
        return ask(node, path, key, expected=("id", "instance", "in_flight"), post={})

    worker = request()
    if arguments.no_wait:
        print(_what_drains(worker))
        return 0
    try:
        _wait_until_it_has_left(worker, request, partial(_state, node, key))
    except KeyboardInterrupt:
        raise ClusterError(f"stopped waiting; the worker '{arguments.worker}' drains on") from None
    return 0


def _wait_until_it_has_left(
    worker: dict[str, Any], request: Callable[[], object], state: Callable[[], dict[str, Any]]
) -> None:
    """Return when the process that was asked to stop is no longer among the workers, telling what it is about."""
    told = ""
    who = worker["id"], worker["instance"]
    while True:
        text = _what_drains(worker)
        if text != told:
            # Whoever waits for this may read it from a pipe.
            print(text, flush=True)
            told = text
        time.sleep(_DRAIN_POLL)
        workers = [each for each in state().get("workers") or () if isinstance(each, dict)]
        # Another process may have come under its name, and is not the one that was asked.
        same = [each for each in workers if (each.get("id"), each.get("instance")) == who]
        if not same:
            print(f"{printable(who[0])} has left", flush=True)
            return
        worker = same[0]
        if not worker.get("draining"):
            # It lost its link before it heard of it, and has come back.
            request()


def _what_drains(worker: dict[str, Any]) -> str:
    count = printable(worker.get("in_flight"))
    return f"{printable(worker['id'])} drains: {count} {'request' if count == '1' else 'requests'} in flight"


def _node_and_key(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """Return which node is meant by the command line, and the key that it is to be shown."""
    options = options_from(arguments)
    try:
        node = node_url(arguments.url if arguments.url is not None else str(options.server.port))
    except ValueError as error:
        raise OptionsError(f"URL: {error}") from error
    return node, options.server.api_key


def _state(node: str, key: str | None) -> dict[str, Any]:
    return ask(node, "/cluster/status", key, expected=("mode", "models", "calls"))


_COMMANDS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "demo": _demo,
    "run": _run,
    "master": _master,
    "worker": _worker,
    "status": _status,
    "calls": _calls,
    "cancel": _cancel,
    "drain": _drain,
}
