"""What `kustomize build` makes of a folder, as far as the manifests of this project use it.

Generated names have no hash of their content here; ``without_hashes`` takes those of the real program away.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, TypeAlias

import yaml

__all__ = ["Manifest", "render", "without_hashes"]

Manifest: TypeAlias = dict[str, Any]

_FIELDS = {
    "apiVersion", "kind", "resources", "components", "labels", "configMapGenerator", "patches", "namespace", "images",
}  # fmt: skip
_CLUSTER_WIDE = {"Namespace"}
_SELECTORS = {
    "Deployment": [("spec", "selector", "matchLabels"), ("spec", "template", "metadata", "labels")],
    "Service": [("spec", "selector")],
    "PodDisruptionBudget": [("spec", "selector", "matchLabels")],
    "NetworkPolicy": [("spec", "podSelector", "matchLabels")],
}


def render(folder: Path) -> list[Manifest]:
    """Return the manifests of a folder with a ``kustomization.yaml``.

    Raises:
        ValueError: it has something that is not understood here.
    """
    return _apply(folder, [])


def _apply(folder: Path, manifests: list[Manifest]) -> list[Manifest]:
    file = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))
    if unknown := file.keys() - _FIELDS:
        raise ValueError(f"{folder.name}: {unknown}")
    # A component changes what is there already; its own resources are labelled before they join.
    added: list[Manifest] = []
    for name in file.get("resources", ()):
        path = folder / name
        added += render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text("utf-8")))
    for generator in file.get("configMapGenerator", ()):
        files = [each.split("=", 1) for each in generator["files"]]
        data = {key: (folder / source).read_text("utf-8") for key, source in files}
        metadata = {"name": generator["name"]}
        added.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    manifests = manifests + added
    for name in file.get("components", ()):
        manifests = _apply(folder / name, manifests)
    for patch in file.get("patches", ()):
        operations = yaml.safe_load(patch["patch"])
        for manifest in manifests:
            if _is_target(manifest, patch["target"]):
                for operation in operations:
                    _patch(manifest, operation)
    for labels in file.get("labels", ()):
        for manifest in manifests:
            _label(manifest, labels)
    for manifest in manifests:
        if "namespace" in file and manifest["kind"] not in _CLUSTER_WIDE:
            manifest["metadata"]["namespace"] = file["namespace"]
        for container in _containers(manifest):
            for image in file.get("images", ()):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return manifests


def _is_target(manifest: Manifest, target: dict[str, str]) -> bool:
    if unknown := target.keys() - {"kind", "name", "labelSelector"}:
        raise ValueError(f"patches: {unknown}")
    labels = manifest["metadata"].get("labels", {})
    key, _, value = target.get("labelSelector", "").partition("=")
    return (
        manifest["kind"] == target["kind"]
        and target.get("name", manifest["metadata"]["name"]) == manifest["metadata"]["name"]
        and (not key or labels.get(key) == value)
    )


def _patch(manifest: Manifest, operation: dict[str, Any]) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = manifest
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    match operation["op"], place:
        case "add", list():
            assert last == "-"
            place.append(copy.deepcopy(operation["value"]))
        case "add", dict():
            place[last] = copy.deepcopy(operation["value"])
        case "remove", dict():
            del place[last]
        case _:
            raise ValueError(f"patches: {operation}")


def _label(manifest: Manifest, labels: dict[str, Any]) -> None:
    assert labels["includeSelectors"]
    manifest["metadata"].setdefault("labels", {}).update(labels["pairs"])
    for path in _SELECTORS.get(manifest["kind"], ()):
        place = manifest
        for part in path:
            place = place.setdefault(part, {})
        place.update(labels["pairs"])
    if manifest["kind"] == "NetworkPolicy":
        rules = [*manifest["spec"].get("ingress", ()), *manifest["spec"].get("egress", ())]
        for rule in rules:
            for peer in [*rule.get("from", ()), *rule.get("to", ())]:
                if "podSelector" in peer:
                    peer["podSelector"]["matchLabels"].update(labels["pairs"])
    if manifest["kind"] == "Deployment":
        for constraint in manifest["spec"]["template"]["spec"].get("topologySpreadConstraints", ()):
            constraint["labelSelector"]["matchLabels"].update(labels["pairs"])


def _containers(manifest: Manifest) -> list[dict[str, Any]]:
    if manifest["kind"] != "Deployment":
        return []
    pod = manifest["spec"]["template"]["spec"]
    return [*pod.get("initContainers", ()), *pod["containers"]]


def without_hashes(manifests: list[Manifest]) -> list[Manifest]:
    """Return the manifests of the real program with the names that :func:`render` gives to what is generated."""
    text = json.dumps(manifests)
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "ConfigMap":
            assert re.search("-[a-z0-9]{10}$", name)
            text = text.replace(f'"{name}"', f'"{name[:-11]}"')
    found: list[Manifest] = json.loads(text)
    return found
