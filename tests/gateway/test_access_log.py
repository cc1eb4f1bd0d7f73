"""The access log, and the trace of requests without a valid key."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from http_node import HttpNode, open_http_node
from trio.testing import MockClock

from trio_cluster import ApiError, ChatRequest, OutputChunk
from trio_cluster.cli.logs import configure
from trio_cluster.gateway import access_log, failed_attempts
from trio_cluster.testing import SimulatedCluster, open_cluster, worker


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


async def answer(request: ChatRequest) -> AsyncIterator[Any]:
    """Take 0.3 s to the first of three tokens, and 0.2 s to each of the others."""
    if "refuses" in request.last_text:
        raise ApiError(429, "tired", code="tired")
    await trio.sleep(0.3)
    for _ in range(2):
        yield "token "
        await trio.sleep(0.2)
    if "fails" in request.last_text:
        raise ApiError(502, "broken", code="broken")
    yield "token"
    yield OutputChunk.usage(7, 3)


async def lines_of_all_kinds(cluster: SimulatedCluster) -> list[bytes]:
    """Send a request of each kind, with the ids r0, r1 and so on, and return the bodies of the answers."""
    back = worker("w1", max_concurrency=1)
    back.register_chat("m", answer)
    await cluster.start_worker(back)
    bodies = []

    async def ask(number: int, text: str, **fields: Any) -> None:
        client = cluster.client(authorization="Bearer k", **{"x-request-id": f"r{number}"})
        bodies.append((await client.chat(fields.pop("model", "m"), text, **fields)).body)

    await ask(0, "")
    await ask(1, "", stream=False)
    await ask(2, "fails")
    await ask(3, "refuses")
    await ask(4, "", model="none")
    leaving = cluster.client(authorization="Bearer k", **{"x-request-id": "r5"})
    async with leaving.open_chat("m") as response:
        await response.receive_until(b"token ")
    await trio.sleep(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            ask,
            6,
            "",
        )
        await trio.sleep(0.1)
        nursery.start_soon(ask, 7, "")
    bodies.append((await cluster.client(**{"x-request-id": "r8"}).chat("m")).body)
    client = cluster.client(authorization="Bearer k", **{"x-request-id": "r9"})
    async with client.open("GET", "/v1/models") as response:
        bodies.append((await response.finish()).body)
        await trio.sleep(1)
    return bodies


@pytest.mark.parametrize("format", ["text", "json"])
async def test_a_line_says_all_that_there_is_to_say_in_text_and_as_json(
    format: str, autojump_clock: MockClock, restored_logging: None
) -> None:
    stream = io.StringIO()
    async with open_cluster(access_log=True, api_key="k", aliases={"short": "m"}) as cluster:
        configure(format=format, stream=stream)
        bodies = await lines_of_all_kinds(cluster)
    read = _read_json if format == "json" else _read_text
    found = {
        line["request_id"]: line for line in map(read, stream.getvalue().splitlines()) if "client" in line
    }
    common = {"principal": "default", "model": "m", "worker": "w1", "status": "200"}
    whole = common | {"outcome": "completed", "seconds": "0.7", "input_tokens": "7", "output_tokens": "3"}
    expected: dict[str, dict[str, str]] = {
        "r0": whole | {"first_token": "0.3", "bytes": str(len(bodies[0]))},
        "r1": whole | {"bytes": str(len(bodies[1]))},
        "r2": common | {"outcome": "failed", "seconds": "0.7", "first_token": "0.3", "code": "broken"},
        "r3": common | {"outcome": "failed", "seconds": "0.0", "status": "429", "code": "tired",
                        "bytes": str(len(bodies[3]))},
        "r4": {"principal": "default", "outcome": "refused", "seconds": "0.0", "status": "404",
               "code": "model_not_found", "bytes": str(len(bodies[4]))},
        "r6": whole | {"first_token": "0.3", "bytes": str(len(bodies[5]))},
        "r7": whole | {"first_token": "0.9", "seconds": "1.3", "queued": "0.6", "bytes": str(len(bodies[6]))},
        "r8": {"outcome": "refused", "seconds": "0.0", "status": "401", "code": "invalid_api_key",
               "bytes": str(len(bodies[7]))},
        "r9": {"principal": "default", "outcome": "completed", "seconds": "0.0", "status": "200",
               "bytes": str(len(bodies[8]))},
    }  # fmt: skip
    left = found.pop("r5")
    assert (left["outcome"], left["ended"], left["first_token"]) == ("cancelled", "client left", "0.3")
    assert int(left["bytes"]) > 0
    # Of a stream that has failed, the tokens count, and not the event with the error.
    assert 200 < int(found["r2"].pop("bytes")) < len(bodies[2])
    assert found["r2"].pop("ended", "failed") == "failed"
    for line in found.values():
        assert line.pop("client")
        assert line.pop("message").split()[0] in ("POST", "GET")
        del line["request_id"]
    assert found == expected


async def test_a_retry_is_one_line_with_the_worker_that_has_answered(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.access")
    async with open_cluster(access_log=True, on_conflict="replicate") as cluster:
        for name in ("w1", "w2"):
            back = worker(name, on_conflict="replicate")
            back.register_chat("m", answer)
            await cluster.start_worker(back)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.client().chat, "m")
            await trio.sleep(0.1)
            (call,) = cluster.master.server.router.live
            cluster.workers[call.served_by].kill()
    ((_, fields),) = lines(caplog)
    assert (fields["outcome"], fields["attempts"]) == ("completed", 2)
    assert {fields["worker"], call.served_by} == {"w1", "w2"}
    # From the arrival of the request, with the attempt that was lost.
    assert fields["first_token"] > 0.3


def _read_json(line: str) -> dict[str, str]:
    fields = json.loads(line)
    if fields.pop("logger") != "trio_cluster.access":
        return {}
    del fields["ts"], fields["level"]
    return {name: str(value) for name, value in fields.items()}


def _read_text(line: str) -> dict[str, str]:
    match = re.match(r"[\d:]{8} info     ((GET|POST) /\S*) ", line)
    if match is None:
        return {}
    found = {"message": match[1]}
    for name, value in re.findall(r' (\w+)=("(?:[^"\\]|\\.)*"|\S+)', line):
        plain = json.loads(value) if value[0] == '"' else value
        found[name] = str(float(plain)) if name in ("seconds", "first_token", "queued") else plain
    return found
