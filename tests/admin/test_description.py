"""The OpenAPI description of the node: complete, valid, and readable without a key."""

from __future__ import annotations

import json
import re
from typing import Any

import openapi_spec_validator
import pytest
from described import fits
from http_node import HttpNode, open_http_node

import trio_cluster
from trio_cluster.admin.description import description
from trio_cluster.openai import ENDPOINTS, ERRORS

WHOLE = json.loads(description(True))


def resolve(part: dict[str, Any]) -> dict[str, Any]:
    """Return what a reference refers to, and everything else as it is."""
    while "$ref" in part:
        whole: Any = WHOLE
        for step in part["$ref"].removeprefix("#/").split("/"):
            whole = whole[step]
        part = whole
    return part


async def test_it_is_served_as_json_with_the_version_of_the_package(node: HttpNode) -> None:
    async with node.client() as client:
        response = await client.get("/openapi.json")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    document = response.json()
    assert document["info"]["version"] == trio_cluster.__version__
    assert document["servers"] == [{"url": "/"}]


@pytest.mark.parametrize("needs_key", [False, True])
def test_it_is_valid_openapi(needs_key: bool) -> None:
    document = json.loads(description(needs_key))
    assert document["openapi"].startswith("3.1.")
    openapi_spec_validator.validate(document)


async def test_it_needs_no_key_shows_no_models_and_says_whether_others_need_a_key() -> None:
    async with open_http_node(api_key="secret") as node:
        node.add("my-private-model")
        async with node.client() as client:
            response = await client.get("/openapi.json")
        assert response.status_code == 200
        assert "my-private-model" not in response.text
        assert "secret" not in response.text
        assert response.json()["security"] == [{"key": []}]
    async with open_http_node() as node, node.client() as client:
        assert {} in (await client.get("/openapi.json")).json()["security"]


async def test_every_route_is_described_and_nothing_else(node: HttpNode) -> None:
    def plain(path: str) -> str:
        return re.sub(r"<(?:\w+:)?(\w+)>|\{(\w+)\}", "*", path)

    # The files of the page are no API.
    files = {"/ui", "/ui/", "/ui/<path:name>"}
    routes = {
        (plain(rule.rule), method.lower())
        for rule in node.app.url_map.iter_rules()
        if rule.rule not in files
        for method in rule.methods or ()
        if method in ("GET", "POST", "PATCH", "DELETE")
    }
    described = {
        (plain(path), method)
        for path, item in WHOLE["paths"].items()
        for method in item
        if method != "parameters"
    }
    # Every route under /v1 is also served without it, which is described once.
    truncate_reason = {
        (path.removeprefix("/v1"), method) for path, method in described if path.startswith("/v1")
    }
    assert described | truncate_reason == routes
    assert {f"/v1{each.path}" for each in ENDPOINTS.values()} < set(WHOLE["paths"])


@pytest.mark.parametrize(
    "path", ["/", "/health", "/openapi.json", "/v1/models", "/cluster/status", "/cluster/calls"]
)
async def test_answers_are_as_they_are_described(node: HttpNode, path: str) -> None:
    async with node.client() as client:
        response = await client.get(path)
    described = WHOLE["paths"][path]["get"]["responses"][str(response.status_code)]
    schema = described["content"]["application/json"]["schema"]
    assert fits({**schema, "components": WHOLE["components"]}).is_valid(response.json())
    assert set(described["headers"]) <= set(response.headers)


async def test_a_model_is_as_it_is_described(node: HttpNode) -> None:
    node.add("m2", context_window=7, extra_fields={"more": True})
    model = fits(WHOLE["components"]["schemas"]["Model"])
    async with node.client() as client:
        for entry in (await client.get("/v1/models")).json()["data"]:
            model.validate(entry)
            model.validate((await client.get(f"/v1/models/{entry['id']}")).json())


async def test_errors_are_as_they_are_described() -> None:
    async with open_http_node(api_key="k", max_body_size=1000) as node, node.client() as client:
        key = {"authorization": "Bearer k"}
        path = "/v1/chat/completions"
        unknown = {"model": "x", "messages": [{"role": "user", "content": ""}]}
        for status, response in (
            (400, await client.post(path, json={}, headers=key)),
            (401, await client.post(path, json={})),
            (404, await client.post(path, json=unknown, headers=key)),
            (405, await client.get(path, headers=key)),
            (413, await client.post(path, content=b" " * 2000, headers=key)),
            (415, await client.post(path, content=b"hi", headers=key | {"content-type": "text/plain"})),
        ):
            described = WHOLE["components"]["responses"][str(status)]
            assert response.status_code == status
            needed = [name for name, each in described["headers"].items() if resolve(each).get("required")]
            assert set(needed) <= set(response.headers), status
            schema = resolve(described["content"]["application/json"]["schema"])
            fits(schema).validate(response.json())


def test_every_operation_refers_to_errors_that_are_described() -> None:
    for item in WHOLE["paths"].values():
        for method, operation in item.items():
            if method == "parameters":
                continue
            for status, response in operation["responses"].items():
                assert "x-request-id" in resolve(response)["headers"]
                assert status == "default" or int(status) < 400 or int(status) in ERRORS or status == "503"
    names = [
        operation["operationId"]
        for item in WHOLE["paths"].values()
        for method, operation in item.items()
        if method != "parameters"
    ]
    assert len(names) == len(set(names))
