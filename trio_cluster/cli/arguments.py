"""The command line's parser, and the step from its flags to options.

A flag that sets an option has no default of its own, or it would always override the file and the environment; the
default in its help is the option's. Every error is an :class:`~trio_cluster.errors.OptionsError` of one line, also
those that argparse finds, so that all errors of the command look the same.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import sys
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, cast
from urllib.parse import urlsplit

import attrs

from .._version import __version__
from ..core.principal import Priority, Role
from ..errors import OptionsError
from ..options import ClusterServerOptions, ServerOptions
from . import logs
from .commit import commit_of_installation
from .settings import SECRET_FILES, load_node_settings, load_options, load_process_settings, load_serve_tables

__all__ = [
    "add_node_settings",
    "arguments_of",
    "config_file",
    "log_settings",
    "master_address",
    "master_addresses",
    "master_host",
    "options_from",
    "parse_arguments",
    "read_service_flags",
    "serve_tables",
]

_FIELDS: Final = {
    field.name: field for options in (ServerOptions, ClusterServerOptions) for field in attrs.fields(options)
}

_HOST_NAME: Final = re.compile(r"[\w.-]+")


#: The commands that run a node.
_SERVING: Final = frozenset({"run", "master", "worker"})


def parse_arguments(argv: Sequence[str] | None, program: str | None = None) -> argparse.Namespace:
    """Parse a command line.

    Args:
        argv: the arguments; ``sys.argv[1:]`` if ``None``.
        program: the name of a program that is an application itself (``python models.py ...``): only commands that run
            a node make sense then, and without one it is ``run``.

    Returns:
        A namespace, in which ``command`` is the name of the command.

    Raises:
        OptionsError: the command line is wrong; the message says what, and which help to read.
        SystemExit: help or the version was asked for, and has been printed.
    """
    if program is None:
        return _parser().parse_args(argv)
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] not in (*_SERVING, "--version"):
        given.insert(0, "run")
    arguments = _parser(program).parse_args(given)
    if arguments.app is not None:
        raise OptionsError(f"--app: {program} is an application itself; leave it out")
    return arguments


def arguments_of(command: str) -> list[argparse.Action]:
    """Return what a command of the command line takes, in the order of its help."""
    (commands,) = [action for action in _parser().actions if action.metavar == "COMMAND"]
    choices = cast("dict[str, _Parser]", commands.choices)
    return choices[command].actions


class _Parser(argparse.ArgumentParser):
    """Raises errors instead of printing them with the usage; does not accept abbreviated flags."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, also if URL stands behind a flag: `keys create NAME --role admin URL`.

        argparse takes a positional that may be left out for left out if the one before it is followed by a flag.
        """
        found, left = super().parse_known_args(args, namespace)
        if len(left) == 1 and not left[0].startswith("-") and getattr(found, "url", "") is None:
            found.url = left.pop()
        return found, left

    @property
    def actions(self) -> list[argparse.Action]:
        """What it takes."""
        return list(self._actions)

    def error(self, message: str) -> NoReturn:
        raise OptionsError(f"{message}; see {self.prog} --help")


class _ShowVersion(argparse.Action):
    """Finds out the commit only when it is asked for: that may start git."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        commit = commit_of_installation(Path(__file__).parents[1])
        print(f"trio-cluster {__version__}" + ("" if commit is None else f" (commit {commit})"))
        parser.exit()


