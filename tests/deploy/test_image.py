"""The image, built and run step by step where there is no container engine; for ``nox -s deploy``."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import patience
import pytest
from certificates import authority, now
from container_steps import (
    Container,
    Image,
    Network,
    build,
    open_network,
    parse_containerfile,
    run_container,
    why_not,
)

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; it is in the group deploy")

from kustomized import render  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif("DEPLOY_STEPS" not in os.environ, reason="takes a minute; nox -s deploy runs it"),
]

COMMIT = "0123456789abcdef0123456789abcdef01234567"

#: Asks for a stream and prints when it has begun and what has come at the end.
CLIENT = """
import json, sys, urllib.request
body = json.dumps({"model": "slow", "stream": True, "messages": [{"role": "user", "content": "go"}]}).encode()
request = urllib.request.Request(
    "http://127.0.0.1:8080/v1/chat/completions", body, {"content-type": "application/json"}
)
with urllib.request.urlopen(request) as response:
    first = response.readline()
    print("begun", flush=True)
    print((first + response.read()).decode())
"""

#: An application for /app: its handler goes on until a file appears.
APP = """
import os, trio
from trio_cluster import ClusterServer
server = ClusterServer()

@server.chat("slow")
async def slow(request):
    yield "one "
    while not os.path.exists("/app/go"):
        await trio.sleep(0.05)
    yield "two"
"""

#: Asks for a picture, and prints the status and how many requests the key has left.
PICTURE = """
import json, sys, urllib.request
body = json.dumps({"model": "worker-1", "prompt": "7", "seed": 1}).encode()
headers = {"content-type": "application/json", "authorization": "Bearer " + sys.argv[1]}
request = urllib.request.Request("http://127.0.0.1:8080/v1/images/generations", body, headers)
with urllib.request.urlopen(request) as response:
    print(response.status, response.headers["x-ratelimit-remaining-requests"])
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    steps = parse_containerfile((DEPLOY / "Containerfile").read_text("utf-8"))
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    # digits: a model that needs no weights from elsewhere.
    arguments = {"EXTRAS": "tls,postgresql,redis,digits", "COMMIT": COMMIT}
    return build(steps, ROOT, ignore, tmp_path_factory.mktemp("image"), arguments)


