"""A folder of models for the engine ``llama``: each is loaded when it is asked for, and they come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from clusters import until
from gguf_writer import header, write_gguf
from serving_node import ask, serving

from trio_cluster.engines import _gguf_folder, llama, parse_serve, serve_engine
from trio_cluster.engines._gguf_folder import FolderModel, find_in_folder, follow_folder
from trio_cluster.engines._gguf_header import GgufHeader, read_header
from trio_cluster.errors import ClusterError, OptionsError
from trio_cluster.local.slots import Slots

FACTS: dict[str, Any] = {
    "llama__context_length": 2048,
    "llama__block_count": 10,
    "llama__embedding_length": 64,
    "llama__attention__head_count": 8,
    "llama__attention__head_count_kv": 2,
}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let models be loaded without llama.cpp; return the names of the files that were loaded and freed."""
    log: list[str] = []

    class Model(llama.Llama):
        async def chat(self, request: Any, provider: Any) -> None:
            await provider.push(f"I am {request.model}")

        def close(self) -> None:
            log.append("free")

    def load(path: str, options: Any) -> llama.Llama:
        log.append(Path(path).name)
        return Model(options["ctx"], object(), Slots(1))

    monkeypatch.setattr(llama.Llama, "load", load)
    monkeypatch.setattr(type(llama.engine), "requires", ())
    monkeypatch.setattr(_gguf_folder, "_LOOK", 0.02)
    return log


# The header


def test_a_header_says_what_memory_a_model_needs(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", **FACTS)
    # 10 layers, 2 heads of 8 numbers each for keys and for values, 2 bytes a number.
    assert read_header(tmp_path / "m.gguf") == GgufHeader("llama", 2048, 10 * 2 * (8 + 8) * 2)
    more: dict[str, Any] = {"llama__attention__key_length": 16, "llama__attention__value_length": 4}
    write_gguf(tmp_path / "m.gguf", **FACTS | more | {"llama__attention__head_count_kv": [0, 2, 4]})
    assert read_header(tmp_path / "m.gguf").bytes_per_token == 10 * 4 * (16 + 4) * 2


@pytest.mark.parametrize(
    ("facts", "is_chat"),
    [
        ({"architecture": "llama"}, True),
        ({"architecture": "nomic-bert"}, False),
        ({"architecture": "clip", "general__type": "mmproj"}, False),
        ({"architecture": "llama", "general__type": "adapter"}, False),
        ({"architecture": "llama", "general__type": "model", "llama__x": 0.5, "llama__y": True}, True),
    ],
)
def test_a_header_says_whether_a_model_can_be_asked(
    facts: dict[str, Any], is_chat: bool, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", **facts)
    assert read_header(tmp_path / "m.gguf").is_chat is is_chat


def test_the_vocabulary_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(header(general__architecture="llama", tokenizer__ggml__x="t")[:-9])
    assert read_header(tmp_path / "m.gguf").architecture == "llama"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "it is damaged, or not complete"),
        (b"GGUF", "it is damaged, or not complete"),
        (b"PK\3\4 and more", "it is no .gguf file"),
        (header(version=9), "its format has the version 9, which is not known"),
        (header(general__architecture="llama")[:-2], "it is damaged, or not complete"),
        (header(a="b").replace(b"\x08\0\0\0", b"\x63\0\0\0"), "it is damaged, or not complete"),
        (b"GGUF\3\0\0\0" + b"\xff" * 64, "it is damaged, or not complete"),
        (header(a=[1]).replace(b"\x01\0\0\0\0\0\0\0\x01", b"\xff" * 9), "it is damaged, or not complete"),
    ],
)
def test_a_file_that_breaks_the_format_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        read_header(tmp_path / "m.gguf")


# The folder


def test_models_are_found_in_a_folder_and_below_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "b.gguf", 500)
    write_gguf(tmp_path / "owner" / "repo" / "a.gguf", 600)
    for number in (1, 2):
        write_gguf(tmp_path / f"big-0000{number}-of-00002.gguf", 700)
    write_gguf(tmp_path / "z" / "b.gguf")
    write_gguf(tmp_path / "half-00001-of-00002.gguf")
    write_gguf(tmp_path / "e.gguf", architecture="bert")
    write_gguf(tmp_path / "mmproj-b.gguf", architecture="clip")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    (tmp_path / "notes.txt").write_text("no model")
    models, refused = find_in_folder(tmp_path)
    assert [(model.name, model.path.name, model.size) for model in models] == [
        ("b", "b.gguf", 500),
        ("big", "big-00001-of-00002.gguf", 1400),
        ("a", "a.gguf", 600),
    ]
    assert {path.relative_to(tmp_path).as_posix(): why for path, why in refused.items()} == {
        "e.gguf": "it is of the kind bert, and cannot be asked",
        "half-00001-of-00002.gguf": "1 of its files are missing",
        "torn.gguf": "it is damaged, or not complete",
        "z/b.gguf": f"{tmp_path / 'b.gguf'} has the same name",
    }


