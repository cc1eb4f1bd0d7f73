"""``--serve``: its syntax, the lookup of engines, and the registration of their models."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from thread_shortage import no_threads

from trio_cluster.cli.settings import load_options
from trio_cluster.core.model import ChatModelOptions
from trio_cluster.engines import (
    GROUP,
    LoadingEngine,
    Option,
    ServedModel,
    ServeSpec,
    _engine,
    boolean,
    fraction,
    parse_serve,
    serve_engine,
    text,
    whole_number,
)
from trio_cluster.errors import ClusterError, OptionsError
from trio_cluster.server import ClusterServer


class Toy(LoadingEngine):
    """An engine that loads nothing, in no time."""

    argument = "anything"
    requires = ("json",)
    extra = "toys[all]"
    options: Mapping[str, Option] = {  # type: ignore[misc]
        "name": Option(text, "toy", "its name"),
        "size": Option(whole_number(1, 9), 3, "its size"),
        "max_heat": Option(fraction(0, 1), 0.5, "how hot it gets"),
        "loud": Option(boolean, False, "whether it makes noise"),
    }

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failure: Exception | None = None

    def check(self, argument: str, options: Mapping[str, Any]) -> None:
        if argument == "broken":
            raise ValueError("there is no file 'broken'")

    @contextmanager
    def open(self, argument: str, options: Mapping[str, Any]) -> Iterator[ServedModel]:
        if self.failure is not None:
            raise self.failure
        self.log.append("loaded")
        yield ServedModel(options["name"], "chat", self.answer, ChatModelOptions(context_window=7))
        self.log.append("freed")

    async def answer(self, request: object) -> str:
        return "hello"


class EntryPointOf:
    def __init__(self, name: str, value: Any) -> None:
        self.name, self.object, self.value = name, value, "toys:engine"

    def load(self) -> Any:
        if isinstance(self.object, Exception):
            raise self.object
        return self.object


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy()
    points = [EntryPointOf("toy", toy), EntryPointOf("torn", ImportError("no libtoy.so"))]
    monkeypatch.setattr(_engine, "entry_points", lambda group: points)
    return toy


def options(**changed: Any) -> dict[str, Any]:
    return {"name": "toy", "size": 3, "max_heat": 0.5, "loud": False} | changed


@pytest.mark.parametrize(
    ("spec", "argument", "expected"),
    [
        ("toy", "", options()),
        ("toy:", "", options()),
        ("toy:file.bin", "file.bin", options()),
        (" toy : file.bin , size=4", "file.bin", options(size=4)),
        ("toy:/a/b,c.bin", "/a/b,c.bin", options()),
        ("toy:C:/models/x.bin", "C:/models/x.bin", options()),
        ("toy:x,name=a,b,size=9", "x", options(name="a,b", size=9)),
        ("toy,max-heat=0.25,loud=YES", "", options(max_heat=0.25, loud=True)),
        ("toy,loud=off", "", options(loud=False)),
        ("toy:x,name=a=b", "x", options(name="a=b")),
    ],
)
def test_a_spec_is_read(toy: Toy, spec: str, argument: str, expected: dict[str, Any]) -> None:
    assert parse_serve(spec) == ServeSpec("toy", argument, expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "there is no engine ''; there are: .*toy"),
        (
            "lama:x",
            "there is no engine 'lama'; there are: command, digits, hibari, llama, minilm, openai, torn, toy, whisper",
        ),
        ("toy,sise=4", "'toy' has no option 'sise'; it has: name, size, max_heat, loud"),
        ("toy,size=4,size=5", "'size' is given twice; give it once"),
        ("toy,size=ten", "size: expected a whole number from 1 to 9, got 'ten'"),
        ("toy,size=10", "size: expected a whole number from 1 to 9, got '10'"),
        ("toy,size=4.0", "size: expected a whole number"),
        ("toy,size=" + "9" * 5000, "size: expected a whole number"),
        ("toy,max_heat=nan", "max_heat: expected a number from 0 to 1, got 'nan'"),
        ("toy,max_heat=hot", "max_heat: expected a number from 0 to 1"),
        ("toy,loud=maybe", "loud: expected yes or no, got 'maybe'"),
        ("toy,name=", "name: expected some text"),
        ("toy:broken", "there is no file 'broken'"),
        ("digits:8", "'digits' takes no argument; leave out ':8'"),
        ("llama", r"give the path of a .gguf file or of a folder with some, hf:REPO\[:FILE\], or smollm2"),
        ("llama:/nowhere/x.gguf", "there is no file '/nowhere/x.gguf'; give the path of a .gguf file"),
        ("whisper:/nowhere", "lacks config.json, model.bin, tokenizer.json"),
        ("minilm:/nowhere", "lacks model.onnx, tokenizer.json"),
    ],
)
def test_a_wrong_spec_is_refused_with_what_would_be_right(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.setattr(_engine.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(OptionsError, match=message) as caught:
        parse_serve(spec)
    assert "\n" not in str(caught.value)


def variable_as_boolean(word: str) -> bool:
    environ = {"TRIO_CLUSTER_ENABLE_CLUSTER": word}
    return load_options(config=None, environ=environ, flags={}).enable_cluster


@pytest.mark.parametrize(
    ("words", "value"), [("yes Yes true on ON 1", True), ("no NO false False off 0", False)]
)
def test_engines_and_variables_take_the_same_words_as_booleans(words: str, value: bool) -> None:
    assert {boolean(word) for word in words.split()} == {value}
    assert {variable_as_boolean(word) for word in words.split()} == {value}
    assert boolean(f" {words.split()[0]} ") is variable_as_boolean(f" {words.split()[0]} ") is value


@pytest.mark.parametrize("word", ["maybe", "", "2", "y"])
def test_other_words_are_no_booleans(word: str) -> None:
    with pytest.raises(ValueError, match=f"expected yes or no, got '{word}'"):
        boolean(word)
    with pytest.raises(OptionsError, match="expected true or false"):
        variable_as_boolean(word)


def test_missing_libraries_are_named_with_what_to_install(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "requires", ("json", "libtoy", "libplay"))
    with pytest.raises(
        ClusterError, match=r"needs libtoy and libplay.* install them with: pip install 'toys\[all\]'"
    ) as caught:
        parse_serve("toy")
    assert not isinstance(caught.value, OptionsError)


def test_an_engine_that_cannot_be_imported_is_an_error_with_its_name_and_the_reason(toy: Toy) -> None:
    with pytest.raises(ClusterError, match=r"'torn' \(toys:engine\) cannot be imported: no libtoy.so"):
        parse_serve("torn")


def test_an_installed_package_can_bring_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop.py").write_text(
        "from trio_cluster.engines import LoadingEngine\n"
        "class Shop(LoadingEngine): argument = 'x'\n"
        "engine = Shop()\n"
    )
    info = tmp_path / "shop-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 1.0\n")
    # The second name is that of a built-in engine, which no package can take.
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nshop = shop:engine\ndigits = shop:engine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    assert parse_serve("shop:y") == ServeSpec("shop", "y", {})
    with pytest.raises(OptionsError, match="takes no argument"):
        parse_serve("digits:y")


def test_the_built_in_engines_are_entry_points_and_have_extras() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"][GROUP]
    assert declared == {name: point.value for name, point in _engine.BUILT_IN.items()}
    for name, point in _engine.BUILT_IN.items():
        engine = point.load()
        assert engine.summary
        if engine.requires:
            assert engine.extra == f"trio-cluster[{name}]"
            assert name in project["optional-dependencies"]
            assert "name" in engine.options


async def test_a_model_is_registered_while_its_engine_runs_and_freed_afterwards(toy: Toy) -> None:
    server = ClusterServer()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_engine, parse_serve("toy,name=mine"), server)
        assert server.list_models() == ["mine"]
        assert toy.log == ["loaded"]
        nursery.cancel_scope.cancel()
    assert server.list_models() == []
    assert toy.log == ["loaded", "freed"]


async def test_a_name_conflict_is_an_error_and_frees_the_model(toy: Toy) -> None:
    server = ClusterServer()
    server.register_chat("toy", toy.answer)
    with pytest.RaisesGroup(pytest.RaisesExc(ClusterError, match="toy")):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_engine, parse_serve("toy"), server)
    assert toy.log == ["loaded", "freed"]
    assert server.list_models() == ["toy"]


async def test_a_model_that_cannot_be_loaded_registers_nothing(toy: Toy) -> None:
    toy.failure = ClusterError("cannot load 'x': it is torn")
    server = ClusterServer()
    with pytest.RaisesGroup(pytest.RaisesExc(ClusterError, match="torn")):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_engine, parse_serve("toy"), server)
    assert server.list_models() == []


async def test_without_a_thread_a_model_is_not_loaded_and_one_that_is_loaded_is_freed(toy: Toy) -> None:
    server = ClusterServer()
    with no_threads(), pytest.raises(ClusterError, match="can start no more threads"):
        await serve_engine(parse_serve("toy"), server)
    assert (server.list_models(), toy.log) == ([], [])
    with ExitStack() as shortage:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_engine, parse_serve("toy"), server)
            shortage.enter_context(no_threads())
            nursery.cancel_scope.cancel()
    assert toy.log == ["loaded", "freed"]


async def test_a_cancellation_while_a_model_is_loaded_frees_it_again(toy: Toy) -> None:
    server = ClusterServer()
    with trio.CancelScope() as scope:
        scope.cancel()
        await serve_engine(parse_serve("toy"), server)
    assert scope.cancelled_caught
    assert toy.log in ([], ["loaded", "freed"])
    assert server.list_models() == []


def test_the_hint_for_an_extra_of_this_package_installs_what_it_consists_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declared = [
        "trio>=0.30",
        "xllamacpp>=2026; extra == 'llama'",
        'numpy>=1.26; extra == "llama"',
        "onnxruntime>=1; extra == 'minilm'",
        "trio-cluster[llama,minilm]; extra == 'demo'",
    ]
    monkeypatch.setattr(_engine, "requires", lambda _: declared)
    assert _engine.install_command("trio-cluster[llama]") == (
        "pip install 'xllamacpp>=2026' 'numpy>=1.26'; or, in a checkout, pip install '.[llama]'"
    )
    assert "'xllamacpp>=2026' 'numpy>=1.26' 'onnxruntime>=1'" in _engine.install_command("trio-cluster[demo]")
    assert _engine.install_command("toys[all]") == "pip install 'toys[all]'"
