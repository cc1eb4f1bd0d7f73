"""A configuration that is read again while its server runs: by SIGHUP, over HTTP, and by ``trio-cluster reload``."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from certificates import authority, now
from command_line import Main, one_line
from test_admin_commands import ScriptedNode, node  # noqa: F401
from test_cli_processes import Process, ask_slow, start  # noqa: F401

from trio_cluster import ClusterServer
from trio_cluster.cli import commands
from trio_cluster.cli.arguments import parse_arguments
from trio_cluster.cli.configuration import reload_on_signal
from trio_cluster.errors import ClusterError, OptionsError
from trio_cluster.options import Reloaded

processes = pytest.mark.processes


def write(place: Path, server: str = "", top: str = "") -> Path:
    file = place / "c.toml"
    file.write_text(f"{top}\n[server]\nhost = '127.0.0.1'\n{server}\n")
    return file


def serving(*argv: str) -> ClusterServer:
    """Return the server that a command line would run."""
    arguments = parse_arguments(argv)
    arguments.application = None
    return commands._server(arguments)


async def reload(server: ClusterServer) -> tuple[list[str], list[str]]:
    """Read the configuration again; return the names of what was applied, and of what needs a restart."""
    assert server.reloader is not None
    found = await server.reloader()
    return [change.option for change in found.applied], [change.option for change in found.needs_restart]


async def test_what_has_changed_is_applied_or_named(place: Path) -> None:
    server = serving("master", "--config", str(write(place, "keepalive = 10")))
    assert await reload(server) == ([], [])
    write(place, "keepalive = 3\nport = 9", "worker_timeout = 60\ndrain_timeout = 5\n[aliases]\na = 'm'")
    assert await reload(server) == (
        ["server.keepalive", "aliases", "drain_timeout"],
        ["server.port", "worker_timeout"],
    )
    options = server.options
    assert (options.server.keepalive, options.drain_timeout, options.aliases) == (3.0, 5.0, {"a": "m"})
    assert (options.server.port, options.worker_timeout) == (8080, 30.0)
    # What waits for a restart is not forgotten, and what was applied is not said again.
    assert await reload(server) == ([], ["server.port", "worker_timeout"])
    write(place)
    assert await reload(server) == (["server.keepalive", "aliases", "drain_timeout"], [])
    assert (server.options.server.keepalive, server.options.aliases) == (10.0, None)


async def test_engines_of_the_file_need_a_restart(place: Path) -> None:
    first = "[[serve]]\nengine = 'openai'\nargument = 'http://127.0.0.1:1'\n"
    server = serving("master", "--config", str(write(place, top=first)))
    assert await reload(server) == ([], [])
    write(place, "keepalive = 4", first.replace("127.0.0.1", "127.0.0.2"))
    assert await reload(server) == (["server.keepalive"], ["serve"])
    assert await reload(server) == ([], ["serve"])
    write(place, "keepalive = 4", first)
    assert await reload(server) == ([], [])
    write(place, "keepalive = 5", first.replace("argument", "argumnt"))
    with pytest.raises(OptionsError, match=r"\[\[serve\]\] 1: the engine 'openai' has no option 'argumnt'"):
        await reload(server)
    assert server.options.server.keepalive == 4.0
    write(place, top="serve = 5")
    with pytest.raises(OptionsError, match=r"serve: must be tables, each \[\[serve\]\]"):
        await reload(server)


async def test_the_application_and_the_masters_of_the_file_need_a_restart(place: Path) -> None:
    server = serving("master", "--config", str(write(place)))
    write(place, "keepalive = 4", "app = 'a:b'\n[worker]\nmasters = ['a.lan', 'b.lan']")
    assert await reload(server) == (["server.keepalive"], ["app", "worker.masters"])


async def test_environment_and_flags_come_before_the_file_as_at_the_start(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_CLUSTER_KEEPALIVE", "7")
    server = serving("master", "--config", str(write(place)), "--queue-timeout", "8")
    write(place, "keepalive = 3\nqueue_timeout = 3\nmax_concurrency = 3")
    assert await reload(server) == (["server.max_concurrency"], [])
    assert server.options.server.keepalive == 7.0


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ("drain_timout = 1", "c.toml: drain_timout: unknown key; did you mean drain_timeout?"),
        (
            "drain_timeout = -1",
            "c.toml: drain_timeout: must be 0 or more seconds, and not infinite; got -1.0",
        ),
        ("log_level = 'loud'", "c.toml: log_level: must be one of debug, info, warning, error, got 'loud'"),
        ("= 3", "c.toml: is not TOML: Invalid statement (at line 1, column 1)"),
        ("worker_timeout = 2", "worker_timeout (2 s) must be longer than heartbeat_interval (5 s), or every"),
        (
            "aliases = { a = 'b', b = 'a' }",
            "c.toml: aliases: the aliases stand for each other in a circle: a -> b -> a",
        ),
    ],
)
async def test_a_file_with_an_error_changes_nothing(
    top: str, expected: str, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serving("master", "--config", str(write(place)))
    write(place, "keepalive = 3", top)
    with pytest.raises(OptionsError) as caught:
        await reload(server)
    message = str(caught.value).replace(f"{place}/", "")
    assert message.startswith(expected)
    assert server.options.server.keepalive == 10.0
    assert "the new configuration is not used, and nothing has changed" in caplog.text
    # The same error as at a start.
    with pytest.raises(OptionsError) as at_start:
        serving("master", "--config", str(place / "c.toml"))
    assert str(at_start.value).replace(f"{place}/", "") == message


async def test_a_file_that_is_gone_changes_nothing(place: Path) -> None:
    server = serving("master", "--config", str(write(place, "keepalive = 3")))
    (place / "c.toml").unlink()
    with pytest.raises(OptionsError, match="cannot be read: No such file"):
        await reload(server)
    assert server.options.server.keepalive == 3.0


async def test_a_secret_in_a_file_of_its_own_is_read_again_and_not_shown(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster")
    (place / "key").write_text("sesame-1")
    server = serving("master", "--config", str(write(place, "api_key_file = 'key'")))
    assert server.options.server.api_key == "sesame-1"
    (place / "key").write_text("sesame-2\n")
    assert await reload(server) == (["server.api_key"], [])
    assert server.options.server.api_key == "sesame-2"
    assert [vars(record)["fields"]["applied"] for record in caplog.records] == [["server.api_key"]]


async def test_the_log_has_its_level_in_the_file_if_it_has_no_flag(place: Path) -> None:
    package = logging.getLogger("trio_cluster")
    arguments = ("master", "--config", str(write(place, top="log_level = 'error'")))
    server = serving(*arguments)
    write(place, top="log_level = 'debug'\nlog_format = 'json'")
    assert await reload(server) == (["log_level", "log_format"], [])
    assert package.level == logging.DEBUG
    server = serving(*arguments, "--log-level", "warning")
    write(place, top="log_level = 'info'")
    assert await reload(server) == (["log_format"], [])


def test_a_start_has_the_level_of_the_file(main: Main, ran: list[Any], place: Path) -> None:
    assert main("master", "--config", str(write(place, top="log_level = 'error'")))[0] == 0
    assert logging.getLogger("trio_cluster").level == logging.ERROR


async def test_what_a_program_has_changed_itself_stays(place: Path) -> None:
    server = serving("master", "--config", str(write(place)))
    server.set_max_concurrency(3)
    write(place, "keepalive = 4")
    assert await reload(server) == (["server.keepalive"], [])
    assert server.options.server.max_concurrency == 3


async def test_certificates_are_read_again_with_the_file_and_a_wrong_one_changes_nothing(
    place: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    own = authority().server_certificate(["127.0.0.1"], now())
    certificate = place / "cert.pem"
    certificate.write_bytes(own.read_bytes())
    server = serving("master", "0", "--config", str(write(place, f"tls_cert = '{certificate}'")))
    await nursery.start(server.run_as_master, 0)
    assert server.reloader is not None
    assert not (await server.reloader()).certificates
    certificate.write_text("nothing of the kind")
    write(place, f"tls_cert = '{certificate}'\nkeepalive = 3")
    with pytest.raises(ClusterError, match=r"cert\.pem"):
        await server.reloader()
    assert server.options.server.keepalive == 10.0
    certificate.write_bytes(own.read_bytes() + b"\n")
    assert (await server.reloader()).certificates
    assert server.options.server.keepalive == 3.0
    server.stop()


def test_without_a_file_there_is_nothing_to_read(place: Path) -> None:
    assert serving("master").reloader is None


async def test_an_unexpected_error_after_a_signal_does_not_end_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> Reloaded:
        raise ZeroDivisionError

    await reload_on_signal(fail)
    assert "the configuration could not be read again" in caplog.text


# The command


def test_the_command_prints_what_was_applied_and_what_needs_a_restart(
    main: Main,
    node: tuple[type[ScriptedNode], int],  # noqa: F811
) -> None:
    scripted, port = node
    answer = {
        "file": "/etc/c.toml",
        "applied": [
            {"option": "server.keepalive", "before": 10.0, "after": 3.0},
            {"option": "server.api_key"},
            {"option": "aliases", "before": None, "after": {"a": ["b", "c"]}},
        ],
        "needs_restart": [{"option": "server.host", "before": "127.0.0.1", "after": "::"}],
        "certificates": True,
    }
    scripted.body = json.dumps(answer).encode()
    code, out, err = main("reload", str(port), "--operator-key", "op")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "/etc/c.toml was read again",
        "applied: server.keepalive, 10.0 -> 3.0",
        "applied: server.api_key",
        'applied: aliases, none -> {"a": ["b", "c"]}',
        "needs a restart: server.host, 127.0.0.1 -> ::",
        "applied: new certificates",
    ]
    assert scripted.posted == [("/cluster/reload", "Bearer op", {})]
    scripted.body = json.dumps(answer | {"applied": [], "needs_restart": [], "certificates": False}).encode()
    assert main("reload", str(port))[1] == "/etc/c.toml was read again: nothing has changed\n"


def test_the_command_prints_why_nothing_was_applied(
    main: Main,
    node: tuple[type[ScriptedNode], int],  # noqa: F811
) -> None:
    scripted, port = node
    scripted.status = 409
    scripted.body = json.dumps(
        {"error": {"message": "Nothing has changed: c.toml: x: unknown key", "code": "invalid_configuration"}}
    ).encode()
    code, _, err = main("reload", str(port))
    assert code == 1
    assert one_line(err) == f"http://127.0.0.1:{port}: Nothing has changed: c.toml: x: unknown key"


# Processes


@processes
def test_sighup_reads_the_file_again_under_a_running_stream(
    place: Path,
    start: Callable[..., Process],  # noqa: F811
) -> None:
    file = write(place, "max_concurrency = 1\nqueue_timeout = 0")
    process = start("master", "0", "--config", str(file), "-a", "app:server")
    url = process.wait_for(r"serving .*url=(http://127\.0\.0\.1:\d+)")[1]
    with ask_slow(url) as stream:
        write(
            place, "max_concurrency = 2\nqueue_timeout = 0\nowner = 'me'\nkeepalive = 0.05\naccess_log = true"
        )
        process.popen.send_signal(signal.SIGHUP)
        line = process.wait_for("the configuration was read again")[0]
        assert "server.max_concurrency: 1 -> 2" in line
        assert 'needs_restart="server.owner: trio-cluster -> me"' in line
        # The stream has its slot, and the next request another one. The comments of the stream come faster.
        body = {"model": "echo", "messages": [{"role": "user", "content": "still here"}]}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            assert b"still here" in response.read()
        file.write_text("[server]\nkeepalive = 'often'")
        process.popen.send_signal(signal.SIGHUP)
        process.wait_for(
            "the new configuration is not used, and nothing has changed: .*keepalive: expected a number"
        )
        result = subprocess.run(
            [sys.executable, "-m", "trio_cluster", "reload", url], capture_output=True, text=True, check=False
        )
        assert result.returncode == 1
        assert "keepalive: expected a number of seconds, got 'often'" in one_line(result.stderr)
        assert stream.readline() in (b"\n", b": keepalive\n")
        assert process.popen.returncode is None
    process.popen.send_signal(signal.SIGTERM)
    code, log = process.end()
    assert code == 0
    assert "Traceback" not in log


#: Takes a terminal for that of its session, which it leads, and goes on as another program.
WITH_TERMINAL = "import os, sys; os.open(sys.argv[1], os.O_RDWR); os.execv(sys.executable, sys.argv[2:])"


@processes
def test_a_terminal_that_is_closed_stops_a_server_that_has_a_file(place: Path) -> None:
    command = [sys.executable, "-m", "trio_cluster", "master", "0", "--config", str(write(place))]
    terminal, other_end = os.openpty()
    popen = subprocess.Popen(
        [sys.executable, "-c", WITH_TERMINAL, os.ttyname(other_end), *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with popen:
        try:
            assert popen.stderr is not None
            process = Process(popen, popen.stderr.fileno())
            process.wait_for("serving")
            # The terminal is still there: it is an administrator who asks.
            popen.send_signal(signal.SIGHUP)
            process.wait_for("the configuration was read again")
            os.close(other_end)
            os.close(terminal)
            code, log = process.end()
        finally:
            popen.kill()
    assert code == 0
    assert "signal=SIGHUP" in log
