"""A cluster with TLS: who joins it how, and what it says to those who do not. Real sockets, in one process."""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio
from nodes import free_pair
from trio_websocket import ConnectionClosed, wrap_client_stream

from trio_cluster import (
    ChatRequest,
    ClusterMode,
    ClusterServer,
    ClusterServerOptions,
    HandshakeRefused,
    ServerOptions,
    check_is_cluster_server,
)
from trio_cluster.core.state_dir import StateDir
from trio_cluster.errors import ClusterError
from trio_cluster.link.websocket import PATH
from trio_cluster.protocol import SUBPROTOCOL
from trio_cluster.security.authority import MASTER_NAME
from trio_cluster.security.contexts import client_context
from trio_cluster.security.invitations import Token
from trio_cluster.security.joining import join as join_cluster

HOST = "127.0.0.1"


async def echo(request: ChatRequest) -> AsyncIterator[str]:
    for word in request.last_text.split():
        yield word + " "


def make(place: Path, **options: Any) -> ClusterServer:
    """Return a server whose state is in ``place``."""
    of_server = {
        name: options.pop(name)
        for name in ("tls", "worker_id", "tls_cert", "tls_key", "http")
        if name in options
    }
    return ClusterServer(
        ClusterServerOptions(
            server=ServerOptions(host=HOST, port=0, **of_server), state_dir=str(place), **options
        )
    )


class Master:
    """A master with TLS, and requests to it."""

    def __init__(self, server: ClusterServer, place: Path) -> None:
        self.server = server
        self.place = place
        assert server.url is not None
        assert server.url.startswith("https://")
        self.url = server.url
        self.port = server.port
        self.context = ssl.create_default_context(cafile=str(place / "ca.pem"))

    async def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, verify=self.context) as client:
            return await client.request(method, path, **more)

    async def invite(self, **body: Any) -> str:
        body = {"addresses": [f"{HOST}:{self.port}"], **body}
        response = await self.ask("POST", "/cluster/invites", json=body)
        assert response.status_code == 201, response.text
        token: str = response.json()["token"]
        assert response.json()["command"] == f"trio-cluster worker --join {token}"
        return token

    async def worker(self, name: str) -> dict[str, Any] | None:
        status = (await self.ask("GET", "/cluster/status")).json()
        found: list[dict[str, Any]] = [each for each in status["workers"] if each["id"] == name]
        return found[0] if found else None

    async def until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        with trio.fail_after(10):
            while not await holds():  # noqa: ASYNC110  (what a master says has no event)
                await trio.sleep(0.02)


@pytest.fixture
async def master(tmp_path: Path, nursery: trio.Nursery) -> Master:
    server = make(tmp_path / "master", tls="auto")
    await nursery.start(server.run_as_master)
    return Master(server, tmp_path / "master")


async def joined(nursery: trio.Nursery, server: ClusterServer, token: str | None) -> ClusterServer:
    server.register_chat("echo", echo)

    async def run(task_status: Any) -> None:
        await server.run_as_member(token, task_status=task_status)

    await nursery.start(run)
    return server


async def test_an_invited_worker_joins_and_joins_again_with_what_it_keeps(
    master: Master, nursery: trio.Nursery, tmp_path: Path
) -> None:
    token = await master.invite(name="gpu-1")
    worker = await joined(nursery, make(tmp_path / "worker"), token)
    assert worker.mode is ClusterMode.WORKER
    found = await master.worker("gpu-1")
    assert found is not None
    assert found["admitted"] == "certificate"
    with_openai = openai.AsyncOpenAI(
        base_url=f"{master.url}/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx.AsyncClient(verify=master.context),
    )
    async with with_openai:
        answer = await with_openai.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "over TLS"}]
        )
        assert answer.choices[0].message.content == "over TLS "
    for again in (token, None):
        worker.stop()

        async def gone() -> bool:
            return await master.worker("gpu-1") is None

        await master.until(gone)
        worker = await joined(nursery, make(tmp_path / "worker"), again)
        assert await master.worker("gpu-1") is not None


