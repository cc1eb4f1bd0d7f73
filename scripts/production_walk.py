"""From nothing to production: the walk of ``docs/production.md``, on machines that are network namespaces.

``python scripts/production_walk.py FOLDER`` prints each command before it runs it, checks what has come of each step,
and removes everything but FOLDER at the end, which keeps the packages, the logs and the states. It needs root, ``ip``,
nginx, openssl, curl, git and systemd's programs, and says which of them is missing; systemd itself need not run.

The machines are ``a`` and ``b``, with a master each and three workers, ``front`` with nginx and the clients, which is
the switch between them, too, and ``c``, on which ``a`` is restored. They have the disk in common: each has a folder of
its own, and a file goes from one to the other with ``cp``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from release_checks import previous_commit

ROOT: Final = Path(__file__).resolve().parents[1]
ADDRESSES: Final = {"a": "10.77.0.1", "b": "10.77.0.2", "front": "10.77.0.3", "c": "10.77.0.4"}
KEY: Final = "sk-for-admins"
TOKEN: Final = "secret-for-workers"

MODELS: Final = """\
import trio
from trio_cluster import ClusterServer

server = ClusterServer()


@server.chat("words")
async def words(request):
    for i in range(12):
        yield f"word{i}" if i == 0 else f" word{i}"
        await trio.sleep(0.03)
"""

#: What nginx needs around the part that a page shows. (Another user would not get into a folder that is private.)
NGINX: Final = """\
user root;
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    log_format walk '$status $upstream_status';
    access_log {folder}/access.log walk;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {text}
}}
"""


def missing() -> list[str]:
    """Return what this machine lacks for the walk."""
    programs = ("ip", "nginx", "openssl", "curl", "git", "systemd-analyze", "systemd-socket-activate")
    lacking = [name for name in programs if shutil.which(name) is None]
    return lacking if os.geteuid() == 0 else ["root", *lacking]


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def code_block(page: str, beginning: str) -> str:
    """Return the only code block of a page in docs/ that begins so."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w+\n(.*?)^```", text, re.M | re.S)
    (found,) = [block for block in blocks if block.startswith(beginning)]
    return str(found)


def nginx_configuration(folder: Path, *changes: tuple[str, str]) -> str:
    """Return the configuration of docs/deployment.md for two masters, with some changes of its text."""
    text = code_block("deployment.md", "upstream masters {")
    live = "/etc/letsencrypt/live/api.example.net"
    certificate = (
        (f"{live}/fullchain.pem", f"{folder}/cert.pem"),
        (f"{live}/privkey.pem", f"{folder}/key.pem"),
    )
    for old, new in (*certificate, *changes):
        if old not in text:
            raise Failed(f"not in docs/deployment.md: {old}")
        text = text.replace(old, new)
    return NGINX.format(folder=folder, text=text)


def tls_to_masters(folder: Path) -> tuple[str, str]:
    """Return the change of nginx's configuration for masters with TLS."""
    text = code_block("deployment.md", "proxy_pass https://masters;").rstrip()
    return "proxy_pass http://masters;", text.replace("/etc/nginx/trio-cluster-ca.pem", f"{folder}/ca.pem")


class Failed(Exception):
    """A step has not come out as it should."""


def until(description: str, check: Callable[[], bool], within: float = 60) -> None:
    """Wait until something is so."""
    end = time.monotonic() + within
    while not check():
        if time.monotonic() > end:
            raise Failed(f"not within {within} s: {description}")
        time.sleep(0.2)


def variables_in(text: str) -> dict[str, str]:
    """Return the variables of a text such as ``A=1 B=2``."""
    found = (word.partition("=") for word in shlex.split(text))
    return {name: value for name, _, value in found}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and wait until it has."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    if process.wait(timeout=60) != 0:
        raise Failed(f"ended with {process.returncode}: {process.args!r}")


