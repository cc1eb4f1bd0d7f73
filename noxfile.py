"""The workshop: one command per chore. ``nox`` runs what a change has to pass, ``nox -l`` lists all.

What a change has to pass is to take minutes on two cores, so that it is run before each change and not after it. So on
one Python, the oldest that is installed, everything is tested, real processes included; on the newest what a Python
could change; and on those between what lies next to the interpreter. Two sessions run at a time, for most of them keep
one core busy. What takes longer and finds something new less often is a session of its own: the law of lifetimes in
every way (``law``), random schedules (``soak``), bad input (``fuzz``), the clients (``clients``), whole agents
(``agents``), real models (``engines``), and measurements (``bench``). The tests have a sample of each. ``package``
builds what is released, and tests it as it is installed; ``release`` runs all that a release needs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from email.parser import Parser
from functools import partial
from pathlib import Path

import nox
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parent / "scripts"))

import release_checks

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]

# A Python that is not installed is skipped, also where CI is set, which would otherwise make it an error.
nox.options.sessions = ["check"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "no"

# Rules of flake8-async that fit other houses: a checkpoint in every function (910 to 913), nothing async that
# awaits nothing (124: a handler is async because its caller says so), and two about functions that are
# started in a nursery, which do not see that a callee may be the one to call started() (114, 128). And two that cost
# much here, and that Ruff checks as well (100; 300 is RUF006 there).
# Rules that are disabled are not even looked for; that they were ignored would cost as much as their being obeyed.
FLAKE8_EXCEPTIONS = (
    "--disable=ASYNC100,ASYNC114,ASYNC124,ASYNC128,ASYNC300,ASYNC910,ASYNC911,ASYNC912,ASYNC913"
)

# The libraries of the ecosystem, by the environment in which they are: some need another openai than the others.
ECOSYSTEM = {
    "main": (
        "langchain-openai==1.7.4",
        "litellm==1.110.2",
        "llm==0.36",
        "openai-agents==0.24.0",
        "pydantic-ai-slim[openai]==2.68.0",
    ),
    "llama_index": ("llama-index-llms-openai-like==0.8.1", "llama-index-embeddings-openai-like"),
}
#: Open WebUI, the browser's remote control, and what of its requirements is left out: models of its own (several GB),
#: and stores that are not used.
OPEN_WEBUI = ("open-webui==0.12.4", "playwright==1.65.2")
OPEN_WEBUI_WITHOUT = {
    "accelerate",
    "azure-ai-documentintelligence",
    "einops",
    "faster-whisper",
    "opencv-python-headless",
    "opensearch-py",
    "pyarrow",
    "rapidocr",
    "sentence-transformers",
    "sentencepiece",
    "transformers",
}

#: Of what is installed, most is not imported. Compiling all of it is a third of the time of an installation, so that is
#: left to the first import, except for real processes, which have deadlines, and test processes that run side by side.
UNCOMPILED = ("-q", "--no-compile")

GROUPS = nox.project.dependency_groups
PYPROJECT = nox.project.load_toml("pyproject.toml")


def activate_pyenv_versions() -> None:
    """Let every Python that pyenv has installed be found, and not only the one it has made active."""
    if "PYENV_VERSION" in os.environ:
        return
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = []
    for python in PYTHONS:
        patches = [path.name.removeprefix(f"{python}.") for path in installed.glob(f"{python}.*")]
        if releases := [int(patch) for patch in patches if patch.isdigit()]:
            found.append(f"{python}.{max(releases)}")
    if found:
        os.environ["PYENV_VERSION"] = ":".join(found)


activate_pyenv_versions()
INSTALLED = [python for python in PYTHONS if shutil.which(f"python{python}")]
WHOLE_ON = INSTALLED[0] if INSTALLED else PYTHONS[0]
NEWEST = INSTALLED[-1] if INSTALLED else PYTHONS[-1]

#: The wheel of the project, for the sessions that ``check`` runs; without it, each builds its own.
WHEEL = os.environ.get("CHECK_WHEEL", ".")

# A Python between the oldest and the newest gets what lies next to the interpreter: threads, coroutines, sockets, TLS,
# and the definitions of classes and messages. ``--brief`` takes a sample of the law of lifetimes. The law of what is
# stored and of what is uploaded in pieces is left out: it is the same machinery with more of the package above it, and
# what of a Python that depends on (files, SQLite) is tested in ``tests/core`` and ``tests/accounts``.
BRIEF = [
    "--brief",
    "-m",
    "not processes",
    "--deselect=tests/cluster/test_returning_workers.py",
    "--ignore=tests/lifetimes/test_storing.py",
    "--ignore=tests/lifetimes/test_streamed_uploads.py",
    "tests/core",
    "tests/protocol",
    "tests/link",
    "tests/http1",
    "tests/net",
    "tests/local",
    "tests/cluster",
    "tests/lifetimes",
    "tests/test_garbage.py",
]

# The newest Python also gets what stands on the frameworks and on larger parts of the standard library. What takes long
# and knows no Python is tested on one of them: what the official clients have to say, signals, what is drawn at random,
# engines, pages, and the shapes of the OpenAI API.
BRIEF_OF_NEWEST = [
    *BRIEF,
    "--ignore=tests/gateway/test_fuzz.py",
    "--ignore=tests/gateway/test_schemathesis.py",
    "--ignore=tests/testing/test_schedules.py",
    "--ignore=tests/testing/test_planted_bugs.py",
    "tests/accounts",
    "tests/admin",
    "tests/cli",
    "tests/gateway",
    "tests/hypercorn_server",
    "tests/routing",
    "tests/security",
    "tests/server",
    "tests/telemetry",
    "tests/testing",
    "tests/test_costs.py",
    "tests/test_options.py",
]

# Tests that draw many more examples in the session ``fuzz``: see ``tests/example_counts.py``.
DRAWN = [
    "tests/net/test_tls.py",
    "tests/openai/test_openai_checked.py",
    "tests/openai/test_openai_openapi.py",
    "tests/openai/test_openai_validation.py",
    "tests/protocol/test_protocol_codec.py",
]

# Where another version of a library could make a difference: everything but what no library is in.
BRIEF_OF_VERSIONS = [
    "--brief",
    "--ignore=tests/agents",
    "--ignore=tests/clients",
    "--ignore=tests/ecosystem",
    "--ignore=tests/demo",
]


@nox.session
def check(session: nox.Session) -> None:
    """Run everything that a change has to pass: lint, types, docs, and the tests on each Python; two at a time.

    What the tests of the first Python print is shown at once, and what the other sessions print when they have ended.
    """
    others = [f"tests-{python}" for python in reversed(PYTHONS) if python != WHOLE_ON]
    # The longest first, so that none is left to run alone.
    waiting = [f"tests-{WHOLE_ON}", *others, "types", "lint", "docs"]
    results: dict[str, str] = {}
    failed: list[str] = []
    lock = threading.Lock()
    folder = Path(session.create_tmp()).resolve()
    for old in folder.glob("*.whl"):
        old.unlink()
    session.run("pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), ".")
    (wheel,) = folder.glob("*.whl")
    environment = {**os.environ, "CHECK_WHEEL": str(wheel), "CHECK_BESIDE": "1"}

    def print_line(line: str) -> None:
        with lock:
            print(line, end="", flush=True)

    def run_those_that_wait() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                name = waiting.pop(0)
            for_pytest = session.posargs and name.startswith("tests-")
            arguments = ["--", *session.posargs] if for_pytest else []
            shown_at_once = name == f"tests-{WHOLE_ON}"
            show = print_line if shown_at_once else None
            code, lines = run_session(name, *arguments, environment=environment, show=show)
            with lock:
                if not shown_at_once:
                    print(*lines, sep="", flush=True)
                # How pytest ends; or how nox does, if that is all that there was to say.
                ends = [line for line in lines if re.match(r"\d+ (passed|failed|error).* in [0-9.]+s", line)]
                results[name] = (ends or lines)[-1].removeprefix("nox > ").rstrip()
                if code:
                    failed.append(name)

    lanes = [threading.Thread(target=run_those_that_wait) for _ in range(2)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    for name, result in results.items():
        session.log(f"{name}: {result}")
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def run_session(
    name: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    show: Callable[[str], None] | None = None,
) -> tuple[int, list[str]]:
    """Run a session in a process of its own.

    Args:
        name: of the session.
        arguments: what else the command line of nox has.
        environment: of the process; this one's by default.
        show: gets each line at once.

    Returns:
        The exit code, and the lines that it has printed.
    """
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", "nox", "--session", name, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if show is not None:
                show(line)
    return process.returncode, lines


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and the rules of structured concurrency."""
    session.install(*UNCOMPILED, *GROUPS(PYPROJECT, "lint"))
    session.run("ruff", "check", "--output-format=concise")
    session.run("ruff", "format", "--check")
    # Ruff has some of these rules; the ones that find a cancel scope across a yield are only here. They look at each
    # line several times, and find nothing where there is neither trio nor anything async.
    modules = [Path("pytest_trio_cluster.py"), *sorted(Path("trio_cluster").rglob("*.py"))]
    async_code = re.compile(r"\basync (def|for|with)\b|^\s*(import|from) trio\b", re.MULTILINE)
    concurrent = [str(path) for path in modules if async_code.search(path.read_text("utf-8"))]
    session.run("flake8", "--isolated", "--select=ASYNC", FLAKE8_EXCEPTIONS, *concurrent)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, strictly."""
    session.install(*UNCOMPILED, WHEEL, *GROUPS(PYPROJECT, "types"))
    session.run("mypy")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests, with what ``--`` is followed by handed to pytest."""
    # What somebody asks for is not left out on any Python.
    whole = session.python == WHOLE_ON or bool(session.posargs)
    deploy = GROUPS(PYPROJECT, "deploy") if whole else ()
    options = ("-q",) if whole else UNCOMPILED
    session.install(*options, WHEEL, *GROUPS(PYPROJECT, "test"), *deploy)
    part = [] if whole else BRIEF_OF_NEWEST if session.python == NEWEST else BRIEF
    # One more than there are cores: the one that gets the real processes waits for them, most of the time. Beside
    # another session, that session is the one more.
    workers = min(os.cpu_count() or 1, 4) + 1
    if "CHECK_BESIDE" in os.environ:
        workers = workers - 1 if whole else 0
    # Where bytecode must not be written, each test process would compile all tests for itself: a third of its time.
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    session.run("pytest", "-q", "-n", str(workers), "--dist", "worksteal", *part, *session.posargs)


