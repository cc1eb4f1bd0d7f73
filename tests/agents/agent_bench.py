"""An agent, a server, and a repository to work in: what a test of an agent needs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Final

import attrs
import trio
from agent_cases import FILE, Agent
from scripted_coder import ScriptedCoder
from served import Served, until
from wiretap import Outbound, SeenRequest, Wiretap

__all__ = ["Bench", "Run"]

#: What of the environment an agent gets, besides what its configuration needs.
INHERITED: Final = ("PATH", "LANG", "LC_ALL", "TERM", "SYSTEMROOT")


@attrs.frozen
class Run:
    """What came of one run of an agent.

    Attributes:
        code: its exit code.
        output: what it printed.
        requests: what it sent to the server.
        statuses: the status of every response.
    """

    code: int
    output: str
    requests: list[SeenRequest] = attrs.field(repr=False)
    statuses: list[int]


@attrs.frozen
class Bench:
    """An agent, a server, and a repository to work in."""

    agent: Agent
    program: str
    served: Served
    wiretap: Wiretap
    outbound: Outbound
    folder: Path
    home: Path

    @property
    def file(self) -> str:
        """What is in the file that is to be edited."""
        return (self.folder / FILE).read_text()

    async def add_model(self, coder: ScriptedCoder) -> None:
        """Serve a model, as ``coder``."""
        self.served.back.register_chat("coder", coder.answer)
        await until(lambda: self.served.front.has_model("coder"))

    def keep(self, run: Run) -> None:
        """Write down what the agent has sent, if the environment says where."""
        folder = os.environ.get("AGENTS_SEEN")
        if folder is not None:
            seen = [
                {"method": each.method, "target": each.target, "headers": each.headers, "body": each.body}
                for each in run.requests
            ]
            wanted = sorted(self.outbound.wanted)
            text = json.dumps({"requests": seen, "other machines": wanted}, indent=1)
            (Path(folder) / f"{self.agent.name}.json").write_text(text)

    async def run(self, prompt: str, *, model: str = "coder", mcp: bool = False) -> Run:
        """Run the agent until it ends. It must not take longer than it has patience."""
        settings = self.agent.configure(self.home, self.wiretap.url, model, mcp=mcp)
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment |= {"HOME": str(self.home), "NO_PROXY": "127.0.0.1,localhost", "CI": "1"}
        environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_TERMINAL_PROMPT": "0"}
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
            environment[name] = self.outbound.url
        environment["no_proxy"] = environment["NO_PROXY"]
        with trio.fail_after(self.agent.patience):
            completed = await trio.run_process(
                [self.program, *self.agent.command(prompt, self.home)],
                cwd=self.folder,
                env=environment | settings,
                stdin=b"",
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
        return Run(
            completed.returncode,
            completed.stdout.decode(errors="replace"),
            self.wiretap.requests,
            self.wiretap.statuses,
        )