class Machine:
    """A network namespace with a folder.

    Attributes:
        processes: what runs on it, by a name.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder / name
        self.namespace = f"walk-{name}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.folder.mkdir()
        (self.folder / "models.py").write_text(MODELS)
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("TRIO_CLUSTER_") and not name.lower().endswith("_proxy")
        }
        kept.pop("PYTHONPATH", None)
        self.of_services = kept | {"PATH": f"{self.folder}/opt/bin:{kept['PATH']}"}
        self.environment = self.of_services | {
            "TRIO_CLUSTER_API_KEY": KEY,
            "TRIO_CLUSTER_CLUSTER_TOKEN": TOKEN,
        }

    def command(self, words: tuple[str, ...]) -> list[str]:
        """Return a command that runs on this machine."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def run(self, *words: str | Path, show: bool = True, quiet: bool = False) -> str:
        """Run a command to its end, and return what it has printed; print both."""
        command = tuple(map(str, words))
        if show:
            say(f"{self.name}# {shlex.join(command)}")
        done = subprocess.run(
            self.command(command), cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise Failed(f"{shlex.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        if show and not quiet:
            for line in (done.stdout + done.stderr).splitlines():
                say(f"   {line}")
        return done.stdout

    def start(self, name: str, words: list[str], *, environment: dict[str, str] | None = None) -> None:
        """Start a process; what it logs is in ``NAME.log``."""
        say(f"{self.name}# {shlex.join(words)} &")
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command(tuple(words)),
                cwd=self.folder,
                env=environment or self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self, name: str) -> None:
        """Stop a process as a service manager does."""
        say(f"{self.name}# kill -TERM {self.processes[name].pid}   # {name}")
        stop(self.processes.pop(name))

    def use(self, installation: Path) -> None:
        """Install the package: ``opt`` is the environment of a version."""
        (self.folder / "opt").unlink(missing_ok=True)
        (self.folder / "opt").symlink_to(installation)
        self.run("trio-cluster", "--version")

    # Services

    @property
    def state(self) -> Path:
        """What systemd's ``%S`` is."""
        return self.folder / "system/var/lib"

    def install_service(self, *words: str) -> None:
        """Write a unit, and let systemd verify it."""
        self.run("trio-cluster", "install-service", "--prefix", self.folder / "system", *words)
        name = words[words.index("--unit") + 1] if "--unit" in words else f"trio-cluster-{words[0]}"
        self.run("systemd-analyze", "verify", self.folder / f"system/etc/systemd/system/{name}.service")

    def service(self, name: str) -> tuple[list[str], dict[str, str]]:
        """Return the command of a unit and its variables; make its directories and credentials, as systemd does."""
        units = self.folder / "system/etc/systemd/system"
        lines = [line.partition("=") for line in (units / f"{name}.service").read_text().splitlines()]
        state, cache = self.state, self.folder / "system/var/cache"
        credentials = self.folder / "credentials" / name
        credentials.mkdir(parents=True, exist_ok=True)
        words: list[str] = []
        environment = {"CREDENTIALS_DIRECTORY": str(credentials)}
        for key, _, value in lines:
            value = value.replace("%S", str(state)).replace("%C", str(cache))
            if key == "StateDirectory":
                (state / value).mkdir(parents=True, exist_ok=True, mode=0o700)
            elif key == "CacheDirectory":
                (cache / value).mkdir(parents=True, exist_ok=True, mode=0o700)
            elif key == "LoadCredential":
                credential, _, path = value.partition(":")
                shutil.copy(f"{self.folder}/system{path}", credentials / credential)
            elif key == "EnvironmentFile":
                environment |= variables_in(Path(f"{self.folder}/system{value}").read_text())
            elif key == "Environment":
                environment |= variables_in(value)
            elif key == "ExecStart":
                words = shlex.split(value)
        words = [re.sub(r"\$\{(\w+)\}", lambda found: environment[found[1]], word) for word in words]
        socket = units / f"{name}.socket"
        if socket.exists():
            ports = re.findall(r"^ListenStream=(.*)$", socket.read_text(), re.M)
            given = [f"--setenv={key}={value}" for key, value in environment.items()]
            words = ["systemd-socket-activate", *(f"--listen={port}" for port in ports), *given, *words]
        return words, environment

    def start_service(self, name: str) -> None:
        """Start what a unit says."""
        words, environment = self.service(name)
        # The variables with secrets are not there: a service has them in files.
        self.start(name, words, environment=self.of_services | environment)
        if words[0] == "systemd-socket-activate":
            # The program starts with the first connection; systemd would start it at once, as it is enabled.
            url = f"http://{ADDRESSES[self.name]}:8080/health"
            self.run("curl", "-s", "-o", "/dev/null", "--retry", "9", "--retry-connrefused", url, show=False)


class Walk:
    """All machines, and the clients' view of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old, self.new = folder / "old", folder / "new"
        self.machines: dict[str, Machine] = {}
        self.report = folder / "load.json"
        self.restarts = 0
        self.steps: list[tuple[str, float, int]] = []

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print the title of a step, and at its end how long it took and what the clients noticed."""
        say(f"\n== {title} ({time.strftime('%H:%M:%S')})")
        begun, answered = time.monotonic(), sum(self.clients()["answered"].values())
        yield
        seconds, told = time.monotonic() - begun, self.clients()
        answers = sum(told["answered"].values()) - answered
        self.steps.append((title, seconds, answers))
        clients = (
            f"; {answers} requests answered meanwhile, {len(told['failures'])} failed so far"
            if answers
            else ""
        )
        say(f"-- {seconds:.1f} s{clients}")

    # What runs before anything is served

    def install(self) -> None:
        """Build the wheels of 0.1.0 and of this checkout, and install each into an environment of its own."""
        for name, tree, extras in (("old", previous_commit(ROOT), ""), ("new", "HEAD", "[tls]")):
            here, built = self.folder / name, self.folder / f"{name}.commit"
            commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", tree], text=True)
            if built.exists() and built.read_text() == commit:
                say(f"{name} is there already: {here}")
                continue
            sources, wheels = self.folder / f"src-{name}", self.folder / f"wheels-{name}"
            for folder in (sources, wheels, here):
                shutil.rmtree(folder, ignore_errors=True)
            command(["git", "clone", "-q", "--no-checkout", str(ROOT), str(sources)])
            command(["git", "-C", str(sources), "checkout", "-q", commit.strip()])
            command([sys.executable, "-m", "venv", str(here)])
            pip = [str(here / "bin/pip"), "-q", "--disable-pip-version-check"]
            command([*pip, "wheel", "--no-deps", "-w", str(wheels), str(sources)])
            (wheel,) = wheels.glob("*.whl")
            command([*pip, "install", f"{wheel}{extras}"])
            built.write_text(commit)
        clients = self.folder / "clients"
        if not (clients / "bin/httpx").exists():
            command([sys.executable, "-m", "venv", str(clients)])
            command(
                [str(clients / "bin/pip"), "-q", "--disable-pip-version-check", "install", "httpx", "trio"]
            )

    def connect(self) -> None:
        """Make the machines: each has a cable to ``front``, and knows the names of all."""
        hosts = "127.0.0.1 localhost\n10.77.0.1 a.lan\n10.77.0.2 b.lan\n10.77.0.3 api.example.net\n"
        for name in ADDRESSES:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            machine = self.machines[name] = Machine(name, self.folder)
            settings = Path("/etc/netns") / machine.namespace
            settings.mkdir(parents=True)
            (settings / "hosts").write_text(hosts)
            command(["ip", "netns", "add", machine.namespace])
            machine.run("ip", "link", "set", "lo", "up", show=False)
        front = self["front"]
        front.run("ip", "link", "add", "switch", "type", "bridge")
        front.run("ip", "addr", "add", "10.77.0.3/24", "dev", "switch")
        front.run("ip", "link", "set", "switch", "up")
        for name in ("a", "b", "c"):
            other_end = ("peer", "name", "eth0", "netns", self[name].namespace)
            front.run("ip", "link", "add", f"to-{name}", "type", "veth", *other_end)
            front.run("ip", "link", "set", f"to-{name}", "master", "switch", "up")
            self[name].run("ip", "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
            self[name].run("ip", "link", "set", "eth0", "up")

    def rename(self, address: str, name: str) -> None:
        """Let a name be that of another address, on all machines."""
        say(f"in DNS (here: /etc/hosts of each machine): {name} is {address} now")
        for machine in self.machines.values():
            path = Path("/etc/netns") / machine.namespace / "hosts"
            # The file itself is what is mounted in the namespaces: it has to be the same one.
            path.write_text(
                re.sub(rf"^\S+ {re.escape(name)}$", f"{address} {name}", path.read_text(), flags=re.M)
            )

    def close(self) -> None:
        """End all processes, and remove the namespaces."""
        for machine in self.machines.values():
            for process in machine.processes.values():
                # nginx has processes of its own, which would stay.
                os.killpg(process.pid, signal.SIGKILL)
        for machine in self.machines.values():
            subprocess.run(["ip", "netns", "del", machine.namespace], check=False)
            shutil.rmtree(Path("/etc/netns") / machine.namespace, ignore_errors=True)

    # nginx

    def configure_nginx(self, *changes: tuple[str, str]) -> None:
        """Write the configuration of docs/deployment.md, with some changes of its text."""
        folder = self["front"].folder
        for old, new in changes:
            say("nginx.conf: " + " ".join(f"{old}  ->  {new}".split()))
        (folder / "nginx.conf").write_text(nginx_configuration(folder, *changes))

    def nginx(self, *words: str) -> list[str]:
        """Return a command of nginx."""
        folder = self["front"].folder
        return [
            "nginx",
            "-p",
            str(folder),
            "-e",
            str(folder / "error.log"),
            "-c",
            str(folder / "nginx.conf"),
            *words,
        ]

    def reload_nginx(self) -> None:
        """Let nginx read its configuration; what its old processes have begun, they finish."""
        self["front"].run(*self.nginx("-s", "reload"))

    # The clients

    def start_clients(self) -> None:
        """Start the clients."""
        front = self["front"]
        python = str(self.folder / "clients/bin/python")
        script = str(ROOT / "scripts/production_load.py")
        words = [python, script, "https://api.example.net", str(front.folder / "cert.pem"), str(self.report)]
        front.start("clients", words, environment=front.environment | {"KEY": KEY})
        self.go_on(50)

    def clients(self) -> Any:
        """Return what the clients have noticed."""
        if not self.report.exists():
            return {"answered": {}, "failures": [], "slow": []}
        return json.loads(self.report.read_text())

    def go_on(self, answers: int = 30) -> None:
        """Wait for so many more answers."""
        enough = sum(self.clients()["answered"].values()) + answers
        until(f"{answers} more answers", lambda: sum(self.clients()["answered"].values()) >= enough)

    # Looking

    def status(self, machine: Machine, url: str, *authority: str) -> Any:
        """Return the status of a node, or ``None`` if it does not answer."""
        words = [
            "curl",
            "-sf",
            "-m",
            "5",
            "-H",
            f"authorization: Bearer {KEY}",
            *authority,
            f"{url}/cluster/status",
        ]
        done = subprocess.run(machine.command(tuple(words)), env=machine.environment, capture_output=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def await_workers(self, name: str, workers: set[str], *, tls: bool = False, at: str = "") -> None:
        """Wait until the master of a machine serves the model with these workers, and no others."""
        at = at or name
        authority = ("--cacert", str(self[name].state / "trio-cluster-master/ca.pem")) if tls else ()
        url = f"{'https' if tls else 'http'}://{at}.lan:8080"

        def linked() -> bool:
            told = self.status(self[name], url, *authority)
            if told is None:
                return False
            here = told["workers"]
            return {each.get("name") or each["id"] for each in here if "words" in each["models"]} == workers

        until(f"the workers of {at} are {sorted(workers)}", linked)
        say(f"{at}.lan serves with {', '.join(sorted(workers)) or 'no worker'}")


def command(words: list[str]) -> None:
    """Run a command of this machine itself, and print it."""
    say(f"# {shlex.join(words)}")
    subprocess.run(words, check=True)


BOTH: Final = "a.lan:8080,b.lan:8080"
WORKERS: Final = {"w1": "a", "w2": "b", "w3": "b"}


def walk(way: Walk) -> None:
    """Go the whole way."""
    with way.step("Install from the wheels"):
        way.install()
    with way.step("Machines"):
        way.connect()
    a, b, front = way["a"], way["b"], way["front"]

    with way.step("0.1.0: two masters, three workers"):
        for name in ("a", "b"):
            way[name].use(way.old)
            words = [
                "trio-cluster",
                "master",
                "8080",
                "--host",
                ADDRESSES[name],
                "--on-conflict",
                "replicate",
            ]
            way[name].start("master", words)
        for name, host in WORKERS.items():
            words = [
                "trio-cluster",
                "worker",
                f"{host}.lan",
                "8080",
                "--app",
                "models:server",
                "--name",
                name,
            ]
            way[host].start(name, words)
        way.await_workers("a", {"w1"})
        way.await_workers("b", {"w2", "w3"})

    with way.step("nginx in front, with TLS for clients"):
        subject = ["-subj", "/CN=api.example.net", "-addext", "subjectAltName=DNS:api.example.net"]
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "key.pem"]
        front.run("openssl", "req", "-x509", *key, "-out", "cert.pem", "-days", "2", *subject, quiet=True)
        passing_on = ("error http_503", "error http_503 http_404")
        way.configure_nginx(passing_on)
        front.start("nginx", way.nginx())
        front.run(
            *("curl", "-sS", "--retry", "5", "--retry-connrefused", "--cacert", "cert.pem"),
            *("-H", f"authorization: Bearer {KEY}", "https://api.example.net/v1/models"),
        )

    with way.step("Clients begin"):
        way.start_clients()

    with way.step("Workers: 0.1.0 -> 0.2.0, one by one"):
        for name in ("a", "b"):
            say(f"{name}: pip install --upgrade; what runs goes on with what it has loaded")
            way[name].use(way.new)
        new: set[str] = set()
        for name, host in WORKERS.items():
            way[host].stop(name)
            unit = f"trio-cluster-{name}"
            way[host].install_service(
                "--unit", unit, "worker", BOTH, "--app", "models:server", "--name", name
            )
            way[host].start_service(unit)
            way.restarts += 1
            new.add(name)
            way.await_workers("a", new)
            way.await_workers("b", new | {each for each in ("w2", "w3") if each not in new})
            way.go_on()

    with way.step("Masters: 0.1.0 -> 0.2.0, one by one"):
        for name in ("a", "b"):
            machine = way[name]
            machine.stop("master")
            options = ("--host", ADDRESSES[name], "--on-conflict", "replicate")
            machine.install_service("master", "8080", *options)
            machine.start_service("trio-cluster-master")
            way.restarts += 1
            way.await_workers(name, new)
            way.go_on()
        a.run("trio-cluster", "status", "http://a.lan:8080")

    with way.step("nginx: 404 is the answer again"):
        way.configure_nginx()
        way.reload_nginx()
        way.go_on()

    tls = tls_to_masters(front.folder)
    with way.step("TLS, first half: master a and the workers w1 and w2, while b serves"):
        way.configure_nginx(("a.lan:8080 max_fails=0", "a.lan:8080 max_fails=0 down"))
        way.reload_nginx()
        way.go_on()
        a.stop("trio-cluster-master")
        switch_master(way, "a")
        way.await_workers("a", set(), tls=True)
        for name in ("w1", "w2"):
            switch_worker(way, name)
            way.await_workers("a", {"w1", "w2"} if name == "w2" else {"w1"}, tls=True)
            way.await_workers("b", new - ({"w1", "w2"} if name == "w2" else {"w1"}))
            way.go_on()

    with way.step("TLS, second half: the worker w3 and master b, while a serves"):
        front.run("cp", a.state / "trio-cluster-master/ca.pem", ".")
        way.configure_nginx(("b.lan:8080 max_fails=0", "b.lan:8080 max_fails=0 down"), tls)
        way.reload_nginx()
        way.go_on()
        switch_worker(way, "w3")
        way.await_workers("a", new, tls=True)
        b.stop("trio-cluster-master")
        b.run(
            "cp",
            a.state / "trio-cluster-master/authority.json",
            b.state / "trio-cluster-master/authority.json",
        )
        switch_master(way, "b")
        for name in ("a", "b"):
            way.await_workers(name, new, tls=True)
        way.configure_nginx(tls)
        way.reload_nginx()
        way.go_on(100)
        a.run(*STATUS, "https://a.lan:8080", "--state-dir", a.state / "trio-cluster-master")

    with way.step("The clients end"):
        stop(front.processes.pop("clients"))
        told = way.clients()
        say(json.dumps(told))
        lines = (front.folder / "access.log").read_text().splitlines()
        passed_on = sum("," in line for line in lines)
        say(f"nginx: {len(lines)} requests, {passed_on} of them passed on to the other master")

    with way.step("A key, and a backup while a serves"):
        state = ("--state-dir", a.state / "trio-cluster-master")
        said = a.run("trio-cluster", "keys", "create", "app", "https://a.lan:8080", *state)
        (key,) = re.findall(r"\btc-\S+", said)
        ask(a, "https://a.lan:8080", key)
        a.run("trio-cluster", "usage", "https://a.lan:8080", *state)
        a.run("trio-cluster", "backup", "master.tar.gz", "--state-dir", a.state / "trio-cluster-master")

    with way.step("a is lost, and restored on c"):
        for name in list(a.processes):
            say(f"a# kill -KILL {a.processes[name].pid}   # {name}")
            a.processes[name].kill()
            a.processes.pop(name).wait()
        a.run("ip", "link", "set", "eth0", "down")
        c = way["c"]
        c.use(way.new)
        c.run("cp", a.folder / "master.tar.gz", ".")
        c.install_service(*master_words("c", "a.lan"))
        c.run("trio-cluster", "restore", "master.tar.gz", "--state-dir", c.state / "trio-cluster-master")
        c.start_service("trio-cluster-master")
        way.rename(ADDRESSES["c"], "a.lan")
        way.await_workers("c", {"w2", "w3"}, tls=True, at="a")
        way.reload_nginx()
        state = ("--state-dir", c.state / "trio-cluster-master")
        ask(c, "https://a.lan:8080", key)
        c.run("trio-cluster", "usage", "https://a.lan:8080", *state)
        c.run(*STATUS, "https://a.lan:8080", *state)
        front.run(
            *("curl", "-sS", "--cacert", "cert.pem", "-H", f"authorization: Bearer {KEY}"),
            "https://api.example.net/v1/models",
        )
    say("")
    for title, seconds, answers in way.steps:
        say(f"{seconds:6.1f} s  {answers:5} answers  {title}")
    total = told["answered"]
    slow = [seconds for _, _, seconds in told["slow"]]
    say(
        f"{sum(total.values())} requests answered ({total['streams']} streams, {total['plain']} plain), "
        f"{len(told['failures'])} failed, {len(slow)} took more than 2 s, the longest {max(slow, default=0)} s; "
        f"{way.restarts} restarts"
    )
    if told["failures"]:
        raise Failed(f"{len(told['failures'])} requests have failed")


STATUS: Final = ("trio-cluster", "status")


def master_words(machine: str, host: str) -> tuple[str, ...]:
    """Return the command line of a master with TLS."""
    words = ("master", "8080", "--host", ADDRESSES[machine], "--on-conflict", "replicate")
    return (*words, "--tls", "auto", "--tls-name", host)


def switch_master(way: Walk, name: str) -> None:
    """Start a master with TLS."""
    way[name].install_service(*master_words(name, f"{name}.lan"))
    way[name].start_service("trio-cluster-master")
    way.restarts += 1


def switch_worker(way: Walk, name: str) -> None:
    """Invite a worker to the cluster, and restart it as one that was."""
    a, machine, unit = way["a"], way[WORKERS[name]], f"trio-cluster-{name}"
    state = a.state / "trio-cluster-master"
    said = a.run("trio-cluster", "invite", "https://a.lan:8080", "--name", name, "--state-dir", state)
    (token,) = re.findall(r"tcj-\S+", said)
    words = ("worker", BOTH, "--app", "models:server", "--name", name, "--join", token)
    machine.install_service("--unit", unit, *words)
    machine.stop(unit)
    machine.start_service(unit)
    way.restarts += 1


def ask(machine: Machine, url: str, key: str) -> None:
    """Ask the model, with a key, from the machine of a master."""
    body = json.dumps({"model": "words", "messages": [{"role": "user", "content": "?"}]})
    authority = machine.state / "trio-cluster-master/ca.pem"
    headers = ("-H", f"authorization: Bearer {key}", "-H", "content-type: application/json")
    answer = machine.run(
        "curl", "-sSf", "--cacert", authority, f"{url}/v1/chat/completions", *headers, "-d", body
    )
    if "word11" not in answer:
        raise Failed(answer)


def main() -> None:
    """Walk, in the folder that is named."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python scripts/production_walk.py FOLDER")
    if lacking := missing():
        raise SystemExit(f"the walk needs: {', '.join(lacking)}")
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "load.json").unlink(missing_ok=True)
    way = Walk(folder)
    try:
        walk(way)
    except (Failed, subprocess.CalledProcessError) as error:
        raise SystemExit(f"walk: {error}") from None
    finally:
        way.close()


if __name__ == "__main__":
    main()
