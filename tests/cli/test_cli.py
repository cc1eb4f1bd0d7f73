"""The command line: its arguments, exit codes and one-line errors, and what it starts in which order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from command_line import APP, Main, Ran, one_line

from trio_cluster import engines
from trio_cluster._version import __version__
from trio_cluster.cli import arguments
from trio_cluster.errors import ClusterError, ClusterPortError, OptionsError
from trio_cluster.options import ClusterMode, ClusterServerOptions, ServerOptions
from trio_cluster.server import ClusterServer

# Arguments


def test_help_and_version_end_with_code_0(main: Main) -> None:
    code, out, _ = main("--version")
    assert code == 0
    assert re.fullmatch(
        rf"trio-cluster {re.escape(__version__)}( \(commit [0-9a-f]{{40}}(-modified)?\))?\n", out
    )
    code, out, _ = main("--help")
    assert code == 0
    for command in ("demo", "run", "master", "worker", "status", "calls", "cancel", "drain"):
        assert command in out
        assert main(command, "--help")[0] == 0


def test_help_shows_the_defaults_of_the_options(main: Main) -> None:
    _, out, _ = main("master", "--help")
    text = " ".join(out.split())
    assert "--max-concurrency N requests that run in this process at once (default: 10)" in text
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
        (["worker", "ftp://master:8080", "-a", "app:server"], "HOST: expected"),
        (["worker", "http://master/elsewhere", "-a", "app:server"], "HOST: expected"),
        (["worker", "master:http", "-a", "app:server"], "HOST: expected"),
        (["worker", "master:", "-a", "app:server"], "HOST: expected"),
        (["worker", "master:8080", "9000", "-a", "app:server"], "PORT: 9000 is not the port of master:8080"),
        (["worker", "", "-a", "app:server"], "HOST: expected"),
        (
            ["worker", "master", "65000", "-a", "app:server"],
            "PORT: a master on port 65000 has no port 65000 + 1000 for workers; give that port with --internal-port",
        ),
        (["worker", "master", "0", "-a", "app:server"], "PORT: a master on port 0 has no"),
        (["master", "--serve", "nonsense:x"], "--serve: nonsense:x: there is no engine 'nonsense'"),
        (["worker", "-a", "app"], "--app: expected MODULE:ATTRIBUTE"),
        (["worker", "-a", "app.py:server"], "--app: expected MODULE:ATTRIBUTE"),
        (["worker", "-a", ":server"], "--app: expected MODULE:ATTRIBUTE"),
        (["worker", "-a", "elsewhere:server"], "--app: there is no module 'elsewhere', neither in "),
        (["worker", "-a", "app.sub:server"], "--app: there is no module 'app.sub'"),
        (["worker", "-a", "app:none"], "--app: module 'app' has no attribute 'none'"),
        (["worker", "-a", "app:text"], "--app: app:text is of type str, not a ClusterServer"),
        (["status", "ftp://host"], "URL: expected a URL such as"),
        (["status", "host:port"], "URL: 'http://host:port' is not a URL"),
        (["calls", "ftp://host"], "URL: expected a URL such as"),
        (["cancel"], "the following arguments are required: REQUEST_ID"),
        (["install-service"], "the following arguments are required: {master,worker}"),
        (["ca"], "the following arguments are required: rotate"),
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
    argv += ["--name", "w1", "--access-log"]
    assert main(*argv)[0] == 0
    assert ran[0].server.options == ClusterServerOptions(
        ServerOptions(
            host="127.0.0.1",
            port=9000,
            max_concurrency=2,
            queue_timeout=3.0,
            default_timeout=float("inf"),
            max_body_size=1000,
            access_log=True,
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
        # Not by a flag: the command line has one unless it is told otherwise.
        guardian=True,
    )


def test_flags_override_variables_and_these_override_the_file(
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


@pytest.mark.parametrize(
    ("words", "guardian"),
    [
        (["run"], True),
        (["worker", "--app", "app:server"], True),
        (["worker", "--app", "app:server", "--no-guardian"], False),
        (["worker", "--app", "app:without"], False),
        (["master"], None),
    ],
)
def test_a_worker_of_the_command_line_has_a_guardian_unless_something_says_otherwise(
    main: Main, ran: list[Ran], place: Path, words: list[str], guardian: bool | None
) -> None:
    more = [
        "from trio_cluster import ClusterServerOptions as O",
        "without = ClusterServer(O(guardian=False))",
    ]
    (place / "app.py").write_text("\n".join([APP, *more]))
    assert main(*words)[0] == 0
    assert ran[0].server.options.guardian is guardian


def test_the_options_of_the_application_hold_where_no_source_overrides_them(
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


def test_master_hosts_are_names_or_addresses() -> None:
    for text, host in (
        ("gpu-1.lan", "gpu-1.lan"),
        ("10.0.0.1", "10.0.0.1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
    ):
        assert arguments.master_host(text) == host


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["gpu"], ("gpu", 9080)),
        (["gpu", "7000"], ("gpu", 8000)),
        (["gpu:7000"], ("gpu", 8000)),
        (["gpu:7000", "7000"], ("gpu", 8000)),
        (["http://gpu:7000"], ("gpu", 8000)),
        (["http://gpu:7000/v1/"], ("gpu", 8000)),
        (["http://gpu"], ("gpu", 1080)),
        (["[::1]:7000"], ("::1", 8000)),
        (["http://[::1]:7000"], ("::1", 8000)),
        (["::1"], ("::1", 9080)),
        (["[::1]"], ("::1", 9080)),
        (["https://gpu:7000"], ("gpu", 8000)),
        (["https://gpu/v1"], ("gpu", 1443)),
    ],
)
def test_the_master_of_a_worker_is_a_host_an_address_or_a_url(
    words: list[str], where: tuple[str, int], main: Main, ran: list[Ran], place: Path
) -> None:
    (place / "app.py").write_text(APP)
    assert main("worker", *words, "-a", "app:server")[0] == 0
    assert [(each.arguments, each.tls) for each in ran] == [(where, words[0].startswith("https"))]


@pytest.mark.parametrize("words", [["gpu", "--tls"], ["gpu:8080", "--tls"], ["https://gpu:8080", "--tls"]])
def test_a_worker_connects_with_tls_if_it_is_told_to(
    words: list[str], main: Main, ran: list[Ran], place: Path
) -> None:
    (place / "app.py").write_text(APP)
    assert main("worker", *words, "-a", "app:server")[0] == 0
    assert [(each.method, each.arguments, each.tls) for each in ran] == [
        ("run_as_worker", ("gpu", 9080), True)
    ]


def test_a_worker_that_is_invited_joins_and_one_that_has_joined_goes_on(
    main: Main, ran: list[Ran], place: Path
) -> None:
    (place / "app.py").write_text(APP)
    state = place / "state"
    common = ("-a", "app:server", "--state-dir", str(state))
    assert main("worker", "--join", "tcj-abc", *common)[0] == 0
    state.mkdir()
    (state / "membership.json").touch()
    assert main("worker", *common)[0] == 0
    assert main("worker", "gpu", *common)[0] == 0
    assert [(each.method, each.arguments) for each in ran] == [
        ("run_as_member", ("tcj-abc",)),
        ("run_as_member", ()),
        ("run_as_worker", ("gpu", 9080)),
    ]
    for words in (["gpu", "--join", "t"], ["--tls", "--join", "t"]):
        code, _, err = main("worker", *words, *common)
        assert (code, "--join: the invitation says where the master is" in one_line(err)) == (2, True)


@pytest.mark.parametrize(
    ("words", "method", "arguments", "named", "tls"),
    [
        (["a:8080,b:8081"], "run_as_worker", (), {"masters": [("a", 9080), ("b", 9081)]}, False),
        (["a,b", "8090"], "run_as_worker", (), {"masters": [("a", 9090), ("b", 9090)]}, False),
        (["a,b"], "run_as_worker", (), {"masters": [("a", 9080), ("b", 9080)]}, False),
        (["[::1]:80,b", "--internal-port", "7"], "run_as_worker", (), {"masters": [("::1", 7), ("b", 7)]}, False),
        (["https://a,https://b:8443"], "run_as_worker", (), {"masters": [("a", 1443), ("b", 9443)]}, True),
        (["--masters-from", "c:8080"], "run_as_worker", (), {"masters_from": ("c", 9080)}, False),
        (["--masters-from", "c:8080", "--tls"], "run_as_worker", (), {"masters_from": ("c", 9080)}, True),
        (["--masters-from", "c:80", "--join", "t"], "run_as_member", ("t",), {"masters_from": ("c", 1080)}, False),
        (["a:80,b:80", "--join", "t"], "run_as_member", ("t",), {"masters": [("a", 1080), ("b", 1080)]}, False),
    ],
)  # fmt: skip
def test_a_worker_of_several_masters(
    words: list[str],
    method: str,
    arguments: Any,
    named: Any,
    tls: bool,
    main: Main,
    ran: list[Ran],
    place: Path,
) -> None:
    (place / "app.py").write_text(APP)
    assert main("worker", *words, "-a", "app:server")[0] == 0
    (it,) = ran
    assert (it.method, it.arguments, it.named, it.tls) == (method, arguments, named, tls)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["a:8080,", "-a", "app:server"], "HOST: expected the master's name or address"),
        (["a:8080,b:8081", "8080"], "PORT: 8080 is not the port of b:8081"),
        (["https://a:8080,b:8081"], "HOST: either all masters speak TLS, or none does"),
        (["a", "--masters-from", "b:1"], "--masters-from: it says where the masters are"),
        (["--masters-from", "b"], "--masters-from: expected NAME:PORT, got 'b'"),
        (["--masters-from", "b:65000"], "PORT: a master on port 65000 has no port 65000 + 1000"),
    ],
)
def test_masters_that_cannot_be_served(words: list[str], why: str, main: Main, place: Path) -> None:
    (place / "app.py").write_text(APP)
    code, _, err = main("worker", *words, "-a", "app:server")
    assert code == 2
    assert why in one_line(err)


def test_what_the_terminal_cannot_show_is_escaped() -> None:
    code = (
        "import sys; from trio_cluster.cli import commands;"
        "commands._COMMANDS['status'] = lambda arguments: print('w\\u00fcrker \\u5317') or 0;"
        "sys.exit(commands.main(['status']))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == b"w\\xfcrker \\u5317\n"


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    code = (
        "import sys; from trio_cluster.cli import commands;"
        "commands._COMMANDS['status'] = lambda arguments: [print('x' * 1000) for _ in range(1000)] and 0;"
        "sys.exit(commands.main(['status']))"
    )
    popen = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert popen.stdout is not None
    assert popen.stderr is not None
    popen.stdout.readline()
    popen.stdout.close()
    with popen.stderr:
        assert popen.stderr.read() == b""
    assert popen.wait(timeout=20) == 0


# Engines and the demo


@attrs.define
class Engines:
    """Replaces the engines. Records what is served when; calls ``then`` when an engine is started."""

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


def test_the_failure_of_an_engine_is_the_failure_of_the_command(main: Main, served: Engines) -> None:
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


def test_the_demo_gets_its_arguments_and_its_exit_code_is_the_command_s(
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
    async def run(self: ClusterServer, *arguments: Any, **options: Any) -> ClusterMode:
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


def test_an_unexpected_error_names_its_place_in_the_code(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
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
        (
            "from trio_cluster import ClusterServer\nserver = ClusterServer()\n@server.chat\ndef m(request): ...",
            "TypeError: the decorator needs the name of the model: write @server.chat('m') above m (app.py, line 3;",
        ),
    ],
)
def test_an_error_in_the_import_of_an_application_is_not_bad_usage(
    source: str, expected: str, main: Main, place: Path
) -> None:
    (place / "app.py").write_text(source)
    code, _, err = main("worker", "-a", "app:server")
    assert one_line(err).startswith(expected)
    assert code == 1


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("[server.register_chat('m', lambda request: '') for _ in (1, 2)]", "already served"),
        ("server.register_tts('m', 7)", "a handler must be a function, not 7"),
        ("server.chat(' m')(lambda request: '')", "a model's name must have"),
    ],
)
def test_an_error_of_a_registration_names_the_user_s_line(
    line: str, error: str, main: Main, place: Path
) -> None:
    source = f"from trio_cluster import ClusterServer\nserver = ClusterServer()\n\n{line}\n"
    (place / "app.py").write_text(source)
    code, _, err = main("worker", "-a", "app:server")
    assert code == 1
    assert error in one_line(err)
    assert "(app.py, line 4;" in one_line(err)


@pytest.mark.parametrize(
    ("words", "app", "host"),
    [
        (["worker"], "models:server", "a.lan,b.lan:9000"),
        (["worker", "c.lan"], "models:server", "c.lan"),
        (["worker", "--app", "other:server"], "other:server", "a.lan,b.lan:9000"),
        (["worker", "--masters-from", "masters.lan"], "models:server", None),
        (["master"], "models:server", None),
        (["run"], "models:server", None),
    ],
)
def test_the_file_may_name_the_application_and_the_masters(
    words: list[str], app: str, host: str | None, place: Path
) -> None:
    file = place / "c.toml"
    file.write_text("app = 'models:server'\n[worker]\nmasters = ['a.lan', 'b.lan:9000']\n")
    given = arguments.parse_arguments([*words, "--config", str(file)])
    arguments.add_node_settings(given)
    assert (given.app, getattr(given, "master_host", None)) == (app, host)
    # A program that is an application itself is not replaced by that of the file.
    given = arguments.parse_arguments([*words[:1], "--config", str(file)])
    arguments.add_node_settings(given, is_application=True)
    assert given.app is None


def test_a_worker_serves_what_the_file_says(main: Main, place: Path) -> None:
    (place / "c.toml").write_text("app = 'no_such_module:server'\n[worker]\nmasters = ['127.0.0.1:1']\n")
    code, _, err = main("worker", "--config", "c.toml")
    assert code == 2
    assert "no_such_module" in one_line(err)
    # The error names the place to correct.
    assert one_line(err).startswith("c.toml: app: there is no module")


def test_a_wrong_address_in_the_file_is_reported_as_one_of_the_file(main: Main, place: Path) -> None:
    (place / "c.toml").write_text("[worker]\nmasters = ['ftp://a.lan']\n")
    code, _, err = main("worker", "--serve", "llama:m", "--config", "c.toml")
    assert code == 2
    assert one_line(err).startswith("c.toml: worker.masters: expected")
