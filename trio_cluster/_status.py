"""What ``trio-cluster status`` asks a node, and the tables it makes of the answer.

One blocking GET of ``/cluster/status`` with the standard library: this is a program that asks one question
and ends. What comes back was written by another machine, so nothing in it is trusted to be there, to be of
the right type, or to be fit for a terminal.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, Final
from urllib.parse import urlsplit

from ._errors import ClusterError

__all__ = ["describe_status", "fetch_status", "status_url"]

#: Seconds that connecting, and every wait for more of the answer, may take.
TIMEOUT: Final = 5.0

# A thousand workers with a hundred models each stay below it.
_MAX_ANSWER: Final = 16 * 1024 * 1024


def status_url(text: str) -> str:
    """Return the address to ask for what a person typed: a URL, ``host:port``, or a port of this machine.

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
    return f"{parts.scheme}://{parts.netloc}{path}/cluster/status"


def fetch_status(url: str, api_key: str | None) -> dict[str, Any]:
    """Ask the node at ``url`` (from :func:`status_url`) for its state. Blocks.

    Raises:
        ClusterError: nobody answers, the key is refused, or what answers is no trio_cluster node.
    """
    where = url.removesuffix("/cluster/status")
    request = urllib.request.Request(url, headers={"Accept": "application/json"})
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    if _is_this_machine(url):
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            body = response.read(_MAX_ANSWER + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(where, error.code, with_key=api_key is not None) from error
    except TimeoutError as error:
        raise ClusterError(f"{where}: no answer within {TIMEOUT:g} seconds") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise ClusterError(f"{where}: no answer within {TIMEOUT:g} seconds") from error
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise ClusterError(f"{where}: cannot be reached: {reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ClusterError(f"{where}: does not answer as HTTP does: {_clean(error)}") from error
    try:
        status = json.loads(body)
    except (ValueError, RecursionError):
        status = None
    if not isinstance(status, dict) or not {"mode", "models", "calls"} <= status.keys():
        raise ClusterError(f"{where}: is not a trio_cluster node")
    return status


def _refused(where: str, code: int, *, with_key: bool) -> ClusterError:
    if code in (401, 403):
        hint = "the API key is wrong" if with_key else "give its key with --api-key or TRIO_CLUSTER_API_KEY"
        return ClusterError(f"{where}: access refused (HTTP {code}): {hint}")
    if code >= 500:
        return ClusterError(f"{where}: failed to answer (HTTP {code})")
    return ClusterError(f"{where}: is not a trio_cluster node (HTTP {code})")


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


def describe_status(status: Mapping[str, Any]) -> str:
    """Return tables for a person, without a line break at the end."""
    workers, models = _rows(status, "workers"), _rows(status, "models")
    head = ["trio_cluster"]
    if "version" in status:
        head[0] += f" {_clean(status['version'])}"
    head.append(_clean(status.get("mode")))
    if "node_id" in status:
        head.append(f"node {_clean(status['node_id'])}")
    if "uptime" in status:
        head.append(f"up {_duration(status['uptime'])}")
    if status.get("draining"):
        head.append("draining")
    if status.get("connected") is False:
        head.append("without a master")
    lines = [", ".join(head)]
    for title in ("slots", "calls"):
        counts = status.get(title)
        if isinstance(counts, Mapping) and counts:
            told = (f"{_clean(count)} {_clean(name).replace('_', ' ')}" for name, count in counts.items())
            lines.append(f"{title}: {', '.join(told)}")
    sections = ["\n".join(lines)]
    if status.get("mode") == "master" or workers:
        sections.append(_worker_table(workers) if workers else "no workers")
    sections.append(_model_table(models) if models else "no models")
    rejected = status.get("rejected_models")
    if isinstance(rejected, Mapping) and rejected:
        sections.append(_table(("REJECTED", "REASON"), [(_clean(k), _clean(v)) for k, v in rejected.items()]))
    return "\n\n".join(sections)


def _worker_table(workers: Iterable[Mapping[str, Any]]) -> str:
    return _table(
        ("WORKER", "ADDRESS", "STATE", "RUNNING", "WAITING", "CONNECTED", "MODELS"),
        [
            (
                _clean(worker.get("id")),
                _clean(worker.get("address")),
                _clean(worker.get("state")),
                f"{_clean(worker.get('running'))}/{_clean(worker.get('capacity'))}",
                _clean(worker.get("waiting")),
                _duration(worker.get("connected_for")),
                _clean(worker.get("models")),
            )
            for worker in workers
        ],
    )


def _model_table(models: Iterable[Mapping[str, Any]]) -> str:
    return _table(
        ("MODEL", "KIND", "OWNER", "SERVED BY"),
        [tuple(_clean(model.get(key)) for key in ("id", "kind", "owned_by", "nodes")) for model in models],
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (titles, *rows)
    )
    return "\n".join(lines)


def _rows(status: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    rows = status.get(key)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _clean(value: object) -> str:
    """Return ``value`` as text that fills one cell of a table and does nothing else to a terminal."""
    if value is None or value in ("", []):
        return "-"
    if isinstance(value, list):
        return ", ".join(_clean(item) for item in value)
    return "".join(character if character.isprintable() else "?" for character in str(value))


def _duration(seconds: object) -> str:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e10:
        return "-"
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86400
    if minutes == 0:
        return f"{int(seconds)} s"
    if hours == 0:
        return f"{minutes} min {int(seconds) % 60} s"
    if days == 0:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"
