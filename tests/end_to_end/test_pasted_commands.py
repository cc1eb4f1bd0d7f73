"""Every shell command that the pages and the help texts show is run as it stands there, page by page, in order.

A page is a story: what it starts keeps running for the commands that follow, and a second master takes the place of the
first. Only this is changed in a command:

- Hosts are 127.0.0.1, the port 8080 is the one that the page's master has got, and ``--host 127.0.0.1`` is added, since
  tests listen nowhere else.
- The servers behind an engine (ports 8000, 8090, 11434) are a node of the test.
- A command that asks a node, and names none, gets the URL of the page's master.
- The workers, models, calls, certificates and tokens that a command names are there.

What cannot be run is in ``NOT_RUN``, with the reason. A command that is neither run nor listed there fails a test.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import attrs
import httpx
import pytest
import trio
from fork_server import run
from nodes import Node, Nodes, free_pair, open_nodes
from served import until

import trio_cluster
from trio_cluster.cli.arguments import _parser

pytestmark = pytest.mark.processes

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}

#: What is not run, and why. Each pattern must match the beginning of a command in the pages.
NOT_RUN: Final = {
    r"python3 -m venv": "makes an environment; nox does so in every session",
    r"(\.venv/bin/|/opt/trio-cluster/bin/)?pip install": "installs the package; nox does so in every session",
    r"python bench/": "measures for minutes; tests/test_benchmarks.py runs each program for a moment",
    r"python -m build": "builds the package; the release does so",
    r"\.venv/bin/trio-cluster demo": "needs weights; tests/demo and the session engines run the demo",
    r"(\.venv/bin/)?nox": "runs these tests",
    r"trio-cluster worker .*--serve (llama|minilm)": "needs weights; tests/engines run these engines",
    r"trio-cluster worker .*(--serve command:|--config worker\.toml)": (
        "needs model servers; test_on_demand_processes.py has some"
    ),
    r"trio-cluster (load|unload)": "needs a model that runs on demand; tests/cluster/test_cold_models.py has some",
    r"trio-cluster reload": "needs a node with a file of options; tests/cli/test_reload.py has one",
    r"trio-cluster top": "needs a terminal; tests/cli/test_top.py has one",
    r"trio-cluster why": "needs the id of a request; tests/admin/test_story.py has some",
    r"trio-cluster worker (a\.example|--masters-from)": "needs two masters; test_several_masters_processes.py has them",
    r"systemctl (daemon-reload|enable)": "needs a running systemd; test_service_processes.py stands in for it",
    r"vllm serve": "another program, which needs a GPU; never run",
    r"docker run": "another program, a large image; never run",
    r"ssh": "needs another machine",
    r".*TRIO_CLUSTER_DATABASE=postgresql": "needs PostgreSQL; the tests of usage have one where it is installed",
    r".*TRIO_CLUSTER_LIMITS=redis": "needs Redis; the tests of limits have one where it is installed",
    r"curl https://api.example.net": "needs a reverse proxy with TLS; test_proxies.py asks through one",
}

#: Models that answer slowly, so that there is something to show, to cancel and to drain.
SLOW: Final = """\
import trio
from trio_cluster import ClusterServer

server = ClusterServer()


@server.chat("slow")
async def slow(request):
    for _ in range(600):
        yield "word "
        await trio.sleep(0.05)
