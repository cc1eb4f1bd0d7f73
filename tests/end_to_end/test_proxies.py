"""The configurations of reverse proxies in the pages, each in the program that it is for, in front of a real cluster.

The pages' text is used as it stands, apart from names, ports and certificates. A program that is not installed skips
its tests: nginx and caddy are looked for on the path. ``TRIO_CLUSTER_TEST_CADDY`` may name the program of Caddy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import httpx
import pytest
import trio
from production_walk import NGINX, code_block
from scripted import Trace, add_models
from served import Served, chat, open_served, until

from trio_cluster import ASRRequest, ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.cli.arguments import parse_arguments

pytestmark = [
    pytest.mark.processes,
    # Its streams leave their async generators to the garbage collector.
    pytest.mark.filterwarnings("ignore:Async generator '(httpx|httpcore):ResourceWarning"),
]

needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def replaced(text: str, **pairs: tuple[str, str]) -> str:
    """Return a text with some parts replaced, each of which must be there."""
    for old, new in pairs.values():
        assert old in text, old
        text = text.replace(old, new)
    return text


@attrs.frozen
class Proxy:
    """A proxy that runs, and what is behind it."""

    served: Served
    url: str
    hides_broken_answers: bool = False

    def client(self) -> httpx.AsyncClient:
        """Return a client that takes the test's certificate, whoever has signed it."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        headers = {"authorization": "Bearer a-key"}
        return httpx.AsyncClient(
            base_url=self.url, verify=context, trust_env=False, timeout=10, headers=headers
        )


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate, and return it and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=api.example.net"]
    command += ["-addext", "subjectAltName=DNS:api.example.net,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def nginx_deployment(folder: Path, upstream: int, port: int) -> tuple[list[str], str]:
    cert, key = certificate(folder)
    live = "/etc/letsencrypt/live/api.example.net"
    text = replaced(
        code_block("deployment.md", "limit_req_zone"),
        listen=("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        cert=(f"{live}/fullchain.pem", str(cert)),
        key=(f"{live}/privkey.pem", str(key)),
        upstream=("http://127.0.0.1:8080", f"http://127.0.0.1:{upstream}"),
    )
    return _nginx(folder, text), f"https://127.0.0.1:{port}"


def nginx_two_masters(
    folder: Path, upstreams: tuple[int, int], port: int, **changes: tuple[str, str]
) -> tuple[list[str], str]:
    cert, key = certificate(folder)
    live = "/etc/letsencrypt/live/api.example.net"
    text = replaced(
        code_block("deployment.md", "upstream masters {"),
        listen=("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        cert=(f"{live}/fullchain.pem", str(cert)),
        key=(f"{live}/privkey.pem", str(key)),
        a=("a.lan:8080", f"127.0.0.1:{upstreams[0]}"),
        b=("b.lan:8080", f"127.0.0.1:{upstreams[1]}"),
        **changes,
    )
    return _nginx(folder, text), f"https://127.0.0.1:{port}"


@asynccontextmanager
async def open_two_masters(
    folder: Path, upstreams: tuple[int, int], **changes: tuple[str, str]
) -> AsyncIterator[str]:
    """Run nginx in front of two masters; give its URL.

    Args:
        folder: where its configuration is written.
        upstreams: the ports of the masters.
        changes: of the page's configuration: by any name, what is replaced by what.
    """
    port = unused_port()
    command, url = nginx_two_masters(folder, upstreams, port, **changes)
    process = await trio.lowlevel.open_process(command)
    try:
        await until(lambda: _listens(port), within=10)
        yield url
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            await process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def nginx_cluster(folder: Path, upstream: int, port: int) -> tuple[list[str], str]:
    location = replaced(
        code_block("cluster.md", "location / {"),
        upstream=("http://127.0.0.1:8080", f"http://127.0.0.1:{upstream}"),
    )
    text = f"server {{ listen 127.0.0.1:{port}; {location} }}"
    return _nginx(folder, text), f"http://127.0.0.1:{port}"


def _nginx(folder: Path, text: str) -> list[str]:
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("nginx is not installed")
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, text=text))
    return [program, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]


def caddy(folder: Path, upstream: int, port: int) -> tuple[list[str], str]:
    program = os.environ.get("TRIO_CLUSTER_TEST_CADDY") or shutil.which("caddy")
    if program is None:
        pytest.skip("caddy is not installed")
    cert, key = certificate(folder)
    text = replaced(
        code_block("deployment.md", "api.example.net {"),
        site=("api.example.net {", f"https://127.0.0.1:{port} {{\n    tls {cert} {key}\n    bind 127.0.0.1"),
        upstream=("reverse_proxy 127.0.0.1:8080", f"reverse_proxy 127.0.0.1:{upstream}"),
    )
    general = "{\n    admin off\n    auto_https disable_redirects\n}\n"
    (folder / "Caddyfile").write_text(general + text)
    return [program, "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"], (
        f"https://127.0.0.1:{port}"
    )


def _is_old(program: str) -> bool:
    """Tell whether a Caddy is one that docs/deployment.md warns of."""
    version = subprocess.run([program, "version"], capture_output=True, text=True, check=True).stdout
    numbers = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    assert numbers is not None, version
    return tuple(map(int, numbers.groups())) < (2, 7, 6)


Setup = Callable[[Path, int, int], tuple[list[str], str]]
SETUPS: Final[list[Setup]] = [nginx_deployment, nginx_cluster, caddy]


@asynccontextmanager
async def open_proxy(setup: Setup, folder: Path, api_key: str | None = "a-key") -> AsyncIterator[Proxy]:
    """Run a proxy in front of a master with one worker."""
    port = unused_port()
    async with open_served("forwarded", api_key=api_key) as served:
        assert served.front.port is not None
        command, url = setup(folder, served.front.port, port)
        environ = {
            **os.environ,
            "HOME": str(folder),
            "XDG_DATA_HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder),
        }
        with (folder / "output").open("wb") as output:
            process = await trio.lowlevel.open_process(
                command, stdout=output, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )
            try:
                proxy = Proxy(served, url, setup is caddy and _is_old(command[0]))

                async def answers() -> bool:
                    assert process.poll() is None, (folder / "output").read_text()
                    try:
                        async with proxy.client() as client:
                            return (await client.get("/health")).status_code == 200
                    except httpx.TransportError:
                        return False

                await until(answers, within=10)
                yield proxy
            finally:
                process.send_signal(signal.SIGTERM)
                with trio.CancelScope(shield=True), trio.move_on_after(5):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                    with trio.CancelScope(shield=True):
                        await process.wait()


@pytest.fixture(params=SETUPS, ids=lambda setup: setup.__name__)
async def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Proxy]:
    async with open_proxy(request.param, tmp_path) as running:
        yield running


