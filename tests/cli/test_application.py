"""``server.main()``: a program that is its own command line."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import APP, Ran
from test_cli_processes import Process, ask_slow, start  # noqa: F401

from trio_cluster import ClusterMode, ClusterServer
from trio_cluster.cli.commands import _Announcer
from trio_cluster.options import ClusterServerOptions, ServerOptions

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
FIRST = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)[0]


@pytest.fixture
def program(
    place: Path,
    start: Callable[..., Process],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Process]:
    """Start a program of its own, which gets its port from the arguments."""
    monkeypatch.setenv("TRIO_CLUSTER_HOST", "127.0.0.1")

    def run(source: str, *argv: str) -> Process:
        (place / "models.py").write_text(source)
        return start(*argv, program="models.py")

    return run


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_program_of_the_readme_serves_and_ends_in_one_line(
    number: signal.Signals, program: Callable[..., Process]
) -> None:
    assert "server.main()" in FIRST
    process = program(FIRST, "0")
    process.wait_for(r"serving .*url=http://127\.0\.0\.1:\d+.* models=echo")
    before = process.logged
    process.popen.send_signal(number)
    code, log = process.end()
    assert code == 0
    assert log.removeprefix(before).count("\n") == 1


@pytest.mark.processes
def test_a_signal_lets_a_request_finish(program: Callable[..., Process]) -> None:
    source = (
        APP.replace("await trio.sleep_forever()", "await trio.sleep(1); yield ' done'") + "server.main()\n"
    )
    process = program(source, "0")
    url = process.wait_for(r"serving .*url=(http://127\.0\.0\.1:\d+)")[1]
    with ask_slow(url) as response:
        process.popen.send_signal(signal.SIGTERM)
        assert response.read().endswith(b"data: [DONE]\n\n")
    assert process.end()[0] == 0


@pytest.mark.processes
def test_a_second_process_of_one_program_is_refused_and_says_what_to_do(
    program: Callable[..., Process],
) -> None:
    first = program(FIRST, "0")
    port = first.wait_for(r"serving .*url=http://127\.0\.0\.1:(\d+)")[1]
    second = program(FIRST, port)
    second.wait_for("--on-conflict replicate")


@pytest.mark.processes
def test_processes_of_one_program_are_replicas_if_they_are_to_be(program: Callable[..., Process]) -> None:
    first = program(FIRST, "0", "--on-conflict", "replicate")
    port = first.wait_for(r"serving .*url=http://127\.0\.0\.1:(\d+)")[1]
    second = program(FIRST, port, "--on-conflict", "replicate")
    second.wait_for(r"registered with the master models=echo")


def test_main_takes_the_commands_that_run_a_node(place: Path, ran: list[Ran], restored_logging: None) -> None:
    assert threading.current_thread() is threading.main_thread()
    server = ClusterServer(ClusterServerOptions(ServerOptions(port=7001)))
    server.main([])
    server.main(["7002", "--max-concurrency", "3"])
    server.main(["master", "7003"])
    server.main(["worker", "gpu", "7004"])
    assert [(each.method, each.arguments) for each in ran] == [
        ("run", (7001,)),
        ("run", (7002,)),
        ("run_as_master", (7003,)),
        ("run_as_worker", ("gpu", 8004)),
    ]
    assert all(each.server is server for each in ran)
    assert server.options.server.max_concurrency == 3


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["status"], "PORT"),
        (["--prot", "7"], "--prot"),
        (["--app", "a:b"], "is an application itself"),
        (["--host", ""], "host"),
    ],
)
def test_bad_usage_is_one_line(
    argv: list[str],
    text: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["models.py"])
    with pytest.raises(SystemExit) as caught:
        ClusterServer().main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error


def test_help_is_that_of_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["models.py"])
    ClusterServer().main(["--help"])
    assert "usage: models.py run" in capsys.readouterr().out


@pytest.mark.processes
@pytest.mark.parametrize(
    ("variables", "open_for"),
    [
        ({}, {"not encrypted", "without a key", "without a token"}),
        ({"TRIO_CLUSTER_API_KEY": "k"}, {"not encrypted", "without a token"}),
        ({"TRIO_CLUSTER_CLUSTER_TOKEN": "t"}, {"not encrypted", "without a key"}),
        ({"TRIO_CLUSTER_TLS": "auto"}, {"without a key"}),
        ({"TRIO_CLUSTER_TLS": "auto", "TRIO_CLUSTER_API_KEY": "k"}, set()),
        ({"TRIO_CLUSTER_HOST": "127.0.0.1"}, set()),
    ],
)
def test_a_node_on_all_addresses_says_where_it_is_reached_and_warns_if_it_is_open(
    variables: dict[str, str],
    open_for: set[str],
    program: Callable[..., Process],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("TRIO_CLUSTER_HOST")
    monkeypatch.setenv("TRIO_CLUSTER_STATE_DIR", str(tmp_path / "state"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    process = program(FIRST, "0")
    process.wait_for("serving ")
    process.popen.send_signal(signal.SIGTERM)
    log = process.end()[1]
    assert log.count("open on the network") == bool(open_for)
    for phrase in ("not encrypted", "without a key", "without a token"):
        assert (phrase in log) is (phrase in open_for)
    if "without a key" in open_for:
        named = re.search(r"trio-cluster keys create NAME (\S+)\)", log)
        served = re.search(r"serving .*?url=(https?://127\.0\.0\.1:\d+)", log)
        assert named is not None
        assert served is not None
        assert named[1] == served[1]
    everywhere = "TRIO_CLUSTER_HOST" not in variables
    assert bool(re.search(r"from_other_machines=https?://[\w.-]+:\d+", log)) is everywhere


@pytest.mark.parametrize(
    ("host", "port", "operator_key", "hint"),
    [
        ("0.0.0.0", 8080, None, "or make keys with: trio-cluster keys create NAME)"),
        ("0.0.0.0", 8081, None, "or make keys with: trio-cluster keys create NAME http://127.0.0.1:8081)"),
        ("192.0.2.1", 8080, "k", "or make keys with: trio-cluster keys create NAME http://192.0.2.1:8080)"),
        (
            "192.0.2.1",
            8080,
            None,
            "or set TRIO_CLUSTER_OPERATOR_KEY for both, and make keys with: "
            "trio-cluster keys create NAME http://192.0.2.1:8080)",
        ),
    ],
)
def test_the_hint_about_keys_reaches_this_very_node(
    host: str, port: int, operator_key: str | None, hint: str
) -> None:
    options = ClusterServerOptions(server=ServerOptions(host=host, operator_key=operator_key))
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    server: Any = SimpleNamespace(options=options, url=url, port=port, requires_key=False)
    assert hint in "; ".join(_Announcer(server)._open_for(ClusterMode.MASTER))


@pytest.mark.processes
@pytest.mark.parametrize("command", [["0"], ["worker", "127.0.0.1:1"]], ids=" ".join)
def test_a_hook_that_fails_is_one_line_and_exit_code_1(
    command: list[str], program: Callable[..., Process]
) -> None:
    hooks = """
@server.on_start
def load() -> None:
    raise FileNotFoundError("no weights\\nhere")


server.main()
"""
    code, log = program(FIRST.partition("if __name__")[0] + hooks, *command).end()
    assert code == 1
    line = [line for line in log.splitlines() if "load" in line]
    assert line == [
        "trio-cluster: error: the start-up hook 'load' failed: FileNotFoundError: no weights here (models.py, line 15)"
    ]
    assert "Traceback" not in log


@pytest.mark.processes
def test_a_signal_during_the_start_runs_the_stop_hooks(program: Callable[..., Process]) -> None:
    hooks = """
import sys

import trio

server.on_stop(lambda: print("stopped", file=sys.stderr, flush=True))


@server.on_start
async def load() -> None:
    print("loading", file=sys.stderr, flush=True)
    await trio.sleep_forever()


server.main()
"""
    process = program(FIRST.partition("if __name__")[0] + hooks, "0")
    process.wait_for("loading")
    process.popen.send_signal(signal.SIGTERM)
    code, log = process.end()
    assert (code, log.splitlines()[-1]) == (0, "stopped")
