"""The health check of a container: exit with 0 if the node in it is alive, which it also is while it drains.

    python3 health.py [URL]

The URL is that of the node's API; by default it is that of ``HEALTH_URL``, or ``http://127.0.0.1:8080``. A node that
drains answers ``/health`` with 503, so that load balancers look elsewhere. That is no reason to restart it, and an
orchestrator that restarts unhealthy containers would cut what it is finishing.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import urllib.error
import urllib.request

__all__ = ["check"]

#: Seconds; less than the timeout of the check itself.
TIMEOUT = 4.0


def check(url: str) -> str | None:
    """Return what is wrong with the node at ``url``, or ``None`` if it is alive."""
    # No proxy, for the node is in this container. Its certificate is for the names under which clients know it, and not
    # for 127.0.0.1; nothing secret is sent.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(f"{url}/health", timeout=TIMEOUT) as response:
            body = response.read()
    except urllib.error.HTTPError as error:
        body = error.read()
    except OSError as error:
        return str(getattr(error, "reason", error))
    try:
        status = json.loads(body)["status"]
    except (ValueError, KeyError, TypeError):
        return "it is not a node of trio_cluster"
    return None if status in ("ok", "draining") else f"its status is {status}"


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HEALTH_URL", "http://127.0.0.1:8080")
    if (reason := check(target.rstrip("/"))) is not None:
        sys.exit(f"{target}: {reason}")