def _parser(program: str = "trio-cluster") -> _Parser:
    parser = _Parser(prog=program, description="Several machines, one OpenAI API.")
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show the version and its commit, and exit"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.set_defaults(command=name)
        subparser.add_argument("--log-level", choices=logs.LEVELS, help="default: info")
        subparser.add_argument("--log-format", choices=logs.FORMATS, help="default: text")
        return subparser

    demo = command("demo", "Start a master and two workers with real embedded models.")
    demo.add_argument("port", nargs="?", type=int, default=8080, metavar="PORT", help="default: %(default)s")
    demo.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    demo.add_argument(
        "--check", action="store_true", help="send every model one request, print the results, and stop"
    )

    run = command(
        "run", "Be the master if the port is free, and a worker of the master that holds it if not."
    )
    _add_port(run)
    _add_serving_flags(run, master=True, worker=True)

    master = command("master", "Serve the OpenAI API, and accept workers.")
    _add_port(master)
    master.add_argument(
        "--take-over",
        action="store_true",
        help="take the place of the master that serves on this port: it finishes its answers and ends, and no request"
        " is refused or cut; if there is none, start as usual",
    )
    _add_option(
        master, "--processes", "processes", int, "N", "how many processes the master is, on the same ports"
    )
    _add_serving_flags(master, master=True, worker=False)

    worker = command("worker", "Serve models to a master.")
    worker.add_argument(
        "master_host",
        nargs="?",
        metavar="HOST",
        help="the master's host, host:port or URL; several with commas (default: the cluster that it has joined, else "
        "127.0.0.1)",
    )
    _add_port(worker, whose="the master's external port")
    worker.add_argument(
        "--tls", dest="connect_tls", action="store_true", help="connect with TLS, as https://HOST:PORT does"
    )
    worker.add_argument(
        "--masters-from",
        metavar="NAME:PORT",
        help="the masters at all addresses of a DNS name, followed as they change; PORT is the external one",
    )
    worker.add_argument(
        "--join",
        metavar="TOKEN",
        help="join the cluster of an invitation, which `trio-cluster invite` prints",
    )
    _add_serving_flags(worker, master=False, worker=True)

    status = command("status", "Show the workers, models and load of a running node.")
    _add_url(status)
    status.add_argument("--json", action="store_true", help="print the JSON of the node")
    _add_admin_flags(status)

    calls = command("calls", "Show the calls of a running node.")
    _add_url(calls)
    calls.add_argument("--json", action="store_true", help="print the JSON of the node")
    _add_admin_flags(calls)

    why = command("why", "Tell the story of a request: where it went, what it waited for, and how it ended.")
    why.add_argument("request_id", metavar="REQUEST_ID", help="the response's x-request-id")
    _add_url(why)
    why.add_argument("--json", action="store_true", help="print the JSON of the node")
    _add_admin_flags(why)

    top = command("top", "Show the requests and workers of a running node live, in a terminal.")
    _add_url(top)
    _add_admin_flags(top)

    cancel = command("cancel", "Cancel the calls of a request.")
    cancel.add_argument(
        "request_id", metavar="REQUEST_ID", help="as `calls` shows it; the response's x-request-id"
    )
    _add_url(cancel)
    cancel.add_argument("--reason", metavar="TEXT", help="the reason in the client's error")
    _add_admin_flags(cancel)

    drain = command("drain", "Ask a worker to finish its requests and stop, and wait until it has left.")
    drain.add_argument("worker", metavar="WORKER", help="its name, as `status` shows it")
    _add_url(drain, whose="its master")
    drain.add_argument("--no-wait", action="store_true", help="do not wait")
    _add_admin_flags(drain)

    check = command("check-config", "Say what a file of options means, or what is wrong with it.")
    check.add_argument("file", type=Path, metavar="FILE", help="a TOML file")

    command("schema", "Print the JSON Schema of a file of options, for editors.")

    reload = command("reload", "Have a node read its configuration file again.")
    _add_url(reload)
    _add_admin_flags(reload)

    replace = command(
        "replace",
        "Have the master of a service start a new process that takes its place, and wait until that serves.",
    )
    _add_port(replace)
    replace.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of options")
    _add_option(replace, "--state-dir", "state_dir", str, "DIR", "the master's")

    install = command(
        "install-service", "Write the files that make a node a service of systemd, or of launchd on a Mac."
    )
    _add_service_flags(install)
    # The metavars are what messages about wrong usage name; they are the words of the help text.
    install.add_argument("node", choices=("master", "worker"), metavar="{master,worker}", help="what to run")
    install.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments, as you would start it"
    )

    backup = command("backup", "Write the state of a node of this machine into a file, also while it runs.")
    backup.add_argument("file", metavar="FILE", help="the file to write, such as state.tar.gz")
    restore = command("restore", "Make a state directory of a backup; its node does not run.")
    restore.add_argument("file", metavar="FILE", help="what `backup` has written")
    restore.add_argument("--force", action="store_true", help="move what is there aside")
    for each in (backup, restore):
        _add_port(each, "the port of the API, by which the state directory is found")
        each.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of options")
        _add_option(each, "--state-dir", "state_dir", str, "DIR", "the state directory")
    _add_option(backup, "--database", "database", str, "URL", "where keys and usage are, if not in it")

    load = command("load", "Start a model that runs on demand, and wait until it is ready.")
    unload = command(
        "unload", "Stop a model that runs on demand when its requests are done, and wait for that."
    )
    for each, default in ((load, "the one that is ready first"), (unload, "all that have it")):
        each.add_argument("model", metavar="MODEL", help="its name")
        _add_url(each)
        each.add_argument("--worker", metavar="WORKER", help=f"on this worker (default: {default})")
        _add_admin_flags(each)

    _add_keys(command("keys", "Make, show, change and revoke API keys."))

    usage = command("usage", "Show the usage of models: requests and tokens.")
    _add_url(usage)
    usage.add_argument(
        "--since", metavar="TIME", help="requests from this time on, such as 2026-12-31 (UTC); default: all"
    )
    usage.add_argument("--until", metavar="TIME", help="requests before this time; default: all")
    usage.add_argument(
        "--group-by",
        default="key,model",
        metavar="WHAT,...",
        help="some of key, model, worker, day (default: %(default)s)",
    )
    formats = usage.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true", help="print lines for a spreadsheet")
    formats.add_argument("--json", action="store_true", help="print the JSON of the node")
    _add_admin_flags(usage)

    audit = command("audit", "Show what operators and admins have done, newest first.")
    _add_url(audit)
    audit.add_argument(
        "--limit", type=int, default=100, metavar="N", help="how many entries (default: %(default)s)"
    )
    formats = audit.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true", help="print lines for a spreadsheet")
    formats.add_argument("--json", action="store_true", help="print the JSON of the node")
    _add_admin_flags(audit)

    invite = command("invite", "Invite a worker: print the line to paste on its machine.")
    _add_url(invite, whose="the master")
    invite.add_argument(
        "-n", "--name", metavar="NAME", help="the name of the worker (default: it chooses one)"
    )
    invite.add_argument(
        "--expires", metavar="TIME", default="1h", help="30m, 1h, 2d... (default: %(default)s)"
    )
    invite.add_argument(
        "--address",
        action="append",
        metavar="HOST:PORT",
        help="where the worker reaches the API of the master; may be given several times (default: found out)",
    )
    _add_admin_flags(invite)

    revoke = command("revoke", "End the link of a worker, and refuse its certificate for ever.")
    revoke.add_argument("worker", metavar="WORKER", help="its name, as `status` shows it")
    _add_url(revoke, whose="its master")
    _add_admin_flags(revoke)

    ca = command("ca", "Look after the authority of a master's cluster.")
    ca.add_argument(
        "action",
        choices=["rotate"],
        metavar="rotate",
        help="replace it; the old one is trusted for 100 days more",
    )
    _add_url(ca, whose="the master")
    _add_admin_flags(ca)
    return parser


