"""What can be checked of the image and of the compose file without running them."""

from __future__ import annotations

import argparse
import json
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from container_steps import Step, ignored, parse_containerfile

from trio_cluster.cli.arguments import parse_arguments
from trio_cluster.cli.schema import describe_configuration
from trio_cluster.cli.settings import load_options
from trio_cluster.engines import read_serve
from trio_cluster.errors import ClusterError, OptionsError
from trio_cluster.options import ClusterServerOptions

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
STEPS = parse_containerfile((DEPLOY / "Containerfile").read_text("utf-8"))
IGNORE = (ROOT / ".dockerignore").read_text("utf-8").splitlines()


def the(keyword: str) -> Step:
    (step,) = [step for step in STEPS if step.keyword == keyword]
    return step


# --- The Containerfile --------------------------------------------------------------------------------------------


def test_the_command_of_the_image_is_one() -> None:
    program, *rest = the("ENTRYPOINT").words
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    arguments = parse_arguments([*rest, *the("CMD").words])
    port = arguments.port
    assert [int(word) for word in the("EXPOSE").words] == [port, port + 1000]
    assert f"http://127.0.0.1:{port}" in (DEPLOY / "health.py").read_text("utf-8")


def test_all_that_the_wheel_is_made_of_is_copied_and_not_ignored() -> None:
    copied = {
        str(word).removeprefix("./")
        for step in STEPS
        if step.keyword == "COPY" and "from" not in step.options
        for word in step.words[:-1]
    }
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = pyproject["project"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"]}
    hatch = pyproject["tool"]["hatch"]["build"]
    needed |= set(hatch["targets"]["wheel"]["only-include"])
    needed |= {"hatch_build.py"} if "custom" in hatch["hooks"] else set()
    assert needed <= copied
    for name in copied:
        assert (ROOT / name).exists()
        assert not ignored(name, IGNORE)
    modules = [*(ROOT / "trio_cluster").rglob("*.py"), *(ROOT / "trio_cluster").rglob("*.npz")]
    assert [path for path in modules if ignored(str(path.relative_to(ROOT)), IGNORE)] == []


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", "deploy/compose/secrets/api_key", "tests/conftest.py", ".env", "deploy/compose.yaml",
        "trio_cluster/core/__pycache__/call.cpython-311.pyc",
    ],
)  # fmt: skip
def test_what_is_not_needed_stays_out_of_the_context(path: str) -> None:
    assert ignored(path, IGNORE)


def test_the_last_user_is_a_number_and_not_root() -> None:
    # Kubernetes can tell whether a user is root only by its number.
    uid, gid = map(int, the("USER").words[0].split(":"))
    assert (uid, gid) == (10001, 10001)
    later = STEPS[STEPS.index(the("USER")) :]
    assert {step.keyword for step in later} & {"RUN", "COPY"} == set()


def test_the_base_is_pinned_by_a_tag_and_both_stages_have_the_same() -> None:
    assert [step.words[0] for step in STEPS if step.keyword == "FROM"] == ["${BASE}", "${BASE}"]
    name = STEPS[0].words[0].removeprefix("BASE=")
    assert re.fullmatch(r"[a-z.]+/[a-z/]+:3\.1\d-slim-[a-z]+", name)


def test_an_instruction_in_the_form_of_the_shell_is_refused() -> None:
    with pytest.raises(ValueError, match="gives signals to a shell"):
        parse_containerfile("FROM x\nCMD trio-cluster master")
    with pytest.raises(ValueError, match="line 2: ADDD"):
        parse_containerfile("FROM x\nADDD y")


# --- The health check ---------------------------------------------------------------------------------------------


async def test_the_health_check_of_a_node(node: Any) -> None:
    url = f"http://127.0.0.1:{node.port}"
    assert await health(url) == (0, "")
    node.router.drain("stop")
    assert await health(url) == (0, "")
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        # The liveness probe of the manifests for Kubernetes, and why it is not the other one.
        assert (await client.get(f"{url}/")).status_code == 200
        assert (await client.get(f"{url}/health")).status_code == 503


