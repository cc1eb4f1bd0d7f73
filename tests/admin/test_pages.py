"""The files of the page for people, and who its user is. What the page does is tested in a browser, in ``tests/ui``."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
from http_node import open_http_node

PAGE = files("trio_cluster") / "ui"
ELSEWHERE = re.compile(r"""(?:\bfrom|import|import\(|fetch\(|src=|href=|url\()\s*["'`]?(?:https?:)?//""")


async def test_the_page_and_its_files_need_no_key_and_say_whether_the_api_does() -> None:
    for options, requires in (({}, "false"), ({"api_key": "secret"}, "true")):
        async with open_http_node(**options) as node, node.client() as client:
            response = await client.get("/ui/")
            assert response.status_code == 200
            assert response.headers["content-type"] == "text/html; charset=utf-8"
            assert f'data-requires-key="{requires}"' in response.text
            assert "secret" not in response.text
            for name in re.findall(r'(?:src|href)="([^"]+)"', response.text):
                assert (await client.get(f"/ui/{name}")).status_code == 200, name


async def test_only_the_page_s_own_content_is_allowed() -> None:
    async with open_http_node() as node, node.client() as client:
        for path in ("/ui/", "/ui/app.js", "/ui/style.css", "/ui/icon.svg"):
            headers = (await client.get(path)).headers
            policy = dict(
                each.strip().partition(" ")[::2] for each in headers["content-security-policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"


async def test_a_file_that_has_not_changed_is_not_sent_again() -> None:
    async with open_http_node() as node, node.client() as client:
        first = await client.get("/ui/app.js")
        again = await client.get("/ui/app.js", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert first.headers["cache-control"] == "no-cache"


async def test_the_address_without_its_last_slash_leads_to_the_page() -> None:
    async with open_http_node() as node, node.client() as client:
        response = await client.get("/ui")
        assert (response.status_code, response.headers["location"]) == (302, "ui/")


async def test_a_browser_at_the_root_is_led_to_the_page() -> None:
    async with open_http_node(api_key="k") as node, node.client() as client:
        response = await client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        assert (response.status_code, response.headers["location"]) == (302, "ui/")
        assert (await client.get("/")).json()["page"] == "/ui/"


@pytest.mark.parametrize(
    "path", ["/ui/nothing.js", "/ui/../options.py", "/ui/%2e%2e/options.py", "/ui/views", "/ui/index.html"]
)
async def test_nothing_else_is_sent(path: str) -> None:
    async with open_http_node() as node, node.client() as client:
        assert (await client.get(path)).status_code == 404


async def test_the_session_tells_the_role_of_the_key() -> None:
    async with open_http_node(api_key="k", operator_key="op") as node, node.client() as client:
        for key, role in (("k", "inference"), ("op", "admin")):
            response = await client.get("/ui/session", headers={"Authorization": f"Bearer {key}"})
            assert response.json()["role"] == role
            assert response.json()["requires_key"] is True
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            response = await client.get("/ui/session", headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_the_session_of_a_client_without_a_key() -> None:
    async with open_http_node() as node, node.client() as client:
        local = (await client.get("/ui/session")).json()
        assert (local["name"], local["role"], local["requires_key"]) == ("", "admin", False)
        # Whoever comes through a proxy is not on this machine.
        forwarded = (await client.get("/ui/session", headers={"X-Forwarded-For": "203.0.113.9"})).json()
        assert forwarded["role"] == "inference"
    async with open_http_node(operator_key="op") as node, node.client() as client:
        assert (await client.get("/ui/session")).json()["role"] == "inference"


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    folders, found = [PAGE], 0
    while folders:
        for each in folders.pop().iterdir():
            if each.is_dir():
                folders.append(each)
                continue
            found += 1
            text = each.read_text()
            assert not ELSEWHERE.search(text), each
            assert "innerHTML" not in text
            assert "localStorage" not in text or each.name == "app.js"
    assert found > 10