def _add_service_flags(install: argparse.ArgumentParser) -> None:
    install.add_argument("--dry-run", action="store_true", help="print them, and write nothing")
    install.add_argument("--user", action="store_true", help="for your own service manager, without root")
    install.add_argument(
        "--manager", choices=("systemd", "launchd"), help="default: launchd on a Mac, systemd elsewhere"
    )
    install.add_argument(
        "--unit", metavar="NAME", help="of the service (default: trio-cluster-master, or -worker)"
    )
    install.add_argument("--run-as", metavar="USER", help="default: a user of its own (DynamicUser=)")
    install.add_argument("--program", metavar="FILE", help="the trio-cluster command (default: this one)")
    install.add_argument(
        "--watchdog",
        type=float,
        metavar="SECONDS",
        help="how long the event loop may be stuck; 0: for ever (default: 30; with models, --timeout and a minute)",
    )
    install.add_argument("--prefix", metavar="DIR", help="write below this directory, as for a package")
    install.add_argument("--force", action="store_true", help="replace files that were changed by hand")


def read_service_flags(arguments: argparse.Namespace) -> None:
    """Move the flags of ``install-service`` that stand behind ``master`` or ``worker`` to those before it.

    Args:
        arguments: of ``install-service``; ``arguments.arguments`` keeps what is the node's.
    """
    parser = _Parser(prog="trio-cluster", add_help=False)
    _add_service_flags(parser)
    _, arguments.arguments = parser.parse_known_args(arguments.arguments, arguments)