def lowest_versions() -> list[str]:
    """Return the project's dependencies, each at the lowest version that it allows on this Python."""
    found = []
    for line in PYPROJECT["project"]["dependencies"]:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            (lowest,) = (each.version for each in requirement.specifier if each.operator == ">=")
            found.append(f"{requirement.name}=={lowest}")
    return found


@nox.session
@nox.parametrize("which", ["previous", "lowest", "newest"])
def versions(session: nox.Session, which: str) -> None:
    """Run the tests with the lowest allowed and with the newest versions of all dependencies.

    And upgrade clusters from the previous release, which is built from its commit and has an environment of its own.
    """
    session.install("-q", ".", *GROUPS(PYPROJECT, "test"))
    if which == "previous":
        environment = {"PREVIOUS_PYTHON": str(install_previous_release(session))}
        tests = "tests/end_to_end/test_previous_release.py"
        session.run("pytest", "-q", tests, *session.posargs, env=environment)
        return
    if which == "lowest":
        session.install("-q", *lowest_versions())
    else:
        session.install("-q", "--upgrade", "--upgrade-strategy=eager", ".")
    session.run("pip", "freeze", "--exclude-editable")
    workers = min(os.cpu_count() or 1, 4) + 1
    session.run(
        "pytest", "-q", "-n", str(workers), "--dist", "worksteal", *BRIEF_OF_VERSIONS, *session.posargs
    )


