"""README and documentation are true: their code runs, and their tables are those of the code."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

import trio_cluster
from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions, engines, errors, testing
from trio_cluster.cli.arguments import _parser, parse_arguments
from trio_cluster.core.request import Request
from trio_cluster.engines import _engine
from trio_cluster.gateway import request_stats
from trio_cluster.openai import ENDPOINTS
from trio_cluster.options import when_applied
from trio_cluster.protocol import RECEIVE_TRANSITIONS, SEND_TRANSITIONS, Role, markdown
from trio_cluster.protocol.codec import TAGS

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def page(name: str) -> str:
    """Return the text of one page of the documentation."""
    return (DOCS / name).read_text(encoding="utf-8")


def fences(language: str) -> Iterator[tuple[str, str]]:
    """Yield all code of a language that the pages show, with a name for each."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for number, found in enumerate(
            re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S), start=1
        ):
            yield f"{path.name}-{number}", found[1]


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row of each Markdown table."""
    for line in text.splitlines():
        if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def section(text: str, title: str) -> str:
    """Return what stands under a heading of level two."""
    return re.split(r"^## ", text.split(f"\n## {title}", 1)[1], flags=re.M)[0]


PYTHON = dict(fences("python"))


def execute(name: str) -> dict[str, Any]:
    """Run one piece of Python from the pages, and return what it defines."""
    namespace: dict[str, Any] = {"__name__": "documentation"}
    exec(compile(PYTHON[name], name, "exec"), namespace)
    return namespace


def the_one_with(text: str) -> str:
    """Return the name of the only piece of Python that has ``text`` in it."""
    (name,) = [name for name, code in PYTHON.items() if text in code]
    return name


async def ask(base_url: str, model: str, text: str) -> str:
    """Ask a chat model, and return what it says."""
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    answer = json.loads(await fetch(f"{base_url}/v1/chat/completions", json.dumps(body).encode()))
    content = answer["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


async def fetch(url: str, body: bytes | None = None) -> bytes:
    def blocking() -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with opener.open(request, timeout=10) as response:
            data: bytes = response.read()
            return data

    return await trio.to_thread.run_sync(blocking)


# Code


@pytest.mark.parametrize("name", PYTHON)
def test_python_in_the_pages_compiles_and_its_models_can_be_registered(name: str) -> None:
    if "OpenAI(" in PYTHON[name]:
        compile(PYTHON[name], name, "exec")  # running it would need a server
    else:
        execute(name)


async def test_the_six_shapes_in_the_readme_answer(nursery: trio.Nursery) -> None:
    server = execute(the_one_with('@server.chat("async-yield")'))["server"]
    server.options.server.host = "127.0.0.1"
    await nursery.start(server.run_as_standalone, 0)
    assert {model: await ask(server.url, model, "to be") for model in server.list_models()} == {
        "async-push": "You said: to be",
        "async-return": "TO BE",
        "async-yield": "to be ",
        "plain-push": "to be",
        "plain-return": "5 characters",
        "plain-yield": "be to ",
    }


TESTS = [name for name, code in PYTHON.items() if "def test_" in code]


@pytest.mark.parametrize("name", TESTS)
def test_the_tests_in_the_pages_pass(
    name: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    pytester.makepyfile(PYTHON[name])
    # Without settings of its own, pytest-asyncio warns when it starts, which would be an error here.
    outcomes = pytester.runpytest_inprocess("-p", "no:asyncio").parseoutcomes()
    assert outcomes.keys() == {"passed"}


def test_there_are_tests_in_the_pages() -> None:
    assert len(TESTS) == 10


async def test_the_engine_in_the_pages_serves(nursery: trio.Nursery) -> None:
    engine = execute(the_one_with("class Rot13"))["engine"]
    server = ClusterServer()
    server.options.server.host = "127.0.0.1"
    await nursery.start(server.run_as_standalone, 0)
    await nursery.start(engine.serve, "", {"name": "rot13"}, server)
    assert server.url is not None
    assert await ask(server.url, "rot13", "uryyb jbeyq") == "hello world "


def commands() -> Iterator[str]:
    for _, code in fences("sh"):
        for line in code.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                if "trio-cluster " in command.partition("#")[0]:
                    yield command.strip().removeprefix(".venv/bin/")


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_in_the_pages_are_understood(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "trio-cluster"
    parsed = parse_arguments(arguments)
    known = _engine.BUILT_IN
    for spec in getattr(parsed, "serve", []):
        head, *pairs = spec.split(",")
        options = known[head.partition(":")[0]].load().all_options
        assert {pair.partition("=")[0] for pair in pairs} <= options.keys()


def curls() -> Iterator[list[str]]:
    for _, code in fences("sh"):
        for line in code.replace("\\\n", " ").splitlines():
            if line.startswith("curl "):
                yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("words", list(curls()), ids=" ".join)
def test_curl_commands_in_the_pages_have_a_known_path_and_valid_json(words: list[str]) -> None:
    (url,) = [word for word in words if word.startswith("http")]
    path = "/" + url.partition("://")[2].partition("/")[2].partition("?")[0]
    assert f"{path}`" in page("http-api.md") or path in page("cluster.md")
    for flag, value in itertools.pairwise(words):
        if flag in ("-d", "--data", "--json") and not value.startswith("@"):
            assert isinstance(json.loads(value), dict)


# Tables


@pytest.mark.parametrize("options", [ServerOptions, ClusterServerOptions])
def test_every_option_is_documented_with_its_default_variable_and_flag(options: Any) -> None:
    table = {row[0].strip("`"): row for row in rows(page("cluster.md"))}
    flags = {
        action.dest: f"`{', '.join(action.option_strings)}`".replace(", ", "`, `") or "none"
        for _, parser in subparsers()
        for action in parser._actions
    }
    for field in attrs.fields(options):
        if field.name == "server":
            continue
        default = field.default
        # A default of 1 equals True.
        shown = {"None": "none", "True": "true"}.get(str(default)) or (
            f"{default:g}{'' if field.name.endswith('_share') else ' s'}"
            if isinstance(default, float)
            else str(default)
        )
        flag = flags.get(field.name, "none")
        expected = [shown, f"`TRIO_CLUSTER_{field.name.upper()}`", "`PORT`" if field.name == "port" else flag]
        assert table[field.name][1:4] == expected
        assert (
            table[field.name][4] == {"at once": "at once", "after a restart": "restart"}[when_applied(field)]
        )


def subparsers() -> list[tuple[str, argparse.ArgumentParser]]:
    (action,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return sorted(action.choices.items())


def test_every_flag_is_documented_with_the_commands_that_have_it() -> None:
    there: dict[str, set[str]] = {}
    for command, parser in subparsers():
        for action in parser._actions:
            for flag in action.option_strings:
                there.setdefault(flag, set()).add(command)
    # --app and --serve have a section of their own.
    assert there.pop("-a") == there.pop("--app") == there.pop("--serve") == {"run", "master", "worker"}
    text = page("cli.md")
    assert all(f"`{flag}" in section(text, "What to serve") for flag in ("-a", "--app", "--serve"))
    documented = {
        flag: {command for command, _ in subparsers()} if row[1] == "all" else set(row[1].split(", "))
        for row in rows(section(text, "Flags"))
        for flag in re.findall(r"(?<!\w)--?[a-z][a-z-]*", row[0])
    }
    assert documented.pop("--version") == {""}
    assert documented == there


def test_every_command_and_flag_of_keys_is_documented() -> None:
    (keys,) = [parser for command, parser in subparsers() if command == "keys"]
    (action,) = [each for each in keys._actions if isinstance(each, argparse._SubParsersAction)]
    text = page("keys.md")
    shared = set(re.findall(r"`(--?[a-z-]+)", section(page("cli.md"), "Flags")))
    for command, parser in action.choices.items():
        assert f"trio-cluster keys {command} " in text
        flags = {flag for each in parser._actions for flag in each.option_strings} - shared
        assert [flag for flag in flags if flag not in text] == [], command


def test_every_command_is_documented() -> None:
    text = page("cli.md")
    assert [command for command, _ in subparsers() if f"trio-cluster {command} " not in text] == []


@pytest.mark.parametrize("package", [trio_cluster, engines, testing])
def test_every_exported_name_is_in_the_reference(package: Any) -> None:
    described = re.findall(r"^\.\. auto\w+:: (\w+)$", page("reference.md"), re.M)
    assert [name for name in package.__all__ if name not in described] == []


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("tables", [SEND_TRANSITIONS, RECEIVE_TRANSITIONS], ids=["sends", "receives"])
def test_the_state_tables_are_those_that_the_code_runs_on(tables: Any, role: Role) -> None:
    verb = "sends" if tables is SEND_TRANSITIONS else "receives"
    after = page("wire.md").split(f"What a {role.value} {verb}:\n\n", 1)[1]
    assert after.split("\n\n", 1)[0] + "\n" == markdown(tables[role])


def test_every_message_is_documented_with_its_number_and_fields() -> None:
    documented = {
        row[1].strip("`"): (int(row[0]), re.findall(r"\w+", row[3]))
        for row in rows(section(page("wire.md"), "Messages"))
        if row[0].isdecimal()
    }
    assert documented == {cls.__name__: (tag, list(cls.__annotations__)) for cls, tag in TAGS.items()}


def test_every_error_of_our_own_is_documented() -> None:
    documented = {
        (int(row[0]), code)
        for row in rows(section(page("http-api.md"), "Errors"))
        if row[0].isdecimal()
        for code in re.findall(r"`(\w+)`", row[1])
    }
    ours = [
        errors.ModelNotFound("m", []),
        errors.ModelUnavailable("m"),
        errors.ModelStartFailed("m", "", 1.0),
        errors.ModelNotOnDemand("m"),
        errors.LoopDetected("m"),
        errors.EndpointNotFound("chat.later"),
        errors.WrongKind("m", "tts", "chat"),
        errors.NotSupported("m", "count tokens"),
        errors.Overloaded(""),
        errors.QuotaExceeded(""),
        errors.RateLimited("", kind="requests"),
        errors.ShuttingDown(),
        errors.WorkerLost("w", ""),
        errors.UpstreamLost("m", ""),
        errors.TooSlow(""),
        errors.HandlerFailed(),
        errors.CallCancelled(""),
    ]
    assert {type(error) for error in ours} == {
        value
        for value in vars(errors).values()
        if isinstance(value, type)
        and issubclass(value, errors.ApiError)
        and value not in (errors.ApiError, errors.InvalidRequest, errors.UpstreamBusy)
    }
    assert {(error.status, error.code) for error in ours} <= documented


def test_every_route_is_documented() -> None:
    text = page("http-api.md")
    assert [each.path for each in ENDPOINTS.values() if f"`POST /v1{each.path}`" not in text] == []


async def test_every_metric_is_documented(nursery: trio.Nursery) -> None:
    master = ClusterServer(ClusterServerOptions(ServerOptions(host="127.0.0.1"), on_conflict="replicate"))
    await nursery.start(master.run_as_master, 0)
    for _ in range(2):
        worker = ClusterServer()
        worker.register_chat("m", lambda request: "hello")
        await nursery.start(worker.run_as_worker, "127.0.0.1", master.internal_port)
    # Some are of models among whose replicas there was a choice.
    master.router.open(Request("chat.completions", "chat", "m", b"{}")).cancel("not wanted")
    text = (await fetch(f"{master.url}/metrics")).decode()
    shown = set(re.findall(r"^(\w+)[ {]", text, re.M))
    documented = {
        f"trio_cluster_{name}"
        for row in rows(section(page("metrics.md"), "The node"))
        for name in re.findall(r"`(\w+)(?:\{[\w,]+\})?`", row[0])
    }
    assert documented == shown
    # Those of requests are there three times, and have no values without requests.
    described = set(re.findall(r"^# TYPE trio_cluster_(\w+) ", text, re.M))
    described = {name for name in described if re.match("(key_)?request|worker_call", name)}
    requests = section(page("metrics.md"), "Requests")
    names = {
        name for row in rows(requests) for name in re.findall(r"`(request\w+)`", row[0]) if name != "request"
    }
    assert described == {
        re.sub("^request", prefix, name)
        for name in names
        for prefix in ("request", "key_request", "worker_call")
    }


def test_the_buckets_and_bounds_of_metrics_are_documented() -> None:
    text = page("metrics.md")
    documented = {
        row[0]: tuple(map(float, row[1].split(", ")))
        for row in rows(section(text, "Requests"))
        if re.match(r"[\d.]+, ", row[1])
    }
    assert documented == {
        "time to first token": request_stats.FIRST_TOKEN,
        "time between tokens": request_stats.TOKEN_INTERVAL,
        "duration": request_stats.DURATION,
        "queue": request_stats.QUEUE_WAIT,
        "cold start": request_stats.COLD_WAIT,
    }
    assert f"The first {request_stats.LABELS_MAX} models" in text
    assert f"The first {request_stats.ERRORS_MAX} errors" in text


@pytest.mark.parametrize("point", _engine.BUILT_IN.values(), ids=lambda point: point.name)
def test_every_engine_is_documented_with_its_options(point: Any) -> None:
    engine = point.load()
    text = section(page("engines.md"), f"{point.name}: ")
    documented = {row[0].strip("`"): row[1] for row in rows(text) if row[0].startswith("`")}
    assert documented.keys() == engine.options.keys()
    for key, option in engine.options.items():
        if isinstance(option.default, bool):
            assert documented[key] == ("yes" if option.default else "no")
        elif isinstance(option.default, int | float):
            assert documented[key] == str(option.default)


def test_every_alert_has_a_section_that_says_what_to_do() -> None:
    path = ROOT / "deploy" / "prometheus" / "alerts.yml"
    alerts = re.findall(r"- alert: (\w+)", path.read_text(encoding="utf-8")) if path.exists() else []
    sections = re.findall(r"^### (\w+)$", section(page("operations.md"), "Alerts"), re.M)
    assert [alert for alert in alerts if alert not in sections] == []
    assert [name for name in sections if alerts and name not in alerts] == []


# Everything around


@pytest.mark.parametrize(
    "path",
    [*PAGES, *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY"))],
    ids=lambda path: path.name,
)
def test_links_to_files_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if not re.match(r"\w+:|#", link)]
    assert [file for file in files if not (path.parent / file).exists()] == []


def test_the_messages_that_the_troubleshooting_page_explains_are_those_of_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trio_cluster").rglob("*.py"))
    titles = ("Starting a node", "While it runs")
    messages = [
        row[0].strip("`")
        for title in titles
        for row in list(rows(section(page("troubleshooting.md"), title)))[1:]
    ]
    assert len(messages) > 10
    assert [message for message in messages if message not in source] == []


def test_every_page_can_be_found() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = page("index.md")
    for name in sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "index"):
        assert f"\n{name}\n" in index
        assert f"(docs/{name}.md)" in readme or name == "changelog"


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_complete_in_themselves(path: Path) -> None:
    tree = ElementTree.parse(path)
    assert tree.getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert [
        element.tag for element in tree.iter() if "href" in str(element.attrib) or "script" in element.tag
    ] == []


def test_the_changelog_knows_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if ".dev" in trio_cluster.__version__:
        assert re.search(r"^- ", section(changelog, "Unreleased"), re.MULTILINE)
    else:
        assert f"\n## {trio_cluster.__version__} - 20" in changelog


#: Files that a page says should not be.
NOT_OURS = {"utils.py"}
PATH = re.compile(r"`((?:[a-z0-9_]+/)*[a-z0-9_]+\.py|(?:[a-z0-9_]+/)+)`")


@pytest.mark.parametrize(
    "page",
    ["docs/architecture.md", "docs/glossary.md", "docs/design.md", "docs/lifetimes.md", "CONTRIBUTING.md"],
)
def test_the_files_and_folders_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    # What was called otherwise once is in tables of its own.
    text = text.partition("## Old names")[0]
    named = set(PATH.findall(text))
    assert named
    paths: list[str] = []
    for folder in ("trio_cluster", "tests", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            paths += [f"/{path.relative_to(ROOT)}", f"/{path.parent.relative_to(ROOT)}/"]
    missing = {name for name in named - NOT_OURS if not any(path.endswith(f"/{name}") for path in paths)}
    assert sorted(missing - {"docs/", "examples/"}) == []
