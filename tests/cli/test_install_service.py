"""The files that make a node a service: what is in them, that systemd takes them, and what is replaced."""

from __future__ import annotations

import errno
import os
import plistlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import Main, one_line

from trio_cluster.cli.arguments import parse_arguments
from trio_cluster.cli.install_service import check_reachable
from trio_cluster.cli.service_files import is_as_written, with_checksum
from trio_cluster.errors import OptionsError

ROOT = Path(__file__).parents[2]
PROGRAM = ("--program", "/opt/trio-cluster/bin/trio-cluster")
MASTER = ("master", "8080", "--host", "127.0.0.1", "--api-key", "sk-secret", "--cluster-token", "tok")

#: The commands that have written `deploy/`, by the folder.
DEPLOYED = {
    "systemd": [
        "--manager systemd --program /opt/trio-cluster/bin/trio-cluster master 8080 --tls auto"
        " --api-key-file /etc/trio-cluster/api_key --cluster-token-file /etc/trio-cluster/cluster_token",
        "--manager systemd --program /opt/trio-cluster/bin/trio-cluster worker https://master.example.net:8080"
        " --serve minilm --ca-file /etc/trio-cluster/ca.pem --cluster-token-file /etc/trio-cluster/cluster_token",
    ],
    "launchd": [
        "--manager launchd --run-as _trio_cluster --program /opt/trio-cluster/bin/trio-cluster master 8080"
        " --tls auto --api-key-file /usr/local/etc/trio-cluster/api_key"
        " --cluster-token-file /usr/local/etc/trio-cluster/cluster_token",
        "--manager launchd --run-as _trio_cluster --program /opt/trio-cluster/bin/trio-cluster worker"
        " https://master.example.net:8080 --serve minilm --ca-file /usr/local/etc/trio-cluster/ca.pem"
        " --cluster-token-file /usr/local/etc/trio-cluster/cluster_token",
    ],
}


def install(main: Main, *argv: str, prefix: Path | None = None) -> tuple[int, str, str]:
    where = ("--prefix", str(prefix)) if prefix else ()
    return main("install-service", "--manager", "systemd", *where, *argv)


def written(folder: Path) -> dict[str, Path]:
    """Return the files below a folder, by their names."""
    return {path.name: path for path in folder.rglob("*") if path.is_file()}


def settings(unit: str, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit, re.M)