async def test_the_words_of_a_stream_come_one_by_one(proxy: Proxy) -> None:
    body = chat("pausing", stream=True)
    async with proxy.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        received = ""
        pieces = response.aiter_text()
        with trio.fail_after(5):
            while "one moment" not in received:
                received += await anext(pieces)
        # The model waits for this: what came before it did not wait for anything.
        assert "please" not in received
        proxy.served.trace.released.set()
        async for piece in pieces:
            received += piece
    assert received.endswith("data: [DONE]\n\n")


async def test_a_client_that_leaves_the_proxy_stops_the_handler(proxy: Proxy) -> None:
    body = chat("endless/async-push", stream=True)
    async with proxy.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        await anext(response.aiter_raw())
    assert await proxy.served.trace.ended(within=5) == "cancelled"


async def test_a_broken_answer_is_broken_behind_the_proxy_too(proxy: Proxy) -> None:
    if proxy.hides_broken_answers:
        pytest.skip("this version of Caddy ends broken answers properly; docs/deployment.md warns of it")
    body = {"model": "failing/voice", "voice": "v", "input": "x"}
    async with proxy.client() as client:
        with pytest.raises(httpx.TransportError):
            await client.post("/v1/audio/speech", json=body)


async def test_a_stream_that_fails_has_its_reason_behind_the_proxy(proxy: Proxy) -> None:
    body = chat("failing", stream=True, pieces=2, status=500)
    async with proxy.client() as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.text.endswith("\n\n")
    assert '"code":"my_code"' in answer.text
    assert "[DONE]" not in answer.text


async def test_a_large_upload_passes(proxy: Proxy) -> None:
    sizes = []

    @proxy.served.back.asr("listener")
    async def listener(request: ASRRequest) -> str:
        sizes.append(len(request.audio))
        return "heard"

    await until(lambda: proxy.served.front.has_model("listener"))
    async with proxy.client() as client:
        answer = await client.post(
            "/v1/audio/transcriptions", data={"model": "listener"}, files={"file": ("a.wav", bytes(8 << 20))}
        )
    assert answer.json() == {"text": "heard"}
    assert sizes == [8 << 20]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.__name__)