def _add_keys(keys: argparse.ArgumentParser) -> None:
    commands = keys.add_subparsers(required=True, metavar="COMMAND", dest="keys_command")

    def command(name: str, text: str, *, named: bool = True) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text)
        if named:
            subparser.add_argument("name", metavar="NAME", help="the name of the key")
        _add_url(subparser)
        _add_admin_flags(subparser)
        # Without a default, or it would replace what was given before the name of this command.
        subparser.add_argument("--log-level", choices=logs.LEVELS, default=argparse.SUPPRESS)
        subparser.add_argument("--log-format", choices=logs.FORMATS, default=argparse.SUPPRESS)
        return subparser

    _add_key_fields(command("create", "Make a key, and print it, this once."))
    show_all = command("list", "Show all keys.", named=False)
    show_all.add_argument("--json", action="store_true", help="print the JSON of the node")
    command("show", "Show a key.")
    change = command("change", "Change a key; what is not given stays as it is.")
    _add_key_fields(change)
    change.add_argument("--disabled", choices=("yes", "no"), help="whether the key is refused for now")
    command("revoke", "Delete a key: it is refused from now on.")
    rotate = command("rotate", "Replace a key by a new one, and print that, this once.")
    rotate.add_argument(
        "--grace", metavar="TIME", help="how long the old one works beside the new one: 12h, 1d (default: 0)"
    )


def _add_key_fields(parser: argparse.ArgumentParser) -> None:
    # Their names in the namespace differ from those of the options of a node.
    def add(flag: str, metavar: str, text: str, **more: Any) -> None:
        parser.add_argument(
            flag, dest=f"key_{flag[2:].replace('-', '_')}", metavar=metavar, help=text, **more
        )

    roles, priorities = typing.get_args(Role), typing.get_args(Priority)
    add("--models", "GLOB,...", "names of models, * for anything (default: all models)")
    add("--role", "ROLE", f"{', '.join(roles)} (default: inference)", choices=roles)
    add("--requests-per-minute", "N", "requests in any 60 seconds, or none (default: any number)")
    add("--tokens-per-minute", "N", "tokens in any 60 seconds, or none (default: any number)")
    add("--max-concurrency", "N", "requests at the same time, or none (default: any number)")
    add("--budget", "TOKENS/PERIOD", "tokens in each day, week or month (UTC), or none")
    add("--priority", "PRIORITY", f"{', '.join(priorities)} (default: normal)", choices=priorities)
    add("--weight", "W", "its share of busy models, relative to others (default: 1)", type=float)
    add("--expires", "WHEN", "after a time such as 30d, at a date such as 2026-12-31, or never")