@pytest.fixture
def network() -> Iterator[Network]:
    with open_network() as opened:
        yield opened


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A named volume, which gets the owner of the folder of the image."""
    folder = tmp_path / "volume"
    folder.mkdir(mode=0o700)
    os.chown(folder, 10001, 10001)
    return folder


def test_the_default_command_serves_read_only_and_stops(image: Image, network: Network) -> None:
    assert image.health is not None
    with run_container(image, network, tmpfs=()) as container:
        container.wait_until_healthy(image.health[1])
        assert container.execute(["id", "-u"]) == (0, "10001\n")
        code, out = container.execute(["touch", "/var/lib/trio-cluster/x", "/opt/trio-cluster/x", "/tmp/x"])
        assert code == 1
        assert out.count("Read-only file system") == 2
        assert out.count("Permission denied") == 1
        code, out = container.execute(["trio-cluster", "status"])
        assert code == 0, out
        container.signal()
        code, log = container.stop()
    assert code == 0, log
    assert "stopping" in log
    # There is no volume for it here, and it says so.
    assert "state_dir" in log


def test_what_is_in_the_image_is_what_is_needed(image: Image, network: Network) -> None:
    left = {str(path.relative_to(image.files)) for path in image.files.rglob("*") if path.is_file()}
    outside = {path for path in left if not path.startswith(("opt/trio-cluster/", "etc/", "var/log/"))}
    assert outside == set()
    with run_container(image, network, command=["--version"]) as container:
        code, out = container.stop()
    assert code == 0
    assert COMMIT[:7] in out


def test_a_stream_is_finished_and_the_health_check_lets_it(
    image: Image, network: Network, volume: Path, tmp_path: Path
) -> None:
    assert image.health is not None
    app = tmp_path / "app"
    app.mkdir()
    (app / "models.py").write_text(APP)
    command = ["master", "8080", "--app", "models:server", "--drain-timeout", "20"]
    binds = {"/app": app, "/var/lib/trio-cluster": volume}
    with run_container(image, network, command=command, binds=binds) as container:
        container.wait_until_healthy(image.health[1])
        assert (volume / "trio_cluster" / "master-8080" / "accounts.db").exists()
        asked = ["nsenter", f"--target={container.pid}", "--net", "python3", "-c", CLIENT]
        with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "begun\n"
            container.signal()
            assert wait_for_status(container, "/health", 503) == {"status": "draining", "mode": "master"}
            assert container.execute(image.health[1]) == (0, "")
            # The probe of the Kubernetes manifests.
            wait_for_status(container, "/", 200)
            (app / "go").touch()
            answer = client.stdout.read()
        assert "two" in answer
        assert "[DONE]" in answer
        code, log = container.stop()
    assert code == 0, log


def wait_for_status(container: Container, path: str, status: int) -> Any:
    """Ask until the status is the one that is expected, and return the body."""
    code = (
        "import sys, urllib.request, urllib.error\n"
        "try: r = urllib.request.urlopen('http://127.0.0.1:8080' + sys.argv[1])\n"
        "except urllib.error.HTTPError as e: r = e\n"
        "print(r.status); print(r.read().decode())"
    )
    watch = patience.Stopwatch()
    while True:
        ran, out = container.execute(["python3", "-c", code, path])
        if ran == 0 and out.startswith(f"{status}\n"):
            return json.loads(out.partition("\n")[2])
        assert watch.counted < 20, out
        time.sleep(0.1)


def wait_for_output(
    container: Container, command: list[str], expected: Callable[[str], bool], within: float = 30
) -> str:
    """Run a command, which always succeeds, until it prints what is expected, and return that."""
    watch = patience.Stopwatch()
    while True:
        code, out = container.execute(command)
        assert code == 0, out
        if expected(out):
            return out
        assert watch.counted < within, out
        time.sleep(0.2)


def test_the_health_check_fails_where_nothing_listens(image: Image, network: Network) -> None:
    assert image.health is not None
    command = ["master", "9999"]
    with run_container(image, network, command=command) as container:
        container.wait_until_healthy([*image.health[1], "http://127.0.0.1:9999"])
        code, out = container.execute(image.health[1])
        assert (code, out) == (1, "http://127.0.0.1:8080: [Errno 111] Connection refused\n")


def test_the_services_of_the_compose_file_work_together(
    image: Image, network: Network, volume: Path, tmp_path: Path
) -> None:
    """All but the images of others: this machine's PostgreSQL and Redis play them, with the secrets of the script."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    shutil.copytree(DEPLOY / "compose", tmp_path / "compose")
    subprocess.run([tmp_path / "compose" / "make-secrets"], check=True)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost master postgres valkey\n")
    with contextlib.ExitStack() as stack:
        secrets = tmp_path / "compose" / "secrets"
        start_postgres(stack, network, (secrets / "postgres_password").read_text())
        start_redis(stack, network, (secrets / "valkey_conf").read_text())
        containers = []
        for name in ("master", "worker-1", "worker-2"):
            service = compose["services"][name]
            binds = {f"/run/secrets/{secret}": secrets / secret for secret in service["secrets"]}
            (config,) = service["configs"]
            file = tmp_path / compose["configs"][config["source"]]["file"]
            if name != "master":
                # The weights of its models are elsewhere, and so are the libraries.
                text = file.read_text().partition("[[serve]]")[0]
                file.write_text(text + f'[[serve]]\nengine = "digits"\nname = "{name}"\n')
            binds |= {config["target"]: file, "/etc/hosts": hosts}
            # Each container has its own loopback interface; here there is one for all.
            port = ":8082" if name == "worker-2" else ":8081"
            command = [word.replace(":8081", port) for word in service["command"]]
            if name == "master":
                binds["/var/lib/trio-cluster"] = volume
            container = stack.enter_context(
                run_container(image, network, command=command, binds=binds, tmpfs=service["tmpfs"])
            )
            container.wait_until_healthy([word.replace(":8081", port) for word in health_of(service, image)])
            containers.append(container)
        master, *workers = containers
        key = (secrets / "api_key").read_text()
        ask = ["trio-cluster", "status", "--json", "--api-key", key]
        wait_for_output(master, ask, lambda out: len(json.loads(out)["workers"]) == 2)
        assert master.execute(["trio-cluster", "status"])[0] == 1
        created = ["trio-cluster", "keys", "create", "app", "--requests-per-minute", "60", "--api-key", key]
        code, out = master.execute(created)
        assert code == 0, out
        client_key = re.search(r"^tc-\S+$", out, re.MULTILINE)
        assert client_key is not None
        code, out = master.execute(["python3", "-c", PICTURE, client_key[0]])
        assert (code, out) == (0, "200 59\n"), out
        usage = ["trio-cluster", "usage", "--json", "--api-key", key]
        wait_for_output(master, usage, lambda out: '"app"' in out)
        for container in (*workers, master):
            container.signal()
        for container in (*workers, master):
            code, log = container.stop()
            assert code == 0, log
            assert "Traceback" not in log


