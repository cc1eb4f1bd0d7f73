"""A feed of events that a test writes, in the place of ``/cluster/events``, and what the page spends on it."""

from __future__ import annotations

import json
from typing import Any

from watched import wait_until

__all__ = ["SCRIPT", "Feed", "live_request"]

#: Runs in the page before its own scripts. The node is asked for everything else.
SCRIPT = """
const original = window.fetch;
window.fetch = (target, options) => {
  if (!String(target).endsWith("/cluster/events")) return original(target, options);
  const stream = new ReadableStream({ start(controller) { window.feed = controller; } });
  options.signal.addEventListener("abort", () => window.feed.error(new DOMException("", "AbortError")));
  return Promise.resolve(new Response(stream, { headers: { "x-trio-cluster-time": String(Date.now() / 1000) } }));
};
"""


def live_request(number: int, delivered: int = 0, **values: Any) -> dict[str, Any]:
    """Return an item of the kind ``requests``."""
    node, began = f"gpu-{number % 8}", 1_795_000_000.0 + number / 100
    attempt = {
        "attempt": 1, "kind": "first", "node": node, "model": "qwen3-8b", "phase": "streaming", "waits_for": "",
        "began": began, "first_output": began, "delivered": delivered, "error": "",
    }  # fmt: skip
    return {
        "id": str(number), "request_id": f"req_{number:05}", "endpoint": "chat.completions", "model": "qwen3-8b",
        "alias": "", "key": f"team-{number % 20:02}", "client": "10.0.0.1:1234", "began": began, "phase": "streaming",
        "waits_for": "", "ready_at": None, "node": node, "attempts": 1, "first_output": began, "produced": delivered,
        "delivered": delivered, "deadline": None, "calls": [attempt],
    } | values  # fmt: skip


class Feed:
    """Writes events for a page of Playwright that was opened with :data:`SCRIPT`."""

    def __init__(self, page: Any) -> None:
        self._page = page
        wait_until(page, "window.feed !== undefined")
        self._session = page.context.new_cdp_session(page)
        # Processor time of the page's main thread, which does not depend on what else the machine does.
        self._session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def send(self, event: str, **kinds: Any) -> None:
        """Send an event, and wait until the page has shown it."""
        self._page.evaluate(
            "text => { window.staged = new TextEncoder().encode(text); }",
            f"event: {event}\ndata: {json.dumps(kinds)}\n\n",
        )
        self._send_staged()

    def send_many(self, event: str, count: int, delivered: int) -> float:
        """Send an event with many requests, the numbers 0 to ``count - 1``, and wait until the page has shown it.

        Returns:
            The seconds that the page's main thread has computed for it.
        """
        # The texts are made in the page, which is quicker than sending them there.
        self._page.evaluate(
            """([event, count, model]) => {
              const requests = Array.from({ length: count }, (_, number) => ({
                ...model, id: String(number), request_id: `req_${String(number).padStart(5, "0")}`,
                key: `team-${String(number % 20).padStart(2, "0")}`, node: `gpu-${number % 8}`,
              }));
              const data = JSON.stringify({ requests, workers: [], models: [] });
              window.staged = new TextEncoder().encode(`event: ${event}\\ndata: ${data}\\n\\n`);
            }""",
            [event, count, live_request(0, delivered)],
        )
        before = self.spent()
        self._send_staged()
        return self.spent() - before

    def _send_staged(self) -> None:
        self._page.evaluate(
            """async () => {
              window.feed.enqueue(window.staged);
              await new Promise((done) => setTimeout(done, 300));
              await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
            }"""
        )

    def spent(self) -> float:
        """Return the seconds that the page's main thread has computed so far."""
        metrics = self._session.send("Performance.getMetrics")["metrics"]
        return float(next(each["value"] for each in metrics if each["name"] == "TaskDuration"))