def _add_url(parser: argparse.ArgumentParser, whose: str = "the node") -> None:
    parser.add_argument(
        "url", nargs="?", metavar="URL", help=f"the API of {whose} (default: http://127.0.0.1:8080)"
    )


def _add_admin_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of options")
    _add_option(parser, "--api-key", "api_key", str, "KEY", "the API key of the node")
    _add_option(parser, "--operator-key", "operator_key", str, "KEY", "the operator key of the node")
    _add_option(
        parser, "--ca-file", "ca_file", str, "FILE", "authorities to trust besides those of the system"
    )
    _add_option(parser, "--state-dir", "state_dir", str, "DIR", "the node's, if it is on this machine")


def _add_port(parser: argparse.ArgumentParser, whose: str = "the port of the OpenAI API") -> None:
    parser.add_argument("port", nargs="?", type=int, metavar="PORT", help=f"{whose} (default: 8080)")


def _add_option(
    parser: argparse.ArgumentParser, flag: str, field: str, kind: type, metavar: str, text: str
) -> None:
    """Add a flag that sets an option, with the option's default in its help; for a secret, one for its file, too."""
    default = _FIELDS[field].default
    shown = f"{default:g}" if isinstance(default, float) else default
    if shown is not None:
        text += f" (default: {shown})"
    parser.add_argument(*flag.split("/"), dest=field, type=kind, metavar=metavar, help=text)
    if f"{field}_file" in SECRET_FILES:
        parser.add_argument(f"{flag}-file", dest=f"{field}_file", metavar="FILE", help=f"a file with {flag}")


