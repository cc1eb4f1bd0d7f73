"""The client of the commands that look at a running node or act on it: one HTTP request, and its JSON response.

Blocking, with the standard library. The response was written by another machine, so nothing in it is trusted to be
there, to be of the right type, or to be fit for a terminal. Every failure is one line that begins with the node's URL.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urlsplit

import attrs
import trio

from ..errors import ClusterError
from ..net.sockets import INTERNAL_OFFSET
from ..net.tls import TLS_REQUIRED, why_refused
from ..security.contexts import client_context

__all__ = ["DEFAULT_PORT", "NodeAddress", "node_url", "printable", "request_json"]

#: Seconds that connecting may take, and every wait for more of the response.
TIMEOUT: Final = 5.0

#: The port of a host that is given without one, as for all commands.
DEFAULT_PORT: Final = 8080

#: Bytes of the largest response; the status of a thousand workers with a hundred models each is smaller.
_MAX_RESPONSE: Final = 16 * 1024 * 1024


def node_url(text: str) -> str:
    """Return the URL of a node.

    Args:
        text: a URL, with or without ``/v1`` at its end; ``host:port``; a host, whose port is then 8080; or a port of
            this machine.

    Raises:
        ValueError: it is none of these; the message says what is expected.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        text = f"127.0.0.1:{text}"
    if "://" not in text:
        host, slash, path = text.partition("/")
        if host.count(":") > 1 and "[" not in host:
            host = f"[{host}]"
        if host and (":" not in host or host.endswith("]")):
            host = f"{host}:{DEFAULT_PORT}"
        text = f"http://{host}{slash}{path}"
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  (reading it checks it)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a URL: {error}; give one such as http://127.0.0.1:8080") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not text.isprintable() or " " in text:
        raise ValueError(f"expected a URL such as http://127.0.0.1:8080, got {text!r}")
    # Users copy the base URL of their OpenAI client, which ends in /v1.
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


@attrs.frozen
class NodeAddress:
    """Where a node is, and whom to trust if that is with TLS."""

    url: str
    """From :func:`node_url`."""
    ca_file: Path | None = None
    """Authorities to trust besides those of the system."""

    def __str__(self) -> str:
        return self.url


def request_json(
    address: NodeAddress,
    path: str,
    api_key: str | None,
    *,
    expected: Collection[str],
    body: Mapping[str, Any] | None = None,
    method: str | None = None,
    waits: bool = False,
) -> dict[str, Any]:
    """Send a request to a node, and return the JSON object of its response. Blocks.

    Args:
        address: the node.
        path: the path below it, percent-encoded.
        api_key: the key to send, if any.
        expected: the keys that the response of a trio_cluster node has.
        body: the JSON object to send, if any.
        method: of the request; ``None``: POST if there is a body, and otherwise GET, which changes nothing.
        waits: wait for the response for as long as it takes.

    Raises:
        ClusterError: the node cannot be reached, refuses the key or the request, or is not a trio_cluster node.
    """
    node = address.url
    request = urllib.request.Request(node + path, headers={"Accept": "application/json"}, method=method)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    if node.startswith("https:"):
        handlers.append(urllib.request.HTTPSHandler(context=client_context(ca_file=address.ca_file)))
    if _is_this_machine(node):
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(request, timeout=None if waits else TIMEOUT) as response:
            received = response.read(_MAX_RESPONSE + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(node, error, with_key=api_key is not None) from error
    except TimeoutError as error:
        raise ClusterError(
            f"{node}: no answer within {TIMEOUT:g} seconds; check that the node runs"
        ) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise ClusterError(
                f"{node}: no answer within {TIMEOUT:g} seconds; check that the node runs"
            ) from error
        if isinstance(error.reason, ssl.SSLError):
            raise ClusterError(f"{node}: {_tls_failure(error.reason)}") from error
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise ClusterError(
            f"{node}: cannot be reached: {reason}; check the URL and that the node runs"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ClusterError(f"{node}: does not speak HTTP, check the port: {printable(error)}") from error
    content = _decode(received)
    if not set(expected) <= content.keys():
        raise ClusterError(f"{node}: is not a trio_cluster node; check the URL{_workers_port_hint(node)}")
    return content


def _tls_failure(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not accepted: {error.verify_message}; give its authority with --ca-file (a master's "
            "own is ca.pem in its state_dir)"
        )
    return f"no TLS there ({why_refused(error)}); give http:// if it has none"


def printable(value: object) -> str:
    """Return ``value`` as one line of text without control characters; ``?`` stands in their place."""
    return "".join(character if character.isprintable() else "?" for character in str(value))


def _decode(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``; an empty one if there is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _refused(node: str, error: urllib.error.HTTPError, *, with_key: bool) -> ClusterError:
    try:
        details = _decode(error.read(_MAX_RESPONSE + 1)).get("error")
    except (OSError, http.client.HTTPException):
        details = None
    code = error.code
    if isinstance(details, dict) and str(details.get("message")).startswith(TLS_REQUIRED):
        return ClusterError(f"{node}: {TLS_REQUIRED}")
    if isinstance(details, dict) and details.get("code") and code != 401:
        # The node itself refuses the request, for instance because it knows no such worker.
        return ClusterError(f"{node}: {printable(details.get('message'))}")
    if code in (401, 403):
        hint = "the API key is wrong; give the right one" if with_key else "give its API key"
        hint += " with --api-key or TRIO_CLUSTER_API_KEY"
        return ClusterError(f"{node}: access refused (HTTP {code}): {hint}")
    if code >= 500:
        return ClusterError(f"{node}: failed to answer (HTTP {code}); look into its log, or try again")
    # A redirect is not followed, in no way.
    hint = _workers_port_hint(node) if code >= 400 else ""
    return ClusterError(f"{node}: is not a trio_cluster node (HTTP {code}); check the URL{hint}")


def _workers_port_hint(node: str) -> str:
    """Return what to try if the URL has the port for workers in it, which is 1000 above that of the API. Blocks."""
    from ..cluster.probe import check_is_cluster_server

    parts = urlsplit(node)
    host, port = parts.hostname or "", parts.port or 0
    if port <= INTERNAL_OFFSET or not trio.run(check_is_cluster_server, host, port):
        return ""
    return f": {port} is the port for workers, the API is on {port - INTERNAL_OFFSET}"


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Does not follow redirects: nodes send none, and the API key would be sent to the target."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None