async def test_each_model_of_a_folder_is_loaded_when_it_is_asked_for(
    loads: list[str], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / f"{name}.gguf", **FACTS)
    async with serving(f"llama:{tmp_path},ctx=4096,parallel=2") as (server, client):
        assert server.list_models() == ["a", "b"]
        assert loads == []
        entry = (await client.get("/v1/models/a")).json()
        assert (entry["context_window"], entry["state"]) == (2048, "cold")
        assert await ask(client, "a") == "I am a"
        assert await ask(client, "b") == "I am b"
        assert await ask(client, "a") == "I am a"
        assert loads == ["a.gguf", "b.gguf"]
        needed = {name: each.resident.said for name, each in server.on_demand.by_model.items()}
        assert needed == dict.fromkeys("ab", round(1.1 * (1000 + 2048 * 2 * 640)))
    assert loads == ["a.gguf", "b.gguf", "free", "free"]


async def test_models_that_do_not_fit_together_make_room(loads: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / f"{name}.gguf", 600_000)
    async with serving(f"llama:{tmp_path}", memory="1MiB") as (_, client):
        for name in ("a", "b", "a"):
            assert await ask(client, name) == f"I am {name}"
    assert loads == ["a.gguf", "free", "b.gguf", "free", "a.gguf", "free"]


async def test_models_come_and_go_with_their_files(
    loads: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "a.gguf")
    async with serving(f"llama:{tmp_path}") as (server, client):
        assert await ask(client, "a") == "I am a"
        write_gguf(tmp_path / "b.gguf")
        (tmp_path / "torn.gguf").write_bytes(b"GGUF")
        await until(lambda: server.list_models() == ["a", "b"])
        assert await ask(client, "b") == "I am b"
        (tmp_path / "a.gguf").unlink()
        await until(lambda: server.list_models() == ["b"])
        # Replaced by another file: the old one is freed, and the new one is loaded.
        write_gguf(tmp_path / "b.gguf", 2000)
        await until(lambda: server.list_models() == [])
        await until(lambda: server.list_models() == ["b"])
        assert await ask(client, "b") == "I am b"
        assert loads == ["a.gguf", "b.gguf", "free", "free", "b.gguf"]
    assert [record.getMessage() for record in caplog.records if "torn" in record.getMessage()] == [
        f"{tmp_path / 'torn.gguf'} is no model: it is damaged, or not complete"
    ]


async def test_a_file_that_is_being_copied_is_no_model_until_it_is_complete(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    sizes = iter([None, 1, 2, 3, 3, 3])
    served: list[tuple[int, float]] = []

    def find(folder: Path) -> tuple[list[FolderModel], dict[Path, str]]:
        size = next(sizes, None)
        return ([] if size is None else [FolderModel("m", folder / "m.gguf", size, 0)]), {}

    async def serve(model: FolderModel, *, task_status: trio.TaskStatus[None]) -> None:
        served.append((model.size, trio.current_time() - began))
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            served.append((0, trio.current_time() - began))

    async def at_once(function: Any, *args: Any) -> Any:
        # The clock would jump while a thread looks.
        return function(*args)

    monkeypatch.setattr(_gguf_folder, "find_in_folder", find)
    monkeypatch.setattr(_gguf_folder, "run_in_thread", at_once)
    began = trio.current_time()
    with trio.move_on_after(65):
        await follow_folder(Path("/models"), serve)
    assert served == [(3, 40.0), (0, 60.0)]


async def test_a_model_whose_name_is_taken_is_left_out_later_and_an_error_at_the_start(
    loads: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(f"llama:{tmp_path}") as (server, _):
        assert "there are no models" in caplog.text
        server.register_chat("a", lambda request: "mine")
        write_gguf(tmp_path / "a.gguf")
        await until(lambda: "a model of the folder cannot be served" in caplog.text)
        assert server.list_models() == ["a"]
        with pytest.RaisesGroup(pytest.RaisesExc(ClusterError, match="'a'")):
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_engine, parse_serve(f"llama:{tmp_path}"), server)


async def test_a_folder_that_is_away_for_a_moment_takes_no_models_away(
    loads: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "models"
    write_gguf(folder / "a.gguf")
    async with serving(f"llama:{folder}") as (server, client):
        folder.rename(tmp_path / "away")
        await until(lambda: "cannot be looked through" in caplog.text)
        assert server.list_models() == ["a"]
        (tmp_path / "away").rename(folder)
        assert await ask(client, "a") == "I am a"


async def test_one_file_is_loaded_on_demand_too_if_its_options_say_so(
    loads: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2):
        write_gguf(tmp_path / f"big-0000{number}-of-00002.gguf", 1000)
    async with serving(f"llama:{tmp_path}/big-00001-of-00002.gguf,idle=0.05") as (server, client):
        assert server.list_models() == ["big"]
        assert server.on_demand.by_model["big"].resident.said == 2200
        assert loads == []
        assert await ask(client, "big") == "I am big"
        await until(lambda: loads == ["big-00001-of-00002.gguf", "free"])


def test_a_folder_has_no_name(loads: list[str], tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="name: the models of a folder have the names of their files"):
        parse_serve(f"llama:{tmp_path},name=x")
    with pytest.raises(OptionsError, match="there is no file '/nowhere'"):
        parse_serve("llama:/nowhere")
