"""The access log, and the trace of requests without a valid key."""

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest
import trio
from http_node import HttpNode, open_http_node

from trio_cluster.gateway import access_log, failed_attempts


def lines(
    caplog: pytest.LogCaptureFixture, logger: str = "trio_cluster.access"
) -> list[tuple[str, dict[str, Any]]]:
    return [
        (record.message, record.fields)  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == logger
    ]


CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


async def test_each_request_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.access")
    async with open_http_node(access_log=True, api_key="k") as node, node.client() as client:
        key = {"Authorization": "Bearer k", "x-request-id": "r1"}
        await client.post("/v1/chat/completions", json=CHAT, headers=key)
        await client.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=key)
        await client.post("/v1/chat/completions", json={**CHAT, "model": "none"}, headers=key)
        await client.post("/v1/chat/completions", json=CHAT)
        await client.get("/health")
        await client.get("/nowhere", headers=key)
    logged = lines(caplog)
    assert [(text, fields["status"]) for text, fields in logged] == [
        ("POST /v1/chat/completions", 200),
        ("POST /v1/chat/completions", 200),
        ("POST /v1/chat/completions", 404),
        ("POST /v1/chat/completions", 401),
        ("GET /health", 200),
        ("GET /nowhere", 404),
    ]
    fields = logged[0][1]
    assert (fields["model"], fields["request_id"], fields["principal"]) == ("m", "r1", "default")
    assert fields["client"].startswith("127.0.0.1:")
    assert 0 <= fields["seconds"] < 5
    assert "ended" not in fields


async def test_without_the_option_there_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.access")
    async with open_http_node() as node, node.client() as client:
        await client.get("/health")
        node.node_context.options.server.access_log = True
        await client.get("/health")
    assert len(lines(caplog)) == 1


async def test_a_wrong_key_leaves_a_trace_and_many_leave_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_attempts, "FREE", 100)
    async with open_http_node(api_key="right") as node, node.client() as client:
        for _ in range(50):
            assert (
                await client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
            ).status_code == 401
        ((text, fields),) = lines(caplog, "trio_cluster.http")
        assert text == "a request was refused: The API key is not valid"
        assert fields["client"].startswith("127.0.0.1:")
        assert fields["path"] == "/v1/models"
        assert "wrong" not in caplog.text
        monkeypatch.setattr(access_log.time, "monotonic", lambda: 1e9)
        await client.get("/v1/models")
    assert lines(caplog, "trio_cluster.http")[1][1]["not_logged"] == 49


def send(node: HttpNode, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", node.port)) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        received = b""
        while more := sock.recv(1000):
            received += more
    return received


async def test_what_is_not_a_request_is_a_line_and_many_are_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.access")
    async with open_http_node(access_log=True) as node:
        answer = await trio.to_thread.run_sync(
            send, node, b"GET / HTTP/1.1\r\nx-request-id: r7\r\nHost: a b\r\n\r\n"
        )
        assert answer.startswith(b"HTTP/1.1 400 ")
        ((text, fields),) = lines(caplog)
        assert (text, fields["status"], fields["request_id"]) == ("not a valid HTTP request", 400, "r7")
        assert fields["client"].startswith("127.0.0.1:")
        assert fields["reason"].encode() in answer
        for _ in range(20):
            await trio.to_thread.run_sync(send, node, b"\x16\x03\x01 this is TLS\r\n\r\n")
        assert len(lines(caplog)) == 1
        monkeypatch.setattr(access_log.time, "monotonic", lambda: 1e9)
        await trio.to_thread.run_sync(send, node, b"nonsense\r\n\r\n")
    assert lines(caplog)[1][1]["not_logged"] == 20


async def test_without_the_option_what_is_not_a_request_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.access")
    async with open_http_node() as node:
        assert b" 501 " in await trio.to_thread.run_sync(send, node, b"nonsense\r\n\r\n")
    assert lines(caplog) == []