async def test_an_invitation_is_for_one_machine_and_says_why_it_is_refused(
    master: Master, nursery: trio.Nursery, tmp_path: Path
) -> None:
    token = await master.invite()
    await joined(nursery, make(tmp_path / "first", worker_id="first"), token)
    hint = re.escape(f"make a new one with: trio-cluster invite {master.server.url}")
    with pytest.raises(ClusterError, match=f"this invitation was used already; {hint}"):
        await make(tmp_path / "second").run_as_member(token)
    expired = await master.invite(expires=0.01)
    await trio.sleep(0.02)
    with pytest.raises(ClusterError, match="this invitation has expired"):
        await make(tmp_path / "third").run_as_member(expired)
    named = await master.invite(name="fourth")
    assert (await master.ask("POST", "/cluster/workers/fourth/revoke")).status_code == 200
    with pytest.raises(ClusterError, match="this invitation was revoked"):
        await make(tmp_path / "fourth").run_as_member(named)
    taken = await master.invite(name="first")
    with pytest.raises(ClusterError, match="there is a worker 'first' already"):
        await make(tmp_path / "fifth").run_as_member(taken)


async def test_a_worker_sends_its_secret_to_nobody_but_the_cluster_that_has_invited_it(
    master: Master, tmp_path: Path, nursery: trio.Nursery
) -> None:
    other = make(tmp_path / "other", tls="auto")
    await nursery.start(other.run_as_master)
    token = Token.decode(await master.invite())
    misled = Token((f"{HOST}:{other.port}",), token.authority, token.secret)
    with pytest.raises(ClusterError, match="not the cluster that the invitation is for"):
        await make(tmp_path / "worker").run_as_member(misled.encode())


async def test_the_next_address_is_tried_and_all_failures_are_told(
    master: Master, tmp_path: Path, nursery: trio.Nursery
) -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        nowhere = f"{HOST}:{unused.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"{nowhere}: .*refused"):
            await make(tmp_path / "first").run_as_member(await master.invite(addresses=[nowhere]))
        token = await master.invite(addresses=[nowhere, f"{HOST}:{master.port}"], name="w")
        await joined(nursery, make(tmp_path / "second"), token)
        assert await master.worker("w") is not None


async def test_a_worker_that_is_revoked_loses_its_link_and_does_not_come_back(
    master: Master, nursery: trio.Nursery, tmp_path: Path
) -> None:
    token = await master.invite(name="gpu-1")
    worker = make(tmp_path / "worker")
    refused: list[str] = []

    async def run(task_status: Any) -> None:
        try:
            await worker.run_as_member(token, task_status=task_status)
        except HandshakeRefused as error:
            refused.append(str(error))

    await nursery.start(run)
    response = await master.ask("POST", "/cluster/workers/gpu-1/revoke")
    assert response.json() == {"name": "gpu-1", "revoked": True, "was_connected": True}

    async def has_ended() -> bool:
        return bool(refused)

    await master.until(has_ended)
    assert "the certificate of the worker 'gpu-1' was revoked" in refused[0]
    assert await master.worker("gpu-1") is None
    with pytest.raises(HandshakeRefused, match="was revoked"):
        await make(tmp_path / "worker").run_as_member()
    response = await master.ask("POST", "/cluster/workers/nobody/revoke")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "worker_not_found")


async def test_a_connection_that_has_not_joined_yet_ends_when_its_certificate_is_revoked(
    master: Master, tmp_path: Path, nursery: trio.Nursery
) -> None:
    token = await master.invite(name="gpu-1")
    member, pem = await trio.to_thread.run_sync(join_cluster, StateDir(tmp_path / "worker"), token, "gpu-1")
    context = client_context(authority=member.authority, certificate=pem)
    plain = await trio.open_tcp_stream(HOST, master.port + 1000)
    stream = trio.SSLStream(plain, context, server_hostname=MASTER_NAME)
    link = await wrap_client_stream(nursery, stream, HOST, PATH, subprotocols=[SUBPROTOCOL])
    response = await master.ask("POST", "/cluster/workers/gpu-1/revoke")
    assert response.json()["was_connected"]

    async def read_all() -> None:
        while True:
            await link.get_message()

    with pytest.raises(ConnectionClosed) as closed:
        await read_all()
    assert "was revoked" in str(closed.value.reason.reason)
    await trio.aclose_forcefully(stream)


async def test_a_rotation_reaches_workers_and_old_ones_are_accepted_meanwhile(
    master: Master, nursery: trio.Nursery, tmp_path: Path
) -> None:
    worker = await joined(nursery, make(tmp_path / "worker"), await master.invite(name="w"))
    before = (tmp_path / "worker" / "membership.json").read_text()
    assert (await master.ask("POST", "/cluster/ca/rotate")).status_code == 200
    worker.stop()
    master.context = ssl.create_default_context(cafile=str(master.place / "ca.pem"))
    # It knows the old authority only, and its certificate is by that one. It renews it as soon as it is connected.
    await joined(nursery, make(tmp_path / "worker"), None)

    async def renewed() -> bool:
        return (tmp_path / "worker" / "membership.json").read_text() != before

    await master.until(renewed)
    after = (tmp_path / "worker" / "membership.json").read_text()
    assert after.count("BEGIN CERTIFICATE") == before.count("BEGIN CERTIFICATE") + 1