def install_previous_release(session: nox.Session) -> Path:
    """Build the previous release from its commit, install it into an environment beside the session's.

    Returns:
        The interpreter of that environment.
    """
    commit = release_checks.previous_commit(Path.cwd())
    folder = Path(session.create_tmp()).resolve() / "previous"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    archive = folder / "sources.tar.gz"
    session.run("git", "archive", "--prefix=sources/", "-o", str(archive), commit, external=True)
    session.run("tar", "-xzf", str(archive), "-C", str(folder), external=True)
    session.run("python", "-m", "venv", str(folder / "venv"))
    python = folder / "venv" / "bin" / "python"
    session.run(str(python), "-m", "pip", "install", "-q", str(folder / "sources"), external=True)
    return python


#: What of the tests is run against the packages as they are installed: the command, real processes, an engine, the demo
#: with the model that needs no download, and the plugin for pytest.
SAMPLE = [
    "tests/cli/test_cli.py",
    "tests/demo",
    "tests/engines/test_digits.py",
    "tests/end_to_end/test_openai_client.py",
    "tests/end_to_end/test_processes.py",
    "tests/testing/test_plugin.py",
]


@nox.session
def package(session: nox.Session) -> None:
    """Build sdist and wheel into dist/, twice, and test each as it is installed; list the components and hashes.

    Each is installed alone into an environment of its own, beside the libraries of the tests. The tests are those of
    the sdist, in a folder without the package. The demo's check needs weights that are downloaded (190 MB); where they
    cannot be had, only its smallest model is asked, by the tests.
    """
    session.install("-q", "hatchling>=1.26", "cyclonedx-bom>=7")
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    dist = Path("dist").resolve()
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "scripts/package_files.py", "build", str(dist), str(folder))
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    (sources,) = (path for path in folder.glob("trio_cluster-*") if path.is_dir())
    # The tests find what is installed, or nothing.
    shutil.rmtree(sources / "trio_cluster")
    (sources / "pytest_trio_cluster.py").unlink()
    for file in (wheel, sdist):
        python = new_environment(session, folder / file.suffix.lstrip("."), f"{file}[digits]")
        check_installed(session, python, sources, file)
    (folder / "bare").mkdir()
    session.run("python", "-m", "venv", "--without-pip", str(folder / "bare"))
    bare = str(folder / "bare" / "bin" / "python")
    session.run("python", "-m", "pip", "--python", bare, "install", "-q", str(wheel))
    session.run("python", "scripts/package_files.py", "list", str(dist), bare)
    check_demo(session, folder / "demo", wheel)
    for path in sorted(dist.iterdir()):
        session.log(f"{path.relative_to(Path.cwd())}: {path.stat().st_size} bytes")


