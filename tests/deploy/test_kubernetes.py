"""The manifests for Kubernetes: valid, and consistent with the options, the routes and the ports of the program."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from container_steps import parse_containerfile

from trio_cluster.cli.arguments import parse_arguments
from trio_cluster.cli.schema import describe_configuration
from trio_cluster.cli.settings import load_options
from trio_cluster.cluster import masters
from trio_cluster.options import ClusterServerOptions

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; it is in the group deploy")

from kustomized import Manifest, render, without_hashes  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
MANIFESTS = ROOT / "deploy" / "kubernetes"
COMPONENTS = sorted(path.name for path in (MANIFESTS / "components").iterdir())
#: The oldest version with sidecars that are not behind a gate, and two later ones.
VERSIONS = ["1.29", "1.31", "1.34"]
#: Kinds that Kubernetes itself does not know, with what they must have.
CUSTOM = {
    "ServiceMonitor": {
        "type": "object",
        "required": ["selector", "endpoints"],
        "properties": {
            "selector": {"type": "object", "required": ["matchLabels"]},
            "endpoints": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/endpoint"}},
        },
        "additionalProperties": False,
    },
    "PodMonitor": {
        "type": "object",
        "required": ["selector", "podMetricsEndpoints"],
        "properties": {
            "selector": {"type": "object", "required": ["matchLabels"]},
            "podMetricsEndpoints": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/endpoint"}},
        },
        "additionalProperties": False,
    },
    "Gateway": {
        "type": "object",
        "required": ["gatewayClassName", "listeners"],
        "properties": {
            "gatewayClassName": {"type": "string"},
            "listeners": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name", "port", "protocol"],
                    "properties": {
                        "name": {"type": "string"},
                        "hostname": {"type": "string"},
                        "port": {"type": "integer"},
                        "protocol": {"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]},
                        "tls": {"type": "object", "required": ["mode", "certificateRefs"]},
                        "allowedRoutes": {"type": "object"},
                    },
                    "additionalProperties": False,
                },
            },
        },
        "additionalProperties": False,
    },
    "HTTPRoute": {
        "type": "object",
        "required": ["parentRefs", "rules"],
        "properties": {
            "parentRefs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
            "hostnames": {"type": "array", "items": {"type": "string"}},
            "rules": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "matches": {"type": "array"},
                        "timeouts": {
                            "type": "object",
                            "properties": {
                                # Durations of GEP-2257.
                                "request": {"pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"},
                                "backendRequest": {"pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"},
                            },
                            "additionalProperties": False,
                        },
                        "backendRefs": {"type": "array", "items": {"required": ["name", "port"]}},
                    },
                    "additionalProperties": False,
                },
            },
        },
        "additionalProperties": False,
    },
    "Certificate": {
        "type": "object",
        "required": ["secretName", "issuerRef", "dnsNames"],
        "properties": {
            "secretName": {"type": "string"},
            "issuerRef": {"type": "object", "required": ["name"]},
            "dnsNames": {"type": "array", "items": {"type": "string"}},
            "privateKey": {"type": "object"},
            "usages": {"type": "array"},
        },
        "additionalProperties": False,
    },
}
ENDPOINT = {
    "type": "object",
    "required": ["port", "path"],
    "properties": {
        "port": {"type": "string"},
        "path": {"type": "string"},
        "interval": {"type": "string", "pattern": "^[0-9]+s$"},
        "scheme": {"enum": ["http", "https"]},
        "tlsConfig": {"type": "object", "required": ["serverName", "ca"]},
    },
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["example", "all but TLS"])
def manifests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """The example; and every component but that of TLS, which changes the others."""
    if request.param == "example":
        return render(MANIFESTS / "example")
    return render(combination(tmp_path_factory.mktemp("c"), [each for each in COMPONENTS if each != "tls"]))


def combination(place: Path, components: list[str]) -> Path:
    """Return a folder for a kustomization with the base and some components."""
    shutil.copytree(MANIFESTS, place / "kubernetes")
    folder = place / "kubernetes" / "some"
    folder.mkdir()
    # An autoscaler changes the workers, and so comes after them.
    components = sorted(components, key=lambda name: name == "autoscaling")
    file = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../base"],
        "components": [f"../components/{name}" for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(file))
    return folder


def all_of(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [each for each in manifests if each["kind"] == kind]


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [each for each in all_of(manifests, kind) if each["metadata"]["name"] == name]
    return found


def pod_of(deployment: Manifest) -> dict[str, Any]:
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


def node_of(deployment: Manifest) -> dict[str, Any]:
    """Return the container of a deployment that runs trio-cluster."""
    (container,) = pod_of(deployment)["containers"]
    assert isinstance(container, dict)
    return container


def containers_of(deployment: Manifest) -> list[dict[str, Any]]:
    pod = pod_of(deployment)
    return [*pod.get("initContainers", ()), *pod["containers"]]


def arguments_of(deployment: Manifest) -> argparse.Namespace:
    return parse_arguments(node_of(deployment)["args"])


# --- What is rendered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "components", [None, *([each] for each in COMPONENTS if each != "autoscaling"), COMPONENTS]
)
def test_kustomize_makes_the_same_of_it(components: list[str] | None, tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which has kustomize in it, is not installed")
    folder = MANIFESTS / "example" if components is None else combination(tmp_path, components)
    ran = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    real = without_hashes(list(yaml.safe_load_all(ran.stdout)))

    def key(manifest: Manifest) -> tuple[str, str]:
        return manifest["kind"], manifest["metadata"]["name"]

    assert sorted(render(folder), key=key) == sorted(real, key=key)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_valid(manifests: list[Manifest], version: str) -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed; it is in the group deploy"
    )
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            validator.validate(manifest, version, strict=True)


def test_custom_resources_have_the_form_that_they_should(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        assert re.fullmatch("[a-z0-9-]{1,63}", manifest["metadata"]["name"])
        if (schema := CUSTOM.get(manifest["kind"])) is not None:
            jsonschema.validate(manifest["spec"], {**schema, "$defs": {"endpoint": ENDPOINT}})


def test_every_name_is_there_once(manifests: list[Manifest]) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(names) == len(set(names))


def test_the_example_has_images_with_tags() -> None:
    for deployment in all_of(render(MANIFESTS / "example"), "Deployment"):
        for container in containers_of(deployment):
            assert re.fullmatch(r"[a-z.]+/[a-z./-]+:v?[0-9.]+", container["image"])


# --- Commands, configurations and secrets -------------------------------------------------------------------------


def test_the_configurations_mean_what_the_pods_have(manifests: list[Manifest], tmp_path: Path) -> None:
    used_keys = set()
    for deployment in all_of(manifests, "Deployment"):
        name = deployment["metadata"]["name"]
        options = options_of(deployment, manifests, tmp_path)
        pod = pod_of(deployment)
        (secrets,) = [each["secret"] for each in pod["volumes"] if each["name"] == "secrets"]
        assert secrets["secretName"] == "trio-cluster"
        mounted = {item["path"] for item in secrets["items"]}
        text = config_of(deployment, manifests)
        # Nothing is mounted that is not used.
        assert set(re.findall('"/etc/trio-cluster/secrets/([a-z_]+)"', text)) == mounted, name
        used_keys |= {item["key"] for item in secrets["items"]}
        # Files are readable for the group of the pod.
        assert secrets["defaultMode"] == 0o440
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
        assert options.server.api_key is not None
        assert options.cluster_token is not None
        for container in containers_of(deployment):
            for variable in container.get("env", ()):
                # Options come from the file, where they are checked.
                assert not variable["name"].startswith("TRIO_CLUSTER_")
                if "secretKeyRef" in (source := variable.get("valueFrom", {})):
                    used_keys.add(source["secretKeyRef"]["key"])
    page = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
    assert set(re.findall("--from-(?:literal|file)=([a-z_]+)", page)) == used_keys


def config_of(deployment: Manifest, manifests: list[Manifest]) -> str:
    """Return the file that a pod's command names, by its mounts."""
    (volume,) = [each for each in pod_of(deployment)["volumes"] if each["name"] == "config"]
    (mount,) = [each for each in node_of(deployment)["volumeMounts"] if each["name"] == "config"]
    data = one(manifests, "ConfigMap", volume["configMap"]["name"])["data"]
    path = arguments_of(deployment).config
    assert str(path.parent) == mount["mountPath"]
    text = data[path.name]
    assert isinstance(text, str)
    return text


