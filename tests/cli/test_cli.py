"""The command line: what it makes of arguments, its exit codes, its one-line errors, and its signals."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from trio_cluster import engines
from trio_cluster._version import __version__
from trio_cluster.cli import admin_client, arguments, commands, tables
from trio_cluster.errors import ClusterError, ClusterPortError, OptionsError
from trio_cluster.options import ClusterMode, ClusterServerOptions, ServerOptions
from trio_cluster.server import ClusterServer

APP = """
from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions

server = ClusterServer(ClusterServerOptions(ServerOptions(max_concurrency=3, queue_timeout=7.0)))

@server.chat("echo")
async def echo(request):
    yield request.last_text

@server.chat("slow")
async def slow(request):
    import trio
    yield "begun"
    await trio.sleep_forever()

class nested:
    server = server

text = "not a server"
"""

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_logging: None) -> Iterator[Path]:
    """An empty current directory, an environment without our variables, and no trace left afterwards."""
    for variable in [name for name in os.environ if name.startswith("TRIO_CLUSTER_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    interrupt = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, interrupt)
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def main(place: Path, capsys: pytest.CaptureFixture[str]) -> Main:
    def run(*argv: str) -> tuple[int, str, str]:
        code = commands.main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@attrs.define
class Ran:
    """Which method of a server was run, with what, and the server itself."""

    method: str
    arguments: tuple[Any, ...]
    server: ClusterServer


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Ran]:
    """Let the ``run*`` methods only note that they were called."""
    calls: list[Ran] = []

    def fake(method: str) -> Any:
        async def run(self: ClusterServer, *arguments: Any, task_status: Any) -> ClusterMode:
            calls.append(Ran(method, arguments, self))
            await trio.lowlevel.checkpoint()
            return ClusterMode.MASTER

        return run

    for method in ("run", "run_as_master", "run_as_worker"):
        monkeypatch.setattr(ClusterServer, method, fake(method))
    return calls


def one_line(err: str) -> str:
    """Return the error that is the only line of ``err``, without what all errors begin with."""
    assert err.count("\n") == 1
    assert err.startswith("trio-cluster: error: ")
    return err.removeprefix("trio-cluster: error: ").rstrip("\n")


# Arguments


def test_help_and_version_are_no_errors(main: Main) -> None:
    code, out, _ = main("--version")
    assert (code, out) == (0, f"trio-cluster {__version__}\n")
    code, out, _ = main("--help")
    assert code == 0
    for command in ("demo", "run", "master", "worker", "status", "calls", "cancel", "drain"):
        assert command in out
        assert main(command, "--help")[0] == 0


def test_help_shows_the_defaults_of_the_options(main: Main) -> None:
    _, out, _ = main("master", "--help")
    text = " ".join(out.split())
    assert "--max-concurrency N requests that run here at once (default: 10)" in text
    assert "(default: reject)" in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "COMMAND"),
        (["serve"], "invalid choice: 'serve'"),
        (["run", "http"], "argument PORT: invalid int value: 'http'"),
        (["run", "99999"], "PORT: a port lies between 0 and 65535"),
        (["run", "--max-conc=3"], "unrecognized arguments: --max-conc=3"),
        (["run", "--timeout", "soon"], "argument --timeout: invalid float value: 'soon'"),
        (["run", "--timeout", "0"], "--timeout: must be more than 0"),
        (["run", "--on-conflict", "fight"], "--on-conflict: must be"),
        (["run", "--max-concurrency", "0"], "--max-concurrency: must be at least 1"),
        (["run", "--log-level", "loud"], "argument --log-level: invalid choice: 'loud'"),
        (["run", "--listen", "9000"], "argument -l/--listen: expected ADDR:PORT"),
        (["run", "--listen", "::1:9000"], "argument -l/--listen: expected ADDR:PORT"),
        (["run", "--listen", "localhost:99999"], "argument -l/--listen: a port lies between"),
        (["run", "--config", "none.toml"], "none.toml: cannot be read: No such file or directory"),
        (["master", "--listen=localhost:0"], "unrecognized arguments: --listen"),
        (["worker"], "a worker needs something to serve"),
        (["worker", "10.0.0.1", "--host=0.0.0.0", "-a", "app:server"], "unrecognized arguments: --host"),
        (["worker", "8080", "-a", "app:server"], "HOST: expected the master's name or address"),
        (["worker", "http://master:8080", "-a", "app:server"], "HOST: expected"),
        (["worker", "master:8080", "-a", "app:server"], "HOST: expected"),
        (["worker", "", "-a", "app:server"], "HOST: expected"),
        (
            ["worker", "master", "65000", "-a", "app:server"],
            "PORT: a master on port 65000 has no port 65000 + 1000",
        ),
        (["worker", "master", "0", "-a", "app:server"], "PORT: a master on port 0 has no"),
        (["master", "--serve", "nonsense:x"], "--serve: nonsense:x: there is no engine 'nonsense'"),
        (["worker", "-a", "app"], "--app: expected MODULE:ATTRIBUTE"),
        (["worker", "-a", "app.py:server"], "--app: expected MODULE:ATTRIBUTE"),
        (["worker", "-a", ":server"], "--app: expected MODULE:ATTRIBUTE"),
        (["worker", "-a", "elsewhere:server"], "--app: there is no module 'elsewhere'"),
        (["worker", "-a", "app.sub:server"], "--app: there is no module 'app.sub'"),
        (["worker", "-a", "app:none"], "--app: module 'app' has no attribute 'none'"),
        (["worker", "-a", "app:text"], "--app: app:text is of type str, not a ClusterServer"),
        (["status", "ftp://host"], "URL: expected a URL such as"),
        (["status", "host:port"], "URL: 'http://host:port' is not a URL"),
        (["calls", "ftp://host"], "URL: expected a URL such as"),
        (["cancel"], "the following arguments are required: REQUEST_ID"),
        (["cancel", "r1", "host:port"], "URL: 'http://host:port' is not a URL"),
        (["drain"], "the following arguments are required: WORKER"),
        (["drain", "w1", "--no-wait=1"], "argument --no-wait: ignored explicit argument"),
        (["demo", "--serve=x"], "unrecognized arguments: --serve"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(
    argv: list[str], expected: str, main: Main, ran: list[Ran], place: Path
) -> None:
    (place / "app.py").write_text(APP)
    code, out, err = main(*argv)
    assert expected in one_line(err)
    assert (code, out, ran) == (2, "", [])


@pytest.mark.parametrize("command", ["run", "master", "worker", "status", "calls", "cancel r1", "drain w1"])
def test_a_wrong_variable_or_file_is_bad_usage_on_every_command(
    command: str, main: Main, ran: list[Ran], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "app.py").write_text(APP)
    argv = command.split()
    if command in ("run", "master", "worker"):
        argv += ["-a", "app:server"]
    (place / "c.toml").write_text("[server]\nmax_concurency = 1")
    code, _, err = main(*argv, "--config", "c.toml")
    assert one_line(err) == "c.toml: server.max_concurency: unknown key; did you mean server.max_concurrency?"
    assert code == 2
    monkeypatch.setenv("TRIO_CLUSTER_PORTS", "1")
    code, _, err = main(*argv)
    assert one_line(err) == "TRIO_CLUSTER_PORTS: unknown variable; did you mean TRIO_CLUSTER_PORT?"
    assert (code, ran) == (2, [])


def test_a_wrong_log_level_in_the_environment_is_bad_usage(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_CLUSTER_LOG_LEVEL", "loud")
    code, _, err = main("master")
    assert "TRIO_CLUSTER_LOG_LEVEL: must be one of debug, info, warning, error, got 'loud'" in one_line(err)
    assert code == 2


def test_each_command_runs_its_method(main: Main, ran: list[Ran], place: Path) -> None:
    (place / "app.py").write_text(APP)
    for argv in (
        ["run"],
        ["run", "9000"],
        ["master"],
        ["master", "0"],
        ["worker", "-a", "app:server"],
        ["worker", "10.0.0.1", "9000", "-a", "app:server"],
        ["worker", "-a", "app:server", "10.0.0.1", "9000"],
        ["worker", "[fd00::1]", "--internal-port", "7", "-a", "app:nested.server"],
    ):
        assert main(*argv) == (0, "", "")
    assert [(call.method, call.arguments) for call in ran] == [
        ("run", (8080,)),
        ("run", (9000,)),
        ("run_as_master", (8080,)),
        ("run_as_master", (0,)),
        ("run_as_worker", ("127.0.0.1", 9080)),
        ("run_as_worker", ("10.0.0.1", 10000)),
        ("run_as_worker", ("10.0.0.1", 10000)),
        ("run_as_worker", ("fd00::1", 7)),
    ]


def test_every_flag_reaches_its_option(main: Main, ran: list[Ran]) -> None:
    argv = ["run", "9000", "--host", "127.0.0.1", "--max-concurrency", "2", "--queue-timeout", "3"]
    argv += ["--timeout", "inf", "--max-body-size", "1000", "--owner", "me", "--drain-timeout", "4"]
    argv += ["--api-key", "k", "--cluster-token", "t", "--internal-host", "::1", "--internal-port", "5"]
    argv += ["--worker-timeout", "7", "--heartbeat-interval", "6", "--on-conflict", "replicate"]
    argv += ["--name", "w1"]
    assert main(*argv)[0] == 0
    assert ran[0].server.options == ClusterServerOptions(
        ServerOptions(
            host="127.0.0.1",
            port=9000,
            max_concurrency=2,
            queue_timeout=3.0,
            default_timeout=float("inf"),
            max_body_size=1000,
            owner="me",
            api_key="k",
            worker_id="w1",
        ),
        drain_timeout=4.0,
        cluster_token="t",
        internal_host="::1",
        internal_port=5,
        worker_timeout=7.0,
        heartbeat_interval=6.0,
        on_conflict="replicate",
    )


def test_flags_win_over_variables_and_these_over_the_file(
    main: Main, ran: list[Ran], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "c.toml").write_text("[server]\nport = 1\nmax_concurrency = 1\nqueue_timeout = 1")
    monkeypatch.setenv("TRIO_CLUSTER_CONFIG", "c.toml")
    monkeypatch.setenv("TRIO_CLUSTER_PORT", "2")
    monkeypatch.setenv("TRIO_CLUSTER_MAX_CONCURRENCY", "2")
    assert main("master", "3")[0] == 0
    server = ran[0].server.options.server
    assert (server.port, server.max_concurrency, server.queue_timeout) == (3, 2, 1.0)
    assert ran[0].arguments == (3,)


def test_the_application_s_own_options_hold_where_nobody_overrides_them(
    main: Main, ran: list[Ran], place: Path
) -> None:
    (place / "app.py").write_text(APP)
    assert main("master", "--app", "app:server", "--queue-timeout", "1")[0] == 0
    server = ran[0].server
    assert (server.options.server.max_concurrency, server.options.server.queue_timeout) == (3, 1.0)
    assert server.list_models() == ["echo", "slow"]


@pytest.mark.parametrize(
    ("text", "address"),
    [("localhost:0", ("localhost", 0)), ("[::1]:9000", ("::1", 9000)), ("0.0.0.0:65535", ("0.0.0.0", 65535))],
)
def test_listen_takes_an_address_and_a_port(
    text: str, address: tuple[str, int], main: Main, ran: list[Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        ClusterServer, "set_worker_listen_address", lambda self, host, port=0: asked.append((host, port))
    )
    assert main("run", "-l", text)[0] == 0
    assert asked == [address]


# Engines and the demo


@attrs.define
class Engines:
    """Stands in for the engines: notes what is served when, and can be told what to do then."""

    events: list[str]
    then: Callable[[], object] = lambda: None

    async def serve_engine(
        self, spec: str, server: ClusterServer, *, task_status: trio.TaskStatus[None]
    ) -> None:
        self.then()
        await trio.lowlevel.checkpoint()
        self.events.append(f"{spec} up")
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self.events.append(f"{spec} down")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Engines:
    stand_in = Engines([])

    async def run(self: ClusterServer, port: int, *, task_status: Any) -> ClusterMode:
        await trio.lowlevel.checkpoint()
        stand_in.events.append("server")
        return ClusterMode.MASTER

    monkeypatch.setattr(engines, "parse_serve", str)
    monkeypatch.setattr(engines, "serve_engine", stand_in.serve_engine)
    monkeypatch.setattr(ClusterServer, "run", run)
    return stand_in


def test_engines_are_up_before_the_server_and_down_after_it(main: Main, served: Engines) -> None:
    assert main("run", "--serve", "a", "--serve", "b") == (0, "", "")
    assert served.events[:3] == ["a up", "b up", "server"]
    assert sorted(served.events[3:]) == ["a down", "b down"]


def test_an_engine_that_fails_is_the_command_s_failure(main: Main, served: Engines) -> None:
    def fail() -> None:
        raise ClusterError("the weights are gone")

    served.then = fail
    code, _, err = main("run", "--serve", "a")
    assert one_line(err) == "the weights are gone"
    assert (code, served.events) == (1, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_engines_load_is_a_stop_as_asked(
    number: signal.Signals, main: Main, served: Engines
) -> None:
    served.then = lambda: signal.raise_signal(number)
    assert main("run", "--serve", "a") == (0, "", "")
    assert "server" not in served.events


def test_the_demo_gets_its_arguments_and_gives_its_exit_code(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run_demo(port: int, *, check: bool, host: str) -> int:
        await trio.lowlevel.checkpoint()
        if port == 0:
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()
        return 7 if (port, check, host) == (9000, True, "::1") else 1 if check else 0

    demo = types.ModuleType("trio_cluster.demo")
    monkeypatch.setattr(demo, "run_demo", run_demo, raising=False)
    monkeypatch.setitem(sys.modules, "trio_cluster.demo", demo)
    assert main("demo") == (0, "", "")
    assert main("demo", "--check")[0] == 1
    assert main("demo", "9000", "--check", "--host", "::1")[0] == 7
    assert main("demo", "0") == (0, "", "")


# Failures


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    async def run(self: ClusterServer, *arguments: Any, task_status: Any) -> ClusterMode:
        await trio.lowlevel.checkpoint()
        raise error

    monkeypatch.setattr(ClusterServer, "run_as_master", run)


@pytest.mark.parametrize(
    ("error", "expected", "code"),
    [
        (ClusterPortError(8080, "is taken"), "port 8080: is taken", 1),
        (ClusterError("two\nlines"), "two lines", 1),
        (OptionsError("port: no"), "port: no", 2),
        (OSError(98, "Address already in use"), "Address already in use", 1),
        (PermissionError(13, "Permission denied", "key.pem"), "key.pem: Permission denied", 1),
        (BaseExceptionGroup("g", [ExceptionGroup("h", [ClusterError("a")]), KeyboardInterrupt()]), "a", 1),
        (ExceptionGroup("g", [ClusterError("a"), ClusterError("b"), ClusterError("a")]), "a; b", 1),
        (ExceptionGroup("g", [ClusterError("a"), OptionsError("b")]), "a; b", 1),
    ],
)
def test_a_failure_is_its_root_causes_in_one_line(
    error: BaseException, expected: str, code: int, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    got, out, err = main("master")
    assert one_line(err) == expected
    assert (got, out) == (code, "")


def test_a_failure_that_nobody_foresaw_tells_where_it_happened(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, ZeroDivisionError("oh"))
    code, _, err = main("master")
    assert re.fullmatch(
        r"ZeroDivisionError: oh \(test_cli\.py, line \d+; see --log-level debug\)", one_line(err)
    )
    assert code == 1


def test_the_traceback_is_there_at_level_debug(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ClusterError("oh"))
    _, _, err = main("master", "--log-level", "debug")
    assert "Traceback (most recent call last)" in err
    assert err.endswith("\ntrio-cluster: error: oh\n")


def test_an_interrupt_is_a_stop_as_asked(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main("master") == (0, "", "")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "import nowhere_to_be_found",
            "ModuleNotFoundError: No module named 'nowhere_to_be_found' (app.py, line 1;",
        ),
        ("\n\nundefined", "NameError: name 'undefined' is not defined (app.py, line 3;"),
        ("def", "SyntaxError: "),
    ],
)
def test_an_application_that_breaks_while_it_is_imported_is_no_bad_usage(
    source: str, expected: str, main: Main, place: Path
) -> None:
    (place / "app.py").write_text(source)
    code, _, err = main("worker", "-a", "app:server")
    assert one_line(err).startswith(expected)
    assert code == 1


# Status


STATUS: dict[str, Any] = {
    "version": "1.2.3",
    "mode": "master",
    "node_id": "m1",
    "uptime": 90.0,
    "draining": False,
    "calls": {"admitted": 7, "worker_lost": 1},
    "slots": {"running": 0, "waiting": 0, "capacity": 10},
    "workers": [
        {
            "id": "gpu-1",
            "address": "10.0.0.5:53122",
            "state": "stalled",
            "stalled": "handler of 'chat' (models.py:12 in chat)",
            "models": ["chat", "embed"],
            "running": 2,
            "waiting": 0,
            "capacity": 4,
            "in_flight": 2,
            "connected_for": 11531.5,
        },
        {"id": "w\x1b[2J", "address": None, "state": "draining", "models": []},
    ],
    "models": [
        {"id": "chat", "kind": "chat", "owned_by": "me", "nodes": ["local", "gpu-1"]},
    ],
}


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers everything with what the test has put here, and notes what it was asked."""

    status = 200
    body = b""
    headers_to_send: dict[str, str] = {}  # noqa: RUF012
    asked: list[tuple[str, str | None]] = []  # noqa: RUF012
    posted: list[tuple[str, str | None, Any]] = []  # noqa: RUF012
    later: list[bytes] = []  # noqa: RUF012
    """What to answer after that, one after the other."""

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        self.answer()
        if self.later:
            type(self).body = self.later.pop(0)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/json"
        self.posted.append((self.path, self.headers.get("Authorization"), body))
        self.answer()
        if self.later:
            type(self).body = self.later.pop(0)

    def answer(self) -> None:
        self.send_response(self.status)
        for name, value in self.headers_to_send.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def node() -> Iterator[tuple[type[Answers], int]]:
    answers = type(
        "TheseAnswers",
        (Answers,),
        {"asked": [], "posted": [], "later": [], "body": json.dumps(STATUS).encode()},
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield answers, server.server_port
        server.shutdown()
        thread.join()


def test_status_prints_aligned_tables(main: Main, node: tuple[type[Answers], int]) -> None:
    code, out, err = main("status", f"http://127.0.0.1:{node[1]}")
    assert (code, err) == (0, "")
    assert out == textwrap.dedent("""\
        trio_cluster 1.2.3, master, node m1, up 1 min 30 s
        slots: 0 running, 0 waiting, 10 capacity
        calls: 7 admitted, 1 worker lost

        WORKER  ADDRESS         STATE     RUNNING  WAITING  CONNECTED   MODELS
        gpu-1   10.0.0.5:53122  stalled   2/4      0        3 h 12 min  chat, embed
        w?[2J   -               draining  -/-      -        -           -

        STALLED  WHY
        gpu-1    handler of 'chat' (models.py:12 in chat)

        MODEL  KIND  OWNER  SERVED BY
        chat   chat  me     local, gpu-1
        """)


def test_status_can_print_the_answer_itself(main: Main, node: tuple[type[Answers], int]) -> None:
    code, out, _ = main("status", str(node[1]), "--json")
    assert code == 0
    assert json.loads(out) == STATUS


def test_status_shows_the_key_from_a_flag_or_a_variable(
    main: Main, node: tuple[type[Answers], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, port = node
    main("status", f"127.0.0.1:{port}")
    main("status", f"http://127.0.0.1:{port}/v1/", "--api-key", "flag")
    monkeypatch.setenv("TRIO_CLUSTER_API_KEY", "variable")
    monkeypatch.setenv("TRIO_CLUSTER_PORT", str(port))
    main("status")
    assert answers.asked == [
        ("/cluster/status", None),
        ("/cluster/status", "Bearer flag"),
        ("/cluster/status", "Bearer variable"),
    ]


def test_a_proxy_is_not_asked_about_this_machine(
    main: Main, node: tuple[type[Answers], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert main("status", f"127.0.0.1:{node[1]}")[0] == 0


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, b"", "access refused (HTTP 401): give its key with --api-key or TRIO_CLUSTER_API_KEY"),
        (404, b"", "is not a trio_cluster node (HTTP 404)"),
        (503, b"", "failed to answer (HTTP 503)"),
        (200, b"<html>", "is not a trio_cluster node"),
        (200, b'{"version": 1}', "is not a trio_cluster node"),
        (200, b"[" * 100_000, "is not a trio_cluster node"),
        (200, b"\xff", "is not a trio_cluster node"),
    ],
)
def test_status_tells_in_one_line_what_is_wrong_with_the_answer(
    status: int, body: bytes, expected: str, main: Main, node: tuple[type[Answers], int]
) -> None:
    answers, port = node
    answers.status, answers.body = status, body
    code, out, err = main("status", str(port))
    assert one_line(err) == f"http://127.0.0.1:{port}: {expected}"
    assert (code, out) == (1, "")


def test_a_wrong_key_is_called_wrong(main: Main, node: tuple[type[Answers], int]) -> None:
    answers, port = node
    answers.status = 401
    assert one_line(main("status", str(port), "--api-key", "k")[2]).endswith(
        "(HTTP 401): the API key is wrong"
    )


def test_the_key_is_not_taken_along_to_where_an_answer_redirects(
    main: Main, node: tuple[type[Answers], int]
) -> None:
    answers, port = node
    answers.status, answers.headers_to_send = 302, {"Location": f"http://127.0.0.1:{port}/elsewhere"}
    code, _, err = main("status", str(port), "--api-key", "k")
    assert "(HTTP 302)" in one_line(err)
    assert (code, len(answers.asked)) == (1, 1)


def test_nobody_there_is_one_line(main: Main) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it, and nobody answers on it
        port = held.getsockname()[1]
        code, _, err = main("status", str(port))
    assert one_line(err) == f"http://127.0.0.1:{port}: cannot be reached: Connection refused"
    assert code == 1


def test_somebody_silent_there_is_one_line(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_client, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        code, _, err = main("status", str(port))
    assert one_line(err) == f"http://127.0.0.1:{port}: no answer within 0.05 seconds"
    assert code == 1


def test_somebody_who_does_not_speak_http_is_one_line(main: Main) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        code, _, err = main("status", str(server.getsockname()[1]))
        thread.join()
    assert "does not answer as HTTP does" in one_line(err)
    assert code == 1


@pytest.mark.parametrize(
    "status",
    [
        {"version": None, "mode": [], "workers": None, "models": {}},
        {"version": 1, "mode": 2, "workers": [1, None], "models": ["x"], "calls": 3, "uptime": float("nan")},
        {"version": 1, "mode": 2, "workers": [{"connected_for": 1e300, "models": {"a": 1}}], "models": [{}]},
    ],
)
def test_any_shape_of_answer_can_be_shown(status: dict[str, Any]) -> None:
    assert "trio_cluster" in tables.describe_status(status)


def test_a_worker_tells_of_its_master_and_of_what_was_rejected() -> None:
    status = {
        "mode": "worker",
        "models": [],
        "calls": {},
        "connected": False,
        "rejected_models": {"a": "taken"},
    }
    assert tables.describe_status(status) == textwrap.dedent("""\
        trio_cluster, worker, without a master

        no models

        REJECTED  REASON
        a         taken""")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations_are_told_in_two_units(seconds: float, text: str) -> None:
    status = {"version": "1", "mode": "master", "uptime": seconds}
    assert f", up {text}\n" in tables.describe_status(status)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("8080", "http://127.0.0.1:8080"),
        ("master:9000", "http://master:9000"),
        ("https://master/v1/", "https://master"),
        ("http://master/behind/a/proxy/", "http://master/behind/a/proxy"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_a_node_is_named_by_url_address_or_port(text: str, url: str) -> None:
    assert admin_client.node_url(text) == url


CALLS = {
    "calls": [
        {
            "request_id": "r1",
            "model": "echo",
            "kind": "chat",
            "endpoint": "chat.completions",
            "node": "gpu-1",
            "phase": "streaming",
            "age": 3723.4,
            "delivered": 1234,
            "client": "10.0.0.9:1234",
        },
        {"request_id": "two\nlines", "age": "old", "client": None, "delivered": 0},
    ]
}


def test_calls_are_an_aligned_table(main: Main, node: tuple[type[Answers], int]) -> None:
    answers, port = node
    answers.body = json.dumps(CALLS).encode()
    code, out, err = main("calls", str(port), "--api-key", "k")
    assert (code, err) == (0, "")
    assert out == textwrap.dedent("""\
        REQUEST    MODEL  ENDPOINT          NODE   PHASE      AGE        BYTES  CLIENT
        r1         echo   chat.completions  gpu-1  streaming  1 h 2 min  1234   10.0.0.9:1234
        two?lines  -      -                 -      -          -          0      -
        """)
    assert answers.asked == [("/cluster/calls", "Bearer k")]
    assert json.loads(main("calls", str(port), "--json")[1]) == CALLS
    answers.body = b'{"calls": []}'
    assert main("calls", str(port))[1] == "no calls\n"
    assert tables.describe_calls({"calls": [3, {}]})
    assert tables.describe_calls({"calls": {}}) == "no calls"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1, "1 call was cancelled"),
        (3, "3 calls were cancelled"),
        (0, "its answer is over already; the work for it is about to stop"),
    ],
)
def test_cancel_tells_how_many_calls_there_were(
    count: int, said: str, main: Main, node: tuple[type[Answers], int]
) -> None:
    answers, port = node
    answers.body = json.dumps({"request_id": "a/b c", "cancelled": count}).encode()
    code, out, err = main("cancel", "a/b c", f"127.0.0.1:{port}/v1", "--api-key", "k", "--reason", "enough")
    assert (code, out, err) == (0, f"{said}\n", "")
    assert answers.posted == [("/cluster/calls/a%2Fb%20c/cancel", "Bearer k", {"reason": "enough"})]


@pytest.mark.parametrize("argv", [["cancel", "r1"], ["drain", "w1"]], ids=" ".join)
def test_what_a_node_says_when_it_says_no_is_one_line(
    argv: list[str], main: Main, node: tuple[type[Answers], int]
) -> None:
    answers, port = node
    answers.status = 404
    answers.body = json.dumps({"error": {"message": "none\nsuch\x1b", "code": "x_not_found"}}).encode()
    code, out, err = main(*argv, str(port))
    assert one_line(err) == f"http://127.0.0.1:{port}: none?such?"
    assert (code, out) == (1, "")
    answers.body = b'{"error": {"message": "Unknown URL", "code": null}}'
    assert "is not a trio_cluster node (HTTP 404)" in one_line(main(*argv, str(port))[2])


def worker(in_flight: int, draining: bool = True, instance: str = "one") -> dict[str, Any]:
    return {"id": "gpu 1", "instance": instance, "draining": draining, "in_flight": in_flight}


def with_workers(*workers: dict[str, Any]) -> bytes:
    return json.dumps(STATUS | {"workers": [{"id": "other"}, *workers]}).encode()


def test_drain_waits_until_that_very_process_has_left(
    main: Main, node: tuple[type[Answers], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_DRAIN_POLL", 0.0)
    answers, port = node
    answers.body = json.dumps(worker(2)).encode()
    answers.later += [
        with_workers(worker(2)),
        with_workers(worker(1)),
        with_workers(worker(1)),
        # Another one has come under its name.
        with_workers(worker(5, draining=False, instance="two")),
    ]
    code, out, err = main("drain", "gpu 1", str(port), "--api-key", "k")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "gpu 1 drains: 2 requests in flight",
        "gpu 1 drains: 1 request in flight",
        "gpu 1 has left",
    ]
    assert answers.posted == [("/cluster/workers/gpu%201/drain", "Bearer k", {})]


def test_drain_asks_again_if_the_worker_came_back_without_having_heard(
    main: Main, node: tuple[type[Answers], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_DRAIN_POLL", 0.0)
    answers, port = node
    answers.body = json.dumps(worker(0)).encode()
    answers.later += [
        with_workers(worker(0, draining=False)),
        json.dumps(worker(0)).encode(),
        with_workers(worker(0)),
        with_workers(),
    ]
    assert main("drain", "gpu 1", str(port))[0] == 0
    assert len(answers.posted) == 2


def test_drain_need_not_wait(main: Main, node: tuple[type[Answers], int]) -> None:
    answers, port = node
    answers.body = json.dumps(worker(0)).encode()
    code, out, _ = main("drain", "gpu 1", str(port), "--no-wait")
    assert (code, out) == (0, "gpu 1 drains: 0 requests in flight\n")
    assert answers.asked == []


def test_a_drain_that_is_interrupted_has_not_succeeded(
    main: Main, node: tuple[type[Answers], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.time, "sleep", interrupt)
    answers, port = node
    answers.body = json.dumps(worker(1)).encode()
    code, _, err = main("drain", "gpu 1", str(port))
    assert code == 1
    assert one_line(err) == "stopped waiting; the worker 'gpu 1' drains on"


def test_master_hosts_are_names_or_addresses() -> None:
    for text, host in (
        ("gpu-1.lan", "gpu-1.lan"),
        ("10.0.0.1", "10.0.0.1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
    ):
        assert arguments.master_host(text) == host


# Real processes


@attrs.define
class Process:
    """A command that runs, and what it has logged so far."""

    popen: subprocess.Popen[bytes]
    logged: str = ""

    def read(self, timeout: float) -> bool:
        """Read what it logs next; tell whether there was anything before the time was up or it ended."""
        assert self.popen.stderr is not None
        ready, _, _ = select.select([self.popen.stderr], [], [], max(0.0, timeout))
        piece = os.read(self.popen.stderr.fileno(), 65536) if ready else b""
        self.logged += piece.decode()
        return piece != b""

    def wait_for(self, pattern: str, timeout: float = 20.0) -> re.Match[str]:
        """Read until a whole line has been logged that matches."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(f"{pattern}.*\n", self.logged)):
            if not self.read(deadline - time.monotonic()):
                pytest.fail(f"nothing like {pattern!r} in:\n{self.logged}")
        return match

    def end(self, timeout: float = 20.0) -> tuple[int, str]:
        """Wait until it has ended; return its exit code and all that it logged."""
        deadline = time.monotonic() + timeout
        while self.read(deadline - time.monotonic()):
            pass
        return self.popen.wait(timeout=max(0.1, deadline - time.monotonic())), self.logged


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Process]]:
    (place / "app.py").write_text(APP)
    started: list[Process] = []

    def start(*argv: str) -> Process:
        popen = subprocess.Popen(
            [sys.executable, "-m", "trio_cluster", *argv],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        started.append(Process(popen))
        return started[-1]

    yield start
    for process in started:
        with process.popen as popen:
            popen.kill()


processes = pytest.mark.processes


def ask_slow(url: str) -> http.client.HTTPResponse:
    """Open a stream that the model never ends, and return it when it has begun."""
    body = {"model": "slow", "messages": [{"role": "user", "content": "x"}], "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=20)
    response.readline()
    return response


@processes
def test_the_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "trio_cluster", "worker"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert one_line(result.stderr).startswith("a worker needs something to serve")


@processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_gracefully_with_code_0(number: signal.Signals, start: Callable[..., Process]) -> None:
    process = start("master", "0", "--host", "127.0.0.1", "-a", "app:server")
    process.wait_for(r"serving .*url=http://127\.0\.0\.1:\d+.* mode=master models=echo,slow")
    process.popen.send_signal(number)
    code, log = process.end()
    assert code == 0
    assert f"signal={number.name}" in log
    assert "Traceback" not in log


@processes
def test_a_second_signal_stops_at_once(start: Callable[..., Process]) -> None:
    process = start("master", "0", "--host", "127.0.0.1", "-a", "app:server", "--drain-timeout", "1000")
    url = process.wait_for(r"serving .*url=(http://127\.0\.0\.1:\d+)")[1]
    with ask_slow(url):
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("stopping")
        with pytest.raises(subprocess.TimeoutExpired):
            process.popen.wait(timeout=0.3)
        process.popen.send_signal(signal.SIGTERM)
        code, log = process.end()
    assert code == 0
    assert "Traceback" not in log


@processes
def test_a_worker_joins_and_a_taken_port_is_found_out(start: Callable[..., Process]) -> None:
    master = start("master", "0", "--host", "127.0.0.1")
    port = int(master.wait_for(r"serving .*url=http://127\.0\.0\.1:(\d+)")[1])
    worker = start(
        "worker", "127.0.0.1", str(port), "-a", "app:server", "--name", "w1", "--log-format", "json"
    )
    worker.wait_for(r'"message": "registered with the master", "models": \["echo", "slow"\]')
    status = subprocess.run(
        [sys.executable, "-m", "trio_cluster", "status", str(port)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"^w1 +127\.0\.0\.1", status.stdout, re.M)
    second = start("master", str(port), "--host", "127.0.0.1")
    code, log = second.end()
    assert code == 1
    assert re.fullmatch(rf"trio-cluster: error: port {port}: .+\n", log)
    for process in (worker, master):
        process.popen.send_signal(signal.SIGTERM)
        assert process.end()[0] == 0


@processes
def test_a_worker_without_a_master_can_be_stopped(start: Callable[..., Process]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        process = start(
            "worker", "127.0.0.1", "--internal-port", str(port), "-a", "app:server", "--log-level", "debug"
        )
        process.wait_for(r"127\.0\.0\.1")
        process.popen.send_signal(signal.SIGINT)
        code, log = process.end()
    assert code == 0
    assert "Traceback" not in log


@processes
def test_a_refused_worker_ends_with_code_1_and_one_line(start: Callable[..., Process]) -> None:
    master = start("master", "0", "--host", "127.0.0.1", "--cluster-token", "right")
    port = master.wait_for(r"serving .*url=http://127\.0\.0\.1:(\d+)")[1]
    worker = start(
        "worker", "127.0.0.1", port, "-a", "app:server", "--cluster-token", "wrong", "--log-level", "error"
    )
    code, log = worker.end()
    assert code == 1
    one_line(log)
    master.popen.send_signal(signal.SIGTERM)
    assert master.end()[0] == 0