"""


@attrs.frozen
class Command:
    """A command in a page, with the variables that the lines before it export."""

    page: str
    words: tuple[str, ...]
    variables: dict[str, str] = attrs.field(factory=dict, hash=False)

    def __str__(self) -> str:
        return shlex.join(self.words)

    @property
    def why_not(self) -> str | None:
        """Why it is not run; ``None`` if it is."""
        return next((reason for pattern, reason in NOT_RUN.items() if self.matches(pattern)), None)

    def matches(self, pattern: str) -> bool:
        """Tell whether a pattern matches the command, or the variables of its environment."""
        variables = "".join(f"{name}={value} " for name, value in self.variables.items())
        return any(re.match(pattern, text) for text in (" ".join(self.words), variables))


def commands_of(page: str) -> Iterator[Command]:
    """Yield the commands of a page, in order. What is exported holds for all that follows, as in one shell."""
    text = PAGES[page].read_text(encoding="utf-8")
    variables: dict[str, str] = {}
    for fence in re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", text, re.M | re.S):
        for line in fence.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["export"]:
                variables.update(
                    (name, value) for name, _, value in (word.partition("=") for word in words[1:])
                )
                continue
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield Command(page, tuple(words[:end]), dict(variables))
                words = words[end + 1 :]


COMMANDS: Final = [command for page in PAGES for command in commands_of(page)]


def applications_of(page: str) -> dict[str, str]:
    """Return the Python programs that a page tells its readers to write, by the names of their files."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = re.findall(r"(?:`(\w+\.py)`[^`]*)?^```python\n(.*?)^```", text, re.M | re.S)
    first = PAGES["README.md"].read_text(encoding="utf-8")
    programs = {"models.py": re.findall(r"^```python\n(.*?)^```", first, re.M | re.S)[0]}
    programs.update((name, code) for name, code in found if name)
    return programs


@attrs.define
class Story:
    """The processes of one page."""

    page: str
    nodes: Nodes
    upstream: Node
    master: Node | None = None
    calls: list[trio.Process] = attrs.field(factory=list)
    token: str = ""
    """The last token of an invitation."""
    key: str = "sk-for-clients"
    """The first key that was made."""

    @property
    def variables(self) -> dict[str, str]:
        """Variables that keep the nodes' state, and a trusted certificate, in the directory of the test."""
        folder = self.nodes.directory
        return {"XDG_STATE_HOME": str(folder / "state"), "SSL_CERT_FILE": str(folder / "trusted.pem")}

    async def run(self, command: Command) -> None:
        """Run a command as the page has it."""
        program, *words = command.words
        if program == "curl":
            await self._curl(words, command.variables)
            return
        if program == "python" and words[0] in applications_of(self.page):
            await self._start_master(words[0], words[1:], {**command.variables, **self.variables})
            return
        if program == "systemctl":
            await self._systemctl(words)
            return
        assert program.endswith("trio-cluster"), f"neither run nor listed in NOT_RUN: {command}"
        name, words = words[0], words[1:]
        if name in ("master", "run"):
            await self._start_master(name, words, {**command.variables, **self.variables})
        elif name == "worker":
            await self._start_worker(words, {**command.variables, **self.variables})
        elif name in ("backup", "restore", "install-service"):
            await self._run_here(name, words, {**command.variables, **self.variables})
        else:
            await self._ask(name, words, {**command.variables, **self.variables})

    async def _systemctl(self, words: list[str]) -> None:
        """Do to the master of the page what would be done to the one of the machine."""
        action, *units = words
        assert units == ["trio-cluster-master.socket", "trio-cluster-master.service"]
        master = await self.the_master()
        if action == "stop":
            master.send(signal.SIGTERM)
            assert await master.exit_code() == 0
        else:
            assert action == "start"
            self.master = await self.nodes.start("master", master.port, variables=self.variables)

    async def _run_here(self, name: str, words: list[str], variables: dict[str, str]) -> None:
        """Run a command that writes files of this machine: they are in the directory of the test."""
        master = await self.the_master()
        state = f"{variables['XDG_STATE_HOME']}/trio_cluster/master-{master.port}"
        words = [word.replace("/var/lib/trio-cluster-master", state) for word in words]
        words = [re.sub("^/backup/", f"{self.nodes.directory}/", word) for word in words]
        if name == "install-service":
            words = ["--manager", "systemd", "--prefix", "files", "--program", "/bin/true", *words]
        await self._execute(name, words, variables)

    async def the_master(self) -> Node:
        if self.master is None:
            self.master = await self.nodes.start("master", free_pair(), variables=self.variables)
        return self.master

    async def _start_master(self, name: str, words: list[str], variables: dict[str, str]) -> None:
        for node in self.nodes.all:
            if node is not self.upstream and node.process.returncode is None:
                node.send(signal.SIGINT)
                node.send(signal.SIGINT)
                await node.exit_code()
        # The state of a master has its place by the port.
        words = [(str(free_pair()) if word in ("8080", "8443") else word) for word in words]
        if "--tls-cert" in words:
            self._make_certificate()
        self.master = await self.nodes.start(name, *words, variables=variables)

    async def _start_worker(self, words: list[str], variables: dict[str, str]) -> None:
        master = await self.the_master()
        before = await self._models(variables)
        options = list(words) if words[0].startswith("-") else words[2:]
        spec = re.compile(r"http://127\.0\.0\.1:\d+/v1")
        options = [spec.sub(f"{self.upstream.url}/v1", word) for word in options]
        if "--join" in options:
            options[options.index("--join") + 1] = self.token
        else:
            options = ["127.0.0.1", str(master.port), *options]
        await self.nodes.start("worker", *options, variables=variables)

        async def has_new_models() -> bool:
            return await self._models(variables) > before

        await until(has_new_models, within=10)

    async def _models(self, variables: dict[str, str]) -> set[str]:
        master = await self.the_master()
        key = variables.get("TRIO_CLUSTER_API_KEY", self.key).replace("tc-...", self.key)
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(trust_env=False, verify=False, headers=headers) as http:
            answer = (await http.get(f"{url_of(master)}/v1/models")).json()
        return {model["id"] for model in answer["data"]}

    async def _ask(self, name: str, words: list[str], variables: dict[str, str]) -> None:
        """Run a command that asks the master."""
        master = await self.the_master()
        words = [re.sub(r"^https?://[\w.-]+:8080", url_of(master), word) for word in words]
        if not any(word.startswith("http") for word in words):
            words.append(url_of(master))
        if name == "revoke":
            await self._have_invited(words[0], variables)
        if name == "drain":
            await self._have_worker(words[0])
        if name == "cancel":
            await self._have_worker("slow-worker")
            await self._have_call(words[0])
        out = await self._execute(name, words, variables)
        if name == "keys" and self.key == "sk-for-clients":
            (self.key,) = re.findall(r"\btc-\S+", out)
        if name == "invite":
            (self.token,) = re.findall(r"tcj-\S+", out)

    async def _execute(self, name: str, words: list[str], variables: dict[str, str]) -> str:
        """Run a command to its end, and return what it has printed."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("TRIO_CLUSTER_")}
        environ |= {"PYTHONPATH": str(Path(trio_cluster.__file__).parents[1]), **variables}
        # A page shows keys that begin so, and are shorter.
        environ = {name: value.replace("tc-...", self.key) for name, value in environ.items()}
        with trio.fail_after(30):
            completed = await run(["-m", "trio_cluster", name, *words], cwd=self.nodes.directory, env=environ)
        assert completed.returncode == 0, completed.stderr.decode()
        return completed.stdout.decode()

    async def _have_invited(self, name: str, variables: dict[str, str]) -> None:
        """Have a worker join with a token, under a name."""
        await self._ask("invite", ["--name", name], variables)
        (self.nodes.directory / "slow.py").write_text(SLOW)
        await self._start_worker(["--join", self.token, "--app", "slow:server"], variables)

    def _make_certificate(self) -> None:
        """Make a certificate for this machine, which commands trust from now on."""
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ]
        command += ["-keyout", "privkey.pem", "-out", "fullchain.pem", "-days", "2", "-subj", "/CN=test"]
        command += ["-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run(command, check=True, capture_output=True, cwd=self.nodes.directory)
        shutil.copy(self.nodes.directory / "fullchain.pem", self.nodes.directory / "trusted.pem")

    async def _have_worker(self, name: str) -> None:
        master = await self.the_master()
        async with httpx.AsyncClient(trust_env=False) as http:
            status = (await http.get(f"{url_of(master)}/cluster/status")).json()
        if name not in {worker["id"] for worker in status["workers"]}:
            (self.nodes.directory / "slow.py").write_text(SLOW)
            await self.nodes.start("worker", "127.0.0.1", master.port, "--app", "slow:server", "--name", name)

    async def _have_call(self, request_id: str) -> None:
        master = await self.the_master()
        body = {"model": "slow", "messages": [{"role": "user", "content": "x"}], "stream": True}
        command = [
            "curl",
            "-sN",
            f"{url_of(master)}/v1/chat/completions",
            "-H",
            f"x-request-id: {request_id}",
        ]
        command += ["-H", "content-type: application/json", "-d", json.dumps(body)]
        process = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL)
        self.calls.append(process)

        async def is_there() -> bool:
            nonlocal process
            if process.poll() is not None:
                # The worker had not linked yet to the one of the master's processes that was asked.
                process = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL)
                self.calls.append(process)
            async with httpx.AsyncClient(trust_env=False) as http:
                calls = (await http.get(f"{url_of(master)}/cluster/calls")).json()["calls"]
            return request_id in {call["request_id"] for call in calls}

        await until(is_there, within=5)

    async def _curl(self, words: list[str], variables: dict[str, str]) -> None:
        master = await self.the_master()
        key = variables.get("TRIO_CLUSTER_API_KEY", self.key).replace("tc-...", self.key)
        words = [re.sub(r"\$(TRIO_CLUSTER_API_)?KEY\b", key, word) for word in words]
        url, state = url_of(master), self.variables["XDG_STATE_HOME"]
        words = [re.sub(r"^https?://[\w.-]+:8080", url, word) for word in words]
        words = [
            re.sub(r"^~/\.local/state/(.*)-8080/", rf"{state}/\1-{master.port}/", word) for word in words
        ]
        authority = f"{state}/trio_cluster/master-{master.port}/ca.pem"
        words = [authority if word == "ca.pem" else word for word in words]
        assert any(word.startswith(url) for word in words), words
        with trio.fail_after(30):
            completed = await trio.run_process(
                ["curl", "--fail-with-body", "--noproxy", "*", "-sS", *words],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        assert completed.returncode == 0, completed.stdout + completed.stderr
        assert completed.stdout
        if '"stream": true' in " ".join(words):
            assert completed.stdout.endswith(b"data: [DONE]\n\n")


def url_of(master: Node) -> str:
    """Return the URL of a master as it has logged it itself."""
    (entry,) = master.logged("serving")
    url: str = entry["url"]
    return url


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    """Where processes are started."""
    async with open_nodes(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS if not command.why_not}))
async def test_the_commands_of_a_page_do_what_it_says(page: str, nodes: Nodes) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    if page == "tls.md":
        pytest.importorskip("cryptography", reason="the extra tls is not installed")
    for name, code in applications_of(page).items():
        (nodes.directory / name).write_text(code)
    for code in re.findall(r"^```toml\n(.*?)^```", PAGES["cluster.md"].read_text("utf-8"), re.M | re.S)[:1]:
        (nodes.directory / "cluster.toml").write_text(code)
    story = Story(page, nodes, await nodes.start("run", 0, models="count who"))
    try:
        for command in commands_of(page):
            if command.why_not is None:
                print(command)
                await story.run(command)
    finally:
        for call in story.calls:
            call.kill()
            with trio.CancelScope(shield=True):
                await call.wait()


def test_every_reason_not_to_run_a_command_is_needed() -> None:
    unused = [pattern for pattern in NOT_RUN if not any(each.matches(pattern) for each in COMMANDS)]
    assert unused == []


def test_help_shows_no_command_that_no_test_runs() -> None:
    parser = _parser()
    (commands,) = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    for each in (parser, *commands.choices.values()):
        usage, _, rest = each.format_help().partition("\n\n")
        assert usage.startswith("usage: trio-cluster")
        assert re.findall(r"^\s*\$?\s*(?:curl|trio-cluster|pip) .*", rest, re.M) == [], usage