@pytest.fixture
def outside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory that a service could have: the one of tests is below /tmp."""
    folder = "/usr/share"
    monkeypatch.chdir(folder)
    return place


# The master


def test_a_master_gets_its_ports_from_a_socket_unit_and_its_secrets_as_credentials(
    main: Main, place: Path
) -> None:
    code, out, err = install(main, *PROGRAM, *MASTER, prefix=place / "files")
    assert code == 0
    files = written(place / "files")
    assert files.keys() == {
        "trio-cluster-master.service",
        "trio-cluster-master.socket",
        "api_key",
        "cluster_token",
    }
    assert files["api_key"] == place / "files/etc/trio-cluster/trio-cluster-master/api_key"
    assert files["api_key"].read_text() == "sk-secret\n"
    for name in ("api_key", "cluster_token"):
        assert stat.S_IMODE(files[name].stat().st_mode) == 0o600
        assert stat.S_IMODE(files[name].parent.stat().st_mode) == 0o700
    unit = files["trio-cluster-master.service"].read_text()
    shown = out + err + unit + files["trio-cluster-master.socket"].read_text()
    assert "sk-secret" not in shown
    assert not re.search(r"\btok\b", shown)
    assert settings(unit, "LoadCredential") == [
        f"{name}:/etc/trio-cluster/trio-cluster-master/{name}" for name in ("api_key", "cluster_token")
    ]
    assert settings(files["trio-cluster-master.socket"].read_text(), "ListenStream") == [
        "127.0.0.1:8080",
        "127.0.0.1:9080",
    ]
    # What systemd starts is understood by the command itself, with the same options.
    (start,) = settings(unit, "ExecStart")
    words = shlex.split(start.replace("${CREDENTIALS_DIRECTORY}", str(files["api_key"].parent)))
    parsed = parse_arguments(words[1:])
    assert (parsed.command, parsed.port, parsed.host) == ("master", 8080, "127.0.0.1")
    assert Path(parsed.api_key_file).read_text() == "sk-secret\n"
    (reload,) = settings(unit, "ExecReload")
    assert parse_arguments(shlex.split(reload)[1:]).command == "replace"
    assert parse_arguments(shlex.split(reload)[1:]).state_dir == parsed.state_dir
    assert (settings(unit, "Type"), settings(unit, "WatchdogSec")) == (["notify"], ["30"])
    # Time for requests, and a little more.
    assert settings(unit, "TimeoutStopSec") == ["45"]
    assert "systemctl enable --now trio-cluster-master.socket trio-cluster-master.service" in err


def test_a_secret_in_a_file_stays_there_and_one_of_the_environment_is_written(
    main: Main, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "key").write_text("sk-file")
    monkeypatch.setenv("TRIO_CLUSTER_OPERATOR_KEY", "sk-operator")
    code, _, _ = install(main, *PROGRAM, "master", "--api-key-file", "key", prefix=place / "files")
    assert code == 0
    files = written(place / "files")
    assert sorted(settings(files["trio-cluster-master.service"].read_text(), "LoadCredential")) == [
        f"api_key:{place / 'key'}",
        "operator_key:/etc/trio-cluster/trio-cluster-master/operator_key",
    ]
    assert files["operator_key"].read_text() == "sk-operator\n"
    assert "api_key" not in files


def test_a_master_of_several_processes_reads_its_file_at_a_reload(main: Main, place: Path) -> None:
    (place / "c.toml").write_text("processes = 2\n[server]\nport = 8000\n")
    code, out, _ = install(main, "--dry-run", *PROGRAM, "master", "--config", "c.toml")
    assert code == 0
    assert settings(out, "ExecReload") == ["/bin/kill -HUP $MAINPID"]
    assert f" --config {place / 'c.toml'} " in out
    assert settings(out, "ListenStream") == ["0.0.0.0:8000", "0.0.0.0:9000"]


def test_addresses_of_all_kinds_are_listened_on(main: Main) -> None:
    _, out, _ = install(main, "--dry-run", *PROGRAM, "master", "--host", "::", "--internal-host", "10.0.0.1")
    assert settings(out, "ListenStream") == ["[::]:8080", "10.0.0.1:9080"]
    assert settings(out, "BindIPv6Only") == ["ipv6-only"]


# The worker


def test_a_worker_has_its_models_devices_and_a_cache(main: Main, outside: Path) -> None:
    code, out, err = install(
        main, "--dry-run", *PROGRAM, "worker", "m.lan", "--serve", "llama:smollm2", "--timeout", "900"
    )
    assert code == 0
    assert not settings(out, "ListenStream")
    assert not settings(out, "ExecReload")
    # It is up without its master, busy for as long as its models may be silent, and its programs outlive SIGTERM.
    assert settings(out, "WatchdogSec") == ["960"]
    assert settings(out, "KillMode") == ["mixed"]
    assert settings(out, "OOMPolicy") == ["continue"]
    assert "DeviceAllow=char-nvidia* rw" in out
    assert not settings(out, "MemoryDenyWriteExecute")
    assert settings(out, "CacheDirectory") == ["trio-cluster-worker"]
    assert not settings(out, "WorkingDirectory")
    assert "systemctl enable --now trio-cluster-worker.service" in err


def test_the_guardian_of_a_worker_outlives_it_for_a_moment(main: Main, outside: Path) -> None:
    for flags, count in (((), 1), (("--no-guardian",), 0)):
        _, out, _ = install(main, "--dry-run", *PROGRAM, "worker", "m.lan", "--serve", "minilm", *flags)
        stops = settings(out, "ExecStop")
        assert len(stops) == count
        for stop in stops:
            words = shlex.split(stop.replace("$$", "$"))
            # At once while the main process runs, and after a moment without it.
            for pid, least in (("1", 0.0), ("", 1.0)):
                began = time.monotonic()
                subprocess.run(
                    words, check=True, env={"PATH": os.environ["PATH"], "MAINPID": pid}, timeout=10
                )
                assert time.monotonic() - began >= least
    _, out, _ = install(main, "--dry-run", *PROGRAM, *MASTER)
    assert settings(out, "ExecStop") == []


def test_an_application_is_found_in_the_directory_of_now(main: Main, outside: Path) -> None:
    _, out, _ = install(main, "--dry-run", *PROGRAM, "worker", "m.lan", "--app", "models:server")
    assert settings(out, "WorkingDirectory") == ["/usr/share"]


def test_an_invitation_is_in_a_file_for_its_owner(main: Main, place: Path) -> None:
    install(main, *PROGRAM, "worker", "--join", "tc1.token", "--serve", "minilm", prefix=place / "files")
    files = written(place / "files")
    unit = files["trio-cluster-worker.service"].read_text()
    assert "tc1.token" not in unit
    assert files["join"].read_text() == "JOIN=tc1.token\n"
    assert settings(unit, "EnvironmentFile") == ["/etc/trio-cluster/trio-cluster-worker/join"]
    assert settings(unit, "ExecStart")[0].endswith(" --join ${JOIN}")


def test_flags_come_through_as_they_were_given(main: Main, outside: Path) -> None:
    given = [
        *(
            "worker",
            "a.lan:8080,b.lan:8080",
            "--tls",
            "--serve",
            "minilm",
            "--serve",
            "llama:smollm2,ctx=2048",
        ),
        *("--name", 'gpu "1" 100% $HOME', "--no-guardian", "--access-log", "--listen", "[::1]:8080"),
        *("--max-concurrency", "4", "--drain-timeout", "0.5", "--log-format", "json"),
    ]
    _, out, _ = install(main, "--dry-run", *PROGRAM, *given)
    (start,) = settings(out, "ExecStart")
    words = shlex.split(start)
    parsed = parse_arguments([word.replace("%%", "%").replace("$$", "$") for word in words[1:]])
    expected = parse_arguments(given)
    assert parsed.state_dir == "%S/trio-cluster-worker"
    parsed.state_dir = None
    assert vars(parsed) == vars(expected)


# What is not a service


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (
            ("worker", "m.lan"),
            "a worker needs something to serve: give --app MODULE:ATTRIBUTE or --serve SPEC",
        ),
        (("master", "0"), "PORT: a service needs a port of its own, and not a free one each time"),
        (("master", "--nonsense"), "unrecognized arguments: --nonsense; see trio-cluster --help"),
        (("master", "--batch-wait", "-1"), "--batch-wait: must be 0 to 0.1 seconds; got -1.0"),
        (("--unit", "a/b", "master"), "--unit: expected letters, digits and any of . _ : -, got 'a/b'"),
        (("--user", "--run-as", "x", "master"), "--run-as: a service of a user runs as this user"),
        (
            ("master", "--state-dir", "/srv/s"),
            "--state-dir: the service has one of its own, /var/lib/trio-cluster-",
        ),
        (("--manager", "launchd", "master"), "--run-as: say as which user the service runs"),
        (("master", "--config", "nothing.toml"), "nothing.toml: cannot be read: No such file or directory"),
    ],
)
def test_what_makes_no_service_is_one_line_and_writes_nothing(
    main: Main, place: Path, argv: tuple[str, ...], error: str
) -> None:
    code, out, err = install(main, *PROGRAM, *argv, prefix=place / "files")
    assert (code, out) == (2, "")
    assert one_line(err).startswith(error)
    assert not (place / "files").exists()


def test_a_variable_that_the_service_would_not_have_is_an_error(
    main: Main, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_CLUSTER_LOG_LEVEL", "warning")
    monkeypatch.setenv("TRIO_CLUSTER_PORT", "9000")
    code, out, err = install(main, *PROGRAM, "master", prefix=place / "files")
    assert (code, out) == (2, "")
    assert one_line(err) == (
        "TRIO_CLUSTER_PORT: is set here, and not for the service; give a flag in its place"
    )
    assert not (place / "files").exists()


def test_a_program_that_the_service_cannot_reach_is_an_error(main: Main, place: Path) -> None:
    """It is a warning where the files are only shown, or are for a package."""
    private = place / "private"
    private.mkdir(mode=0o700)
    # Not below /tmp, of which the service has one of its own; the message comes first there.
    code, _, err = install(main, "--dry-run", "--program", str(private / "trio-cluster"), "master")
    assert code == 0
    assert "warning" in err
    assert "the service has a /tmp of its own" in err or "which cannot enter" in err
    with pytest.raises(OptionsError, match=r"/tmp of its own"):
        check_reachable(["/tmp/trio-cluster"], None)
    code, _, err = install(main, "--dry-run", *PROGRAM, "worker", "m.lan", "--app", "m:server")
    assert code == 0
    assert "start in another directory" in err


def test_flags_may_stand_behind_what_is_to_run(main: Main, place: Path) -> None:
    before = install(main, *PROGRAM, "--dry-run", "--unit", "llm", "master", "8080", "--tls", "auto")
    assert install(main, *PROGRAM, "master", "--dry-run", "8080", "--unit", "llm", "--tls", "auto") == before
    assert before[0] == 0


# What is there already


def test_a_file_is_replaced_if_it_is_as_it_was_written(main: Main, place: Path) -> None:
    root = place / "files"
    assert install(main, *PROGRAM, *MASTER, prefix=root)[0] == 0
    assert install(main, *PROGRAM, *MASTER, "--access-log", prefix=root)[0] == 0
    path = written(root)["trio-cluster-master.service"]
    assert " --access-log " in path.read_text()
    assert is_as_written(path.read_text())

    path.write_text(path.read_text().replace("WatchdogSec=30", "WatchdogSec=5"))
    before = {name: each.read_bytes() for name, each in written(root).items()}
    code, out, err = install(main, *PROGRAM, *MASTER, "--tls", "auto", prefix=root)
    assert (code, out) == (1, "")
    assert one_line(err) == (
        f"{path}: it was changed, or is not from this command; nothing was written (--force replaces it)"
    )
    assert {name: each.read_bytes() for name, each in written(root).items()} == before

    assert install(main, "--force", *PROGRAM, *MASTER, prefix=root)[0] == 0
    assert "WatchdogSec=30" in path.read_text()


def test_another_secret_is_not_replaced_without_force(main: Main, place: Path) -> None:
    root = place / "files"
    assert install(main, *PROGRAM, *MASTER, prefix=root)[0] == 0
    other = [word.replace("sk-secret", "sk-other") for word in MASTER]
    code, _, err = install(main, *PROGRAM, *other, prefix=root)
    assert code == 1
    assert one_line(err).endswith("api_key: it has another secret; nothing was written (--force replaces it)")
    assert install(main, "--force", *PROGRAM, *other, prefix=root)[0] == 0
    assert written(root)["api_key"].read_text() == "sk-other\n"


def test_a_secret_that_cannot_be_put_in_its_place_is_nowhere_else(main: Main, place: Path) -> None:
    (place / "files/etc/trio-cluster/trio-cluster-master/api_key").mkdir(parents=True)
    code, _, err = install(main, "--force", *PROGRAM, *MASTER, prefix=place / "files")
    assert code == 1
    assert "api_key" in one_line(err)
    assert written(place / "files") == {}


def test_a_dry_run_writes_nothing_and_shows_no_secret(main: Main, place: Path) -> None:
    code, out, err = install(main, "--dry-run", *PROGRAM, *MASTER, prefix=place / "files")
    assert code == 0
    assert not (place / "files").exists()
    assert f"# {place}/files/etc/systemd/system/trio-cluster-master.service\n" in out
    assert "api_key (for its owner only)\n(a secret)" in out
    assert "sk-secret" not in out + err


def test_a_checksum_finds_every_change() -> None:
    text = with_checksum("[Unit]\nDescription=x\n", "trio-cluster install-service master")
    assert is_as_written(text)
    for changed in (text + "\n", text.replace("=x", "=y"), text.replace("[Unit]\n", ""), "[Unit]\n", ""):
        assert not is_as_written(changed)


# For a user


def test_a_user_has_units_without_root(main: Main, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "config"))
    code, _, err = install(main, "--user", *MASTER)
    assert code == 0
    files = written(place / "config")
    assert files["trio-cluster-master.service"].parent == place / "config/systemd/user"
    unit = files["trio-cluster-master.service"].read_text()
    # Its manager can give neither a user nor a view of the file system.
    assert not settings(unit, "DynamicUser")
    assert not settings(unit, "ProtectSystem")
    assert not settings(unit, "LoadCredential")
    assert f"--api-key-file {files['api_key']}" in unit
    assert settings(unit, "WantedBy") == ["default.target"]
    assert "systemctl --user enable --now" in err
    assert "loginctl enable-linger" in err


# What systemd says


def analyze(tmp_path: Path, main: Main, *commands: tuple[str, ...]) -> list[Path]:
    """Write the units of some commands, with a program that is there; skip the test without systemd."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for command in commands:
        assert install(main, "--program", "/bin/true", *command, prefix=tmp_path / "files")[0] == 0
    return [path for path in written(tmp_path / "files").values() if path.suffix in (".service", ".socket")]


