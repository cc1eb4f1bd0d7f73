"""What else one could put in front of a model server, as far as it is installed on this machine.

Each is found on the PATH, configured as little as possible, and stands before the same backend. Configurations are
their makers' defaults, except for limits that 1000 streams would run into.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import trio
from running import HOST, TLS_PORTS, ask, family, free_port, group, run, wait_for_port

NGINX: Final = """
daemon off; worker_processes 1; pid nginx.pid; error_log error.log warn; worker_rlimit_nofile 20000;
events {{ worker_connections 8192; multi_accept on; }}
http {{
  access_log off; tcp_nodelay on; keepalive_requests 100000000;
  client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  upstream w {{ server 127.0.0.1:{backend}; keepalive 512; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://w; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""

#: The same with TLS.
NGINX_TLS: Final = NGINX.replace(
    "listen 127.0.0.1:{port} backlog=4096;",
    "listen 127.0.0.1:{port} ssl backlog=4096; ssl_certificate {certificate}; ssl_certificate_key {certificate};",
)

HAPROXY: Final = """
global
  maxconn 20000
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend f
  bind 127.0.0.1:{port}
  default_backend b
backend b
  server s 127.0.0.1:{backend}
"""

LITELLM: Final = """
model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "http://127.0.0.1:{backend}/v1", api_key: none}}
litellm_settings: {{telemetry: false}}
"""


@attrs.frozen
class Peer:
    """A program that can be put before a backend. In its command and its configuration stand ``{port}`` and others."""

    name: str
    command: tuple[str, ...]
    """The first word is looked for on the PATH."""
    configuration: str = ""
    """Becomes a file, ``{file}`` in the command, in a folder of its own, ``{folder}``."""
    environment: dict[str, str] = attrs.field(factory=dict)


#: The routers that came from SGLang take the same flags.
_ROUTER: Final = (
    *("--worker-urls", "http://127.0.0.1:{backend}", "--host", HOST, "--port", "{port}"),
    *("--policy", "round_robin", "--max-concurrent-requests", "8192", "--prometheus-port", "{second}"),
    *("--log-level", "error"),
)

NGINX_PLAIN: Final = Peer("nginx", ("nginx", "-c", "{file}", "-p", "{folder}"), NGINX)
NGINX_WITH_TLS: Final = Peer("nginx, TLS", NGINX_PLAIN.command, NGINX_TLS)

PEERS: Final = (
    NGINX_PLAIN,
    Peer("haproxy", ("haproxy", "-f", "{file}"), HAPROXY),
    Peer("sglang-router", ("sglang-router", "launch", *_ROUTER)),
    Peer("vllm-router", ("vllm-router", *_ROUTER)),
    Peer(
        "litellm",
        ("litellm", "--config", "{file}", "--host", HOST, "--port", "{port}", "--num_workers", "1"),
        LITELLM,
        {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_PROXY": "*"},
    ),
)


def installed(peer: Peer) -> bool:
    """Tell whether a peer is there to be measured."""
    return shutil.which(peer.command[0]) is not None


@asynccontextmanager
async def running(
    peer: Peer, backend: int, certificate: str = ""
) -> AsyncIterator[tuple[int, Callable[[], list[int]]]]:
    """Run a peer before a backend; give its port, and what tells its processes. A certificate turns TLS on."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        values = {
            "port": port,
            "second": free_port(),
            "backend": backend,
            "folder": folder,
            "certificate": certificate,
        }
        if certificate:
            TLS_PORTS.add(port)
        path = Path(folder) / "configuration"
        path.write_text(peer.configuration.format(**values))
        command = [word.format(file=path, **values) for word in peer.command]
        async with group() as nursery:
            process = await run(
                nursery, command, {**peer.environment, "PATH": os.environ["PATH"]}, quiet=True
            )
            await wait_for_port(port)
            await _wait_until_it_answers(port)
            yield port, lambda: family(process.pid)


async def try_to_run(
    peer: Peer, backend: int, stack: AsyncExitStack, certificate: str = ""
) -> tuple[int, Callable[[], list[int]]] | None:
    """Run a peer until the stack is left, if it comes up."""
    try:
        return await stack.enter_async_context(running(peer, backend, certificate))
    except BaseExceptionGroup as group_of_one:
        if group_of_one.split(trio.TooSlowError)[1] is not None:
            raise
        return None


async def _wait_until_it_answers(port: int) -> None:
    """Wait until a question is answered; some have to find out first whether their backend is well."""
    with trio.fail_after(90):
        while True:
            try:
                await ask(port, trio.current_time() + 0.01, [0])
                return
            except (SystemExit, OSError, trio.BrokenResourceError):
                await trio.sleep(0.3)
