"""The rules of the architecture that a machine can check, from the direction of imports to what is exported."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import trio_cluster

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trio_cluster"

# From the ground up. A folder, or a module beside the folders, may import what is on the floors below its own, never
# what is on its own floor or above. What the modules of one folder import of each other is the folder's own business.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors"),
    ("core",),
    ("options",),
    ("accounts",),
    ("limits", "net", "on_demand", "openai", "protocol", "routing", "security"),
    ("http1", "link", "local", "stored"),
    ("cluster", "gateway", "group", "hypercorn_server"),
    ("admin", "telemetry"),
    ("node",),
    ("server",),
    ("server_thread",),
    ("engines", "testing"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}

# Modules that are run and never imported. They stand above everything, whatever folder they are in.
PROGRAMS = {"__main__.py", "cluster/guardian_process.py", "demo/node.py", "engines/_hub_process.py"}

# Which folders may import nothing but these, of all that stands below them.
ONLY = {
    # The HTTP/1.1 server can be taken out and used alone.
    "http1": {"net"},
    # The database knows nothing of HTTP, nor of links.
    "accounts": {"core", "errors"},
    # The gateway does not know how workers are reached.
    "gateway": {
        "accounts",
        "core",
        "errors",
        "http1",
        "limits",
        "net",
        "openai",
        "options",
        "routing",
        "stored",
    },
    # What is stored is known by its form, and not by the requests and connections that it came by.
    "stored": {"accounts", "core", "openai", "options"},
    # What a key has used follows from requests and calls, wherever they go.
    "limits": {"core", "errors"},
    # Whatever takes memory can be run on demand; what it is, only its owner knows.
    "on_demand": {"core", "errors", "options"},
    # A policy sees replicas and requests, and nothing of links or handlers.
    "routing": {"core", "errors", "options"},
}

# The modules that may import a library of whose private or undocumented parts some are used. Each module says which,
# and a test of its own holds the installed version to it. And SQLAlchemy, which is loaded when a database is opened.
ISOLATED = {
    "trio_websocket": {"link/websocket.py"},
    "websockets": {"link/frames.py"},
    "wsproto": set(),
    "hypercorn": {"hypercorn_server/library.py"},
    "sqlalchemy": {"accounts/migrations.py", "accounts/schema.py", "accounts/store.py"},
    "psycopg": set(),
    "werkzeug": {"admin/app.py", "admin/web.py"},
}
# Which folders may know the web framework.
FRAMEWORK = {"admin", "node", "server"}

EXPORTS = {
    "ASRRequest",
    "ApiError",
    "AsyncioLoop",
    "AsyncioRawCall",
    "ChatModelOptions",
    "ChatRequest",
    "ClusterMode",
    "ClusterServer",
    "ClusterServerOptions",
    "CustomRequest",
    "EmbeddingRequest",
    "ImageEditRequest",
    "ImageGenRequest",
    "ModerationRequest",
    "OutputChunk",
    "Provider",
    "RawCall",
    "RerankRequest",
    "ServerOptions",
    "ServerThread",
    "TTSRequest",
    "__version__",
    "check_is_cluster_server",
    "from_asyncio",
    "serve_in_thread",
}
# What run* raises is part of the contract too, so the errors may be exported, if they are errors.
EXPORTED_ERRORS = {"ClusterError", "ClusterPortError", "HandshakeRefused", "OptionsError"}


MODULES = sorted(PACKAGE.rglob("*.py"))
# All but the package's face, which may import from everywhere.
INSIDE = [path for path in MODULES if path != PACKAGE / "__init__.py"]


@pytest.fixture(autouse=True, scope="module")
def _trees_are_read_once() -> Iterator[None]:
    """Forget the syntax trees after these tests, for the garbage collector would go through them in all others."""
    yield
    nodes_of.cache_clear()


def folder_of(path: Path) -> str:
    """Return the folder below the package that a module is in, or the name of a module beside the folders."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Return all nodes of a module's syntax tree; the module itself is the first one."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Return the full names of all modules that ``path`` imports, wherever in it."""
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    package = ["trio_cluster", *path.relative_to(PACKAGE).parent.parts]
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if node.level and node.module is None:
                for alias in node.names:
                    yield f"{module}.{alias.name}"
            else:
                yield module


def imported_folders(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("trio_cluster.")}


def imported_libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)} - {"trio_cluster"}


def told(path: Path, what: object) -> str:
    return f"{path.relative_to(ROOT)}: {what}"


def test_every_folder_has_a_floor_and_every_floor_its_folders() -> None:
    assert {folder_of(path) for path in INSIDE} == FLOOR_OF.keys()


def test_imports_go_down() -> None:
    upward = [
        told(path, other)
        for path in INSIDE
        if str(path.relative_to(PACKAGE)) not in PROGRAMS
        for other in imported_folders(path) - {folder_of(path)}
        if FLOOR_OF.get(other, 99) >= FLOOR_OF.get(folder_of(path), 0)
    ]
    assert upward == []


@pytest.mark.parametrize("folder", ONLY)
def test_some_folders_know_only_a_few_of_those_below_them(folder: str) -> None:
    found = [
        told(path, other)
        for path in INSIDE
        if folder_of(path) == folder
        for other in imported_folders(path) - {folder} - ONLY[folder]
    ]
    assert found == []


def test_no_module_imports_a_program() -> None:
    programs = {f"trio_cluster.{name.removesuffix('.py').replace('/', '.')}" for name in PROGRAMS}
    found = [told(path, name) for path in MODULES for name in programs & set(imported(path))]
    assert all((PACKAGE / name).is_file() for name in PROGRAMS)
    assert found == []


def test_no_module_imports_from_the_package_s_face() -> None:
    assert [told(path, "trio_cluster") for path in INSIDE if "trio_cluster" in set(imported(path))] == []


def test_libraries_of_which_private_parts_are_used_are_imported_by_one_module_each() -> None:
    elsewhere = [
        told(path, name)
        for path in MODULES
        for name in imported_libraries(path) & ISOLATED.keys()
        if str(path.relative_to(PACKAGE)) not in ISOLATED[name]
    ]
    assert elsewhere == []


def test_only_the_admin_application_and_what_holds_it_know_the_web_framework() -> None:
    elsewhere = [
        told(path, name)
        for path in MODULES
        for name in imported_libraries(path) & {"quart", "quart_trio"}
        if folder_of(path) not in FRAMEWORK
    ]
    assert elsewhere == []


@pytest.mark.parametrize("folder", ["protocol", "openai"])
def test_folders_without_io_know_no_trio_and_no_framework(folder: str) -> None:
    io = {"trio", "socket", "threading", "asyncio", "quart", "quart_trio", *ISOLATED}
    found = [
        told(path, name)
        for path in MODULES
        if folder_of(path) == folder
        for name in imported_libraries(path) & io
    ]
    assert found == []


def test_the_protocol_has_no_clock() -> None:
    assert [
        path for path in MODULES if folder_of(path) == "protocol" and "time" in imported_libraries(path)
    ] == []


# Documented names of Python's own that begin with an underscore.
DOCUMENTED = {"os._exit", "sys._current_frames"}


def test_no_class_reads_another_s_private_names() -> None:
    found = []
    for path in MODULES:
        for node in nodes_of(path):
            if not isinstance(node, ast.Attribute) or not re.match(r"_[^_]", node.attr):
                continue
            owner = ast.unparse(node.value)
            if owner not in {"self", "cls", "super()"} and ast.unparse(node) not in DOCUMENTED:
                found.append(told(path, f"line {node.lineno}: {ast.unparse(node)}"))
    assert found == []


def test_every_module_says_what_it_is() -> None:
    assert [
        path
        for path in MODULES
        for module in nodes_of(path)[:1]
        if isinstance(module, ast.Module) and len(ast.get_docstring(module) or "") < 20
    ] == []


def test_modules_have_a_noun_for_a_name() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [path for path in MODULES if set(path.stem.split("_")) & vague] == []


def test_what_a_module_says_it_exports_is_there_once() -> None:
    wrong = []
    for path in INSIDE:
        exported: list[str] = []
        bound: set[str] = set()
        for node in nodes_of(path):
            if isinstance(node, ast.Assign):
                names = {target.id for target in node.targets if isinstance(target, ast.Name)}
                bound |= names
                if "__all__" in names:
                    exported = ast.literal_eval(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                bound.add(node.target.id)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                bound.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                bound.update(alias.asname or alias.name for alias in node.names)
        wrong += [told(path, name) for name in set(exported) - bound]
        wrong += [told(path, "a name twice")] if len(exported) != len(set(exported)) else []
    assert wrong == []


def test_the_package_exports_what_is_documented() -> None:
    exported = set(trio_cluster.__all__)
    assert exported >= EXPORTS
    assert exported - EXPORTS <= EXPORTED_ERRORS | {
        name
        for name in exported
        for value in [getattr(trio_cluster, name)]
        if inspect.isclass(value) and issubclass(value, trio_cluster.ApiError)
    }
    assert exported <= set(dir(trio_cluster))
    with pytest.raises(AttributeError, match="'trio_cluster' has no attribute 'ClusterServ'"):
        trio_cluster.ClusterServ  # type: ignore[attr-defined]  # noqa: B018


def test_everything_public_has_a_docstring() -> None:
    bare = []
    for name in trio_cluster.__all__:
        value = getattr(trio_cluster, name)
        if not inspect.isclass(value) and not callable(value):
            continue
        bare += [] if inspect.getdoc(value) else [name]
        for member, found in vars(value).items() if inspect.isclass(value) else ():
            is_code = inspect.isfunction(found) or isinstance(found, (property, classmethod, staticmethod))
            if is_code and not member.startswith("_") and not inspect.getdoc(found):
                bare.append(f"{name}.{member}")
    assert bare == []


def test_the_package_s_face_only_imports_each_name_when_it_is_used_and_as_types_are_checked() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for_types = [node for node in tree.body if isinstance(node, ast.If)]
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    others = {type(node) for node in tree.body} - {ast.If, ast.FunctionDef}
    assert others <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign}
    assert functions <= {"__getattr__", "__dir__"}
    assert [ast.unparse(node.test) for node in for_types] == ["TYPE_CHECKING"]
    modules = {
        alias.name: f".{node.module}"
        for node in for_types[0].body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert modules == trio_cluster._MODULES
    assert modules.keys() == set(trio_cluster.__all__) - {"__version__"}


def test_commands_that_only_ask_a_node_import_no_server() -> None:
    """For this takes most of a second each time."""
    program = (
        "import sys\n"
        "from trio_cluster.cli import commands\n"
        "commands.main(['status', '--nonsense'])\n"
        "print(*sorted(set(sys.modules) & {'quart', 'msgspec', 'trio_cluster.node', 'trio_cluster.server'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_there_is_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" in project["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab.]\w+)?", trio_cluster.__version__)


# What belongs to a machine on which somebody once worked, and not into a public tree. Each is put together
# here, so that this file passes its own test.
FORBIDDEN = tuple(
    "".join(parts)
    for parts in (
        ("/wo", "rk/"),
        ("/tmp", "/venv"),
        ("/ro", "ot/"),
        ("/opt/", "pypi"),
        ("/opt/", "wheels"),
        ("files.python", "hosted"),
        ("pypi", ".org"),
        ("registry.npm", "js"),
        ("deb.deb", "ian"),
    )
)


def tracked() -> list[Path]:
    """Return the files of the project; without git, the ones that are in its folders."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        paths = [ROOT / name for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        folders = ("trio_cluster", "tests", "examples", "docs")
        paths = [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    return [path for path in paths if path.is_file() and not {"__pycache__", "_build"} & set(path.parts)]


def test_no_file_speaks_of_one_machine_or_registry() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text]
    assert found == []


def test_ci_runs_what_the_readme_tells_people_to_run() -> None:
    command = "python3 -m venv .venv && .venv/bin/pip install -q nox && .venv/bin/nox"
    assert f"test_command='{command}'\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"\n{command}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {
        ".".join(("trio_cluster", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in INSIDE
    }
    below = {
        name: {other for other in imported(path) if other in names and other != name}
        for name, path in names.items()
    }
    # What imports nothing that is left is taken away, again and again; what remains is in a circle, or above one.
    while free := [name for name, others in below.items() if not others & below.keys()]:
        for name in free:
            del below[name]
    faces = {name for name in names if names[name].name == "__init__.py"}
    assert sorted(below.keys() - faces) == []