def _add_serving_flags(parser: argparse.ArgumentParser, *, master: bool, worker: bool) -> None:
    # Where the application and the masters are given, unless `add_node_settings` takes them from the file.
    parser.set_defaults(app_label="--app", host_label="HOST")
    models = parser.add_argument_group("models")
    models.add_argument(
        "-a", "--app", metavar="MODULE:ATTRIBUTE", help="a ClusterServer with registered models"
    )
    models.add_argument(
        "--serve",
        action="append",
        default=[],
        metavar="SPEC",
        help="an engine to serve; may be given several times",
    )

    options = parser.add_argument_group("configuration")
    options.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of options")
    add = partial(_add_option, cast("argparse.ArgumentParser", options))
    if master:
        add("--host", "host", str, "ADDR", "the address of the OpenAI API")
    add("--max-concurrency", "max_concurrency", int, "N", "requests that run in this process at once")
    add("--memory", "memory", str, "SIZE", "memory for models that run on demand, such as 24GiB")
    add("--queue-timeout", "queue_timeout", float, "SECONDS", "how long a request waits for a free slot")
    add(
        "--timeout",
        "default_timeout",
        float,
        "SECONDS",
        "how long a model may produce nothing; inf sets no limit",
    )
    add("--max-body-size", "max_body_size", int, "BYTES", "the largest request body")
    add("--max-json-size", "max_json_size", int, "BYTES", "the largest request body that is not a form")
    add(
        "--cors-origins",
        "cors_origins",
        str,
        "ORIGINS",
        "origins whose web pages may use the API: *, or a list with commas",
    )
    add(
        "--allowed-hosts",
        "allowed_hosts",
        str,
        "NAMES",
        "host names under which a server without a key answers, with commas; addresses and localhost always do",
    )
    if master:
        add("--http", "http", str, "SERVER", "the server of the API: lean, or hypercorn for HTTP/2")
    add(
        "--stream-failure",
        "stream_failure",
        str,
        "HOW",
        "what follows the error event of a stream that failed: end or abort",
    )
    if master:
        add(
            "--keepalive",
            "keepalive",
            float,
            "SECONDS",
            "silence after which the client of a stream gets a comment; 0: never",
        )
    options.add_argument(
        "--access-log",
        dest="access_log",
        action="store_true",
        default=None,
        help="log one line for each request",
    )
    add(
        "--otel",
        "otel",
        str,
        "MODE",
        "traces and metrics by OpenTelemetry: auto (as OTEL_... say), on or off",
    )
    add("--owner", "owner", str, "NAME", "owned_by in /v1/models")
    add("--batch-wait", "batch_wait", float, "SECONDS", "how long a token waits for others on a busy link")
    add(
        "--drain-timeout",
        "drain_timeout",
        float,
        "SECONDS",
        "how long requests may finish when the node stops",
    )
    add("--api-key", "api_key", str, "KEY", "the key that clients must send; better set TRIO_CLUSTER_API_KEY")
    add(
        "--operator-key",
        "operator_key",
        str,
        "KEY",
        "the key for calls, cancel and drain; better set TRIO_CLUSTER_OPERATOR_KEY",
    )
    add(
        "--cluster-token",
        "cluster_token",
        str,
        "TOKEN",
        "the token that workers must send; better set TRIO_CLUSTER_CLUSTER_TOKEN",
    )
    if master:
        add("--internal-host", "internal_host", str, "ADDR", "the address for workers, if not that of --host")
    add("--internal-port", "internal_port", int, "PORT", "the master's port for workers, if not PORT + 1000")
    if master:
        text = "how long a request for an alias waits for a start before the next name is tried"
        add("--start-patience", "start_patience", float, "SECONDS", text)
        add(
            "--wake-timeout",
            "wake_timeout",
            float,
            "SECONDS",
            "how long a request waits for a machine to wake",
        )
    add("--worker-timeout", "worker_timeout", float, "SECONDS", "silence after which a link is closed")
    add("--heartbeat-interval", "heartbeat_interval", float, "SECONDS", "how often a heartbeat is sent")
    add(
        "--resume-window",
        "resume_window",
        float,
        "SECONDS",
        "how long a link that was cut may be resumed; 0: never",
    )
    options.add_argument(
        "--through-proxy",
        dest="through_proxy",
        action="store_true",
        default=None,
        help="links go through a proxy that adds no headers: the end of a connection counts as a cut",
    )
    if worker:
        options.add_argument(
            "--no-guardian",
            dest="guardian",
            action="store_false",
            default=None,
            help="start no process that tells the masters when this one dies",
        )
    if master:
        add(
            "--on-conflict",
            "on_conflict",
            str,
            "RULE",
            "what happens to a model name that is served already: reject or replicate",
        )
        add("--routing", "routing", str, "RULE", "how a replica is chosen: cost or least-busy")
        add(
            "--ejection-failures",
            "ejection_failures",
            int,
            "N",
            "failures in a row after which a replica is left alone for a while; 0: never",
        )
        add(
            "--ejection-time",
            "ejection_time",
            float,
            "SECONDS",
            "how long it is left alone; twice as long each time that follows",
        )
        add("--ejection-time-max", "ejection_time_max", float, "SECONDS", "how long at most")
        add(
            "--ejection-share",
            "ejection_share",
            float,
            "SHARE",
            "which part of a model's replicas may be left alone at once, 0 to 1",
        )
        add(
            "--limits",
            "limits",
            str,
            "URL",
            "the Redis or Valkey server where several masters count the requests of keys with limits together",
        )
        add(
            "--limits-failure",
            "limits_failure",
            str,
            "HOW",
            "what happens to such requests while that server is away: allow or refuse",
        )
        add(
            "--database",
            "database",
            str,
            "URL",
            "where keys and usage are kept, if not in the state directory",
        )
        add("--usage-days", "usage_days", int, "DAYS", "how long the row of each request is kept")
        add("--stored-responses", "stored_responses", int, "N", "how many responses are stored; 0: none")
        add(
            "--stored-responses-size",
            "stored_responses_size",
            int,
            "BYTES",
            "how many bytes stored responses may take",
        )
        add(
            "--stored-responses-lifetime",
            "stored_responses_lifetime",
            float,
            "SECONDS",
            "how long a stored response is kept",
        )
        add("--stories", "stories", int, "N", "how many requests `why` can tell the story of; 0: none")
        add(
            "--tls",
            "tls",
            str,
            "MODE",
            "auto: both ports speak TLS, with a certificate that is made for it; or off",
        )
        add("--tls-cert", "tls_cert", str, "FILE", "the certificate of both ports, in PEM; turns TLS on")
        add("--tls-key", "tls_key", str, "FILE", "its private key, in PEM")
        add("--tls-name", "tls_name", str, "NAMES", "further names and addresses for its own certificate")
        options.add_argument(
            "--allow-anonymous-workers",
            dest="allow_anonymous_workers",
            action="store_true",
            default=None,
            help="with TLS: admit workers without certificate and token",
        )
    add("--state-dir", "state_dir", str, "DIR", "the directory for what is kept over a restart")
    if worker:
        add("--ca-file", "ca_file", str, "FILE", "authorities to trust besides those of the system")
        add("-n/--name", "worker_id", str, "NAME", "the worker's stable id; generated if left out")
        options.add_argument(
            "-l",
            "--listen",
            type=_listen_address,
            metavar="ADDR:PORT",
            help="serve an API of this worker here",
        )