def new_environment(session: nox.Session, folder: Path, *packages: str, codes: Sequence[int] = (0,)) -> Path:
    """Make a virtual environment with packages and the libraries of the tests; return its interpreter."""
    session.run("python", "-m", "venv", str(folder))
    python = folder / "bin" / "python"
    session.run(
        str(python),
        *("-m", "pip", "install", "-q", *packages, *GROUPS(PYPROJECT, "test")),
        external=True,
        success_codes=list(codes),
    )
    return python


def check_installed(session: nox.Session, python: Path, sources: Path, package: Path) -> None:
    """Check that an installed package is the one that was built, and run a sample of the tests with it."""
    origin = "import trio_cluster; print(trio_cluster.__file__)"
    # Not from the folder of the project, where an import would find the project.
    with session.chdir(sources):
        found = session.run(str(python), "-c", origin, external=True, silent=True)
        if not str(found).startswith(f"{python.parents[1]}/"):
            session.error(f"{package.name} is not what is tested, but {found}")
        said = str(
            session.run(str(python.with_name("trio-cluster")), "--version", external=True, silent=True)
        )
        version = package.name.split("-")[1].removesuffix(".tar.gz")
        if not said.startswith(f"trio-cluster {version}"):
            session.error(f"{package.name} says that it is {said}")
        session.log(f"{package.name} is installed: {said.strip()}")
        session.run(str(python), "-m", "pytest", "-q", *SAMPLE, *session.posargs, external=True)


def check_demo(session: nox.Session, folder: Path, wheel: Path) -> None:
    """Run the demo's own check with an installed wheel, or say why that is not possible here."""
    python = new_environment(session, folder, f"{wheel}[demo]", codes=(0, 1))
    with session.chdir(folder):
        fetch = (
            "import trio\n"
            "from trio_cluster.engines import _pinned_weights, _weights\n"
            "for each in _pinned_weights.WEIGHTS.values(): trio.run(_weights.ensure_weights, each)"
        )
        missing = session.run(
            str(python),
            "-c",
            fetch,
            external=True,
            silent=True,
            success_codes=[0, 1],
            stderr=subprocess.STDOUT,
        )
        lines = str(missing or "").split("\n")
        if any("Error" in line for line in lines):
            session.warn(f"left out: the demo's check with all of its models: {lines[-2:]}")
            return
        session.run(str(python.with_name("trio-cluster")), "demo", "0", "--check", external=True)