async def test_a_client_behind_the_proxy_is_not_taken_for_one_on_this_machine(
    setup: Setup, tmp_path: Path
) -> None:
    # Without any key, clients on the same machine are admins.
    async with open_proxy(setup, tmp_path, api_key=None) as proxy:
        async with proxy.client() as client:
            calls = await client.get("/cluster/calls")
            drained = await client.post("/cluster/workers/w1/drain")
            assert (calls.status_code, drained.status_code) == (403, 403)
            assert calls.json()["error"]["code"] == "role_required"
            assert (await client.get("/cluster/status")).status_code == 200
        async with proxy.served.http() as client:
            assert (await client.get("/cluster/calls")).status_code == 200


@needs_nginx
async def test_the_refusals_of_two_masters_that_are_full_pass_and_take_none_of_them_out(
    tmp_path: Path,
) -> None:
    full = {"api_key": "a-key", "max_concurrency": 1, "queue_timeout": 0}

    async def ask_without_end(served: Served) -> None:
        body = chat("endless/async-push", stream=True)
        await served.stream(body, headers={"authorization": "Bearer a-key"})

    async with open_served("local", **full) as a, open_served("local", **full) as b:
        assert a.front.port is not None
        assert b.front.port is not None
        async with (
            open_two_masters(tmp_path, (a.front.port, b.front.port)) as url,
            Proxy(a, url).client() as client,
        ):
            async with trio.open_nursery() as nursery:
                for each in (a, b):
                    nursery.start_soon(ask_without_end, each)
                    await each.in_flight(1)
                for _ in range(4):
                    answer = await client.post("/v1/chat/completions", json=chat("echo"))
                    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
                    assert answer.json()["error"]["code"] == "over_capacity"
                nursery.cancel_scope.cancel()
            for each in (a, b):
                await each.in_flight(0)
            for _ in range(4):
                assert (await client.post("/v1/chat/completions", json=chat("echo"))).status_code == 200


@needs_nginx
async def test_nginx_verifies_masters_by_the_authority_of_their_cluster(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    pytest.importorskip("cryptography", reason="the extra tls is not installed")
    ports = {}
    for name in ("a", "b", "other"):
        state = tmp_path / name
        state.mkdir(0o700)
        if name == "b":
            shutil.copy(tmp_path / "a/authority.json", state)
        server = ServerOptions(host="127.0.0.1", tls="auto", api_key="a-key")
        master = ClusterServer(ClusterServerOptions(server=server, state_dir=str(state)))
        add_models(master, Trace())
        await nursery.start(master.run_as_master, 0)
        assert master.port is not None
        ports[name] = master.port
    tls = replaced(
        code_block("deployment.md", "proxy_pass https://masters;"),
        ca=("/etc/nginx/trio-cluster-ca.pem", f"{tmp_path}/a/ca.pem"),
    )
    for pair, status in ((("a", "b"), 200), (("other", "other"), 502)):
        upstreams = (ports[pair[0]], ports[pair[1]])
        async with open_two_masters(tmp_path, upstreams, tls=("proxy_pass http://masters;", tls)) as url:
            headers = {"authorization": "Bearer a-key"}
            async with httpx.AsyncClient(
                base_url=url, verify=False, trust_env=False, timeout=10, headers=headers
            ) as client:
                for _ in range(4):
                    answer = await client.post("/v1/chat/completions", json=chat("echo"))
                    assert answer.status_code == status
    nursery.cancel_scope.cancel()


async def test_a_key_is_needed_and_a_refusal_passes(proxy: Proxy) -> None:
    async with proxy.client() as client:
        answer = await client.post(
            "/v1/chat/completions", json=chat("echo"), headers={"authorization": "Bearer wrong"}
        )
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


# What else the pages show


def test_the_container_file_has_only_known_instructions_and_a_command_that_is_understood() -> None:
    # Nothing on a usual machine checks such a file without building it; this is no more than a reading of it.
    lines = [line.partition(" ") for line in code_block("install.md", "FROM ").splitlines()]
    assert {name for name, _, _ in lines} <= {
        "FROM",
        "COPY",
        "RUN",
        "EXPOSE",
        "CMD",
        "ENV",
        "USER",
        "WORKDIR",
    }
    values = {name: value for name, _, value in lines}
    program, *arguments = json.loads(values["CMD"])
    assert program == "trio-cluster"
    port = int(parse_arguments(arguments).port)
    assert values["EXPOSE"].split() == [str(port), str(port + 1000)]