def test_the_pods_of_the_manifests_work_together(image: Image, network: Network, tmp_path: Path) -> None:
    """A master and a worker, with the commands, files and volumes of their pods."""
    manifests = {
        (each["kind"], each["metadata"]["name"]): each for each in render(DEPLOY / "kubernetes" / "example")
    }
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    values = {
        "api_key": "sk-test",
        "cluster_token": "token",
        "worker_key": "sk-worker",
        "database": "postgresql://cluster:secret@127.0.0.1/cluster",
        "limits": "redis://:secret@127.0.0.1:6379/0",
    }
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost trio-cluster-masters\n")
    certificate = authority().server_certificate(["trio-cluster-masters", "127.0.0.1"], now())
    with contextlib.ExitStack() as stack:
        start_postgres(stack, network, "secret")
        start_redis(stack, network, "requirepass secret\ndir /data\n")
        containers = []
        for name in ("trio-cluster-master", "trio-cluster-gpu-worker"):
            pod = manifests["Deployment", name]["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            volumes = {each["name"]: each for each in pod["volumes"]}
            binds = {"/etc/hosts": hosts}
            for mount in container["volumeMounts"]:
                volume = volumes[mount["name"]]
                folder = tmp_path / name / mount["name"]
                folder.mkdir(parents=True)
                if "configMap" in volume:
                    text = manifests["ConfigMap", volume["configMap"]["name"]]["data"]["config.toml"]
                    if name != "trio-cluster-master":
                        # There is neither vLLM here nor a GPU.
                        text = text.partition("[[serve]]")[0] + '[[serve]]\nengine = "digits"\n'
                    (folder / "config.toml").write_text(text)
                elif mount["name"] == "tls":
                    (folder / "ca.crt").write_text(authority().trusted)
                    if name == "trio-cluster-master":
                        # One file has both.
                        (folder / "tls.crt").write_bytes(Path(certificate).read_bytes())
                        (folder / "tls.key").write_bytes(Path(certificate).read_bytes())
                elif "secret" in volume:
                    for item in volume["secret"]["items"]:
                        (folder / item["path"]).write_text(values[item["key"]])
                # An empty directory belongs to root, and to the group of the pod, which may write; files of a secret
                # are readable for that group.
                for path in (folder, *folder.iterdir()):
                    os.chown(path, 0, pod["securityContext"]["fsGroup"])
                    path.chmod(0o2777 if path.is_dir() else 0o440)
                if mount["mountPath"] != "/tmp":
                    binds[mount["mountPath"]] = folder
            started = stack.enter_context(
                run_container(
                    image,
                    network,
                    command=[word.replace("$(POD_NAME)", f"{name}-abcde") for word in container["args"]],
                    environment={each["name"]: each["value"] for each in container["env"] if "value" in each},
                    binds=binds,
                )
            )
            containers.append(started)
            url = f"https://127.0.0.1:{container['ports'][0]['containerPort']}"
            started.wait_until_healthy(
                [
                    "python3",
                    "/opt/trio-cluster/health.py",
                    url if name == "trio-cluster-master" else url.replace("s:", ":"),
                ]
            )
        master, worker = containers
        ask = [
            "trio-cluster",
            "status",
            "https://127.0.0.1:8080",
            "--json",
            "--ca-file",
            "/etc/trio-cluster/tls/ca.crt",
        ]
        ask += ["--api-key-file", "/etc/trio-cluster/secrets/api_key"]
        out = wait_for_output(master, ask, lambda out: bool(json.loads(out)["workers"]), within=60)
        workers = json.loads(out)["workers"]
        assert [(each["id"], each["admitted"]) for each in workers] == [
            ("trio-cluster-gpu-worker-abcde", "token")
        ]
        # The program of the preStop hook.
        assert master.execute(["sleep", "0"]) == (0, "")
        for container in (worker, master):
            container.signal()
            code, log = container.stop()
            assert code == 0, log
            assert "Traceback" not in log
            assert "state_dir" not in log


def health_of(service: dict[str, Any], image: Image) -> list[str]:
    if "healthcheck" in service:
        kind, *command = service["healthcheck"]["test"]
        assert kind == "CMD"
        return command
    assert image.health is not None
    return image.health[1]


def start_postgres(stack: contextlib.ExitStack, network: Network, password: str) -> None:
    """Run a PostgreSQL server with the user, the database and the password of the compose file."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs or shutil.which("runuser") is None:
        pytest.skip("PostgreSQL is not installed")
    # Short, since the path of a socket has at most a hundred characters.
    place = Path(stack.enter_context(short_folder("tcdp-")))
    user = pwd.getpwnam("postgres")
    os.chown(place, user.pw_uid, user.pw_gid)
    (place / "password").write_text(password)
    os.chown(place / "password", user.pw_uid, user.pw_gid)
    folder = programs[-1].parent
    as_user = ["runuser", "-u", "postgres", "--"]
    data = ["-D", str(place / "data")]
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/", "timeout": 60}
    make = [*as_user, f"{folder}/initdb", *data, "-U", "cluster", "--pwfile", f"{place}/password"]
    subprocess.run([*make, "-A", "scram-sha-256", "--no-sync"], **quiet)  # type: ignore[call-overload]
    options = f"-k {place} -h 127.0.0.1 -c fsync=off"
    control = [*as_user, f"{folder}/pg_ctl", *data, "-w"]
    log = ["-l", f"{place}/log"]
    subprocess.run([*network.enter, *control, "-o", options, *log, "start"], **quiet)  # type: ignore[call-overload]
    stack.callback(subprocess.run, [*control, "-m", "immediate", "stop"], **quiet)
    client = ["psql", "-h", str(place), "-U", "cluster", "-d", "postgres", "-c", "CREATE DATABASE cluster"]
    subprocess.run(client, env={**os.environ, "PGPASSWORD": password}, **quiet)  # type: ignore[call-overload]


def start_redis(stack: contextlib.ExitStack, network: Network, configuration: str) -> None:
    """Run a Redis server with the configuration of the compose file."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        pytest.skip("neither Valkey nor Redis is installed")
    place = stack.enter_context(short_folder("tcdr-"))
    configuration = configuration.replace("dir /data", f"dir {place}")
    server = stack.enter_context(
        subprocess.Popen(
            [*network.enter, program, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
    )
    stack.callback(server.send_signal, signal.SIGTERM)
    assert server.stdin is not None
    server.stdin.write(configuration)
    server.stdin.close()


@contextlib.contextmanager
def short_folder(prefix: str) -> Iterator[str]:
    folder = f"/tmp/{prefix}{os.getpid()}"
    Path(folder).mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