async def test_a_worker_with_the_token_verifies_the_master(tmp_path: Path, nursery: trio.Nursery) -> None:
    server = make(tmp_path / "master", tls="auto", cluster_token="secret")
    await nursery.start(server.run_as_master)
    assert server.internal_port is not None
    ca_file = str(tmp_path / "master" / "ca.pem")
    worker = make(tmp_path / "worker", cluster_token="secret", ca_file=ca_file, worker_id="w")

    async def run(task_status: Any) -> None:
        await worker.run_as_worker(HOST, server.internal_port or 0, tls=True, task_status=task_status)

    await nursery.start(run)
    found = await Master(server, tmp_path / "master").worker("w")
    assert found is not None
    assert found["admitted"] == "token"
    wrong = make(tmp_path / "wrong", cluster_token="guess", ca_file=ca_file)
    with pytest.raises(HandshakeRefused, match="wrong or missing cluster token"):
        await wrong.run_as_worker(HOST, server.internal_port, tls=True)


async def test_a_worker_without_a_certificate_and_without_a_token_is_refused(
    master: Master, tmp_path: Path
) -> None:
    assert master.server.internal_port is not None
    worker = make(tmp_path / "worker", ca_file=str(master.place / "ca.pem"))
    with pytest.raises(HandshakeRefused, match="with the cluster token"):
        await worker.run_as_worker(HOST, master.server.internal_port, tls=True)
    master.server.options.allow_anonymous_workers = True
    async with trio.open_nursery() as nursery:

        async def run(task_status: Any) -> None:
            await worker.run_as_worker(
                HOST, master.server.internal_port or 0, tls=True, task_status=task_status
            )

        await nursery.start(run)
        worker.stop()


