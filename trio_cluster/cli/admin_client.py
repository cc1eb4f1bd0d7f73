"""Asking a running node something over its API, for commands that ask one question and end.

Blocking, with the standard library. What comes back was written by another machine, so nothing in it is trusted to
be there, to be of the right type, or to be fit for a terminal. Whatever goes wrong is one line that begins with the
node's address.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from typing import IO, Any, Final
from urllib.parse import urlsplit

from ..errors import ClusterError

__all__ = ["ask", "node_url", "printable"]

#: Seconds that connecting, and every wait for more of the answer, may take.
TIMEOUT: Final = 5.0

# A thousand workers with a hundred models each stay below it.
_MAX_ANSWER: Final = 16 * 1024 * 1024


def node_url(text: str) -> str:
    """Return the address of the node that a person means by a URL, ``host:port``, or a port of this machine.

    Raises:
        ValueError: it is none of these.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        text = f"127.0.0.1:{text}"
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  (reading it is what checks it)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not text.isprintable() or " " in text:
        raise ValueError(f"expected a URL such as http://127.0.0.1:8080, got {text!r}")
    # The URL that clients are given ends in /v1; that is what people have at hand.
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def ask(
    node: str,
    path: str,
    api_key: str | None,
    *,
    expected: Collection[str],
    post: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Ask a node, and return the JSON object that it answers. Blocks.

    Args:
        node: where it is, from :func:`node_url`.
        path: what to ask for; quoted where it has to be.
        api_key: what to show, if anything.
        expected: the keys that the answer of a trio_cluster node has.
        post: what to send; without it, nothing is sent, and nothing changed there.

    Raises:
        ClusterError: nobody answers, the key is refused, the node says no, or what answers is no trio_cluster node.
    """
    request = urllib.request.Request(node + path, headers={"Accept": "application/json"})
    if post is not None:
        request.data = json.dumps(post).encode()
        request.add_header("Content-Type", "application/json")
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    if _is_this_machine(node):
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            body = response.read(_MAX_ANSWER + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(node, error, with_key=api_key is not None) from error
    except TimeoutError as error:
        raise ClusterError(f"{node}: no answer within {TIMEOUT:g} seconds") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise ClusterError(f"{node}: no answer within {TIMEOUT:g} seconds") from error
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise ClusterError(f"{node}: cannot be reached: {reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ClusterError(f"{node}: does not answer as HTTP does: {printable(error)}") from error
    answer = _read(body)
    if not set(expected) <= answer.keys():
        raise ClusterError(f"{node}: is not a trio_cluster node")
    return answer


def printable(value: object) -> str:
    """Return ``value`` as text that does nothing to a terminal but appear on one line of it."""
    return "".join(character if character.isprintable() else "?" for character in str(value))


def _read(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _refused(node: str, error: urllib.error.HTTPError, *, with_key: bool) -> ClusterError:
    try:
        said = _read(error.read(_MAX_ANSWER + 1)).get("error")
    except (OSError, http.client.HTTPException):
        said = None
    code = error.code
    if isinstance(said, dict) and said.get("code") and code != 401:
        # The node has something to say for itself, for instance that it knows no such worker.
        return ClusterError(f"{node}: {printable(said.get('message'))}")
    if code in (401, 403):
        hint = "the API key is wrong" if with_key else "give its key with --api-key or TRIO_CLUSTER_API_KEY"
        return ClusterError(f"{node}: access refused (HTTP {code}): {hint}")
    if code >= 500:
        return ClusterError(f"{node}: failed to answer (HTTP {code})")
    return ClusterError(f"{node}: is not a trio_cluster node (HTTP {code})")


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """No node redirects, and following one would take the API key to whoever is named there."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None