COMMANDS = [
    MASTER,
    ("--unit", "several", "master", "8000", "--processes", "4", "--log-format", "json"),
    (
        "--unit",
        "models",
        "--run-as",
        "daemon",
        "master",
        "8002",
        "--serve",
        "minilm",
        "--state-dir",
        "/srv/state",
    ),
    (
        "worker",
        "m.lan",
        "--serve",
        "llama:smollm2",
        "--name",
        'a "strange" name; 50% $OFF',
        "--join",
        "token",
    ),
    ("--user", "--unit", "mine", *MASTER),
    ("--user", "--unit", "my-worker", "worker", "--serve", "minilm"),
]


def test_systemd_takes_the_units(
    main: Main, tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc")
    units = analyze(tmp_path, main, *COMMANDS)
    assert len(units) == 10
    result = subprocess.run(
        ["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, timeout=60
    )
    complaints = [line for line in result.stderr.splitlines() if any(unit.name in line for unit in units)]
    assert (result.returncode, complaints) == (0, [])


@pytest.mark.parametrize(
    ("command", "most"), [(COMMANDS[0], 1.5), (COMMANDS[3], 1.7)], ids=["master", "worker"]
)
def test_the_sandbox_is_as_tight_as_it_was(
    main: Main, tmp_path: Path, outside: Path, command: tuple[str, ...], most: float
) -> None:
    units = analyze(tmp_path, main, command)
    service = next(path for path in units if path.suffix == ".service")
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(service)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    found = re.search(r"exposure level for \S+: ([0-9.]+)", result.stdout)
    if found is None:
        pytest.skip(f"systemd-analyze security does not look at files here: {result.stderr}")
    assert float(found[1]) <= most, result.stdout


# launchd


@pytest.mark.parametrize("argv", DEPLOYED["launchd"], ids=["master", "worker"])
def test_the_property_list_is_one(main: Main, place: Path, argv: str) -> None:
    code, _, err = main("install-service", "--prefix", str(place / "files"), *argv.split())
    assert code == 0
    (path,) = written(place / "files").values()
    content = plistlib.loads(path.read_bytes())
    assert path == place / f"files/Library/LaunchDaemons/{content['Label']}.plist"
    assert is_as_written(path.read_text())
    program, *arguments = content["ProgramArguments"]
    assert program == "/opt/trio-cluster/bin/trio-cluster"
    parsed = parse_arguments(arguments)
    assert parsed.state_dir == f"/usr/local/var/lib/trio-cluster/{content['Label']}"
    assert content["KeepAlive"] == {"SuccessfulExit": False}
    assert content["UserName"] == "_trio_cluster"
    assert content["ExitTimeOut"] == 45
    assert f"sudo launchctl bootstrap system /Library/LaunchDaemons/{path.name}\n" in err
    if plutil := shutil.which("plutil"):
        subprocess.run([plutil, "-lint", str(path)], check=True)


def test_an_agent_of_a_user_has_its_secrets_in_files(
    main: Main, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place))
    argv = ("--manager", "launchd", "--user", "worker", "--join", "tc1.token", "--serve", "minilm")
    assert main("install-service", *argv, "--cluster-token", "secret")[0] == 0
    files = written(place)
    path = files["trio-cluster-worker.plist"]
    assert path.parent == place / "Library/LaunchAgents"
    content = plistlib.loads(path.read_bytes())
    assert ["--cluster-token-file", str(files["cluster_token"])] == content["ProgramArguments"][-2:]
    # An invitation works once, and is in the list itself, which is for its owner only.
    assert "tc1.token" in content["ProgramArguments"]
    assert "tc1.token" not in path.read_text().split("<plist")[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# deploy/


@pytest.mark.parametrize("manager", DEPLOYED)
def test_the_files_in_deploy_are_what_the_command_writes(
    main: Main, place: Path, manager: str, outside: Path
) -> None:
    for argv in DEPLOYED[manager]:
        code, _, err = main("install-service", "--prefix", str(place / "files"), *argv.split())
        assert code == 0
        # A package may be made where the secrets are not.
        assert "is to be there when the service is started" in err
    found = {path.name: path.read_text() for path in (ROOT / "deploy" / manager).iterdir()}
    assert found == {name: path.read_text() for name, path in written(place / "files").items()}


def test_the_program_is_the_one_that_runs(main: Main, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "config"))
    _, out, _ = install(main, "--dry-run", "--user", "master")
    (start,) = settings(out, "ExecStart")
    script = Path(sys.executable).with_name("trio-cluster")
    assert start.startswith(
        f"{script} master " if script.exists() else f"{sys.executable} -m trio_cluster master "
    )


def test_a_full_disk_is_reported_with_the_name_of_the_file(
    main: Main, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    code, out, err = install(main, *PROGRAM, *MASTER, prefix=place / "files")
    assert (code, out) == (1, "")
    path = place / "files/etc/trio-cluster/trio-cluster-master/api_key"
    assert one_line(err) == f"{path}: No space left on device"
    assert written(place / "files") == {}