async def test_a_worker_that_does_not_trust_the_master_goes_on_trying_and_says_why(
    master: Master, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert master.server.internal_port is not None
    with trio.move_on_after(1):
        await make(tmp_path / "worker").run_as_worker(HOST, master.server.internal_port, tls=True)
    assert "TLS: the certificate is not accepted: " in caplog.text
    assert "give its authority with --ca-file, or join with an invitation" in caplog.text


async def test_both_ports_answer_http_without_tls_with_one_readable_400(master: Master) -> None:
    for port in (master.port, master.server.internal_port):
        async with httpx.AsyncClient() as client:
            response = await client.get(f"http://{HOST}:{port}/v1/models")
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "This port speaks TLS: use https:// in the URL"
        assert response.headers["connection"] == "close"


async def test_a_request_to_join_is_small(master: Master) -> None:
    response = await master.ask("POST", "/cluster/join", content=b"x" * (32 * 1024 + 1))
    assert response.status_code == 413
    response = await master.ask("POST", "/cluster/join", content=b'{"secret": "' + b"x" * 1000 + b'"}')
    assert response.status_code == 400
    for body in (b"", b"[]", b"{", b'{"secret": 1}'):
        assert (await master.ask("POST", "/cluster/renew", content=body)).status_code == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"expires": "soon"}, "expires"),
        ({"expires": -1}, "expires"),
        ({"expires": True}, "expires"),
        ({"expires": "31d"}, "expires"),
        ({"expires": 10**400}, "expires"),
        ({"addresses": []}, "addresses"),
        ({"addresses": ["gpu"]}, "addresses"),
        ({"addresses": ["gpu:0"]}, "addresses"),
        ({"addresses": ["gpu:" + "1" * 5000]}, "addresses"),
        ({"addresses": "gpu:1"}, "addresses"),
        ({"name": 7}, "name"),
        ({"name": "w" * 65}, "name"),
        ({"name": "a\nb"}, "name"),
    ],
)
async def test_a_bad_invitation_is_a_clear_400(master: Master, body: dict[str, Any], param: str) -> None:
    response = await master.ask("POST", "/cluster/invites", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_without_tls_there_are_no_invitations_and_that_is_said(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    server = make(tmp_path)
    await nursery.start(server.run_as_master)
    async with httpx.AsyncClient(base_url=str(server.url)) as client:
        for path in ("/cluster/invites", "/cluster/ca/rotate", "/cluster/workers/w/revoke"):
            response = await client.post(path)
            assert response.status_code == 409
            assert "This master has no TLS" in response.json()["error"]["message"]


@pytest.mark.parametrize("key", ["operator", None])
async def test_only_operators_invite_and_no_web_page_without_a_key(
    key: str | None, tmp_path: Path, nursery: trio.Nursery
) -> None:
    server = make(tmp_path / "master", tls="auto")
    server.options.server.operator_key = key
    server.options.server.cors_origins = "https://elsewhere.example"
    await nursery.start(server.run_as_master)
    master = Master(server, tmp_path / "master")
    for path in ("/cluster/invites", "/cluster/ca/rotate", "/cluster/workers/w/revoke"):
        if key is not None:
            assert (await master.ask("POST", path)).status_code in (401, 403)
        page = {"origin": "https://elsewhere.example"}
        assert (await master.ask("POST", path, headers=page)).status_code in (401, 403)
    # The certificate of the authority is for everybody.
    assert (await master.ask("GET", "/cluster/ca.pem")).text == (master.place / "ca.pem").read_text()


async def test_a_port_with_tls_is_recognized_as_a_masters(master: Master) -> None:
    assert master.server.internal_port is not None
    assert master.port is not None
    assert await check_is_cluster_server(HOST, master.server.internal_port)
    assert not await check_is_cluster_server(HOST, master.port)


async def test_a_second_process_of_the_same_user_joins_by_itself(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    port = free_pair()
    one = make(tmp_path, tls="auto")
    two = make(tmp_path, tls="auto")
    two.register_chat("echo", echo)
    await nursery.start(one.run, port)
    await nursery.start(two.run, port)
    assert (one.mode, two.mode) == (ClusterMode.MASTER, ClusterMode.WORKER)
    status = (await Master(one, tmp_path).ask("GET", "/cluster/status")).json()
    assert [each["admitted"] for each in status["workers"]] == ["certificate"]
    # Its key is not left behind.
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".") and name.endswith(".pem")]


async def test_standalone_servers_have_tls_too(tmp_path: Path, nursery: trio.Nursery) -> None:
    server = make(tmp_path, tls="auto")
    server.register_chat("echo", echo)
    await nursery.start(server.run_as_standalone)
    assert (await Master(server, tmp_path).ask("GET", "/v1/models")).json()["data"][0]["id"] == "echo"


async def test_http2_is_negotiated_where_it_is_served(tmp_path: Path, nursery: trio.Nursery) -> None:
    server = make(tmp_path, tls="auto", http="hypercorn")
    server.register_chat("echo", echo)
    await nursery.start(server.run_as_standalone)
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    context.set_alpn_protocols(["h2", "http/1.1"])
    assert server.port is not None
    stream = trio.SSLStream(await trio.open_tcp_stream(HOST, server.port), context, server_hostname=HOST)
    async with stream:
        await stream.do_handshake()
        assert stream.selected_alpn_protocol() == "h2"
    assert (await Master(server, tmp_path).ask("GET", "/v1/models")).http_version == "HTTP/1.1"


async def test_requests_to_join_that_are_refused_cost_one_line(
    master: Master, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"secret": "guess", "request": "none", "name": "w"}
    for _ in range(5):
        response = await master.ask("POST", "/cluster/join", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "invitation_refused")
    assert caplog.text.count("this invitation is not known to this master") == 1
    assert "guess" not in caplog.text


async def test_a_worker_that_joins_anew_is_told_what_it_gives_up(
    master: Master, nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await joined(nursery, make(tmp_path / "worker"), await master.invite(name="first"))
    worker.stop()
    await joined(nursery, make(tmp_path / "worker"), await master.invite(name="second"))
    assert caplog.text.count("its membership as 'first' in") == 1
    assert "a --state-dir each" in caplog.text


async def test_a_worker_without_tls_is_told_that_its_master_has_it(master: Master, tmp_path: Path) -> None:
    assert master.server.internal_port is not None
    with pytest.raises(HandshakeRefused, match="this master speaks TLS: connect with --tls "):
        await make(tmp_path / "worker").run_as_worker(HOST, master.server.internal_port)


async def test_a_damaged_invitation_is_one_clear_error(tmp_path: Path) -> None:
    for text, why in (("tcj-...", "not complete"), ("tc-key", "no invitation")):
        with pytest.raises(ClusterError, match=why):
            await make(tmp_path / "worker").run_as_member(text)