@nox.session
def processes(session: nox.Session) -> None:
    """Run only the tests that start real processes, one after the other."""
    session.install("-q", ".", *GROUPS(PYPROJECT, "test"))
    session.run("pytest", "-q", "-m", "processes", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what everything costs, beside what else is installed; ``-- --quick`` is to see whether it works.

    The figures are also kept in bench.json, from which ``bench/plot.py`` draws.
    """
    session.install("-q", ".", *GROUPS(PYPROJECT, "test"))
    session.run("pytest", "-q", "tests/test_benchmarks.py", env={"BENCHMARKS": "1"})
    programs = (
        "relay", "linger", "cancellation", "upstream", "bulk", "scale", "paper_scale", "limits", "on_demand",
    )  # fmt: skip
    for program in programs:
        session.run("python", f"bench/{program}.py", "--save", "bench.json", *session.posargs)


@nox.session
def law(session: nox.Session) -> None:
    """Play the whole law of lifetimes in every way that a token can take to its client."""
    session.install("-q", ".", *GROUPS(PYPROJECT, "test"))
    tables = ["tests/lifetimes/test_matrix.py", "tests/lifetimes/test_detours.py"]
    session.run("pytest", "-q", "-n", "2", *tables, "--all-ways", *session.posargs)
    # A master is taken over again and again.
    take_overs = "tests/end_to_end/test_take_over_processes.py"
    session.run("pytest", "-q", take_overs, *session.posargs, env={"TAKE_OVERS": "4"})
    # Masters and workers are restarted, one after the other, for two minutes.
    upgrade = "tests/end_to_end/test_rolling_upgrade.py"
    session.run(
        "pytest",
        "-q",
        "-o",
        "faulthandler_timeout=0",
        upgrade,
        *session.posargs,
        env={"UPGRADE_SECONDS": "120"},
    )
    # Hundreds of workers look for their master for minutes.
    session.run("pytest", "-q", "tests/cluster/test_returning_workers.py", "--all-ways", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Play random schedules of faults for ten minutes; what follows ``--``: --minutes M, --count N, or --seed N."""
    session.install("-q", ".")
    session.run("python", "-m", "trio_cluster.testing", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Send the HTTP API what clients should not send, and let a fuzzer look for input that breaks a parser.

    What follows ``--``: half of how many times as many requests as in the tests (20), and for how many minutes each of
    the five targets in ``tests/fuzz`` is fuzzed (3).
    """
    session.install("-q", ".", *GROUPS(PYPROJECT, "test"), *GROUPS(PYPROJECT, "fuzz"))
    times, minutes = (*session.posargs, *("20", "3")[len(session.posargs) :])
    tests = ("tests/gateway/test_fuzz.py", "tests/gateway/test_schemathesis.py")
    # Here a test may take long without being stuck; in virtual time, one that is stuck is found in its own ways.
    session.run("pytest", "-q", "-o", "faulthandler_timeout=0", *tests, env={"FUZZ": times})
    # What Hypothesis draws for these costs much, so the tests draw little of it.
    session.run("pytest", "-q", "-o", "faulthandler_timeout=0", *DRAWN, env={"EXAMPLE_TIMES": times})
    missing = session.run("python", "-c", "import atheris", success_codes=[0, 1], silent=True)
    if missing:
        session.warn(
            "atheris is not installed here, so nothing was fuzzed by coverage (Linux on x86-64 only)"
        )
        return
    for target in ("http", "websocket", "messages", "sessions", "requests"):
        session.run("python", "tests/fuzz", target, str(round(60 * float(minutes))))


@nox.session
def engines(session: nox.Session) -> None:
    """Run the tests that need real models, with the libraries that bring them."""
    session.install("-q", ".[demo,hf]", "gguf", *GROUPS(PYPROJECT, "test"))
    # The tests fetch nothing; this brings the weights into the cache, and is a test itself.
    session.run("trio-cluster", "demo", "0", "--check")
    session.run("pytest", "-m", "engines", *session.posargs)


@nox.session
def clients(session: nox.Session) -> None:
    """Test with the official clients for Python and for Node, and with others; needs node (22 or later) and npm."""
    session.install("-q", ".[llama]", *GROUPS(PYPROJECT, "test"), *GROUPS(PYPROJECT, "clients"))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy("tests/clients/node/package.json", folder)
        session.run(
            "npm",
            "install",
            "--prefix",
            folder,
            "--no-package-lock",
            "--no-audit",
            "--no-fund",
            external=True,
        )
        tests = ("tests/clients", "tests/local/test_asyncio_libraries.py")
        environment = {"OPENAI_NODE_FOLDER": folder, **clients_page(session)}
        session.run("pytest", "-q", *tests, *session.posargs, env=environment)


def clients_page(session: nox.Session) -> dict[str, str]:
    """Return the variable that has a table in docs/clients.md rewritten, unless only a part of the tests is run."""
    return {} if session.posargs else {"CLIENTS_PAGE": str(Path("docs/clients.md").resolve())}


@nox.session
def agents(session: nox.Session) -> None:
    """Run whole agents, as their registries have them, and write down in docs/clients.md what they do.

    They are installed into the session's own folder, which is kept, for they are large (1.5 GB). One whose package or
    interpreter is missing is skipped. What is asked for after ``--`` is run alone, and nothing is written down.
    """
    session.install("-q", ".[llama]", "gguf", *GROUPS(PYPROJECT, "test"))
    folder = Path(session.create_tmp()).resolve()
    if shutil.which("npm") is None:
        session.warn("there is no npm, so only aider is run")
    else:
        # One by one, since one that is missing must not keep the others out. As optional dependencies of one package,
        # npm would leave out, without a word, those that name a later Node than there is, though they run on this one.
        (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
        for name, version in json.loads(Path("tests/agents/package.json").read_text())[
            "dependencies"
        ].items():
            npm_install(session, folder, f"{name}@{version}")
    install_into_environment(
        session, folder / "aider", "aider-chat==0.86.2", pythons=("3.12", "3.11", "3.10")
    )
    environment = {"AGENTS_FOLDER": str(folder), **clients_page(session)}
    # A test may take long without being stuck.
    session.run(
        "pytest", "-q", "-o", "faulthandler_timeout=0", "tests/agents", *session.posargs, env=environment
    )


@nox.session
def ecosystem(session: nox.Session) -> None:
    """Test with the libraries that people build upon, and write down in docs/clients.md what they do: for releases.

    They are installed into the session's own folder, which is kept. What follows ``--`` is handed to pytest; nothing is
    written down then.
    """
    session.install("-q", ".", *GROUPS(PYPROJECT, "test"))
    folder = Path(session.create_tmp()).resolve()
    if shutil.which("npm") is None:
        session.warn("there is no npm, so the AI SDK is left out")
    else:
        shutil.copy("tests/clients/node/package.json", folder)
        npm_install(session, folder)
    pythons = ("3.12", "3.13", "3.11")
    for name, packages in ECOSYSTEM.items():
        install_into_environment(session, folder / name, *packages, pythons=pythons)
    install_open_webui(session, folder / "open_webui")
    environment = {"ECOSYSTEM_FOLDER": str(folder), **clients_page(session)}
    session.run("pytest", "-q", "tests/ecosystem", *session.posargs, env=environment)


def npm_install(session: nox.Session, folder: Path, *packages: str) -> None:
    """Install packages into a folder, or those that its ``package.json`` names; it may fail."""
    options = ("--no-package-lock", "--no-audit", "--no-fund")
    arguments = ("--prefix", str(folder), *options, *packages)
    session.run("npm", "install", *arguments, external=True, success_codes=[0, 1])


def install_into_environment(
    session: nox.Session, folder: Path, *packages: str, pythons: Sequence[str]
) -> None:
    """Make a virtual environment beside the session's, for what cannot share one, or say why there is none.

    Args:
        session: the session.
        folder: the environment, which may be there already.
        packages: what is in it.
        pythons: the versions of Python that will do, the best first.
    """
    python = next((each for each in pythons if shutil.which(f"python{each}")), None)
    if python is None:
        session.warn(f"{packages[0]} needs Python {' or '.join(pythons)}; it is left out")
        return
    session.run(f"python{python}", "-m", "venv", str(folder), external=True)
    pip = str(folder / "bin" / "pip")
    session.run(pip, "install", "-q", *packages, external=True, success_codes=[0, 1])


def install_open_webui(session: nox.Session, folder: Path) -> None:
    """Install Open WebUI into an environment of its own, without what is not used of it."""
    install_into_environment(session, folder, "--no-deps", *OPEN_WEBUI, pythons=("3.12", "3.11"))
    metadata = next(folder.glob("lib/*/site-packages/open_webui-*.dist-info/METADATA"), None)
    if metadata is None:
        return
    listed = (
        Parser().parsestr(metadata.read_text(encoding="utf-8"), headersonly=True).get_all("Requires-Dist")
    )
    wanted = [Requirement(line) for line in listed or () if "extra ==" not in line]
    lines = [str(each) for each in wanted if each.name not in OPEN_WEBUI_WITHOUT]
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join([*lines, *OPEN_WEBUI[1:]]), encoding="utf-8")
    pip = str(folder / "bin" / "pip")
    session.run(pip, "install", "-q", "-r", str(requirements), external=True, success_codes=[0, 1])


@nox.session(venv_backend="none")
def release(session: nox.Session) -> None:
    """Do everything that a release needs, in order, and end with a table, which is kept in dist/release-report.md.

    It is refused if anything is not committed, if the changelog has no section for the version, or if pages name
    another one. What cannot be run here is skipped, and the table says so. What follows ``--`` are names of the steps
    to run, to try one again; that is no whole release.
    """
    root = Path.cwd()
    version = re.findall(
        r'^__version__ = "(.*)"$', Path("trio_cluster/_version.py").read_text("utf-8"), re.M
    )[0]
    if problems := release_checks.problems(root, version):
        session.error("no release: " + "; ".join(problems))
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    steps = list(release_checks.STEPS)
    if unknown := set(session.posargs) - set(steps):
        session.error(f"there is no step {', '.join(sorted(unknown))}; there are: {', '.join(steps)}")
    programs = {each for needed in release_checks.STEPS.values() for each in needed}
    found = {each: shutil.which(each) is not None for each in programs}
    found["index"] = release_checks.packages_can_be_installed()
    rows: list[release_checks.Row] = []
    for name in [each for each in steps if not session.posargs or each in session.posargs]:
        if reason := release_checks.obstacle(release_checks.STEPS[name], found):
            rows.append((name, "skipped", 0.0, reason))
        else:
            rows.append(run_step(session, root, name))
        session.log(f"{name}: {rows[-1][1]}: {rows[-1][3]}")
    report = release_checks.markdown(version, commit, rows, steps)
    Path("dist").mkdir(exist_ok=True)
    Path("dist/release-report.md").write_text(report, encoding="utf-8")
    print(report)
    conclusion = release_checks.summary(rows, steps)
    if any(result == "failed" for _, result, _, _ in rows):
        session.error(conclusion)
    session.log(conclusion)


def run_step(session: nox.Session, root: Path, name: str) -> release_checks.Row:
    """Run one step of a release, show what it prints, and return its row of the report."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "report.json"
        show = partial(print, end="", flush=True)
        code, lines = run_session(name, "--report", str(written), show=show)
        ended = json.loads(written.read_text("utf-8")) if written.exists() else {}
    result, said = release_checks.outcome(ended, "".join(lines))
    if result == "passed" and code:
        result, said = "failed", f"exit code {code}; {said}"
    # The sessions of the clients write what they have found into the documentation.
    if changed := release_checks.changed_files(root):
        result, said = "failed", f"it has changed {', '.join(changed)}; commit that, and begin again; {said}"
    return name, result, time.monotonic() - began, said


@nox.session
def deploy(session: nox.Session) -> None:
    """Check what is in deploy/, and run the steps of the image one by one, and what it does as a container.

    That takes root, on Linux; what cannot be run is skipped, and said so.
    """
    session.install("-q", ".", *GROUPS(PYPROJECT, "test"), *GROUPS(PYPROJECT, "deploy"))
    # The build of the image may take long without being stuck.
    arguments = ["-o", "faulthandler_timeout=0", "tests/deploy"]
    session.run("pytest", "-q", *arguments, *session.posargs, env={"DEPLOY_STEPS": "1"})


@nox.session(venv_backend="none")
def walk(session: nox.Session) -> None:
    """Do what docs/production.md tells, on machines that are network namespaces: an upgrade under load, and a restore.

    That takes root, on Linux, and says what else is missing. The folder, with the logs, is the one after ``--``.
    """
    folder = session.posargs[0] if session.posargs else str(Path(session.create_tmp()).resolve() / "walk")
    session.run("python", "scripts/production_walk.py", folder, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error. Its search must find what people search for."""
    session.install(*UNCOMPILED, WHEEL, *GROUPS(PYPROJECT, "docs"))
    session.run("sphinx-build", "-q", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")
    session.run("python", "scripts/check_search.py", "docs/_build/html")