def _listen_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or not (port.isascii() and port.isdigit()) or (":" in host and not bracketed):
        raise argparse.ArgumentTypeError(
            f"expected ADDR:PORT, with an IPv6 address in brackets, got {text!r}"
        )
    if int(port) > 65535:
        raise argparse.ArgumentTypeError(f"a port lies between 0 and 65535, got {port}")
    return host, int(port)


def master_host(text: str, label: str = "HOST") -> str:
    """Return the host of the master's machine.

    Args:
        text: what was given as HOST: a name or an address, an IPv6 address with or without brackets.
        label: where it was given; begins the message of an error.

    Returns:
        The name or address, without brackets.

    Raises:
        OptionsError: it is a URL, a host with a port, a port alone, or no host at all.
    """
    host = text.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST_NAME.fullmatch(host) or host.isdigit():
            raise OptionsError(
                f"{label}: expected the master's name or address, and PORT after it, got {text!r}"
            ) from None
    return host


def master_address(text: str, label: str = "HOST") -> tuple[str, int | None, bool]:
    """Return the host of the master's machine, the port of its API, and whether it is to be connected to with TLS.

    Args:
        text: what was given as HOST: a host as for :func:`master_host`, ``host:port``, or a URL, with or without
            ``/v1``.
        label: where it was given; begins the message of an error.

    Returns:
        The host without brackets; the port, ``None`` if there is none in it; and whether it is an ``https`` URL.

    Raises:
        OptionsError: it is none of these, or a URL with another scheme than ``http`` or ``https``.
    """
    expected = OptionsError(
        f"{label}: expected the master's name or address, host:port or a URL such as http://master:8080, got {text!r}"
    )
    is_url = "://" in text
    # A bare IPv6 address has colons, and no port.
    if not is_url and (text.count(":") != 1 and "]:" not in text):
        return master_host(text, label), None, False
    try:
        parts = urlsplit(text if is_url else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise expected from None
    path = parts.path.rstrip("/").removesuffix("/v1")
    if parts.scheme not in ("http", "https") or not host or path or parts.query or parts.username is not None:
        raise expected
    if port is None and not is_url:
        raise expected
    tls = parts.scheme == "https"
    return master_host(host, label), port or (443 if tls else 80), tls


def master_addresses(
    text: str, port: int | None, label: str = "HOST"
) -> tuple[list[tuple[str, int | None]], bool]:
    """Return the hosts of the masters' machines and the ports of their APIs, and whether they are reached with TLS.

    Args:
        text: what was given as HOST: addresses as for :func:`master_address`, with commas between them.
        port: what was given as PORT; ``None`` if it was not.
        label: where the addresses were given; begins the message of an error.

    Returns:
        For each the host without brackets, and the port; ``None`` if there is none. And whether they are ``https``
        URLs.

    Raises:
        OptionsError: one of them is none; some have TLS and others have not; or PORT contradicts one of them.
    """
    masters: list[tuple[str, int | None]] = []
    encrypted: set[bool] = set()
    for address in text.split(","):
        host, own_port, tls = master_address(address.strip(), label)
        if own_port is not None and port not in (None, own_port):
            raise OptionsError(f"PORT: {port} is not the port of {address.strip()}; give the port once")
        masters.append((host, port if own_port is None else own_port))
        encrypted.add(tls)
    if len(encrypted) > 1:
        raise OptionsError(f"{label}: either all masters speak TLS, or none does")
    return masters, encrypted.pop()


def log_settings(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the level and the format of the log: from the flags, the environment, the file, or the defaults.

    Raises:
        OptionsError: a variable has a wrong value.
    """
    file = load_process_settings(config_file(arguments))
    return (
        _log_setting("LOG_LEVEL", arguments.log_level, logs.LEVELS, file.get("log_level", "info")),
        _log_setting("LOG_FORMAT", arguments.log_format, logs.FORMATS, file.get("log_format", "text")),
    )


def add_node_settings(arguments: argparse.Namespace, *, is_application: bool = False) -> None:
    """Put the application and the masters that the file names into arguments that name none. Blocks.

    Args:
        arguments: from :func:`parse_arguments`; not changed if they are of a command that starts no node. Its
            ``app_label`` and ``host_label`` say where application and masters were given, for the messages of errors.
        is_application: the program is an application itself; the file's does not take its place.
    """
    if arguments.command not in _SERVING:
        return
    config = config_file(arguments)
    node = load_node_settings(config)
    if node.app is not None and arguments.app is None and not is_application:
        arguments.app, arguments.app_label = node.app, f"{config}: app"
    if node.masters is None or arguments.command != "worker":
        return
    if arguments.master_host is arguments.masters_from is arguments.join is None:
        arguments.master_host, arguments.host_label = node.masters, f"{config}: worker.masters"


def config_file(arguments: argparse.Namespace) -> Path | None:
    """Return the file of options that ``--config`` or ``TRIO_CLUSTER_CONFIG`` names; ``None`` if there is none."""
    config = getattr(arguments, "config", None) or os.environ.get("TRIO_CLUSTER_CONFIG")
    return Path(config) if config else None


def _log_setting(name: str, given: str | None, choices: Sequence[str], default: str) -> str:
    variable = f"TRIO_CLUSTER_{name}"
    value = given or os.environ.get(variable) or default
    if value not in choices:
        raise OptionsError(f"{variable}: must be one of {', '.join(choices)}, got {value!r}")
    return value


def options_from(
    arguments: argparse.Namespace, base: ClusterServerOptions | None = None
) -> ClusterServerOptions:
    """Return the options of a node: the flags over the environment, over the file, over ``base``.

    The file is the one that ``--config`` or ``TRIO_CLUSTER_CONFIG`` names.

    Args:
        arguments: from :func:`parse_arguments`.
        base: the options of an application; the defaults if ``None``. It is not changed.

    Raises:
        OptionsError: see :func:`~trio_cluster.cli.settings.load_options`.
    """
    names = _FIELDS.keys() | SECRET_FILES.keys()
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return load_options(config=config_file(arguments), environ=os.environ, flags=flags, base=base)


def serve_tables(arguments: argparse.Namespace) -> list[tuple[str, dict[str, object]]]:
    """Return the engines that the file names: for each its place in the file, and its table.

    Args:
        arguments: from :func:`parse_arguments`.

    Raises:
        OptionsError: the file cannot be read.
    """
    return load_serve_tables(config_file(arguments))
