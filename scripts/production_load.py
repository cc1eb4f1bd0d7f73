"""Clients that ask, and ask again, while a cluster is changed behind them. ``production_walk.py`` starts them.

Each request has a connection of its own, and none is repeated: what a client would notice is counted here. What there
is so far stands in a file, which is replaced as a whole. SIGTERM lets the requests that run be answered, and ends.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import sys
import time
from pathlib import Path

import httpx
import trio

#: Clients that ask for streams, and clients that do not.
STREAMING, PLAIN = 4, 4
#: Seconds after which an answer is a slow one; it takes 0.4 s by itself.
SLOW = 2.0
WORDS = [f"word{i}" for i in range(12)]
TEXT = " ".join(WORDS)


class Load:
    """Clients, and all that they have noticed."""

    def __init__(self, url: str, key: str, authority: str, report: Path) -> None:
        self.url, self.key, self.report = url, key, report
        self.context = ssl.create_default_context(cafile=authority)
        self.answered = {"streams": 0, "plain": 0}
        self.failures: list[str] = []
        #: Answers that took long: when they were asked for, which kind, and how many seconds.
        self.slow: list[tuple[str, str, float]] = []
        self.over = False

    async def ask(self, kind: str) -> None:
        """Ask again and again."""
        headers = {"authorization": f"Bearer {self.key}", "connection": "close"}
        body = {"model": "words", "stream": kind == "streams", "messages": [{"role": "user", "content": "?"}]}
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, verify=self.context, timeout=30, trust_env=False
        ) as client:
            while not self.over:
                begun = time.monotonic()
                try:
                    answer = await client.post("/v1/chat/completions", json=body)
                    problem = self._problem(kind, answer)
                except httpx.HTTPError as error:
                    problem = repr(error)
                if (seconds := round(time.monotonic() - begun, 1)) > SLOW:
                    self.slow.append((time.strftime("%H:%M:%S"), kind, seconds))
                if problem:
                    self.failures.append(f"{time.strftime('%H:%M:%S')} {kind}: {problem}")
                else:
                    self.answered[kind] += 1

    @staticmethod
    def _problem(kind: str, answer: httpx.Response) -> str | None:
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]}"
        if kind == "plain":
            text = answer.json()["choices"][0]["message"]["content"]
            return None if text == TEXT else f"another text: {text!r}"
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        if events[-1] != "[DONE]":
            return f"a stream without its end: {answer.text[-200:]!r}"
        choices = [choice for event in events[:-1] for choice in json.loads(event).get("choices", ())]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        return None if text == TEXT else f"another text: {text!r}"

    async def write(self) -> None:
        """Write what there is so far, twice a second."""
        while True:
            self.write_now()
            await trio.sleep(0.5)

    def write_now(self) -> None:
        """Write what there is so far."""
        told = {"answered": self.answered, "failures": self.failures, "slow": self.slow}
        part = self.report.with_suffix(".part")
        part.write_text(json.dumps(told))
        part.replace(self.report)

    async def run(self) -> None:
        """Ask until SIGTERM."""
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async with trio.open_nursery() as writing:
                writing.start_soon(self.write)
                async with trio.open_nursery() as asking:
                    for kind, clients in (("streams", STREAMING), ("plain", PLAIN)):
                        for _ in range(clients):
                            asking.start_soon(self.ask, kind)
                    async for _ in signals:
                        break
                    self.over = True
                writing.cancel_scope.cancel()
        self.write_now()


if __name__ == "__main__":
    url, authority, report = sys.argv[1:]
    trio.run(Load(url, os.environ["KEY"], authority, Path(report)).run)