def options_of(deployment: Manifest, manifests: list[Manifest], place: Path) -> ClusterServerOptions:
    """Return the options of a pod, and check that `check-config` has nothing against its file."""
    secrets = place / "secrets"
    secrets.mkdir(exist_ok=True)
    for key, value in {"database": "postgresql://c:p@db/c", "limits": "redis://:p@valkey:6379/0"}.items():
        (secrets / key).write_text(value)
    for key in ("api_key", "cluster_token", "worker_key"):
        (secrets / key).write_text(f"{key}-of-the-test\n")
    file = place / "config.toml"
    file.write_text(config_of(deployment, manifests).replace("/etc/trio-cluster/secrets", str(secrets)))
    # What is in the image of the workers that run model servers.
    program = place / "bin" / "llama-server"
    program.parent.mkdir(exist_ok=True)
    program.touch(mode=0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        for container in containers_of(deployment):
            for variable in container.get("env", ()):
                patch.setenv(variable["name"], "of-the-test")
        assert "has no errors" in describe_configuration(file)
    return load_options(config=file, environ={}, flags={})


def test_masters_and_workers_find_each_other(manifests: list[Manifest], tmp_path: Path) -> None:
    master = one(manifests, "Deployment", "trio-cluster-master")
    headless = one(manifests, "Service", "trio-cluster-masters")
    master_ports = {port["name"]: port["containerPort"] for port in node_of(master)["ports"]}
    assert master_ports == {"api": arguments_of(master).port, "workers": arguments_of(master).port + 1000}
    # A master is ready only when workers have brought models, so workers must find it before.
    assert headless["spec"]["publishNotReadyAddresses"] is True
    assert headless["spec"]["clusterIP"] == "None"
    for service in all_of(manifests, "Service"):
        assert_selects(service["spec"]["selector"], master)
        for port in service["spec"]["ports"]:
            assert port["port"] == master_ports[port["targetPort"]]
    workers = [each for each in all_of(manifests, "Deployment") if each is not master]
    assert workers
    tokens = {options_of(each, manifests, tmp_path).cluster_token for each in [master, *workers]}
    assert len(tokens) == 1
    for worker in workers:
        arguments = arguments_of(worker)
        assert arguments.masters_from == f"{headless['metadata']['name']}:{master_ports['api']}"
        # The name of a pod is its own.
        assert arguments.worker_id == "$(POD_NAME)"
        (port,) = node_of(worker)["ports"]
        assert (port["name"], port["containerPort"]) == ("api", arguments.listen[1])


def assert_selects(selector: dict[str, str], deployment: Manifest) -> None:
    assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_tls_is_on_at_both_ends_and_for_the_names_that_are_used() -> None:
    manifests = render(MANIFESTS / "example")
    (certificate,) = all_of(manifests, "Certificate")
    master = one(manifests, "Deployment", "trio-cluster-master")
    assert arguments_of(master).tls_cert == "/etc/trio-cluster/tls/tls.crt"
    assert arguments_of(master).tls_key == "/etc/trio-cluster/tls/tls.key"
    for service in all_of(manifests, "Service"):
        assert service["metadata"]["name"] in certificate["spec"]["dnsNames"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert node_of(master)[probe]["httpGet"]["scheme"] == "HTTPS"
    for deployment in all_of(manifests, "Deployment"):
        (volume,) = [each for each in pod_of(deployment)["volumes"] if each["name"] == "tls"]
        assert volume["secret"]["secretName"] == certificate["spec"]["secretName"]
        (mount,) = [each for each in node_of(deployment)["volumeMounts"] if each["name"] == "tls"]
        assert mount["mountPath"] == "/etc/trio-cluster/tls"
        if deployment is not master:
            arguments = arguments_of(deployment)
            assert (arguments.connect_tls, str(arguments.ca_file)) == (True, "/etc/trio-cluster/tls/ca.crt")
            # The key of the masters is theirs.
            assert [item["key"] for item in volume["secret"]["items"]] == ["ca.crt"]
    (ingress,) = all_of(manifests, "Ingress")
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/backend-protocol"] == "HTTPS"
    (monitor,) = all_of(manifests, "ServiceMonitor")
    assert monitor["spec"]["endpoints"][0]["scheme"] == "https"
    assert monitor["spec"]["endpoints"][0]["tlsConfig"]["serverName"] in certificate["spec"]["dnsNames"]


# --- Rolling updates ----------------------------------------------------------------------------------------------


def test_grace_periods_are_longer_than_what_happens_in_them(
    manifests: list[Manifest], tmp_path: Path
) -> None:
    for deployment in all_of(manifests, "Deployment"):
        hook = node_of(deployment).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        before = 0 if hook is None else int(hook[1])
        drain = options_of(deployment, manifests, tmp_path).drain_timeout
        assert pod_of(deployment)["terminationGracePeriodSeconds"] >= before + drain + 10
        if deployment["metadata"]["name"] == "trio-cluster-master":
            assert hook == ["sleep", "15"]


def test_probes_ask_routes_that_fit(manifests: list[Manifest]) -> None:
    for deployment in all_of(manifests, "Deployment"):
        container = node_of(deployment)
        # tests/deploy/test_containers.py holds `/` to 200 while a node drains.
        assert container["livenessProbe"]["httpGet"]["path"] == "/"
        assert container["startupProbe"]["httpGet"]["path"] == "/"
        assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
        for each in containers_of(deployment):
            names = {port["name"] for port in each["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if probe in each:
                    assert each[probe]["httpGet"]["port"] in names


def test_a_master_gets_clients_when_all_workers_have_found_it(manifests: list[Manifest]) -> None:
    probe = node_of(one(manifests, "Deployment", "trio-cluster-master"))["readinessProbe"]
    # What caches of DNS in Kubernetes keep an answer for, and the interval of the workers.
    assert probe["initialDelaySeconds"] >= 30 + masters._RESOLVE_INTERVAL


def test_masters_are_replaced_one_by_one_and_never_missing(manifests: list[Manifest]) -> None:
    master = one(manifests, "Deployment", "trio-cluster-master")
    assert master["spec"]["replicas"] == 2
    assert master["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    constraints = pod_of(master)["topologySpreadConstraints"]
    assert constraints[0]["topologyKey"] == "kubernetes.io/hostname"
    for constraint in constraints:
        assert_selects(constraint["labelSelector"]["matchLabels"], master)


def test_every_deployment_has_a_disruption_budget(manifests: list[Manifest]) -> None:
    for deployment in all_of(manifests, "Deployment"):
        budget = one(manifests, "PodDisruptionBudget", deployment["metadata"]["name"])
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["selector"] == deployment["spec"]["selector"]


def test_a_model_server_ends_after_its_worker(manifests: list[Manifest]) -> None:
    (engine,) = pod_of(one(manifests, "Deployment", "trio-cluster-gpu-worker"))["initContainers"]
    assert engine["restartPolicy"] == "Always"
    assert engine["resources"]["limits"]["nvidia.com/gpu"] == 1


# --- Security -----------------------------------------------------------------------------------------------------


def test_every_pod_obeys_the_restricted_profile(manifests: list[Manifest]) -> None:
    steps = parse_containerfile((ROOT / "deploy" / "Containerfile").read_text("utf-8"))
    (user,) = [step.words[0] for step in steps if step.keyword == "USER"]
    for deployment in all_of(manifests, "Deployment"):
        pod = pod_of(deployment)
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
        assert all(volume.keys() - {"name"} <= allowed for volume in pod["volumes"])
        for container in containers_of(deployment):
            inner = container["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False
            assert inner["readOnlyRootFilesystem"] is True
            assert inner["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"])
    for namespace in all_of(manifests, "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_network_policies_allow_what_is_needed(manifests: list[Manifest], tmp_path: Path) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in all_of(manifests, "NetworkPolicy")}
    master_policy, worker_policy = policies["trio-cluster-master"], policies["trio-cluster-worker"]
    master = one(manifests, "Deployment", "trio-cluster-master")
    assert_selects(master_policy["podSelector"]["matchLabels"], master)
    api, internal = master_policy["ingress"]
    assert api == {"ports": [{"protocol": "TCP", "port": "api"}]}
    assert internal["ports"] == [{"protocol": "TCP", "port": "workers"}]
    to_masters, _ = worker_policy["egress"]
    assert to_masters["ports"] == internal["ports"]
    assert_selects(to_masters["to"][0]["podSelector"]["matchLabels"], master)
    ports = {port["port"] for rule in master_policy["egress"] for port in rule["ports"]}
    assert ports == {53, 5432, 6379}
    for deployment in all_of(manifests, "Deployment"):
        if deployment is not master:
            assert_selects(worker_policy["podSelector"]["matchLabels"], deployment)
            assert_selects(internal["from"][0]["podSelector"]["matchLabels"], deployment)
            (rule,) = worker_policy["ingress"]
            assert rule["ports"][0]["port"] == arguments_of(deployment).listen[1]


# --- What is in front, and what looks on --------------------------------------------------------------------------


def test_proxies_let_streams_live(manifests: list[Manifest], tmp_path: Path) -> None:
    options = options_of(one(manifests, "Deployment", "trio-cluster-master"), manifests, tmp_path)
    (ingress,) = all_of(manifests, "Ingress")
    notes = {
        name.removeprefix("nginx.ingress.kubernetes.io/"): value
        for name, value in ingress["metadata"]["annotations"].items()
    }
    assert float(notes["proxy-read-timeout"]) > max(options.server.default_timeout, options.server.keepalive)
    assert notes["proxy-buffering"] == "off"
    assert notes["proxy-body-size"] == f"{options.server.max_body_size >> 20}m"
    (rule,) = ingress["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    service = one(manifests, "Service", backend["name"])
    assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    for route in all_of(manifests, "HTTPRoute"):
        (rule,) = route["spec"]["rules"]
        assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
        (backend,) = rule["backendRefs"]
        assert (backend["name"], backend["port"]) == ("trio-cluster", service["spec"]["ports"][0]["port"])
        assert route["spec"]["parentRefs"][0]["name"] == all_of(manifests, "Gateway")[0]["metadata"]["name"]


def test_monitors_find_what_has_metrics(manifests: list[Manifest]) -> None:
    (services,) = all_of(manifests, "ServiceMonitor")
    wanted = services["spec"]["selector"]["matchLabels"].items()
    # One of the two services, or each master would be looked at twice.
    (found,) = [each for each in all_of(manifests, "Service") if wanted <= each["metadata"]["labels"].items()]
    assert found["metadata"]["name"] == "trio-cluster-masters"
    assert services["spec"]["endpoints"][0]["port"] in {port["name"] for port in found["spec"]["ports"]}
    (pods,) = all_of(manifests, "PodMonitor")
    for deployment in all_of(manifests, "Deployment"):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        is_worker = labels["app.kubernetes.io/component"] == "worker"
        assert (pods["spec"]["selector"]["matchLabels"].items() <= labels.items()) is is_worker


def test_the_autoscaler_has_a_metric_that_is_there(manifests: list[Manifest], tmp_path: Path) -> None:
    (scaler,) = all_of(manifests, "HorizontalPodAutoscaler")
    (metric,) = scaler["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"].removeprefix("trio_cluster_")
    # Other tests hold this page to the metrics of a node.
    assert f"`{name}`" in (ROOT / "docs" / "metrics.md").read_text("utf-8")
    assert f"trio_cluster_{name}" in (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
    target = one(manifests, "Deployment", scaler["spec"]["scaleTargetRef"]["name"])
    # The autoscaler alone decides.
    assert "replicas" not in target["spec"]
    # Something has to wait before anything is counted, and long enough for help to come.
    (table,) = tomllib.loads(config_of(target, manifests))["serve"]
    assert table["max_concurrency"] < options_of(target, manifests, tmp_path).server.max_concurrency
    assert f"--max-num-seqs={table['max_concurrency']}" in pod_of(target)["initContainers"][0]["args"]


def test_models_on_demand_fit_into_the_memory_of_their_container(manifests: list[Manifest]) -> None:
    worker = one(manifests, "Deployment", "trio-cluster-command-worker")
    budget = tomllib.loads(config_of(worker, manifests))["worker"]["memory"]
    limit = node_of(worker)["resources"]["limits"]["memory"]
    assert int(budget.removesuffix("GiB")) + 1 <= int(limit.removesuffix("Gi"))