async def health(url: str) -> tuple[int | None, str]:
    ran = await trio.run_process(
        [sys.executable, str(DEPLOY / "health.py"), url],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    return ran.returncode, (ran.stdout + ran.stderr).decode()


async def test_the_health_check_of_something_else() -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        code, out = await health(f"http://127.0.0.1:{port}/")
        assert (code, out) == (1, f"http://127.0.0.1:{port}/: it is not a node of trio_cluster\n")
        nursery.cancel_scope.cancel()


# --- The compose file ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; it is in the group deploy")
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return loaded


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """The folder of the compose file, with the secrets that its script makes."""
    subprocess.run(["cp", "-R", str(DEPLOY / "compose"), str(tmp_path)], check=True)
    subprocess.run(["rm", "-rf", str(tmp_path / "compose/secrets")], check=True)
    subprocess.run([str(tmp_path / "compose/make-secrets")], check=True)
    return tmp_path / "compose" / "secrets"


def test_the_compose_file_is_valid(compose: dict[str, Any]) -> None:
    schemas = pytest.importorskip(
        "check_jsonschema.builtin_schemas",
        reason="check-jsonschema is not installed; it is in the group deploy",
    )
    import jsonschema

    jsonschema.validate(compose, schemas.get_builtin_schema("vendor.compose-spec"))


def our_services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {name: each for name, each in compose["services"].items() if "trio-cluster" in each["image"]}
    assert found.keys() == {"master", "worker-1", "worker-2"}
    return found


def test_every_container_has_what_keeps_it_in(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert "healthcheck" in service or name == "master", name
        assert service.get("user") not in ("0", "root"), name
        # What nothing forbids is not granted.
        assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & service.keys(), name


def test_all_that_services_name_is_there_and_nothing_else_is(compose: dict[str, Any]) -> None:
    services = compose["services"].values()
    assert {network for each in services for network in each["networks"]} == compose["networks"].keys()
    assert {volume.split(":")[0] for each in services for volume in each["volumes"]} == compose[
        "volumes"
    ].keys()
    assert {secret for each in services for secret in each["secrets"]} == compose["secrets"].keys()
    sources = {config["source"] for each in services for config in each.get("configs", ())}
    assert sources == compose["configs"].keys()
    files = [each["file"] for each in compose["configs"].values()]
    assert [file for file in files if not (DEPLOY / file).exists()] == []


def test_commands_files_and_grace_periods_fit(compose: dict[str, Any], secrets: Path) -> None:
    for name, service in our_services(compose).items():
        (config,) = service["configs"]
        arguments = parse_arguments(service["command"])
        assert str(arguments.config) == config["target"]
        options = with_secrets(DEPLOY / compose["configs"][config["source"]]["file"], secrets, arguments)
        grace = float(service["stop_grace_period"].removesuffix("s"))
        # Connections have two seconds after it, and the process needs a moment.
        assert grace >= options.drain_timeout + 10
        if name == "master":
            assert service["ports"] == [f"127.0.0.1:{options.server.port}:{options.server.port}"]
            assert options.database is not None
            assert options.limits is not None
            assert options.server.api_key is not None
        else:
            assert arguments.command == "worker"
            assert arguments.master_host == "master"
            host, port = arguments.listen
            assert service["healthcheck"]["test"][-1] == f"http://{host}:{port}"
        assert options.cluster_token is not None


def with_secrets(file: Path, secrets: Path, arguments: argparse.Namespace) -> ClusterServerOptions:
    """Return what a file means where the secrets are mounted, and check that `check-config` has nothing against it."""
    text = file.read_text("utf-8").replace("/run/secrets/", f"{secrets}/")
    for number, table in enumerate(tomllib.loads(text).get("serve", ()), 1):
        # What the tables say is checked; their libraries need not be here.
        try:
            read_serve(table, f"{file.name}: [[serve]] {number}")
        except ClusterError as error:
            if isinstance(error, OptionsError):
                raise
    copy = secrets.parent / f"with-secrets-{file.name}"
    copy.write_text(text.partition("[[serve]]")[0])
    assert "has no errors" in describe_configuration(copy)
    return load_options(config=copy, environ={}, flags={})


def test_the_demo_serves_the_same_models(compose: dict[str, Any]) -> None:
    from trio_cluster.demo.cluster import _WORKERS

    for name, specs in _WORKERS.items():
        tables = tomllib.loads((DEPLOY / f"compose/{name}.toml").read_text("utf-8"))["serve"]
        shown = []
        for table in tables:
            options = [f"{key}={value}" for key, value in table.items() if key not in ("engine", "argument")]
            spec = table["engine"] + (f":{table['argument']}" if "argument" in table else "")
            shown.append(",".join([spec, *options]))
        assert shown == list(specs)
    assert "demo" in compose["services"]["master"]["build"]["args"]["EXTRAS"]


def test_the_secrets_are_made_once_and_fit_to_each_other(secrets: Path, compose: dict[str, Any]) -> None:
    names = {Path(each["file"]).name for each in compose["secrets"].values()}
    made = {path.name: path.read_text() for path in secrets.iterdir()}
    assert made.keys() >= names
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    # A container of another user reads them.
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets.iterdir()} == {0o644}
    assert (
        len({made["api_key"], made["cluster_token"], made["postgres_password"], made["valkey_password"]}) == 4
    )
    assert re.fullmatch("[0-9a-f]{48}", made["api_key"])
    service = compose["services"]["postgres"]["environment"]
    password = made["postgres_password"]
    assert (
        made["database"]
        == f"postgresql://{service['POSTGRES_USER']}:{password}@postgres/{service['POSTGRES_DB']}\n"
    )
    assert made["limits"] == f"redis://:{made['valkey_password']}@valkey:6379/0\n"
    assert f"requirepass {made['valkey_password']}\n" in made["valkey_conf"]
    subprocess.run([str(secrets.parent / "make-secrets")], check=True)
    assert {path.name: path.read_text() for path in secrets.iterdir()} == made


def test_the_secrets_are_not_committed() -> None:
    assert "deploy/compose/secrets/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


def test_json_of_the_schema_is_what_the_files_say() -> None:
    # Editors find the schema by its name; the files themselves have to be valid for it.
    import jsonschema

    from trio_cluster.cli.schema import configuration_schema

    for path in sorted((DEPLOY / "compose").glob("*.toml")):
        jsonschema.validate(
            json.loads(json.dumps(tomllib.loads(path.read_text("utf-8")))), configuration_schema()
        )
